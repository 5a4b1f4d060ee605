//! Block status

use std::ffi::c_int;

use super::entry::flags;
use super::open::qcow2rs_image;
use crate::error::Error;
use crate::image::handle::Extent;

/// Reads come from stored data.
pub const QCOW2RS_BLOCK_DATA: u32 = 1;
/// Reads as zero.
pub const QCOW2RS_BLOCK_ZERO: u32 = 2;
/// Defined in this layer.
pub const QCOW2RS_BLOCK_ALLOCATED: u32 = 4;
/// host_offset is meaningful.
pub const QCOW2RS_BLOCK_OFFSET_VALID: u32 = 8;
/// Stored compressed.
pub const QCOW2RS_BLOCK_COMPRESSED: u32 = 16;
/// Ends at the virtual size.
pub const QCOW2RS_BLOCK_EOF: u32 = 32;

/// Do not descend into backing.
pub const QCOW2RS_STATUS_THIS_LAYER: u32 = 1;
/// At most one extent.
pub const QCOW2RS_STATUS_ONE: u32 = 2;

/// Fixed size: 40 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct qcow2rs_extent {
    /// Guest offset.
    pub offset: u64,
    /// > 0
    pub length: u64,
    /// In the storage of the layer `depth`.
    pub host_offset: u64,
    /// QCOW2RS_BLOCK_*
    pub flags: u32,
    /// 0: this image, 1: its backing image, ...
    pub depth: u32,
    /// 0.
    pub reserved: u64,
}

const _: () = assert!(size_of::<qcow2rs_extent>() == 40);

impl qcow2rs_extent {
    fn new(extent: &Extent) -> qcow2rs_extent {
        let mut flags = 0;
        for (is_set, flag) in [
            (extent.data, QCOW2RS_BLOCK_DATA),
            (extent.zero, QCOW2RS_BLOCK_ZERO),
            (extent.allocated, QCOW2RS_BLOCK_ALLOCATED),
            (extent.host_offset.is_some(), QCOW2RS_BLOCK_OFFSET_VALID),
            (extent.compressed, QCOW2RS_BLOCK_COMPRESSED),
            (extent.eof, QCOW2RS_BLOCK_EOF),
        ] {
            flags |= if is_set { flag } else { 0 };
        }
        qcow2rs_extent {
            offset: extent.offset,
            length: extent.length,
            host_offset: extent.host_offset.unwrap_or(0),
            flags,
            depth: extent.depth,
            reserved: 0,
        }
    }
}

/// The caller's array, being filled.
pub(super) struct Array {
    first: *mut qcow2rs_extent,
    filled: c_int,
    max: c_int,
}

// SAFETY: an address, which is used by the calling thread only, until it returns.
unsafe impl Send for Array {}

impl Array {
    /// Room for `max` extents from `first` on.
    pub(super) fn new(first: *mut qcow2rs_extent, max: c_int) -> Array {
        Array { first, filled: 0, max }
    }

    /// How many there are.
    pub(super) fn filled(&self) -> c_int {
        self.filled
    }

    /// Adds one, if there is room.
    pub(super) fn push(&mut self, extent: qcow2rs_extent) {
        if self.filled < self.max {
            // SAFETY: 0 <= filled < max, the length of the array, which is
            // writable (the caller's promise).
            unsafe { self.first.add(self.filled as usize).write(extent) };
            self.filled += 1;
        }
    }
}

/// [MT] Fills up to max extents from offset on, contiguous, neighbours
/// differing; returns how many (>= 1 unless length == 0), which may cover less
/// than length: call again behind the last.  A snapshot in time only if nothing
/// writes.  flags: QCOW2RS_STATUS_*; -EINVAL: past the virtual size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_block_status(
    img: *mut qcow2rs_image,
    offset: u64,
    length: u64,
    flags: u32,
    extents: *mut qcow2rs_extent,
    max: c_int,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        self::flags(flags, QCOW2RS_STATUS_THIS_LAYER | QCOW2RS_STATUS_ONE)?;
        let first = call.some(extents, "extents")?.cast_mut();
        let max = match max {
            ..=0 => return Err(Error::invalid(format!("{max} is no number of extents"))),
            _ if flags & QCOW2RS_STATUS_ONE != 0 => 1,
            max => max,
        };
        let mut array = Array::new(first, max);
        let this_layer = flags & QCOW2RS_STATUS_THIS_LAYER != 0;
        let result = image.block_status(offset, length, this_layer, max as usize, &mut |extent| {
            array.push(qcow2rs_extent::new(&extent));
        });
        match result {
            // What comes behind the error is the next call's, and so is the
            // error: this one has something to tell.
            Err(error) if array.filled == 0 => Err(error),
            _ => Ok(array.filled),
        }
    })
}
