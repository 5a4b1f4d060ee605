/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Disks of another size: what the program sees of it, and each error that it
 * can cause. */
#include "disk.h"

#define SIZE (1u << 20)

static unsigned char buffer[4 * SIZE];

static int resize(struct qcow2rs_image *img, uint64_t bytes, uint32_t flags)
{
    return qcow2rs_resize(img, bytes, QCOW2RS_PREALLOC_OFF, flags, NULL, NULL);
}

static void check_size(struct qcow2rs_image *img, uint64_t expected)
{
    CHECK_EQ(qcow2rs_get_size(img), expected);
}

/* ---------------------------------------------------------- longer, shorter */
static void sizes(void)
{
    char *path = temp_path("sizes");
    struct qcow2rs_image *img = new_image(path, SIZE);
    uint32_t mode;

    memset(buffer, 1, SIZE);
    CHECK_OK(qcow2rs_pwrite(img, buffer, SIZE, 0, 0));
    CHECK_OK(resize(img, SIZE, 0));
    CHECK_OK(resize(img, SIZE / 2 + 512, QCOW2RS_RESIZE_SHRINK));
    check_size(img, SIZE / 2 + 512);
    for (mode = QCOW2RS_PREALLOC_OFF; mode <= QCOW2RS_PREALLOC_FULL; mode++) {
        CHECK_OK(qcow2rs_resize(img, 2 * SIZE + mode * 512, mode, 0, NULL, NULL));
    }
    CHECK_OK(qcow2rs_close(&img));

    img = open_image(path, 0);
    check_size(img, 2 * SIZE + 3 * 512);
    memset(buffer, 0xee, sizeof(buffer));
    CHECK_OK(qcow2rs_pread(img, buffer, 2 * SIZE + 3 * 512, 0, 0));
    for (size_t i = 0; i < SIZE / 2 + 512; i++) {
        CHECK_EQ(buffer[i], 1);
    }
    CHECK(all_zero(buffer + SIZE / 2 + 512, 3 * SIZE / 2 + 2 * 512));
    CHECK_ERR(resize(img, 4 * SIZE, 0), EROFS);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* -------------------------------------------------------------------- errors */
static int cancel(void *opaque, uint64_t done, uint64_t total)
{
    int *calls = opaque;

    CHECK(done <= total);
    return ++*calls == 2;
}

static void errors(void)
{
    char *path = temp_path("errors");
    struct qcow2rs_image *img = new_image(path, SIZE);
    int calls = 0;

    CHECK_ERR(resize(NULL, SIZE, 0), EINVAL);
    CHECK_ERR(resize(img, SIZE + 1, 0), EINVAL);
    CHECK_ERR(resize(img, SIZE / 2, 0), EINVAL);
    CHECK_ERR(resize(img, SIZE, 2), EINVAL);
    CHECK_ERR(resize(img, SIZE, 1u << 31), EINVAL);
    CHECK_ERR(qcow2rs_resize(img, 2 * SIZE, 4, 0, NULL, NULL), EINVAL);
    CHECK_ERR(qcow2rs_resize(img, SIZE / 2, QCOW2RS_PREALLOC_FULL,
                             QCOW2RS_RESIZE_SHRINK, NULL, NULL), EINVAL);
    CHECK_ERR(resize(img, UINT64_MAX - 511, 0), EFBIG);
    CHECK_ERR(resize(img, (UINT64_C(2) << 50) + 512, 0), EFBIG);
    CHECK_ERR(qcow2rs_resize(img, 2 * SIZE, QCOW2RS_PREALLOC_FULL, 0, cancel,
                             &calls), ECANCELED);
    CHECK_EQ(calls, 2);
    check_size(img, SIZE);
    CHECK_OK(resize(img, 2 * SIZE, 0));
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

static void snapshots_of_version_2(void)
{
    char *path = temp_path("v2");
    struct qcow2rs_create_opts *opts = new_create_opts(SIZE);
    struct qcow2rs_image *img = NULL;

    CHECK_OK(qcow2rs_create_opts_set(opts, "compat", "0.10"));
    CHECK_OK(qcow2rs_create_path(path, 0, opts, NULL, &img));
    qcow2rs_create_opts_free(&opts);
    CHECK_OK(resize(img, 2 * SIZE, 0));
    CHECK_OK(qcow2rs_snapshot_create(img, "a", NULL, 0, NULL, 0));
    CHECK_ERR(resize(img, 3 * SIZE, 0), ENOTSUP);
    CHECK_ERR(resize(img, SIZE, QCOW2RS_RESIZE_SHRINK), ENOTSUP);
    check_size(img, 2 * SIZE);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* --------------------------------------------------------- beside requests */
static void in_flight(void)
{
    char *path = temp_path("flight");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_completion completion;
    struct qcow2rs_queue *queue = NULL;

    CHECK_OK(qcow2rs_queue_create(img, NULL, &queue));
    CHECK_OK(qcow2rs_queue_pread(queue, buffer, 512, 0, 0, NULL));
    CHECK_ERR(resize(img, 2 * SIZE, 0), EBUSY);
    CHECK_EQ(qcow2rs_queue_wait(queue, &completion, 1, 1, -1), 1);
    CHECK(completion.ret >= 0);
    CHECK_OK(resize(img, 2 * SIZE, 0));
    /* The queue goes on with the disk as it is now. */
    CHECK_OK(qcow2rs_queue_pread(queue, buffer, 512, 2 * SIZE - 512, 0, NULL));
    CHECK_EQ(qcow2rs_queue_wait(queue, &completion, 1, 1, -1), 1);
    CHECK(completion.ret >= 0);
    qcow2rs_queue_destroy(&queue);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* ------------------------------------------------------------ a full storage */
static void full(void)
{
    struct memory m;
    struct qcow2rs_image *img;

    memory_init(&m);
    img = memory_image(&m, SIZE, 0);
    CHECK_ERR(qcow2rs_resize(img, UINT64_C(1) << 33, QCOW2RS_PREALLOC_METADATA,
                             0, NULL, NULL), ENOSPC);
    check_size(img, SIZE);
    CHECK_OK(resize(img, UINT64_C(1) << 40, 0));
    CHECK_OK(qcow2rs_close(&img));
    memory_destroy(&m);
}

int main(void)
{
    sizes();
    errors();
    snapshots_of_version_2();
    in_flight();
    full();
    return 0;
}
