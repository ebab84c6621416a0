/* Constants, and the functions that the server has for plugins.
 *
 * Plugins include nbdkit-plugin.h, which includes this. Sizes, offsets and counts are bytes.
 *
 * Nothing has to be linked: the server that loads the plugin has the functions. Where one fails, it
 * has told the user already, by nbdkit_error.
 */

#ifndef NBDKIT_COMMON_H
#define NBDKIT_COMMON_H

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include <nbdkit-version.h>

#ifdef __cplusplus
#define NBDKIT_CXX_LANG_C extern "C"
#else
#define NBDKIT_CXX_LANG_C
#endif

/* For what the server has to find: `NBDKIT_DLL_PUBLIC int nbdkit_debug_mine_cache;`, say, is what
 * the option -D mine.cache=1 sets in the plugin "mine".
 */
#define NBDKIT_DLL_PUBLIC __attribute__ ((__visibility__ ("default")))
#define NBDKIT_EXTERN_DECL(result, name, arguments) extern result name arguments

/* Have the compiler compare a format with its arguments: but not where it is to know ISO C alone
 * (-std=c11), for it complains of %m then, and not where the plugin defines NBDKIT_NO_FORMAT_CHECK.
 */
#if defined (__GNUC__) && !defined (__STRICT_ANSI__) && !defined (NBDKIT_NO_FORMAT_CHECK)
#define NBDKIT_FORMAT(format, first) __attribute__ ((__format__ (__printf__, format, first)))
#else
#define NBDKIT_FORMAT(format, first)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* -- constants --------------------------------------------------------------------------------- */

/* THREAD_MODEL: how many calls of the plugin may run at a time */
#define NBDKIT_THREAD_MODEL_SERIALIZE_CONNECTIONS 0 /* one client at a time; others wait */
#define NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS 1 /* one request at a time in all */
#define NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS 2 /* one request at a time for each client */
#define NBDKIT_THREAD_MODEL_PARALLEL 3 /* no limit, not even on one handle */

/* `flags` of callbacks in version 2 */
#define NBDKIT_FLAG_MAY_TRIM 1 /* zero: may punch a hole */
#define NBDKIT_FLAG_FUA 2 /* pwrite, trim, zero: return when it is on stable storage */
#define NBDKIT_FLAG_REQ_ONE 4 /* extents: the first extent is enough */
#define NBDKIT_FLAG_FAST_ZERO 8 /* zero: fail with EOPNOTSUPP if it would be slow */

/* what can_fua returns */
#define NBDKIT_FUA_NONE 0 /* not offered to clients */
#define NBDKIT_FUA_EMULATE 1 /* the server calls flush after the write */
#define NBDKIT_FUA_NATIVE 2 /* the callbacks get NBDKIT_FLAG_FUA */

/* what can_cache returns */
#define NBDKIT_CACHE_NONE 0 /* not offered to clients */
#define NBDKIT_CACHE_EMULATE 1 /* the server calls pread, and throws away what it gets */
#define NBDKIT_CACHE_NATIVE 2 /* the server calls cache */

/* `type` of an extent; 0 is data, a hole that reads as zeros is both */
#define NBDKIT_EXTENT_HOLE 1 /* not allocated */
#define NBDKIT_EXTENT_ZERO 2 /* reads as zeros */

/* What open returns when a plugin needs no handle: any pointer that is not NULL. */
#define NBDKIT_HANDLE_NOT_NEEDED (&errno)

/* -- messages ---------------------------------------------------------------------------------- */

/* Tell the user why something fails. The format is printf's, %m included, without a newline. */
extern void nbdkit_error (const char *format, ...) NBDKIT_FORMAT (1, 2);
extern void nbdkit_verror (const char *format, va_list args) NBDKIT_FORMAT (1, 0);

/* The same for who runs the server with -v; else nothing is printed. Both leave errno as it was. */
extern void nbdkit_debug (const char *format, ...) NBDKIT_FORMAT (1, 2);
extern void nbdkit_vdebug (const char *format, va_list args) NBDKIT_FORMAT (1, 0);

/* The errno that the client gets if the callback that runs now fails. It wins over errno itself,
 * which counts only in plugins that set errno_is_preserved.
 */
extern void nbdkit_set_error (int error);

/* -- parameters -------------------------------------------------------------------------------- */

/* "100M" as bytes: a number, then b, k, M, G, T, P, E or s (512 bytes). -1: it is no size. */
extern int64_t nbdkit_parse_size (const char *text);

/* "yes", "off", "1" ... as 1 or 0. -1: it is neither. */
extern int nbdkit_parse_bool (const char *text);

/* An integer in decimal, 0x hexadecimal or 0 octal, that fits into *result. `what` names it in the
 * error. Returns 0; -1 where it is none or does not fit, *result is as it was.
 */
