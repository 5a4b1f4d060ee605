/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A disk, read from an event loop: many requests in flight on one thread, and the
 * loop is free for whatever else has a descriptor (here: signals).
 *
 *     ./epoll disk.qcow2 copy.raw         # what the guest sees, as a raw file
 *     ./epoll -d 8 disk.qcow2 copy.raw    # with 8 requests in flight
 *
 * A hypervisor has one queue for each of its I/O threads, all on one open image,
 * and submits what the guest asks for in place of the pieces of this copy.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <qcow2rs.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define PIECE (64u << 10)
#define BATCH 16 /* completions taken at a time */

struct piece {
    uint64_t offset;
    size_t length;
    unsigned char *data;
};

struct copy {
    struct qcow2rs_queue *queue;
    int out;
    uint64_t size, next; /* next: where the next piece begins */
    uint64_t batches;
};

static int failed(const char *what, const char *why)
{
    fprintf(stderr, "epoll: %s: %s\n", what, why);
    return -1;
}

/* Submits the next piece of the disk into a buffer that is free; none at the end. */
static int start(struct copy *copy, struct piece *piece)
{
    uint64_t left = copy->size - copy->next;

    if (left == 0) {
        return 0;
    }
    piece->offset = copy->next;
    piece->length = left < PIECE ? (size_t)left : PIECE;
    copy->next += piece->length;
    if (qcow2rs_queue_pread(copy->queue, piece->data, piece->length,
                            piece->offset, 0, piece) < 0) {
        return failed("submit", qcow2rs_error_message());
    }
    return 0;
}

static int write_out(struct copy *copy, const struct piece *piece)
{
    ssize_t put = pwrite(copy->out, piece->data, piece->length,
                         (off_t)piece->offset);

    if (put != (ssize_t)piece->length) {
        return failed("write", put < 0 ? strerror(errno) : "the disk is full");
    }
    return 0;
}

/* Takes what has completed, and goes on with the next pieces. */
static int reap(struct copy *copy)
{
    struct qcow2rs_completion done[BATCH];
    int i, count = qcow2rs_queue_reap(copy->queue, done, BATCH);

    if (count < 0) {
        return failed("reap", qcow2rs_error_message());
    }
    copy->batches += count > 0;
    for (i = 0; i < count; i++) {
        if (done[i].ret < 0) {
            return failed("read", done[i].error_message);
        }
        if (write_out(copy, done[i].user_data) < 0 ||
            start(copy, done[i].user_data) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Watches a descriptor; the loop is told which by `which`. */
static int watch(int loop, int fd, uint32_t which)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = which};

    if (fd < 0 || epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event) < 0) {
        return failed("event loop", strerror(errno));
    }
    return 0;
}

enum { COMPLETIONS, SIGNAL };

static int run(struct copy *copy, int signals)
{
    int loop = epoll_create1(EPOLL_CLOEXEC), ret;

    ret = watch(loop, qcow2rs_queue_completion_fd(copy->queue), COMPLETIONS);
    if (ret == 0) {
        ret = watch(loop, signals, SIGNAL);
    }
    while (ret == 0 && qcow2rs_queue_in_flight(copy->queue) > 0) {
        struct epoll_event event;

        /* What was prepared goes to the kernel in one system call. */
        if (qcow2rs_queue_submit(copy->queue) < 0) {
            ret = failed("submit", qcow2rs_error_message());
        } else if (epoll_wait(loop, &event, 1, -1) < 0) {
            ret = errno == EINTR ? 0 : failed("event loop", strerror(errno));
        } else if (event.data.u32 == SIGNAL) {
            ret = failed("copy", "interrupted");
        } else {
            ret = reap(copy);
        }
    }
    if (loop >= 0) {
        close(loop);
    }
    return ret;
}

static int copy_disk(struct qcow2rs_image *img, int out, uint32_t depth)
{
    struct copy copy = {.out = out, .size = (uint64_t)qcow2rs_get_size(img)};
    struct qcow2rs_queue_opts *opts = NULL;
    struct piece *pieces = calloc(depth, sizeof(*pieces));
    unsigned char *memory = aligned_alloc(4096, (size_t)depth * PIECE);
    sigset_t set;
    int signals, ret = -1;
    uint32_t i;

    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (pieces == NULL || memory == NULL) {
        failed("memory", strerror(ENOMEM));
    } else if (qcow2rs_queue_opts_new(&opts) < 0 ||
               qcow2rs_queue_opts_set_depth(opts, depth) < 0 ||
               qcow2rs_queue_create(img, opts, &copy.queue) < 0) {
        failed("queue", qcow2rs_error_message());
    } else {
        for (i = 0, ret = 0; i < depth && ret == 0; i++) {
            pieces[i].data = memory + (size_t)i * PIECE;
            ret = start(&copy, &pieces[i]);
        }
        if (ret == 0) {
            ret = run(&copy, signals);
        }
        if (ret == 0) {
            printf("%" PRIu64 " bytes, %" PRIu64 " batches, by %s\n", copy.size,
                   copy.batches, qcow2rs_queue_engine(copy.queue));
        }
    }
    /* Waits for what is still in flight: after it, the buffers are ours. */
    qcow2rs_queue_destroy(&copy.queue);
    qcow2rs_queue_opts_free(&opts);
    if (signals >= 0) {
        close(signals);
    }
    free(memory);
    free(pieces);
    return ret;
}

static struct qcow2rs_image *open_image(const char *path)
{
    struct qcow2rs_open_opts *opts = NULL;
    struct qcow2rs_image *img = NULL;

    /* The files that it names are opened: only for images that you trust. */
    if (qcow2rs_open_opts_new(&opts) < 0 ||
        qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_PATHS, NULL, NULL) < 0 ||
        qcow2rs_open_path(path, opts, &img) < 0) {
        failed(path, qcow2rs_error_message());
    }
    qcow2rs_open_opts_free(&opts);
    return img;
}

int main(int argc, char **argv)
{
    unsigned long depth = 32;
    struct qcow2rs_image *img;
    int option, out, ret = -1;

    while ((option = getopt(argc, argv, "d:")) != -1) {
        depth = option == 'd' ? strtoul(optarg, NULL, 10) : 0;
    }
    if (argc - optind != 2 || depth < 1 || depth > 1024) {
        fputs("usage: epoll [-d DEPTH] IMAGE COPY\n"
              "  -d  requests in flight, 1 to 1024 (default: 32)\n",
              stderr);
        return 2;
    }
    img = open_image(argv[optind]);
    if (img == NULL) {
        return 1;
    }
    out = open(argv[optind + 1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (out < 0) {
        failed(argv[optind + 1], strerror(errno));
    } else {
        ret = copy_disk(img, out, (uint32_t)depth);
        if (close(out) < 0) {
            ret = failed(argv[optind + 1], strerror(errno));
        }
    }
    if (qcow2rs_close(&img) < 0) {
        ret = failed("close", qcow2rs_error_message());
    }
    return ret < 0 || fflush(stdout) != 0 ? 1 : 0;
}
