/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Storage objects: who owns them, and disks behind the program's callbacks. */
#include "disk.h"

#define SIZE (1u << 20)

/* An older and a newer program's table, and what is missing in them. */
static void tables(void)
{
    struct qcow2rs_io_ops ops = memory_ops;
    struct {
        struct qcow2rs_io_ops ops;
        void (*unknown[4])(void);
    } longer = {memory_ops, {abort, abort, abort, abort}};
    struct qcow2rs_storage *storage = (void *)8;
    struct memory m;

    memory_init(&m);
    CHECK_ERR(qcow2rs_storage_from_callbacks(NULL, &m, 0, &storage), EINVAL);
    CHECK(storage == NULL);
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 2, &storage), EINVAL);

    ops.struct_size = 0;
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage), EINVAL);
    ops.struct_size = SIZE_MAX;
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage), EINVAL);
    ops.struct_size = offsetof(struct qcow2rs_io_ops, truncate) - 1;
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage), EINVAL);

    ops = memory_ops;
    ops.preadv = NULL;
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage), EINVAL);
    ops = memory_ops;
    ops.get_length = NULL;
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage), EINVAL);
    ops = memory_ops;
    ops.flush = NULL;
    CHECK_ERR(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage), EINVAL);
    /* What was not taken is not closed. */
    CHECK_EQ(m.closed, 0);

    /* All that must be there; close lies behind the end of this table, and so
     * does half of truncate. */
    ops = memory_ops;
    ops.struct_size = offsetof(struct qcow2rs_io_ops, truncate);
    CHECK_OK(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage));
    qcow2rs_storage_free(&storage);
    ops.struct_size += 4;
    CHECK_OK(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage));
    qcow2rs_storage_free(&storage);
    CHECK_EQ(m.closed, 0);

    /* What the library does not know is ignored. */
    longer.ops.struct_size = sizeof(longer);
    CHECK_OK(qcow2rs_storage_from_callbacks(&longer.ops, &m, 0, &storage));
    /* The table was copied. */
    memset(&longer, 0xff, sizeof(longer));
    qcow2rs_storage_free(&storage);
    CHECK(storage == NULL);
    CHECK_EQ(m.closed, 1);
    qcow2rs_storage_free(&storage);
    qcow2rs_storage_free(NULL);
    CHECK_EQ(m.closed, 1);
    CHECK_EQ(m.calls, 1);
    memory_destroy(&m);
}

/* Consumed whatever happens, closed once and last. */
static void ownership(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_create_opts *create = new_create_opts(SIZE);
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img;
    struct memory m;

    memory_init(&m);
    /* Not an image. */
    storage = memory_storage(&m, 0);
    img = (void *)8;
    CHECK_CODE(qcow2rs_open(&storage, opts, &img), EINVAL,
               QCOW2RS_E_NOT_QCOW2);
    CHECK(storage == NULL && img == NULL);
    CHECK_EQ(m.closed, 1);

    /* Nowhere to put the image. */
    storage = memory_storage(&m, 0);
    CHECK_ERR(qcow2rs_open(&storage, opts, NULL), EINVAL);
    CHECK(storage == NULL);
    CHECK_EQ(m.closed, 1);

    /* The storage fails: its own errno comes back. */
    storage = memory_storage(&m, 0);
    m.fail_reads = EILSEQ;
    CHECK_CODE(qcow2rs_open(&storage, opts, &img), EILSEQ, QCOW2RS_E_CALLBACK);
    CHECK_EQ(m.closed, 1);
    m.fail_reads = 0;
    storage = memory_storage(&m, 0);
    m.fail_writes = ECOMM;
    CHECK_CODE(qcow2rs_create(&storage, create, NULL, NULL), ECOMM,
               QCOW2RS_E_CALLBACK);
    CHECK(storage == NULL);
    CHECK_EQ(m.closed, 1);
    m.fail_writes = 0;

    /* Create alone, then open. */
    storage = memory_storage(&m, 0);
    CHECK_OK(qcow2rs_create(&storage, create, NULL, NULL));
    CHECK(storage == NULL);
    CHECK_EQ(m.closed, 1);
    CHECK(m.flushes > 0);
    storage = memory_storage(&m, 0);
    CHECK_EQ(qcow2rs_probe(storage), QCOW2RS_FORMAT_QCOW2);
    CHECK_EQ(m.closed, 0);
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    CHECK_EQ(m.closed, 0);
    CHECK_OK(qcow2rs_close(&img));
    CHECK(img == NULL);
    CHECK_EQ(m.closed, 1);
    storage = memory_storage(&m, 0);
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    CHECK_OK(qcow2rs_abandon(&img));
    CHECK(img == NULL);
    CHECK_EQ(m.closed, 1);

    qcow2rs_create_opts_free(&create);
    qcow2rs_open_opts_free(&opts);
    memory_destroy(&m);
}

