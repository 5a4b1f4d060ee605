/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * An image from a stranger, opened by a program that trusts nothing in it:
 *
 *     ./sandbox top.qcow2 base.raw=/images/base.raw
 *
 * The program opens all files, shuts the door behind it (Landlock: from then on
 * the kernel lets it open none), and gives descriptors to the library.  What the
 * image names is looked up among what the command line allows; all else is
 * refused.  Then the whole disk is read, and its checksum printed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/landlock.h>
#include <qcow2rs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* NAME=FILE of the command line: what NAME in an image stands for. */
struct allowed {
    const char *name;
    size_t name_length;
    int fd;
};

struct allowed_list {
    struct allowed *entries;
    int count;
};

static int failed(const char *what)
{
    fprintf(stderr, "sandbox: %s: %s\n", what, qcow2rs_error_message());
    return -1;
}

static int failed_errno(const char *what)
{
    fprintf(stderr, "sandbox: %s: %s\n", what, strerror(errno));
    return -1;
}

/* A name from an image may be anything, commands to your terminal included. */
static void print_name(const char *name, size_t length)
{
    size_t i;

    for (i = 0; i < length; i++) {
        unsigned char c = (unsigned char)name[i];

        fprintf(stderr, c < ' ' || c > '~' ? "\\x%02x" : "%c", c);
    }
}

/* The library asks here for each file that an image names. */
static int resolve(void *opaque, const struct qcow2rs_ref *ref,
                   struct qcow2rs_storage **storage, uint32_t *format)
{
    const struct allowed_list *allowed = opaque;
    int i, fd = -1;

    for (i = 0; i < allowed->count; i++) {
        const struct allowed *entry = &allowed->entries[i];

        /* Names may contain NULs: their lengths count. */
        if (entry->name_length == ref->name_length &&
            memcmp(entry->name, ref->name, ref->name_length) == 0) {
            fd = entry->fd;
        }
    }
    /* Read-only, with its format stored (formats are never guessed), and
     * no external data file. */
    if (ref->kind != QCOW2RS_REF_KIND_BACKING || ref->writable || *format == 0) {
        fd = -1;
    }
    fprintf(stderr, "sandbox: the image at depth %" PRIu32 " wants \"", ref->depth);
    print_name(ref->name, ref->name_length);
    fprintf(stderr, "\": %s\n", fd >= 0 ? "granted" : "refused");
    return fd >= 0 ? qcow2rs_storage_from_fd(fd, storage) : -EPERM;
}

/* From here on the kernel lets this thread open no file, whoever's code asks for
 * it.  What is open already stays usable. */
static int shut_the_door(const char *path)
{
    struct landlock_ruleset_attr none = {
        .handled_access_fs =
            LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE,
    };
    int fd, rules = (int)syscall(SYS_landlock_create_ruleset, &none, sizeof(none), 0);

    if (rules < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        syscall(SYS_landlock_restrict_self, rules, 0) < 0) {
        failed_errno("there is no Landlock, going on without");
        if (rules >= 0) {
            close(rules);
        }
        return 0;
    }
    close(rules);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        close(fd);
        fprintf(stderr, "sandbox: Landlock does not work\n");
        return -1;
    }
    fprintf(stderr, "sandbox: no file can be opened any more (%s)\n", strerror(errno));
    return 0;
}

static int open_image(int fd, struct allowed_list *allowed, struct qcow2rs_image **img)
{
    struct qcow2rs_open_opts *opts = NULL;
    int ret = 0;

    if (qcow2rs_open_opts_new(&opts) < 0 ||
        qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_RESOLVE, resolve, allowed) < 0 ||
        /* What a stranger may cost. */
        qcow2rs_open_opts_set(opts, "max-chain-depth", "8") < 0 ||
        qcow2rs_open_opts_set(opts, "max-metadata-size", "64M") < 0 ||
        qcow2rs_open_opts_set(opts, "max-virtual-size", "16T") < 0 ||
        qcow2rs_open_fd(fd, opts, img) < 0) {
        ret = failed("open");
        if (qcow2rs_error_code() == QCOW2RS_E_POLICY) {
            fprintf(stderr, "sandbox: it is NAME=FILE that allows a file\n");
        }
    }
    qcow2rs_open_opts_free(&opts);
    return ret;
}

/* Fowler/Noll/Vo, 64 bits: not for keeping strangers out, just to compare. */
static int checksum(struct qcow2rs_image *img)
{
    static unsigned char buf[1 << 20];
    uint64_t sum = 0xcbf29ce484222325u, size = (uint64_t)qcow2rs_get_size(img), at, length, i;

    for (at = 0; at < size; at += length) {
        length = size - at < sizeof(buf) ? size - at : sizeof(buf);
        if (qcow2rs_pread(img, buf, length, at, 0) < 0) {
            return failed("read");
        }
        for (i = 0; i < length; i++) {
            sum = (sum ^ buf[i]) * 0x100000001b3u;
        }
    }
    printf("%016" PRIx64 " %" PRIu64 " bytes\n", sum, size);
    return 0;
}

static int run(const char *top, struct allowed_list *allowed)
{
    struct qcow2rs_image *img = NULL;
    int fd = open(top, O_RDONLY | O_CLOEXEC), ret;

    if (fd < 0) {
        return failed_errno(top);
    }
    ret = shut_the_door(top);
    if (ret == 0) {
        ret = open_image(fd, allowed, &img);
    }
    if (ret == 0) {
        ret = checksum(img);
    }
    if (qcow2rs_close(&img) < 0) {
        ret = failed("close");
    }
    close(fd); /* The library had a duplicate. */
    return ret;
}

int main(int argc, char **argv)
{
    struct allowed_list allowed = {0};
    int i, ret = 0;

    for (i = 1; i < argc && (i == 1 || strchr(argv[i], '=') != NULL); i++) {
    }
    if (argc < 2 || i < argc) {
        fputs("usage: sandbox IMAGE [NAME=FILE]...\n"
              "  NAME  of a backing file, exactly as an image stores it\n"
              "  FILE  what is opened for it\n", stderr);
        return 2;
    }
    allowed.entries = calloc((size_t)argc, sizeof(*allowed.entries));
    if (allowed.entries == NULL) {
        return failed_errno("memory") < 0;
    }
    for (i = 2; i < argc && ret == 0; i++) {
        struct allowed *entry = &allowed.entries[allowed.count];
        const char *equals = strchr(argv[i], '=');

        entry->name = argv[i];
        entry->name_length = (size_t)(equals - argv[i]);
        entry->fd = open(equals + 1, O_RDONLY | O_CLOEXEC);
        if (entry->fd < 0) {
            ret = failed_errno(equals + 1);
        } else {
            allowed.count++;
        }
    }
    if (ret == 0) {
        ret = run(argv[1], &allowed);
    }
    for (i = 0; i < allowed.count; i++) {
        close(allowed.entries[i].fd);
    }
    free(allowed.entries);
    return ret < 0 || fflush(stdout) != 0 ? 1 : 0;
}
