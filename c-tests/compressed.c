/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Compressed clusters: chosen at creation, written by each call that writes, and
 * what is refused. */
#include "disk.h"

#define CLUSTER 65536u
#define SIZE (16u * CLUSTER)

static unsigned char data[3 * CLUSTER], found[3 * CLUSTER];

static struct qcow2rs_image *made(const char *path, const char *type)
{
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_create_opts_set(o, "compression_type", type));
    CHECK_OK(qcow2rs_create_path(path, 0, o, NULL, &img));
    qcow2rs_create_opts_free(&o);
    return img;
}

/* What qcow2rs_block_status says of the cluster at this offset. */
static uint32_t status(struct qcow2rs_image *img, uint64_t offset)
{
    struct qcow2rs_extent extent;

    CHECK_EQ(qcow2rs_block_status(img, offset, CLUSTER, 0, &extent, 1), 1);
    return extent.flags;
}

static void holds(struct qcow2rs_image *img, uint64_t offset, size_t length)
{
    memset(found, 0xee, sizeof(found));
    CHECK_OK(qcow2rs_pread(img, found, length, offset, 0));
    CHECK(memcmp(found, data, length) == 0);
    CHECK(status(img, offset) & QCOW2RS_BLOCK_COMPRESSED);
}

/* By a buffer, by ranges, through a queue; durable at once, too. */
static void written(const char *type, uint32_t number)
{
    char *path = temp_path(type);
    struct qcow2rs_image *img = made(path, type);
    struct iovec iov[2] = {{data, 1000}, {data + 1000, 3 * CLUSTER - 1000}};
    uint32_t flags = QCOW2RS_IO_COMPRESSED | QCOW2RS_IO_FUA;
    struct qcow2rs_completion c;
    struct qcow2rs_queue *q;
    struct qcow2rs_info i;

    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK_EQ(i.compression_type, number);
    CHECK_EQ(i.incompatible_features, number << 3);
    CHECK_OK(qcow2rs_pwrite(img, data, CLUSTER, 0, QCOW2RS_IO_COMPRESSED));
    holds(img, 0, CLUSTER);
    CHECK_OK(qcow2rs_pwritev(img, iov, 2, 2 * CLUSTER, flags));
    holds(img, 2 * CLUSTER, 3 * CLUSTER);
    CHECK_OK(qcow2rs_queue_create(img, NULL, &q));
    CHECK_OK(qcow2rs_queue_pwrite(q, data, 2 * CLUSTER, 8 * CLUSTER, flags,
                                  NULL));
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, -1), 1);
    CHECK_EQ(c.ret, 0);
    qcow2rs_queue_destroy(&q);
    holds(img, 8 * CLUSTER, 2 * CLUSTER);
    /* A part makes it a normal one. */
    CHECK_OK(qcow2rs_pwrite(img, data, 10, 10, 0));
    CHECK(!(status(img, 0) & QCOW2RS_BLOCK_COMPRESSED));
    CHECK_OK(qcow2rs_close(&img));
    img = open_image(path, 0);
    holds(img, 2 * CLUSTER, 3 * CLUSTER);
    CHECK_ERR(qcow2rs_pwrite(img, data, CLUSTER, 0, QCOW2RS_IO_COMPRESSED),
              EROFS);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

static void refused(void)
{
    char *path = temp_path("refused");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_image *img = made(path, "zlib");
    uint32_t flag = QCOW2RS_IO_COMPRESSED;
    struct qcow2rs_queue *q;
    struct qcow2rs_completion c;

    /* Parts of clusters. */
    CHECK_ERR(qcow2rs_pwrite(img, data, CLUSTER, 512, flag), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, data, CLUSTER + 1, 0, flag), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, data, CLUSTER, SIZE, flag), EINVAL);
    CHECK_OK(qcow2rs_pwrite(img, NULL, 0, 512, flag));
    /* What is allocated, unless it is compressed or the data is not. */
    CHECK_OK(qcow2rs_pwrite(img, "data", 4, 0, 0));
    CHECK_ERR(qcow2rs_pwrite(img, data, CLUSTER, 0, flag), EIO);
    CHECK_OK(qcow2rs_queue_create(img, NULL, &q));
    CHECK_OK(qcow2rs_queue_pwrite(q, data, CLUSTER, 0, flag, NULL));
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, -1), 1);
    CHECK_EQ(c.ret, -EIO);
    qcow2rs_queue_destroy(&q);
    CHECK_OK(qcow2rs_pwrite(img, data, CLUSTER, CLUSTER, flag));
    CHECK_OK(qcow2rs_pwrite(img, data, CLUSTER, CLUSTER, flag));
    holds(img, CLUSTER, CLUSTER);
    fill(found, CLUSTER, 3);
    CHECK_OK(qcow2rs_pwrite(img, found, CLUSTER, 0, flag));
    CHECK(!(status(img, 0) & QCOW2RS_BLOCK_COMPRESSED));
    CHECK_OK(qcow2rs_close(&img));

    /* Version 2 knows zlib only; nobody knows others. */
    CHECK_OK(qcow2rs_create_opts_set(o, "compression_type", "zstd"));
    CHECK_OK(qcow2rs_create_opts_set(o, "compat", "0.10"));
    CHECK_ERR(qcow2rs_create_path(path, 0, o, NULL, NULL), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(o, "compression_type", "lz4"), EINVAL);
    qcow2rs_create_opts_free(&o);
    free(path);
}

static void raw(void)
{
    char *path = temp_path("raw");
    struct qcow2rs_open_opts *o = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_image *img;
    int fd = open(path, O_RDWR | O_CREAT, 0600);

    CHECK_EQ(ftruncate(fd, SIZE), 0);
    CHECK_EQ(close(fd), 0);
    CHECK_OK(qcow2rs_open_opts_set_format(o, QCOW2RS_FORMAT_RAW));
    CHECK_OK(qcow2rs_open_path(path, o, &img));
    CHECK_ERR(qcow2rs_pwrite(img, data, CLUSTER, 0, QCOW2RS_IO_COMPRESSED),
              ENOTSUP);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&o);
    free(path);
}

int main(void)
{
    size_t i;

    for (i = 0; i < sizeof(data); i++) {
        data[i] = (unsigned char)(i >> 6);
    }
    written("zlib", QCOW2RS_COMPRESSION_ZLIB);
    written("zstd", QCOW2RS_COMPRESSION_ZSTD);
    refused();
    raw();
    return 0;
}