/* Data comes back, also after the image was closed. */
static void data(uint32_t flags)
{
    static unsigned char wrote[300000], read[300000];
    struct qcow2rs_open_opts *opts = new_open_opts(0);
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img;
    struct memory m;

    memory_init(&m);
    img = memory_image(&m, SIZE, flags);
    fill(wrote, sizeof(wrote), 1);
    CHECK_OK(qcow2rs_pwrite(img, wrote, sizeof(wrote), 12345, 0));
    CHECK_OK(qcow2rs_pread(img, read, sizeof(read), 12345, 0));
    CHECK(memcmp(wrote, read, sizeof(read)) == 0);
    CHECK_OK(qcow2rs_write_zeroes(img, 65536, 65536, QCOW2RS_ZERO_MAY_UNMAP));
    memset(wrote + 65536 - 12345, 0, 65536);
    CHECK_OK(qcow2rs_flush(img));
    CHECK_OK(qcow2rs_close(&img));
    CHECK_EQ(m.closed, 1);

    storage = memory_storage(&m, flags);
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    memset(read, 0xee, sizeof(read));
    CHECK_OK(qcow2rs_pread(img, read, sizeof(read), 12345, 0));
    CHECK(memcmp(wrote, read, sizeof(read)) == 0);
    CHECK_ERR(qcow2rs_pwrite(img, wrote, 1, 0, 0), EROFS);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&opts);
    memory_destroy(&m);
}

/* Without pwritev the storage is read-only, without the rest it just works. */
static void few_callbacks(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_io_ops ops = memory_ops;
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img;
    unsigned char wrote[5000], read[5000];
    struct memory m;

    memory_init(&m);
    img = memory_image(&m, SIZE, 0);
    CHECK_OK(qcow2rs_close(&img));

    ops.pwritev = NULL;
    CHECK_OK(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage));
    m.closed = 0;
    CHECK_ERR(qcow2rs_open(&storage, opts, &img), EACCES);
    CHECK_EQ(m.closed, 1);
    m.closed = 0;
    CHECK_OK(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage));
    CHECK_OK(qcow2rs_open(&storage, NULL, &img));
    CHECK_OK(qcow2rs_pread(img, read, sizeof(read), 0, 0));
    CHECK(all_zero(read, sizeof(read)));
    CHECK_OK(qcow2rs_close(&img));

    ops = memory_ops;
    ops.struct_size = offsetof(struct qcow2rs_io_ops, truncate);
    m.truncates = m.zeroes = m.discards = m.closed = 0;
    CHECK_OK(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage));
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    fill(wrote, sizeof(wrote), 2);
    CHECK_OK(qcow2rs_pwrite(img, wrote, sizeof(wrote), 70000, 0));
    CHECK_OK(qcow2rs_write_zeroes(img, 72000, 1000, 0));
    memset(wrote + 2000, 0, 1000);
    CHECK_OK(qcow2rs_discard(img, 131072, 65536, 0));
    CHECK_OK(qcow2rs_flush(img));
    CHECK_OK(qcow2rs_pread(img, read, sizeof(read), 70000, 0));
    CHECK(memcmp(wrote, read, sizeof(read)) == 0);
    CHECK_OK(qcow2rs_close(&img));
    CHECK_EQ(m.truncates + m.zeroes + m.discards + m.closed, 0);
    qcow2rs_open_opts_free(&opts);
    memory_destroy(&m);
}

