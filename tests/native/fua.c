/* A subject of the FUA matrix (fua_model.py) in C, of either version.
 *
 * FUA_CALLBACKS and FUA_QUESTIONS name what it has; what the questions answer comes from the
 * export's name, and what goes wrong from the offset. Each call is a line in the file FUA_EVENTS,
 * as the model writes it. There is no disk behind.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define REGION (UINT64_C (256) << 20)
enum { FAILS = 1, FLUSH_FAILS = 2, NO_ZERO = 4, LATER_FAILS = 8 };

static unsigned mood;

static void
record (const char *format, ...)
{
  char line[256];
  va_list args;
  int length, fd;

  va_start (args, format);
  length = vsnprintf (line, sizeof line, format, args);
  va_end (args);
  fd = open (getenv ("FUA_EVENTS"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0 || write (fd, line, length) != length)
    abort ();
  close (fd);
}

static int
fail (int error)
{
  nbdkit_set_error (error);
  nbdkit_error ("told to fail");
  return -1;
}

static void *
fua_open (int readonly)
{
  return strdup (nbdkit_export_name ());
}

static void
fua_close (void *handle)
{
  free (handle);
}

static int64_t
get_size (void *handle)
{
  return 32 * REGION;
}

/* What the export's name says of a question. */
static const char *
answer (const char *name, const char *question)
{
  char word[64];
  const char *found;

  snprintf (word, sizeof word, " %s=", question);
  found = strstr (name, word);
  return found ? found + strlen (word) : "";
}

#define QUESTION(name)                                          \
  static int                                                    \
  name (void *handle)                                           \
  {                                                             \
    return strncmp (answer (handle, #name), "True", 4) == 0;    \
  }

QUESTION (can_flush)
QUESTION (can_trim)
QUESTION (can_zero)
QUESTION (can_write)
QUESTION (can_fast_zero)

static int
can_fua (void *handle)
{
  const char *text = answer (handle, "can_fua");

  if (strncmp (text, "EMULATE", 7) == 0)
    return NBDKIT_FUA_EMULATE;
  if (strncmp (text, "NATIVE", 6) == 0)
    return NBDKIT_FUA_NATIVE;
  if (strncmp (text, "NONE", 4) == 0)
    return NBDKIT_FUA_NONE;
  return *text == '7' ? 7 : fail (EIO);
}

static int
can_cache (void *handle)
{
  return NBDKIT_CACHE_NATIVE;
}

#if NBDKIT_API_VERSION == 1
#define FLAGS
#define LAST ")\n"
#define REST
#else
#define FLAGS , uint32_t flags
#define LAST ", %u)\n"
#define REST , flags
#endif

#define RANGE(name) \
  record ("('%s', %llu, %u" LAST, name, (unsigned long long) offset, count REST); \
  mood = offset / REGION

static int
fua_pread (void *handle, void *buf, uint32_t count, uint64_t offset FLAGS)
{
  RANGE ("pread");
  memset (buf, 0, count);
  return 0;
}

static int
fua_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset FLAGS)
{
  const unsigned char *bytes = buf;

  for (uint32_t i = 1; i < count; ++i)
    if (bytes[i] != bytes[0])
      return fail (EBADF);
  record ("('pwrite', %llu, %u, %d" LAST, (unsigned long long) offset, count, bytes[0] REST);
  mood = offset / REGION;
  if (mood & FAILS || (mood & LATER_FAILS && offset % REGION))
    return fail (ENOSPC);
  return 0;
}

static int
fua_trim (void *handle, uint32_t count, uint64_t offset FLAGS)
{
  RANGE ("trim");
  return mood & FAILS ? fail (ENOSPC) : 0;
}

#if NBDKIT_API_VERSION == 1
static int
fua_zero (void *handle, uint32_t count, uint64_t offset, int may_trim)
{
  record ("('zero', %llu, %u, %s)\n", (unsigned long long) offset, count,
          may_trim == 1 ? "True" : may_trim == 0 ? "False" : "'neither'");
  mood = offset / REGION;
  return mood & NO_ZERO ? fail (EOPNOTSUPP) : mood & FAILS ? fail (ENOSPC) : 0;
}

static int
fua_flush (void *handle)
{
  record ("('flush',)\n");
  return mood & FLUSH_FAILS ? fail (ENOMEM) : 0;
}
#else
static int
fua_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  RANGE ("zero");
  return mood & NO_ZERO ? fail (EOPNOTSUPP) : mood & FAILS ? fail (ENOSPC) : 0;
}

static int
fua_flush (void *handle, uint32_t flags)
{
  record ("('flush', %u)\n", flags);
  return mood & FLUSH_FAILS ? fail (ENOMEM) : 0;
}
#endif

static int
fua_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  record ("('cache', %llu, %u, %u)\n", (unsigned long long) offset, count, flags);
  mood = offset / REGION;
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "fua",
  .open = fua_open,
  .close = fua_close,
  .get_size = get_size,
  .pread = fua_pread,
};

#define plugin_init registered
NBDKIT_REGISTER_PLUGIN (plugin)
#undef plugin_init

__attribute__ ((visibility ("default"))) struct nbdkit_plugin *
plugin_init (void)
{
  const char *callbacks = getenv ("FUA_CALLBACKS"), *questions = getenv ("FUA_QUESTIONS");

#define CALLBACK(name)                                  \
  plugin.name = strstr (callbacks, #name) ? fua_##name : NULL
#define ASKED(name)                                     \
  plugin.name = strstr (questions, #name) ? name : NULL
  CALLBACK (pwrite);
  CALLBACK (flush);
  CALLBACK (trim);
  CALLBACK (zero);
  CALLBACK (cache);
  plugin.can_cache = plugin.cache ? can_cache : NULL;
  ASKED (can_fua);
  ASKED (can_flush);
  ASKED (can_trim);
  ASKED (can_zero);
  ASKED (can_write);
  ASKED (can_fast_zero);
  return registered ();
}
