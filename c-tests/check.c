/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Checking images that are sound, damaged, marked, busy or not there. */
#include <limits.h>

#include "disk.h"

#define SIZE (1u << 20)
#define CLUSTER 65536u
/* Where a new image of this size has what. */
#define REFTABLE (1 * CLUSTER)
#define REFBLOCK (2 * CLUSTER)
#define L1_TABLE (3 * CLUSTER)

static struct memory disk;

static void put64(size_t at, uint64_t value)
{
    memory_put(&disk, at, value, 8);
}

static uint64_t get64(size_t at)
{
    return memory_get64(&disk, at);
}

static void set_refcount(size_t cluster, unsigned value)
{
    memory_put(&disk, REFBLOCK + 2 * cluster, value, 2);
}

/* Where the L2 table, or the first host cluster that it names, is. */
static size_t l2_table(void)
{
    return get64(L1_TABLE) & UINT64_C(0xfffffffffffe00);
}

static size_t first_data(void)
{
    return get64(l2_table()) & UINT64_C(0xfffffffffffe00);
}

/* ------------------------------------------------------- what the check tells */
struct told {
    int warnings, errors, steps;
    int stop_at;           /* the step that cancels; 0: none */
    uint64_t host_offset;  /* of the last finding */
    uint64_t done;
};

static void finding(void *opaque, uint32_t severity, uint64_t host_offset,
                    const char *message)
{
    struct told *told = opaque;

    CHECK(severity == QCOW2RS_LOG_WARN || severity == QCOW2RS_LOG_ERROR);
    told->warnings += severity == QCOW2RS_LOG_WARN;
    told->errors += severity == QCOW2RS_LOG_ERROR;
    told->host_offset = host_offset;
    CHECK(message[0] != '\0' && strchr(message, '\n') == NULL);
    /* Allowed here. */
    CHECK(qcow2rs_version_number() != 0);
}

static int progress(void *opaque, uint64_t done, uint64_t total)
{
    struct told *told = opaque;

    CHECK(done > told->done && done <= total);
    told->done = done;
    told->steps++;
    return told->steps == told->stop_at ? INT_MIN : 0;
}

static int check(struct qcow2rs_image *img, struct qcow2rs_check_result *result,
                 struct told *told)
{
    memset(told, 0, sizeof(*told));
    memset(result, 0xee, sizeof(*result));
    return qcow2rs_check(img, 0, result, sizeof(*result), finding, progress,
                         told);
}

static struct qcow2rs_image *open_disk(uint32_t flags)
{
    struct qcow2rs_open_opts *opts = new_open_opts(flags);
    struct qcow2rs_storage *storage = memory_storage(&disk, 0);
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    qcow2rs_open_opts_free(&opts);
    return img;
}

/* Checks the disk as it is. */
static void check_disk(struct qcow2rs_check_result *result, struct told *told)
{
    struct qcow2rs_image *img = open_disk(QCOW2RS_OPEN_CHECK_ONLY);

    CHECK_EQ(check(img, result, told), 0);
    CHECK_OK(qcow2rs_close(&img));
}

static void write_cluster(struct qcow2rs_image *img, unsigned number)
{
    static unsigned char data[CLUSTER];

    fill(data, sizeof(data), number);
    CHECK_OK(qcow2rs_pwrite(img, data, sizeof(data),
                            (uint64_t)number * CLUSTER, 0));
}

/* -------------------------------------------------------------------- results */
static void sound(struct qcow2rs_image *img)
{
    struct qcow2rs_check_result result;
    struct told told;

    /* An image in use, with nothing flushed. */
    write_cluster(img, 0);
    write_cluster(img, 5);
    write_cluster(img, 1);
    CHECK_EQ(check(img, &result, &told), 0);
    CHECK_EQ(result.corruptions, 0);
    CHECK_EQ(result.leaks, 0);
    CHECK_EQ(result.check_errors, 0);
    CHECK_EQ(result.corruptions_fixed, 0);
    CHECK_EQ(result.leaks_fixed, 0);
    CHECK_EQ(result.total_clusters, SIZE / CLUSTER);
    CHECK_EQ(result.allocated_clusters, 3);
    /* 1 does not follow 0, nor 5 follow 1. */
    CHECK_EQ(result.fragmented_clusters, 2);
    CHECK_EQ(result.compressed_clusters, 0);
    /* Header, two tables, a block; the L2 table, three of data. */
    CHECK_EQ(result.image_end_offset, 8 * CLUSTER);
    CHECK_EQ(told.warnings + told.errors, 0);
    CHECK(told.steps > 0);
    /* It goes on, and nobody has to listen. */
    write_cluster(img, 6);
    CHECK_OK(qcow2rs_check(img, 0, &result, sizeof(result), NULL, NULL, NULL));
    CHECK_EQ(result.allocated_clusters, 4);
}

