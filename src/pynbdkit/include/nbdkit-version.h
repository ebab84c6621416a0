/* The version of nbdkit's interface for plugins that these headers declare in full.
 *
 * It is not pynbdkit's own: plugins test it to learn which functions they may call.
 */

#ifndef NBDKIT_VERSION_H
#define NBDKIT_VERSION_H

#define NBDKIT_VERSION_MAJOR 1
#define NBDKIT_VERSION_MINOR 42
#define NBDKIT_VERSION_MICRO 0
#define NBDKIT_VERSION_STRING "1.42.0"

#endif
