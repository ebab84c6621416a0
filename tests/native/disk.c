/* A disk whose content, errors and extents are in the offset: what test_device.py asks for.
 *
 * Up to SPECIAL it is a plain sparse disk in memory, with locks of its own. Behind, each 1 MiB is
 * a case: a read there fails in some way, block status there is wrong in some way.
 */

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef NBDKIT_API_VERSION
#define NBDKIT_API_VERSION 2
#endif
#include <nbdkit-plugin.h>

#ifndef THREAD_MODEL
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#endif
#ifndef PRESERVED
#define PRESERVED 1
#endif

#define MiB (UINT64_C (1) << 20)
#define SPECIAL (16 * MiB)
#define HUGE_AT (1 * (UINT64_C (1) << 40))
#define SIZE (HUGE_AT + (UINT64_C (1) << 40))

static unsigned char content[SPECIAL];
static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
static atomic_int running, most;
static pthread_mutex_t meeting = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t met = PTHREAD_COND_INITIALIZER;
static int present;

/* For HUGE_AT: what was called, as text that a read at HUGE_AT gets. */
static char calls[65536];

static void *
disk_open (int readonly)
{
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t
get_size (void *handle)
{
  return SIZE;
}

static int
yes (void *handle)
{
  return 1;
}

static int
can_cache (void *handle)
{
  return NBDKIT_CACHE_NATIVE;
}

static void
begin (void)
{
  int now = ++running, before = most;

  while (now > before && !atomic_compare_exchange_weak (&most, &before, now))
    ;
}

static int
wrong (void *buf, unsigned which)
{
  struct timespec until;
  int result = 0;

  switch (which) {
  case 0: /* errno alone */
    nbdkit_debug ("before");
    errno = ENOSPC;
    return -1;
  case 1: /* nbdkit_set_error alone */
    errno = 0;
    nbdkit_set_error (ENOSPC);
    return -1;
  case 2: /* both: the latter counts */
    nbdkit_set_error (ENOMEM);
    errno = ENOSPC;
    return -1;
  case 3: /* a message does not change errno */
    errno = ENOSPC;
    nbdkit_error ("no room: %m");
    nbdkit_debug ("no room: %m");
    return -1;
  case 4: /* neither */
    errno = 0;
    return -1;
  case 5: /* good in the end: it is not remembered */
    nbdkit_set_error (ENOMEM);
    errno = ENOMEM;
    return 0;
  case 6:
    nbdkit_set_error (EROFS);
    return -1;
  case 7:
    nbdkit_set_error (EFBIG);
    return -1;
  case 8:
    nbdkit_set_error (ESHUTDOWN);
    return -1;
  case 9:
    nbdkit_set_error (ETIMEDOUT);
    return -1;
  case 10: /* a long call */
    begin ();
    usleep (30000);
    --running;
    memcpy (buf, &(unsigned char) { most }, 1);
    return 0;
  case 11: /* returns when two of them are here */
    clock_gettime (CLOCK_REALTIME, &until);
    until.tv_sec += 10;
    pthread_mutex_lock (&meeting);
    ++present;
    pthread_cond_broadcast (&met);
    while (present < 2 && result == 0)
      result = pthread_cond_timedwait (&met, &meeting, &until);
    pthread_mutex_unlock (&meeting);
    return result ? -1 : 0;
  case 12: /* an error of a read of something else */
    nbdkit_set_error (EPERM);
    return -1;
  }
  return 0;
}

#if NBDKIT_API_VERSION == 1
#define FLAGS
#else
#define FLAGS , uint32_t flags
#endif

static int
disk_pread (void *handle, void *buf, uint32_t count, uint64_t offset FLAGS)
{
  if (offset >= HUGE_AT) {
    strncpy (buf, calls, count);
    calls[0] = '\0';
    return 0;
  }
  if (offset >= SPECIAL)
    return wrong (buf, (offset - SPECIAL) / MiB);
  pthread_rwlock_rdlock (&lock);
  memcpy (buf, content + offset, count);
  pthread_rwlock_unlock (&lock);
  return 0;
}

static int
disk_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset FLAGS)
{
  pthread_rwlock_wrlock (&lock);
  memcpy (content + offset, buf, count);
  pthread_rwlock_unlock (&lock);
  return 0;
}

static void
called (const char *name, uint32_t count, uint64_t offset, uint32_t flags)
{
  size_t length = strlen (calls);

  snprintf (calls + length, sizeof calls - length, "%s %" PRIu32 " %" PRIu64 " %" PRIu32 "\n",
            name, count, offset - HUGE_AT, flags);
}

