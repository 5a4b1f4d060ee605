//! Persistent dirty bitmaps: listing, adding, removing, clearing, enabling, merging them,
//! and asking what is dirty.
//!
//! `change` knows how each of them changes the list of an image. Not known here: how bits
//! are kept and recorded, and what is in the file when (`image/bitmaps`).

mod change;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::{AUTO, IN_USE};
use crate::image::bitmaps::Bitmaps;
use crate::image::handle::Image;
use crate::io::blocking::Blocking;
use crate::io::wait::block_on;

/// What a bitmap stands for if nobody says otherwise, in bytes per bit.
pub const DEFAULT_GRANULARITY: u32 = 64 << 10;

/// What is known of a persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name.
    pub name: Vec<u8>,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u32,
    /// Bytes of the disk that are dirty; 0 if it is out of date.
    pub dirty_bytes: u64,
    /// It was not stored when the image was closed last: it misses changes, and can only
    /// be removed.
    pub in_use: bool,
    /// It records changes: now, and whenever the image is open for writing.
    pub enabled: bool,
}

/// A range of the disk that is dirty throughout, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRange {
    /// Guest offset.
    pub offset: u64,
    /// Bytes, > 0.
    pub length: u64,
    /// Whether it may have changed.
    pub dirty: bool,
}

/// Bitmaps record every write, write of zeroes and discard of an image that is open for
/// writing, as it begins: a range is dirty before anything of it changes, and also if the
/// request fails. They are stored when the image is closed (or reopened); after a crash,
/// or if that fails, those that recorded something are out of date, which the image says.
///
/// Those functions that change something need the image alone: `Busy` if another call is
/// in progress, or a request of a queue in flight; so what a request records is never lost
/// to one of them. `ReadOnly`; `NotSupported` for raw images and snapshots that are open
/// themselves; `NotFound`. Counters of the image (`stats`) start again with them.
impl Image {
    /// The persistent bitmaps, those of the file first. `NotSupported` for raw images;
    /// `Corrupt` where an image that is open read-only has bitmaps that are malformed.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        self.with_bitmaps(|bitmaps| {
            Ok((0..bitmaps.list.len()).filter_map(|index| info(bitmaps, index)).collect())
        })
    }

    /// Number of persistent bitmaps. Errors as for `bitmaps`.
    pub fn bitmap_count(&self) -> Result<u32> {
        self.with_bitmaps(|bitmaps| Ok(bitmaps.list.len() as u32))
    }

    /// One of them. `NotFound` where there are not that many; others as for `bitmaps`.
    pub fn bitmap(&self, index: u32) -> Result<BitmapInfo> {
        self.with_bitmaps(|bitmaps| {
            let none = || Error::new(ErrorKind::NotFound, format!("there is no bitmap {index}"));
            info(bitmaps, index as usize).ok_or_else(none)
        })
    }

    /// Calls `out` with up to `max` ranges that cover a range from its start on,
    /// neighbours differing. What a request under way is about to change is dirty already.
    /// `NotFound`; `InvalidArgument` past the end of the disk, and for a bitmap that is out
    /// of date; others as for `bitmaps`.
    pub fn bitmap_status(
        &self,
        name: &[u8],
        offset: u64,
        length: u64,
        max: usize,
        out: &mut dyn FnMut(DirtyRange),
    ) -> Result<()> {
        self.inside(|disk| {
            let (_, bits) = block_on(disk.bitmaps(&Blocking))?.find_sound(name)?;
            disk.check_range(offset, length)?;
            let (mut at, end, mut told) = (offset, offset + length, 0);
            // Bits are set meanwhile: what is like its neighbour when it is looked at is
            // one range with it.
            while at < end && told < max {
                let (dirty, behind) = bits.run(at);
                let length = behind.min(end) - at;
                out(DirtyRange { offset: at, length, dirty });
                (at, told) = (at + length, told + 1);
            }
            Ok(())
        })
    }

    /// Adds a bitmap in which nothing is dirty; `granularity` bytes per bit, a power of two
    /// from 512 to 2 GiB. It gets into the file when the image is closed.
    ///
    /// Errors: `Exists`; `NotSupported` for version 2, and for a disk without bytes;
    /// `InvalidArgument` for a granularity or a name (1 to 1023 bytes, none of them zero)
    /// that cannot be, and for a bitmap of more than 512 MiB; `Os(EFBIG)` past 65,535
    /// bitmaps; `Limit` where "max-metadata-size" has no room for it; `OutOfMemory`.
    pub fn bitmap_add(&self, name: &[u8], granularity: u32, enabled: bool) -> Result<()> {
        self.alter(|disk| disk.bitmap_add(name, granularity, enabled))
    }

    /// Removes a bitmap, also one that is out of date. Durable on return.
    pub fn bitmap_remove(&self, name: &[u8]) -> Result<()> {
        self.alter(|disk| block_on(disk.bitmap_remove(&Blocking, name)))
    }

    /// Nothing is dirty any more. `InvalidArgument` for one that is out of date.
    pub fn bitmap_clear(&self, name: &[u8]) -> Result<()> {
        self.alter(|disk| block_on(disk.bitmap_clear(&Blocking, name)))
    }

    /// Whether it records changes from now on. `InvalidArgument` for one that is out of
    /// date.
    pub fn bitmap_set_enabled(&self, name: &[u8], enabled: bool) -> Result<()> {
        self.alter(|disk| block_on(disk.bitmap_set_enabled(&Blocking, name, enabled)))
    }

    /// What is dirty in `from` is dirty in `into`, too, whatever their granularities.
    /// `InvalidArgument` where one is out of date.
    pub fn bitmap_merge(&self, into: &[u8], from: &[u8]) -> Result<()> {
        self.alter(|disk| block_on(disk.bitmap_merge(&Blocking, into, from)))
    }

    fn with_bitmaps<R>(&self, look: impl FnOnce(&Bitmaps) -> Result<R>) -> Result<R> {
        self.inside(|disk| look(block_on(disk.bitmaps(&Blocking))?))
    }
}

fn info(bitmaps: &Bitmaps, index: usize) -> Option<BitmapInfo> {
    let bitmap = bitmaps.list.get(index)?;
    Some(BitmapInfo {
        name: bitmap.name.clone(),
        granularity: 1 << bitmap.granularity_bits,
        dirty_bytes: bitmap.bits.as_ref().map_or(0, |bits| bits.dirty_bytes()),
        in_use: bitmap.bits.is_none(),
        enabled: bitmap.enabled,
    })
}

impl BitmapInfo {
    /// Its flags as the directory of an image has them.
    pub(crate) fn flags(&self) -> u32 {
        let in_use = if self.in_use { IN_USE } else { 0 };
        in_use | if self.enabled { AUTO } else { 0 }
    }
}
