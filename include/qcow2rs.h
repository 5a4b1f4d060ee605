/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * qcow2rs.h - access to QCOW2 disk images.
 *
 * Generated from src/capi: do not edit.
 *
 * ---------------------------------------------------------------- conventions
 * RETURN VALUES.  Every fallible function returns int (or int64_t): >= 0 on
 * success, a negative errno(3) value on failure (never errno itself, never -1
 * as a generic code).  Data transfers are all-or-nothing: 0 means the whole
 * range was transferred.  On failure the calling thread's error record is set:
 * see qcow2rs_error_message() and qcow2rs_error_code().  Success does not
 * clear it.  Only errno values named in a function's comment are contract;
 * messages are not.  Output pointers are written on success only, except that
 * handle outputs (T **out) are set to NULL on failure.
 *
 * COMMON ERRORS, not repeated below (any function returning int):
 *   -EINVAL   NULL where not allowed, unknown flag bit, non-zero reserved
 *             field, size/offset overflow, struct_size too small.
 *   -ENOMEM   allocation failed.
 *   -EFBIG    a limit of the open options would be exceeded, that of memory
 *             for metadata included (code QCOW2RS_E_LIMIT).
 *   -EIO      lower-layer I/O error, or image corruption met at run time
 *             (code QCOW2RS_E_CORRUPT).
 *   -ENOTRECOVERABLE  an internal bug (a Rust panic) was caught; the handle is
 *             poisoned, only the _close()/_destroy()/_free() call is allowed.
 *
 * THREAD SAFETY CLASSES.
 *   [MT]       may be called from any thread at any time, also concurrently on
 *              the same object.  While an [EXCL] call runs it waits or returns
 *              -EBUSY; get_size, get_info and get_stats answer at once.
 *   [OBJ]      may be called from any thread, but calls on the same object
 *              must be serialised by the caller.
 *   [EXCL]     no other call on the same image or on any of its queues may be
 *              in progress, and no queue request in flight; -EBUSY if the
 *              library detects it.  Idle queues survive.  What it changed is
 *              durable when it returns 0.
 *   [CB]       may be called from within a callback; all others may not.
 * No function is async-signal-safe.  No function is a pthread cancellation
 * point by contract.  EINTR is retried internally, except where said.
 *
 * OWNERSHIP.  A handle returned through T **out belongs to the caller, who
 * releases it with the function that takes T ** and sets it to NULL; NULL and
 * pointers to NULL are accepted there.  Strings passed in are copied.  Strings
 * handed out through char ** are released with qcow2rs_free().  I/O buffers,
 * iovec arrays included, belong to the library until completion.
 *
 * FORK.  After fork() the child must not use any handle, not even close it; it
 * may exec or _exit.  All descriptors the library opens are O_CLOEXEC.
 *
 * THREADS AND SIGNALS.  The library starts no thread: work is done by the
 * threads that call it.  It changes no signal disposition, no locale, no
 * umask, no environment, and prints nothing to stdout or stderr.
 *
 * DLCLOSE.  The shared library is linked with -z nodelete.
 *
 * EXTENSIBILITY.  Handles and option objects are opaque.  Info structs are
 * passed with their size and may grow at the end.  Callback tables start with
 * struct_size and may grow at the end.  Array element structs never grow; they
 * carry reserved fields, written as zero by the library.  New flag bits
 * and new enumeration values may appear: ignore unknown ones on output.
 */
#ifndef QCOW2RS_H
#define QCOW2RS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>  /* struct iovec */

#define QCOW2RS_VERSION_STRING "0.1.0"
#define QCOW2RS_MAKE_VERSION(maj, min, pat) \
    (((maj) << 16) | ((min) << 8) | (pat))
#define QCOW2RS_VERSION_NUMBER                                   \
    QCOW2RS_MAKE_VERSION(QCOW2RS_VERSION_MAJOR,                  \
                         QCOW2RS_VERSION_MINOR, QCOW2RS_VERSION_PATCH)
/* Every function added after 0.1 also defines QCOW2RS_HAVE_<NAME_IN_CAPS>. */

#if defined(__GNUC__) || defined(__clang__)
# define QCOW2RS_MUST_USE __attribute__((warn_unused_result))
#else
# define QCOW2RS_MUST_USE
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --------------------------------------------------- Version of the library */

#define QCOW2RS_VERSION_MAJOR 0u /* Major version: 0 while the API may still
                                    change. */
#define QCOW2RS_VERSION_MINOR 1u /* Minor version. */
#define QCOW2RS_VERSION_PATCH 0u /* Patch level. */

/* [MT][CB] Version of the library in use, as QCOW2RS_VERSION_NUMBER. */
uint32_t qcow2rs_version_number(void);

/* [MT][CB] Version of the library in use, e.g. "0.1.0"; static storage. */
const char *qcow2rs_version_string(void);

/* [MT][CB] 1 if the build has the named feature, 0 if not or unknown.
 * Names: "zstd", "zlib", "luks", "io_uring", "direct-io", "ofd-locks". */
int qcow2rs_has_feature(const char *name);

/* ------------------ Errors: the calling thread's record of its last failure */

#define QCOW2RS_E_NONE 0u                /* No finer code than the errno
                                            value. */
#define QCOW2RS_E_NOT_QCOW2 1u           /* Bad magic; -EINVAL. */
#define QCOW2RS_E_BAD_HEADER 2u          /* The header is malformed; -EINVAL. */
#define QCOW2RS_E_UNSUPPORTED_VERSION 3u /* The version is not 2 or 3;
                                            -ENOTSUP. */
#define QCOW2RS_E_UNSUPPORTED_FEATURE 4u /* An unknown incompatible feature
                                            bit; -ENOTSUP. */
#define QCOW2RS_E_CORRUPT 5u             /* The metadata contradicts itself;
                                            -EIO. */
#define QCOW2RS_E_MARKED_CORRUPT 6u      /* Marked corrupt, and to be opened
                                            read-write; -EROFS. */
#define QCOW2RS_E_LOCKED 7u              /* In use by another; -EAGAIN. */
#define QCOW2RS_E_POLICY 8u              /* A file that the image names was
                                            refused; -EPERM. */
#define QCOW2RS_E_LIMIT 9u               /* A limit of the open options is
                                            exceeded; -EFBIG. */
#define QCOW2RS_E_CHAIN_DEPTH 10u        /* The backing chain is too deep;
                                            -ELOOP. */
#define QCOW2RS_E_BACKING 11u            /* The backing file cannot be
                                            opened; errno of the cause. */
#define QCOW2RS_E_DATA_FILE 12u          /* The data file cannot be opened;
                                            errno of the cause. */
#define QCOW2RS_E_ENCRYPTED 13u          /* No secret, or a wrong one;
                                            -EACCES. */
#define QCOW2RS_E_CALLBACK 14u           /* A callback of the program failed;
                                            errno of its own. */
#define QCOW2RS_E_PANIC 15u              /* An internal bug was caught;
                                            -ENOTRECOVERABLE. */
/* A sync failed, for whatever reason. Sticky: writes and flushes fail until
 * the image is opened again; -EIO. */
#define QCOW2RS_E_FLUSH_FAILED 16u
#define QCOW2RS_E_DIRTY 17u              /* Dirty, and the option
                                            "repair-dirty" is off; -EUCLEAN. */

/* [MT][CB] Message of the calling thread's most recent failure, never NULL,
 * "" if none.  UTF-8; untrusted bytes taken from images are escaped.  Valid
 * until the next qcow2rs call of this thread.  Copy it before yielding if
 * coroutines can migrate between threads. */
