//! Persistent bitmaps

use std::ffi::{c_char, c_int};

use super::entry::flags as known;
use super::open::qcow2rs_image;
use super::status::{Array, QCOW2RS_BLOCK_DATA, QCOW2RS_BLOCK_EOF, qcow2rs_extent};
use crate::bitmaps::{BitmapInfo, DEFAULT_GRANULARITY};
use crate::error::Error;

/// Out of date: not stored when the image was closed last.  It can only be
/// removed.
pub const QCOW2RS_BITMAP_IN_USE: u32 = 1;
/// Enabled: records changes whenever the image is open for writing.
pub const QCOW2RS_BITMAP_AUTO: u32 = 2;
/// Reserved: somebody else works with it.
pub const QCOW2RS_BITMAP_BUSY: u32 = 4;

/// What is known of a bitmap.  Grows at the end.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2rs_bitmap_info {
    /// NUL-terminated.
    pub name: [c_char; 1024],
    /// Bytes of the disk; 0 with QCOW2RS_BITMAP_IN_USE.
    pub dirty_bytes: u64,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u32,
    /// QCOW2RS_BITMAP_*
    pub flags: u32,
}

impl qcow2rs_bitmap_info {
    fn new(info: &BitmapInfo) -> qcow2rs_bitmap_info {
        let mut name = [0; 1024];
        // At most 1023 bytes: the last one stays NUL.
        for (to, from) in name.iter_mut().take(1023).zip(&info.name) {
            *to = *from as c_char;
        }
        qcow2rs_bitmap_info {
            name,
            dirty_bytes: info.dirty_bytes,
            granularity: info.granularity,
            flags: info.flags(),
        }
    }
}

/// [MT] Number of persistent bitmaps; 0 for a snapshot that is open itself.
/// -ENOTSUP: a RAW image.  -EIO: bitmaps of an image that is open read-only are
/// malformed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_count(img: *mut qcow2rs_image) -> c_int {
    entry!(|call| Ok(c_int::try_from(call.held(img)?.bitmap_count()?).unwrap_or(c_int::MAX)))
}

/// [MT] One of them, those of the file first: index < count; -ENOENT otherwise.
/// info_size is sizeof(*info), as in qcow2rs_get_info.  Others as
/// qcow2rs_bitmap_count.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_get(
    img: *mut qcow2rs_image,
    index: u32,
    info: *mut qcow2rs_bitmap_info,
    info_size: usize,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let least = size_of::<qcow2rs_bitmap_info>();
        let to = call.sized_out(info, info_size, least, "info")?;
        to.set(&qcow2rs_bitmap_info::new(&image.bitmap(index)?));
        Ok(0)
    })
}

/// [EXCL] Adds a bitmap in which nothing is dirty; it gets into the file when
/// the image is closed.  granularity: bytes per bit, a power of two from 512 to
/// 2 GiB; 0: 64 KiB.  flags: QCOW2RS_BITMAP_AUTO, to record changes from now on,
/// or 0.  -EEXIST.  -ENOTSUP: version 2, a RAW image, a disk of 0 bytes.
/// -EINVAL: a name that is empty or longer than 1023 bytes; a bitmap of more
/// than 512 MiB.  -EFBIG: 65535 bitmaps, or (QCOW2RS_E_LIMIT) more memory than
/// "max-metadata-size" allows.  -EROFS.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_add(
    img: *mut qcow2rs_image,
    name: *const c_char,
    granularity: u32,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        known(flags, QCOW2RS_BITMAP_AUTO)?;
        let granularity = if granularity == 0 { DEFAULT_GRANULARITY } else { granularity };
        let name = call.string(name, "name")?.to_bytes();
        image.bitmap_add(name, granularity, flags & QCOW2RS_BITMAP_AUTO != 0).map(|()| 0)
    })
}

/// [EXCL] Removes a bitmap, QCOW2RS_BITMAP_IN_USE or not; durable on return.
/// -ENOENT.  -EROFS.  -ENOTSUP: a RAW image.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_remove(
    img: *mut qcow2rs_image,
    name: *const c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        image.bitmap_remove(call.string(name, "name")?.to_bytes()).map(|()| 0)
    })
}

/// [EXCL] Nothing is dirty any more.  -ENOENT.  -EINVAL: it is
/// QCOW2RS_BITMAP_IN_USE.  Others as qcow2rs_bitmap_remove.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_clear(
    img: *mut qcow2rs_image,
    name: *const c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        image.bitmap_clear(call.string(name, "name")?.to_bytes()).map(|()| 0)
    })
}

/// [EXCL] Whether it records changes from now on.  Errors as
/// qcow2rs_bitmap_clear.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_set_enabled(
    img: *mut qcow2rs_image,
    name: *const c_char,
    enabled: bool,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let name = call.string(name, "name")?.to_bytes();
        image.bitmap_set_enabled(name, enabled).map(|()| 0)
    })
}

/// [EXCL] What is dirty in src is dirty in dst, too, whatever their
/// granularities.  Errors as qcow2rs_bitmap_clear, for both.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_merge(
    img: *mut qcow2rs_image,
    dst: *const c_char,
    src: *const c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let (dst, src) = (call.string(dst, "dst")?.to_bytes(), call.string(src, "src")?.to_bytes());
        image.bitmap_merge(dst, src).map(|()| 0)
    })
}

/// [MT] Fills up to max extents from offset on, as qcow2rs_block_status, with
/// flags QCOW2RS_BLOCK_DATA where the disk is dirty and 0 where it is not (and
/// QCOW2RS_BLOCK_EOF); host_offset and depth are 0.  A range is dirty before
/// anything of it changes.  -ENOENT.  -EINVAL: past the virtual size; the bitmap
/// is QCOW2RS_BITMAP_IN_USE.  Others as qcow2rs_bitmap_count.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_bitmap_status(
    img: *mut qcow2rs_image,
    name: *const c_char,
    offset: u64,
    length: u64,
    extents: *mut qcow2rs_extent,
    max: c_int,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let name = call.string(name, "name")?.to_bytes();
        let first = call.some(extents, "extents")?.cast_mut();
        if max <= 0 {
            return Err(Error::invalid(format!("{max} is no number of extents")));
        }
        let (mut array, size) = (Array::new(first, max), image.size());
        image.bitmap_status(name, offset, length, max as usize, &mut |range| {
            let dirty = if range.dirty { QCOW2RS_BLOCK_DATA } else { 0 };
            let last = range.offset + range.length == size;
            array.push(qcow2rs_extent {
                offset: range.offset,
                length: range.length,
                host_offset: 0,
                flags: dirty | if last { QCOW2RS_BLOCK_EOF } else { 0 },
                depth: 0,
                reserved: 0,
            });
        })?;
        Ok(array.filled())
    })
}
