/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * An I/O engine for fio: jobs run on the disk in an image, through a queue for each
 * job. To build it, a tree of fio's source is needed in which fio itself has been
 * built, since an engine shares fio's structs; it works with that very fio:
 *
 *     ./configure && make                         # in the tree of fio
 *     cc -shared -fPIC -O2 -D_GNU_SOURCE -I "$FIO_SRC" \
 *         -include "$FIO_SRC/config-host.h" -o fio-qcow2rs.so fio-qcow2rs.c \
 *         $(pkg-config --cflags --libs qcow2rs)
 *     "$FIO_SRC/fio" --ioengine=external:./fio-qcow2rs.so --filename=disk.qcow2 \
 *         --name=job --rw=randrw --bs=4k --iodepth=32 --direct=1
 *
 * scripts/fio.sh does all that, and runs a job that verifies what it wrote.
 *
 *   filename      the image; the files that it names are opened, too
 *   direct=1      O_DIRECT, for them as well
 *   iodepth       requests in flight: the depth of the queue
 *   queue_engine  auto (the default), io_uring or blocking
 *
 * Reads, writes, trims and syncs. Jobs that are threads (thread=1) share an image,
 * each with a queue of its own; jobs that are processes cannot write to the same one.
 */
#include "fio.h"
#include "optgroup.h"

#include <qcow2rs.h>

/* The image of a file name, for all jobs of this process. */
struct disk {
    struct disk *next;
    char *name;
    struct qcow2rs_image *image;
    bool writable, direct;
    unsigned users;
};

static struct disk *disks;
static pthread_mutex_t disks_lock = PTHREAD_MUTEX_INITIALIZER;

struct job {
    struct disk *disk;
    struct qcow2rs_queue *queue;
    struct qcow2rs_completion *done; /* iodepth of them: what was taken last */
};

struct options {
    void *pad; /* fio wants no option at the start */
    char *queue_engine;
};

static struct fio_option options[] = {
    {
        .name = "queue_engine",
        .lname = "Engine of the queue",
        .type = FIO_OPT_STR_STORE,
        .off1 = offsetof(struct options, queue_engine),
        .help = "auto, io_uring or blocking",
        .def = "auto",
        .category = FIO_OPT_C_ENGINE,
        .group = FIO_OPT_G_INVALID,
    },
    {
        .name = NULL,
    },
};

/* Tells of an error of the library's, which fio gets to know as an errno. */
static int failed(const char *name, int error)
{
    log_err("qcow2rs: %s: %s\n", name, qcow2rs_error_message());
    return -error;
}

static int open_image(const char *name, bool writable, bool direct,
                      struct qcow2rs_image **image)
{
    struct qcow2rs_open_opts *opts = NULL;
    uint32_t flags = (writable ? QCOW2RS_OPEN_RDWR : 0) |
                     (direct ? QCOW2RS_OPEN_DIRECT : 0);
    int ret = qcow2rs_open_opts_new(&opts);

    if (ret == 0) {
        ret = qcow2rs_open_opts_set_flags(opts, flags);
    }
    if (ret == 0) {
        ret = qcow2rs_open_opts_set_ref_policy(opts, QCOW2RS_REF_PATHS, NULL,
                                               NULL);
    }
    if (ret == 0) {
        ret = qcow2rs_open_path(name, opts, image);
    }
    if (ret < 0) {
        ret = failed(name, ret);
    }
    qcow2rs_open_opts_free(&opts);
    return ret;
}

/* Opens an image, or finds it open; returns an errno. */
static int get_disk(const char *name, bool writable, bool direct,
                    struct disk **out)
{
    struct disk *disk;
    int ret = 0;

    pthread_mutex_lock(&disks_lock);
    for (disk = disks; disk && strcmp(disk->name, name) != 0;) {
        disk = disk->next;
    }
    if (disk) {
        if ((writable && !disk->writable) || direct != disk->direct) {
            log_err("qcow2rs: %s: another job has it open in another way\n",
                    name);
            ret = EBUSY;
        }
    } else if (!(disk = calloc(1, sizeof(*disk))) ||
               !(disk->name = strdup(name))) {
        ret = ENOMEM;
    } else if (!(ret = open_image(name, writable, direct, &disk->image))) {
        disk->writable = writable;
        disk->direct = direct;
        disk->next = disks;
        disks = disk;
    }
    if (ret == 0) {
        disk->users++;
        *out = disk;
    } else if (disk && disk->users == 0) {
        free(disk->name);
        free(disk);
    }
    pthread_mutex_unlock(&disks_lock);
    return ret;
}

/* The last one closes it. */
static void put_disk(struct disk *disk)
{
    struct disk **at;
    int ret;

    pthread_mutex_lock(&disks_lock);
    if (--disk->users == 0) {
        for (at = &disks; *at != disk;) {
            at = &(*at)->next;
        }
        *at = disk->next;
        ret = qcow2rs_close(&disk->image);
        if (ret < 0) {
            failed(disk->name, ret);
        }
        free(disk->name);
        free(disk);
    }
    pthread_mutex_unlock(&disks_lock);
}

/* Before the jobs start: how large are the disks? */
static int setup(struct thread_data *td)
{
    struct qcow2rs_image *image = NULL;
    struct fio_file *file;
    unsigned int i;
    int64_t size;

    for_each_file(td, file, i) {
        int ret = open_image(file->file_name, false, false, &image);

        if (ret != 0) {
            td_verror(td, ret, "open");
            return 1;
        }
        size = qcow2rs_get_size(image);
        ret = qcow2rs_close(&image);
        if (size < 0 || ret < 0) {
            td_verror(td, failed(file->file_name, ret < 0 ? ret : (int)size),
                      "size");
            return 1;
        }
        file->real_file_size = (uint64_t)size;
        fio_file_set_size_known(file);
    }
    return 0;
}

