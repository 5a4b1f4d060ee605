/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What tests of images share: files that go away at exit, and a disk in memory
 * behind callbacks. */
#ifndef DISK_H
#define DISK_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <qcow2rs.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness.h"

/* A call that must fail with this errno value, and say why. */
#define CHECK_ERR(call, errno_value)                                      \
    do {                                                                  \
        CHECK_EQ(call, -(errno_value));                                   \
        if (qcow2rs_error_message()[0] == '\0') {                         \
            CHECK_FAILED("%s has left no message", #call);                \
        }                                                                 \
    } while (0)

/* The same, with a finer code. */
#define CHECK_CODE(call, errno_value, code)                               \
    do {                                                                  \
        CHECK_ERR(call, errno_value);                                     \
        CHECK_EQ(qcow2rs_error_code(), code);                             \
    } while (0)

/* ---------------------------------------------------------- temporary files */
static char temp_dir[64];

static inline void temp_remove(void)
{
    char command[128];

    snprintf(command, sizeof(command), "rm -rf '%s'", temp_dir);
    if (system(command) != 0) {
        fprintf(stderr, "cannot remove %s\n", temp_dir);
    }
}

/* The path of a file in a directory of this run's; the caller frees it. */
static inline char *temp_path(const char *name)
{
    char *path;

    if (temp_dir[0] == '\0') {
        strcpy(temp_dir, "/tmp/qcow2rs-test-XXXXXX");
        CHECK(mkdtemp(temp_dir) != NULL);
        CHECK_EQ(atexit(temp_remove), 0);
    }
    CHECK(asprintf(&path, "%s/%s", temp_dir, name) > 0);
    return path;
}

/* --------------------------------------------------------------- a new image */
static inline struct qcow2rs_create_opts *new_create_opts(uint64_t size)
{
    struct qcow2rs_create_opts *opts;

    CHECK_OK(qcow2rs_create_opts_new(&opts));
    CHECK_OK(qcow2rs_create_opts_set_size(opts, size));
    return opts;
}

static inline struct qcow2rs_open_opts *new_open_opts(uint32_t flags)
{
    struct qcow2rs_open_opts *opts;

    CHECK_OK(qcow2rs_open_opts_new(&opts));
    CHECK_OK(qcow2rs_open_opts_set_flags(opts, flags));
    return opts;
}

/* An image file of this size, open for writing. */
static inline struct qcow2rs_image *new_image(const char *path, uint64_t size)
{
    struct qcow2rs_create_opts *opts = new_create_opts(size);
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_create_path(path, 0, opts, NULL, &img));
    qcow2rs_create_opts_free(&opts);
    return img;
}

static inline struct qcow2rs_image *open_image(const char *path, uint32_t flags)
{
    struct qcow2rs_open_opts *opts = new_open_opts(flags);
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_open_path(path, opts, &img));
    qcow2rs_open_opts_free(&opts);
    return img;
}

/* Bytes that differ from place to place. */
static inline void fill(unsigned char *buf, size_t length, unsigned seed)
{
    size_t i;

    for (i = 0; i < length; i++) {
        seed = seed * 1103515245u + 12345u;
        buf[i] = (unsigned char)(seed >> 16);
    }
}

static inline bool all_zero(const unsigned char *buf, size_t length)
{
    size_t i;

    for (i = 0; i < length; i++) {
        if (buf[i] != 0) {
            return false;
        }
    }
    return true;
}

/* ---------------------------------------------------------- a disk in memory */
#define MEMORY_MAX (160u << 20)

struct memory {
    pthread_mutex_t lock;
    unsigned char *bytes; /* MEMORY_MAX, zero behind `length` */
    uint64_t length;
    atomic_int inside;    /* callbacks that run now */
    atomic_int most;      /* ...and at most so far */
    atomic_int calls;
    atomic_int flushes;
    atomic_int truncates;
    atomic_int zeroes;
    atomic_int discards;
    atomic_int closed;
    atomic_int fail_reads;   /* errno for the next reads; 0: none */
    atomic_int fail_writes;
    atomic_int fail_flushes;
    atomic_int late_calls;   /* calls after close */
};

/* The low `bytes` bytes of a number, big-endian, as everything in images is. */
static inline void memory_put(struct memory *m, size_t at, uint64_t value,
                              size_t bytes)
{
    while (bytes > 0) {
        m->bytes[at + --bytes] = (unsigned char)value;
        value >>= 8;
    }
}

static inline uint64_t memory_get64(const struct memory *m, size_t at)
{
    uint64_t value = 0;
    size_t i;

    for (i = 0; i < 8; i++) {
        value = value << 8 | m->bytes[at + i];
    }
    return value;
}

static inline struct memory *memory_enter(void *opaque)
{
    struct memory *m = opaque;
    int inside = atomic_fetch_add(&m->inside, 1) + 1;
    int most = atomic_load(&m->most);

    while (inside > most &&
           !atomic_compare_exchange_weak(&m->most, &most, inside)) {
    }
    atomic_fetch_add(&m->calls, 1);
    if (atomic_load(&m->closed)) {
        atomic_fetch_add(&m->late_calls, 1);
    }
    pthread_mutex_lock(&m->lock);
    return m;
}

