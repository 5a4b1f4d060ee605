/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Queues: each function and each of its errors, with io_uring and without; and an
 * event loop that does nothing but wait for descriptors. */
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <time.h>

#include "disk.h"

#define SIZE (4u << 20)
#define BLOCK 4096u

/* "io_uring" or "blocking"; NULL: the default. */
static const char *engine;

static struct qcow2rs_queue *new_queue(struct qcow2rs_image *img, uint32_t depth)
{
    struct qcow2rs_queue_opts *opts;
    struct qcow2rs_queue *q;

    CHECK_OK(qcow2rs_queue_opts_new(&opts));
    CHECK_OK(qcow2rs_queue_opts_set_depth(opts, depth));
    if (engine != NULL) {
        CHECK_OK(qcow2rs_queue_opts_set(opts, "engine", engine));
    }
    CHECK_OK(qcow2rs_queue_create(img, opts, &q));
    if (engine != NULL) {
        CHECK_STR(qcow2rs_queue_engine(q), engine);
    }
    qcow2rs_queue_opts_free(&opts);
    return q;
}

/* The one completion in flight. */
static struct qcow2rs_completion one(struct qcow2rs_queue *q)
{
    struct qcow2rs_completion c;

    memset(&c, 0xff, sizeof(c));
    CHECK_EQ(qcow2rs_queue_in_flight(q), 1);
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, -1), 1);
    CHECK_EQ(c.reserved, 0);
    CHECK_EQ(c.ret < 0, c.error_message != NULL);
    CHECK_EQ(qcow2rs_queue_in_flight(q), 0);
    return c;
}

static void succeeds(struct qcow2rs_queue *q, void *user_data)
{
    struct qcow2rs_completion c = one(q);

    if (c.ret < 0) {
        CHECK_FAILED("completed with %d: %s", c.ret, c.error_message);
    }
    CHECK(c.user_data == user_data);
    CHECK_EQ(c.ret, 0);
    CHECK_EQ(c.error_code, 0);
}

static void fails(struct qcow2rs_queue *q, int errno_value)
{
    struct qcow2rs_completion c = one(q);

    CHECK_EQ(c.ret, -errno_value);
    CHECK(c.error_message[0] != '\0');
}

static bool readable(int fd, int timeout)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};

    /* The kernel interrupts, without a signal, to complete what was submitted. */
    while (poll(&p, 1, timeout) < 0) {
        CHECK_EQ(errno, EINTR);
    }
    return p.revents == POLLIN;
}