const char *qcow2rs_error_message(void);

/* [MT][CB] QCOW2RS_E_* of the same failure. */
uint32_t qcow2rs_error_code(void);

/* [MT][CB] Static name of a code, e.g. "corrupt"; "unknown" if unknown. */
const char *qcow2rs_error_code_name(uint32_t code);

/* [MT][CB] Releases memory the library handed out; NULL is allowed. */
void qcow2rs_free(void *ptr);

/* ------------------------------------------------------------- Log messages */

#define QCOW2RS_LOG_ERROR 1u /* The operation cannot go on, or data is in
                                danger. */
#define QCOW2RS_LOG_WARN 2u  /* Something a person should look at. */
#define QCOW2RS_LOG_INFO 3u  /* What happens once in the life of an image. */
#define QCOW2RS_LOG_DEBUG 4u /* What happens now and then. */
#define QCOW2RS_LOG_TRACE 5u /* What happens with each request. */

/* Called from any thread, concurrently.  msg is NUL-terminated, no newline,
 * valid during the call.  The callback may make [CB] calls only. */
typedef void (*qcow2rs_log_fn)(void *opaque, uint32_t level, const char *target,
                               const char *msg);

/* [MT] Process-wide; default: none, nothing is logged.  fn == NULL removes.
 * Returns after the last call of the previous callback has finished, so that
 * its opaque may be released. */
void qcow2rs_set_log(qcow2rs_log_fn fn, void *opaque, uint32_t max_level);

/* ------------------------------------ Storage that the program brings along */

#define QCOW2RS_IO_SERIALIZED 1u /* Never two calls at a time. */

/* Callbacks run on the thread that calls the library (for queues: the one
 * that submits, reaps or waits), concurrently unless QCOW2RS_IO_SERIALIZED is
 * set.  They return 0 (or a value >= 0) or a negative errno.  They must not
 * call back into the same image, throw C++ exceptions or longjmp.  NULL
 * members after `flush` are optional: the library falls back or returns
 * -ENOTSUP. */
struct qcow2rs_io_ops {
    size_t struct_size;                  /* sizeof(struct qcow2rs_io_ops) */
    /* Bytes past the end read as zero. */
    int (*preadv)(void *opaque, const struct iovec *iov, int iovcnt,
                  uint64_t offset);
    /* Extends the storage; what it skips behind the old end must read as zero.
     * NULL: read-only. */
    int (*pwritev)(void *opaque, const struct iovec *iov, int iovcnt,
                   uint64_t offset);
    int64_t (*get_length)(void *opaque); /* Bytes. */
    int (*flush)(void *opaque);          /* Makes durable what completed
                                            before. */
    /* Sets the length; bytes that are new must read as zero, those that were
     * once cut off, too. */
    int (*truncate)(void *opaque, uint64_t length);
    /* A hint: the range is of no use any more.  Not called by this version:
     * it asks for zeroes that may be unmapped instead (see write_zeroes). */
    int (*discard)(void *opaque, uint64_t offset, uint64_t length);
    /* flags: QCOW2RS_ZERO_*, QCOW2RS_IO_FUA. */
    int (*write_zeroes)(void *opaque, uint64_t offset, uint64_t length,
                        uint32_t flags);
    void (*close)(void *opaque);         /* Called once, after all other
                                            calls. */
};

/* ---------------------------------------- Storage objects: where bytes live */

/* A path, a descriptor or callbacks.  Consumed (ownership taken, also on
 * failure) by open and create. */
struct qcow2rs_storage;

/* [MT][CB] -ENOENT, -EACCES, ... arise when the storage is opened. */
QCOW2RS_MUST_USE
int qcow2rs_storage_from_path(const char *path, struct qcow2rs_storage **out);

/* [MT][CB] The descriptor is dup()ed with O_CLOEXEC; the caller keeps fd.
 * RDWR needs an fd that can be written, else -EACCES.  The status flags of fd
 * are never changed: OPEN_DIRECT or "backing-direct" that disagree with its
 * O_DIRECT are -EINVAL.  OFD locks belong to the open file description: give
 * each process (and each writer) its own.  The library keeps count by (st_dev,
 * st_ino) in the process: a second read-write open of a file is -EAGAIN
 * (QCOW2RS_E_LOCKED), and the locks go with the last image that uses it.
 * -ENOLCK where the file system has no locks.  -EBADF. */
QCOW2RS_MUST_USE
int qcow2rs_storage_from_fd(int fd, struct qcow2rs_storage **out);

/* [MT][CB] ops is copied. opaque is released by ops->close, also if a later
 * open fails (not if this call does). flags: QCOW2RS_IO_SERIALIZED. */
QCOW2RS_MUST_USE
int qcow2rs_storage_from_callbacks(const struct qcow2rs_io_ops *ops,
                                   void *opaque, uint32_t flags,
                                   struct qcow2rs_storage **out);

/* [OBJ][CB] For a storage that was not consumed. */
void qcow2rs_storage_free(struct qcow2rs_storage **storage);

/* ------------------------------------------------------------- Open options */

#define QCOW2RS_OPEN_RDWR 1u         /* Read and write; default: read-only. */
#define QCOW2RS_OPEN_NO_LOCK 2u      /* No OFD lock on the file. */
#define QCOW2RS_OPEN_DIRECT 4u       /* O_DIRECT (cache=none). */
#define QCOW2RS_OPEN_WRITETHROUGH 8u /* Every write is durable. */
#define QCOW2RS_OPEN_NO_FLUSH 16u    /* cache=unsafe: tests only. */
/* This layer only; holes read as zero, status says ZERO
 * without ALLOCATED; -EINVAL with RDWR where the image names a backing file,
 * unless CHECK_ONLY. */
#define QCOW2RS_OPEN_NO_BACKING 32u
#define QCOW2RS_OPEN_CHECK_ONLY 64u  /* Tolerate damage, dirty and corrupt
                                        bits; only info, check and repair are
                                        allowed. */
#define QCOW2RS_OPEN_NO_DISCARD 128u /* Freed clusters are not punched out of
                                        the storage. */
#define QCOW2RS_FORMAT_QCOW2 1u      /* qcow2, version 2 or 3. */
#define QCOW2RS_FORMAT_RAW 2u        /* The bytes of the storage are the
                                        disk. */
/* An image that needs a backing or data file fails with -EPERM and
 * QCOW2RS_E_POLICY, and no file is touched. */
#define QCOW2RS_REF_DENY 0u
/* Trusted images only: plain paths, relative to the directory of the referring
 * image (one that was not opened by path has none: -EPERM, use RESOLVE); never
 * "json:" or "protocol:" names. */
#define QCOW2RS_REF_PATHS 1u
#define QCOW2RS_REF_RESOLVE 2u       /* Ask the callback. */
#define QCOW2RS_REF_KIND_BACKING 1u  /* The image below. */
#define QCOW2RS_REF_KIND_DATA 2u     /* The external data file. */

/* How to open.  Reusable for any number of opens, which take copies. */
struct qcow2rs_open_opts;

/* A file that an image names: untrusted input.  Grows at the end;
 * library-owned. */
struct qcow2rs_ref {
    size_t struct_size;   /* sizeof(struct qcow2rs_ref) in the library. */
    uint32_t kind;        /* QCOW2RS_REF_KIND_* */
    uint32_t depth;       /* 0: referred to by the image being opened. */
    const char *name;     /* Exactly as stored, plus a NUL. */
    size_t name_length;   /* May contain NULs: compare lengths. */
    const char *format;   /* Backing format as stored, or NULL if none; the
                             library never probes formats. */
    const char *referrer; /* Path or fd name of the referrer, or NULL. */
    uint32_t writable;    /* 1: will be written (data file, commit). */
};

