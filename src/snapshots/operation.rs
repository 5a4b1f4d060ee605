//! One change of an image's snapshots, of its active state by one, or of its size: how
//! all of them begin, switch over, and end.
//!
//! ```text
//! settle; plan: read, check, allocate, write what is new        (nothing refers to it)
//!     -> dirty bit -> sync -> raised refcounts, cleared COPIED flags
//!     -> sync -> one write of the header: L1 table, snapshot table, size
//!     -> sync -> lowered refcounts, set COPIED flags
//!     -> sync -> dirty bit cleared -> sync
//! ```
//!
//! At every moment each refcount is at least the number of references, and COPIED is set
//! only where there is one: whatever a crash leaves of the steps in between wastes
//! space and copies more than it must, no more. As QEMU's check takes a flag that
//! does not say what the refcount says for corruption, the dirty bit is set meanwhile
//! (version 2 has none): the next open for writing puts refcounts and flags right.
//!
//! What fails in the plan leaves the image as it was. What fails later is repaired at
//! once, if that is possible.

use std::ops::Range;

use super::tables::clear_flags;
use crate::alloc::changes::{Changes, Lowered};
use crate::alloc::overlap::Metadata;
use crate::check::repair;
use crate::error::Result;
use crate::format::header::Header;
use crate::image::bitmaps::Bitmap;
use crate::image::disk::Disk;
use crate::image::handle::{Replacement, closed_by};
use crate::image::qcow2::{Qcow2, SnapshotTable, Writing};
use crate::io::engine::{Engine, Piece};
use crate::log;
use crate::metadata::tables::read;
use crate::sys::memory::Block;

/// What came of a change.
pub struct Changed<T> {
    /// Whether it took place.
    pub result: Result<T>,
    /// What takes the place of the disk: the same image, read again.
    pub disk: Replacement,
}

impl<T> From<Changed<T>> for (Result<T>, Replacement) {
    fn from(changed: Changed<T>) -> Self {
        (changed.result, changed.disk)
    }
}

/// A change under way.
pub(crate) struct Operation<'a, E> {
    pub engine: &'a E,
    pub disk: &'a Disk,
    pub image: &'a Qcow2,
    pub writing: &'a Writing,
    /// The snapshots as they are.
    pub table: &'a SnapshotTable,
    /// The header as it is to be.
    pub header: Header,
    /// Clusters taken for what is new, while nothing refers to them.
    fresh: Vec<Range<u64>>,
    /// Whether anything that is in use has been written to.
    begun: bool,
}

impl<'a, E: Engine> Operation<'a, E> {
    /// Begins, while nobody else does anything with the disk. `ReadOnly`,
    /// `NotSupported`.
    pub async fn begin(engine: &'a E, disk: &'a Disk) -> Result<Self> {
        let image = disk.image_with_snapshots()?;
        let writing = image.writing()?;
        disk.settle(engine).await?;
        let table = disk.snapshot_table(engine).await?;
        let mut header = image.header.clone();
        // It may have grown since.
        header.l1_offset = image.l1.offset();
        header.l1_size = image.l1.len() as u32;
        Ok(Operation {
            engine,
            disk,
            image,
            writing,
            table,
            header,
            fresh: Vec::new(),
            begun: false,
        })
    }

