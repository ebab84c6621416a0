/* What plugins in C import from the server that loads them: every nbdkit_* function.
 *
 * This is a library of its own, not an extension module: `library.py` loads it with RTLD_GLOBAL,
 * so that the dynamic loader finds the functions for a plugin, and fills `pynbdkit_server` with
 * functions of Python. Nearly everything is passed on to these; here is what cannot be in Python:
 * variable arguments, structures that are returned by value, memory that the caller frees, and
 * errno. Prototypes and rules: nbdkit-plugin(3), nbdkit-filter(3).
 */

#define _GNU_SOURCE 1

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/socket.h>

#define EXPORT __attribute__ ((visibility ("default")))
#define MAX_EXTENTS (1 << 20)
#define MAX_EXPORTS 10000
#define MAX_STRING 4096

/* In the order of `library.py`, which fills it. */
EXPORT struct {
  void (*error) (const char *text);
  void (*debug) (const char *text);
  int64_t (*parse_size) (const char *text);
  int (*parse_bool) (const char *text);
  int (*parse_integer) (const char *what, const char *text, int bits, int is_signed, void *r);
  int (*parse_probability) (const char *what, const char *text, double *r);
  int (*parse_delay) (const char *what, const char *text, unsigned *sec, unsigned *nsec);
  const char *(*read_password) (const char *value);
  const char *(*text_of_client) (int which);
  int64_t (*number_of_client) (int which);
  int (*peer_name) (void *address, socklen_t *length);
  int (*nanosleep) (unsigned sec, unsigned nsec);
  int (*stdio_safe) (void);
  void (*shutdown) (void);
  int (*disconnect) (int force);
  const char *(*intern) (const char *text, size_t length);
} pynbdkit_server;

/* Python may be gone already (or not be there, in a child process that only waits for its exec):
 * then there is nobody to ask, and every question has this answer. */
static volatile int nobody;

#define ASK(answer, name, ...)                                          \
  (nobody || pynbdkit_server.name == NULL ? (answer) : pynbdkit_server.name (__VA_ARGS__))

EXPORT int pynbdkit_verbose; /* else nobody wants to know what nbdkit_debug says */

enum { EXPORT_NAME, TLS_DN, TLS_ISSUER_DN, SECURITY_CONTEXT };
enum { IS_TLS, PEER_PID, PEER_UID, PEER_GID };

/* -- errors ------------------------------------------------------------------------------------ */

static __thread int set_error; /* by nbdkit_set_error, in this call */
static __thread int last_errno; /* what errno was when this call returned */

EXPORT void
nbdkit_set_error (int error)
{
  set_error = error;
}

/* Call a plugin's function, and keep its errno from whatever comes after it. */
#define CALL(type, call)                        \
  do {                                          \
    type result;                                \
    set_error = 0;                              \
    errno = 0;                                  \
    result = (call);                            \
    last_errno = errno;                         \
    return result;                              \
  } while (0)

/* The error of this thread's last call; 0 if the plugin has not said one. */
EXPORT int
pynbdkit_error (int errno_is_preserved)
{
  return set_error ? set_error : errno_is_preserved ? last_errno : 0;
}

static void
alone (void)
{
  nobody = 1;
}

/* Whether Python can be called; it can again, in a child process that Python itself has made. */
EXPORT void
pynbdkit_is_there (int yes)
{
  static int first = 1;

  if (first)
    pthread_atfork (NULL, NULL, alone);
  first = 0;
  nobody = !yes;
}

/* Errors are told in any case, debug messages only where Python is there to tell them. */
static void
say (int is_error, const char *format, va_list args)
{
  void (*to) (const char *) = is_error ? pynbdkit_server.error : pynbdkit_server.debug;
  int saved = errno;
  char *text;

  if (vasprintf (&text, format, args) >= 0) {
    if (to && !nobody)
      to (text);
    else if (is_error)
      dprintf (STDERR_FILENO, "pynbdkit: error: %s\n", text);
    free (text);
  }
  errno = saved;
}

