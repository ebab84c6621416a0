/* A plugin in C or C++, for pynbdkit and nbdkit alike.
 *
 *   #define NBDKIT_API_VERSION 2
 *   #include <nbdkit-plugin.h>
 *   #define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
 *   ... functions ...
 *   static struct nbdkit_plugin plugin = {
 *     .name = "mine", .open = ..., .get_size = ..., .pread = ...
 *   };
 *   NBDKIT_REGISTER_PLUGIN (plugin)
 *
 * Compile it with -fPIC -shared. Those three callbacks and the name are required. Callbacks that
 * return int return 0 for success or no, 1 for yes, -1 for failure, after nbdkit_error. Sizes,
 * offsets and counts are bytes.
 */

#ifndef NBDKIT_PLUGIN_H
#define NBDKIT_PLUGIN_H

#include <nbdkit-common.h>

/* Version 1 is what plugins have that say nothing; a newer server runs it, for good. */
#ifndef NBDKIT_API_VERSION
#define NBDKIT_API_VERSION 1
#endif

#if (NBDKIT_API_VERSION - 0) == 1 /* NBDKIT_API_VERSION is a number, 1 or 2 */
enum { nbdkit_api_version_at_include = 1 };
#elif (NBDKIT_API_VERSION - 0) == 2
enum { nbdkit_api_version_at_include = 2 };
#define NBDKIT_CALLBACKS_HAVE_FLAGS
#else
#error NBDKIT_API_VERSION must be 1 or 2: this header knows no other version of the plugin interface
#undef NBDKIT_API_VERSION
#define NBDKIT_API_VERSION 2
#define NBDKIT_CALLBACKS_HAVE_FLAGS
enum { nbdkit_api_version_at_include = 2 };
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Fields are only ever added at the end. What a plugin leaves NULL, the server does without. */
struct nbdkit_plugin {
  /* Written by NBDKIT_REGISTER_PLUGIN: what the plugin was compiled with. */
  uint64_t _struct_size;
  int _api_version;
  int _thread_model;

  const char *name; /* letters, digits and dashes */
  const char *longname;
  const char *version;
  const char *description;

  /* The first and the last call of all. */
  void (*load) (void);
  void (*unload) (void);

  /* Each key=value, then once more: are they all there? config_help is for --help. */
  int (*config) (const char *key, const char *value);
  int (*config_complete) (void);
  const char *config_help;

  /* A client comes: what open returns is the handle of all that follows, NULL a refusal. */
  void *(*open) (int readonly);
  void (*close) (void *handle);

  /* Questions, each asked once for a handle. get_size: -1 is a failure. */
  int64_t (*get_size) (void *handle);
  int (*can_write) (void *handle);
  int (*can_flush) (void *handle);
  int (*is_rotational) (void *handle);
  int (*can_trim) (void *handle);

  /* Requests in version 1. */
#ifndef NBDKIT_CALLBACKS_HAVE_FLAGS
  int (*pread) (void *handle, void *buf, uint32_t count, uint64_t offset);
  int (*pwrite) (void *handle, const void *buf, uint32_t count, uint64_t offset);
  int (*flush) (void *handle);
  int (*trim) (void *handle, uint32_t count, uint64_t offset);
  int (*zero) (void *handle, uint32_t count, uint64_t offset, int may_trim);
#else
  void (*_not_in_version_2[5]) (void);
#endif

  /* Not 0: errno says why a callback failed, where nbdkit_set_error does not. */
  int errno_is_preserved;

  /* For --dump-plugin: may print lines key=value. */
  void (*dump_plugin) (void);

  int (*can_zero) (void *handle); /* 0: zeros are written by pwrite */
  int (*can_fua) (void *handle); /* NBDKIT_FUA_... */

  /* Requests in version 2; flags are NBDKIT_FLAG_... */
#ifdef NBDKIT_CALLBACKS_HAVE_FLAGS
  int (*pread) (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags);
  int (*pwrite) (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags);
  int (*flush) (void *handle, uint32_t flags);
  int (*trim) (void *handle, uint32_t count, uint64_t offset, uint32_t flags);
  int (*zero) (void *handle, uint32_t count, uint64_t offset, uint32_t flags);
#else
  void (*_not_in_version_1[5]) (void);
#endif

  /* The key of a parameter that is given without one. */
  const char *magic_config_key;

  int (*can_multi_conn) (void *handle); /* 1: a flush covers the writes of all clients */

  /* What is data, what is zeros: by nbdkit_add_extent, at least for the first byte. */
  int (*can_extents) (void *handle);
  int (*extents) (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                  struct nbdkit_extents *extents);

  int (*can_cache) (void *handle); /* NBDKIT_CACHE_... */
  int (*cache) (void *handle, uint32_t count, uint64_t offset, uint32_t flags);

  /* After config_complete: NBDKIT_THREAD_MODEL_..., no laxer than THREAD_MODEL. */
  int (*thread_model) (void);

  int (*can_fast_zero) (void *handle);

  /* A client has connected, and has said nothing yet: -1 turns it away. */
  int (*preconnect) (int readonly);

  /* Before and after the server goes into the background: open files, then start threads. */
  int (*get_ready) (void);
  int (*after_fork) (void);

  /* By nbdkit_add_export. default_export: the name that "" stands for; NULL refuses it. */
  int (*list_exports) (int readonly, int is_tls, struct nbdkit_exports *exports);
  const char *(*default_export) (int readonly, int is_tls);
  const char *(*export_description) (void *handle);

  /* The server ends: no client is left. */
  void (*cleanup) (void);

  /* All 0: no limits. Else the first two are powers of two. */
  int (*block_size) (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum);
};

/* Outside of functions, once, at the end. THREAD_MODEL is defined by then. */
#define NBDKIT_REGISTER_PLUGIN(plugin)                                                  \
  typedef char nbdkit_api_version_must_be_defined_before_the_include                    \
    [(NBDKIT_API_VERSION) == nbdkit_api_version_at_include ? 1 : -1];                   \
  NBDKIT_CXX_LANG_C NBDKIT_DLL_PUBLIC struct nbdkit_plugin *plugin_init (void);         \
  NBDKIT_CXX_LANG_C NBDKIT_DLL_PUBLIC struct nbdkit_plugin *                            \
  plugin_init (void)                                                                    \
  {                                                                                     \
    struct nbdkit_plugin *const registered_plugin = &(plugin);                          \
                                                                                        \
    registered_plugin->_struct_size = sizeof *registered_plugin;                        \
    registered_plugin->_api_version = nbdkit_api_version_at_include;                    \
    registered_plugin->_thread_model = (THREAD_MODEL);                                  \
    return registered_plugin;                                                           \
  }

#ifdef __cplusplus
}
#endif

#endif
