//! Synchronous I/O

use std::ffi::{c_int, c_void};

use libc::iovec;

use super::entry::{Call, flags};
use super::open::qcow2rs_image;
use crate::error::{Error, Result};
use crate::image::handle::{WriteFlags, ZeroFlags};
use crate::sys::memory::Guest;

/// Durable on completion.
pub const QCOW2RS_IO_FUA: u32 = 1;
/// May deallocate.
pub const QCOW2RS_ZERO_MAY_UNMAP: u32 = 2;
/// -ENOTSUP rather than writing data.
pub const QCOW2RS_ZERO_NO_FALLBACK: u32 = 4;
/// Store compressed; whole clusters.
pub const QCOW2RS_IO_COMPRESSED: u32 = 8;
/// Guest-visible data is unchanged (copy-on-read): leaves bitmaps.
pub const QCOW2RS_IO_UNCHANGED: u32 = 16;

/// The caller's memory for a transfer at `offset`; his until it has completed.
#[inline]
pub(super) fn memory<'m, D>(
    _call: &Call,
    buf: *const c_void,
    length: usize,
    offset: u64,
) -> Result<Guest<'m, D>> {
    if buf.is_null() && length > 0 {
        return Err(Error::invalid("buf is NULL"));
    }
    range(length, offset)?;
    // SAFETY: `length` bytes are readable, and writable where the entry point
    // reads into them, until it returns or the request has completed (the
    // caller's promise).
    Ok(unsafe { Guest::from_raw(buf.cast::<u8>().cast_mut(), length) })
}

/// The same, by iovec array.
#[inline]
pub(super) fn memory_list<'m, D>(
    _call: &Call,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
) -> Result<Guest<'m, D>> {
    let count = usize::try_from(iovcnt)
        .map_err(|_| Error::invalid(format!("{iovcnt} is no number of ranges")))?;
    if count == 0 {
        // SAFETY: there is no memory.
        return Ok(unsafe { Guest::from_raw(std::ptr::null_mut(), 0) });
    }
    if iov.is_null() || !iov.is_aligned() {
        return Err(Error::invalid("iov is NULL or misaligned"));
    }
    for i in 0..count {
        // SAFETY: i < iovcnt, the length of the array (the caller's promise).
        let range = unsafe { *iov.add(i) };
        if range.iov_base.is_null() && range.iov_len > 0 {
            return Err(Error::invalid(format!("iov[{i}] is NULL")));
        }
    }
    // SAFETY: as in `memory`, for each range and for the array.
    let memory = unsafe { Guest::from_iovec(iov, count) };
    let memory = memory.ok_or_else(|| Error::invalid("the ranges are longer than memory"))?;
    range(memory.len(), offset)?;
    Ok(memory)
}

#[inline]
fn range(length: usize, offset: u64) -> Result<()> {
    if isize::try_from(length).is_err() || offset.checked_add(length as u64).is_none() {
        let text = format!("{length} bytes at {offset} go past the largest offset");
        return Err(Error::invalid(text));
    }
    Ok(())
}

#[inline]
pub(super) fn write_flags(given: u32) -> Result<WriteFlags> {
    flags(given, QCOW2RS_IO_FUA | QCOW2RS_IO_COMPRESSED | QCOW2RS_IO_UNCHANGED)?;
    Ok(WriteFlags {
        fua: given & QCOW2RS_IO_FUA != 0,
        compressed: given & QCOW2RS_IO_COMPRESSED != 0,
        unchanged: given & QCOW2RS_IO_UNCHANGED != 0,
    })
}

pub(super) fn zero_flags(given: u32) -> Result<ZeroFlags> {
    flags(given, QCOW2RS_IO_FUA | QCOW2RS_ZERO_MAY_UNMAP | QCOW2RS_ZERO_NO_FALLBACK)?;
    Ok(ZeroFlags {
        fua: given & QCOW2RS_IO_FUA != 0,
        may_unmap: given & QCOW2RS_ZERO_MAY_UNMAP != 0,
        no_fallback: given & QCOW2RS_ZERO_NO_FALLBACK != 0,
    })
}

/// [MT] Reads.  flags: 0.  This and all that follow in this section: any number
/// in flight; no order between requests in flight, the outcome of overlapping
/// writes in flight is either one, per 512-byte sector.  length == 0 succeeds
/// for any offset up to the virtual size where any length could: writing nothing
/// is still -EROFS on a read-only image.  Buffers need no alignment.  A blocking
/// call may wait for a conflicting request in flight on a queue: somebody must
/// be driving that queue.
/// -EINVAL: offset + length is past the virtual size.
/// -ENOSPC: the storage is full: the image is consistent, the range holds old
/// or new data by (sub)cluster, and the same request may be retried.
/// -EROFS: opened read-only.
/// -ENOTSUP: flag not supported for this request.
/// -ESHUTDOWN: the image has been marked corrupt, writes are refused (reads of
/// what is sound go on).
/// -EDEADLK: the call would wait for a conflicting request of a queue whose
/// last caller is the calling thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_pread(
    img: *mut qcow2rs_image,
    buf: *mut c_void,
    length: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        self::flags(flags, 0)?;
        image.read_guest(memory(call, buf, length, offset)?, offset)?;
        Ok(0)
    })
}

/// [MT] Reads.  flags: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_preadv(
    img: *mut qcow2rs_image,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        self::flags(flags, 0)?;
        image.read_guest(memory_list(call, iov, iovcnt, offset)?, offset)?;
        Ok(0)
    })
}

/// [MT] Writes.  flags: FUA, COMPRESSED, UNCHANGED.
/// With COMPRESSED: whole clusters, but for the end of the disk's last one
/// (-EINVAL else), that are not allocated here (-EIO else; a compressed one is
/// replaced).  What does not get smaller is stored as without the flag, wherever
/// that can be.  Compressing is done by the calling thread (for a queue, by who
/// drives it): calls of several threads compress at once.  -ENOTSUP: images
/// that are raw, encrypted, or have a data file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_pwrite(
    img: *mut qcow2rs_image,
    buf: *const c_void,
    length: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let flags = write_flags(flags)?;
        image.write_guest(memory(call, buf, length, offset)?, offset, flags)?;
        Ok(0)
    })
}

/// [MT] Writes.  flags: FUA, COMPRESSED, UNCHANGED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_pwritev(
    img: *mut qcow2rs_image,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let flags = write_flags(flags)?;
        image.write_guest(memory_list(call, iov, iovcnt, offset)?, offset, flags)?;
        Ok(0)
    })
}

/// [MT] Reads as zero afterwards.  flags: MAY_UNMAP, NO_FALLBACK, FUA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_write_zeroes(
    img: *mut qcow2rs_image,
    offset: u64,
    length: u64,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        image.write_zeroes(offset, length, zero_flags(flags)?)?;
        Ok(0)
    })
}

/// [MT] A hint: afterwards the range reads as the old data, zeroes, or (version
/// 2 images with a backing file) as the backing file; unaligned edges are kept.
/// flags: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_discard(
    img: *mut qcow2rs_image,
    offset: u64,
    length: u64,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        self::flags(flags, 0)?;
        image.discard(offset, length)?;
        Ok(0)
    })
}

/// [MT] Everything that completed before this call is durable when it returns
/// 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_flush(img: *mut qcow2rs_image) -> c_int {
    entry!(|call| call.held(img)?.flush().map(|()| 0))
}