EXPORT void
nbdkit_verror (const char *format, va_list args)
{
  say (1, format, args);
}

EXPORT void
nbdkit_error (const char *format, ...)
{
  va_list args;

  va_start (args, format);
  say (1, format, args);
  va_end (args);
}

EXPORT void
nbdkit_vdebug (const char *format, va_list args)
{
  if (pynbdkit_verbose)
    say (0, format, args);
}

EXPORT void
nbdkit_debug (const char *format, ...)
{
  va_list args;

  if (pynbdkit_verbose) {
    va_start (args, format);
    say (0, format, args);
    va_end (args);
  }
}

static int
fail (int error, const char *format, ...)
{
  va_list args;

  errno = error;
  va_start (args, format);
  say (1, format, args);
  va_end (args);
  return -1;
}

/* -- parsing ------------------------------------------------------------------------------------ */

EXPORT int64_t
nbdkit_parse_size (const char *text)
{
  return ASK (-1, parse_size, text);
}

EXPORT int
nbdkit_parse_bool (const char *text)
{
  return ASK (-1, parse_bool, text);
}

#define PARSE(name, type, is_signed)                                                    \
  EXPORT int                                                                            \
  nbdkit_parse_##name (const char *what, const char *text, type *r)                     \
  {                                                                                     \
    return ASK (-1, parse_integer, what, text, sizeof *r * CHAR_BIT, is_signed, r); \
  }

PARSE (int, int, 1)
PARSE (unsigned, unsigned, 0)
PARSE (int8_t, int8_t, 1)
PARSE (uint8_t, uint8_t, 0)
PARSE (int16_t, int16_t, 1)
PARSE (uint16_t, uint16_t, 0)
PARSE (int32_t, int32_t, 1)
PARSE (uint32_t, uint32_t, 0)
PARSE (int64_t, int64_t, 1)
PARSE (uint64_t, uint64_t, 0)

EXPORT int
nbdkit_parse_probability (const char *what, const char *text, double *r)
{
  return ASK (-1, parse_probability, what, text, r);
}

EXPORT int
nbdkit_parse_delay (const char *what, const char *text, unsigned *sec, unsigned *nsec)
{
  return ASK (-1, parse_delay, what, text, sec, nsec);
}

static char *
copy (const char *text)
{
  char *result = strdup (text);

  if (result == NULL)
    fail (errno, "strdup: %m");
  return result;
}

EXPORT int
nbdkit_read_password (const char *value, char **password)
{
  const char *text = ASK (NULL, read_password, value);

  *password = text ? copy (text) : NULL;
  return *password ? 0 : -1;
}

EXPORT char *
nbdkit_absolute_path (const char *path)
{
  char *folder, *result;

  if (path == NULL || *path == '\0') {
    fail (EINVAL, "cannot convert null or empty path to an absolute path");
    return NULL;
  }
  if (*path == '/')
    return copy (path);
  folder = get_current_dir_name ();
  if (folder == NULL) {
    fail (errno, "getcwd: %m");
    return NULL;
  }
  if (asprintf (&result, "%s/%s", folder, path) == -1) {
    fail (errno, "asprintf: %m");
    result = NULL;
  }
  free (folder);
  return result;
}

EXPORT char *
nbdkit_realpath (const char *path)
{
  char *result;

  if (path == NULL || *path == '\0') {
    fail (EINVAL, "cannot resolve a null or empty path");
    return NULL;
  }
  result = realpath (path, NULL);
  if (result == NULL)
    fail (errno, "realpath: %s: %m", path);
  return result;
}

/* -- strings that live as long as the connection, or the server ----------------------------------- */

static const char *
intern (const char *text, size_t length)
{
  return ASK (NULL, intern, text, length);
}

EXPORT const char *
nbdkit_strdup_intern (const char *text)
{
  if (text == NULL) {
    fail (EINVAL, "nbdkit_strdup_intern: no string given");
    return NULL;
  }
  return intern (text, strlen (text));
}