static int
erase (const char *name, uint32_t count, uint64_t offset, uint32_t flags)
{
  if (offset >= HUGE_AT) {
    called (name, count, offset, flags);
    return 0;
  }
  pthread_rwlock_wrlock (&lock);
  memset (content + offset, 0, count);
  pthread_rwlock_unlock (&lock);
  return 0;
}

#if NBDKIT_API_VERSION == 1
static int
disk_zero (void *handle, uint32_t count, uint64_t offset, int may_trim)
{
  return erase ("zero", count, offset, may_trim);
}

static int
disk_trim (void *handle, uint32_t count, uint64_t offset)
{
  return erase ("trim", count, offset, 0);
}

static int
disk_flush (void *handle)
{
  return 0;
}
#else
static int
disk_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  return erase ("zero", count, offset, flags);
}

static int
disk_trim (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  return erase ("trim", count, offset, flags);
}

static int
disk_flush (void *handle, uint32_t flags)
{
  return 0;
}
#endif

static int
disk_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  if (offset >= HUGE_AT)
    called ("cache", count, offset, flags);
  return 0;
}

static int
disk_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents)
{
#define ADD(at, length, type) nbdkit_add_extent (extents, at, length, type)
  if (offset >= HUGE_AT) {
    called ("extents", count, offset, flags);
    return ADD (offset, count, 3);
  }
  if (offset < SPECIAL)
    return ADD (0, SPECIAL, 0);
  switch ((offset - SPECIAL) / MiB) {
  case 0: /* none */
    return 0;
  case 1: /* begins too late */
    return ADD (offset + 512, count, 0);
  case 2: /* a gap */
    return ADD (offset, 512, 0) == -1 ? -1 : ADD (offset + 1024, 512, 3);
  case 3: /* one within the other */
    return ADD (offset, 1024, 0) == -1 ? -1 : ADD (offset + 512, 1024, 3);
  case 4: /* backwards */
    return ADD (offset, 1024, 0) == -1 ? -1 : ADD (offset - 512, 512, 3);
  case 5: /* a gap, and nobody has looked at the answer */
    ADD (offset, 512, 0);
    ADD (offset + 1024, 512, 3);
    return 0;
  case 6: /* ends early */
    return ADD (offset, 512, 3);
  case 7: /* beyond the end, and from before the beginning */
    return ADD (offset - 512, 1024, 3) == -1 ? -1 : ADD (offset + 512, SIZE, 0);
  case 8: /* an empty one, out of order all the same */
    return ADD (offset, 512, 0) == -1 || ADD (offset + 7, 0, 1) == -1
      ? -1 : ADD (offset + 512, 512, 3);
  case 9: /* neighbours of one type */
    return ADD (offset, 512, 2) == -1 ? -1 : ADD (offset + 512, 512, 2);
  case 10: /* of an error */
    nbdkit_set_error (EPERM);
    return -1;
  case 11: /* all that is before, first */
    return ADD (0, 512, 0) == -1 || ADD (512, offset - 512, 3) == -1 ? -1 : ADD (offset, 4096, 1);
  case 12: /* longer than any disk */
    return ADD (offset, UINT64_MAX, 0);
  case 13: /* very many */
    for (uint32_t i = 0; i < count; i += 8)
      if (ADD (offset + i, 8, i / 8 % 2) == -1)
        return -1;
    return 0;
  case 14: /* types that there are not */
    return ADD (offset, 512, 7) == -1 ? -1 : ADD (offset + 512, 512, 4);
  case 15: /* an empty one in order, and then one that is beyond */
    return ADD (offset, 0, 3) == -1 || ADD (offset, 512, 0) == -1 || ADD (offset + 512, 0, 1) == -1
      ? -1 : ADD (offset + 512, 3584, 3);
  case 16: /* an empty one that is none at the beginning */
    return ADD (offset + 7, 0, 3) == -1 ? -1 : ADD (offset, 4096, 1);
  }
  return ADD (offset, count, 0);
}

static struct nbdkit_plugin plugin = {
  .name = "disk",
  .open = disk_open,
  .get_size = get_size,
  .can_multi_conn = yes,
  .pread = disk_pread,
  .pwrite = disk_pwrite,
  .zero = disk_zero,
  .can_fast_zero = yes,
  .trim = disk_trim,
  .flush = disk_flush,
  .can_cache = can_cache,
  .cache = disk_cache,
  .extents = disk_extents,
  .errno_is_preserved = PRESERVED,
};

NBDKIT_REGISTER_PLUGIN (plugin)