static void damaged(void)
{
    size_t data = first_data(), table = l2_table();
    struct qcow2rs_check_result result;
    uint64_t entry = get64(table);
    uint64_t length = disk.length;
    struct told told;

    /* Counted, not used; behind the end of the file that is nobody's loss. */
    set_refcount(40, 1);
    check_disk(&result, &told);
    CHECK_EQ(result.leaks, 0);
    disk.length = 41 * CLUSTER;
    check_disk(&result, &told);
    CHECK_EQ(result.leaks, 1);
    CHECK_EQ(result.corruptions, 0);
    CHECK(told.warnings == 1 && told.errors == 0);
    CHECK_EQ(told.host_offset, 40 * CLUSTER);
    CHECK_EQ(result.image_end_offset, 41 * CLUSTER);
    set_refcount(40, 0);
    disk.length = length;

    /* Used, not counted; and its flag says that it is counted once. */
    set_refcount(data / CLUSTER, 0);
    check_disk(&result, &told);
    CHECK_EQ(result.corruptions, 2);
    CHECK_EQ(result.leaks, 0);
    CHECK(told.warnings == 0 && told.errors == 2);
    set_refcount(data / CLUSTER, 1);

    /* A compressed cluster of one sector. */
    put64(table, UINT64_C(1) << 62 | data);
    check_disk(&result, &told);
    CHECK_EQ(result.compressed_clusters, 1);
    CHECK_EQ(result.corruptions + result.leaks + result.check_errors, 0);
    put64(table, entry);

    /* Refcounts that nobody can find. */
    put64(REFTABLE, REFBLOCK + 512);
    check_disk(&result, &told);
    CHECK(result.check_errors > 0 && result.corruptions > 0);
    CHECK_EQ(told.warnings, 0);
    put64(REFTABLE, REFBLOCK);

    check_disk(&result, &told);
    CHECK_EQ(result.corruptions + result.leaks + result.check_errors, 0);
}

/* ------------------------------------------------------------------- failures */
static void refused(void)
{
    struct qcow2rs_image *img = open_disk(QCOW2RS_OPEN_CHECK_ONLY);
    struct qcow2rs_check_result result;
    struct told told = {0};
    struct {
        struct qcow2rs_check_result result;
        unsigned char more[8];
    } longer;

    CHECK_ERR(check(NULL, &result, &told), EINVAL);
    CHECK_ERR(qcow2rs_check(img, 4, &result, sizeof(result), NULL, NULL, NULL),
              EINVAL);
    CHECK_ERR(qcow2rs_check(img, 1u << 31, &result, sizeof(result), NULL, NULL,
                            NULL), EINVAL);
    CHECK_ERR(qcow2rs_check(img, 0, NULL, sizeof(result), NULL, NULL, NULL),
              EINVAL);
    CHECK_ERR(qcow2rs_check(img, 0, &result, 0, NULL, NULL, NULL), EINVAL);
    CHECK_ERR(qcow2rs_check(img, 0, &result, sizeof(result) - 1, NULL, NULL,
                            NULL), EINVAL);
    CHECK_ERR(qcow2rs_check(img, 0, &result, SIZE_MAX, NULL, NULL, NULL),
              EINVAL);

    /* A program that knows more members than the library. */
    memset(&longer, 0xee, sizeof(longer));
    CHECK_OK(qcow2rs_check(img, 0, &longer.result, sizeof(longer), NULL, NULL,
                           NULL));
    CHECK_EQ(longer.result.total_clusters, SIZE / CLUSTER);
    CHECK(all_zero(longer.more, sizeof(longer.more)));

    /* Cancelled: nothing is written. */
    memset(&result, 0xee, sizeof(result));
    told.stop_at = 2;
    CHECK_ERR(qcow2rs_check(img, 0, &result, sizeof(result), finding, progress,
                            &told), ECANCELED);
    CHECK_EQ(told.steps, 2);
    CHECK_EQ(result.total_clusters, UINT64_C(0xeeeeeeeeeeeeeeee));

    /* A storage that fails. */
    disk.fail_reads = EIO;
    CHECK_ERR(check(img, &result, &told), EIO);
    CHECK(told.errors > 0);
    CHECK_EQ(result.total_clusters, UINT64_C(0xeeeeeeeeeeeeeeee));
    disk.fail_reads = 0;
    CHECK_OK(check(img, &result, &told));

    CHECK_OK(qcow2rs_close(&img));
    CHECK(img == NULL);
    CHECK_ERR(check(img, &result, &told), EINVAL);
}