/* Errors of the storage while the image is in use. */
static void failures(void)
{
    struct qcow2rs_image *img;
    unsigned char buf[4096];
    struct memory m;

    memory_init(&m);
    img = memory_image(&m, SIZE, 0);
    fill(buf, sizeof(buf), 3);
    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0));
    CHECK_OK(qcow2rs_flush(img));
    m.fail_reads = ENODEV;
    CHECK_CODE(qcow2rs_pread(img, buf, sizeof(buf), 0, 0), ENODEV,
               QCOW2RS_E_CALLBACK);
    m.fail_reads = 0;
    CHECK_OK(qcow2rs_pread(img, buf, sizeof(buf), 0, 0));
    m.fail_writes = ENOSPC;
    CHECK_ERR(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0), ENOSPC);
    m.fail_writes = 0;
    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0));
    /* What is no errno is an error all the same. */
    m.fail_reads = 1 << 20;
    CHECK_CODE(qcow2rs_pread(img, buf, sizeof(buf), 0, 0), EIO,
               QCOW2RS_E_CALLBACK);
    m.fail_reads = 0;

    /* A sync that fails is never forgotten. */
    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 500000, 0));
    m.fail_flushes = ETIMEDOUT;
    CHECK_CODE(qcow2rs_flush(img), EIO, QCOW2RS_E_FLUSH_FAILED);
    m.fail_flushes = 0;
    CHECK_CODE(qcow2rs_flush(img), EIO, QCOW2RS_E_FLUSH_FAILED);
    CHECK_CODE(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0), EIO,
               QCOW2RS_E_FLUSH_FAILED);
    CHECK_OK(qcow2rs_pread(img, buf, sizeof(buf), 0, 0));
    CHECK_CODE(qcow2rs_close(&img), EIO, QCOW2RS_E_FLUSH_FAILED);
    CHECK(img == NULL);
    CHECK_EQ(m.closed, 1);
    memory_destroy(&m);
}

