/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Where the contents of a disk come from, part by part, like `qemu-img map`:
 *
 *     ./map disk.qcow2        # in this image; "below" is what it leaves open
 *     ./map -c disk.qcow2     # and in the images that it stands on
 *
 * Depth 0 is the image itself, 1 the one below it.  The last column is where the
 * bytes are in the file at that depth.  Compressed ones have no one place; "zero"
 * and "below" have one if it is reserved for what may be written there.
 */
#define _XOPEN_SOURCE 700
#include <inttypes.h>
#include <qcow2rs.h>
#include <stdio.h>
#include <unistd.h>

#define EXTENTS 256 /* asked for at a time */

static int failed(const char *what)
{
    fprintf(stderr, "map: %s: %s\n", what, qcow2rs_error_message());
    return -1;
}

/* `chain`: whether to open the files that the image names.  Whoever made the
 * image chose those names, so nobody should say yes for an image of a
 * stranger's: it may name any file that you can read. */
static int open_image(const char *path, bool chain, struct qcow2rs_image **img)
{
    struct qcow2rs_open_opts *opts = NULL;
    int ret;

    ret = qcow2rs_open_opts_new(&opts);
    if (ret == 0 && chain) {
        ret = qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_PATHS, NULL, NULL);
    } else if (ret == 0) {
        ret = qcow2rs_open_opts_set_flags(opts, QCOW2RS_OPEN_NO_BACKING);
    }
    if (ret == 0) {
        ret = qcow2rs_open_path(path, opts, img);
    }
    if (ret < 0) {
        failed(path);
    }
    qcow2rs_open_opts_free(&opts);
    return ret;
}

static const char *state(const struct qcow2rs_extent *extent, bool backed)
{
    if (extent->flags & QCOW2RS_BLOCK_COMPRESSED) {
        return "compressed";
    }
    if (extent->flags & QCOW2RS_BLOCK_DATA) {
        return "data";
    }
    if (extent->flags & QCOW2RS_BLOCK_ALLOCATED) {
        return "zero"; /* because an image says so */
    }
    return backed ? "below" : "hole"; /* a hole reads as zero, too */
}

static void print(const struct qcow2rs_extent *extent, bool backed)
{
    printf("%#16" PRIx64 " %#14" PRIx64 " %6" PRIu32 "  %-10s", extent->offset,
           extent->length, extent->depth, state(extent, backed));
    if (extent->flags & QCOW2RS_BLOCK_OFFSET_VALID) {
        printf(" %#16" PRIx64, extent->host_offset);
    }
    putchar('\n');
}

static int map(struct qcow2rs_image *img, bool chain)
{
    struct qcow2rs_extent extents[EXTENTS];
    struct qcow2rs_info info;
    uint64_t at = 0;
    bool backed;

    if (qcow2rs_get_info(img, &info, sizeof(info)) < 0) {
        return failed("info");
    }
    backed = !chain && (info.flags & QCOW2RS_INFO_HAS_BACKING);
    printf("%16s %14s %6s  %-10s %16s\n", "offset", "length", "depth", "state",
           "offset in file");
    while (at < info.virtual_size) {
        int i, count = qcow2rs_block_status(img, at, info.virtual_size - at, 0,
                                            extents, EXTENTS);
        if (count < 0) {
            return failed("map");
        }
        for (i = 0; i < count; i++) {
            print(&extents[i], backed);
        }
        at = extents[count - 1].offset + extents[count - 1].length;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct qcow2rs_image *img;
    bool chain = false;
    int option, ret;

    while ((option = getopt(argc, argv, "c")) != -1) {
        switch (option) {
        case 'c': chain = true; break;
        default: argc = 0; break;
        }
    }
    if (argc - optind != 1) {
        fputs("usage: map [-c] IMAGE\n"
              "  -c  open the backing files it names: only for images you trust\n",
              stderr);
        return 2;
    }
    if (open_image(argv[optind], chain, &img) < 0) {
        return 1;
    }
    ret = map(img, chain);
    if (qcow2rs_close(&img) < 0) {
        ret = failed("close");
    }
    return ret < 0 || fflush(stdout) != 0 ? 1 : 0;
}
