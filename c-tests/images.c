/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Creating images, and what is known of them. */
#include "disk.h"

#define SIZE (1u << 20)

static void sizes_by_prefix(struct qcow2rs_image *img)
{
    struct {
        struct qcow2rs_info info;
        uint64_t newer;
    } out;
    struct qcow2rs_info info;
    struct qcow2rs_stats stats;
    unsigned char bytes[sizeof(info)];
    size_t size;

    CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
    /* An older program's struct: nothing is touched behind its end. */
    for (size = 8; size < sizeof(info); size += 8) {
        memset(bytes, 0xee, sizeof(bytes));
        CHECK_OK(qcow2rs_get_info(img, (struct qcow2rs_info *)(void *)bytes,
                                  size));
        CHECK(memcmp(bytes, &info, size < 104 ? size : 100) == 0);
        CHECK_EQ(bytes[size], 0xee);
    }
    /* A newer program's: what the library does not know is zero. */
    memset(&out, 0xee, sizeof(out));
    CHECK_OK(qcow2rs_get_info(img, &out.info, sizeof(out)));
    CHECK_EQ(out.info.virtual_size, info.virtual_size);
    CHECK_EQ(out.info.allocated_size, info.allocated_size);
    CHECK_EQ(out.newer, 0);

    memset(&stats, 0xee, sizeof(stats));
    CHECK_OK(qcow2rs_get_stats(img, &stats, 8));
    CHECK(stats.guest_reads != 0xeeeeeeeeeeeeeeee);
    CHECK_EQ(stats.guest_read_bytes, 0xeeeeeeeeeeeeeeee);
}

static void info(void)
{
    char *path = temp_path("info");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE - 100);
    struct qcow2rs_image *img;
    struct qcow2rs_info i;
    struct stat st;
    char *json;

    CHECK_OK(qcow2rs_create_opts_set(o, "extended_l2", "on"));
    CHECK_OK(qcow2rs_create_opts_set(o, "cluster_size", "128k"));
    CHECK_OK(qcow2rs_create_opts_set(o, "refcount_bits", "8"));
    CHECK_OK(qcow2rs_create_opts_set(o, "lazy_refcounts", "on"));
    CHECK_OK(qcow2rs_create_path(path, 0, o, NULL, &img));
    /* Rounded up to sectors. */
    CHECK_EQ(qcow2rs_get_size(img), SIZE);
    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK_EQ(stat(path, &st), 0);
    CHECK_EQ(i.virtual_size, SIZE);
    CHECK_EQ(i.file_length, st.st_size);
    CHECK_EQ(i.allocated_size, st.st_blocks * 512);
    CHECK_EQ(i.cluster_size, 131072);
    CHECK_EQ(i.subcluster_size, 4096);
    CHECK_EQ(i.compat, QCOW2RS_COMPAT_1_1);
    CHECK_EQ(i.flags, QCOW2RS_INFO_RDWR | QCOW2RS_INFO_EXTENDED_L2 |
                      QCOW2RS_INFO_LAZY_REFCOUNTS);
    CHECK_EQ(i.refcount_bits, 8);
    CHECK_EQ(i.compression_type, QCOW2RS_COMPRESSION_ZLIB);
    CHECK_EQ(i.snapshot_count + i.bitmap_count, 0);
    CHECK_EQ(i.incompatible_features, 1 << 4);
    CHECK_EQ(i.compatible_features, 1);
    CHECK_EQ(i.autoclear_features, 0);
    CHECK_EQ(i.request_alignment, 1);
    CHECK_EQ(i.buffer_alignment, 1);
    CHECK_EQ(i.max_transfer, 0);
    CHECK(i.max_iov > 0);
    CHECK_EQ(i.chain_depth, 0);
    CHECK_EQ(i.reserved, 0);
    sizes_by_prefix(img);

    CHECK_OK(qcow2rs_get_info_json(img, &json));
    CHECK(strstr(json, "\"virtual-size\": 1048576") != NULL);
    CHECK(strstr(json, "\"extended-l2\": true") != NULL);
    CHECK(strstr(json, "\"format\": \"qcow2\"") != NULL);
    qcow2rs_free(json);
    CHECK_OK(qcow2rs_close(&img));

    /* Lazy refcounts show while the image is in use. */
    img = open_image(path, QCOW2RS_OPEN_RDWR);
    CHECK_OK(qcow2rs_pwrite(img, "data", 4, 0, 0));
    CHECK_OK(qcow2rs_flush(img));
    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK(i.flags & QCOW2RS_INFO_DIRTY);
    CHECK_OK(qcow2rs_abandon(&img));
    img = open_image(path, QCOW2RS_OPEN_RDWR);
    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK(!(i.flags & QCOW2RS_INFO_DIRTY));
    CHECK_OK(qcow2rs_close(&img));

    CHECK_OK(qcow2rs_create_opts_set(o, "extended_l2", "off"));
    CHECK_OK(qcow2rs_create_opts_set(o, "refcount_bits", "16"));
    CHECK_OK(qcow2rs_create_opts_set(o, "lazy_refcounts", "off"));
    CHECK_OK(qcow2rs_create_opts_set(o, "compat", "0.10"));
    CHECK_OK(qcow2rs_create_path(path, 0, o, NULL, NULL));
    img = open_image(path, 0);
    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK_EQ(i.compat, QCOW2RS_COMPAT_0_10);
    CHECK_EQ(i.flags, 0);
    CHECK_EQ(i.subcluster_size, i.cluster_size);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_create_opts_free(&o);
    free(path);
}

