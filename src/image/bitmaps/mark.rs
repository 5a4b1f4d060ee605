//! Saying in the file that bitmaps are about to be out of date there.
//!
//! The directory is written where it is. Nothing of it changes but the flag IN_USE of
//! some entries, which is one bit of one byte: whatever a crash leaves of the write is a
//! directory in which each bitmap is marked or not, and as long as nothing else has
//! changed both are right. (QEMU clears the autoclear bit meanwhile, and loses all
//! bitmaps if it is killed then.)

use super::{Bitmap, Bitmaps};
use crate::alloc::overlap::Metadata;
use crate::error::Result;
use crate::format::bitmap::{IN_USE, encode_directory};
use crate::image::qcow2::Qcow2;
use crate::io::engine::{Engine, Piece};
use crate::sys::memory::Block;

impl Bitmaps {
    /// Marks those that `which` chooses and that are not marked yet; durable with the
    /// next sync, which is owed if this returns true. After an error they count as
    /// marked: they may be.
    pub async fn mark<E: Engine>(
        &mut self,
        engine: &E,
        image: &Qcow2,
        which: impl Fn(usize, &Bitmap) -> bool + Send,
    ) -> Result<bool> {
        let mut any = false;
        for (index, bitmap) in self.list.iter_mut().enumerate() {
            if bitmap.is_marked() || !which(index, bitmap) {
                continue;
            }
            if let Some(entry) = &mut bitmap.entry {
                entry.flags |= IN_USE;
                any = true;
            }
        }
        let Some(place) = self.place.filter(|_| any) else { return Ok(false) };
        let bytes = encode_directory(&self.directory())?;
        let overlap = &image.writing()?.allocator.overlap;
        let (offset, length) = (place.directory_offset, bytes.len() as u64);
        overlap.check_table(offset, length, Metadata::BitmapDirectory)?;
        let block = Block::from_bytes(&bytes)?;
        let piece = [Piece::Block(block.slice(0, bytes.len()))];
        image.storage.write(engine, &piece, offset).await?;
        Ok(true)
    }
}
