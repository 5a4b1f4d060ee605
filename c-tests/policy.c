/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Files that an image names: denied, taken as paths, or resolved by the
 * program, as a sandboxed one does it. */
#include "disk.h"

#define SIZE (1u << 20)

static char *base, *middle, *top;
static unsigned char pattern[4096];

/* base <- middle <- top; each has a block of its own. */
static void make_chain(void)
{
    struct qcow2rs_create_opts *o = new_create_opts(SIZE);
    struct qcow2rs_open_opts *paths = new_open_opts(0);
    struct qcow2rs_image *img;

    base = temp_path("base");
    middle = temp_path("middle");
    top = temp_path("top");
    fill(pattern, sizeof(pattern), 1);
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(paths, QCOW2RS_REF_PATHS, NULL,
                                              NULL));
    CHECK_OK(qcow2rs_create_path(base, 0, o, NULL, &img));
    CHECK_OK(qcow2rs_pwrite(img, pattern, 4096, 0, 0));
    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(qcow2rs_create_opts_set_backing(o, "base", "qcow2"));
    CHECK_OK(qcow2rs_create_path(middle, 0, o, paths, &img));
    CHECK_OK(qcow2rs_pwrite(img, pattern, 4096, 65536, 0));
    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(qcow2rs_create_opts_set_backing(o, "middle", "qcow2"));
    CHECK_OK(qcow2rs_create_path(top, 0, o, paths, &img));
    CHECK_OK(qcow2rs_pwrite(img, pattern, 4096, 131072, 0));
    CHECK_OK(qcow2rs_close(&img));
    qcow2rs_create_opts_free(&o);
    qcow2rs_open_opts_free(&paths);
}

static void check_data(struct qcow2rs_image *img)
{
    unsigned char read[4096];
    uint64_t offset;

    for (offset = 0; offset <= 131072; offset += 65536) {
        CHECK_OK(qcow2rs_pread(img, read, 4096, offset, 0));
        CHECK(memcmp(read, pattern, 4096) == 0);
    }
    CHECK_OK(qcow2rs_pread(img, read, 4096, 196608, 0));
    CHECK(all_zero(read, 4096));
}

static void deny(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(0);
    struct qcow2rs_image *img;
    unsigned char read[4096];

    CHECK_CODE(qcow2rs_open_path(top, NULL, &img), EPERM, QCOW2RS_E_POLICY);
    CHECK(img == NULL);
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), EPERM, QCOW2RS_E_POLICY);
    CHECK(strstr(qcow2rs_error_message(), "middle") != NULL);

    /* This layer only. */
    CHECK_OK(qcow2rs_open_opts_set_flags(opts, QCOW2RS_OPEN_NO_BACKING));
    CHECK_OK(qcow2rs_open_path(top, opts, &img));
    CHECK_OK(qcow2rs_pread(img, read, 4096, 0, 0));
    CHECK(all_zero(read, 4096));
    CHECK_OK(qcow2rs_pread(img, read, 4096, 131072, 0));
    CHECK(memcmp(read, pattern, 4096) == 0);
    CHECK_OK(qcow2rs_close(&img));
    CHECK_OK(qcow2rs_open_opts_set_flags(opts, QCOW2RS_OPEN_NO_BACKING |
                                         QCOW2RS_OPEN_RDWR));
    CHECK_ERR(qcow2rs_open_path(top, opts, &img), EINVAL);
    qcow2rs_open_opts_free(&opts);
}

static void paths(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct qcow2rs_info info;
    struct qcow2rs_image *img;

    CHECK_OK(qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_PATHS, NULL,
                                              NULL));
    CHECK_OK(qcow2rs_open_path(top, opts, &img));
    check_data(img);
    CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
    CHECK_EQ(info.chain_depth, 2);
    CHECK_OK(qcow2rs_close(&img));

    CHECK_OK(qcow2rs_open_opts_set(opts, "max-chain-depth", "1"));
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), ELOOP,
               QCOW2RS_E_CHAIN_DEPTH);
    qcow2rs_open_opts_free(&opts);
}

/* ------------------------------------------------------------------- resolve */
enum how {
    BY_FD,          /* as a broker in a sandbox would */
    REFUSE,         /* -EPERM */
    FAIL,           /* another errno */
    FAIL_ODDLY,     /* a value that is no errno */
    NO_STORAGE,     /* success, and nothing given */
    STORAGE_AND_ERROR,
    NO_FORMAT,
    WRONG_FORMAT,   /* no QCOW2RS_FORMAT_* */
};

struct resolver {
    enum how how;
    int calls;
    struct memory memory;
};

static int resolve(void *opaque, const struct qcow2rs_ref *ref,
                   struct qcow2rs_storage **storage, uint32_t *format)
{
    struct resolver *r = opaque;
    bool is_base = strcmp(ref->name, "base") == 0;
    int fd, ret;

    CHECK(ref->struct_size >= sizeof(*ref));
    CHECK_EQ(ref->kind, QCOW2RS_REF_KIND_BACKING);
    CHECK(is_base || strcmp(ref->name, "middle") == 0);
    CHECK_EQ(ref->depth, is_base ? 1 : 0);
    CHECK_EQ(ref->name_length, strlen(ref->name));
    CHECK_STR(ref->format, "qcow2");
    CHECK(ref->referrer != NULL && ref->referrer[0] != '\0');
    CHECK_EQ(ref->writable, 0);
    CHECK_EQ(*format, QCOW2RS_FORMAT_QCOW2);
    CHECK(*storage == NULL);
    r->calls++;