static void references(void)
{
    char *path = temp_path("references");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_image *img;
    struct qcow2rs_info i;
    char *name, *format;
    size_t length;

    CHECK_OK(qcow2rs_create_opts_set_backing(o, "not \"there\"", "raw"));
    /* Nobody looks for the file when the size is given. */
    CHECK_OK(qcow2rs_create_path(path, 0, o, NULL, NULL));
    img = open_image(path, QCOW2RS_OPEN_NO_BACKING);
    CHECK_OK(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_BACKING, &name, &length,
                             &format));
    CHECK_STR(name, "not \"there\"");
    CHECK_EQ(length, strlen(name));
    CHECK_STR(format, "raw");
    qcow2rs_free(name);
    qcow2rs_free(format);
    CHECK_OK(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_BACKING, &name, &length,
                             NULL));
    qcow2rs_free(name);
    CHECK_ERR(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_DATA, &name, &length,
                              &format), ENOENT);
    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK_EQ(i.flags, QCOW2RS_INFO_HAS_BACKING);
    CHECK_OK(qcow2rs_get_info_json(img, &name));
    CHECK(strstr(name, "\"backing-filename\": \"not \\\"there\\\"\"") != NULL);
    qcow2rs_free(name);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_create_opts_free(&o);
    free(path);
}

static void stats(void)
{
    char *path = temp_path("stats");
    struct qcow2rs_image *img = new_image(path, SIZE);
    unsigned char buf[10000];
    struct qcow2rs_stats s;

    fill(buf, sizeof(buf), 5);
    CHECK_OK(qcow2rs_pwrite(img, buf, 10000, 0, 0));
    CHECK_OK(qcow2rs_pwrite(img, buf, 100, 0, 0));
    CHECK_OK(qcow2rs_pread(img, buf, 300, 0, 0));
    CHECK_OK(qcow2rs_flush(img));
    CHECK_OK(qcow2rs_get_stats(img, &s, sizeof(s)));
    CHECK_EQ(s.guest_writes, 2);
    CHECK_EQ(s.guest_write_bytes, 10100);
    CHECK_EQ(s.guest_reads, 1);
    CHECK_EQ(s.guest_read_bytes, 300);
    CHECK(s.storage_writes >= 2 && s.storage_write_bytes >= 10100);
    CHECK(s.storage_reads >= 1 && s.storage_read_bytes >= 300);
    CHECK(s.storage_syncs >= 1);
    CHECK(s.clusters_allocated >= 1);
    CHECK_EQ(s.clusters_freed, 0);
    CHECK(s.metadata_bytes > 0);
    CHECK_OK(qcow2rs_discard(img, 0, 65536, 0));
    CHECK_OK(qcow2rs_flush(img));
    CHECK_OK(qcow2rs_get_stats(img, &s, sizeof(s)));
    CHECK_EQ(s.clusters_freed, 1);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

static void create(void)
{
    char *path = temp_path("create"), *nowhere = temp_path("none/here");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_open_opts *open_opts = new_open_opts(0);
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img, *second;
    unsigned char buf[100] = {1};
    mode_t mask = umask(027);
    struct stat st;

    CHECK_OK(qcow2rs_create_path(path, QCOW2RS_CREATE_EXCL, o, NULL, NULL));
    umask(mask);
    CHECK_EQ(stat(path, &st), 0);
    CHECK_EQ(st.st_mode & 0777, 0640);
    CHECK_ERR(qcow2rs_create_path(path, QCOW2RS_CREATE_EXCL, o, NULL, NULL),
              EEXIST);
    CHECK_ERR(qcow2rs_create_path(nowhere, 0, o, NULL, NULL), ENOENT);

    /* The new image is open for writing, whatever the flags say. */
    CHECK_OK(qcow2rs_create_path(path, 0, o, open_opts, &img));
    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0));
    /* Nobody empties an image that is in use. */
    second = (void *)8;
    CHECK_CODE(qcow2rs_create_path(path, 0, o, NULL, &second), EAGAIN,
               QCOW2RS_E_LOCKED);
    CHECK(second == NULL);
    CHECK_OK(qcow2rs_storage_from_path(path, &storage));
    CHECK_CODE(qcow2rs_create(&storage, o, NULL, NULL), EAGAIN,
               QCOW2RS_E_LOCKED);
    CHECK(storage == NULL);
    CHECK_OK(qcow2rs_pread(img, buf, sizeof(buf), 0, 0));
    CHECK_EQ(buf[0], 1);
    CHECK_OK(qcow2rs_close(&img));

    /* A storage must be there already. */
    CHECK_OK(qcow2rs_storage_from_path(nowhere, &storage));
    CHECK_ERR(qcow2rs_create(&storage, o, NULL, NULL), ENOENT);
    CHECK_OK(qcow2rs_storage_from_path(path, &storage));
    CHECK_OK(qcow2rs_create(&storage, o, open_opts, &img));
    CHECK_OK(qcow2rs_pread(img, buf, sizeof(buf), 0, 0));
    CHECK(all_zero(buf, sizeof(buf)));
    CHECK_OK(qcow2rs_close(&img));

    /* What does not go together is found before anything is touched. */
    CHECK_OK(qcow2rs_create_opts_set(o, "extended_l2", "on"));
    CHECK_OK(qcow2rs_create_opts_set(o, "cluster_size", "4k"));
    CHECK_ERR(qcow2rs_create_path(path, 0, o, NULL, NULL), EINVAL);
    CHECK_OK(qcow2rs_create_opts_set(o, "cluster_size", "64k"));
    CHECK_OK(qcow2rs_create_opts_set(o, "compat", "0.10"));
    CHECK_ERR(qcow2rs_create_path(path, 0, o, NULL, NULL), EINVAL);
    CHECK_OK(qcow2rs_open_opts_set(open_opts, "cache-size", "1M"));
    CHECK_OK(qcow2rs_open_opts_set(open_opts, "l2-cache-size", "2M"));
    CHECK_ERR(qcow2rs_create_path(path, 0, o, open_opts, NULL), EINVAL);
    CHECK_ERR(qcow2rs_open_path(path, open_opts, &img), EINVAL);
    img = open_image(path, 0);
    CHECK_OK(qcow2rs_close(&img));

    qcow2rs_open_opts_free(&open_opts);
    qcow2rs_create_opts_free(&o);
    free(path);
    free(nowhere);
}