EXPORT const char *
nbdkit_strndup_intern (const char *text, size_t n)
{
  if (text == NULL) {
    fail (EINVAL, "nbdkit_strndup_intern: no string given");
    return NULL;
  }
  return intern (text, strnlen (text, n));
}

EXPORT const char *
nbdkit_vprintf_intern (const char *format, va_list args)
{
  const char *result;
  char *text;

  if (vasprintf (&text, format, args) == -1) {
    fail (errno, "vasprintf: %m");
    return NULL;
  }
  result = intern (text, strlen (text));
  free (text);
  return result;
}

EXPORT const char *
nbdkit_printf_intern (const char *format, ...)
{
  const char *result;
  va_list args;

  va_start (args, format);
  result = nbdkit_vprintf_intern (format, args);
  va_end (args);
  return result;
}

/* -- the client, and the server --------------------------------------------------------------------- */

EXPORT const char *
nbdkit_export_name (void)
{
  return ASK (NULL, text_of_client, EXPORT_NAME);
}

#define TEXT(name, which)                                               \
  EXPORT char *                                                         \
  nbdkit_##name (void)                                                  \
  {                                                                     \
    const char *text = ASK (NULL, text_of_client, which);               \
    return text ? copy (text) : NULL;                                   \
  }

TEXT (peer_tls_dn, TLS_DN)
TEXT (peer_tls_issuer_dn, TLS_ISSUER_DN)
TEXT (peer_security_context, SECURITY_CONTEXT)

EXPORT int
nbdkit_is_tls (void)
{
  return (int) ASK (-1, number_of_client, IS_TLS);
}

EXPORT int64_t
nbdkit_peer_pid (void)
{
  return ASK (-1, number_of_client, PEER_PID);
}

EXPORT int64_t
nbdkit_peer_uid (void)
{
  return ASK (-1, number_of_client, PEER_UID);
}

EXPORT int64_t
nbdkit_peer_gid (void)
{
  return ASK (-1, number_of_client, PEER_GID);
}

EXPORT int
nbdkit_peer_name (struct sockaddr *address, socklen_t *length)
{
  return ASK (-1, peer_name, address, length);
}

EXPORT int
nbdkit_nanosleep (unsigned sec, unsigned nsec)
{
  if (ASK (-1, nanosleep, sec, nsec) == 0)
    return 0;
  errno = ESHUTDOWN;
  return -1;
}

EXPORT int
nbdkit_stdio_safe (void)
{
  return ASK (0, stdio_safe);
}

EXPORT void
nbdkit_shutdown (void)
{
  if (!nobody && pynbdkit_server.shutdown)
    pynbdkit_server.shutdown ();
}

EXPORT int
nbdkit_disconnect (int force)
{
  return ASK (-1, disconnect, force);
}

/* -- extents ---------------------------------------------------------------------------------------- */

enum { NBDKIT_EXTENT_HOLE = 1, NBDKIT_EXTENT_ZERO = 2 };

struct nbdkit_extent {
  uint64_t offset, length;
  uint32_t type;
};

struct nbdkit_extents {
  uint64_t start, end; /* what was asked about: nothing else is kept */
  uint64_t next; /* where the next extent has to begin */
  size_t count, room;
  struct nbdkit_extent *list;
};

EXPORT struct nbdkit_extents *
nbdkit_extents_new (uint64_t start, uint64_t end)
{
  struct nbdkit_extents *extents;

  if (start >= INT64_MAX || end > INT64_MAX || start > end) {
    fail (ERANGE, "nbdkit_extents_new: %" PRIu64 " to %" PRIu64 " is no range", start, end);
    return NULL;
  }
  extents = calloc (1, sizeof *extents);
  if (extents == NULL) {
    fail (errno, "calloc: %m");
    return NULL;
  }
  extents->start = start;
  extents->end = end;
  extents->next = UINT64_MAX; /* the first one may begin before the range */
  return extents;
}

EXPORT void
nbdkit_extents_free (struct nbdkit_extents *extents)
{
  if (extents) {
    free (extents->list);
    free (extents);
  }
}

EXPORT size_t
nbdkit_extents_count (const struct nbdkit_extents *extents)
{
  return extents->count;
}

