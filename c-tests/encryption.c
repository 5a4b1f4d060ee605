/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Encrypted images: made, opened by their passphrases, and their key slots; each
 * error that a program can cause by it. */
#include "disk.h"

#define SIZE (1u << 20)
#define CLUSTER 65536u

static unsigned char data[CLUSTER], found[CLUSTER];

static struct qcow2rs_create_opts *options(const char *format)
{
    struct qcow2rs_create_opts *opts;

    CHECK_OK(qcow2rs_create_opts_new(&opts));
    CHECK_OK(qcow2rs_create_opts_set_size(opts, SIZE));
    CHECK_OK(qcow2rs_create_opts_set(opts, "encrypt.format", format));
    if (strcmp(format, "luks") == 0) {
        CHECK_OK(qcow2rs_create_opts_set(opts, "encrypt.iter-time", "0"));
    }
    return opts;
}

static int open_by(const char *path, const void *secret, size_t length,
                   uint32_t flags, struct qcow2rs_image **img)
{
    struct qcow2rs_open_opts *opts;
    int ret;

    CHECK_OK(qcow2rs_open_opts_new(&opts));
    if (secret != NULL) {
        CHECK_OK(qcow2rs_open_opts_set_secret(opts, secret, length));
    }
    CHECK_OK(qcow2rs_open_opts_set_flags(opts, flags));
    ret = qcow2rs_open_path(path, opts, img);
    qcow2rs_open_opts_free(&opts);
    return ret;
}

static void there_and_back(const char *format)
{
    struct qcow2rs_create_opts *opts = options(format);
    char *path = temp_path(format);
    char secret[] = "open sesame";
    struct qcow2rs_image *img;
    struct qcow2rs_info info;

    CHECK_ERR(qcow2rs_create_path(path, 0, opts, NULL, NULL), EACCES);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_ENCRYPTED);
    CHECK_OK(qcow2rs_create_opts_set_secret(opts, secret, strlen(secret)));
    memset(secret, 0, sizeof(secret)); /* It is copied. */
    CHECK_OK(qcow2rs_create_path(path, 0, opts, NULL, &img));
    CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
    CHECK(info.flags & QCOW2RS_INFO_ENCRYPTED);
    CHECK_OK(qcow2rs_pwrite(img, data, CLUSTER, 1000, 0));
    CHECK_OK(qcow2rs_close(&img));

    CHECK_ERR(open_by(path, NULL, 0, 0, &img), EACCES);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_ENCRYPTED);
    CHECK(strstr(qcow2rs_error_message(), "set_secret") != NULL);
    if (strcmp(format, "luks") == 0) {
        CHECK_ERR(open_by(path, "open sesam", 10, 0, &img), EACCES);
        CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_ENCRYPTED);
        CHECK_ERR(open_by(path, "", 0, QCOW2RS_OPEN_RDWR, &img), EACCES);
    }
    CHECK_OK(open_by(path, NULL, 0, QCOW2RS_OPEN_CHECK_ONLY, &img));
    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(open_by(path, "open sesame", 11, 0, &img));
    CHECK_OK(qcow2rs_pread(img, found, CLUSTER, 1000, 0));
    CHECK(memcmp(found, data, CLUSTER) == 0);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_create_opts_free(&opts);
    free(path);
}

/* ----------------------------------------------------------------- key slots */

static int change(struct qcow2rs_image *img, const char *state,
                  const char *slot, const char *secret)
{
    struct qcow2rs_create_opts *opts;
    int ret;

    CHECK_OK(qcow2rs_create_opts_new(&opts));
    if (state != NULL) {
        CHECK_OK(qcow2rs_create_opts_set(opts, "encrypt.state", state));
    }
    if (state != NULL && strcmp(state, "active") == 0) {
        CHECK_OK(qcow2rs_create_opts_set(opts, "encrypt.iter-time", "0"));
    }
    if (slot != NULL) {
        CHECK_OK(qcow2rs_create_opts_set(opts, "encrypt.keyslot", slot));
    }
    if (secret != NULL) {
        CHECK_OK(qcow2rs_create_opts_set_secret(opts, secret, strlen(secret)));
    }
    ret = qcow2rs_amend(img, opts, NULL, NULL);
    qcow2rs_create_opts_free(&opts);
    return ret;
}

static void key_slots(void)
{
    struct qcow2rs_create_opts *opts = options("luks");
    char *path = temp_path("slots");
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_create_opts_set_secret(opts, "one", 3));
    CHECK_OK(qcow2rs_create_path(path, 0, opts, NULL, NULL));
    CHECK_OK(open_by(path, "one", 3, QCOW2RS_OPEN_RDWR, &img));
    CHECK_ERR(change(img, "active", "0", "two"), EINVAL);
    CHECK_ERR(change(img, "active", "8", "two"), EINVAL);
    CHECK_ERR(change(img, "active", NULL, NULL), EINVAL);
    CHECK_ERR(change(img, NULL, NULL, "two"), EINVAL);
    CHECK_ERR(change(img, "inactive", NULL, NULL), EINVAL);
    CHECK_ERR(change(img, "inactive", "0", NULL), EINVAL);
    CHECK_ERR(change(img, "inactive", NULL, "two"), EINVAL);
    CHECK_OK(change(img, "active", NULL, "two"));
    CHECK_OK(change(img, "active", "6", "three"));
    CHECK_OK(change(img, "inactive", NULL, "two"));
    CHECK_OK(change(img, "inactive", "0", NULL));
    CHECK_ERR(change(img, "inactive", "6", NULL), EINVAL);
    CHECK_ERR(change(img, "active", NULL, "four"), EACCES);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_ENCRYPTED);
    CHECK_OK(qcow2rs_close(&img));
    CHECK_ERR(open_by(path, "one", 3, 0, &img), EACCES);
    CHECK_ERR(open_by(path, "two", 3, 0, &img), EACCES);
    CHECK_OK(open_by(path, "three", 5, 0, &img));
    CHECK_ERR(change(img, "active", NULL, "four"), EROFS);
    CHECK_OK(qcow2rs_close(&img));

    /* These are for images that there are. */
    CHECK_OK(qcow2rs_create_opts_set(opts, "encrypt.state", "active"));
    CHECK_ERR(qcow2rs_create_path(path, 0, opts, NULL, NULL), EINVAL);
    qcow2rs_create_opts_free(&opts);
    free(path);
}

