/* The batched limit: what is left of an NBD server when everything is taken away that a server is
 * for.  `limit SOCKET SIZE [MICROSECONDS]` serves SIZE bytes of memory on a Unix socket until it is
 * killed.
 *
 * It negotiates, and then per batch: one recv, every complete request parsed and done, one gather
 * write of all replies, straight from the disk's memory.  No plugin, no locks, no options, no care
 * for a client's errors: whoever asks for something else is hung up on.  A large payload is received
 * into the disk itself.  What a client draws from this is what it can draw from anybody who answers
 * in batches, with a thread for each connection.
 *
 * With MICROSECONDS a connection asks for more so long before it sleeps.  That costs a processor, and
 * saves the client the waking up of a sleeper: at depth 1 it is what the two of them can do at all.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
  OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7, OPT_STRUCTURED_REPLY = 8,
  CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3,
  REQUEST = 28,                    /* bytes of a request's header */
  SIMPLE_REPLY = 16, READ_CHUNK = 28,
  RECEIVE = 256 << 10,             /* bytes asked for at a time */
  KEPT = 1 << 20,                  /* bytes of done requests before the rest is moved down */
  DIRECT = 16 << 10,               /* a payload that lacks more is received into the disk */
  BUFFER = KEPT + 3 * RECEIVE,
  BATCH = 1 << 20,                 /* bytes of replies that are sent at once */
  VECTORS = 1024,                  /* IOV_MAX */
};
#define OPTION_REPLY_MAGIC UINT64_C(0x3e889045565a9)
#define REQUEST_MAGIC UINT32_C(0x25609513)
#define SIMPLE_MAGIC UINT32_C(0x67446698)
#define STRUCTURED_MAGIC UINT32_C(0x668e33ef)
#define ERR_UNSUP UINT32_C(0x80000001)
#define FLAGS (1 | 4 | 8 | 256)    /* flags are there; flush, FUA, several connections */

static char *disk;
static uint64_t size;
static int64_t polling;            /* nanoseconds */

/* Numbers in the protocol are big-endian, and lie anywhere. */
static uint16_t get16(const char *p) { uint16_t n; memcpy(&n, p, sizeof n); return be16toh(n); }
static uint32_t get32(const char *p) { uint32_t n; memcpy(&n, p, sizeof n); return be32toh(n); }
static uint64_t get64(const char *p) { uint64_t n; memcpy(&n, p, sizeof n); return be64toh(n); }
static void put16(char *p, uint16_t n) { n = htobe16(n); memcpy(p, &n, sizeof n); }
static void put32(char *p, uint32_t n) { n = htobe32(n); memcpy(p, &n, sizeof n); }
static void put64(char *p, uint64_t n) { n = htobe64(n); memcpy(p, &n, sizeof n); }

static int64_t now(void)
{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int receive_all(int fd, void *buffer, size_t count)
{
  char *p = buffer;
  while (count > 0) {
    ssize_t got = recv(fd, p, count, MSG_WAITALL);
    if (got < 0 && errno == EINTR)
      continue;
    if (got <= 0)
      return -1;
    p += got;
    count -= (size_t)got;
  }
  return 0;
}

/* What is there, or what comes first; polls for it before it sleeps, if asked to. */
static ssize_t receive_some(int fd, void *buffer, size_t count)
{
  if (polling > 0) {
    int64_t end = now() + polling;
    do {
      ssize_t got = recv(fd, buffer, count, MSG_DONTWAIT);
      if (got >= 0 || errno != EAGAIN)
        return got;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    } while (now() < end);
  }
  return recv(fd, buffer, count, 0);
}

static int send_all(int fd, struct iovec *vectors, size_t count)
{
  while (count > 0) {
    struct msghdr message = { .msg_iov = vectors, .msg_iovlen = count };
    ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR)
      continue;
    if (sent < 0)
      return -1;
    while (count > 0 && (size_t)sent >= vectors->iov_len) {
      sent -= (ssize_t)vectors->iov_len;
      vectors++;
      count--;
    }
    if (sent > 0) {
      vectors->iov_base = (char *)vectors->iov_base + sent;
      vectors->iov_len -= (size_t)sent;
    }
  }
  return 0;
}

static int send_bytes(int fd, void *bytes, size_t count)
{
  struct iovec vector = { bytes, count };
  return send_all(fd, &vector, 1);
}

static int answer_option(int fd, uint32_t option, uint32_t type, const char *data, uint32_t count)
{
  char reply[20 + 12];
  put64(reply, OPTION_REPLY_MAGIC);
  put32(reply + 8, option);
  put32(reply + 12, type);
  put32(reply + 16, count);
  if (count > 0)
    memcpy(reply + 20, data, count);
  return send_bytes(fd, reply, 20 + count);
}

/* Fixed newstyle, up to GO.  Returns whether reads get structured replies; -1: hang up. */
static int negotiate(int fd)
{
  char greeting[18] = "NBDMAGICIHAVEOPT", head[16], data[8192];
  int structured = 0;

  put16(greeting + 16, 3);         /* fixed newstyle, no zeroes */
  if (send_bytes(fd, greeting, sizeof greeting) < 0 || receive_all(fd, data, 4) < 0)
    return -1;
  for (;;) {
    if (receive_all(fd, head, sizeof head) < 0)
      return -1;
    uint32_t option = get32(head + 8), count = get32(head + 12);
    if (count > sizeof data || receive_all(fd, data, count) < 0)
      return -1;
    if (option == OPT_STRUCTURED_REPLY) {
      structured = 1;
      if (answer_option(fd, option, 1, NULL, 0) < 0)
        return -1;
    }
    else if (option == OPT_GO || option == OPT_INFO) {
      char info[12];
      put16(info, 0);
      put64(info + 2, size);
      put16(info + 10, FLAGS);
      if (answer_option(fd, option, 3, info, sizeof info) < 0 ||
          answer_option(fd, option, 1, NULL, 0) < 0)
        return -1;
      if (option == OPT_GO)
        return structured;
    }
    else if (option == OPT_ABORT) {
      answer_option(fd, option, 1, NULL, 0);
      return -1;
    }
    else if (answer_option(fd, option, ERR_UNSUP, NULL, 0) < 0)
      return -1;
  }
}

