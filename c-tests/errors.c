/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Images, options and descriptors that are wrong: each failure has the errno
 * value and the code that the header promises, and leaves the rest usable. */
#include "disk.h"

#define SIZE (1u << 20)
#define CLUSTER 65536u

static struct memory disk;

static void put(size_t at, uint64_t value, size_t bytes)
{
    memory_put(&disk, at, value, bytes);
}

static uint64_t get64(size_t at)
{
    return memory_get64(&disk, at);
}

/* Opens the disk, which is then as it was before. */
static int open_disk(const struct qcow2rs_open_opts *opts)
{
    struct qcow2rs_storage *storage = memory_storage(&disk, 0);
    struct qcow2rs_image *img = (void *)8;
    int ret = qcow2rs_open(&storage, opts, &img);

    CHECK(storage == NULL);
    if (ret < 0) {
        CHECK(img == NULL);
        CHECK_EQ(disk.closed, 1);
    } else {
        CHECK_OK(qcow2rs_close(&img));
    }
    return ret;
}

/* Changes bytes of the header for one attempt to open the disk. */
static void open_with(size_t at, uint64_t value, size_t bytes,
                      const struct qcow2rs_open_opts *opts, int errno_value,
                      uint32_t code)
{
    unsigned char saved[8];

    memcpy(saved, disk.bytes + at, bytes);
    put(at, value, bytes);
    CHECK_CODE(open_disk(opts), errno_value, code);
    memcpy(disk.bytes + at, saved, bytes);
    CHECK_OK(open_disk(opts));
}

