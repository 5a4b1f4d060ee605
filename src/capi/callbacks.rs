//! Storage that the program brings along

use std::ffi::{c_int, c_void};
use std::mem::{offset_of, size_of};
use std::ptr;

use libc::iovec;

use super::entry::{Call, MAX_STRUCT};
use crate::error::{Error, Result};
use crate::io::callbacks::{Abilities, UserIo, UserResult};
use crate::sys::memory::{Guest, GuestMut, GuestRef};

/// Never two calls at a time.
pub const QCOW2RS_IO_SERIALIZED: u32 = 1;

/// Callbacks run on the thread that calls the library (for queues: the one
/// that submits, reaps or waits), concurrently unless QCOW2RS_IO_SERIALIZED is
/// set.  They return 0 (or a value >= 0) or a negative errno.  They must not
/// call back into the same image, throw C++ exceptions or longjmp.  NULL
/// members after `flush` are optional: the library falls back or returns
/// -ENOTSUP.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2rs_io_ops {
    /// sizeof(struct qcow2rs_io_ops)
    pub struct_size: usize,
    /// Bytes past the end read as zero.
    pub preadv: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            iov: *const iovec,
            iovcnt: c_int,
            offset: u64,
        ) -> c_int,
    >,
    /// Extends the storage; what it skips behind the old end must read as zero.
    /// NULL: read-only.
    pub pwritev: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            iov: *const iovec,
            iovcnt: c_int,
            offset: u64,
        ) -> c_int,
    >,
    /// Bytes.
    pub get_length: Option<unsafe extern "C" fn(opaque: *mut c_void) -> i64>,
    /// Makes durable what completed before.
    pub flush: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Sets the length; bytes that are new must read as zero, those that were
    /// once cut off, too.
    pub truncate: Option<unsafe extern "C" fn(opaque: *mut c_void, length: u64) -> c_int>,
    /// A hint: the range is of no use any more.  Not called by this version:
    /// it asks for zeroes that may be unmapped instead (see write_zeroes).
    pub discard:
        Option<unsafe extern "C" fn(opaque: *mut c_void, offset: u64, length: u64) -> c_int>,
    /// flags: QCOW2RS_ZERO_*, QCOW2RS_IO_FUA.
    pub write_zeroes: Option<
        unsafe extern "C" fn(opaque: *mut c_void, offset: u64, length: u64, flags: u32) -> c_int,
    >,
    /// Called once, after all other calls.
    pub close: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
}

impl qcow2rs_io_ops {
    const NONE: qcow2rs_io_ops = qcow2rs_io_ops {
        struct_size: 0,
        preadv: None,
        pwritev: None,
        get_length: None,
        flush: None,
        truncate: None,
        discard: None,
        write_zeroes: None,
        close: None,
    };

    /// A copy of the program's table, which may be older and shorter than ours,
    /// or newer and longer: what only one of us knows does not exist.
    pub(super) fn copy(call: &Call, ops: *const qcow2rs_io_ops) -> Result<qcow2rs_io_ops> {
        let ops = call.some(ops, "ops")?;
        // SAFETY: not NULL, aligned; every version of the table has its size
        // (the caller's promise).
        let size = unsafe { (&raw const (*ops).struct_size).read() };
        if size < offset_of!(qcow2rs_io_ops, truncate) || size > MAX_STRUCT {
            return Err(Error::invalid(format!("{size} is no struct_size of ops")));
        }
        // Whole members only: all are as long as a pointer.
        let known = size.min(size_of::<qcow2rs_io_ops>()) / size_of::<usize>() * size_of::<usize>();
        let mut copy = qcow2rs_io_ops::NONE;
        // SAFETY: `known` bytes are readable (the caller's promise) and fit;
        // each member is a function of its type or NULL (likewise).
        unsafe {
            let to = (&raw mut copy).cast::<u8>();
            ptr::copy_nonoverlapping(ops.cast::<u8>(), to, known);
        }
        for (missing, name) in [
            (copy.preadv.is_none(), "preadv"),
            (copy.get_length.is_none(), "get_length"),
            (copy.flush.is_none(), "flush"),
        ] {
            if missing {
                return Err(Error::invalid(format!("ops->{name} is NULL")));
            }
        }
        Ok(copy)
    }
}

/// The program's callbacks and what they are called with.
pub(super) struct Program {
    ops: qcow2rs_io_ops,
    opaque: *mut c_void,
}

