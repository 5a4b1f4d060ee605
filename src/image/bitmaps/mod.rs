//! The persistent dirty bitmaps of an open image: which there are, which of them record
//! changes, and what the directory in the file says of them.
//!
//! `bits` are the bits of one, `load` reads them when an image is opened, `mark` says in
//! the file that it is out of date, `store` writes it back. What programs ask for is in
//! the room `bitmaps`.
//!
//! A bitmap whose content in the file would be out of date has the flag IN_USE there,
//! durably so before the first change that the file does not know of: bitmaps that record
//! changes from the open on, others from their first change on (merge, enable). It goes
//! again only with the write that names a stored bitmap which covers everything. So
//! whatever happens in between, a bitmap without the flag is right, and one with it is
//! believed by nobody.

pub mod bits;
pub(super) mod load;
mod mark;
mod store;

use std::ops::Range;
use std::sync::Arc;

use self::bits::Bits;
use super::disk::{Disk, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::{AUTO, BitmapEntry, IN_USE};
use crate::format::extensions::BitmapsExt;
use crate::format::limits::{MAX_BITMAP_BYTES, MAX_BITMAP_TABLE_ENTRIES};
use crate::geometry::Geometry;
use crate::io::engine::Engine;

/// The bitmaps of an image as they are now. A change makes another list.
#[derive(Clone, Debug, Default)]
pub struct Bitmaps {
    /// Those that the directory has, in its order; then those that are new.
    pub list: Vec<Bitmap>,
    /// Where the directory is.
    pub place: Option<BitmapsExt>,
}

/// One bitmap.
#[derive(Clone, Debug)]
pub struct Bitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// log2 of the bytes of the disk that one bit stands for.
    pub granularity_bits: u8,
    /// Whether it records changes.
    pub enabled: bool,
    /// Its bits; `None`: it was not stored when the image was closed, and is out of date.
    pub bits: Option<Arc<Bits>>,
    /// What the directory says; `None`: it is not there yet.
    pub entry: Option<BitmapEntry>,
}

impl Bitmap {
    /// Whether the file says of itself that it is out of date, or knows nothing of it.
    fn is_marked(&self) -> bool {
        self.entry.as_ref().is_none_or(|entry| entry.flags & IN_USE != 0)
    }

    /// Whether it has to be stored.
    fn is_owed(&self) -> bool {
        self.bits.is_some() && self.is_marked()
    }

    /// Its flags as the directory has them while it is right.
    fn flags(&self) -> u32 {
        if self.enabled { AUTO } else { 0 }
    }
}

impl Bitmaps {
    /// The first one with this name. `NotFound`.
    pub fn find(&self, name: &[u8]) -> Result<usize> {
        self.list.iter().position(|bitmap| bitmap.name == name).ok_or_else(|| {
            let name = String::from_utf8_lossy(name);
            Error::new(ErrorKind::NotFound, format!("no bitmap is named {name:?}"))
        })
    }

    /// As `find`, with its bits. `InvalidArgument` where it is out of date.
    pub fn find_sound(&self, name: &[u8]) -> Result<(usize, &Arc<Bits>)> {
        let index = self.find(name)?;
        let bits = self.list.get(index).and_then(|bitmap| bitmap.bits.as_ref());
        bits.map(|bits| (index, bits)).ok_or_else(|| {
            let name = String::from_utf8_lossy(name);
            Error::invalid(format!(
                "the bitmap {name:?} was not stored when the image was closed last: it misses \
                 changes, and can only be removed"
            ))
        })
    }

    /// Memory for all bits.
    pub fn bytes(&self) -> u64 {
        let bits = self.list.iter().filter_map(|bitmap| bitmap.bits.as_ref());
        bits.map(|bits| bits.bytes()).fold(0, u64::saturating_add)
    }

    /// Whether the directory has to be written when the image is closed.
    pub fn owe(&self) -> bool {
        self.list.iter().any(Bitmap::is_owed)
    }

    /// What the directory says.
    fn directory(&self) -> Vec<BitmapEntry> {
        self.list.iter().filter_map(|bitmap| bitmap.entry.clone()).collect()
    }

