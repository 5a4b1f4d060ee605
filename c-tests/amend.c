/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Changing images in place, and each error that a program can cause by it. */
#include "disk.h"

#define SIZE (1u << 20)
#define CLUSTER 65536u

static unsigned char buffer[SIZE];

/* Options of which nothing but these is set; NULL ends them. */
static struct qcow2rs_create_opts *only(const char *name, const char *value,
                                        const char *name2, const char *value2)
{
    struct qcow2rs_create_opts *opts;

    CHECK_OK(qcow2rs_create_opts_new(&opts));
    if (name != NULL) {
        CHECK_OK(qcow2rs_create_opts_set(opts, name, value));
    }
    if (name2 != NULL) {
        CHECK_OK(qcow2rs_create_opts_set(opts, name2, value2));
    }
    return opts;
}

static int amend(struct qcow2rs_image *img, const char *name,
                 const char *value, const char *name2, const char *value2)
{
    struct qcow2rs_create_opts *opts = only(name, value, name2, value2);
    int ret = qcow2rs_amend(img, opts, NULL, NULL);

    qcow2rs_create_opts_free(&opts);
    return ret;
}

static void check_is(struct qcow2rs_image *img, uint32_t compat,
                     uint32_t refcount_bits)
{
    struct qcow2rs_info info;

    CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
    CHECK_EQ(info.compat, compat);
    CHECK_EQ(info.refcount_bits, refcount_bits);
    memset(buffer, 0xee, CLUSTER);
    CHECK_OK(qcow2rs_pread(img, buffer, CLUSTER, 0, 0));
    for (size_t i = 0; i < CLUSTER; i++) {
        CHECK_EQ(buffer[i], 5);
    }
}

static struct qcow2rs_image *written(const char *path)
{
    struct qcow2rs_image *img = new_image(path, SIZE);

    memset(buffer, 5, CLUSTER);
    CHECK_OK(qcow2rs_pwrite(img, buffer, CLUSTER, 0, 0));
    return img;
}

/* ------------------------------------------------------------------- changes */
static void changes(void)
{
    char *path = temp_path("changes");
    struct qcow2rs_image *img = written(path);

    CHECK_OK(amend(img, NULL, NULL, NULL, NULL));
    check_is(img, 3, 16);
    CHECK_OK(amend(img, "refcount_bits", "64", "lazy_refcounts", "on"));
    check_is(img, 3, 64);
    CHECK_OK(amend(img, "compat", "0.10", "refcount_bits", "16"));
    check_is(img, 2, 16);
    /* What is not named stays. */
    CHECK_OK(amend(img, "compat", "1.1", NULL, NULL));
    check_is(img, 3, 16);
    CHECK_OK(qcow2rs_pwrite(img, buffer, CLUSTER, CLUSTER, 0));
    CHECK_OK(qcow2rs_close(&img));
    img = open_image(path, 0);
    check_is(img, 3, 16);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* ------------------------------------------------------------------ progress */
struct told {
    int steps, stop_at;
    uint64_t done;
};

static int progress(void *opaque, uint64_t done, uint64_t total)
{
    struct told *told = opaque;

    CHECK(done >= told->done && done <= total);
    told->done = done;
    told->steps++;
    /* Allowed here. */
    CHECK(qcow2rs_version_number() != 0);
    return told->steps == told->stop_at ? -1 : 0;
}

static void tells_progress(void)
{
    char *path = temp_path("progress");
    struct qcow2rs_image *img = written(path);
    struct qcow2rs_create_opts *opts = only("refcount_bits", "8", NULL, NULL);
    struct told told = {0, 1, 0};

    CHECK_ERR(qcow2rs_amend(img, opts, progress, &told), ECANCELED);
    CHECK_EQ(told.steps, 1);
    check_is(img, 3, 16);
    told = (struct told){0, 0, 0};
    CHECK_OK(qcow2rs_amend(img, opts, progress, &told));
    CHECK(told.steps > 1);
    check_is(img, 3, 8);
    qcow2rs_create_opts_free(&opts);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* -------------------------------------------------------------------- errors */
static void errors(void)
{
    char *path = temp_path("errors");
    struct qcow2rs_image *img = written(path);
    struct qcow2rs_create_opts *opts = only("refcount_bits", "64", NULL, NULL);
    struct qcow2rs_queue *queue;
    struct qcow2rs_completion completion;

    CHECK_ERR(qcow2rs_amend(NULL, opts, NULL, NULL), EINVAL);
    CHECK_ERR(qcow2rs_amend(img, NULL, NULL, NULL), EINVAL);
    CHECK_ERR(amend(img, "cluster_size", "4k", NULL, NULL), ENOTSUP);
    CHECK_ERR(amend(img, "extended_l2", "on", NULL, NULL), ENOTSUP);
    CHECK_ERR(amend(img, "compression_type", "zstd", NULL, NULL), ENOTSUP);
    CHECK_ERR(amend(img, "size", "2M", NULL, NULL), ENOTSUP);
    CHECK_ERR(amend(img, "compat", "0.10", "refcount_bits", "8"), EINVAL);
    CHECK_ERR(amend(img, "compat", "0.10", "lazy_refcounts", "on"), EINVAL);
    CHECK_OK(amend(img, "size", "1M", NULL, NULL));

    CHECK_OK(qcow2rs_queue_create(img, NULL, &queue));
    CHECK_OK(qcow2rs_queue_pread(queue, buffer, 512, 0, 0, NULL));
    CHECK_ERR(qcow2rs_amend(img, opts, NULL, NULL), EBUSY);
    CHECK_EQ(qcow2rs_queue_wait(queue, &completion, 1, 1, -1), 1);
    CHECK_OK(qcow2rs_amend(img, opts, NULL, NULL));
    /* The queue goes on. */
    CHECK_OK(qcow2rs_queue_pread(queue, buffer, 512, 0, 0, NULL));
    CHECK_EQ(qcow2rs_queue_wait(queue, &completion, 1, 1, -1), 1);
    CHECK_EQ(completion.ret, 0);
    qcow2rs_queue_destroy(&queue);
    check_is(img, 3, 64);
    CHECK_OK(qcow2rs_close(&img));

    img = open_image(path, 0);
    CHECK_ERR(amend(img, "refcount_bits", "16", NULL, NULL), EROFS);
    /* Nothing to change, and nobody to change it. */
    CHECK_ERR(qcow2rs_amend(img, opts, NULL, NULL), EROFS);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_create_opts_free(&opts);
    free(path);
}

int main(void)
{
    changes();
    tells_progress();
    errors();
    return 0;
}