EXPORT struct nbdkit_extent
nbdkit_get_extent (const struct nbdkit_extents *extents, size_t i)
{
  return extents->list[i];
}

EXPORT const struct nbdkit_extent *
pynbdkit_extents_list (const struct nbdkit_extents *extents)
{
  return extents->list;
}

EXPORT int
nbdkit_add_extent (struct nbdkit_extents *extents, uint64_t offset, uint64_t length, uint32_t type)
{
  struct nbdkit_extent *last = extents->count ? &extents->list[extents->count - 1] : NULL;

  if (length > UINT64_MAX - offset)
    return fail (EINVAL, "nbdkit_add_extent: offset %" PRIu64 " and length %" PRIu64
                 " are beyond every disk", offset, length);
  if (extents->next != UINT64_MAX && offset != extents->next)
    return fail (EINVAL, "nbdkit_add_extent: extents must be added in order, and without gaps:"
                 " offset %" PRIu64 " where %" PRIu64 " was due", offset, extents->next);
  if (extents->next == UINT64_MAX && offset > extents->start)
    return fail (EINVAL, "nbdkit_add_extent: the first extent must not begin after what was asked"
                 " about: offset %" PRIu64 ", asked about %" PRIu64, offset, extents->start);
  extents->next = offset + length;
  if (length == 0 || extents->next <= extents->start || offset >= extents->end)
    return 0;
  type &= NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO;
  if (offset < extents->start) {
    length -= extents->start - offset;
    offset = extents->start;
  }
  if (length > extents->end - offset)
    length = extents->end - offset;
  if (last && last->type == type) {
    last->length += length;
    return 0;
  }
  if (extents->count == extents->room) {
    size_t room = extents->room ? 2 * extents->room : 16;
    struct nbdkit_extent *list;

    if (extents->count >= MAX_EXTENTS)
      return 0; /* an answer may end early */
    list = realloc (extents->list, room * sizeof *list);
    if (list == NULL)
      return fail (errno, "nbdkit_add_extent: realloc: %m");
    extents->list = list;
    extents->room = room;
  }
  extents->list[extents->count++] =
    (struct nbdkit_extent) { .offset = offset, .length = length, .type = type };
  return 0;
}

/* -- exports ---------------------------------------------------------------------------------------- */

struct nbdkit_export {
  char *name; /* NULL: the default export, whose name is asked for later */
  char *description;
};

struct nbdkit_exports {
  size_t count, room;
  struct nbdkit_export *list;
};

EXPORT struct nbdkit_exports *
nbdkit_exports_new (void)
{
  struct nbdkit_exports *exports = calloc (1, sizeof *exports);

  if (exports == NULL)
    fail (errno, "calloc: %m");
  return exports;
}

EXPORT void
nbdkit_exports_free (struct nbdkit_exports *exports)
{
  if (exports == NULL)
    return;
  for (size_t i = 0; i < exports->count; ++i) {
    free (exports->list[i].name);
    free (exports->list[i].description);
  }
  free (exports->list);
  free (exports);
}

EXPORT size_t
nbdkit_exports_count (const struct nbdkit_exports *exports)
{
  return exports->count;
}

EXPORT struct nbdkit_export
nbdkit_get_export (const struct nbdkit_exports *exports, size_t i)
{
  return exports->list[i];
}

EXPORT const struct nbdkit_export *
pynbdkit_exports_list (const struct nbdkit_exports *exports)
{
  return exports->list;
}

static int
append (struct nbdkit_exports *exports, const char *name, const char *description)
{
  struct nbdkit_export export = { NULL, NULL };

  if (exports->count == MAX_EXPORTS)
    return fail (EINVAL, "nbdkit_add_export: more than %d exports", MAX_EXPORTS);
  if (exports->count == exports->room) {
    size_t room = exports->room ? 2 * exports->room : 16;
    struct nbdkit_export *list = realloc (exports->list, room * sizeof *list);

    if (list == NULL)
      return fail (errno, "nbdkit_add_export: realloc: %m");
    exports->list = list;
    exports->room = room;
  }
  if ((name && (export.name = copy (name)) == NULL) ||
      (description && (export.description = copy (description)) == NULL)) {
    free (export.name);
    return -1;
  }
  exports->list[exports->count++] = export;
  return 0;
}

