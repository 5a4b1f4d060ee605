//! What seeded bugs (`crate::mutants`) do that is more than leaving something out.
//! No build but that of the mutants has this file.

use super::qcow2::{Qcow2, Writing};
use crate::alloc::allocator::Allocator;
use crate::error::Result;
use crate::format::l2::L2Entry;
use crate::geometry::HostOffset;
use crate::io::engine::{Engine, Piece, Target};
use crate::metadata::cache::DirtySlice;
use crate::sys::memory::Block;

impl Allocator {
    /// Takes what was announced for durably dropped.
    pub(super) fn drop_announced(&self) {
        self.limbo.dropped(self.limbo.take_announced(), &self.epochs);
    }
}

impl Qcow2 {
    /// What comes before the entries, done before they are copied.
    pub(super) async fn sync_early<E: Engine>(&self, engine: &E, writing: &Writing) -> Result<()> {
        writing.allocator.refcounts.write_back(engine, &self.storage).await?;
        writing.allocator.barrier(engine, &self.storage).await
    }

    /// Writes what is new in a slice of extended entries, eight bytes at a time.
    pub(super) async fn write_halves<E: Engine>(
        &self,
        engine: &E,
        slice: &DirtySlice,
    ) -> Result<()> {
        if self.format.words() == 1 {
            return Ok(());
        }
        let old = Block::zeroed(slice.bytes.len())?;
        self.storage.read(engine, Target::Block(old.all()), slice.key.get()).await?;
        let old = old.all().to_vec()?;
        for (index, new) in slice.bytes.chunks(8).enumerate() {
            if old.get(index * 8..index * 8 + 8) != Some(new) {
                let at = slice.key.get() + index as u64 * 8;
                let word = Block::from_bytes(new)?;
                self.storage.write(engine, &[Piece::Block(word.slice(0, 8))], at).await?;
            }
        }
        Ok(())
    }

    /// The second half of changed entries, some time after the first.
    pub(super) async fn change_late<E: Engine>(
        &self,
        engine: &E,
        key: HostOffset,
        entries: &[(usize, L2Entry)],
    ) -> Result<()> {
        if self.format.words() == 1 || entries.is_empty() {
            return Ok(());
        }
        let block = Block::zeroed(512)?;
        self.storage.read(engine, Target::Block(block.all()), 0).await?;
        self.l2.update(key, |slice| {
            for (index, entry) in entries {
                slice.set(index * 2 + 1, entry.bitmap);
            }
        });
        Ok(())
    }
}