    /// The same for a disk of another size: what is new is not dirty. `NotSupported`, as
    /// in QEMU, where one is out of date, and for a disk without bytes;
    /// `InvalidArgument` where one would be too large; `OutOfMemory`.
    pub fn resized(&self, geometry: Geometry, size: u64) -> Result<Bitmaps> {
        let mut bitmaps = self.clone();
        for bitmap in &mut bitmaps.list {
            let name = String::from_utf8_lossy(&bitmap.name);
            let Some(bits) = &bitmap.bits else {
                let text = format!("the bitmap {name:?} is out of date: remove it first");
                return Err(Error::new(ErrorKind::NotSupported, text));
            };
            check_size(geometry, size, bitmap.granularity_bits)?;
            bitmap.bits = Some(Arc::new(bits.resized(size)?));
        }
        Ok(bitmaps)
    }
}

/// Whether a bitmap of a disk can be stored. `InvalidArgument`; `NotSupported` for a
/// disk without bytes, whose bitmap would have no table.
pub fn check_size(geometry: Geometry, size: u64, granularity_bits: u8) -> Result<()> {
    let bytes = size.div_ceil(1 << granularity_bits).div_ceil(8);
    let clusters = geometry.clusters_for(bytes);
    if clusters == 0 {
        let text = "a disk without bytes has no bitmaps";
        return Err(Error::new(ErrorKind::NotSupported, text));
    }
    if clusters > MAX_BITMAP_TABLE_ENTRIES.into()
        || clusters << geometry.cluster_bits > MAX_BITMAP_BYTES
    {
        let text = format!(
            "a bitmap of a disk of {size} bytes would have {bytes} bytes: {MAX_BITMAP_BYTES} at \
             most, with a larger granularity"
        );
        return Err(Error::invalid(text));
    }
    Ok(())
}

impl Disk {
    /// The same disk with these bitmaps. Nothing may be under way.
    pub fn with_bitmaps(mut self, bitmaps: Bitmaps) -> Disk {
        let recording = bitmaps.list.iter().filter(|bitmap| bitmap.enabled);
        self.recording = recording.filter_map(|bitmap| bitmap.bits.clone()).collect();
        self.bitmaps = bitmaps.into();
        self
    }

    /// What takes the place of this disk where its bitmaps are others.
    pub fn replaced(&self, bitmaps: Bitmaps) -> Disk {
        Disk::new(self.layers.clone(), self.options.clone()).with_bitmaps(bitmaps)
    }

    /// A request is about to change these bytes. To be called before it changes any, and
    /// while it is inside: whoever takes the bits back has the image alone.
    #[inline]
    pub fn record(&self, offset: u64, length: u64) {
        for bits in &self.recording {
            bits.set(offset..offset.saturating_add(length));
        }
    }

    /// As `record`, of a request whose seeded bug is that it is forgotten.
    #[inline]
    pub fn record_unless(&self, forgotten: bool, bytes: Range<u64>) {
        if !forgotten {
            self.record(bytes.start, bytes.end - bytes.start);
        }
    }

    /// The bitmaps of an image, if it is open for writing; those of others are read when
    /// somebody asks for them.
    pub fn bitmaps_now(&self) -> Option<&Bitmaps> {
        self.bitmaps.get()
    }

    /// The bitmaps of the disk's own image; none of a snapshot that is open itself.
    /// `NotSupported` for raw images; `Corrupt`, `Limit`.
    pub async fn bitmaps<E: Engine>(&self, engine: &E) -> Result<&Bitmaps> {
        if let Some(bitmaps) = self.bitmaps.get() {
            return Ok(bitmaps);
        }
        let Some(Layer::Qcow2(image)) = self.layers.first() else {
            return Err(Error::new(ErrorKind::NotSupported, "raw images have no bitmaps"));
        };
        let bitmaps = match &self.view {
            Some(_) => Bitmaps::default(),
            None => load::load(engine, image, &mut self.budget_beside()?).await?,
        };
        // If somebody else was faster, it is the same.
        Ok(self.bitmaps.get_or_init(|| bitmaps))
    }
}
