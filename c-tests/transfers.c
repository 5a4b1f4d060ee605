/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Reading, writing, zeroing, discarding, flushing, and where data is. */
#include "disk.h"

#define SIZE (4u << 20)
#define CLUSTER 65536u

static unsigned char expected[SIZE], got[SIZE];

static void check_all(struct qcow2rs_image *img)
{
    memset(got, 0xee, SIZE);
    CHECK_OK(qcow2rs_pread(img, got, SIZE, 0, 0));
    CHECK(memcmp(expected, got, SIZE) == 0);
}

/* Memory in pieces, empty ones and single bytes among them. */
static void vectors(struct qcow2rs_image *img)
{
    static unsigned char buf[200000];
    enum { PIECES = 1500 };
    static struct iovec many[PIECES];
    struct iovec iov[] = {
        {buf, 1}, {NULL, 0}, {buf + 1, 511}, {buf + 512, 0},
        {buf + 512, 100000}, {buf + 100512, 99488},
    };
    int i;

    fill(buf, sizeof(buf), 1);
    CHECK_OK(qcow2rs_pwritev(img, iov, 6, 777, 0));
    memcpy(expected + 777, buf, sizeof(buf));
    memset(buf, 0, sizeof(buf));
    CHECK_OK(qcow2rs_preadv(img, iov, 6, 777, 0));
    CHECK(memcmp(expected + 777, buf, sizeof(buf)) == 0);
    CHECK_OK(qcow2rs_pwritev(img, iov + 4, 1, 3, QCOW2RS_IO_UNCHANGED));
    memcpy(expected + 3, buf + 512, 100000);

    /* More than a system call takes. */
    for (i = 0; i < PIECES; i++) {
        many[i].iov_base = buf + i * 100;
        many[i].iov_len = 100;
    }
    fill(buf, sizeof(buf), 2);
    CHECK_OK(qcow2rs_pwritev(img, many, PIECES, 300001, QCOW2RS_IO_FUA));
    memcpy(expected + 300001, buf, PIECES * 100);
    memset(buf, 0, sizeof(buf));
    CHECK_OK(qcow2rs_preadv(img, many, PIECES, 300001, 0));
    CHECK(memcmp(expected + 300001, buf, PIECES * 100) == 0);
    check_all(img);
}

static void zeroes(struct qcow2rs_image *img)
{
    const uint32_t flags[] = {
        0, QCOW2RS_IO_FUA, QCOW2RS_ZERO_MAY_UNMAP,
        QCOW2RS_ZERO_MAY_UNMAP | QCOW2RS_IO_FUA,
    };
    uint64_t at = 1000;
    size_t i;

    for (i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
        CHECK_OK(qcow2rs_write_zeroes(img, at, 70001, flags[i]));
        memset(expected + at, 0, 70001);
        at += 80000;
    }
    check_all(img);
    /* Whole clusters need no data written; odd bytes do. */
    CHECK_OK(qcow2rs_write_zeroes(img, 8 * CLUSTER, CLUSTER,
                                  QCOW2RS_ZERO_NO_FALLBACK));
    memset(expected + 8 * CLUSTER, 0, CLUSTER);
    CHECK_OK(qcow2rs_pwrite(img, "abc", 3, 9 * CLUSTER, 0));
    memcpy(expected + 9 * CLUSTER, "abc", 3);
    CHECK_ERR(qcow2rs_write_zeroes(img, 9 * CLUSTER + 1, 1,
                                   QCOW2RS_ZERO_NO_FALLBACK), ENOTSUP);
    check_all(img);
    CHECK_OK(qcow2rs_discard(img, 9 * CLUSTER, CLUSTER, 0));
    memset(expected + 9 * CLUSTER, 0, CLUSTER);
    check_all(img);
}

/* Extents of the range, joined and checked for what holds of any. */
static int status(struct qcow2rs_image *img, uint64_t offset, uint64_t length,
                  uint32_t flags, struct qcow2rs_extent *extents, int max)
{
    int count = qcow2rs_block_status(img, offset, length, flags, extents, max);
    uint64_t at = offset;
    int i;

    CHECK_OK(count);
    CHECK(count <= max);
    for (i = 0; i < count; i++) {
        CHECK_EQ(extents[i].offset, at);
        CHECK(extents[i].length > 0);
        CHECK_EQ(extents[i].reserved, 0);
        CHECK_EQ(extents[i].flags & ~63u, 0);
        at += extents[i].length;
    }
    CHECK(at <= offset + length);
    CHECK_EQ(extents[count - 1].flags & QCOW2RS_BLOCK_EOF,
             at == SIZE ? QCOW2RS_BLOCK_EOF : 0);
    return count;
}