/* The replies of a batch, until they are sent. */
struct batch {
  int fd;
  size_t vectors, headers, bytes;  /* how many are in use; bytes in all */
  struct iovec vector[VECTORS];
  char header[VECTORS / 2 * READ_CHUNK];
};

static void add_vector(struct batch *batch, void *base, size_t count)
{
  batch->vector[batch->vectors++] = (struct iovec){ base, count };
  batch->bytes += count;
}

static int flush_batch(struct batch *batch)
{
  int failed = batch->vectors > 0 && send_all(batch->fd, batch->vector, batch->vectors) < 0;
  batch->vectors = batch->headers = batch->bytes = 0;
  return failed ? -1 : 0;
}

static void add_reply(struct batch *batch, const char *request, int structured)
{
  char *header = batch->header + batch->headers;
  uint64_t offset = get64(request + 16);
  uint32_t count = get32(request + 24);
  int reading = get16(request + 6) == CMD_READ;

  if (reading && structured) {
    put32(header, STRUCTURED_MAGIC);
    put16(header + 4, 1);          /* the last chunk */
    put16(header + 6, 1);          /* offset and data */
    memcpy(header + 8, request + 8, 8);
    put32(header + 16, count + 8);
    put64(header + 20, offset);
    batch->headers += READ_CHUNK;
    add_vector(batch, header, READ_CHUNK);
  }
  else {
    put32(header, SIMPLE_MAGIC);
    put32(header + 4, 0);
    memcpy(header + 8, request + 8, 8);
    batch->headers += SIMPLE_REPLY;
    struct iovec *last = batch->vectors > 0 ? &batch->vector[batch->vectors - 1] : NULL;
    if (last && (char *)last->iov_base + last->iov_len == header) {
      last->iov_len += SIMPLE_REPLY;
      batch->bytes += SIMPLE_REPLY;
    }
    else
      add_vector(batch, header, SIMPLE_REPLY);
  }
  if (reading && count > 0)
    add_vector(batch, disk + offset, count);
}

static int room(const struct batch *batch)
{
  return batch->vectors + 2 <= VECTORS && batch->bytes < BATCH &&
         batch->headers + READ_CHUNK <= sizeof batch->header;
}

static void transmit(int fd, int structured, char *buffer, struct batch *batch)
{
  size_t start = 0, have = 0;      /* buffer[start..have) is not done yet */

  batch->fd = fd;
  for (;;) {
    if (start == have)
      start = have = 0;
    else if (start > KEPT) {
      memmove(buffer, buffer + start, have - start);
      have -= start;
      start = 0;
    }
    /* What is not done came with one recv, but for a header and DIRECT: there is room for more. */
    ssize_t got = receive_some(fd, buffer + have, RECEIVE);
    if (got < 0 && errno == EINTR)
      continue;
    if (got <= 0)
      return;
    have += (size_t)got;
    while (have - start >= REQUEST) {
      const char *request = buffer + start;
      uint16_t command = get16(request + 6);
      uint64_t offset = get64(request + 16);
      uint32_t count = get32(request + 24);
      if (get32(request) != REQUEST_MAGIC || command > CMD_FLUSH || command == CMD_DISC ||
          offset > size || count > size - offset)
        return;
      size_t payload = command == CMD_WRITE ? count : 0, here = have - start - REQUEST;
      if (here < payload && payload - here <= DIRECT)
        break;                     /* the next recv brings the rest */
      if (payload > 0) {
        size_t copied = here < payload ? here : payload;
        memcpy(disk + offset, request + REQUEST, copied);
        if (copied < payload && receive_all(fd, disk + offset + copied, payload - copied) < 0)
          return;
        payload = copied;
      }
      add_reply(batch, request, structured);
      start += REQUEST + payload;
      if (!room(batch) && flush_batch(batch) < 0)
        return;
    }
    if (flush_batch(batch) < 0)
      return;
  }
}

static void *serve(void *argument)
{
  int fd = (int)(intptr_t)argument;
  int structured = negotiate(fd);
  char *buffer = malloc(BUFFER);
  struct batch *batch = calloc(1, sizeof *batch);

  if (structured >= 0 && buffer && batch)
    transmit(fd, structured, buffer, batch);
  free(batch);
  free(buffer);
  close(fd);
  return NULL;
}

static void fail(const char *what)
{
  perror(what);
  exit(1);
}

int main(int argc, char **argv)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  int listener = socket(AF_UNIX, SOCK_STREAM, 0);

  if (argc < 3 || argc > 4 || strlen(argv[1]) >= sizeof address.sun_path) {
    fprintf(stderr, "usage: limit SOCKET SIZE [MICROSECONDS]\n");
    return 2;
  }
  strcpy(address.sun_path, argv[1]);
  size = strtoull(argv[2], NULL, 10);
  polling = argc > 3 ? strtoll(argv[3], NULL, 10) * 1000 : 0;
  disk = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
              0);
  if (disk == MAP_FAILED)
    fail("mmap");
  if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
      listen(listener, 128) < 0)
    fail(argv[1]);
  for (;;) {
    int fd = accept(listener, NULL, NULL);
    pthread_t thread;
    if (fd < 0)
      continue;
    if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd) != 0) {
      close(fd);
      continue;
    }
    pthread_detach(thread);
  }
}
