//! How each operation changes the bitmaps of an image: the list is replaced by another
//! one, with a disk that has it. Whatever would make the file's own bits wrong is done
//! only when the file says so, durably.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::limits::{
    MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME, MAX_BITMAPS, MIN_BITMAP_GRANULARITY_BITS,
};
use crate::image::bitmaps::bits::Bits;
use crate::image::bitmaps::{Bitmap, Bitmaps, check_size};
use crate::image::disk::Disk;
use crate::image::handle::{Replacement, closed_by};
use crate::image::qcow2::Qcow2;
use crate::image::views;
use crate::io::engine::Engine;

/// What came of a change, and what takes the place of the disk.
type Changed = (Result<()>, Replacement);

fn unchanged(error: Error) -> Changed {
    (Err(error), Replacement::None)
}

/// All while nobody else does anything with the disk; see `Image`.
impl Disk {
    /// The image, open for writing, and its bitmaps.
    fn to_change(&self) -> Result<(&Qcow2, &Bitmaps)> {
        views::refuse(&self.view, "its bitmaps")?;
        let raw = || Error::new(ErrorKind::NotSupported, "raw images have no bitmaps");
        let image = self.top().ok_or_else(raw)?;
        image.writing()?.allocator.health.check()?;
        let none = || Error::invalid("the bitmaps of this image are not loaded");
        Ok((image, self.bitmaps_now().ok_or_else(none)?))
    }

    fn now_with(&self, bitmaps: Bitmaps) -> Replacement {
        Replacement::Disk(Box::new(self.replaced(bitmaps)))
    }

    /// See `Image::bitmap_add`.
    pub fn bitmap_add(&self, name: &[u8], granularity: u32, enabled: bool) -> Changed {
        match self.added(name, granularity, enabled) {
            Ok(bitmaps) => (Ok(()), self.now_with(bitmaps)),
            Err(error) => unchanged(error),
        }
    }

    fn added(&self, name: &[u8], granularity: u32, enabled: bool) -> Result<Bitmaps> {
        let (image, bitmaps) = self.to_change()?;
        if image.format.version < 3 {
            let text = "version 2 (compat=0.10) has no bitmaps: no program that does not know \
                        them would say that they are out of date";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        if name.is_empty() || name.len() > MAX_BITMAP_NAME || name.contains(&0) {
            let text =
                format!("a bitmap's name has 1 to {MAX_BITMAP_NAME} bytes, none of them zero");
            return Err(Error::invalid(text));
        }
        let granularity_bits = granularity.trailing_zeros() as u8;
        let possible = MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS;
        if !granularity.is_power_of_two() || !possible.contains(&granularity_bits) {
            let text =
                format!("the granularity {granularity} is no power of two from 512 to 2 GiB");
            return Err(Error::invalid(text));
        }
        if bitmaps.find(name).is_ok() {
            let name = String::from_utf8_lossy(name);
            let text = format!("a bitmap is named {name:?} already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        if bitmaps.list.len() >= MAX_BITMAPS as usize {
            let text = format!("the image has {MAX_BITMAPS} bitmaps, and cannot have more");
            return Err(Error::new(ErrorKind::Os(libc::EFBIG), text));
        }
        check_size(image.geometry(), self.size(), granularity_bits)?;
        let more = Bits::bytes_for(self.size(), granularity_bits);
        self.check_bitmaps(bitmaps.bytes().saturating_add(more))?;
        let mut bitmaps = bitmaps.clone();
        bitmaps.list.push(Bitmap {
            name: name.to_vec(),
            granularity_bits,
            enabled,
            bits: Some(Arc::new(Bits::new(self.size(), granularity_bits)?)),
            entry: None,
        });
        Ok(bitmaps)
    }

    /// See `Image::bitmap_remove`.
    pub async fn bitmap_remove<E: Engine>(&self, engine: &E, name: &[u8]) -> Changed {
        let found = self.to_change().and_then(|(_, bitmaps)| Ok((bitmaps, bitmaps.find(name)?)));
        let (bitmaps, index) = match found {
            Ok(found) => found,
            Err(error) => return unchanged(error),
        };
        if bitmaps.list.get(index).is_some_and(|bitmap| bitmap.entry.is_none()) {
            // The file does not know of it.
            let mut bitmaps = bitmaps.clone();
            bitmaps.list.remove(index);
            return (Ok(()), self.now_with(bitmaps));
        }
        if let Err(error) = self.settle(engine).await {
            return unchanged(error);
        }
        let dropped = self.drop_bitmap(engine, index).await;
        // What is free, or was taken in vain.
        let settled = self.settle(engine).await;
        let bitmaps = match dropped {
            Ok(bitmaps) => bitmaps,
            Err(error) => return unchanged(error),
        };
        // The header is another.
        match self.reload_with(engine, Some(bitmaps)).await {
            Ok(disk) => (settled, Replacement::Disk(Box::new(disk))),
            Err(error) => (settled.and(Err(closed_by(error))), Replacement::Closed),
        }
    }

    /// See `Image::bitmap_clear`.
    pub async fn bitmap_clear<E: Engine>(&self, engine: &E, name: &[u8]) -> Changed {
        self.change_one(engine, name, |bitmaps, index| {
            if let Some(bits) = bitmaps.list.get(index).and_then(|bitmap| bitmap.bits.as_ref()) {
                bits.clear();
            }
        })
        .await
    }

    /// See `Image::bitmap_set_enabled`.
    pub async fn bitmap_set_enabled<E: Engine>(
        &self,
        engine: &E,
        name: &[u8],
        enabled: bool,
    ) -> Changed {
        self.change_one(engine, name, |bitmaps, index| {
            if let Some(bitmap) = bitmaps.list.get_mut(index) {
                bitmap.enabled = enabled;
            }
        })
        .await
    }

    /// See `Image::bitmap_merge`.
    pub async fn bitmap_merge<E: Engine>(&self, engine: &E, into: &[u8], from: &[u8]) -> Changed {
        let from = self.to_change().and_then(|(_, bitmaps)| Ok(bitmaps.find_sound(from)?.1));
        let from = match from {
            Ok(from) => from.clone(),
            Err(error) => return unchanged(error),
        };
        self.change_one(engine, into, |bitmaps, index| {
            if let Some(bits) = bitmaps.list.get(index).and_then(|bitmap| bitmap.bits.as_ref()) {
                bits.merge(&from);
            }
        })
        .await
    }

    /// Changes a bitmap that is sound, once the file says that its own is out of date.
    async fn change_one<E: Engine>(
        &self,
        engine: &E,
        name: &[u8],
        change: impl FnOnce(&mut Bitmaps, usize) + Send,
    ) -> Changed {
        let found = self.to_change().and_then(|(image, bitmaps)| {
            let (index, _) = bitmaps.find_sound(name)?;
            Ok((image, bitmaps.clone(), index))
        });
        let (image, mut bitmaps, index) = match found {
            Ok(found) => found,
            Err(error) => return unchanged(error),
        };
        let marked = async {
            let owed = bitmaps.mark(engine, image, |other, _| other == index).await?;
            match owed && !mutant!(BitmapChangeNotMarked) {
                true => image.writing()?.allocator.barrier(engine, &image.storage).await,
                false => Ok(()),
            }
        };
        let result = marked.await;
        if result.is_ok() {
            change(&mut bitmaps, index);
        }
        (result, self.now_with(bitmaps))
    }
}