/* ------------------------------------------------------------ images below */

static void below(void)
{
    struct qcow2rs_create_opts *opts = options("luks");
    char *base = temp_path("base"), *top = temp_path("top");
    struct qcow2rs_open_opts *open_opts;
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_create_opts_set_secret(opts, "base", 4));
    CHECK_OK(qcow2rs_create_path(base, 0, opts, NULL, NULL));
    CHECK_OK(open_by(base, "base", 4, QCOW2RS_OPEN_RDWR, &img));
    CHECK_OK(qcow2rs_pwrite(img, data, CLUSTER, 0, 0));
    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(qcow2rs_create_opts_set_secret(opts, "top", 3));
    CHECK_OK(qcow2rs_create_opts_set_backing(opts, base, "qcow2"));
    CHECK_OK(qcow2rs_create_path(top, 0, opts, NULL, NULL));

    CHECK_OK(qcow2rs_open_opts_new(&open_opts));
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(open_opts, QCOW2RS_REF_PATHS,
                                              NULL, NULL));
    CHECK_OK(qcow2rs_open_opts_set_secret(open_opts, "top", 3));
    CHECK_ERR(qcow2rs_open_path(top, open_opts, &img), EACCES);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_ENCRYPTED);
    CHECK_ERR(qcow2rs_open_opts_set_backing_secret(open_opts, 0, "base", 4),
              EINVAL);
    CHECK_OK(qcow2rs_open_opts_set_backing_secret(open_opts, 1, "wrong", 5));
    CHECK_ERR(qcow2rs_open_path(top, open_opts, &img), EACCES);
    CHECK_OK(qcow2rs_open_opts_set_backing_secret(open_opts, 1, "base", 4));
    CHECK_OK(qcow2rs_open_path(top, open_opts, &img));
    CHECK_OK(qcow2rs_pread(img, found, CLUSTER, 0, 0));
    CHECK(memcmp(found, data, CLUSTER) == 0);
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&open_opts);
    qcow2rs_create_opts_free(&opts);
    free(base);
    free(top);
}

/* -------------------------------------------------------------------- misuse */

static void refused(void)
{
    struct qcow2rs_create_opts *opts = options("luks");
    char *path = temp_path("refused");
    struct qcow2rs_open_opts *open_opts;
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_open_opts_new(&open_opts));
    CHECK_ERR(qcow2rs_open_opts_set_secret(NULL, "x", 1), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_secret(open_opts, NULL, 1), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_backing_secret(NULL, 1, "x", 1), EINVAL);
    CHECK_ERR(qcow2rs_open_opts_set_backing_secret(open_opts, 1, NULL, 1),
              EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_secret(NULL, "x", 1), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set_secret(opts, NULL, 1), EINVAL);
    /* Not what QEMU could be told. */
    CHECK_OK(qcow2rs_create_opts_set_secret(opts, "\xff", 1));
    CHECK_ERR(qcow2rs_create_path(path, 0, opts, NULL, NULL), EINVAL);
    CHECK_OK(qcow2rs_create_opts_set_secret(opts, "a\0b", 3));
    CHECK_ERR(qcow2rs_create_path(path, 0, opts, NULL, NULL), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(opts, "encrypt.format", "rot13"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(opts, "encrypt.cipher-alg", "des"),
              EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(opts, "encrypt.state", "on"), EINVAL);
    CHECK_ERR(qcow2rs_create_opts_set(opts, "encrypt.nothing", "1"), ENOENT);
    CHECK_ERR(qcow2rs_create_opts_set(opts, "encrypt.key-secret", "sec0"),
              ENOTSUP);

    /* An image that asks for more time than is given. */
    CHECK_OK(qcow2rs_create_opts_set_secret(opts, "x", 1));
    CHECK_OK(qcow2rs_create_path(path, 0, opts, NULL, NULL));
    CHECK_OK(qcow2rs_open_opts_set_secret(open_opts, "x", 1));
    CHECK_OK(qcow2rs_open_opts_set(open_opts, "max-key-iterations", "1999"));
    CHECK_ERR(qcow2rs_open_path(path, open_opts, &img), EFBIG);
    CHECK_EQ(qcow2rs_error_code(), QCOW2RS_E_LIMIT);
    CHECK_OK(qcow2rs_open_opts_set(open_opts, "max-key-iterations", "2000"));
    CHECK_OK(qcow2rs_open_path(path, open_opts, &img));
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_open_opts_free(&open_opts);
    qcow2rs_create_opts_free(&opts);
    free(path);
}

int main(void)
{
    memset(data, 0x5a, sizeof(data));
    CHECK_EQ(qcow2rs_has_feature("luks"), 1);
    there_and_back("luks");
    there_and_back("aes");
    key_slots();
    below();
    refused();
    return 0;
}
