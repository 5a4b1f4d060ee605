/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Wrong arguments: each is refused with the errno value that the header names,
 * says why, and leaves everything as it was. */
#include <limits.h>

#include "disk.h"

#define SIZE (1u << 20)

static void open_options(void)
{
    struct qcow2rs_open_opts *o = (void *)8, *none = NULL;

    CHECK_ERR(qcow2rs_open_opts_new(NULL), EINVAL);
    CHECK_OK(qcow2rs_open_opts_new(&o));

    CHECK_ERR(qcow2rs_open_opts_set_format(NULL, QCOW2RS_FORMAT_RAW), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_format(o, 0), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_format(o, 3), EINVAL);
    CHECK_OK(qcow2rs_open_opts_set_format(o, QCOW2RS_FORMAT_RAW));
    CHECK_OK(qcow2rs_open_opts_set_format(o, QCOW2RS_FORMAT_QCOW2));

    CHECK_ERR(qcow2rs_open_opts_set_flags(NULL, 0), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_flags(o, 1u << 8), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_flags(o, 1u << 31), EINVAL);
    CHECK_OK(qcow2rs_open_opts_set_flags(o, 255));
    CHECK_OK(qcow2rs_open_opts_set_flags(o, 0));

    CHECK_ERR(qcow2rs_open_opts_set(NULL, "cache-size", "1M"), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set(o, NULL, "1M"), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set(o, "cache-size", NULL), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set(o, "cache-size", "much"), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set(o, "cache-size", "\xff"), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set(o, "no such option", "1M"), ENOENT);
    CHECK_ERR(qcow2rs_open_opts_set(o, "encrypt.key-secret", "x"), ENOTSUP);
    CHECK_OK(qcow2rs_open_opts_set(o, "cache-size", "1M"));
    CHECK_OK(qcow2rs_open_opts_set(o, "overlap-check", "none"));

    CHECK_ERR(qcow2rs_open_opts_set_ref_policy(NULL, QCOW2RS_REF_DENY, NULL,
                                               NULL), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_ref_policy(o, 3, NULL, NULL), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_ref_policy(o, QCOW2RS_REF_RESOLVE, NULL,
                                               NULL), EINVAL);
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(o, QCOW2RS_REF_PATHS, NULL, o));

    qcow2rs_open_opts_free(&o);
    CHECK(o == NULL);
    qcow2rs_open_opts_free(&o);
    qcow2rs_open_opts_free(&none);
    qcow2rs_open_opts_free(NULL);
}

static int resolve(void *opaque, const struct qcow2rs_ref *ref,
                   struct qcow2rs_storage **storage, uint32_t *format)
{
    (void)opaque;
    (void)ref;
    (void)storage;
    (void)format;
    return -EPERM;
}

static void policy_and_function(void)
{
    struct qcow2rs_open_opts *o = new_open_opts(0);

    CHECK_ERR(qcow2rs_open_opts_set_ref_policy(o, QCOW2RS_REF_DENY, resolve,
                                               NULL), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_ref_policy(o, QCOW2RS_REF_PATHS, resolve,
                                               NULL), EINVAL);
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(o, QCOW2RS_REF_RESOLVE, resolve,
                                              NULL));
    qcow2rs_open_opts_free(&o);
}

