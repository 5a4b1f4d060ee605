/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest's life in short: an overlay is created on a raw disk, gets scattered
 * 4 KiB writes, is flushed, closed, opened again and read as a whole: each byte
 * must be what was written, or else what the disk below holds.
 *
 *     cc overlay.c $(pkg-config --cflags --libs qcow2rs) -o overlay
 *     ./overlay -e -c 128k base.raw overlay.qcow2
 *
 * What it cost is printed line by line, "name value": see scripts/demo.sh.
 */
#define _XOPEN_SOURCE 700
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <qcow2rs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096           /* bytes that guests write at a time */
#define CHUNK (256 * BLOCK)  /* bytes that are compared at a time */

static const char *cluster_size = "64k", *extended_l2 = "off", *expected_path;
static uint64_t writes = 1024, seed = 1;
static uint64_t size;  /* of the disk */
static bool *written;  /* by number of the block */

/* Ends the program if a call of the library failed: an example's way.  The image
 * is then left as in a crash, with nothing worse than leaked clusters. */
static int64_t check(int64_t ret, const char *what)
{
    if (ret < 0) {
        fprintf(stderr, "overlay: %s: %s\n", what, qcow2rs_error_message());
        exit(1);
    }
    return ret;
}

/* The same for calls that leave their reason in errno. */
static void check_errno(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "overlay: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* The number of a block that was not written yet, at random (xorshift). */
static uint64_t next_block(void)
{
    uint64_t block;

    do {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        block = seed % (size / BLOCK);
    } while (written[block]);
    written[block] = true;
    return block;
}

/* What a block holds once it is written: no two words of the disk are the same. */
static const void *content(uint64_t block)
{
    enum { WORDS = BLOCK / sizeof(uint64_t) };
    static uint64_t words[WORDS];
    size_t i;

    for (i = 0; i < WORDS; i++) {
        words[i] = (block * WORDS + i) * 0x9e3779b97f4a7c15u;
    }
    return words;
}

/* Makes the overlay.  No size is given: it gets that of its base. */
static void create(const char *path, const char *base, const struct qcow2rs_open_opts *opts)
{
    char *absolute = realpath(base, NULL); /* as the overlay is to name it */
    struct qcow2rs_create_opts *o;

    check_errno(absolute != NULL, base);
    check(qcow2rs_create_opts_new(&o), "options");
    check(qcow2rs_create_opts_set_backing(o, absolute, "raw"), "backing file");
    check(qcow2rs_create_opts_set(o, "cluster_size", cluster_size), "-c");
    check(qcow2rs_create_opts_set(o, "extended_l2", extended_l2), "-e");
    check(qcow2rs_create_path(path, 0, o, opts, NULL), "create");
    qcow2rs_create_opts_free(&o);
    free(absolute);
}

/* The writes, the flush that makes them last, and what they cost. */
static void write_blocks(struct qcow2rs_image *img)
{
    double start = now(), unflushed, flushed;
    struct qcow2rs_stats stats;
    uint64_t i, block;

    for (i = 0; i < writes; i++) {
        block = next_block();
        check(qcow2rs_pwrite(img, content(block), BLOCK, block * BLOCK, 0), "write");
    }
    unflushed = now();
    check(qcow2rs_flush(img), "flush");
    flushed = now();

    check(qcow2rs_get_stats(img, &stats, sizeof(stats)), "stats");
    printf("writes_per_second %.0f\n", (double)writes / (unflushed - start));
    printf("writes_per_second_flushed %.0f\n", (double)writes / (flushed - start));
    printf("guest_bytes_written %" PRIu64 "\n", stats.guest_write_bytes);
    printf("file_bytes_written %" PRIu64 "\n", stats.storage_write_bytes);
    printf("bytes_copied %" PRIu64 "\n", stats.cow_bytes);
    printf("metadata_bytes %" PRIu64 "\n", stats.metadata_bytes);
}

/* Compares all of the disk with its base and the writes.  What it should hold
 * goes to a raw file, if one is wanted. */
static void verify(struct qcow2rs_image *img, const char *base_path)
{
    static unsigned char found[CHUNK], expected[CHUNK];
    int base = open(base_path, O_RDONLY | O_CLOEXEC), raw = -1;
    uint64_t at, length, i;

    check_errno(base >= 0, base_path);
    if (expected_path != NULL) {
        raw = open(expected_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        check_errno(raw >= 0, expected_path);
    }
    for (at = 0; at < size; at += length) {
        length = size - at < CHUNK ? size - at : CHUNK;
        memset(expected, 0, CHUNK); /* past the end of the base */
        check_errno(pread(base, expected, length, (off_t)at) >= 0, base_path);
        for (i = 0; i < length / BLOCK; i++) {
            if (written[at / BLOCK + i]) {
                memcpy(expected + i * BLOCK, content(at / BLOCK + i), BLOCK);
            }
        }
        check(qcow2rs_pread(img, found, length, at, 0), "read");
        if (memcmp(found, expected, length) != 0) {
            fprintf(stderr, "overlay: wrong data in the chunk at %#" PRIx64 "\n", at);
            exit(1);
        }
        check_errno(raw < 0 || pwrite(raw, expected, length, (off_t)at) == (ssize_t)length,
                    expected_path);
    }
    check_errno(raw < 0 || close(raw) == 0, expected_path);
    close(base);
}

static void run(const char *base, const char *overlay)
{
    struct qcow2rs_open_opts *opts;
    struct qcow2rs_image *img;
    struct qcow2rs_info info;

    check(qcow2rs_open_opts_new(&opts), "options");
    /* We made the overlay: what it names may be opened by path. */
    check(qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_PATHS, NULL, NULL), "policy");
    create(overlay, base, opts);

    check(qcow2rs_open_opts_set_flags(opts, QCOW2RS_OPEN_RDWR), "flags");
    check(qcow2rs_open_path(overlay, opts, &img), "open");
    size = (uint64_t)check(qcow2rs_get_size(img), "size");
    if (writes > size / BLOCK) {
        fprintf(stderr, "overlay: the disk has but %" PRIu64 " blocks\n", size / BLOCK);
        exit(1);
    }
    written = calloc(size / BLOCK + 1, sizeof(*written));
    check_errno(written != NULL, "memory");
    write_blocks(img);
    check(qcow2rs_close(&img), "close");

    check(qcow2rs_open_opts_set_flags(opts, 0), "flags"); /* read-only */
    check(qcow2rs_open_path(overlay, opts, &img), "open again");
    verify(img, base);
    check(qcow2rs_get_info(img, &info, sizeof(info)), "info");
    printf("bytes_verified %" PRIu64 "\n", size);
    printf("apparent_size %" PRIu64 "\n", info.file_length);
    printf("real_size %" PRIu64 "\n", info.allocated_size);
    check(qcow2rs_close(&img), "close");
    qcow2rs_open_opts_free(&opts);
    free(written);
}

int main(int argc, char **argv)
{
    int option;

    while ((option = getopt(argc, argv, "ec:n:s:x:")) != -1) {
        switch (option) {
        case 'e': extended_l2 = "on"; break;
        case 'c': cluster_size = optarg; break;
        case 'n': writes = strtoull(optarg, NULL, 0); break;
        case 's': seed = strtoull(optarg, NULL, 0); break;
        case 'x': expected_path = optarg; break;
        default: argc = 0; break;
        }
    }
    if (argc - optind != 2 || writes == 0 || seed == 0) {
        fputs("usage: overlay [-e] [-c CLUSTER_SIZE] [-n WRITES] [-s SEED] [-x RAW] BASE OVERLAY\n"
              "  -e  extended L2 entries\n"
              "  -x  a raw file to be made, with what the disk should hold\n", stderr);
        return 2;
    }
    run(argv[optind], argv[optind + 1]);
    check_errno(fflush(stdout) == 0, "standard output");
    return 0;
}
