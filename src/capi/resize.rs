//! Resize

use std::ffi::{c_int, c_void};

use super::check::qcow2rs_progress_fn;
use super::entry::flags;
use super::open::qcow2rs_image;
use crate::admin::preallocation::Preallocation;
use crate::admin::resize::ResizeOptions;
use crate::error::Error;

/// The disk may become shorter, and lose data.
pub const QCOW2RS_RESIZE_SHRINK: u32 = 1;

/// Nothing is taken ahead.
pub const QCOW2RS_PREALLOC_OFF: u32 = 0;
/// Tables, and a place for all data in a file with holes.
pub const QCOW2RS_PREALLOC_METADATA: u32 = 1;
/// Also, the space is reserved.
pub const QCOW2RS_PREALLOC_FALLOC: u32 = 2;
/// Also, zeroes are written.
pub const QCOW2RS_PREALLOC_FULL: u32 = 3;

/// The program's function and what it is called with.
struct Program(qcow2rs_progress_fn, *mut c_void);

// SAFETY: an address that the library never looks at; the function is called by the
// thread that called the library, before it returns.
unsafe impl Send for Program {}

impl Program {
    fn progress(&mut self, done: u64, total: u64) -> bool {
        // SAFETY: the program gave the function for calls like this one.
        self.0.is_none_or(|function| unsafe { function(self.1, done, total) } == 0)
    }
}

fn preallocation(mode: u32) -> crate::error::Result<Preallocation> {
    match mode {
        QCOW2RS_PREALLOC_OFF => Ok(Preallocation::Off),
        QCOW2RS_PREALLOC_METADATA => Ok(Preallocation::Metadata),
        QCOW2RS_PREALLOC_FALLOC => Ok(Preallocation::Falloc),
        QCOW2RS_PREALLOC_FULL => Ok(Preallocation::Full),
        _ => Err(Error::invalid(format!("{mode} is no QCOW2RS_PREALLOC_* mode"))),
    }
}

/// [EXCL] Gives the disk another size, a multiple of 512 bytes.  A new part
/// reads as zero, whatever is below; prealloc: QCOW2RS_PREALLOC_*, for it alone.
/// flags: QCOW2RS_RESIZE_SHRINK, required to lose data: what lies behind the
/// new end is gone.  progress may be NULL; it can cancel preallocation.
/// -EINVAL: not a multiple of 512; a shorter disk without the flag, or with
/// prealloc.  -EFBIG: more than an image of this geometry, or (QCOW2RS_E_LIMIT)
/// "max-virtual-size" or "max-metadata-size", allows.  -EBUSY: other calls, or
/// requests of queues, are in progress.  -ENOSPC.  -EROFS.  -ECANCELED.
/// -ENOTSUP: a version 2 image with snapshots or, to grow, with a backing file
/// that is longer than the disk, or encrypted with prealloc; a bitmap that is
/// out of date, or any if nothing is to be left; a device, or metadata, of a
/// RAW image.  -EINVAL, too: a bitmap would be too large.  After any of these
/// the image is as it was; after -EIO its size tells what has happened.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_resize(
    img: *mut qcow2rs_image,
    bytes: u64,
    prealloc: u32,
    flags: u32,
    progress: qcow2rs_progress_fn,
    opaque: *mut c_void,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        self::flags(flags, QCOW2RS_RESIZE_SHRINK)?;
        let shrink = flags & QCOW2RS_RESIZE_SHRINK != 0;
        let options = ResizeOptions { shrink, preallocation: preallocation(prealloc)? };
        let mut program = Program(progress, opaque);
        image.resize(bytes, &options, &mut |done, total| program.progress(done, total))?;
        Ok(0)
    })
}