static void where_data_is(void)
{
    char *path = temp_path("status");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_extent e[8];
    unsigned char buf[CLUSTER];

    memset(e, 0xee, sizeof(e));
    CHECK_EQ(status(img, 0, SIZE, 0, e, 8), 1);
    CHECK_EQ(e[0].length, SIZE);
    CHECK_EQ(e[0].flags, QCOW2RS_BLOCK_ZERO | QCOW2RS_BLOCK_EOF);
    CHECK_EQ(e[1].reserved, 0xeeeeeeeeeeeeeeee);

    fill(buf, CLUSTER, 7);
    CHECK_OK(qcow2rs_pwrite(img, buf, CLUSTER, CLUSTER, 0));
    CHECK_OK(qcow2rs_write_zeroes(img, 3 * CLUSTER, CLUSTER, 0));
    CHECK_EQ(status(img, 0, SIZE, 0, e, 8), 5);
    CHECK_EQ(e[0].length, CLUSTER);
    CHECK_EQ(e[0].flags, QCOW2RS_BLOCK_ZERO);
    CHECK_EQ(e[1].flags, QCOW2RS_BLOCK_DATA | QCOW2RS_BLOCK_ALLOCATED |
                         QCOW2RS_BLOCK_OFFSET_VALID);
    CHECK(e[1].host_offset > 0 && e[1].host_offset % CLUSTER == 0);
    CHECK_EQ(e[1].depth, 0);
    CHECK_EQ(e[3].flags, QCOW2RS_BLOCK_ZERO | QCOW2RS_BLOCK_ALLOCATED);

    CHECK_EQ(status(img, 0, SIZE, QCOW2RS_STATUS_ONE, e, 8), 1);
    CHECK_EQ(status(img, 0, SIZE, QCOW2RS_STATUS_THIS_LAYER, e, 2), 2);
    CHECK_EQ(status(img, CLUSTER + 5, 100, 0, e, 8), 1);
    CHECK_EQ(e[0].length, 100);
    CHECK_EQ(e[0].host_offset % CLUSTER, 5);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* Handles of one file, one after the other. */
static void lives(struct qcow2rs_image **img, const char *path)
{
    struct qcow2rs_image *reader;

    /* What is given up is lost, not broken. */
    CHECK_OK(qcow2rs_flush(*img));
    CHECK_OK(qcow2rs_abandon(img));
    CHECK(*img == NULL);
    *img = open_image(path, 0);
    check_all(*img);
    CHECK_ERR(qcow2rs_pwrite(*img, expected, 1, 0, 0), EROFS);
    CHECK_ERR(qcow2rs_write_zeroes(*img, 0, 1, 0), EROFS);
    CHECK_ERR(qcow2rs_discard(*img, 0, CLUSTER, 0), EROFS);
    CHECK_OK(qcow2rs_flush(*img));
    CHECK_OK(qcow2rs_invalidate(*img));
    check_all(*img);

    CHECK_OK(qcow2rs_reopen(*img, QCOW2RS_OPEN_RDWR));
    CHECK_OK(qcow2rs_pwrite(*img, "x", 1, 5, 0));
    expected[5] = 'x';
    CHECK_CODE(qcow2rs_open_path(path, NULL, &reader), EAGAIN,
               QCOW2RS_E_LOCKED);
    CHECK_OK(qcow2rs_reopen(*img, 0));
    CHECK_ERR(qcow2rs_pwrite(*img, "y", 1, 5, 0), EROFS);
    check_all(*img);
    CHECK_OK(qcow2rs_open_path(path, NULL, &reader));
    check_all(reader);
    /* Two read: neither may write. */
    CHECK_CODE(qcow2rs_reopen(*img, QCOW2RS_OPEN_RDWR), EAGAIN,
               QCOW2RS_E_LOCKED);
    check_all(*img);
    CHECK_OK(qcow2rs_close(&reader));
    CHECK_OK(qcow2rs_reopen(*img, QCOW2RS_OPEN_RDWR | QCOW2RS_OPEN_NO_LOCK));
    CHECK_OK(qcow2rs_open_path(path, NULL, &reader));
    CHECK_OK(qcow2rs_close(&reader));
    check_all(*img);
}

static void check_only(const char *path)
{
    struct qcow2rs_image *img = open_image(path, QCOW2RS_OPEN_CHECK_ONLY);
    struct qcow2rs_info info;
    unsigned char byte;

    CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
    CHECK_EQ(info.virtual_size, SIZE);
    CHECK_ERR(qcow2rs_pread(img, &byte, 1, 0, 0), ENOTSUP);
    CHECK_ERR(qcow2rs_pwrite(img, &byte, 1, 0, 0), ENOTSUP);
    CHECK_OK(qcow2rs_close(&img));
}

int main(void)
{
    char *path = temp_path("image");
    struct qcow2rs_image *img = new_image(path, SIZE);

    vectors(img);
    zeroes(img);
    where_data_is();
    lives(&img, path);
    CHECK_OK(qcow2rs_close(&img));
    CHECK(img == NULL);
    check_only(path);
    img = open_image(path, QCOW2RS_OPEN_RDWR | QCOW2RS_OPEN_WRITETHROUGH);
    check_all(img);
    CHECK_OK(qcow2rs_pwrite(img, "z", 1, 9, 0));
    expected[9] = 'z';
    CHECK_OK(qcow2rs_abandon(&img));
    img = open_image(path, 0);
    check_all(img);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
    return 0;
}
