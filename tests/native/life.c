/* A plugin that writes each call that it gets to the file LIFE_LOG, and fails where LIFE_FAIL says.
 *
 * LIFE_FAIL has the name of a callback, and what it then does: "open" fails with a message,
 * "open-silently" without one. LIFE_MODEL is the answer of thread_model, LIFE_SIZE that of get_size.
 *
 * What plugin_init hands over can be spoilt: LIFE_STRUCT_SIZE is what the structure says of its
 * size (and it lies before a page that nobody may read, or, with LIFE_TRAP, before pointers to a
 * function that ends the process); LIFE_API_VERSION, LIFE_THREAD_MODEL, LIFE_NAME replace what it
 * says; LIFE_WITHOUT is a callback that it lacks; LIFE_NULL: there is none.
 */

#define _GNU_SOURCE 1

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef NBDKIT_API_VERSION
#define NBDKIT_API_VERSION 2
#endif
#include <nbdkit-plugin.h>

#ifndef THREAD_MODEL
#define THREAD_MODEL NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS
#endif
#define SIZE 65536

#if NBDKIT_API_VERSION == 1
#define FLAGS
#define TAKE_FLAGS const int flags = -1
#else
#define FLAGS , uint32_t flags
#define TAKE_FLAGS
#endif

static char disk[SIZE];
static int clients;

static void
note (const char *format, ...)
{
  const char *path = getenv ("LIFE_LOG");
  char line[1024];
  va_list args;
  int length, fd;

  if (path == NULL)
    return;
  va_start (args, format);
  length = vsnprintf (line, sizeof line - 1, format, args);
  va_end (args);
  line[length++] = '\n';
  fd = open (path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd >= 0) {
    if (write (fd, line, length) != length)
      abort ();
    close (fd);
  }
}

static void
note_call (const char *name, uint32_t count, uint64_t offset, int flags)
{
  if (flags < 0)
    note ("%s %u %llu", name, count, (unsigned long long) offset);
  else
    note ("%s %u %llu %d", name, count, (unsigned long long) offset, flags);
}

/* Whether this callback is to fail; it has said why, then. */
static int
fails (const char *name)
{
  const char *which = getenv ("LIFE_FAIL");
  size_t length = strlen (name);

  if (which == NULL || strncmp (which, name, length) != 0)
    return 0;
  if (which[length] == '\0') {
    nbdkit_error ("%s was told to fail, %d%%", name, 100);
    return 1;
  }
  return strcmp (which + length, "-silently") == 0;
}

static void
load (void)
{
  note ("load");
}

static void
unload (void)
{
  note ("unload");
}

static int
config (const char *key, const char *value)
{
  note ("config %s=%s", key, value);
  return fails ("config") ? -1 : 0;
}

static int
config_complete (void)
{
  note ("config_complete");
  return fails ("config_complete") ? -1 : 0;
}

static int
thread_model (void)
{
  const char *model = getenv ("LIFE_MODEL");

  note ("thread_model");
  return fails ("thread_model") ? -1 : model ? atoi (model) : NBDKIT_THREAD_MODEL_PARALLEL;
}

static int
get_ready (void)
{
  note ("get_ready");
  return fails ("get_ready") ? -1 : 0;
}

static int
after_fork (void)
{
  note ("after_fork in %s", getenv ("LIFE_PID") && atoi (getenv ("LIFE_PID")) == getpid ()
        ? "the process that was started" : "another process");
  return fails ("after_fork") ? -1 : 0;
}

static void
cleanup (void)
{
  note ("cleanup");
}

static void
dump_plugin (void)
{
  note ("dump_plugin");
  printf ("life_of=%d\n", 42);
}

static int
preconnect (int readonly)
{
  note ("preconnect readonly=%d", readonly);
  return fails ("preconnect") ? -1 : 0;
}

static int
list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  note ("list_exports readonly=%d tls=%d", readonly, is_tls);
  if (fails ("list_exports"))
    return -1;
  if (nbdkit_add_export (exports, "one", "the first") == -1 ||
      nbdkit_add_export (exports, "two", NULL) == -1 ||
      nbdkit_use_default_export (exports) == -1)
    return -1;
  return 0;
}

static const char *
default_export (int readonly, int is_tls)
{
  note ("default_export readonly=%d tls=%d", readonly, is_tls);
  return fails ("default_export") ? NULL : "main";
}

static void *
life_open (int readonly)
{
  int *handle;

  note ("open readonly=%d export=%s", readonly, nbdkit_export_name ());
  if (fails ("open"))
    return NULL;
  handle = malloc (sizeof *handle);
  *handle = ++clients;
  return handle;
}

static void
life_close (void *handle)
{
  note ("close %d", *(int *) handle);
  free (handle);
}

static const char *
export_description (void *handle)
{
  note ("export_description");
  return fails ("export_description") ? NULL : "about it";
}

static int64_t
get_size (void *handle)
{
  const char *size = getenv ("LIFE_SIZE");

  note ("get_size");
  return fails ("get_size") ? -1 : size ? atoll (size) : SIZE;
}