/* Returns 0 and sets *storage (ownership passes) and *format (preset from
 * ref->format, 0: none or unknown), or a negative errno (-EPERM to refuse).
 * fn and opaque must outlive every image opened with these options; it runs on
 * the thread that calls open, create, reopen, invalidate or commit. */
typedef int (*qcow2rs_resolve_fn)(void *opaque, const struct qcow2rs_ref *ref,
                                  struct qcow2rs_storage **storage,
                                  uint32_t *format);

/* [MT] Defaults: see each setter. -ENOMEM. Reusable for any number of opens. */
QCOW2RS_MUST_USE int qcow2rs_open_opts_new(struct qcow2rs_open_opts **out);

/* [OBJ] */
void qcow2rs_open_opts_free(struct qcow2rs_open_opts **opts);

/* [OBJ] The image's format is never guessed: QCOW2 unless RAW is set here.  A
 * RAW image is the bytes of its storage: the same calls serve both kinds of
 * disk, and what RAW has no answer for (snapshots, check, ...) is -ENOTSUP.
 * Opening a storage that starts with the qcow2 magic as RAW is -EINVAL unless
 * read-only or "allow-qcow2-magic" is "on". */
int qcow2rs_open_opts_set_format(struct qcow2rs_open_opts *o, uint32_t format);

/* [OBJ] Replaces the flag word.  flags: QCOW2RS_OPEN_*. */
int qcow2rs_open_opts_set_flags(struct qcow2rs_open_opts *o, uint32_t flags);

/* [OBJ] Any option by name, value as text ("64M", "on"): what a command line
 * or test harness needs.  Names are those of `qemu-img --image-opts` for the
 * qcow2 driver where one exists ("cache-size", "l2-cache-size",
 * "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval",
 * "lazy-refcounts", "overlap-check" and its single switches,
 * "pass-discard-request", "pass-discard-snapshot" (default: as the former),
 * "pass-discard-other" (off only), "discard-no-unref"), plus "backing-format"
 * (raw | qcow2: for an image that stores no backing format, which is otherwise
 * refused with QCOW2RS_E_BACKING), "repair-dirty" (on|off, default on as in
 * QEMU: a read-write open of an image whose dirty bit is set rebuilds its
 * refcounts, in time proportional to the image, or fails with
 * QCOW2RS_E_CORRUPT, nothing changed, where that cannot be; off:
 * QCOW2RS_E_DIRTY), "allow-qcow2-magic" (on|off, default off: see set_format),
 * "max-chain-depth" (images below this one, default 200), "max-metadata-size"
 * (default 1G: for the whole chain, caches included; the cache sizes are per
 * layer), "max-virtual-size" (default: the format's), "max-key-iterations" (of
 * key derivation, to find out whether a passphrase opens a LUKS image; default
 * 268435456), "backing-direct"
 * (on|off: O_DIRECT for the images below, default as this one's, so that many
 * disks can share one base's page cache), "data-file.filename" (the path of the
 * external data file, whatever the image calls it; the reference policy is not
 * asked).  "cache-clean-interval": see qcow2rs_trim_caches.
 * -ENOENT: no such option.  -EINVAL: bad value.  -ENOTSUP: an option of QEMU's
 * that this build does not have. */
int qcow2rs_open_opts_set(struct qcow2rs_open_opts *o, const char *name,
                          const char *value);

/* [OBJ] Passphrase for LUKS / legacy AES; copied, wiped on free (and when the
 * last image that was opened with it is gone).  It is tried on each encrypted
 * image of the chain that has none of its own.  A LUKS image takes the time to
 * open that its writer chose, two seconds usually.  Without a passphrase, or
 * with a wrong one, open is -EACCES, QCOW2RS_E_ENCRYPTED, but with CHECK_ONLY,
 * which needs none.  Length 0 is a passphrase, too.  For LUKS images that ask
 * for too much time: see "max-key-iterations" (QCOW2RS_E_LIMIT). */
int qcow2rs_open_opts_set_secret(struct qcow2rs_open_opts *o,
                                 const void *secret, size_t length);

/* [OBJ] The same for one image below: depth 1 is the backing file of the image
 * that is opened, 2 the one below that, ...  -EINVAL: depth 0. */
int qcow2rs_open_opts_set_backing_secret(struct qcow2rs_open_opts *o,
                                         uint32_t depth, const void *secret,
                                         size_t length);

/* [OBJ] Policy for files that an image names (untrusted input!): one of
 * QCOW2RS_REF_DENY, the default, QCOW2RS_REF_PATHS and QCOW2RS_REF_RESOLVE.
 * fn is required for RESOLVE, must be NULL otherwise. */
int qcow2rs_open_opts_set_ref_policy(struct qcow2rs_open_opts *o,
                                     uint32_t policy, qcow2rs_resolve_fn fn,
                                     void *opaque);

/* ----------------------------------------------------------- Open and close */

/* An open image. */
struct qcow2rs_image;

/* [MT] What the first bytes look like, for a person to confirm; the storage
 * is not consumed.  Returns QCOW2RS_FORMAT_*. */
int qcow2rs_probe(struct qcow2rs_storage *storage);

/* [MT] Consumes *storage (sets it to NULL), also on failure.  opts may be
 * NULL.  Errors: the QCOW2RS_E_* table; -EROFS; -EAGAIN (locked); errno of
 * open(2)/read(2). */
QCOW2RS_MUST_USE
int qcow2rs_open(struct qcow2rs_storage **storage,
                 const struct qcow2rs_open_opts *opts,
                 struct qcow2rs_image **out);

/* [MT] As qcow2rs_open, of a file by name: a shorthand. */
QCOW2RS_MUST_USE
int qcow2rs_open_path(const char *path, const struct qcow2rs_open_opts *opts,
                      struct qcow2rs_image **out);

/* [MT] As qcow2rs_open, of a descriptor: see qcow2rs_storage_from_fd. */
QCOW2RS_MUST_USE
int qcow2rs_open_fd(int fd, const struct qcow2rs_open_opts *opts,
                    struct qcow2rs_image **out);

/* Drains requests in flight, destroys remaining queues, flushes, stores
 * persistent bitmaps, clears the dirty bit, releases.  -EBUSY: another thread
 * is inside a call; the handle is kept.  Whatever else is returned, the handle
 * is gone and set to NULL; the value tells of a flush error, or that bitmaps
 * could not be stored and are out of date (QCOW2RS_BITMAP_IN_USE) now. */
int qcow2rs_close(struct qcow2rs_image **img);

/* Releases without writing anything: models a crash, or gives up on dead
 * storage.  Starts nothing new, waits until the kernel has let go of the
 * buffers in flight.  -EBUSY as for close. */
int qcow2rs_abandon(struct qcow2rs_image **img);

/* [EXCL] Drops all caches and reads the metadata again, the whole chain's
 * (live migration).  -EINVAL on an image opened read-write. */
int qcow2rs_invalidate(struct qcow2rs_image *img);

/* [EXCL] Changes between read-only and read-write, with or without locks;
 * flags: OPEN_RDWR, OPEN_NO_LOCK.  Towards RDWR: the lock is taken (-EAGAIN),
 * the metadata is read again, then writing starts; towards read-only: flushed,
 * then unlocked.  The image keeps its storage; files of the chain are reopened
 * through the policy where they must be.  On failure the old state stands; but
 * where bitmaps had been stored, and the image cannot be read again, it is
 * closed, as the message says. */