// SAFETY: the library never looks at what `opaque` points to, and the header
// tells the program that its callbacks run on any thread.
unsafe impl Send for Program {}
// SAFETY: as above, concurrently.
unsafe impl Sync for Program {}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(close) = self.ops.close {
            // SAFETY: the program gave the function for this; the last owner of
            // the callbacks is going, so there is no other call.
            unsafe { close(self.opaque) }
        }
    }
}

/// A call that may not be there, which nobody makes then.
fn given<F>(function: Option<F>) -> UserResult<F> {
    function.ok_or(libc::ENOTSUP)
}

/// What a callback returned: 0 or more is success.
fn answer(ret: impl Into<i64>) -> UserResult<u64> {
    let ret: i64 = ret.into();
    // What is no errno, however negative, becomes one in `io`.
    u64::try_from(ret).map_err(|_| i32::try_from(ret.unsigned_abs()).unwrap_or(libc::EIO))
}

impl Program {
    /// Takes over `opaque`.
    pub(super) fn new(ops: qcow2rs_io_ops, opaque: *mut c_void) -> Program {
        Program { ops, opaque }
    }
}

impl UserIo for Program {
    fn abilities(&self) -> Abilities {
        Abilities {
            write: self.ops.pwritev.is_some(),
            truncate: self.ops.truncate.is_some(),
            discard: self.ops.discard.is_some(),
            write_zeroes: self.ops.write_zeroes.is_some(),
        }
    }

    fn read(&self, to: GuestMut<'_>, offset: u64) -> UserResult<()> {
        let preadv = given(self.ops.preadv)?;
        transfer(to, offset, |iov, count, at| {
            // SAFETY: the program gave the function for calls like this one;
            // the array and the writable memory live until it returns.
            unsafe { preadv(self.opaque, iov, count, at) }
        })
    }

    fn write(&self, from: GuestRef<'_>, offset: u64) -> UserResult<()> {
        let pwritev = given(self.ops.pwritev)?;
        transfer(from, offset, |iov, count, at| {
            // SAFETY: as in `read`; the memory is readable.
            unsafe { pwritev(self.opaque, iov, count, at) }
        })
    }

    fn length(&self) -> UserResult<u64> {
        let get_length = given(self.ops.get_length)?;
        // SAFETY: the program gave the function for calls like this one.
        answer(unsafe { get_length(self.opaque) })
    }

    fn flush(&self) -> UserResult<()> {
        let flush = given(self.ops.flush)?;
        // SAFETY: as in `length`.
        answer(unsafe { flush(self.opaque) }).map(drop)
    }

    fn truncate(&self, length: u64) -> UserResult<()> {
        let truncate = given(self.ops.truncate)?;
        // SAFETY: as in `length`.
        answer(unsafe { truncate(self.opaque, length) }).map(drop)
    }

    fn discard(&self, offset: u64, length: u64) -> UserResult<()> {
        let discard = given(self.ops.discard)?;
        // SAFETY: as in `length`.
        answer(unsafe { discard(self.opaque, offset, length) }).map(drop)
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> UserResult<()> {
        let write_zeroes = given(self.ops.write_zeroes)?;
        let flags = if may_unmap { super::io::QCOW2RS_ZERO_MAY_UNMAP } else { 0 };
        // SAFETY: as in `length`.
        answer(unsafe { write_zeroes(self.opaque, offset, length, flags) }).map(drop)
    }
}

/// As many ranges as one preadv(2) or pwritev(2) takes.
const MAX_RANGES: usize = 1024;

/// Calls `call` with the memory as iovec arrays: one call, unless a system call
/// could not take it at once either.
fn transfer<D>(
    memory: Guest<'_, D>,
    offset: u64,
    mut call: impl FnMut(*const iovec, c_int, u64) -> c_int,
) -> UserResult<()> {
    if memory.is_empty() {
        return Ok(());
    }
    if let Some(ptr) = memory.as_single() {
        let range = iovec { iov_base: ptr.cast(), iov_len: memory.len() };
        return answer(call(&raw const range, 1, offset)).map(drop);
    }
    let mut ranges = Vec::new();
    memory.for_each(|ptr, len| ranges.push(iovec { iov_base: ptr.cast(), iov_len: len }));
    let mut at = offset;
    for part in ranges.chunks(MAX_RANGES) {
        answer(call(part.as_ptr(), part.len() as c_int, at))?;
        let bytes: usize = part.iter().map(|range| range.iov_len).sum();
        // The end of a request is an offset, too.
        at = at.wrapping_add(bytes as u64);
    }
    Ok(())
}