#define QUESTION(name, answer)                          \
  static int                                            \
  name (void *handle)                                   \
  {                                                     \
    note (#name);                                       \
    return fails (#name) ? -1 : (answer);               \
  }

QUESTION (can_write, 1)
QUESTION (can_flush, 1)
QUESTION (is_rotational, 0)
QUESTION (can_trim, 1)
QUESTION (can_zero, 1)
QUESTION (can_fast_zero, 1)
QUESTION (can_extents, 1)
QUESTION (can_multi_conn, 1)
QUESTION (can_fua, NBDKIT_FUA_NATIVE)
QUESTION (can_cache, NBDKIT_CACHE_NATIVE)

static int
block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  note ("block_size");
  *minimum = 1;
  *preferred = 4096;
  *maximum = 0xffffffff;
  return fails ("block_size") ? -1 : 0;
}

static int
life_pread (void *handle, void *buf, uint32_t count, uint64_t offset FLAGS)
{
  TAKE_FLAGS;

  note_call ("pread", count, offset, flags);
  if (fails ("pread"))
    return -1;
  memcpy (buf, disk + offset, count);
  return 0;
}

static int
life_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset FLAGS)
{
  TAKE_FLAGS;

  note_call ("pwrite", count, offset, flags);
  if (fails ("pwrite"))
    return -1;
  memcpy (disk + offset, buf, count);
  return 0;
}

#if NBDKIT_API_VERSION == 1
static int
life_flush (void *handle)
{
  note ("flush");
  return fails ("flush") ? -1 : 0;
}
#else
static int
life_flush (void *handle, uint32_t flags)
{
  note ("flush %u", flags);
  return fails ("flush") ? -1 : 0;
}
#endif

static int
life_trim (void *handle, uint32_t count, uint64_t offset FLAGS)
{
  TAKE_FLAGS;

  note_call ("trim", count, offset, flags);
  return fails ("trim") ? -1 : 0;
}

/* In version 1 the last argument is may_trim. */
#if NBDKIT_API_VERSION == 1
static int
life_zero (void *handle, uint32_t count, uint64_t offset, int flags)
#else
static int
life_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
#endif
{
  note_call ("zero", count, offset, flags);
  if (fails ("zero"))
    return -1;
  memset (disk + offset, 0, count);
  return 0;
}

static int
life_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  note_call ("cache", count, offset, flags);
  return fails ("cache") ? -1 : 0;
}

static int
life_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents)
{
  note_call ("extents", count, offset, flags);
  if (fails ("extents"))
    return -1;
  return nbdkit_add_extent (extents, offset, count, NBDKIT_EXTENT_ZERO);
}

static struct nbdkit_plugin plugin = {
  .name = "life",
  .longname = "a life",
  .version = "1.2.3",
  .description = "writes down its life",
  .config_help = "KEY=VALUE    whatever you like",
  .magic_config_key = "magic",
  .load = load,
  .unload = unload,
  .config = config,
  .config_complete = config_complete,
  .thread_model = thread_model,
  .get_ready = get_ready,
  .after_fork = after_fork,
  .cleanup = cleanup,
  .dump_plugin = dump_plugin,
  .preconnect = preconnect,
  .list_exports = list_exports,
  .default_export = default_export,
  .export_description = export_description,
  .open = life_open,
  .close = life_close,
  .get_size = get_size,
  .block_size = block_size,
  .can_write = can_write,
  .can_flush = can_flush,
  .is_rotational = is_rotational,
  .can_trim = can_trim,
  .can_zero = can_zero,
  .can_fast_zero = can_fast_zero,
  .can_extents = can_extents,
  .can_multi_conn = can_multi_conn,
  .can_fua = can_fua,
  .can_cache = can_cache,
  .pread = life_pread,
  .pwrite = life_pwrite,
  .flush = life_flush,
  .trim = life_trim,
  .zero = life_zero,
  .cache = life_cache,
  .extents = life_extents,
  .errno_is_preserved = 1,
};

#define plugin_init registered
NBDKIT_REGISTER_PLUGIN (plugin)
#undef plugin_init

/* Only for its address: whoever calls it takes what lies behind the structure for a callback. */
static void
trap (void)
{
  fprintf (stderr, "a field that the structure does not have was called\n");
  abort ();
}

static void *
spoilt (size_t size)
{
  size_t page = sysconf (_SC_PAGESIZE), room = 4 * page;
  char *map = mmap (NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  struct nbdkit_plugin *it;

  if (map == MAP_FAILED)
    abort ();
  it = (void *) (map + 2 * page - size);
  memcpy (it, &plugin, size < sizeof plugin ? size : sizeof plugin);
  it->_struct_size = size;
  if (getenv ("LIFE_TRAP"))
    for (size_t i = 0; i < 2 * page / sizeof (void *); ++i)
      ((void **) (map + 2 * page))[i] = (void *) trap;
  else if (mprotect (map + 2 * page, 2 * page, PROT_NONE) == -1)
    abort ();
  return it;
}

__attribute__ ((visibility ("default"))) struct nbdkit_plugin *
plugin_init (void)
{
  const char *without = getenv ("LIFE_WITHOUT"), *text;

  registered ();
  if (getenv ("LIFE_NULL"))
    return NULL;
  if ((text = getenv ("LIFE_API_VERSION")))
    plugin._api_version = atoi (text);
  if ((text = getenv ("LIFE_THREAD_MODEL")))
    plugin._thread_model = atoi (text);
  if ((text = getenv ("LIFE_NAME")))
    plugin.name = *text ? text : NULL;
#define WITHOUT(name)                                   \
  if (without && strcmp (without, #name) == 0)          \
    plugin.name = NULL
  WITHOUT (open);
  WITHOUT (get_size);
  WITHOUT (pread);
  WITHOUT (pwrite);
  WITHOUT (flush);
  WITHOUT (config);
  WITHOUT (magic_config_key);
  WITHOUT (list_exports);
  WITHOUT (default_export);
  WITHOUT (export_description);
  WITHOUT (extents);
  WITHOUT (cache);
  if ((text = getenv ("LIFE_STRUCT_SIZE")))
    return spoilt (atoi (text));
  return &plugin;
}