    switch (r->how) {
    case BY_FD:
        fd = open(is_base ? base : middle, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0);
        ret = qcow2rs_storage_from_fd(fd, storage);
        close(fd);
        return ret;
    case REFUSE:
        return -EPERM;
    case FAIL:
        return -ENOLINK;
    case FAIL_ODDLY:
        return INT32_MIN;
    case NO_STORAGE:
        return 0;
    case STORAGE_AND_ERROR:
        *storage = memory_storage(&r->memory, 0);
        return -ENOLINK;
    case NO_FORMAT:
        *storage = memory_storage(&r->memory, 0);
        *format = 0;
        return 0;
    case WRONG_FORMAT:
        *storage = memory_storage(&r->memory, 0);
        *format = 77;
        return 0;
    }
    return -EINVAL;
}

static void resolving(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(QCOW2RS_OPEN_RDWR);
    struct resolver r = {.how = BY_FD};
    struct qcow2rs_image *img;

    memory_init(&r.memory);
    CHECK_OK(qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_RESOLVE,
                                              resolve, &r));
    CHECK_OK(qcow2rs_open_path(top, opts, &img));
    CHECK_EQ(r.calls, 2);
    check_data(img);
    CHECK_OK(qcow2rs_close(&img));

    r.how = REFUSE;
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), EPERM, QCOW2RS_E_POLICY);
    CHECK(img == NULL);
    CHECK_EQ(r.calls, 3);
    r.how = FAIL;
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), ENOLINK, QCOW2RS_E_BACKING);
    r.how = FAIL_ODDLY;
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), EIO, QCOW2RS_E_BACKING);
    r.how = NO_STORAGE;
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), EINVAL, QCOW2RS_E_BACKING);

    /* Whatever else it says, a storage that it gives is released. */
    r.how = STORAGE_AND_ERROR;
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), ENOLINK, QCOW2RS_E_BACKING);
    CHECK_EQ(r.memory.closed, 1);
    r.how = NO_FORMAT;
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), EINVAL, QCOW2RS_E_BACKING);
    CHECK_EQ(r.memory.closed, 1);
    r.how = WRONG_FORMAT;
    CHECK_CODE(qcow2rs_open_path(top, opts, &img), EINVAL, QCOW2RS_E_BACKING);
    CHECK_EQ(r.memory.closed, 1);

    qcow2rs_open_opts_free(&opts);
    memory_destroy(&r.memory);
}

/* A name that no file system knows, with nothing but callbacks below. */
static int resolve_memory(void *opaque, const struct qcow2rs_ref *ref,
                          struct qcow2rs_storage **storage, uint32_t *format)
{
    CHECK_STR(ref->name, "json:{\"driver\": \"nbd\"}");
    CHECK_STR(ref->format, "raw");
    CHECK_EQ(*format, QCOW2RS_FORMAT_RAW);
    *storage = memory_storage(opaque, 0);
    return 0;
}

static void names_are_opaque(void)
{
    const char *name = "json:{\"driver\": \"nbd\"}";
    struct qcow2rs_create_opts *create = new_create_opts(SIZE);
    struct qcow2rs_open_opts *opts = new_open_opts(0);
    struct qcow2rs_storage *storage;
    struct qcow2rs_image *img;
    struct memory over, under;
    unsigned char read[4096];

    memory_init(&over);
    memory_init(&under);
    under.length = SIZE;
    memcpy(under.bytes + 8192, pattern, 4096);
    CHECK_OK(qcow2rs_create_opts_set_backing(create, name, "raw"));

    /* Nothing is written that could not be opened. */
    storage = memory_storage(&over, 0);
    CHECK_CODE(qcow2rs_create(&storage, create, opts, &img), EPERM,
               QCOW2RS_E_POLICY);
    CHECK_EQ(over.closed, 1);
    CHECK_EQ(over.length, 0);

    CHECK_OK(qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_RESOLVE,
                                              resolve_memory, &under));
    storage = memory_storage(&over, 0);
    CHECK_OK(qcow2rs_create(&storage, create, opts, &img));
    CHECK_OK(qcow2rs_pread(img, read, 4096, 8192, 0));
    CHECK(memcmp(read, pattern, 4096) == 0);
    CHECK_EQ(under.closed, 0);
    CHECK_OK(qcow2rs_close(&img));
    CHECK_EQ(under.closed, 1);
    CHECK_EQ(over.closed, 1);

    CHECK_OK(qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_PATHS, NULL,
                                              NULL));
    storage = memory_storage(&over, 0);
    CHECK_CODE(qcow2rs_open(&storage, opts, &img), EPERM, QCOW2RS_E_POLICY);
    qcow2rs_create_opts_free(&create);
    qcow2rs_open_opts_free(&opts);
    memory_destroy(&over);
    memory_destroy(&under);
}

int main(void)
{
    make_chain();
    deny();
    paths();
    resolving();
    names_are_opaque();
    free(base);
    free(middle);
    free(top);
    return 0;
}
