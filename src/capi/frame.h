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

#define QCOW2RS_VERSION_STRING "@VERSION@"
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

@DECLARATIONS@

#ifdef __cplusplus
}
#endif

#endif /* QCOW2RS_H */