static void repair(uint32_t open_flags, int errno_value)
{
    struct qcow2rs_image *img = open_disk(open_flags);
    struct qcow2rs_check_result result;
    uint32_t flags;

    for (flags = 1; flags <= 3; flags++) {
        CHECK_ERR(qcow2rs_check(img, flags, &result, sizeof(result), NULL, NULL,
                                NULL), errno_value);
    }
    CHECK_OK(qcow2rs_check(img, 0, &result, sizeof(result), NULL, NULL, NULL));
    CHECK_OK(qcow2rs_close(&img));
}

/* An image may be marked, and so may what it is checked for. */
static void marked(void)
{
    uint32_t check_only[] = {QCOW2RS_OPEN_CHECK_ONLY,
                             QCOW2RS_OPEN_CHECK_ONLY | QCOW2RS_OPEN_RDWR};
    struct qcow2rs_check_result result;
    struct qcow2rs_info info;
    unsigned char byte;
    struct told told;
    uint64_t bits;
    int i;

    for (bits = 1; bits <= 3; bits++) {
        put64(72, bits);
        for (i = 0; i < 2; i++) {
            struct qcow2rs_image *img = open_disk(check_only[i]);

            CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
            CHECK_EQ(!!(info.flags & QCOW2RS_INFO_DIRTY), bits & 1);
            CHECK_EQ(!!(info.flags & QCOW2RS_INFO_CORRUPT), bits >> 1);
            CHECK_EQ(check(img, &result, &told), 0);
            CHECK_EQ(result.corruptions + result.leaks, 0);
            CHECK_ERR(qcow2rs_pread(img, &byte, 1, 0, 0), ENOTSUP);
            CHECK_ERR(qcow2rs_pwrite(img, &byte, 1, 0, 0), ENOTSUP);
            CHECK_OK(qcow2rs_close(&img));
        }
        CHECK_EQ(get64(72), bits);
    }
    put64(72, 0);
}

static void too_little_memory(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_CHECK_ONLY);
    struct qcow2rs_storage *storage = memory_storage(&disk, 0);
    struct qcow2rs_check_result result;
    struct qcow2rs_image *img;
    struct told told;

    /* Enough for the caches, not for the refcount table as well. */
    CHECK_OK(qcow2rs_open_opts_set(opts, "max-metadata-size", "64k"));
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    CHECK_CODE(check(img, &result, &told), EFBIG, QCOW2RS_E_LIMIT);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&opts);
}

static void raw(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(0);
    struct qcow2rs_storage *storage = memory_storage(&disk, 0);
    struct qcow2rs_check_result result;
    struct qcow2rs_image *img;
    struct told told;

    CHECK_OK(qcow2rs_open_opts_set_format(opts, QCOW2RS_FORMAT_RAW));
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    CHECK_ERR(check(img, &result, &told), ENOTSUP);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&opts);
}

int main(void)
{
    struct qcow2rs_image *img;

    memory_init(&disk);
    img = memory_image(&disk, SIZE, 0);
    sound(img);
    CHECK_OK(qcow2rs_close(&img));
    damaged();
    refused();
    repair(0, EROFS);
    repair(QCOW2RS_OPEN_CHECK_ONLY, EROFS);
    repair(QCOW2RS_OPEN_RDWR, ENOTSUP);
    repair(QCOW2RS_OPEN_RDWR | QCOW2RS_OPEN_CHECK_ONLY, ENOTSUP);
    marked();
    too_little_memory();
    raw();
    memory_destroy(&disk);
    return 0;
}