static void options(void)
{
    struct qcow2rs_queue_opts *opts = NULL;

    CHECK_ERR(qcow2rs_queue_opts_new(NULL), EINVAL);
    CHECK_OK(qcow2rs_queue_opts_new(&opts));
    CHECK_ERR(qcow2rs_queue_opts_set_depth(NULL, 1), EINVAL);
    CHECK_ERR(qcow2rs_queue_opts_set_depth(opts, 0), EINVAL);
    CHECK_ERR(qcow2rs_queue_opts_set_depth(opts, 65537), EINVAL);
    CHECK_OK(qcow2rs_queue_opts_set_depth(opts, 65536));
    CHECK_ERR(qcow2rs_queue_opts_set(NULL, "engine", "auto"), EINVAL);
    CHECK_ERR(qcow2rs_queue_opts_set(opts, NULL, "auto"), EINVAL);
    CHECK_ERR(qcow2rs_queue_opts_set(opts, "engine", NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_opts_set(opts, "engine", "threads"), EINVAL);
    CHECK_ERR(qcow2rs_queue_opts_set(opts, "completion-fd", "1"), EINVAL);
    CHECK_ERR(qcow2rs_queue_opts_set(opts, "engines", "auto"), ENOENT);
    CHECK_OK(qcow2rs_queue_opts_set(opts, "engine", "auto"));
    CHECK_OK(qcow2rs_queue_opts_set(opts, "completion-fd", "on"));
    qcow2rs_queue_opts_free(&opts);
    CHECK(opts == NULL);
    qcow2rs_queue_opts_free(&opts);
    qcow2rs_queue_opts_free(NULL);
    CHECK_EQ(qcow2rs_has_feature("io_uring"), 1);
}

static void misuse(struct qcow2rs_image *img)
{
    struct qcow2rs_completion c[2];
    struct qcow2rs_queue *q = NULL;
    struct iovec bad = {NULL, 1};
    char buf[4];

    CHECK_ERR(qcow2rs_queue_create(NULL, NULL, &q), EINVAL);
    CHECK_ERR(qcow2rs_queue_create(img, NULL, NULL), EINVAL);
    q = new_queue(img, 2);
    CHECK_ERR(qcow2rs_queue_pread(NULL, buf, 4, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_pread(q, NULL, 4, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_pread(q, buf, 4, 0, 1, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_pread(q, buf, SIZE_MAX, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_preadv(q, NULL, 1, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_preadv(q, &bad, 1, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_preadv(q, &bad, -1, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_pwrite(q, NULL, 4, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_pwrite(q, buf, 4, 0, 1u << 31, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_pwritev(q, &bad, 1, 0, 0, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_write_zeroes(q, 0, 1, 1u << 31, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_discard(q, 0, 1, 1, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_flush(q, 1, NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_submit(NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_reap(NULL, c, 1), EINVAL);
    CHECK_ERR(qcow2rs_queue_reap(q, NULL, 1), EINVAL);
    CHECK_ERR(qcow2rs_queue_reap(q, c, -1), EINVAL);
    CHECK_ERR(qcow2rs_queue_wait(q, NULL, 0, 1, 0), EINVAL);
    CHECK_ERR(qcow2rs_queue_wait(q, c, -1, 1, 0), EINVAL);
    CHECK_ERR(qcow2rs_queue_wait(q, c, 1, 1, 0), EINVAL);
    CHECK_ERR(qcow2rs_queue_wakeup(NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_completion_fd(NULL), EINVAL);
    CHECK_ERR(qcow2rs_queue_set_completion_fd_enabled(NULL, true), EINVAL);
    CHECK(qcow2rs_queue_engine(NULL) == NULL);
    CHECK_EQ(qcow2rs_queue_in_flight(NULL), 0);
    /* None of those was accepted. */
    CHECK_EQ(qcow2rs_queue_in_flight(q), 0);
    CHECK_EQ(qcow2rs_queue_submit(q), 0);
    CHECK_EQ(qcow2rs_queue_reap(q, c, 2), 0);
    CHECK_EQ(qcow2rs_queue_reap(q, NULL, 0), 0);
    qcow2rs_queue_destroy(&q);
    CHECK(q == NULL);
    qcow2rs_queue_destroy(&q);
    qcow2rs_queue_destroy(NULL);
}

static void requests(struct qcow2rs_image *img)
{
    static unsigned char data[200000], read[SIZE], expected[SIZE];
    struct qcow2rs_queue *q = new_queue(img, 4);
    struct iovec out[2] = {{data, 70000}, {data + 70000, 130000}};
    struct iovec in[3] = {{read, 1}, {read + 1, SIZE / 2}, {0, SIZE / 2 - 1}};
    int tag;

    in[2].iov_base = read + 1 + SIZE / 2;
    fill(data, sizeof(data), 1);
    CHECK_OK(qcow2rs_queue_pwrite(q, data, sizeof(data), 1000, 0, &tag));
    CHECK_EQ(qcow2rs_queue_submit(q), 1);
    CHECK_EQ(qcow2rs_queue_submit(q), 0);
    succeeds(q, &tag);
    CHECK_OK(qcow2rs_queue_pwritev(q, out, 2, SIZE - 200000, QCOW2RS_IO_FUA, q));
    succeeds(q, q);
    CHECK_OK(qcow2rs_queue_write_zeroes(q, 5000, 100000, QCOW2RS_ZERO_MAY_UNMAP,
                                        NULL));
    succeeds(q, NULL);
    CHECK_OK(qcow2rs_queue_discard(q, 1u << 20, 1u << 20, 0, NULL));
    succeeds(q, NULL);
    CHECK_OK(qcow2rs_queue_flush(q, 0, NULL));
    succeeds(q, NULL);
    memcpy(expected + 1000, data, sizeof(data));
    memset(expected + 5000, 0, 100000);
    memcpy(expected + SIZE - 200000, data, sizeof(data));
    CHECK_OK(qcow2rs_queue_preadv(q, in, 3, 0, 0, NULL));
    succeeds(q, NULL);
    CHECK(memcmp(read, expected, SIZE) == 0);
    memset(read, 0xff, SIZE);
    CHECK_OK(qcow2rs_queue_pread(q, read, SIZE, 0, 0, NULL));
    succeeds(q, NULL);
    CHECK(memcmp(read, expected, SIZE) == 0);
    CHECK_OK(qcow2rs_queue_preadv(q, NULL, 0, SIZE, 0, NULL));
    succeeds(q, NULL);

    /* Failures are completions. */
    CHECK_OK(qcow2rs_queue_pread(q, read, 2, SIZE - 1, 0, NULL));
    fails(q, EINVAL);
    CHECK_OK(qcow2rs_queue_pwrite(q, read, 2, SIZE - 1, 0, NULL));
    fails(q, EINVAL);
    CHECK_OK(qcow2rs_queue_pwrite(q, read, 512, 0, QCOW2RS_IO_COMPRESSED,
                                  NULL));
    fails(q, EINVAL);
    CHECK_OK(qcow2rs_queue_discard(q, SIZE, 512, 0, NULL));
    fails(q, EINVAL);
    qcow2rs_queue_destroy(&q);
}

/* Messages live until the next reap or wait. */
static void messages(struct qcow2rs_image *img)
{
    struct qcow2rs_completion c[3];
    struct qcow2rs_queue *q = new_queue(img, 3);
    char buf[1];
    int i, n;

    for (i = 0; i < 3; i++) {
        CHECK_OK(qcow2rs_queue_pread(q, buf, 1, SIZE + (uint64_t)i, 0, &c[i]));
    }
    for (n = 0; n < 3;) {
        i = qcow2rs_queue_wait(q, c + n, 3 - n, 3 - n, -1);
        CHECK_OK(i);
        CHECK(n == 0 || i == 3);
        n += i;
    }
    for (i = 0; i < 3; i++) {
        CHECK_EQ(c[i].ret, -EINVAL);
        CHECK(strstr(c[i].error_message, "do not lie on the disk") != NULL);
    }
    qcow2rs_queue_destroy(&q);
}

static void full(struct qcow2rs_image *img)
{
    struct qcow2rs_completion c[2];
    struct qcow2rs_queue *q = new_queue(img, 2);
    char buf[2][512];
    int tag, reaped = 0;

    CHECK_OK(qcow2rs_queue_pread(q, buf[0], 512, 0, 0, NULL));
    CHECK_OK(qcow2rs_queue_pread(q, buf[1], 512, 0, 0, NULL));
    CHECK_ERR(qcow2rs_queue_flush(q, 0, &tag), EAGAIN);
    CHECK_EQ(qcow2rs_queue_submit(q), 2);
    CHECK_ERR(qcow2rs_queue_flush(q, 0, &tag), EAGAIN);
    CHECK_ERR(qcow2rs_queue_wait(q, c, 3, 2, -1), EINVAL);
    while (reaped < 2) {
        int n = qcow2rs_queue_reap(q, c, 2);

        CHECK_OK(n);
        reaped += n;
        CHECK_EQ(qcow2rs_queue_in_flight(q), 2 - reaped);
        CHECK(n == 0 || c[0].user_data == NULL);
    }
    CHECK_OK(qcow2rs_queue_flush(q, 0, &tag));
    succeeds(q, &tag);
    qcow2rs_queue_destroy(&q);
}

/* Nobody calls wait: the descriptor alone says when to reap. */
static void event_loop(struct qcow2rs_image *img)
{
    enum { DEPTH = 16, TOTAL = 400 };
    static unsigned char bufs[DEPTH][BLOCK];
    struct qcow2rs_queue *q = new_queue(img, DEPTH);
    struct epoll_event event = {.events = EPOLLIN};
    struct qcow2rs_completion c[DEPTH / 2];
    int fd = qcow2rs_queue_completion_fd(q);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int started, done = 0, i, n;

    CHECK_OK(fd);
    CHECK_EQ(fcntl(fd, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    CHECK_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
    CHECK_OK(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    for (started = 0; started < DEPTH; started++) {
        fill(bufs[started], BLOCK, 7);
        CHECK_OK(qcow2rs_queue_pwrite(q, bufs[started], BLOCK,
                                      BLOCK * (uint64_t)started, 0,
                                      bufs[started]));
    }
    while (done < TOTAL) {
        CHECK_OK(qcow2rs_queue_submit(q));
        do {
            n = epoll_wait(epoll, &event, 1, 60000);
        } while (n < 0 && errno == EINTR);
        CHECK_EQ(n, 1);
        n = qcow2rs_queue_reap(q, c, DEPTH / 2);
        CHECK_OK(n);
        for (i = 0; i < n; i++) {
            uint64_t at = BLOCK * (uint64_t)(started % 500);
            unsigned char *buf = c[i].user_data;

            CHECK_EQ(c[i].ret, 0);
            done++;
            if (started == TOTAL) {
                continue;
            }
            switch (started++ % 10) {
            case 0: CHECK_OK(qcow2rs_queue_flush(q, 0, buf)); break;
            case 1: case 2: case 3:
                CHECK_OK(qcow2rs_queue_pread(q, buf, BLOCK, at, 0, buf));
                break;
            case 4:
                CHECK_OK(qcow2rs_queue_discard(q, at, BLOCK, 0, buf));
                break;
            default:
                CHECK_OK(qcow2rs_queue_pwrite(q, buf, BLOCK, at, 0, buf));
                break;
            }
        }
    }
    CHECK_EQ(qcow2rs_queue_in_flight(q), 0);
    CHECK_EQ(qcow2rs_queue_reap(q, c, 1), 0);
    CHECK(!readable(fd, 0));
    close(epoll);
    qcow2rs_queue_destroy(&q);
}

static void descriptor(struct qcow2rs_image *img)
{
    struct qcow2rs_queue *q = new_queue(img, 4);
    struct qcow2rs_queue_opts *opts;
    struct qcow2rs_completion c;
    int fd = qcow2rs_queue_completion_fd(q);
    eventfd_t count;
    char buf[512];
    int i;

    CHECK(!readable(fd, 0));
    CHECK_OK(qcow2rs_queue_set_completion_fd_enabled(q, false));
    CHECK_OK(qcow2rs_queue_pread(q, buf, 512, 0, 0, NULL));
    CHECK_EQ(qcow2rs_queue_submit(q), 1);
    CHECK(!readable(fd, 20));
    CHECK_OK(qcow2rs_queue_set_completion_fd_enabled(q, true));
    CHECK(readable(fd, 60000));
    succeeds(q, NULL);
    /* Reading it does no harm. */
    for (i = 0; i < 2; i++) {
        CHECK_OK(qcow2rs_queue_pread(q, buf, 512, 0, 0, NULL));
    }
    CHECK_OK(qcow2rs_queue_submit(q));
    CHECK(readable(fd, 60000));
    CHECK_EQ(eventfd_read(fd, &count), 0);
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, -1), 1);
    CHECK(readable(fd, 60000));
    succeeds(q, NULL);
    qcow2rs_queue_destroy(&q);

    CHECK_OK(qcow2rs_queue_opts_new(&opts));
    CHECK_OK(qcow2rs_queue_opts_set(opts, "completion-fd", "off"));
    CHECK_OK(qcow2rs_queue_create(img, opts, &q));
    CHECK_ERR(qcow2rs_queue_completion_fd(q), ENOTSUP);
    CHECK_ERR(qcow2rs_queue_set_completion_fd_enabled(q, true), ENOTSUP);
    CHECK_OK(qcow2rs_queue_flush(q, 0, NULL));
    succeeds(q, NULL);
    qcow2rs_queue_opts_free(&opts);
    qcow2rs_queue_destroy(&q);
}

/* ----------------------------------------------------- what ends a wait early */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static atomic_int at_gate;

static int gated_flush(void *opaque)
{
    atomic_store(&at_gate, 1);
    CHECK_EQ(pthread_mutex_lock(&gate), 0);
    CHECK_EQ(pthread_mutex_unlock(&gate), 0);
    return memory_flush(opaque);
}

static void *flush(void *img)
{
    CHECK_OK(qcow2rs_flush(img));
    return NULL;
}

static void *wake(void *q)
{
    struct timespec time = {0, 20000000};

    nanosleep(&time, NULL);
    CHECK_OK(qcow2rs_queue_wakeup(q));
    return NULL;
}

static void on_alarm(int signal)
{
    (void)signal;
}

static void held_up(void)
{
    struct sigaction action = {.sa_handler = on_alarm}, before;
    struct itimerval timer = {{0, 20000}, {0, 20000}}, none = {{0, 0}, {0, 0}};
    struct qcow2rs_create_opts *opts = new_create_opts(SIZE);
    struct qcow2rs_io_ops ops = memory_ops;
    struct qcow2rs_storage *storage;
    struct qcow2rs_completion c;
    struct qcow2rs_image *img;
    struct qcow2rs_queue *q;
    pthread_t flusher, waker;
    struct memory m;
    char buf[1] = {1};
    int ret;

    memory_init(&m);
    ops.flush = gated_flush;
    CHECK_OK(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage));
    CHECK_OK(qcow2rs_create(&storage, opts, NULL, &img));
    qcow2rs_create_opts_free(&opts);
    CHECK_OK(qcow2rs_pwrite(img, buf, 1, 0, 0));
    q = new_queue(img, 1);

    CHECK_EQ(pthread_mutex_lock(&gate), 0);
    atomic_store(&at_gate, 0);
    CHECK_EQ(pthread_create(&flusher, NULL, flush, img), 0);
    while (atomic_load(&at_gate) == 0) {
        sched_yield();
    }
    CHECK_OK(qcow2rs_queue_flush(q, 0, NULL));
    CHECK_OK(qcow2rs_queue_submit(q));
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, 0), 0);
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, 20000000), 0);
    CHECK_OK(qcow2rs_queue_wakeup(q));
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, -1), 0);
    CHECK_EQ(pthread_create(&waker, NULL, wake, q), 0);
    CHECK_EQ(qcow2rs_queue_wait(q, &c, 1, 1, -1), 0);
    CHECK_EQ(pthread_join(waker, NULL), 0);
    /* A signal, which another thread may get, again and again. */
    CHECK_EQ(sigaction(SIGALRM, &action, &before), 0);
    CHECK_EQ(setitimer(ITIMER_REAL, &timer, NULL), 0);
    CHECK_ERR(qcow2rs_queue_wait(q, &c, 1, 1, -1), EINTR);
    CHECK_EQ(setitimer(ITIMER_REAL, &none, NULL), 0);
    CHECK_EQ(sigaction(SIGALRM, &before, NULL), 0);
    /* [EXCL] calls see it. */
    CHECK_ERR(qcow2rs_reopen(img, 0), EBUSY);
    CHECK_EQ(pthread_mutex_unlock(&gate), 0);
    do {
        ret = qcow2rs_queue_wait(q, &c, 1, 1, -1);
    } while (ret == 0);
    CHECK_EQ(ret, 1);
    CHECK_EQ(c.ret, 0);
    CHECK_EQ(pthread_join(flusher, NULL), 0);
    qcow2rs_queue_destroy(&q);
    CHECK_OK(qcow2rs_close(&img));
    memory_destroy(&m);
}

/* ------------------------------------------------------------------ the image */
static void read_only(const char *path)
{
    struct qcow2rs_image *img = open_image(path, 0);
    struct qcow2rs_queue *q = new_queue(img, 4);
    char buf[512] = {0};

    CHECK_OK(qcow2rs_queue_pwrite(q, buf, 512, 0, 0, NULL));
    fails(q, EROFS);
    CHECK_OK(qcow2rs_queue_write_zeroes(q, 0, 512, 0, NULL));
    fails(q, EROFS);
    CHECK_OK(qcow2rs_queue_discard(q, 0, 512, 0, NULL));
    fails(q, EROFS);
    CHECK_OK(qcow2rs_queue_flush(q, 0, NULL));
    succeeds(q, NULL);
    /* An idle queue survives. */
    CHECK_OK(qcow2rs_queue_flush(q, 0, NULL));
    CHECK_ERR(qcow2rs_invalidate(img), EBUSY);
    succeeds(q, NULL);
    CHECK_OK(qcow2rs_invalidate(img));
    CHECK_OK(qcow2rs_reopen(img, QCOW2RS_OPEN_RDWR));
    CHECK_OK(qcow2rs_queue_pwrite(q, buf, 512, 0, 0, NULL));
    succeeds(q, NULL);
    qcow2rs_queue_destroy(&q);
    CHECK_OK(qcow2rs_close(&img));
}

/* A queue that goes carries out what it accepted; what is nobody's is dropped. */
static void destroyed(struct qcow2rs_image *img)
{
    static unsigned char data[8][BLOCK], read[BLOCK];
    struct qcow2rs_queue *q = new_queue(img, 8);
    int i;

    for (i = 0; i < 8; i++) {
        fill(data[i], BLOCK, 200u + (unsigned)i);
        CHECK_OK(qcow2rs_queue_pwrite(q, data[i], BLOCK, BLOCK * (uint64_t)i, 0,
                                      data[i]));
        if (i == 3) {
            CHECK_EQ(qcow2rs_queue_submit(q), 4);
        }
    }
    CHECK_EQ(qcow2rs_queue_in_flight(q), 8);
    qcow2rs_queue_destroy(&q);
    CHECK(q == NULL);
    for (i = 0; i < 8; i++) {
        CHECK_OK(qcow2rs_pread(img, read, BLOCK, BLOCK * (uint64_t)i, 0));
        CHECK(memcmp(read, data[i], BLOCK) == 0);
    }
}

/* Nothing is left of a queue that there are no descriptors for. */
static void few_descriptors(struct qcow2rs_image *img)
{
    struct qcow2rs_queue *q = NULL, *made[64];
    struct rlimit before, few;
    int i, count, round, counts[2] = {0, 0};

    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    few = before;
    few.rlim_cur = 32;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
    for (round = 0; round < 2; round++) {
        for (count = 0; count < 64; count++) {
            int ret = qcow2rs_queue_create(img, NULL, &made[count]);

            if (ret < 0) {
                CHECK_EQ(ret, -EMFILE);
                CHECK(made[count] == NULL);
                break;
            }
        }
        CHECK(count > 0 && count < 64);
        counts[round] = count;
        for (i = 0; i < count; i++) {
            qcow2rs_queue_destroy(&made[i]);
        }
    }
    CHECK_EQ(counts[0], counts[1]);
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    q = new_queue(img, 1);
    CHECK_OK(qcow2rs_queue_flush(q, 0, NULL));
    succeeds(q, NULL);
    qcow2rs_queue_destroy(&q);
}

/* Close and abandon take the queues along. */
static void with_the_image(const char *path)
{
    static unsigned char data[8][BLOCK], read[BLOCK];
    struct qcow2rs_image *img = open_image(path, QCOW2RS_OPEN_RDWR);
    struct qcow2rs_queue *q[2] = {new_queue(img, 8), new_queue(img, 8)}, *gone;
    int i;

    for (i = 0; i < 8; i++) {
        fill(data[i], BLOCK, 100u + (unsigned)i);
        CHECK_OK(qcow2rs_queue_pwrite(q[i % 2], data[i], BLOCK,
                                      BLOCK * (uint64_t)i, 0, NULL));
    }
    CHECK_OK(qcow2rs_queue_submit(q[0]));
    CHECK_OK(qcow2rs_close(&img));
    /* To be late is no accident. */
    gone = q[0];
    CHECK_ERR(qcow2rs_queue_submit(gone), EINVAL);
    qcow2rs_queue_destroy(&gone);
    CHECK(gone == NULL);

    img = open_image(path, QCOW2RS_OPEN_RDWR);
    for (i = 0; i < 8; i++) {
        CHECK_OK(qcow2rs_pread(img, read, BLOCK, BLOCK * (uint64_t)i, 0));
        CHECK(memcmp(read, data[i], BLOCK) == 0);
    }
    q[0] = new_queue(img, 8);
    CHECK_OK(qcow2rs_queue_pwrite(q[0], data[7], BLOCK, 0, 0, NULL));
    CHECK_OK(qcow2rs_abandon(&img));
    img = open_image(path, 0);
    CHECK_OK(qcow2rs_pread(img, read, BLOCK, 0, 0));
    CHECK(memcmp(read, data[0], BLOCK) == 0);
    CHECK_OK(qcow2rs_close(&img));
}

/* A blocking call that only its own thread's queue could let go on. */
static void deadlock(const char *path)
{
    struct qcow2rs_image *img = open_image(path, QCOW2RS_OPEN_RDWR);
    struct qcow2rs_queue *q = new_queue(img, 2);
    char buf[512] = {5};
    int ret;

    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 0, 0));
    CHECK_OK(qcow2rs_queue_flush(q, 0, NULL));
    CHECK_OK(qcow2rs_queue_submit(q));
    CHECK_OK(qcow2rs_pwrite(img, buf, sizeof(buf), 512, 0));
    ret = qcow2rs_flush(img);
    if (strcmp(qcow2rs_queue_engine(q), "io_uring") == 0) {
        CHECK_EQ(ret, -EDEADLK);
    } else {
        /* There nothing stays in flight. */
        CHECK_EQ(ret, 0);
    }
    succeeds(q, NULL);
    CHECK_OK(qcow2rs_flush(img));
    qcow2rs_queue_destroy(&q);
    CHECK_OK(qcow2rs_close(&img));
}

static void all(void)
{
    char *path = temp_path("image");
    struct qcow2rs_image *img = new_image(path, SIZE);

    misuse(img);
    requests(img);
    messages(img);
    full(img);
    event_loop(img);
    descriptor(img);
    destroyed(img);
    few_descriptors(img);
    CHECK_OK(qcow2rs_close(&img));
    read_only(path);
    with_the_image(path);
    deadlock(path);
    held_up();
    free(path);
}

/* QCOW2RS_TEST_ENGINE: that engine only. */
int main(void)
{
    const char *only = getenv("QCOW2RS_TEST_ENGINE");
    char *path = temp_path("probe");
    struct qcow2rs_image *img = new_image(path, SIZE);
    struct qcow2rs_queue *q = new_queue(img, 1);
    bool has_ring = strcmp(qcow2rs_queue_engine(q), "io_uring") == 0;

    qcow2rs_queue_destroy(&q);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
    options();
    if (only != NULL) {
        engine = only;
        all();
        return 0;
    }
    if (has_ring) {
        engine = "io_uring";
        all();
    }
    engine = "blocking";
    all();
    return 0;
}
