/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* External data files: chosen at creation, found by the reference policy. */
#include "disk.h"

#include <sys/stat.h>

#define CLUSTER 65536u
#define SIZE (16u * CLUSTER)

static unsigned char data[CLUSTER], found[CLUSTER];

struct answer {
    const char *path;
    unsigned calls, writable;
};

static int resolve(void *opaque, const struct qcow2rs_ref *ref,
                   struct qcow2rs_storage **storage, uint32_t *format)
{
    struct answer *answer = opaque;

    answer->calls++;
    answer->writable = ref->writable;
    CHECK_EQ(ref->kind, QCOW2RS_REF_KIND_DATA);
    CHECK_EQ(ref->depth, 0);
    CHECK(strcmp(ref->name, "the data") == 0 && ref->name_length == 8);
    CHECK(ref->format == NULL);
    CHECK_EQ(*format, 0);
    return qcow2rs_storage_from_path(answer->path, storage);
}

static struct qcow2rs_storage *storage_at(const char *path)
{
    struct qcow2rs_storage *storage;

    CHECK_OK(qcow2rs_storage_from_path(path, &storage));
    return storage;
}

static char *empty_file(const char *name)
{
    char *path = temp_path(name);
    FILE *file = fopen(path, "w");

    CHECK(file != NULL && fclose(file) == 0);
    return path;
}

/* Made, written, closed, opened by a callback, read. */
static void there_and_back(const char *raw, uint32_t flags)
{
    char *path = temp_path("image"), *file = empty_file("data");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_storage *storage = storage_at(file);
    struct answer answer = {file, 0, 0};
    struct qcow2rs_open_opts *open_opts;
    struct qcow2rs_image *img;
    struct qcow2rs_info i;
    size_t length;
    char *name;

    CHECK_OK(qcow2rs_create_opts_set_data_file(o, "the data", &storage));
    CHECK(storage == NULL);
    CHECK_OK(qcow2rs_create_opts_set(o, "data_file_raw", raw));
    CHECK_OK(qcow2rs_create_path(path, 0, o, NULL, &img));
    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK_EQ(i.flags & (QCOW2RS_INFO_DATA_FILE | QCOW2RS_INFO_DATA_FILE_RAW),
             flags);
    CHECK_OK(qcow2rs_pwrite(img, data, CLUSTER, 0, QCOW2RS_IO_FUA));
    CHECK_OK(qcow2rs_get_ref(img, QCOW2RS_REF_KIND_DATA, &name, &length, NULL));
    CHECK(length == 8 && strcmp(name, "the data") == 0);
    qcow2rs_free(name);
    CHECK_OK(qcow2rs_close(&img));

    CHECK_ERR(qcow2rs_open_path(path, NULL, &img), EPERM);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_POLICY);
    CHECK_OK(qcow2rs_open_opts_new(&open_opts));
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(open_opts, QCOW2RS_REF_RESOLVE,
                                              resolve, &answer));
    CHECK_OK(qcow2rs_open_path(path, open_opts, &img));
    CHECK_EQ(answer.calls, 1);
    CHECK_EQ(answer.writable, 0);
    CHECK_OK(qcow2rs_pread(img, found, CLUSTER, 0, 0));
    CHECK(memcmp(found, data, CLUSTER) == 0);
    CHECK_OK(qcow2rs_close(&img));
    answer.path = "/nowhere/at/all";
    CHECK_ERR(qcow2rs_open_path(path, open_opts, &img), ENOENT);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_DATA_FILE);
    qcow2rs_open_opts_free(&open_opts);
    qcow2rs_create_opts_free(&o);
    free(file);
    free(path);
}

static void refused(void)
{
    char *path = temp_path("refused"), *file = empty_file("data2");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_storage *storage = storage_at(file);

    CHECK_ERR(qcow2rs_create_opts_set_data_file(NULL, "x", &storage), EINVAL);
    CHECK(storage == NULL);
    storage = storage_at(file);
    CHECK_ERR(qcow2rs_create_opts_set_data_file(o, NULL, &storage), EINVAL);
    CHECK(storage == NULL);
    storage = storage_at(file);
    CHECK_ERR(qcow2rs_create_opts_set_data_file(o, "", &storage), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_data_file(o, "x", NULL), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_data_file(o, "x", &storage), EINVAL);
    CHECK_OK(qcow2rs_create_opts_set(o, "data_file_raw", "on"));
    CHECK_ERR(qcow2rs_create_path(path, 0, o, NULL, NULL), EINVAL);
    storage = storage_at(file);
    CHECK_OK(qcow2rs_create_opts_set_data_file(o, "x", &storage));
    CHECK_OK(qcow2rs_create_opts_set(o, "compat", "0.10"));
    CHECK_ERR(qcow2rs_create_path(path, 0, o, NULL, NULL), EINVAL);
    qcow2rs_create_opts_free(&o);
    free(file);
    free(path);
}