int qcow2rs_reopen(struct qcow2rs_image *img, uint32_t flags);

/* --------------------------------------------------------------- Image info */

#define QCOW2RS_COMPAT_0_10 2u          /* Header version 2. */
#define QCOW2RS_COMPAT_1_1 3u           /* Header version 3. */
#define QCOW2RS_COMPRESSION_ZLIB 0u     /* Compressed clusters are deflate. */
#define QCOW2RS_COMPRESSION_ZSTD 1u     /* Compressed clusters are zstd. */
#define QCOW2RS_INFO_RDWR 1u            /* Open for writing. */
#define QCOW2RS_INFO_DIRTY 2u           /* The dirty bit is set. */
#define QCOW2RS_INFO_CORRUPT 4u         /* The corrupt bit is set. */
#define QCOW2RS_INFO_EXTENDED_L2 8u     /* L2 entries are extended. */
#define QCOW2RS_INFO_LAZY_REFCOUNTS 16u /* The bit for lazy refcounts is set. */
#define QCOW2RS_INFO_HAS_BACKING 32u    /* The header names a backing file. */
#define QCOW2RS_INFO_DATA_FILE 64u      /* Guest data is in another file. */
#define QCOW2RS_INFO_DATA_FILE_RAW 128u /* That file is a raw image by
                                           itself. */
#define QCOW2RS_INFO_ENCRYPTED 256u     /* Guest data is encrypted. */

/* What an image is.  Grows at the end.  RAW images: what only a qcow2 image
 * has is 0. */
struct qcow2rs_info {
    uint64_t virtual_size;          /* Bytes. */
    uint64_t file_length;           /* Bytes of the image file. */
    uint32_t cluster_size;          /* Bytes. */
    uint32_t subcluster_size;       /* == cluster_size without extended L2. */
    uint32_t compat;                /* QCOW2RS_COMPAT_* */
    uint32_t flags;                 /* QCOW2RS_INFO_* */
    uint32_t refcount_bits;         /* Width of a refcount. */
    uint32_t compression_type;      /* QCOW2RS_COMPRESSION_* */
    uint32_t snapshot_count;        /* Internal snapshots. */
    uint32_t bitmap_count;          /* Persistent bitmaps. */
    uint64_t incompatible_features; /* As stored. */
    uint64_t compatible_features;   /* As stored. */
    uint64_t autoclear_features;    /* As stored. */
    uint32_t request_alignment;     /* Request geometry, as in a block
                                       device, from here on. 1: any offset
                                       and length is accepted. */
    uint32_t buffer_alignment;      /* 1, or that of O_DIRECT to avoid
                                       copies. */
    uint32_t optimal_io_size;       /* 0: no preference. */
    uint32_t discard_alignment;     /* Bytes. */
    uint64_t max_transfer;          /* Advice: more is split; 0: no limit. */
    uint32_t max_iov;               /* Advice. */
    uint32_t chain_depth;           /* Images below this one. */
    uint32_t reserved;              /* 0. */
    uint64_t allocated_size;        /* Bytes of the host file system in use. */
};

/* Counters since open, summed over threads and queues; this layer only.  Grows
 * at the end. */
struct qcow2rs_stats {
    uint64_t guest_reads;         /* Requests of the guest. */
    uint64_t guest_read_bytes;    /* Bytes. */
    uint64_t guest_writes;        /* Requests of the guest. */
    uint64_t guest_write_bytes;   /* Bytes. */
    uint64_t storage_reads;       /* Calls that the storage saw, metadata
                                     too. */
    uint64_t storage_read_bytes;  /* Bytes. */
    uint64_t storage_writes;      /* Calls that the storage saw, metadata
                                     too. */
    uint64_t storage_write_bytes; /* Bytes. */
    uint64_t storage_syncs;       /* fdatasync and the like. */
    uint64_t cow_bytes;           /* Read from below and copied. */
    uint64_t l2_cache_hits;       /* Slices of L2 tables that were in memory. */
    uint64_t l2_cache_misses;     /* Slices that had to be read. */
    uint64_t l2_cache_evictions;  /* Slices that made room. */
    uint64_t metadata_bytes;      /* Memory held now. */
    uint64_t clusters_allocated;  /* Host clusters. */
    uint64_t clusters_freed;      /* Host clusters. */
};

/* [MT] info_size is sizeof(*info); the common prefix is filled in and the rest
 * of the caller's struct is zeroed. */
int qcow2rs_get_info(struct qcow2rs_image *img, struct qcow2rs_info *info,
                     size_t info_size);

/* [MT] Virtual size in bytes. */
int64_t qcow2rs_get_size(struct qcow2rs_image *img);

/* [MT] As stored in the header; -ENOENT if none.  qcow2rs_free(*name).
 * kind: QCOW2RS_REF_KIND_*; *name ends with a NUL, too; format may be NULL.
 * *format becomes NULL if none is stored. */
int qcow2rs_get_ref(struct qcow2rs_image *img, uint32_t kind, char **name,
                    size_t *name_length, char **format);

/* [MT] The same as JSON, the members named as in `qemu-img info
 * --output=json`.  qcow2rs_free(*json). */
int qcow2rs_get_info_json(struct qcow2rs_image *img, char **json);

/* [MT] As qcow2rs_get_info: by size. */
int qcow2rs_get_stats(struct qcow2rs_image *img, struct qcow2rs_stats *stats,
                      size_t stats_size);

/* ------------------------------------------------------------------- Caches */

/* [MT] Gives memory of the metadata caches, those of the images below included,
 * back to the system: of what is clean and was not used since this was done
 * last, by this call or after "cache-clean-interval" seconds (600 unless set).
 * That happens by itself only while requests, flushes or calls of queues come
 * by: a program that leaves an image idle calls this, twice for all there is.
 * Returns the number of bytes; what goes is read again when it is needed. */
int64_t qcow2rs_trim_caches(struct qcow2rs_image *img);

/* ---------------------------------------------------------- Synchronous I/O */

#define QCOW2RS_IO_FUA 1u           /* Durable on completion. */
#define QCOW2RS_ZERO_MAY_UNMAP 2u   /* May deallocate. */
#define QCOW2RS_ZERO_NO_FALLBACK 4u /* -ENOTSUP rather than writing data. */
#define QCOW2RS_IO_COMPRESSED 8u    /* Store compressed; whole clusters. */
#define QCOW2RS_IO_UNCHANGED 16u    /* Guest-visible data is unchanged
                                       (copy-on-read): leaves bitmaps. */

/* [MT] Reads.  flags: 0.  This and all that follow in this section: any number
 * in flight; no order between requests in flight, the outcome of overlapping
 * writes in flight is either one, per 512-byte sector.  length == 0 succeeds
 * for any offset up to the virtual size where any length could: writing nothing
 * is still -EROFS on a read-only image.  Buffers need no alignment.  A blocking
 * call may wait for a conflicting request in flight on a queue: somebody must
 * be driving that queue.
 * -EINVAL: offset + length is past the virtual size.
 * -ENOSPC: the storage is full: the image is consistent, the range holds old
 * or new data by (sub)cluster, and the same request may be retried.
 * -EROFS: opened read-only.
 * -ENOTSUP: flag not supported for this request.
 * -ESHUTDOWN: the image has been marked corrupt, writes are refused (reads of
 * what is sound go on).
 * -EDEADLK: the call would wait for a conflicting request of a queue whose
 * last caller is the calling thread. */