static void create_options(void)
{
    struct qcow2rs_create_opts *o = (void *)8;
    uint64_t required = 1, full = 2;
    char name[1025];

    CHECK_ERR(qcow2rs_create_opts_new(NULL), EINVAL);
    CHECK_OK(qcow2rs_create_opts_new(&o));

    CHECK_ERR(qcow2rs_create_opts_set_size(NULL, SIZE), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_backing(NULL, "base", "raw"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_backing(o, NULL, "raw"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_backing(o, "base", NULL), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_backing(o, "base", "vmdk"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_backing(o, "", "raw"), EINVAL);
    memset(name, 'x', sizeof(name) - 1);
    name[1024] = '\0';
    CHECK_ERR(qcow2rs_create_opts_set_backing(o, name, "raw"), EINVAL);

    CHECK_ERR(qcow2rs_create_opts_set(NULL, "compat", "1.1"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(o, NULL, "1.1"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(o, "compat", NULL), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(o, "compat", "1.2"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(o, "cluster_size", "100k"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(o, "cluster-size", "64k"), ENOENT);
    CHECK_ERR(qcow2rs_create_opts_set(o, "encrypt.key-secret", "x"), ENOTSUP);

    /* Nothing of all this has stayed: there is still no size. */
    CHECK_ERR(qcow2rs_measure(o, &required, &full), EINVAL);
    CHECK_EQ(required, 1);
    CHECK_EQ(full, 2);
    CHECK_OK(qcow2rs_create_opts_set_size(o, SIZE));
    CHECK_ERR(qcow2rs_measure(NULL, &required, &full), EINVAL);
    CHECK_ERR(qcow2rs_measure(o, NULL, &full), EINVAL);
    CHECK_ERR(qcow2rs_measure(o, &required, NULL), EINVAL);
    CHECK_EQ(required, 1);
    CHECK_EQ(full, 2);

    qcow2rs_create_opts_free(&o);
    CHECK(o == NULL);
    qcow2rs_create_opts_free(&o);
    qcow2rs_create_opts_free(NULL);
}

static void opening(void)
{
    struct qcow2rs_image *img = (void *)8, *none = NULL;
    struct qcow2rs_storage *storage = NULL;
    char *path = temp_path("none");

    CHECK_ERR(qcow2rs_open_path(NULL, NULL, &img), EINVAL);
    CHECK(img == NULL);
    img = (void *)8;
    CHECK_ERR(qcow2rs_open_path(path, NULL, &img), ENOENT);
    CHECK(img == NULL);
    CHECK_ERR(qcow2rs_open_path("", NULL, &img), ENOENT);
    CHECK_ERR(qcow2rs_open_path(path, NULL, NULL), EINVAL);
    img = (void *)8;
    CHECK_ERR(qcow2rs_open_fd(-1, NULL, &img), EBADF);
    CHECK(img == NULL);
    CHECK_ERR(qcow2rs_open_fd(1000000, NULL, &img), EBADF);
    CHECK_ERR(qcow2rs_open_fd(0, NULL, NULL), EINVAL);
    img = (void *)8;
    CHECK_ERR(qcow2rs_open(NULL, NULL, &img), EINVAL);
    CHECK(img == NULL);
    CHECK_ERR(qcow2rs_open(&storage, NULL, &img), EINVAL);
    CHECK_ERR(qcow2rs_probe(NULL), EINVAL);

    CHECK_OK(qcow2rs_close(NULL));
    CHECK_OK(qcow2rs_close(&none));
    CHECK_OK(qcow2rs_abandon(NULL));
    CHECK_OK(qcow2rs_abandon(&none));
    CHECK_ERR(qcow2rs_invalidate(NULL), EINVAL);
    CHECK_ERR(qcow2rs_reopen(NULL, 0), EINVAL);
    free(path);
}

static void creating(void)
{
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_storage *storage = NULL;
    struct qcow2rs_image *img = (void *)8;
    char *path = temp_path("not-made");

    CHECK_ERR(qcow2rs_create(NULL, o, NULL, &img), EINVAL);
    CHECK(img == NULL);
    CHECK_ERR(qcow2rs_create(&storage, o, NULL, NULL), EINVAL);
    CHECK_OK(qcow2rs_storage_from_path(path, &storage));
    CHECK_ERR(qcow2rs_create(&storage, NULL, NULL, &img), EINVAL);
    CHECK(storage == NULL);
    img = (void *)8;
    CHECK_ERR(qcow2rs_create_path(NULL, 0, o, NULL, &img), EINVAL);
    CHECK(img == NULL);
    CHECK_ERR(qcow2rs_create_path(path, 0, NULL, NULL, NULL), EINVAL);
    CHECK_ERR(qcow2rs_create_path(path, 2, o, NULL, NULL), EINVAL);
    CHECK_EQ(access(path, F_OK), -1);
    qcow2rs_create_opts_free(&o);
    free(path);
}

/* A NULL image, everywhere. */
static void no_image(void)
{
    unsigned char buf[16];
    struct iovec iov = {buf, sizeof(buf)};
    struct qcow2rs_info info;
    struct qcow2rs_stats stats;
    struct qcow2rs_extent extent;
    char *name;
    size_t length;

    CHECK_ERR(qcow2rs_pread(NULL, buf, 16, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_preadv(NULL, &iov, 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(NULL, buf, 16, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwritev(NULL, &iov, 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_write_zeroes(NULL, 0, 16, 0), EINVAL);
    CHECK_ERR(qcow2rs_discard(NULL, 0, 16, 0), EINVAL);
    CHECK_ERR(qcow2rs_flush(NULL), EINVAL);
    CHECK_ERR(qcow2rs_block_status(NULL, 0, 16, 0, &extent, 1), EINVAL);
    CHECK_ERR(qcow2rs_get_info(NULL, &info, sizeof(info)), EINVAL);
    CHECK_ERR(qcow2rs_get_size(NULL), EINVAL);
    CHECK_ERR(qcow2rs_get_ref(NULL, QCOW2RS_REF_KIND_BACKING, &name, &length,
                              NULL), EINVAL);
    CHECK_ERR(qcow2rs_get_info_json(NULL, &name), EINVAL);
    CHECK_ERR(qcow2rs_get_stats(NULL, &stats, sizeof(stats)), EINVAL);
}

/* An object of another kind where an image should be. */
static void no_image_either(void)
{
    struct qcow2rs_open_opts *o = new_open_opts(0);

    CHECK_ERR(qcow2rs_flush((struct qcow2rs_image *)(void *)o), EINVAL);
    qcow2rs_open_opts_free(&o);
}

static void transfers(struct qcow2rs_image *img)
{
    unsigned char buf[16] = {0};
    struct iovec iov = {buf, sizeof(buf)}, null_range[2] = {{buf, 16}, {NULL, 1}},
                 long_ranges[2] = {{buf, SIZE_MAX}, {buf, SIZE_MAX}};
    uint32_t bit;

    CHECK_ERR(qcow2rs_pread(img, NULL, 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, NULL, 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pread(img, buf, (size_t)SSIZE_MAX + 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, buf, SIZE_MAX, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pread(img, buf, 16, UINT64_MAX - 8, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, buf, 16, UINT64_MAX, 0), EINVAL);
    CHECK_ERR(qcow2rs_pread(img, buf, 16, SIZE - 15, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, buf, 16, SIZE - 15, 0), EINVAL);

    CHECK_ERR(qcow2rs_preadv(img, &iov, -1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwritev(img, &iov, -1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_preadv(img, NULL, 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwritev(img, NULL, 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_preadv(img, null_range, 2, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwritev(img, null_range, 2, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_preadv(img, long_ranges, 2, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_preadv(img, long_ranges, 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwritev(img, &iov, 1, SIZE - 15, 0), EINVAL);
    CHECK_ERR(qcow2rs_preadv(img, &iov, 1, UINT64_MAX, 0), EINVAL);

    CHECK_ERR(qcow2rs_write_zeroes(img, SIZE - 15, 16, 0), EINVAL);
    CHECK_ERR(qcow2rs_write_zeroes(img, 16, UINT64_MAX, 0), EINVAL);
    CHECK_ERR(qcow2rs_discard(img, SIZE - 15, 16, 0), EINVAL);
    CHECK_ERR(qcow2rs_discard(img, UINT64_MAX, UINT64_MAX, 0), EINVAL);

    /* Flags: those of another call are as unknown as those of nobody. */
    for (bit = 0; bit < 32; bit++) {
        uint32_t flag = 1u << bit;

        CHECK_ERR(qcow2rs_pread(img, buf, 16, 0, flag), EINVAL);
        CHECK_ERR(qcow2rs_preadv(img, &iov, 1, 0, flag), EINVAL);
        CHECK_ERR(qcow2rs_discard(img, 0, 16, flag), EINVAL);
        if (flag != QCOW2RS_IO_FUA && flag != QCOW2RS_IO_COMPRESSED &&
            flag != QCOW2RS_IO_UNCHANGED) {
            CHECK_ERR(qcow2rs_pwrite(img, buf, 16, 0, flag), EINVAL);
            CHECK_ERR(qcow2rs_pwritev(img, &iov, 1, 0, flag), EINVAL);
        }
        if (flag != QCOW2RS_IO_FUA && flag != QCOW2RS_ZERO_MAY_UNMAP &&
            flag != QCOW2RS_ZERO_NO_FALLBACK) {
            CHECK_ERR(qcow2rs_write_zeroes(img, 0, 16, flag), EINVAL);
        }
        if (flag != QCOW2RS_OPEN_RDWR && flag != QCOW2RS_OPEN_NO_LOCK) {
            CHECK_ERR(qcow2rs_reopen(img, flag), EINVAL);
        }
    }
    CHECK_ERR(qcow2rs_pwrite(img, buf, 16, 0, QCOW2RS_IO_COMPRESSED), EINVAL);
    CHECK_ERR(qcow2rs_pwritev(img, &iov, 1, 0, QCOW2RS_IO_COMPRESSED), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, buf, 16, 0,
                             QCOW2RS_IO_COMPRESSED | 1u << 30), EINVAL);

    /* Nothing at all, anywhere up to the end; and not behind it. */
    CHECK_OK(qcow2rs_pread(img, NULL, 0, 0, 0));
    CHECK_OK(qcow2rs_pread(img, buf, 0, SIZE, 0));
    CHECK_OK(qcow2rs_preadv(img, NULL, 0, SIZE, 0));
    CHECK_OK(qcow2rs_pwrite(img, NULL, 0, SIZE, 0));
    CHECK_OK(qcow2rs_pwritev(img, NULL, 0, 0, 0));
    CHECK_OK(qcow2rs_write_zeroes(img, SIZE, 0, 0));
    CHECK_OK(qcow2rs_discard(img, SIZE, 0, 0));
    CHECK_ERR(qcow2rs_pread(img, buf, 0, SIZE + 1, 0), EINVAL);
    CHECK_ERR(qcow2rs_preadv(img, NULL, 0, SIZE + 1, 0), EINVAL);
    CHECK_ERR(qcow2rs_pwrite(img, buf, 0, SIZE + 1, 0), EINVAL);
    CHECK_ERR(qcow2rs_write_zeroes(img, SIZE + 1, 0, 0), EINVAL);
    CHECK_ERR(qcow2rs_discard(img, SIZE + 1, 0, 0), EINVAL);
}

static void questions(struct qcow2rs_image *img)
{
    union {
        struct qcow2rs_info info;
        struct qcow2rs_stats stats;
        unsigned char bytes[8192];
    } out;
    struct qcow2rs_extent extent;
    char *name = (void *)8, *format = (void *)8;
    size_t length = 7;

    CHECK_ERR(qcow2rs_get_info(img, NULL, sizeof(out.info)), EINVAL);
    CHECK_ERR(qcow2rs_get_stats(img, NULL, sizeof(out.stats)), EINVAL);
    memset(&out, 0xee, sizeof(out));
    CHECK_ERR(qcow2rs_get_info(img, &out.info, 0), EINVAL);
    CHECK_ERR(qcow2rs_get_info(img, &out.info, 7), EINVAL);
    CHECK_ERR(qcow2rs_get_info(img, &out.info, SIZE_MAX), EINVAL);
    CHECK_ERR(qcow2rs_get_info(img, &out.info, 1u << 20), EINVAL);
    CHECK_ERR(qcow2rs_get_stats(img, &out.stats, 0), EINVAL);
    CHECK_ERR(qcow2rs_get_stats(img, &out.stats, SIZE_MAX), EINVAL);
    CHECK_EQ(out.bytes[0], 0xee);

    CHECK_ERR(qcow2rs_get_ref(img, 0, &name, &length, &format), EINVAL);
    CHECK_ERR(qcow2rs_get_ref(img, 3, &name, &length, &format), EINVAL);
    CHECK_ERR(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_BACKING, NULL, &length,
                              &format), EINVAL);
    CHECK_ERR(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_BACKING, &name, NULL,
                              &format), EINVAL);
    CHECK_ERR(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_BACKING, &name, &length,
                              &format), ENOENT);
    CHECK_ERR(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_DATA, &name, &length,
                              NULL), ENOENT);
    CHECK_ERR(qcow2rs_get_info_json(img, NULL), EINVAL);
    CHECK(name == (void *)8 && format == (void *)8 && length == 7);

    CHECK_ERR(qcow2rs_block_status(img, 0, SIZE, 4, &extent, 1), EINVAL);
    CHECK_ERR(qcow2rs_block_status(img, 0, SIZE, 0, NULL, 1), EINVAL);
    CHECK_ERR(qcow2rs_block_status(img, 0, SIZE, 0, &extent, 0), EINVAL);
    CHECK_ERR(qcow2rs_block_status(img, 0, SIZE, 0, &extent, -1), EINVAL);
    CHECK_ERR(qcow2rs_block_status(img, 0, SIZE + 1, 0, &extent, 1), EINVAL);
    CHECK_ERR(qcow2rs_block_status(img, 1, UINT64_MAX, 0, &extent, 1), EINVAL);
    CHECK_EQ(qcow2rs_block_status(img, SIZE, 0, 0, &extent, 1), 0);
    CHECK_ERR(qcow2rs_block_status(img, SIZE + 1, 0, 0, &extent, 1), EINVAL);
}

int main(void)
{
    char *path = temp_path("image");
    struct qcow2rs_image *img;

    open_options();
    policy_and_function();
    create_options();
    opening();
    creating();
    no_image();
    no_image_either();

    img = new_image(path, SIZE);
    transfers(img);
    questions(img);
    CHECK_ERR(qcow2rs_invalidate(img), EINVAL);
    CHECK_OK(qcow2rs_close(&img));
    CHECK(img == NULL);
    free(path);
    return 0;
}
