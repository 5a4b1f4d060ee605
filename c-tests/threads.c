/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Many threads, one image; and a close that comes while a call is inside. */
#include <semaphore.h>

#include "disk.h"

#define SIZE (4u << 20)
#define THREADS 8
#define ROUNDS 60
#define SHARE (SIZE / THREADS)

struct worker {
    struct qcow2rs_image *img;
    pthread_t thread;
    unsigned number;
};

/* Each has a share of the disk of its own, with clusters that it shares with
 * its neighbours at both ends. */
static void *work(void *opaque)
{
    struct worker *w = opaque;
    uint64_t start = (uint64_t)w->number * SHARE + 1000 * w->number;
    size_t length = SHARE - 10000;
    unsigned char *mine = calloc(1, length), *read = malloc(length);
    unsigned seed = w->number + 1;
    struct qcow2rs_extent extents[16];
    struct qcow2rs_stats stats;
    struct qcow2rs_info info;
    int round;

    CHECK(mine != NULL && read != NULL);
    for (round = 0; round < ROUNDS; round++) {
        size_t at, n;

        seed = seed * 1103515245u + 12345u;
        at = (seed >> 8) % length;
        n = (seed >> 4) % (length - at) + 1;
        if (round % 5 == 4) {
            CHECK_OK(qcow2rs_write_zeroes(w->img, start + at, n,
                                          QCOW2RS_ZERO_MAY_UNMAP));
            memset(mine + at, 0, n);
        } else {
            fill(mine + at, n, seed);
            CHECK_OK(qcow2rs_pwrite(w->img, mine + at, n, start + at, 0));
        }
        CHECK_OK(qcow2rs_pread(w->img, read, length, start, 0));
        CHECK(memcmp(mine, read, length) == 0);
        CHECK(qcow2rs_block_status(w->img, start, length, 0, extents, 16) > 0);
        CHECK_OK(qcow2rs_get_info(w->img, &info, sizeof(info)));
        CHECK_OK(qcow2rs_get_stats(w->img, &stats, sizeof(stats)));
        CHECK_EQ(qcow2rs_get_size(w->img), SIZE);
        if (round % 7 == 6) {
            CHECK_OK(qcow2rs_flush(w->img));
        }
        /* An error is this thread's alone. */
        CHECK_ERR(qcow2rs_pread(w->img, read, 1, SIZE + w->number, 0), EINVAL);
    }
    free(mine);
    free(read);
    return NULL;
}

static void many(struct qcow2rs_image *img)
{
    struct worker workers[THREADS];
    unsigned i;

    for (i = 0; i < THREADS; i++) {
        workers[i].img = img;
        workers[i].number = i;
        CHECK_EQ(pthread_create(&workers[i].thread, NULL, work, &workers[i]),
                 0);
    }
    for (i = 0; i < THREADS; i++) {
        CHECK_EQ(pthread_join(workers[i].thread, NULL), 0);
    }
}

static void in_a_file(void)
{
    char *path = temp_path("image");
    struct qcow2rs_image *img = new_image(path, SIZE);

    many(img);
    CHECK_OK(qcow2rs_close(&img));
    free(path);
}

static void in_memory(uint32_t flags)
{
    struct qcow2rs_image *img;
    struct memory m;

    memory_init(&m);
    img = memory_image(&m, SIZE, flags);
    many(img);
    CHECK_OK(qcow2rs_close(&img));
    if (flags & QCOW2RS_IO_SERIALIZED) {
        CHECK_EQ(m.most, 1);
    }
    memory_destroy(&m);
}

/* -------------------------------------------------------------- a slow storage */
static sem_t entered, leave;

static int slow_preadv(void *opaque, const struct iovec *iov, int iovcnt,
                       uint64_t offset)
{
    sem_post(&entered);
    while (sem_wait(&leave) != 0) {
        CHECK_EQ(errno, EINTR);
    }
    return memory_preadv(opaque, iov, iovcnt, offset);
}

static void *read_slowly(void *img)
{
    unsigned char buf[512];

    CHECK_OK(qcow2rs_pread(img, buf, sizeof(buf), 0, 0));
    return NULL;
}

static void busy(void)
{
    struct qcow2rs_open_opts *opts = new_open_opts(0);
    struct qcow2rs_io_ops ops = memory_ops;
    struct qcow2rs_image *img, *same;
    struct qcow2rs_storage *storage;
    struct qcow2rs_info info;
    struct qcow2rs_stats stats;
    struct qcow2rs_check_result found;
    pthread_t thread;
    struct memory m;

    memory_init(&m);
    m.length = SIZE;
    CHECK_EQ(sem_init(&entered, 0, 0), 0);
    CHECK_EQ(sem_init(&leave, 0, 1), 0);
    ops.preadv = slow_preadv;
    CHECK_OK(qcow2rs_storage_from_callbacks(&ops, &m, 0, &storage));
    CHECK_OK(qcow2rs_open_opts_set_format(opts, QCOW2RS_FORMAT_RAW));
    CHECK_OK(qcow2rs_open(&storage, opts, &img));
    while (sem_trywait(&entered) == 0) {
    }
    while (sem_trywait(&leave) == 0) {
    }

    same = img;
    CHECK_EQ(pthread_create(&thread, NULL, read_slowly, img), 0);
    CHECK_EQ(sem_wait(&entered), 0);
    /* Everything that needs the image for itself has to wait... */
    CHECK_ERR(qcow2rs_close(&img), EBUSY);
    CHECK(img == same);
    CHECK_ERR(qcow2rs_abandon(&img), EBUSY);
    CHECK(img == same);
    CHECK_ERR(qcow2rs_invalidate(img), EBUSY);
    CHECK_ERR(qcow2rs_reopen(img, QCOW2RS_OPEN_RDWR), EBUSY);
    CHECK_ERR(qcow2rs_check(img, 0, &found, sizeof(found), NULL, NULL, NULL),
              EBUSY);
    /* ...and questions do not. */
    CHECK_EQ(qcow2rs_get_size(img), SIZE);
    CHECK_OK(qcow2rs_get_info(img, &info, sizeof(info)));
    CHECK_OK(qcow2rs_get_stats(img, &stats, sizeof(stats)));
    CHECK_EQ(sem_post(&leave), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(m.closed, 0);
    CHECK_OK(qcow2rs_close(&img));
    CHECK_EQ(m.closed, 1);
    qcow2rs_open_opts_free(&opts);
    memory_destroy(&m);
}

int main(void)
{
    in_a_file();
    in_memory(0);
    in_memory(QCOW2RS_IO_SERIALIZED);
    busy();
    return 0;
}