/* A new overlay takes the size of what is below it. */
static void size_of_the_backing_file(void)
{
    char *below = temp_path("below"), *above = temp_path("above");
    struct qcow2rs_image *img = new_image(below, 3 << 20);
    struct qcow2rs_open_opts *open_opts = new_open_opts(0);
    struct qcow2rs_create_opts *o;

    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(qcow2rs_create_opts_new(&o));
    CHECK_ERR(qcow2rs_create_path(above, 0, o, NULL, NULL), EINVAL);
    CHECK_OK(qcow2rs_create_opts_set_backing(o, "below", "qcow2"));
    CHECK_CODE(qcow2rs_create_path(above, 0, o, NULL, NULL), EPERM,
               QCOW2RS_E_POLICY);
    CHECK_EQ(access(above, F_OK), -1);
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(open_opts, QCOW2RS_REF_PATHS,
                                              NULL, NULL));
    CHECK_OK(qcow2rs_create_path(above, 0, o, open_opts, &img));
    CHECK_EQ(qcow2rs_get_size(img), 3 << 20);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_create_opts_free(&o);
    qcow2rs_open_opts_free(&open_opts);
    free(below);
    free(above);
}

static void measure(void)
{
    char *path = temp_path("measured");
    struct qcow2rs_create_opts *o = new_create_opts(10 << 20);
    struct qcow2rs_image *img;
    static unsigned char buf[1 << 20];
    uint64_t required, full;
    struct stat st;
    int i;

    CHECK_OK(qcow2rs_measure(o, &required, &full));
    CHECK_EQ(full - required, 10 << 20);
    CHECK_OK(qcow2rs_create_path(path, 0, o, NULL, &img));
    fill(buf, sizeof(buf), 6);
    for (i = 0; i < 10; i++) {
        CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), (uint64_t)i << 20, 0));
    }
    CHECK_OK(qcow2rs_close(&img));
    CHECK_EQ(stat(path, &st), 0);
    CHECK((uint64_t)st.st_size <= full);
    qcow2rs_create_opts_free(&o);
    free(path);
}

int main(void)
{
    info();
    references();
    stats();
    create();
    size_of_the_backing_file();
    measure();
    return 0;
}
