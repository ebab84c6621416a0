/* A disk in memory, whose byte 8192 cannot be written: so there are errors to compare. */

#define NBDKIT_API_VERSION 2

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS

static unsigned char *disk;
static int64_t size;

static int
disk_config (const char *key, const char *value)
{
  if (strcmp (key, "size") != 0) {
    nbdkit_error ("unknown parameter %s", key);
    return -1;
  }
  size = nbdkit_parse_size (value);
  if (size == -1)
    return -1;
  disk = calloc (1, size);
  return disk ? 0 : -1;
}

static void *
disk_open (int readonly)
{
  (void) readonly;
  return disk;
}

static int64_t
disk_get_size (void *handle)
{
  (void) handle;
  return size;
}

static int
disk_block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  (void) handle;
  *minimum = 1;
  *preferred = 4096;
  *maximum = 1 << 20;
  return 0;
}

static int
disk_can_fua (void *handle)
{
  (void) handle;
  return NBDKIT_FUA_NATIVE;
}

static int
disk_check (uint32_t count, uint64_t offset)
{
  if (offset <= 8192 && 8192 < offset + count) {
    nbdkit_error ("full at 8192");
    errno = ENOSPC;
    return -1;
  }
  return 0;
}

static int
disk_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) handle;
  (void) flags;
  memcpy (buf, disk + offset, count);
  return 0;
}

static int
disk_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) handle;
  (void) flags;
  if (disk_check (count, offset) == -1)
    return -1;
  memcpy (disk + offset, buf, count);
  return 0;
}

static int
disk_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) handle;
  (void) flags;
  if (disk_check (count, offset) == -1)
    return -1;
  memset (disk + offset, 0, count);
  return 0;
}

static int
disk_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents)
{
  (void) handle;
  (void) flags;
  for (uint64_t at = offset & ~UINT64_C (4095); at < offset + count; at += 4096)
    if (nbdkit_add_extent (extents, at, 4096, at & 4096 ? NBDKIT_EXTENT_HOLE : 0) == -1)
      return -1;
  return 0;
}

static int
disk_flush (void *handle, uint32_t flags)
{
  (void) handle;
  (void) flags;
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "disk",
  .config = disk_config,
  .config_help = "size=SIZE  how large it is",
  .open = disk_open,
  .get_size = disk_get_size,
  .block_size = disk_block_size,
  .can_fua = disk_can_fua,
  .pread = disk_pread,
  .pwrite = disk_pwrite,
  .flush = disk_flush,
  .zero = disk_zero,
  .extents = disk_extents,
  .errno_is_preserved = 1,
};

NBDKIT_REGISTER_PLUGIN (plugin)