int qcow2rs_pread(struct qcow2rs_image *img, void *buf, size_t length,
                  uint64_t offset, uint32_t flags);

/* [MT] Reads.  flags: 0. */
int qcow2rs_preadv(struct qcow2rs_image *img, const struct iovec *iov,
                   int iovcnt, uint64_t offset, uint32_t flags);

/* [MT] Writes.  flags: FUA, COMPRESSED, UNCHANGED.
 * With COMPRESSED: whole clusters, but for the end of the disk's last one
 * (-EINVAL else), that are not allocated here (-EIO else; a compressed one is
 * replaced).  What does not get smaller is stored as without the flag, wherever
 * that can be.  Compressing is done by the calling thread (for a queue, by who
 * drives it): calls of several threads compress at once.  -ENOTSUP: images
 * that are raw, encrypted, or have a data file. */
int qcow2rs_pwrite(struct qcow2rs_image *img, const void *buf, size_t length,
                   uint64_t offset, uint32_t flags);

/* [MT] Writes.  flags: FUA, COMPRESSED, UNCHANGED. */
int qcow2rs_pwritev(struct qcow2rs_image *img, const struct iovec *iov,
                    int iovcnt, uint64_t offset, uint32_t flags);

/* [MT] Reads as zero afterwards.  flags: MAY_UNMAP, NO_FALLBACK, FUA. */
int qcow2rs_write_zeroes(struct qcow2rs_image *img, uint64_t offset,
                         uint64_t length, uint32_t flags);

/* [MT] A hint: afterwards the range reads as the old data, zeroes, or (version
 * 2 images with a backing file) as the backing file; unaligned edges are kept.
 * flags: 0. */
int qcow2rs_discard(struct qcow2rs_image *img, uint64_t offset, uint64_t length,
                    uint32_t flags);

/* [MT] Everything that completed before this call is durable when it returns
 * 0. */
int qcow2rs_flush(struct qcow2rs_image *img);

/* ------------------------------------------------------------- Block status */

#define QCOW2RS_BLOCK_DATA 1u         /* Reads come from stored data. */
#define QCOW2RS_BLOCK_ZERO 2u         /* Reads as zero. */
#define QCOW2RS_BLOCK_ALLOCATED 4u    /* Defined in this layer. */
#define QCOW2RS_BLOCK_OFFSET_VALID 8u /* host_offset is meaningful. */
#define QCOW2RS_BLOCK_COMPRESSED 16u  /* Stored compressed. */
#define QCOW2RS_BLOCK_EOF 32u         /* Ends at the virtual size. */
#define QCOW2RS_STATUS_THIS_LAYER 1u  /* Do not descend into backing. */
#define QCOW2RS_STATUS_ONE 2u         /* At most one extent. */

/* Fixed size: 40 bytes. */
struct qcow2rs_extent {
    uint64_t offset;      /* Guest offset. */
    uint64_t length;      /* > 0 */
    uint64_t host_offset; /* In the storage of the layer `depth`. */
    uint32_t flags;       /* QCOW2RS_BLOCK_* */
    uint32_t depth;       /* 0: this image, 1: its backing image, ... */
    uint64_t reserved;    /* 0. */
};

/* [MT] Fills up to max extents from offset on, contiguous, neighbours
 * differing; returns how many (>= 1 unless length == 0), which may cover less
 * than length: call again behind the last.  A snapshot in time only if nothing
 * writes.  flags: QCOW2RS_STATUS_*; -EINVAL: past the virtual size. */
int qcow2rs_block_status(struct qcow2rs_image *img, uint64_t offset,
                         uint64_t length, uint32_t flags,
                         struct qcow2rs_extent *extents, int max);

/* ------------------------------------------------------------------- Create */

#define QCOW2RS_CREATE_EXCL 1u /* -EEXIST rather than truncate; a file made
                                  in vain is removed. */

/* What a new image is to be.  Reusable for any number of images. */
struct qcow2rs_create_opts;

/* [MT] */
QCOW2RS_MUST_USE int qcow2rs_create_opts_new(struct qcow2rs_create_opts **out);

/* [OBJ] */
void qcow2rs_create_opts_free(struct qcow2rs_create_opts **opts);

/* [OBJ] Typed setters for what every program sets...  The size is rounded up
 * to a multiple of 512. */
int qcow2rs_create_opts_set_size(struct qcow2rs_create_opts *o, uint64_t bytes);

/* [OBJ] The image below, as it is to be written into the header.  format: raw
 * or qcow2. */
int qcow2rs_create_opts_set_backing(struct qcow2rs_create_opts *o,
                                    const char *name, const char *format);

/* [OBJ] The file that guest data will be in; *storage is consumed, and what
 * it holds is lost when an image is made.  name: as it is to be written into
 * the header, for those who open the image later.  Not for version 2 (compat
 * 0.10). */
int qcow2rs_create_opts_set_data_file(struct qcow2rs_create_opts *o,
                                      const char *name,
                                      struct qcow2rs_storage **storage);

/* [OBJ] Passphrase of an encrypted image (UTF-8 without NUL, as QEMU demands);
 * copied, wiped on free.  For qcow2rs_amend: that of a new key (encrypt.state =
 * active), or of the keys to erase (inactive). */
int qcow2rs_create_opts_set_secret(struct qcow2rs_create_opts *o,
                                   const void *secret, size_t length);

/* [OBJ] ...and the rest by the names of `qemu-img create -o`: size, compat
 * (0.10|1.1), cluster_size, lazy_refcounts, refcount_bits, extended_l2,
 * compression_type (zlib|zstd), data_file_raw,
 * preallocation (off|metadata|falloc|full), encrypt.format (luks|aes),
 * encrypt.cipher-alg (aes-256, ...), encrypt.cipher-mode (xts|cbc|ctr|ecb),
 * encrypt.ivgen-alg (plain64|plain|essiv), encrypt.ivgen-hash-alg,
 * encrypt.hash-alg (sha256, ...), encrypt.iter-time (milliseconds that it takes
 * to make, and later to open, the image; default 2000); for qcow2rs_amend also
 * data_file (a name), encrypt.state and encrypt.keyslot.
 * -ENOENT: no such option.  -EINVAL: bad value.  -ENOTSUP: an option or value
 * of QEMU's that this build does not have.  What goes together is checked by
 * create. */
int qcow2rs_create_opts_set(struct qcow2rs_create_opts *o, const char *name,
                            const char *value);

/* [MT] Overwrites *storage (consumed).  When out is not NULL the new image is
 * returned open, as by qcow2rs_open with open_opts (which may be NULL) plus
 * OPEN_RDWR.  The backing file is opened, through the policy of open_opts, if
 * size was not set or out is not NULL (for that once more in the end).  What
 * open_opts and the backing file say against it is found out before anything is
 * written.  Durable on return unless open_opts say NO_FLUSH (honoured without
 * out, too). */
QCOW2RS_MUST_USE
int qcow2rs_create(struct qcow2rs_storage **storage,
                   const struct qcow2rs_create_opts *opts,
                   const struct qcow2rs_open_opts *open_opts,
                   struct qcow2rs_image **out);

/* [MT] Creates the file, mode 0644 less the umask, or overwrites the one there
 * is.  flags: QCOW2RS_CREATE_EXCL. */
QCOW2RS_MUST_USE
int qcow2rs_create_path(const char *path, uint32_t flags,
                        const struct qcow2rs_create_opts *opts,
                        const struct qcow2rs_open_opts *open_opts,
                        struct qcow2rs_image **out);