extern int nbdkit_parse_int (const char *what, const char *text, int *result);
extern int nbdkit_parse_unsigned (const char *what, const char *text, unsigned *result);
extern int nbdkit_parse_int8_t (const char *what, const char *text, int8_t *result);
extern int nbdkit_parse_uint8_t (const char *what, const char *text, uint8_t *result);
extern int nbdkit_parse_int16_t (const char *what, const char *text, int16_t *result);
extern int nbdkit_parse_uint16_t (const char *what, const char *text, uint16_t *result);
extern int nbdkit_parse_int32_t (const char *what, const char *text, int32_t *result);
extern int nbdkit_parse_uint32_t (const char *what, const char *text, uint32_t *result);
extern int nbdkit_parse_int64_t (const char *what, const char *text, int64_t *result);
extern int nbdkit_parse_uint64_t (const char *what, const char *text, uint64_t *result);

/* "10%", "1:10" or "0.1" as a fraction of one. 0, or -1. Since nbdkit 1.36. */
extern int nbdkit_parse_probability (const char *what, const char *text, double *result);

/* "3", "100ms", "20us" as seconds and nanoseconds, for nbdkit_nanosleep. 0, or -1. Since nbdkit
 * 1.38.
 */
extern int nbdkit_parse_delay (const char *what, const char *text, unsigned *seconds,
                               unsigned *nanoseconds);

/* A password: the text itself, "-" (asked on the terminal), "+FILE" or "-FD". 0, or -1. The caller
 * frees *password.
 */
extern int nbdkit_read_password (const char *value, char **password);

/* The path from "/" on: nbdkit_realpath also follows links, and wants the file to exist. To be
 * called before the server serves, for it may go to "/" then. NULL: an error; else the caller frees
 * it.
 */
extern char *nbdkit_absolute_path (const char *path);
extern char *nbdkit_realpath (const char *path);

/* 1 while a plugin may use stdin and stdout, up to config_complete. 0: they are the client's. */
extern int nbdkit_stdio_safe (void);

/* -- the client: for preconnect and all callbacks with a handle -------------------------------- */

/* The export that it asks for; "" where it does not care. NULL: an error. Not to be freed; valid
 * until close.
 */
extern const char *nbdkit_export_name (void);

/* 1 where the connection is encrypted, 0 where not, -1: an error. */
extern int nbdkit_is_tls (void);

/* Where it comes from, as getpeername(2). 0, or -1. */
extern int nbdkit_peer_name (struct sockaddr *address, socklen_t *length);

/* Of a client on a Unix socket: its process, user and group; else -1. */
extern int64_t nbdkit_peer_pid (void);
extern int64_t nbdkit_peer_uid (void);
extern int64_t nbdkit_peer_gid (void);

/* Its security label (SELinux); the names in its TLS certificate, and in its issuer's, "" where it
 * has shown none. NULL: an error; else the caller frees it. Since nbdkit 1.36.
 */
extern char *nbdkit_peer_security_context (void);
extern char *nbdkit_peer_tls_dn (void);
extern char *nbdkit_peer_tls_issuer_dn (void);

/* -- the server -------------------------------------------------------------------------------- */

/* Sleep. Returns 0 after that time; -1 where there is no more point in going on: the client has
 * gone, or the server stops.
 */
extern int nbdkit_nanosleep (unsigned seconds, unsigned nanoseconds);

/* End this connection: at once if `force`, else when its requests are answered. 0, or -1. Since
 * nbdkit 1.34.
 */
extern int nbdkit_disconnect (int force);

/* Stop the server. Returns at once: callbacks may still be called. */
extern void nbdkit_shutdown (void);

/* -- strings that the server keeps ------------------------------------------------------------- */

/* For callbacks that return a string: a copy (of `length` bytes at most), or what printf makes. Not
 * to be freed; valid until close, or until unload if no client is there yet. NULL: an error.
 */
extern const char *nbdkit_strdup_intern (const char *text);
extern const char *nbdkit_strndup_intern (const char *text, size_t length);
extern const char *nbdkit_printf_intern (const char *format, ...) NBDKIT_FORMAT (1, 2);
extern const char *nbdkit_vprintf_intern (const char *format, va_list args) NBDKIT_FORMAT (1, 0);

/* -- answers ----------------------------------------------------------------------------------- */

struct nbdkit_extents;
struct nbdkit_exports;

/* In extents: the next extent, which begins where the last one ended; the first one at or before
 * the offset that was asked about. What is beyond the range is cut off. 0, or -1.
 */
extern int nbdkit_add_extent (struct nbdkit_extents *extents, uint64_t offset, uint64_t length,
                              uint32_t type);

/* In list_exports: one more export, its description or NULL. Both are copied. 0, or -1. */
extern int nbdkit_add_export (struct nbdkit_exports *exports, const char *name,
                              const char *description);

/* In list_exports: the one that default_export names. 0, or -1. */
extern int nbdkit_use_default_export (struct nbdkit_exports *exports);

#ifdef __cplusplus
}
#endif

#endif
