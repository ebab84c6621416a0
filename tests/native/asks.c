/* A plugin that calls each function of the server, and writes what it gets to the file ASKS_LOG.
 *
 * Each parameter asks: "size=1K" has nbdkit_parse_size parse 1K. A client that connects has it ask
 * about the client; where its requests read says what else is done.
 */

#define _GNU_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <netinet/in.h>
#include <sys/wait.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

/* Of newer servers. */
extern int nbdkit_parse_delay (const char *, const char *, unsigned *, unsigned *)
  __attribute__ ((weak));
extern int nbdkit_parse_probability (const char *, const char *, double *)
  __attribute__ ((weak));

static int threads;
static const char *kept[4];

static void
note (const char *format, ...)
{
  char line[8192];
  va_list args;
  int length, fd;

  va_start (args, format);
  length = vsnprintf (line, sizeof line - 1, format, args);
  va_end (args);
  line[length++] = '\n';
  fd = open (getenv ("ASKS_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0 || write (fd, line, length) != length)
    abort ();
  close (fd);
}

#define PARSE(type, format)                                             \
  if (strcmp (key, #type) == 0) {                                       \
    type value = 77;                                                    \
    int result = nbdkit_parse_##type ("what", text, &value);            \
    note ("%s %s: %d %" format, key, text, result, value);              \
    return 0;                                                           \
  }

static int
config (const char *key, const char *text)
{
  typedef unsigned int unsigned_;

  if (strcmp (key, "size") == 0)
    note ("size %s: %" PRIi64, text, nbdkit_parse_size (text));
  else if (strcmp (key, "bool") == 0)
    note ("bool %s: %d", text, nbdkit_parse_bool (text));
  else PARSE (int, "d")
  else PARSE (int8_t, PRIi8)
  else PARSE (uint8_t, PRIu8)
  else PARSE (int16_t, PRIi16)
  else PARSE (uint16_t, PRIu16)
  else PARSE (int32_t, PRIi32)
  else PARSE (uint32_t, PRIu32)
  else PARSE (int64_t, PRIi64)
  else PARSE (uint64_t, PRIu64)
  else if (strcmp (key, "unsigned") == 0) {
    unsigned_ value = 77;
    int result = nbdkit_parse_unsigned ("what", text, &value);
    note ("unsigned %s: %d %u", text, result, value);
  }
  else if (strcmp (key, "delay") == 0 && nbdkit_parse_delay) {
    unsigned sec = 77, nsec = 77;
    int result = nbdkit_parse_delay ("what", text, &sec, &nsec);
    note ("delay %s: %d %u %u", text, result, sec, nsec);
  }
  else if (strcmp (key, "probability") == 0 && nbdkit_parse_probability) {
    double value = 77;
    int result = nbdkit_parse_probability ("what", text, &value);
    note ("probability %s: %d %.17g", text, result, value);
  }
  else if (strcmp (key, "password") == 0) {
    char *value = (char *) "untouched";
    int result = nbdkit_read_password (text, &value);
    note ("password %s: %d %s", text, result, result == 0 ? value : "");
    if (result == 0)
      free (value);
  }
  else if (strcmp (key, "absolute") == 0) {
    char *path = nbdkit_absolute_path (text);
    note ("absolute %s: %s", text, path ? path : "NULL");
    free (path);
  }
  else if (strcmp (key, "realpath") == 0) {
    char *path = nbdkit_realpath (text);
    note ("realpath %s: %s", text, path ? path : "NULL");
    free (path);
  }
  else if (strcmp (key, "intern") == 0) {
    kept[0] = nbdkit_strdup_intern (text);
    kept[1] = nbdkit_strndup_intern (text, 3);
    kept[2] = nbdkit_printf_intern ("<%s %d>", text, 7);
    kept[3] = nbdkit_strdup_intern ("");
  }
  else if (strcmp (key, "errno") == 0) {
    errno = ENOTDIR;
    nbdkit_error ("error %m %s", text);
    note ("errno after error: %d", errno == ENOTDIR);
    nbdkit_debug ("debug %m %s", text);
    note ("errno after debug: %d", errno == ENOTDIR);
  }
  else if (strcmp (key, "outside") == 0) {
    /* There is no client yet: each of these fails. */
    const char *name = nbdkit_export_name ();
    struct sockaddr_un address;
    socklen_t length = sizeof address;
    note ("export name: %s", name ? name : "NULL");
    note ("is tls: %d", nbdkit_is_tls ());
    note ("peer name: %d", nbdkit_peer_name ((void *) &address, &length));
    note ("peer pid: %" PRIi64, nbdkit_peer_pid ());
  }
  else if (strcmp (key, "fork") == 0) {
    pid_t child = fork ();
    int status = -1;
    if (child == 0) {
      nbdkit_error ("said by a child");
      _exit (7);
    }
    waitpid (child, &status, 0);
    note ("child: %d", WEXITSTATUS (status));
  }
  else if (strcmp (key, "safe") == 0)
    note ("stdio safe in config: %d", nbdkit_stdio_safe ());
  else if (strcmp (key, "threads") == 0)
    threads = atoi (text);
  return 0;
}

static int
config_complete (void)
{
  if (getenv ("ASKS_SAFE"))
    note ("stdio safe in config_complete: %d", nbdkit_stdio_safe ());
  return 0;
}

static void *
talk (void *number)
{
  int64_t sum = 0;

  for (int i = 0; i < 300; ++i) {
    sum += nbdkit_parse_size ("1K");
    nbdkit_debug ("thread %d says %d", (int) (intptr_t) number, i);
    if (nbdkit_strdup_intern ("shared") == NULL)
      abort ();
  }
  nbdkit_error ("thread %d has %" PRIi64, (int) (intptr_t) number, sum);
  return NULL;
}

static pthread_t made[16];

static int
after_fork (void)
{
  for (int i = 0; i < threads; ++i)
    pthread_create (&made[i], NULL, talk, (void *) (intptr_t) i);
  return 0;
}

static void
cleanup (void)
{
  for (int i = 0; i < threads; ++i)
    pthread_join (made[i], NULL);
}

static void
unload (void)
{
  if (kept[0])
    note ("kept %s %s %s %s.", kept[0], kept[1], kept[2], kept[3]);
}

struct handle {
  const char *name, *text;
  char *copy;
};

static void *
asks_open (int readonly)
{
  struct sockaddr_storage address = { 0 };
  socklen_t length = sizeof address, little = 2;
  struct handle *handle = calloc (1, sizeof *handle);
  int result;

  handle->name = nbdkit_export_name ();
  handle->text = nbdkit_printf_intern ("%065536d %s", 0, handle->name);
  handle->copy = strdup (handle->name);
  if (getenv ("ASKS_QUIET"))
    return handle;
  note ("export name: %s", handle->name);
  note ("is tls: %d", nbdkit_is_tls ());
  note ("pid %" PRIi64 ", uid %" PRIi64 ", gid %" PRIi64,
        nbdkit_peer_pid (), nbdkit_peer_uid (), nbdkit_peer_gid ());
  result = nbdkit_peer_name ((void *) &address, &length);
  note ("peer name: %d, family %d, length %d", result, address.ss_family, (int) length);
  if (address.ss_family == AF_INET)
    note ("port %d", ((struct sockaddr_in *) &address)->sin_port != 0);
  memset (&address, 0xff, sizeof address);
  result = nbdkit_peer_name ((void *) &address, &little);
  note ("cut: %d, length %d, the rest is %s", result, (int) little,
        ((unsigned char *) &address)[2] == 0xff ? "untouched" : "written to");
  return handle;
}

static void
asks_close (void *opaque)
{
  struct handle *handle = opaque;

  if (strcmp (handle->name, handle->copy) != 0 ||
      strcmp (handle->text + 65537, handle->copy) != 0)
    note ("a string has changed");
  free (handle->copy);
  free (handle);
}

static int64_t
get_size (void *handle)
{
  return 1 << 20;
}

static int
asks_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  pid_t child;
  int status = -1, result;

  memset (buf, 0, count);
  switch (offset / 4096) {
  case 1: /* sleeps until somebody stops it */
    note ("sleeping");
    result = nbdkit_nanosleep (100, 0);
    note ("slept: %d %s", result, strerrorname_np (errno));
    return result;
  case 2:
    return nbdkit_nanosleep (0, 1000000);
  case 3: /* a child that has no Python to talk to */
    child = fork ();
    if (child == 0) {
      nbdkit_error ("said by a child");
      nbdkit_debug ("never said");
      _exit (nbdkit_parse_size ("1K") == -1 ? 7 : 8);
    }
    waitpid (child, &status, 0);
    ((unsigned char *) buf)[0] = WEXITSTATUS (status);
    return 0;
  case 4:
    nbdkit_shutdown ();
    return 0;
  }
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "asks",
  .config = config,
  .config_complete = config_complete,
  .after_fork = after_fork,
  .cleanup = cleanup,
  .unload = unload,
  .open = asks_open,
  .close = asks_close,
  .get_size = get_size,
  .pread = asks_pread,
  .errno_is_preserved = 1,
};

NBDKIT_REGISTER_PLUGIN (plugin)