/* [MT] Bytes needed by an image with these options: required for one without
 * data, fully_allocated for one holding size bytes (`qemu-img measure`). */
int qcow2rs_measure(const struct qcow2rs_create_opts *opts, uint64_t *required,
                    uint64_t *fully_allocated);

/* -------------------------------------------------------------------- Check */

#define QCOW2RS_REPAIR_LEAKS 1u  /* Give leaked clusters back. */
#define QCOW2RS_REPAIR_ERRORS 2u /* Mend what is damaged. */

/* What a check has found: the numbers of `qemu-img check`.  Grows at the
 * end. */
struct qcow2rs_check_result {
    uint64_t corruptions;         /* What contradicts itself, or is used
                                     without being counted. */
    uint64_t leaks;               /* Clusters that are counted more often
                                     than they are used. */
    uint64_t check_errors;        /* Could not be checked. */
    uint64_t corruptions_fixed;   /* 0: nothing is repaired yet. */
    uint64_t leaks_fixed;         /* 0: nothing is repaired yet. */
    uint64_t image_end_offset;    /* Highest host offset in use. */
    uint64_t total_clusters;      /* Clusters of the virtual disk. */
    uint64_t allocated_clusters;  /* Those that have a place in the image
                                     file. */
    uint64_t fragmented_clusters; /* Those that do not follow their
                                     neighbour. */
    uint64_t compressed_clusters; /* Those that are stored compressed. */
};

/* Called for each finding.  severity: QCOW2RS_LOG_WARN for a leak,
 * QCOW2RS_LOG_ERROR for damage and for what could not be checked.  message is
 * NUL-terminated, no newline, valid during the call.  The callback may make
 * [CB] calls only. */
typedef void (*qcow2rs_finding_fn)(void *opaque, uint32_t severity,
                                   uint64_t host_offset, const char *message);

/* Return 0 to go on, non-zero to cancel: the operation then fails with
 * -ECANCELED, the image consistent.  Runs on the calling thread; total may
 * change; done never decreases.  The callback may make [CB] calls only. */
typedef int (*qcow2rs_progress_fn)(void *opaque, uint64_t done, uint64_t total);

/* [EXCL] Returns 0 if the check ran to its end, whatever it found: look at the
 * result.  result_size is sizeof(*result), as in qcow2rs_get_info.  Of a chain
 * this image only; one that is open for writing is flushed first.  finding and
 * progress may be NULL.  flags 0: change nothing; QCOW2RS_REPAIR_*: -EROFS on
 * a read-only image, and -ENOTSUP, for this build does not repair.
 * -ENOTSUP: a RAW image.  -ECANCELED: progress said so.  -EFBIG
 * (QCOW2RS_E_LIMIT): more memory than "max-metadata-size" is needed.  -EIO: a
 * table cannot be read or understood at all; its finding was told. */
int qcow2rs_check(struct qcow2rs_image *img, uint32_t flags,
                  struct qcow2rs_check_result *result, size_t result_size,
                  qcow2rs_finding_fn finding, qcow2rs_progress_fn progress,
                  void *opaque);

/* ------------------------------------------------------------------- Resize */

#define QCOW2RS_RESIZE_SHRINK 1u     /* The disk may become shorter, and lose
                                        data. */
#define QCOW2RS_PREALLOC_OFF 0u      /* Nothing is taken ahead. */
#define QCOW2RS_PREALLOC_METADATA 1u /* Tables, and a place for all data in a
                                        file with holes. */
#define QCOW2RS_PREALLOC_FALLOC 2u   /* Also, the space is reserved. */
#define QCOW2RS_PREALLOC_FULL 3u     /* Also, zeroes are written. */

/* [EXCL] Gives the disk another size, a multiple of 512 bytes.  A new part
 * reads as zero, whatever is below; prealloc: QCOW2RS_PREALLOC_*, for it alone.
 * flags: QCOW2RS_RESIZE_SHRINK, required to lose data: what lies behind the
 * new end is gone.  progress may be NULL; it can cancel preallocation.
 * -EINVAL: not a multiple of 512; a shorter disk without the flag, or with
 * prealloc.  -EFBIG: more than an image of this geometry, or (QCOW2RS_E_LIMIT)
 * "max-virtual-size" or "max-metadata-size", allows.  -EBUSY: other calls, or
 * requests of queues, are in progress.  -ENOSPC.  -EROFS.  -ECANCELED.
 * -ENOTSUP: a version 2 image with snapshots or, to grow, with a backing file
 * that is longer than the disk, or encrypted with prealloc; a bitmap that is
 * out of date, or any if nothing is to be left; a device, or metadata, of a
 * RAW image.  -EINVAL, too: a bitmap would be too large.  After any of these
 * the image is as it was; after -EIO its size tells what has happened. */
int qcow2rs_resize(struct qcow2rs_image *img, uint64_t bytes, uint32_t prealloc,
                   uint32_t flags, qcow2rs_progress_fn progress, void *opaque);

/* -------------------------------------------------------------------- Amend */

/* [EXCL] Changes what can be changed in place, option names of `qemu-img
 * amend -o`: compat (0.10|1.1), lazy_refcounts, refcount_bits; of an image
 * with a data file: data_file (its name; empty: none is stored), data_file_raw
 * (off); what was not set in opts stays.  Durable on return.  progress may be
 * NULL.  Counters of the image start again.
 * Key slots of a LUKS image, in a call of its own: encrypt.state (active: the
 * passphrase of qcow2rs_create_opts_set_secret gets a key slot; inactive: the
 * slots that it opens, or encrypt.keyslot, or that one only if it does, lose
 * their key), encrypt.keyslot (0 to 7; default a free one), encrypt.iter-time.
 * -EINVAL where a key would be overwritten, or the last one erased, or what is
 * to be erased is not there.  -EACCES: the passphrase that img was opened with
 * opens it no more.
 * -ENOTSUP: what only an image that is made anew can have (cluster_size, ...),
 * another size or backing file, which are not changed by amending; key slots
 * together with other options, or of an image that is not LUKS; for 0.10:
 * extended L2 entries, zstd, bitmaps, snapshots of another size.  -EINVAL:
 * options that do not go together (0.10 needs refcount_bits=16), a refcount
 * that does not fit.  -ECANCELED: progress said so.  -EROFS, -EBUSY (also: a
 * snapshot with zero clusters is open, which 0.10 cannot have), -ENOSPC,
 * -EFBIG.  After any of these the image is as it was, but that zero clusters
 * may have become data on the way to 0.10. */
int qcow2rs_amend(struct qcow2rs_image *img,
                  const struct qcow2rs_create_opts *opts,
                  qcow2rs_progress_fn progress, void *opaque);

/* ------------------------------------------------------- Internal snapshots */

/* What is known of a snapshot.  Grows at the end. */
struct qcow2rs_snapshot_info {
    char id[128];           /* NUL-terminated, truncated if longer. */
    char name[256];         /* NUL-terminated, truncated if longer. */
    uint64_t virtual_size;  /* Bytes. */
    uint64_t vm_state_size; /* Bytes; 0: none. */
    int64_t date_sec;       /* Since 1970. */
    uint32_t date_nsec;     /* Of that second. */
    uint32_t reserved;      /* 0. */
    uint64_t vm_clock_nsec; /* How long the guest had run. */
    uint64_t icount;        /* UINT64_MAX: not recorded. */
};

/* [MT] Number of internal snapshots; 0 for a snapshot that is open itself. */
int qcow2rs_snapshot_count(struct qcow2rs_image *img);