static inline int memory_leave(struct memory *m, int ret)
{
    pthread_mutex_unlock(&m->lock);
    atomic_fetch_sub(&m->inside, 1);
    return ret;
}

static inline int memory_preadv(void *opaque, const struct iovec *iov,
                                int iovcnt, uint64_t offset)
{
    struct memory *m = memory_enter(opaque);
    int i;

    if (atomic_load(&m->fail_reads)) {
        return memory_leave(m, -atomic_load(&m->fail_reads));
    }
    for (i = 0; i < iovcnt; i++) {
        size_t length = iov[i].iov_len, there = 0;

        if (offset < MEMORY_MAX) {
            there = MEMORY_MAX - offset < length ? MEMORY_MAX - offset : length;
            memcpy(iov[i].iov_base, m->bytes + offset, there);
        }
        memset((char *)iov[i].iov_base + there, 0, length - there);
        offset += length;
    }
    return memory_leave(m, 0);
}

static inline int memory_pwritev(void *opaque, const struct iovec *iov,
                                 int iovcnt, uint64_t offset)
{
    struct memory *m = memory_enter(opaque);
    int i;

    if (atomic_load(&m->fail_writes)) {
        return memory_leave(m, -atomic_load(&m->fail_writes));
    }
    for (i = 0; i < iovcnt; i++) {
        if (offset + iov[i].iov_len > MEMORY_MAX) {
            return memory_leave(m, -ENOSPC);
        }
        memcpy(m->bytes + offset, iov[i].iov_base, iov[i].iov_len);
        offset += iov[i].iov_len;
    }
    if (offset > m->length) {
        m->length = offset;
    }
    /* Any value >= 0 is success. */
    return memory_leave(m, iovcnt);
}

static inline int64_t memory_get_length(void *opaque)
{
    struct memory *m = memory_enter(opaque);
    int64_t length = (int64_t)m->length;

    memory_leave(m, 0);
    return length;
}

static inline int memory_flush(void *opaque)
{
    struct memory *m = memory_enter(opaque);

    atomic_fetch_add(&m->flushes, 1);
    return memory_leave(m, -atomic_load(&m->fail_flushes));
}

static inline int memory_truncate(void *opaque, uint64_t length)
{
    struct memory *m = memory_enter(opaque);

    atomic_fetch_add(&m->truncates, 1);
    if (length > MEMORY_MAX) {
        return memory_leave(m, -ENOSPC);
    }
    if (length < m->length) {
        memset(m->bytes + length, 0, m->length - length);
    }
    m->length = length;
    return memory_leave(m, 0);
}

static inline int memory_write_zeroes(void *opaque, uint64_t offset,
                                      uint64_t length, uint32_t flags)
{
    struct memory *m = memory_enter(opaque);

    CHECK_EQ(flags & ~(QCOW2RS_ZERO_MAY_UNMAP | QCOW2RS_IO_FUA), 0);
    atomic_fetch_add(&m->zeroes, 1);
    if (offset < m->length) {
        uint64_t there = m->length - offset;

        memset(m->bytes + offset, 0, there < length ? there : length);
    }
    return memory_leave(m, 0);
}

static inline int memory_discard(void *opaque, uint64_t offset, uint64_t length)
{
    struct memory *m = memory_enter(opaque);

    (void)offset;
    (void)length;
    atomic_fetch_add(&m->discards, 1);
    return memory_leave(m, 0);
}

static inline void memory_close(void *opaque)
{
    struct memory *m = memory_enter(opaque);

    atomic_fetch_add(&m->closed, 1);
    memory_leave(m, 0);
}

static const struct qcow2rs_io_ops memory_ops = {
    .struct_size = sizeof(struct qcow2rs_io_ops),
    .preadv = memory_preadv,
    .pwritev = memory_pwritev,
    .get_length = memory_get_length,
    .flush = memory_flush,
    .truncate = memory_truncate,
    .discard = memory_discard,
    .write_zeroes = memory_write_zeroes,
    .close = memory_close,
};

static inline void memory_init(struct memory *m)
{
    memset(m, 0, sizeof(*m));
    CHECK_EQ(pthread_mutex_init(&m->lock, NULL), 0);
    m->bytes = calloc(1, MEMORY_MAX);
    CHECK(m->bytes != NULL);
}

static inline void memory_destroy(struct memory *m)
{
    CHECK_EQ(m->inside, 0);
    CHECK_EQ(m->late_calls, 0);
    pthread_mutex_destroy(&m->lock);
    free(m->bytes);
}

/* A storage over the memory; close is called once for each. */
static inline struct qcow2rs_storage *memory_storage(struct memory *m,
                                                     uint32_t flags)
{
    struct qcow2rs_storage *storage;

    m->closed = 0;
    CHECK_OK(qcow2rs_storage_from_callbacks(&memory_ops, m, flags, &storage));
    return storage;
}

/* An image in the memory, open for writing. */
static inline struct qcow2rs_image *memory_image(struct memory *m,
                                                 uint64_t size, uint32_t flags)
{
    struct qcow2rs_create_opts *opts = new_create_opts(size);
    struct qcow2rs_storage *storage = memory_storage(m, flags);
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_create(&storage, opts, NULL, &img));
    CHECK(storage == NULL);
    qcow2rs_create_opts_free(&opts);
    return img;
}

#endif /* DISK_H */