static void cleanup(struct thread_data *td)
{
    struct job *job = td->io_ops_data;

    if (job) {
        qcow2rs_queue_destroy(&job->queue);
        if (job->disk) {
            put_disk(job->disk);
        }
        free(job->done);
        free(job);
        td->io_ops_data = NULL;
    }
}

static int make_queue(struct thread_data *td, struct job *job)
{
    const struct options *wanted = td->eo;
    struct qcow2rs_queue_opts *opts = NULL;
    int ret = qcow2rs_queue_opts_new(&opts);

    if (ret == 0) {
        ret = qcow2rs_queue_opts_set_depth(opts, td->o.iodepth);
    }
    if (ret == 0) {
        ret = qcow2rs_queue_opts_set(opts, "completion-fd", "off");
    }
    if (ret == 0) {
        ret = qcow2rs_queue_opts_set(opts, "engine", wanted->queue_engine);
    }
    if (ret == 0) {
        ret = qcow2rs_queue_create(job->disk->image, opts, &job->queue);
    }
    if (ret < 0) {
        ret = failed(job->disk->name, ret);
    }
    qcow2rs_queue_opts_free(&opts);
    return ret;
}

static int init(struct thread_data *td)
{
    struct job *job = calloc(1, sizeof(*job));
    int ret = ENOMEM;

    td->io_ops_data = job;
    if (td->o.nr_files != 1) {
        log_err("qcow2rs: a job has one image, not %u\n", td->o.nr_files);
        ret = EINVAL;
    } else if (job) {
        job->done = calloc(td->o.iodepth, sizeof(*job->done));
        if (job->done) {
            ret = get_disk(td->files[0]->file_name,
                           td_write(td) || td_trim(td), td->o.odirect,
                           &job->disk);
        }
    }
    if (ret == 0) {
        ret = make_queue(td, job);
    }
    if (ret != 0) {
        td_verror(td, ret, "init");
        cleanup(td);
        return 1;
    }
    return 0;
}

static enum fio_q_status queue(struct thread_data *td, struct io_u *io_u)
{
    struct qcow2rs_queue *q = ((struct job *)td->io_ops_data)->queue;
    int ret;

    fio_ro_check(td, io_u);
    switch (io_u->ddir) {
    case DDIR_READ:
        ret = qcow2rs_queue_pread(q, io_u->xfer_buf, io_u->xfer_buflen,
                                  io_u->offset, 0, io_u);
        break;
    case DDIR_WRITE:
        ret = qcow2rs_queue_pwrite(q, io_u->xfer_buf, io_u->xfer_buflen,
                                   io_u->offset, 0, io_u);
        break;
    case DDIR_TRIM:
        ret = qcow2rs_queue_discard(q, io_u->offset, io_u->xfer_buflen, 0,
                                    io_u);
        break;
    case DDIR_SYNC:
    case DDIR_DATASYNC:
        ret = qcow2rs_queue_flush(q, 0, io_u);
        break;
    default:
        ret = -EINVAL;
    }
    if (ret == 0) {
        return FIO_Q_QUEUED;
    }
    if (ret == -EAGAIN) {
        return FIO_Q_BUSY;
    }
    io_u->error = -ret;
    td_verror(td, -ret, "queue");
    return FIO_Q_COMPLETED;
}

static int commit(struct thread_data *td)
{
    struct job *job = td->io_ops_data;
    int ret = qcow2rs_queue_submit(job->queue);

    return ret < 0 ? -failed(job->disk->name, ret) : 0;
}

static int getevents(struct thread_data *td, unsigned int min,
                     unsigned int max, const struct timespec *t)
{
    struct job *job = td->io_ops_data;
    int64_t timeout = t ? t->tv_sec * 1000000000ll + t->tv_nsec : -1;
    uint32_t in_flight = qcow2rs_queue_in_flight(job->queue);
    int ret;

    max = max < td->o.iodepth ? max : td->o.iodepth;
    min = min < in_flight ? min : in_flight;
    do {
        /* fio's own signals, too, end a wait. */
        ret = min > 0 ? qcow2rs_queue_wait(job->queue, job->done, (int)min,
                                           (int)max, timeout)
                      : qcow2rs_queue_reap(job->queue, job->done, (int)max);
    } while (ret == -EINTR);
    return ret < 0 ? -failed(job->disk->name, ret) : ret;
}

static struct io_u *event(struct thread_data *td, int index)
{
    const struct job *job = td->io_ops_data;
    const struct qcow2rs_completion *done = &job->done[index];
    struct io_u *io_u = done->user_data;

    io_u->error = 0;
    if (done->ret < 0) {
        log_err("qcow2rs: %s: %s\n", job->disk->name, done->error_message);
        io_u->error = (unsigned int)-done->ret;
    }
    io_u->resid = 0;
    return io_u;
}

/* The image stays open as long as the job runs: fio's opening and closing of files,
 * and its dropping of what the page cache holds, are for plain files. */
static int nothing(struct thread_data *td, struct fio_file *file)
{
    return 0;
}

/* Where fio looks for an engine in a file of its own. */
struct ioengine_ops ioengine = {
    .name = "qcow2rs",
    .version = FIO_IOOPS_VERSION,
    .flags = FIO_DISKLESSIO | FIO_NOEXTEND | FIO_NODISKUTIL,
    .setup = setup,
    .init = init,
    .queue = queue,
    .commit = commit,
    .getevents = getevents,
    .event = event,
    .cleanup = cleanup,
    .open_file = nothing,
    .close_file = nothing,
    .invalidate = nothing,
    .options = options,
    .option_struct_size = sizeof(struct options),
};