/* [MT] One of them, in the order of the table: index < count; -ENOENT
 * otherwise.  info_size is sizeof(*info), as in qcow2rs_get_info.  -EIO: the
 * table is malformed. */
int qcow2rs_snapshot_get(struct qcow2rs_image *img, uint32_t index,
                         struct qcow2rs_snapshot_info *info, size_t info_size);

/* [EXCL] Takes a snapshot of the active state; durable on return.  meta: what
 * the host records (vm_state_size, date_*, vm_clock_nsec, icount are used),
 * meta_size its sizeof; NULL: now, no VM state.  With a vm_state_size, the VM
 * state written so far becomes the snapshot's, and the active one empty.  The
 * new id goes to id_out (may be NULL), NUL-terminated; -ERANGE if it does not
 * fit.  -EEXIST: the name exists.  -EINVAL: a name that is empty or longer
 * than 255 bytes; refcounts too narrow to count one more reference.  -EFBIG:
 * 65536 snapshots, a table of more than 64 MiB, or (QCOW2RS_E_LIMIT) more
 * memory than "max-metadata-size" is needed.  -ENOSPC.  -EROFS.  -ENOTSUP: a
 * RAW image.  After any of these, and -EBUSY, the image is as it was; after
 * -EIO the list tells whether there is a snapshot. */
int qcow2rs_snapshot_create(struct qcow2rs_image *img, const char *name,
                            const struct qcow2rs_snapshot_info *meta,
                            size_t meta_size, char *id_out, size_t id_out_size);

/* [EXCL] The active state, the size of the disk and VM state included, is
 * replaced; durable on return.  id_or_name: the id is tried first.  -ENOENT.
 * -ENOTSUP: a snapshot of another size, in a version 2 image or beside
 * bitmaps; a bitmap that is enabled.  Otherwise as qcow2rs_snapshot_create. */
int qcow2rs_snapshot_apply(struct qcow2rs_image *img, const char *id_or_name);

/* [EXCL] Deletes; durable on return.  The id is tried first.  -ENOENT.
 * -EBUSY: it is open, too.  Otherwise as qcow2rs_snapshot_create. */
int qcow2rs_snapshot_delete(struct qcow2rs_image *img, const char *id_or_name);

/* [EXCL] Gives it another name; durable on return.  The id is tried first.
 * -ENOENT.  -EEXIST: another one has the name.  Otherwise as
 * qcow2rs_snapshot_create. */
int qcow2rs_snapshot_rename(struct qcow2rs_image *img, const char *id_or_name,
                            const char *new_name);

/* [MT] Opens a snapshot read-only as an image of its own.  The id is tried
 * first.  It keeps img's storage alive, with its lock; writing img goes on, and
 * so does closing it; deleting that snapshot gives -EBUSY.  It cannot be
 * reopened, invalidated or checked: -ENOTSUP.  -ENOENT. */
QCOW2RS_MUST_USE
int qcow2rs_snapshot_open(struct qcow2rs_image *img, const char *id_or_name,
                          struct qcow2rs_image **out);

/* [MT] Reads VM state of the active image or of an opened snapshot: bytes of
 * their own behind the disk, zero where nothing was written.  -ENOTSUP: a RAW
 * image.  -EINVAL: past all that can be. */
int qcow2rs_vmstate_pread(struct qcow2rs_image *img, void *buf, size_t length,
                          uint64_t offset);

/* [MT] Writes VM state of the active image; durable with the next flush.
 * -EROFS: of a snapshot, too.  -EFBIG: past all that can be. */
int qcow2rs_vmstate_pwrite(struct qcow2rs_image *img, const void *buf,
                           size_t length, uint64_t offset);

/* ------------------------------------------------------- Persistent bitmaps */

#define QCOW2RS_BITMAP_IN_USE 1u /* Out of date: not stored when the image
                                    was closed last. It can only be removed. */
#define QCOW2RS_BITMAP_AUTO 2u   /* Enabled: records changes whenever the
                                    image is open for writing. */
#define QCOW2RS_BITMAP_BUSY 4u   /* Reserved: somebody else works with it. */

/* What is known of a bitmap.  Grows at the end. */
struct qcow2rs_bitmap_info {
    char name[1024];      /* NUL-terminated. */
    uint64_t dirty_bytes; /* Bytes of the disk; 0 with QCOW2RS_BITMAP_IN_USE. */
    uint32_t granularity; /* Bytes of the disk that one bit stands for. */
    uint32_t flags;       /* QCOW2RS_BITMAP_* */
};

/* [MT] Number of persistent bitmaps; 0 for a snapshot that is open itself.
 * -ENOTSUP: a RAW image.  -EIO: bitmaps of an image that is open read-only are
 * malformed. */
int qcow2rs_bitmap_count(struct qcow2rs_image *img);

/* [MT] One of them, those of the file first: index < count; -ENOENT otherwise.
 * info_size is sizeof(*info), as in qcow2rs_get_info.  Others as
 * qcow2rs_bitmap_count. */
int qcow2rs_bitmap_get(struct qcow2rs_image *img, uint32_t index,
                       struct qcow2rs_bitmap_info *info, size_t info_size);

/* [EXCL] Adds a bitmap in which nothing is dirty; it gets into the file when
 * the image is closed.  granularity: bytes per bit, a power of two from 512 to
 * 2 GiB; 0: 64 KiB.  flags: QCOW2RS_BITMAP_AUTO, to record changes from now on,
 * or 0.  -EEXIST.  -ENOTSUP: version 2, a RAW image, a disk of 0 bytes.
 * -EINVAL: a name that is empty or longer than 1023 bytes; a bitmap of more
 * than 512 MiB.  -EFBIG: 65535 bitmaps, or (QCOW2RS_E_LIMIT) more memory than
 * "max-metadata-size" allows.  -EROFS. */
int qcow2rs_bitmap_add(struct qcow2rs_image *img, const char *name,
                       uint32_t granularity, uint32_t flags);

/* [EXCL] Removes a bitmap, QCOW2RS_BITMAP_IN_USE or not; durable on return.
 * -ENOENT.  -EROFS.  -ENOTSUP: a RAW image. */
int qcow2rs_bitmap_remove(struct qcow2rs_image *img, const char *name);

/* [EXCL] Nothing is dirty any more.  -ENOENT.  -EINVAL: it is
 * QCOW2RS_BITMAP_IN_USE.  Others as qcow2rs_bitmap_remove. */
int qcow2rs_bitmap_clear(struct qcow2rs_image *img, const char *name);

/* [EXCL] Whether it records changes from now on.  Errors as
 * qcow2rs_bitmap_clear. */
int qcow2rs_bitmap_set_enabled(struct qcow2rs_image *img, const char *name,
                               bool enabled);

/* [EXCL] What is dirty in src is dirty in dst, too, whatever their
 * granularities.  Errors as qcow2rs_bitmap_clear, for both. */
int qcow2rs_bitmap_merge(struct qcow2rs_image *img, const char *dst,
                         const char *src);

/* [MT] Fills up to max extents from offset on, as qcow2rs_block_status, with
 * flags QCOW2RS_BLOCK_DATA where the disk is dirty and 0 where it is not (and
 * QCOW2RS_BLOCK_EOF); host_offset and depth are 0.  A range is dirty before
 * anything of it changes.  -ENOENT.  -EINVAL: past the virtual size; the bitmap
 * is QCOW2RS_BITMAP_IN_USE.  Others as qcow2rs_bitmap_count. */