static uint64_t length_of(const char *path)
{
    struct stat found;

    CHECK(stat(path, &found) == 0);
    return (uint64_t)found.st_size;
}

/* Taken ahead, longer, shorter; called otherwise; not raw any more. */
static void changed(void)
{
    char *path = temp_path("changed"), *file = empty_file("data3");
    struct qcow2rs_create_opts *o = new_create_opts(SIZE), *amend;
    struct qcow2rs_storage *storage = storage_at(file);
    struct qcow2rs_open_opts *open_opts;
    struct qcow2rs_image *img;
    struct qcow2rs_info i;
    size_t length;
    char *name;

    CHECK_OK(qcow2rs_create_opts_set_data_file(o, "x", &storage));
    CHECK_OK(qcow2rs_create_opts_set(o, "data_file_raw", "on"));
    CHECK_OK(qcow2rs_create_opts_set(o, "preallocation", "full"));
    CHECK_OK(qcow2rs_create_path(path, 0, o, NULL, &img));
    CHECK_EQ(length_of(file), SIZE);
    CHECK_OK(qcow2rs_pwrite(img, data, CLUSTER, 0, 0));
    CHECK_OK(qcow2rs_resize(img, SIZE + 512, QCOW2RS_PREALLOC_METADATA, 0, NULL,
                            NULL));
    CHECK_EQ(length_of(file), SIZE + 512);
    CHECK_OK(qcow2rs_resize(img, CLUSTER, 0, QCOW2RS_RESIZE_SHRINK, NULL,
                            NULL));
    CHECK_EQ(length_of(file), CLUSTER);
    CHECK_ERR(qcow2rs_snapshot_create(img, "a", NULL, 0, NULL, 0), ENOTSUP);

    CHECK_OK(qcow2rs_create_opts_new(&amend));
    CHECK_OK(qcow2rs_create_opts_set(amend, "data_file", ""));
    CHECK_OK(qcow2rs_create_opts_set(amend, "data_file_raw", "off"));
    CHECK_OK(qcow2rs_amend(img, amend, NULL, NULL));
    CHECK_OK(qcow2rs_get_info(img, &i, sizeof(i)));
    CHECK_EQ(i.flags & (QCOW2RS_INFO_DATA_FILE | QCOW2RS_INFO_DATA_FILE_RAW),
             QCOW2RS_INFO_DATA_FILE);
    CHECK_ERR(
        qcow2rs_get_ref(img, QCOW2RS_REF_KIND_DATA, &name, &length, NULL),
        ENOENT);
    CHECK_OK(qcow2rs_create_opts_set(amend, "data_file_raw", "on"));
    CHECK_ERR(qcow2rs_amend(img, amend, NULL, NULL), EINVAL);
    CHECK_OK(qcow2rs_close(&img));
    /* A name alone makes no data file. */
    CHECK_OK(qcow2rs_create_opts_set_size(amend, SIZE));
    CHECK_ERR(qcow2rs_create_path(path, 0, amend, NULL, NULL), EINVAL);

    CHECK_OK(qcow2rs_open_opts_new(&open_opts));
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(
        open_opts, QCOW2RS_REF_PATHS, NULL, NULL));
    CHECK_ERR(qcow2rs_open_path(path, open_opts, &img), EINVAL);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_DATA_FILE);
    CHECK_ERR(qcow2rs_open_opts_set(open_opts, "data-file.filename", ""),
              EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set(open_opts, "data-file", "node"), ENOTSUP);
    CHECK_OK(qcow2rs_open_opts_set(open_opts, "data-file.filename", file));
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(
        open_opts, QCOW2RS_REF_DENY, NULL, NULL));
    CHECK_OK(qcow2rs_open_path(path, open_opts, &img));
    CHECK_OK(qcow2rs_pread(img, found, CLUSTER, 0, 0));
    CHECK(memcmp(found, data, CLUSTER) == 0);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&open_opts);
    qcow2rs_create_opts_free(&amend);
    qcow2rs_create_opts_free(&o);
    free(file);
    free(path);
}

int main(void)
{
    memset(data, 0x5a, sizeof(data));
    there_and_back("off", QCOW2RS_INFO_DATA_FILE);
    there_and_back("on", QCOW2RS_INFO_DATA_FILE | QCOW2RS_INFO_DATA_FILE_RAW);
    refused();
    changed();
    return 0;
}
