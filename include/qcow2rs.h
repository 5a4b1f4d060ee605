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
 *   -ENOMEM   allocation failed or a configured memory limit was reached.
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

#ifdef __cplusplus
}
#endif

#endif /* QCOW2RS_H */