int qcow2rs_bitmap_status(struct qcow2rs_image *img, const char *name,
                          uint64_t offset, uint64_t length,
                          struct qcow2rs_extent *extents, int max);

/* ------------------------------------------------- Queues: asynchronous I/O */

/* Asynchronous requests on an image.  A queue belongs to one image; many queues
 * per image, typically one per thread.  Functions on a queue, unless they say
 * otherwise: [OBJ]; different queues: concurrently.  Requests go on while
 * somebody is inside submit, reap or wait: one that conflicts with a request of
 * another queue goes on when that one was carried on, too.  A wait that another
 * queue of its own thread holds up carries that one on. */
struct qcow2rs_queue;

/* What a queue is to be like. */
struct qcow2rs_queue_opts;

/* How a request ended.  Fixed size: 32 bytes with 8-byte pointers. */
struct qcow2rs_completion {
    void *user_data;           /* As given with the request. */
    const char *error_message; /* NULL on success; valid until the next reap
                                  or wait on this queue. */
    int32_t ret;               /* >= 0, or a negative errno. */
    uint32_t error_code;       /* QCOW2RS_E_*. */
    uint64_t reserved;         /* Zero. */
};

/* [MT] -ENOMEM.  Reusable for any number of queues. */
QCOW2RS_MUST_USE int qcow2rs_queue_opts_new(struct qcow2rs_queue_opts **out);

/* [OBJ] */
void qcow2rs_queue_opts_free(struct qcow2rs_queue_opts **opts);

/* [OBJ] Requests that may be in flight, 1 to 65536; default 128. */
int qcow2rs_queue_opts_set_depth(struct qcow2rs_queue_opts *o, uint32_t depth);

/* [OBJ] By name: "engine" (auto|io_uring|blocking, default auto: io_uring where
 * the system has it, else blocking), "completion-fd" (on|off, default on),
 * "depth".
 * -ENOENT: no such option.  -EINVAL: bad value. */
int qcow2rs_queue_opts_set(struct qcow2rs_queue_opts *o, const char *name,
                           const char *value);

/* [MT] opts may be NULL.  -ENOTSUP: io_uring was asked for and is not to be
 * had.  -EMFILE and the like: a queue takes up to three descriptors. */
QCOW2RS_MUST_USE
int qcow2rs_queue_create(struct qcow2rs_image *img,
                         const struct qcow2rs_queue_opts *opts,
                         struct qcow2rs_queue **out);

/* [MT] The engine in use, static storage: "io_uring" or "blocking".  "auto"
 * tries io_uring_setup(2): where a filter kills for that, ask for
 * "blocking". */
const char *qcow2rs_queue_engine(struct qcow2rs_queue *q);

/* [OBJ] Waits for what is in flight (carrying on what other queues hold it up
 * with), drops its completions; afterwards no buffer is in use, on a poisoned
 * queue too.  Close does it for queues that remain. */
void qcow2rs_queue_destroy(struct qcow2rs_queue **queue);

/* [OBJ] Submission.  0: accepted, there will be exactly one completion.
 * Negative: not accepted, there will be none: -EAGAIN the queue is full (reap
 * first), -EINVAL, -ENOMEM, -ENOTRECOVERABLE.  Every other failure, range and
 * read-only errors included, arrives as a completion.  Requests start with the
 * next submit, reap or wait.  user_data is not interpreted.  Flags and results
 * as in the synchronous functions. */
QCOW2RS_MUST_USE
int qcow2rs_queue_pread(struct qcow2rs_queue *q, void *buf, size_t length,
                        uint64_t offset, uint32_t flags, void *user_data);

/* [OBJ] As qcow2rs_queue_pread. */
QCOW2RS_MUST_USE
int qcow2rs_queue_preadv(struct qcow2rs_queue *q, const struct iovec *iov,
                         int iovcnt, uint64_t offset, uint32_t flags,
                         void *user_data);

/* [OBJ] As qcow2rs_queue_pread. */
QCOW2RS_MUST_USE
int qcow2rs_queue_pwrite(struct qcow2rs_queue *q, const void *buf,
                         size_t length, uint64_t offset, uint32_t flags,
                         void *user_data);

/* [OBJ] As qcow2rs_queue_pread. */
QCOW2RS_MUST_USE
int qcow2rs_queue_pwritev(struct qcow2rs_queue *q, const struct iovec *iov,
                          int iovcnt, uint64_t offset, uint32_t flags,
                          void *user_data);

/* [OBJ] As qcow2rs_queue_pread. */
QCOW2RS_MUST_USE
int qcow2rs_queue_write_zeroes(struct qcow2rs_queue *q, uint64_t offset,
                               uint64_t length, uint32_t flags,
                               void *user_data);

/* [OBJ] As qcow2rs_queue_pread. */
QCOW2RS_MUST_USE
int qcow2rs_queue_discard(struct qcow2rs_queue *q, uint64_t offset,
                          uint64_t length, uint32_t flags, void *user_data);

/* [OBJ] Durable: what had COMPLETED (was reaped or reapable) on any queue of
 * the image before this call.  Not a barrier for requests in flight.
 * flags: 0. */
QCOW2RS_MUST_USE
int qcow2rs_queue_flush(struct qcow2rs_queue *q, uint32_t flags,
                        void *user_data);

/* [OBJ] Makes sure that everything accepted has been started; returns how many
 * were newly started.  Never blocks on I/O, except with the blocking engine:
 * there submit, reap and wait may. */
int qcow2rs_queue_submit(struct qcow2rs_queue *q);

/* [OBJ] Submits, then takes up to max completions without blocking; returns how
 * many. */
int qcow2rs_queue_reap(struct qcow2rs_queue *q,
                       struct qcow2rs_completion *completions, int max);

/* [OBJ] Submits, then blocks until min completions are there (min <= in flight:
 * -EINVAL otherwise), timeout_ns has passed (relative; < 0: no
 * limit), or qcow2rs_queue_wakeup was called; returns how many were taken,
 * possibly fewer than min, possibly 0.  -EINTR only if no completion was taken
 * and a signal arrived. */
int qcow2rs_queue_wait(struct qcow2rs_queue *q,
                       struct qcow2rs_completion *completions, int min, int max,
                       int64_t timeout_ns);

/* [MT] Ends a qcow2rs_queue_wait in another thread, or the next one. */
int qcow2rs_queue_wakeup(struct qcow2rs_queue *q);

/* [OBJ] An eventfd (non-blocking, close-on-exec, owned by the queue) for
 * poll/epoll, level-triggered: readable whenever reap would return a completion
 * of what was submitted or carry a request on, one that another queue or thread
 * has unblocked included.  Reap and wait clear it; the caller need not read it
 * and must not write or close it.  Spurious readiness is possible, lost
 * wake-ups are not.  With io_uring, the kernel may interrupt a thread to
 * complete what it submitted: its own poll or epoll_wait then fails with EINTR,
 * without a signal.  -ENOTSUP: turned off. */
int qcow2rs_queue_completion_fd(struct qcow2rs_queue *q);

/* [OBJ] While disabled the fd may stay unreadable: saves a system call per
 * batch when polling.  Enabling makes it readable if completions wait.
 * -ENOTSUP: turned off. */
int qcow2rs_queue_set_completion_fd_enabled(struct qcow2rs_queue *q,
                                            bool enabled);

/* [MT] Accepted and not yet taken by reap or wait. */
uint32_t qcow2rs_queue_in_flight(struct qcow2rs_queue *q);

#ifdef __cplusplus
}
#endif

#endif /* QCOW2RS_H */