    /// The persistent bitmaps of the image.
    pub fn bitmaps(&self) -> impl Iterator<Item = &'a Bitmap> {
        self.disk.bitmaps_now().into_iter().flat_map(|bitmaps| &bitmaps.list)
    }

    /// An empty list of references, for as many clusters as the file has.
    pub fn changes(&self) -> Result<Changes> {
        let geometry = self.image.geometry();
        let length = self.image.storage.length()?;
        // Two lists may be needed.
        Changes::new(geometry.clusters_for(length), self.disk.options.max_metadata_size / 2)
    }

    /// Takes free clusters that lie together, for something new.
    pub async fn take(&mut self, count: u64) -> Result<Range<u64>> {
        let (allocator, storage) = (&self.writing.allocator, &self.image.storage);
        let clusters = allocator.allocate_together(self.engine, storage, count).await?;
        self.fresh.push(clusters.clone());
        Ok(clusters)
    }

    /// Writes a new table to free clusters; returns where it is.
    pub async fn place(&mut self, bytes: &[u8]) -> Result<u64> {
        let geometry = self.image.geometry();
        let clusters = self.take(geometry.clusters_for(bytes.len() as u64)).await?;
        let offset = clusters.start << geometry.cluster_bits;
        self.write(bytes, offset).await?;
        Ok(offset)
    }

    /// Writes to clusters that were taken.
    pub async fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let block = Block::from_bytes(bytes)?;
        let piece = [Piece::Block(block.slice(0, bytes.len()))];
        self.image.storage.write(self.engine, &piece, offset).await
    }

    /// What was planned can be done; refcounts and flags are about to change. The dirty
    /// bit is durable on return, and so is what is new and its refcounts.
    pub async fn commit(&mut self) -> Result<()> {
        self.begun = true;
        if self.header.version >= 3 && !mutant!(SnapshotNotMarkedDirty) {
            self.image.mark_dirty(self.engine, self.writing).await?;
        }
        self.make_durable().await
    }

    /// Writes the refcounts of what is new.
    pub async fn publish(&self) -> Result<()> {
        self.writing.allocator.write_refcounts(self.engine, &self.image.storage).await
    }

    /// Makes durable what is new, and its refcounts.
    async fn make_durable(&self) -> Result<()> {
        self.publish().await?;
        self.sync().await
    }

    /// Makes durable what was written so far.
    async fn sync(&self) -> Result<()> {
        self.writing.allocator.barrier(self.engine, &self.image.storage).await
    }

    /// Replaces the header's fields by those of `header`, once all that was written
    /// before is durable. Durable on return.
    pub async fn switch(&mut self) -> Result<()> {
        self.begun = true;
        if !mutant!(SnapshotSwitchedEarly) {
            self.sync().await?;
        }
        let (offset, bytes) = self.writing.allocator.refcounts.table_place();
        self.header.reftable_offset = offset;
        self.header.reftable_clusters = self.header.geometry.clusters_for(bytes) as u32;
        self.header.incompatible = self.image.incompatible();
        let patch = self.header.tables_patch();
        self.write_header(&patch, Header::SIZE_AT).await?;
        self.fresh.clear();
        mutant!(SnapshotFreedEarly => return Ok(()));
        self.sync().await
    }

    /// As `switch`, where the version or the width of refcounts changes, too: all of
    /// `header` takes the place of the old one. Nothing may be dirty.
    pub async fn switch_all(&mut self) -> Result<()> {
        let (engine, storage) = (self.engine, &self.image.storage);
        let first = read(engine, storage, 0, Header::READ_FIRST).await?;
        let old = read(engine, storage, 0, Header::bytes_wanted(&first)?).await?;
        let rewrite = self.header.rewrite(&old)?;
        if let Some((offset, name)) = &rewrite.name {
            // Where the old header has nothing.
            self.write_header(name, *offset).await?;
        }
        self.begun = true;
        if !mutant!(AmendSwitchedEarly) {
            self.sync().await?;
        }
        self.write_header(&rewrite.sector, 0).await?;
        self.fresh.clear();
        self.sync().await
    }

    async fn write_header(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let block = Block::from_bytes(bytes)?;
        let piece = [Piece::Block(block.slice(0, bytes.len()))];
        self.image.storage.write(self.engine, &piece, offset).await
    }

    /// What was planned can be done, and that is to share clusters: commits, clears the
    /// COPIED flags of these L2 tables, adds these references, and switches.
    pub async fn share(&mut self, flagged: &[(u64, u32)], gained: &mut Changes) -> Result<()> {
        let (engine, image) = (self.engine, self.image);
        let (refcounts, storage) = (&self.writing.allocator.refcounts, &image.storage);
        self.commit().await?;
        if !mutant!(SnapshotFlagsKept) {
            clear_flags(engine, image, flagged).await?;
        }
        if !mutant!(SnapshotRaisedLate) {
            refcounts.raise_all(engine, storage, gained).await?;
        }
        self.switch().await?;
        mutant!(SnapshotRaisedLate => refcounts.raise_all(engine, storage, gained).await?);
        Ok(())
    }

    /// A table that is not named any more is freed.
    pub async fn free(&self, offset: u64, bytes: u64, kind: Metadata) -> Result<()> {
        let allocator = &self.writing.allocator;
        allocator.overlap.remove(offset, bytes, kind);
        let clusters = allocator.clusters_of(offset, bytes);
        allocator.free_together(self.engine, &self.image.storage, clusters).await
    }

    /// The snapshot table that the header named before is freed.
    pub async fn free_old_table(&self) -> Result<()> {
        let offset = self.image.header.snapshots_offset;
        self.free(offset, self.table.bytes, Metadata::SnapshotTable).await
    }

    /// Gives back to the file system what has become free.
    pub async fn punch(&self, lowered: &Lowered) {
        if !self.writing.punch_snapshots || !self.image.storage.can_punch() {
            return;
        }
        let bits = self.image.geometry().cluster_bits;
        let mut from = 0;
        while let Some(freed) = lowered.next_freed(from) {
            from = freed.end;
            let (start, length) = (freed.start << bits, (freed.end - freed.start) << bits);
            if let Err(error) = self.image.storage.discard(self.engine, start, length).await {
                // They are free all the same.
                let name = self.image.storage.name();
                log::emit(log::WARN, "snapshots", || format!("{name}: punching holes: {error}"));
                return;
            }
        }
    }

    /// Gives back what was taken ahead and not used, and ends in good order.
    async fn end(&self) -> Result<()> {
        self.make_durable().await?;
        self.image.settle(self.engine).await
    }

    /// Ends, whatever has become of it.
    pub async fn finish<T>(self, result: Result<T>) -> Changed<T> {
        let result = match result {
            Ok(value) => self.end().await.map(|()| value),
            Err(error) => Err(error),
        };
        let result = match result {
            Ok(value) => Ok(value),
            Err(error) => {
                // What cannot be undone stays as a leak, and with the dirty bit.
                let (error, undone) = match self.begun {
                    true => {
                        let error = self.disk.note_corruption(self.engine, error).await;
                        (error, self.mend().await)
                    }
                    false => (error, self.give_up().await),
                };
                match undone {
                    Ok(()) => Err(error),
                    Err(second) => {
                        let text = format!(
                            "{} (then, while undoing it: {})",
                            error.message(),
                            second.message()
                        );
                        Err(error.context(text))
                    }
                }
            }
        };
        if !self.begun || self.writing.allocator.health.check().is_err() {
            return Changed { result, disk: Replacement::None };
        }
        match self.disk.reload(self.engine).await {
            Ok(disk) => Changed { result, disk: Replacement::Disk(Box::new(disk)) },
            Err(error) => {
                Changed { result: result.and(Err(closed_by(error))), disk: Replacement::Closed }
            }
        }
    }

    /// Gives back what was taken: nothing refers to it.
    async fn give_up(&self) -> Result<()> {
        for clusters in &self.fresh {
            let (engine, storage) = (self.engine, &self.image.storage);
            self.writing.allocator.free_together(engine, storage, clusters.clone()).await?;
        }
        self.image.settle(self.engine).await
    }

    /// Makes refcounts and flags right after a failure half way.
    async fn mend(&self) -> Result<()> {
        mutant!(SnapshotNotMended => return self.image.mark_clean(self.engine, self.writing).await);
        let (engine, storage) = (self.engine, &self.image.storage);
        let allocator = &self.writing.allocator;
        allocator.health.check()?;
        allocator.give_back_all(engine, storage).await?;
        allocator.write_refcounts(engine, storage).await?;
        let first = read(engine, storage, 0, Header::READ_FIRST).await?;
        let bytes = read(engine, storage, 0, Header::bytes_wanted(&first)?).await?;
        let header = Header::parse(&bytes)?;
        repair(engine, storage, &header, self.disk.options.max_metadata_size).await?;
        match self.writing.features.dirty() {
            true => self.image.mark_clean(engine, self.writing).await,
            false => Ok(()),
        }
    }
}