static void bad_headers(void)
{
    struct qcow2rs_open_opts *rdwr = new_open_opts(QCOW2RS_OPEN_RDWR);

    open_with(0, 0x51464900, 4, NULL, EINVAL, QCOW2RS_E_NOT_QCOW2);
    open_with(4, 1, 4, NULL, ENOTSUP, QCOW2RS_E_UNSUPPORTED_VERSION);
    open_with(4, 4, 4, NULL, ENOTSUP, QCOW2RS_E_UNSUPPORTED_VERSION);
    open_with(20, 8, 4, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(20, 63, 4, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(24, UINT64_MAX, 8, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(36, UINT32_MAX, 4, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(40, 7, 8, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(56, 0, 4, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(96, 7, 4, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(100, 8, 4, NULL, EINVAL, QCOW2RS_E_BAD_HEADER);
    open_with(72, UINT64_C(1) << 63, 8, NULL, ENOTSUP,
              QCOW2RS_E_UNSUPPORTED_FEATURE);
    open_with(72, 2, 8, rdwr, EROFS, QCOW2RS_E_MARKED_CORRUPT);
    open_with(40, 0, 8, rdwr, EIO, QCOW2RS_E_CORRUPT);
    /* Dirty: repaired, unless that is not wanted. */
    CHECK_OK(qcow2rs_open_opts_set(rdwr, "repair-dirty", "off"));
    open_with(72, 1, 8, rdwr, EUCLEAN, QCOW2RS_E_DIRTY);
    put(72, 1, 8);
    CHECK_OK(open_disk(NULL));
    CHECK_EQ(get64(72), 1);
    CHECK_OK(qcow2rs_open_opts_set(rdwr, "repair-dirty", "on"));
    CHECK_OK(open_disk(rdwr));
    CHECK_EQ(get64(72), 0);
    qcow2rs_open_opts_free(&rdwr);
}

static void limits(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_RDWR);

    CHECK_OK(qcow2rs_open_opts_set(opts, "max-virtual-size", "512k"));
    CHECK_CODE(open_disk(opts), EFBIG, QCOW2RS_E_LIMIT);
    CHECK_OK(qcow2rs_open_opts_set(opts, "max-virtual-size", "1M"));
    CHECK_OK(open_disk(opts));
    CHECK_OK(qcow2rs_open_opts_set(opts, "max-metadata-size", "100"));
    CHECK_CODE(open_disk(opts), EFBIG, QCOW2RS_E_LIMIT);
    CHECK_OK(qcow2rs_open_opts_set(opts, "max-metadata-size", "4M"));
    CHECK_OK(open_disk(opts));
    qcow2rs_open_opts_free(&opts);
}

/* A backing file of which nobody says what format it has. */
static void no_backing_format(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(0);
    char *below = temp_path("below");
    FILE *file = fopen(below, "w");

    CHECK(file != NULL && fclose(file) == 0);
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_PATHS, NULL,
                                              NULL));
    /* Well behind the header's records. */
    put(8, 1024, 8);
    put(16, strlen(below), 4);
    memcpy(disk.bytes + 1024, below, strlen(below));
    CHECK_CODE(open_disk(NULL), EPERM, QCOW2RS_E_POLICY);
    CHECK_CODE(open_disk(opts), EINVAL, QCOW2RS_E_BACKING);
    CHECK_OK(qcow2rs_open_opts_set(opts, "backing-format", "raw"));
    CHECK_OK(open_disk(opts));
    CHECK_OK(qcow2rs_open_opts_set(opts, "backing-format", "qcow2"));
    CHECK_CODE(open_disk(opts), EINVAL, QCOW2RS_E_BACKING);
    CHECK_EQ(unlink(below), 0);
    CHECK_CODE(open_disk(opts), ENOENT, QCOW2RS_E_BACKING);
    put(8, 0, 8);
    put(16, 0, 4);
    qcow2rs_open_opts_free(&opts);
    free(below);
}

/* The guest's first cluster is said to be where the refcount table is. */
static void corrupt(void)
{
    struct qcow2rs_open_opts *rdwr = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img;
    unsigned char buf[512], table[CLUSTER];
    struct qcow2rs_info info;
    size_t l2;

    l2 = get64(get64(40)) & 0xfffffffffffe00;
    CHECK(get64(l2) >> 63 == 1 && get64(l2 + 8) >> 63 == 1);
    put(l2, UINT64_C(1) << 63 | get64(48), 8);
    storage = memory_storage(&disk, 0);
    CHECK_OK(qcow2rs_open(&storage, rdwr, &img));
    memcpy(table, disk.bytes + get64(48), CLUSTER);
    CHECK_CODE(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0), EIO,
               QCOW2RS_E_CORRUPT);
    CHECK(memcmp(table, disk.bytes + get64(48), CLUSTER) == 0);

    /* From now on nothing is written, and what is sound is read. */
    CHECK_ERR(qcow2rs_pwrite(img, buf, sizeof(buf), CLUSTER, 0), ESHUTDOWN);
    CHECK_ERR(qcow2rs_write_zeroes(img, 0, 512, 0), ESHUTDOWN);
    CHECK_ERR(qcow2rs_discard(img, CLUSTER, CLUSTER, 0), ESHUTDOWN);
    CHECK_ERR(qcow2rs_flush(img), ESHUTDOWN);
    CHECK_OK(qcow2rs_pread(img, buf, sizeof(buf), CLUSTER, 0));
    CHECK_EQ(buf[0], 'x');
    CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
    CHECK(info.flags & QCOW2RS_INFO_CORRUPT);
    CHECK_ERR(qcow2rs_close(&img), ESHUTDOWN);
    CHECK(img == NULL);
    CHECK_EQ(disk.closed, 1);

    /* The image says so to whoever comes next. */
    CHECK_CODE(open_disk(rdwr), EROFS, QCOW2RS_E_MARKED_CORRUPT);
    CHECK_OK(open_disk(NULL));
    qcow2rs_open_opts_free(&rdwr);
}

/* What only a file descriptor can do wrong. */
static void descriptors(void)
{
    struct qcow2rs_open_opts *rdwr = new_open_opts(QCOW2RS_OPEN_RDWR);
    char *path = temp_path("file"), *pipe_path = temp_path("pipe");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_storage *storage;
    int fd, ends[2];

    CHECK_OK(qcow2rs_close(&img));
    CHECK((fd = open(path, O_WRONLY | O_CLOEXEC)) >= 0);
    CHECK_ERR(qcow2rs_open_fd(fd, NULL, &img), EACCES);
    CHECK_EQ(close(fd), 0);
    CHECK((fd = open(path, O_RDWR | O_APPEND | O_CLOEXEC)) >= 0);
    CHECK_ERR(qcow2rs_open_fd(fd, rdwr, &img), EINVAL);
    CHECK_EQ(close(fd), 0);
    CHECK((fd = open(path, O_PATH | O_CLOEXEC)) >= 0);
    CHECK_ERR(qcow2rs_open_fd(fd, NULL, &img), EBADF);
    CHECK_EQ(close(fd), 0);

    /* No disk, and nobody at the other end to wait for. */
    CHECK_EQ(pipe2(ends, O_CLOEXEC), 0);
    CHECK_ERR(qcow2rs_open_fd(ends[0], NULL, &img), EINVAL);
    CHECK_EQ(close(ends[0]) + close(ends[1]), 0);
    CHECK_EQ(mkfifo(pipe_path, 0600), 0);
    CHECK_ERR(qcow2rs_open_path(pipe_path, NULL, &img), EINVAL);
    CHECK_OK(qcow2rs_storage_from_path(pipe_path, &storage));
    CHECK_ERR(qcow2rs_probe(storage), EINVAL);
    qcow2rs_storage_free(&storage);

    /* The failures above have taken nothing from the image. */
    CHECK_OK(qcow2rs_open_path(path, rdwr, &img));
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&rdwr);
    free(path);
    free(pipe_path);
}

/* An error is the calling thread's own, and stays until the next one. */
static void *other_thread(void *opaque)
{
    (void)opaque;
    CHECK_STR(qcow2rs_error_message(), "");
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_NONE);
    CHECK_ERR(qcow2rs_flush(NULL), EINVAL);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_NONE);
    return NULL;
}

static void records(void)
{
    pthread_t thread;

    put(0, 0, 4);
    CHECK_CODE(open_disk(NULL), EINVAL, QCOW2RS_E_NOT_QCOW2);
    put(0, 0x514649fb, 4);
    CHECK_EQ(pthread_create(&thread, NULL, other_thread, NULL), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_OK(open_disk(NULL));
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_NOT_QCOW2);
    CHECK(strlen(qcow2rs_error_message()) > 0);
    CHECK_STR(qcow2rs_error_code_name(QCOW2RS_E_NOT_QCOW2), "not-qcow2");
    CHECK_STR(qcow2rs_error_code_name(UINT32_MAX), "unknown");
}

int main(void)
{
    struct qcow2rs_image *img;
    unsigned char buf[2 * CLUSTER];

    memory_init(&disk);
    img = memory_image(&disk, SIZE, 0);
    memset(buf, 'x', sizeof(buf));
    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0));
    CHECK_OK(qcow2rs_close(&img));

    records();
    bad_headers();
    limits();
    no_backing_format();
    descriptors();
    corrupt();
    memory_destroy(&disk);
    return 0;
}