/* Paths and descriptors. */
static void files(void)
{
    char *path = temp_path("file"), *directory = temp_path("directory");
    struct qcow2rs_open_opts *rdwr = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img = new_image(path, SIZE), *second;
    unsigned char buf[100], read[100];
    int fd, flags;

    fill(buf, sizeof(buf), 4);
    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 5, 0));

    /* One writer, whichever way it comes. */
    CHECK_CODE(qcow2rs_open_path(path, rdwr, &second), EAGAIN,
               QCOW2RS_E_LOCKED);
    fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_CODE(qcow2rs_open_fd(fd, rdwr, &second), EAGAIN, QCOW2RS_E_LOCKED);
    CHECK_CODE(qcow2rs_open_fd(fd, NULL, &second), EAGAIN, QCOW2RS_E_LOCKED);
    CHECK_OK(qcow2rs_close(&img));

    /* The caller keeps its descriptor, and its flags. */
    flags = fcntl(fd, F_GETFL);
    CHECK_OK(qcow2rs_open_fd(fd, rdwr, &img));
    CHECK_OK(qcow2rs_pread(img, read, sizeof(read), 5, 0));
    CHECK(memcmp(buf, read, sizeof(read)) == 0);
    CHECK_EQ(fcntl(fd, F_GETFL), flags);
    CHECK_OK(qcow2rs_close(&img));
    CHECK_EQ(fcntl(fd, F_GETFL), flags);
    CHECK_OK(qcow2rs_storage_from_fd(fd, &storage));
    CHECK_EQ(close(fd), 0);
    CHECK_EQ(qcow2rs_probe(storage), QCOW2RS_FORMAT_QCOW2);
    CHECK_OK(qcow2rs_open(&storage, rdwr, &img));
    CHECK_OK(qcow2rs_close(&img));

    /* Writing needs a descriptor that can be written to. */
    fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK_ERR(qcow2rs_open_fd(fd, rdwr, &img), EACCES);
    CHECK_OK(qcow2rs_open_fd(fd, NULL, &img));
    CHECK_OK(qcow2rs_open_path(path, NULL, &second));
    CHECK_OK(qcow2rs_close(&second));
    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(qcow2rs_open_opts_set_flags(rdwr, QCOW2RS_OPEN_DIRECT));
    CHECK_ERR(qcow2rs_open_fd(fd, rdwr, &img), EINVAL);
    CHECK_EQ(close(fd), 0);
    CHECK_ERR(qcow2rs_storage_from_fd(fd, &storage), EBADF);
    CHECK(storage == NULL);
    CHECK_ERR(qcow2rs_storage_from_fd(0, NULL), EINVAL);

    /* What only opening finds out. */
    CHECK_ERR(qcow2rs_storage_from_path(NULL, &storage), EINVAL);
    CHECK_ERR(qcow2rs_storage_from_path(path, NULL), EINVAL);
    CHECK_OK(qcow2rs_storage_from_path("/no/such/file", &storage));
    CHECK_ERR(qcow2rs_probe(storage), ENOENT);
    CHECK(storage != NULL);
    CHECK_ERR(qcow2rs_open(&storage, NULL, &img), ENOENT);
    CHECK(storage == NULL);
    CHECK_EQ(mkdir(directory, 0755), 0);
    CHECK_ERR(qcow2rs_open_path(directory, NULL, &img), EISDIR);

    qcow2rs_open_opts_free(&rdwr);
    free(path);
    free(directory);
}

/* Raw images, and the guard against a guest that writes itself a header. */
static void raw(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img;
    unsigned char buf[4] = "QFI\xfb", read[4];
    struct memory m;

    memory_init(&m);
    m.length = SIZE;
    CHECK_OK(qcow2rs_open_opts_set_format(opts, QCOW2RS_FORMAT_RAW));
    storage = memory_storage(&m, 0);
    CHECK_EQ(qcow2rs_probe(storage), QCOW2RS_FORMAT_RAW);
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    CHECK_EQ(qcow2rs_get_size(img), SIZE);
    CHECK_OK(qcow2rs_pwrite(img, buf, 4, 1000, 0));
    CHECK(memcmp(m.bytes + 1000, buf, 4) == 0);
    CHECK_ERR(qcow2rs_pwrite(img, buf, 4, SIZE - 3, 0), EINVAL);
    CHECK_OK(qcow2rs_close(&img));

    memcpy(m.bytes, "QFI\xfb\0\0\0\3", 8);
    storage = memory_storage(&m, 0);
    CHECK_ERR(qcow2rs_open(&storage, opts, &img), EINVAL);
    CHECK_OK(qcow2rs_open_opts_set(opts, "allow-qcow2-magic", "on"));
    storage = memory_storage(&m, 0);
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(qcow2rs_open_opts_set(opts, "allow-qcow2-magic", "off"));
    CHECK_OK(qcow2rs_open_opts_set_flags(opts, 0));
    storage = memory_storage(&m, 0);
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    CHECK_OK(qcow2rs_pread(img, read, 4, 0, 0));
    CHECK(memcmp(read, buf, 4) == 0);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&opts);
    memory_destroy(&m);
}

int main(void)
{
    tables();
    ownership();
    data(0);
    data(QCOW2RS_IO_SERIALIZED);
    few_callbacks();
    failures();
    files();
    raw();
    return 0;
}