EXPORT int
nbdkit_add_export (struct nbdkit_exports *exports, const char *name, const char *description)
{
  if (name == NULL || strnlen (name, MAX_STRING + 1) > MAX_STRING ||
      (description && strnlen (description, MAX_STRING + 1) > MAX_STRING))
    return fail (EINVAL, "nbdkit_add_export: a name or description is missing, or over %d bytes",
                 MAX_STRING);
  return append (exports, name, description);
}

EXPORT int
nbdkit_use_default_export (struct nbdkit_exports *exports)
{
  return append (exports, NULL, NULL);
}

/* -- calls into the plugin ---------------------------------------------------------------------------- */

EXPORT int
pynbdkit_ask (int (*f) (void *), void *handle)
{
  CALL (int, f (handle));
}

EXPORT int64_t
pynbdkit_get_size (int64_t (*f) (void *), void *handle)
{
  CALL (int64_t, f (handle));
}

EXPORT void *
pynbdkit_open (void *(*f) (int), int readonly)
{
  CALL (void *, f (readonly));
}

/* The two that matter for speed have few arguments: each costs Python's side a tenth of the call. */
struct target {
  void *function, *handle;
  uintptr_t flags;
};

EXPORT int
pynbdkit_pread (const struct target *it, void *buf, uint32_t count, uint64_t offset)
{
  CALL (int, ((int (*) (void *, void *, uint32_t, uint64_t, uint32_t)) it->function)
        (it->handle, buf, count, offset, it->flags));
}

EXPORT int
pynbdkit_pread_1 (const struct target *it, void *buf, uint32_t count, uint64_t offset)
{
  CALL (int, ((int (*) (void *, void *, uint32_t, uint64_t)) it->function)
        (it->handle, buf, count, offset));
}

EXPORT int
pynbdkit_pwrite (const struct target *it, const void *buf, uint32_t count, uint64_t offset)
{
  CALL (int, ((int (*) (void *, const void *, uint32_t, uint64_t, uint32_t)) it->function)
        (it->handle, buf, count, offset, it->flags));
}

EXPORT int
pynbdkit_pwrite_1 (const struct target *it, const void *buf, uint32_t count, uint64_t offset)
{
  CALL (int, ((int (*) (void *, const void *, uint32_t, uint64_t)) it->function)
        (it->handle, buf, count, offset));
}

EXPORT int
pynbdkit_flush (int (*f) (void *, uint32_t), void *handle, uint32_t flags)
{
  CALL (int, f (handle, flags));
}

EXPORT int
pynbdkit_flush_1 (int (*f) (void *), void *handle, uint32_t flags)
{
  (void) flags;
  CALL (int, f (handle));
}

/* trim, zero and cache */
EXPORT int
pynbdkit_range (int (*f) (void *, uint32_t, uint64_t, uint32_t),
                void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  CALL (int, f (handle, count, offset, flags));
}

EXPORT int
pynbdkit_trim_1 (int (*f) (void *, uint32_t, uint64_t),
                 void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) flags;
  CALL (int, f (handle, count, offset));
}

EXPORT int
pynbdkit_zero_1 (int (*f) (void *, uint32_t, uint64_t, int),
                 void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  CALL (int, f (handle, count, offset, flags & 1)); /* NBDKIT_FLAG_MAY_TRIM */
}

EXPORT int
pynbdkit_extents (int (*f) (void *, uint32_t, uint64_t, uint32_t, struct nbdkit_extents *),
                  void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                  struct nbdkit_extents *extents)
{
  CALL (int, f (handle, count, offset, flags, extents));
}

EXPORT int
pynbdkit_block_size (int (*f) (void *, uint32_t *, uint32_t *, uint32_t *),
                     void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  CALL (int, f (handle, minimum, preferred, maximum));
}
