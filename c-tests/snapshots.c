/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Internal snapshots: each function, and each error that a program can cause. */
#include <limits.h>

#include "disk.h"

#define SIZE (1u << 20)
#define CLUSTER 65536u

static unsigned char buffer[SIZE];

static void write_all(struct qcow2rs_image *img, int value)
{
    memset(buffer, value, SIZE);
    CHECK_OK(qcow2rs_pwrite(img, buffer, SIZE, 0, 0));
}

static void check_all(struct qcow2rs_image *img, int value)
{
    memset(buffer, 0xee, SIZE);
    CHECK_OK(qcow2rs_pread(img, buffer, SIZE, 0, 0));
    for (size_t i = 0; i < SIZE; i++) {
        CHECK_EQ(buffer[i], value);
    }
}

static struct qcow2rs_snapshot_info get(struct qcow2rs_image *img,
                                        uint32_t index)
{
    struct qcow2rs_snapshot_info info;

    memset(&info, 0xee, sizeof(info));
    CHECK_OK(qcow2rs_snapshot_get(img, index, &info, sizeof(info)));
    return info;
}

static int create(struct qcow2rs_image *img, const char *name)
{
    return qcow2rs_snapshot_create(img, name, NULL, 0, NULL, 0);
}

/* ------------------------------------------------------------ a life of them */
static void lives(void)
{
    char *path = temp_path("lives");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_snapshot_info info, meta;
    char id[8];

    CHECK_EQ(qcow2rs_snapshot_count(img), 0);
    write_all(img, 1);
    memset(id, 'x', sizeof(id));
    CHECK_OK(qcow2rs_snapshot_create(img, "one", NULL, 0, id, sizeof(id)));
    CHECK(strcmp(id, "1") == 0);
    write_all(img, 2);

    memset(&meta, 0, sizeof(meta));
    strcpy(meta.name, "not used");
    meta.date_sec = 1700000000;
    meta.date_nsec = 999999999;
    meta.vm_clock_nsec = 77;
    meta.icount = UINT64_MAX;
    CHECK_OK(qcow2rs_snapshot_create(img, "two", &meta, sizeof(meta), id, 2));
    CHECK(strcmp(id, "2") == 0);
    CHECK_EQ(qcow2rs_snapshot_count(img), 2);
    info = get(img, 1);
    CHECK(strcmp(info.id, "2") == 0 && strcmp(info.name, "two") == 0);
    CHECK_EQ(info.virtual_size, SIZE);
    CHECK_EQ(info.vm_state_size, 0);
    CHECK_EQ(info.date_sec, 1700000000);
    CHECK_EQ(info.date_nsec, 999999999);
    CHECK_EQ(info.vm_clock_nsec, 77);
    CHECK(info.icount == UINT64_MAX && info.reserved == 0);
    info = get(img, 0);
    CHECK(strcmp(info.name, "one") == 0 && info.date_sec > 1700000000);

    write_all(img, 3);
    CHECK_OK(qcow2rs_snapshot_apply(img, "one"));
    check_all(img, 1);
    CHECK_OK(qcow2rs_snapshot_apply(img, "2"));
    check_all(img, 2);
    CHECK_OK(qcow2rs_snapshot_rename(img, "2", "second"));
    CHECK(strcmp(get(img, 1).name, "second") == 0);
    CHECK_OK(qcow2rs_snapshot_delete(img, "1"));
    CHECK_EQ(qcow2rs_snapshot_count(img), 1);
    CHECK_OK(qcow2rs_close(&img));

    img = open_image(path, 0);
    CHECK_EQ(qcow2rs_snapshot_count(img), 1);
    CHECK(strcmp(get(img, 0).name, "second") == 0);
    check_all(img, 2);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* -------------------------------------------------------------------- errors */
static void errors(void)
{
    char *path = temp_path("errors");
    struct qcow2rs_image *img = new_image(path, SIZE), *out;
    struct qcow2rs_snapshot_info info;
    char name[300], id[2];

    CHECK_OK(create(img, "one"));
    CHECK_ERR(create(img, "one"), EEXIST);
    CHECK_ERR(create(img, ""), EINVAL);
    CHECK_ERR(create(img, NULL), EINVAL);
    memset(name, 'n', sizeof(name));
    name[256] = '\0';
    CHECK_ERR(create(img, name), EINVAL);
    name[255] = '\0';
    CHECK_OK(create(img, name));
    CHECK_EQ(strlen(get(img, 1).name), 255);
    CHECK_OK(qcow2rs_snapshot_delete(img, name));
    CHECK_ERR(qcow2rs_snapshot_create(img, "two", NULL, 0, id, 1), ERANGE);
    CHECK_ERR(qcow2rs_snapshot_create(img, "two", NULL, 0, id, 0), ERANGE);
    CHECK_EQ(qcow2rs_snapshot_count(img), 1);

    memset(&info, 0, sizeof(info));
    info.date_sec = -1;
    CHECK_ERR(qcow2rs_snapshot_create(img, "two", &info, sizeof(info), NULL, 0),
              EINVAL);
    info.date_sec = INT64_C(1) << 32;
    CHECK_ERR(qcow2rs_snapshot_create(img, "two", &info, sizeof(info), NULL, 0),
              EINVAL);
    info.date_sec = 0;
    info.date_nsec = 1000000000;
    CHECK_ERR(qcow2rs_snapshot_create(img, "two", &info, sizeof(info), NULL, 0),
              EINVAL);
    CHECK_ERR(qcow2rs_snapshot_create(img, "two", &info, 1, NULL, 0), EINVAL);

    CHECK_ERR(qcow2rs_snapshot_get(img, 1, &info, sizeof(info)), ENOENT);
    CHECK_ERR(qcow2rs_snapshot_get(img, 0, &info, 8), EINVAL);
    CHECK_ERR(qcow2rs_snapshot_get(img, 0, NULL, sizeof(info)), EINVAL);
    CHECK_ERR(qcow2rs_snapshot_apply(img, "none"), ENOENT);
    CHECK_ERR(qcow2rs_snapshot_delete(img, "none"), ENOENT);
    CHECK_ERR(qcow2rs_snapshot_rename(img, "none", "two"), ENOENT);
    CHECK_OK(create(img, "two"));
    CHECK_ERR(qcow2rs_snapshot_rename(img, "one", "two"), EEXIST);
    CHECK_ERR(qcow2rs_snapshot_rename(img, "one", ""), EINVAL);
    CHECK_ERR(qcow2rs_snapshot_open(img, "none", &out), ENOENT);
    CHECK(out == NULL);
    CHECK_ERR(qcow2rs_snapshot_open(img, "one", NULL), EINVAL);
    CHECK_ERR(qcow2rs_snapshot_count(NULL), EINVAL);
    CHECK_OK(qcow2rs_close(&img));

    img = open_image(path, 0);
    CHECK_ERR(create(img, "three"), EROFS);
    CHECK_ERR(qcow2rs_snapshot_apply(img, "one"), EROFS);
    CHECK_ERR(qcow2rs_snapshot_delete(img, "one"), EROFS);
    CHECK_ERR(qcow2rs_snapshot_rename(img, "one", "three"), EROFS);
    CHECK_ERR(qcow2rs_vmstate_pwrite(img, "x", 1, 0), EROFS);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

static void raw_images_have_none(void)
{
    char *path = temp_path("raw");
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_snapshot_info info;
    struct qcow2rs_image *img, *out;
    FILE *file = fopen(path, "w");

    CHECK(file != NULL && fwrite(buffer, 1, 4096, file) == 4096);
    CHECK_EQ(fclose(file), 0);
    CHECK_OK(qcow2rs_open_opts_set_format(opts, QCOW2RS_FORMAT_RAW));
    CHECK_OK(qcow2rs_open_path(path, opts, &img));
    qcow2rs_open_opts_free(&opts);
    CHECK_ERR(qcow2rs_snapshot_count(img), ENOTSUP);
    CHECK_ERR(qcow2rs_snapshot_get(img, 0, &info, sizeof(info)), ENOTSUP);
    CHECK_ERR(create(img, "one"), ENOTSUP);
    CHECK_ERR(qcow2rs_snapshot_apply(img, "one"), ENOTSUP);
    CHECK_ERR(qcow2rs_snapshot_delete(img, "one"), ENOTSUP);
    CHECK_ERR(qcow2rs_snapshot_rename(img, "one", "two"), ENOTSUP);
    CHECK_ERR(qcow2rs_snapshot_open(img, "one", &out), ENOTSUP);
    CHECK_ERR(qcow2rs_vmstate_pread(img, buffer, 1, 0), ENOTSUP);
    CHECK_ERR(qcow2rs_vmstate_pwrite(img, buffer, 1, 0), ENOTSUP);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* -------------------------------------------------------- open beside the image */
static void beside(void)
{
    char *path = temp_path("beside");
    struct qcow2rs_image *img = new_image(path, SIZE), *snapshot;
    struct qcow2rs_check_result result;

    write_all(img, 1);
    CHECK_OK(create(img, "one"));
    CHECK_OK(qcow2rs_snapshot_open(img, "one", &snapshot));
    write_all(img, 2);
    check_all(snapshot, 1);
    CHECK_ERR(qcow2rs_snapshot_delete(img, "one"), EBUSY);
    CHECK_ERR(qcow2rs_pwrite(snapshot, buffer, 1, 0, 0), EROFS);
    CHECK_ERR(qcow2rs_invalidate(snapshot), ENOTSUP);
    CHECK_ERR(qcow2rs_reopen(snapshot, QCOW2RS_OPEN_RDWR), ENOTSUP);
    CHECK_ERR(qcow2rs_check(snapshot, 0, &result, sizeof(result), NULL, NULL,
                            NULL), ENOTSUP);
    CHECK_EQ(qcow2rs_snapshot_count(snapshot), 0);
    CHECK_ERR(create(snapshot, "two"), ENOTSUP);
    CHECK_OK(qcow2rs_close(&snapshot));
    CHECK_OK(qcow2rs_snapshot_open(img, "1", &snapshot));
    CHECK_OK(qcow2rs_close(&img));
    check_all(snapshot, 1);
    CHECK_OK(qcow2rs_close(&snapshot));

    img = open_image(path, QCOW2RS_OPEN_RDWR);
    CHECK_OK(qcow2rs_snapshot_delete(img, "one"));
    check_all(img, 2);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* ------------------------------------------------------------------- VM state */
static void vm_state(void)
{
    char *path = temp_path("state");
    struct qcow2rs_image *img = new_image(path, SIZE), *snapshot;
    struct qcow2rs_snapshot_info meta;

    memset(buffer, 0xee, SIZE);
    CHECK_OK(qcow2rs_vmstate_pread(img, buffer, 100, 0));
    CHECK(buffer[0] == 0 && buffer[99] == 0 && buffer[100] == 0xee);
    memset(buffer, 5, SIZE);
    CHECK_OK(qcow2rs_vmstate_pwrite(img, buffer, SIZE, 12345));
    CHECK_OK(qcow2rs_vmstate_pwrite(img, buffer, 0, 0));
    CHECK_ERR(qcow2rs_vmstate_pwrite(img, buffer, 1, UINT64_C(1) << 62), EFBIG);
    CHECK_ERR(qcow2rs_vmstate_pread(img, buffer, 1, UINT64_C(1) << 62), EINVAL);
    CHECK_ERR(qcow2rs_vmstate_pwrite(img, NULL, 1, 0), EINVAL);
    check_all(img, 0);
    memset(&meta, 0, sizeof(meta));
    meta.vm_state_size = 12345 + SIZE;
    CHECK_OK(qcow2rs_snapshot_create(img, "s", &meta, sizeof(meta), NULL, 0));
    CHECK_EQ(get(img, 0).vm_state_size, 12345 + SIZE);
    CHECK_OK(qcow2rs_vmstate_pread(img, buffer, 2, 12345));
    CHECK(buffer[0] == 0 && buffer[1] == 0);
    CHECK_OK(qcow2rs_snapshot_open(img, "s", &snapshot));
    CHECK_OK(qcow2rs_vmstate_pread(snapshot, buffer, 2, 12344));
    CHECK(buffer[0] == 0 && buffer[1] == 5);
    CHECK_ERR(qcow2rs_vmstate_pwrite(snapshot, buffer, 2, 0), EROFS);
    CHECK_OK(qcow2rs_close(&snapshot));
    CHECK_OK(qcow2rs_snapshot_apply(img, "s"));
    CHECK_OK(qcow2rs_vmstate_pread(img, buffer, 2, 12344));
    CHECK(buffer[0] == 0 && buffer[1] == 5);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* -------------------------------------------------------------- requests ahead */
static void in_flight(void)
{
    char *path = temp_path("flight");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_completion completion;
    struct qcow2rs_queue *queue;

    CHECK_OK(create(img, "one"));
    CHECK_OK(qcow2rs_queue_create(img, NULL, &queue));
    CHECK_OK(qcow2rs_queue_pread(queue, buffer, 512, 0, 0, NULL));
    CHECK_ERR(create(img, "two"), EBUSY);
    CHECK_ERR(qcow2rs_snapshot_apply(img, "one"), EBUSY);
    CHECK_ERR(qcow2rs_snapshot_delete(img, "one"), EBUSY);
    CHECK_ERR(qcow2rs_snapshot_rename(img, "one", "two"), EBUSY);
    CHECK_EQ(qcow2rs_snapshot_count(img), 1);
    CHECK_EQ(qcow2rs_queue_wait(queue, &completion, 1, 1, -1), 1);
    CHECK(completion.ret >= 0);
    CHECK_OK(create(img, "two"));
    /* The queue goes on with the image as it is now. */
    CHECK_OK(qcow2rs_queue_pread(queue, buffer, 512, 0, 0, NULL));
    CHECK_EQ(qcow2rs_queue_wait(queue, &completion, 1, 1, -1), 1);
    CHECK(completion.ret >= 0);
    qcow2rs_queue_destroy(&queue);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

int main(void)
{
    lives();
    errors();
    raw_images_have_none();
    beside();
    vm_state();
    in_flight();
    return 0;
}
