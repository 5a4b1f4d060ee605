/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Persistent bitmaps: each function, and each error that it can cause. */
#include "disk.h"

#define SIZE (1u << 20)

static unsigned char buffer[SIZE];

static void check_dirty(struct qcow2rs_image *img, const char *name,
                        uint64_t offset, uint64_t length)
{
    struct qcow2rs_extent extents[4];
    int count = qcow2rs_bitmap_status(img, name, 0, SIZE, extents, 4);
    int index = offset > 0;

    CHECK_EQ(count, 1 + (offset > 0 && length > 0) +
             (length > 0 && offset + length < SIZE));
    if (length > 0) {
        CHECK_EQ(extents[index].offset, offset);
        CHECK_EQ(extents[index].length, length);
        CHECK_EQ(extents[index].flags & QCOW2RS_BLOCK_DATA, QCOW2RS_BLOCK_DATA);
        CHECK_EQ(extents[0].flags & QCOW2RS_BLOCK_DATA, offset == 0);
    } else {
        CHECK_EQ(extents[0].flags, QCOW2RS_BLOCK_EOF);
    }
    CHECK_EQ(extents[count - 1].flags & QCOW2RS_BLOCK_EOF, QCOW2RS_BLOCK_EOF);
    CHECK_EQ(extents[0].reserved, 0);
    CHECK_EQ(extents[0].host_offset, 0);
}

/* ------------------------------------------------------------- each function */
static void functions(void)
{
    char *path = temp_path("functions");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_bitmap_info info;

    CHECK_EQ(qcow2rs_bitmap_count(img), 0);
    CHECK_OK(qcow2rs_bitmap_add(img, "a", 0, QCOW2RS_BITMAP_AUTO));
    CHECK_OK(qcow2rs_bitmap_add(img, "b", 512, 0));
    CHECK_EQ(qcow2rs_bitmap_count(img), 2);
    CHECK_OK(qcow2rs_pwrite(img, buffer, 512, 70000, 0));
    CHECK_OK(qcow2rs_pwrite(img, buffer, 512, 0, QCOW2RS_IO_UNCHANGED));
    CHECK_OK(qcow2rs_bitmap_get(img, 0, &info, sizeof(info)));
    CHECK(strcmp(info.name, "a") == 0);
    CHECK_EQ(info.granularity, 65536);
    CHECK_EQ(info.dirty_bytes, 65536);
    CHECK_EQ(info.flags, QCOW2RS_BITMAP_AUTO);
    CHECK_OK(qcow2rs_bitmap_get(img, 1, &info, sizeof(info)));
    CHECK_EQ(info.granularity, 512);
    CHECK_EQ(info.dirty_bytes, 0);
    CHECK_EQ(info.flags, 0);
    check_dirty(img, "a", 65536, 65536);
    check_dirty(img, "b", 0, 0);
    CHECK_OK(qcow2rs_bitmap_set_enabled(img, "b", true));
    CHECK_OK(qcow2rs_bitmap_set_enabled(img, "a", false));
    CHECK_OK(qcow2rs_discard(img, SIZE - 4096, 4096, 0));
    check_dirty(img, "a", 65536, 65536);
    check_dirty(img, "b", SIZE - 4096, 4096);
    CHECK_OK(qcow2rs_bitmap_clear(img, "b"));
    CHECK_OK(qcow2rs_bitmap_merge(img, "b", "a"));
    check_dirty(img, "b", 65536, 65536);
    CHECK_OK(qcow2rs_close(&img));

    /* What was stored; and what a handle that goes away does not store. */
    img = open_image(path, 0);
    check_dirty(img, "b", 65536, 65536);
    CHECK_ERR(qcow2rs_bitmap_clear(img, "b"), EROFS);
    CHECK_OK(qcow2rs_close(&img));
    img = open_image(path, 1);
    CHECK_OK(qcow2rs_bitmap_remove(img, "a"));
    CHECK_EQ(qcow2rs_bitmap_count(img), 1);
    CHECK_OK(qcow2rs_abandon(&img));
    img = open_image(path, 1);
    CHECK_EQ(qcow2rs_bitmap_count(img), 1);
    CHECK_OK(qcow2rs_bitmap_get(img, 0, &info, sizeof(info)));
    CHECK_EQ(info.flags, QCOW2RS_BITMAP_IN_USE | QCOW2RS_BITMAP_AUTO);
    CHECK_EQ(info.dirty_bytes, 0);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

/* -------------------------------------------------------------------- errors */
static void errors(void)
{
    char *path = temp_path("errors");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_bitmap_info info;
    struct qcow2rs_extent extent;
    char name[1025];

    memset(name, 'x', sizeof(name) - 1);
    name[1024] = '\0';
    CHECK_ERR(qcow2rs_bitmap_add(img, name, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_add(img, "", 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_add(img, NULL, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_add(NULL, "a", 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_add(img, "a", 0, QCOW2RS_BITMAP_IN_USE), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_add(img, "a", 256, 0), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_add(img, "a", 1000, 0), EINVAL);
    CHECK_OK(qcow2rs_bitmap_add(img, "a", 1u << 31, QCOW2RS_BITMAP_AUTO));
    CHECK_ERR(qcow2rs_bitmap_add(img, "a", 0, 0), EEXIST);
    name[1023] = '\0';
    CHECK_OK(qcow2rs_bitmap_add(img, name, 0, 0));
    CHECK_OK(qcow2rs_bitmap_get(img, 1, &info, sizeof(info)));
    CHECK(strcmp(info.name, name) == 0);
    CHECK_ERR(qcow2rs_bitmap_get(img, 2, &info, sizeof(info)), ENOENT);
    CHECK_ERR(qcow2rs_bitmap_get(img, 0, NULL, sizeof(info)), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_get(img, 0, &info, 8), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_remove(img, "no"), ENOENT);
    CHECK_ERR(qcow2rs_bitmap_clear(img, "no"), ENOENT);
    CHECK_ERR(qcow2rs_bitmap_set_enabled(img, "no", true), ENOENT);
    CHECK_ERR(qcow2rs_bitmap_merge(img, "a", "no"), ENOENT);
    CHECK_ERR(qcow2rs_bitmap_merge(img, "no", "a"), ENOENT);
    CHECK_ERR(qcow2rs_bitmap_merge(img, "a", NULL), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_status(img, "no", 0, 1, &extent, 1), ENOENT);
    CHECK_ERR(qcow2rs_bitmap_status(img, "a", 1, SIZE, &extent, 1), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_status(img, "a", 0, 1, &extent, 0), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_status(img, "a", 0, 1, NULL, 1), EINVAL);
    CHECK_EQ(qcow2rs_bitmap_status(img, "a", 0, 0, &extent, 1), 0);
    CHECK_OK(qcow2rs_close(&img));

    img = open_image(path, 1);
    CHECK_OK(qcow2rs_abandon(&img));
    img = open_image(path, 1);
    CHECK_ERR(qcow2rs_bitmap_clear(img, "a"), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_set_enabled(img, "a", true), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_merge(img, "a", name), EINVAL);
    CHECK_ERR(qcow2rs_bitmap_status(img, "a", 0, 1, &extent, 1), EINVAL);
    CHECK_OK(qcow2rs_bitmap_remove(img, "a"));
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

int main(void)
{
    functions();
    errors();
    return 0;
}
