//! The order on disk. This module alone knows it, but for what is rare and published
//! at once: larger refcount tables (`alloc`), feature bits, new images.
//!
//! ```text
//! data, copies, new L2 tables, raised refcounts -> sync
//!     -> L2 slices, L1 entries -> sync
//!     -> freed clusters leave limbo, their refcounts are lowered
//! ```
//!
//! The first sync is that of both files where guest data has a file of its own; without
//! it, the last one is. Where there are new refcount blocks, the first sync is two: they are durable before
//! the refcount table names them, which it does before any pointer is written.
//!
//! With lazy refcounts the dirty bit stands in for the raised refcounts: it is
//! durable before any pointer, and goes when the image is settled, after the
//! refcounts are durable.
//!
//! Nothing durable ever points to what is not: the copies of what is dirty are
//! taken *before* the first sync, so each pointer in them is to data that was
//! written before. Nothing is reused before every pointer to it is durably gone.
//! A flush with nothing to point to needs the first sync only. One whose pointers
//! depend on nothing that is not durable needs the last one only: they drop what
//! they pointed to, or lead to fresh clusters where the guest's zeroes were, so that
//! a power loss that spares a pointer and not the data changes nothing. (Whatever
//! else a pointer depends on calls `need_order` before it is changed.)

use std::sync::atomic::Ordering::SeqCst;

use super::disk::{Disk, Layer};
use super::qcow2::{L1Table, Qcow2, Writing};
use crate::alloc::allocator::Allocation;
use crate::alloc::limbo::Freed;
use crate::alloc::overlap::Metadata;
use crate::error::Result;
use crate::io::engine::{Engine, Piece};
use crate::metadata::cache::WriteBack;
use crate::sys::memory::Block;

/// With more than this waiting to be free, a flush comes before growth.
const LIMBO_BYTES: u64 = 64 << 20;
/// Ranges of clusters that wait to be free: more would be a matter of memory.
const MOST_RANGES: usize = 64 << 10;

/// What one pass writes. Dropped before it is through, everything is as dirty as
/// before, and what it wrote waits for a sync.
struct Pass<'a> {
    writing: &'a Writing,
    dropped: Vec<Freed>,
    slices: WriteBack<'a>,
    l1: &'a L1Table,
    entries: Vec<(usize, u64)>,
    /// What the pointers depend on is not durable yet.
    ordered: bool,
    owes_sync: bool,
}

impl<'a> Pass<'a> {
    fn begin(image: &'a Qcow2, writing: &'a Writing) -> Result<Pass<'a>> {
        // In this order: what was freed is gone from the slices copied after it;
        // the tables that slices belong to are in the L1 entries copied last.
        let dropped = writing.allocator.limbo.take_announced();
        let slices = match image.l2.take_dirty() {
            Ok(slices) => slices,
            Err(error) => {
                writing.allocator.limbo.put_back(dropped);
                return Err(error);
            }
        };
        let entries = image.l1.take_dirty();
        let (l1, ordered, owes_sync) = (&image.l1, false, false);
        let mut pass = Pass { writing, dropped, slices, l1, entries, ordered, owes_sync };
        pass.owes_sync = pass.has_pointers();
        // After the copies were taken; and only by who makes them follow.
        pass.ordered = pass.has_pointers() && writing.allocator.take_order();
        Ok(pass)
    }

    fn has_pointers(&self) -> bool {
        !self.slices.is_empty() || !self.entries.is_empty()
    }

    /// All of it is durable: returns what it dropped.
    fn complete(mut self) -> Vec<Freed> {
        self.entries.clear();
        (self.ordered, self.owes_sync) = (false, false);
        std::mem::take(&mut self.dropped)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !mutant!(FailedFlushForgetsFreed) {
            self.writing.allocator.limbo.put_back(std::mem::take(&mut self.dropped));
        }
        if !mutant!(FailedFlushForgetsL1) {
            self.l1.put_back(&self.entries);
        }
        if self.ordered {
            self.writing.allocator.need_order();
        }
        if self.owes_sync && !mutant!(FailedFlushForgetsSync) {
            self.writing.needs_sync.store(true, SeqCst);
        }
    }
}

impl Disk {
    /// Makes durable everything that completed before this call.
    pub async fn flush<E: Engine>(&self, engine: &E) -> Result<()> {
        self.clean_if_due(engine);
        match self.layers.first() {
            Some(Layer::Qcow2(image)) if image.writing.is_some() => {
                match image.flush(engine).await {
                    Ok(()) => Ok(()),
                    Err(error) => Err(self.note_corruption(engine, error).await),
                }
            }
            Some(Layer::Raw(raw)) if raw.storage.access().writable => {
                raw.health.sync(engine, &raw.storage).await
            }
            // Nothing can have been written.
            _ => Ok(()),
        }
    }
}

impl Qcow2 {
    /// Makes durable what completed before. Callers that come while a flush is
    /// under way share the next one.
    pub async fn flush<E: Engine>(&self, engine: &E) -> Result<()> {
        let writing = self.writing()?;
        let begun = writing.flushes_begun.load(SeqCst);
        let begun =
            if mutant!(FlushJoinsEarlier) { writing.flushes_done.load(SeqCst) } else { begun };
        let _leader = writing.flushing.lock().await;
        writing.allocator.health.check()?;
        if writing.flushes_done.load(SeqCst) > begun {
            // One that began after we were called has done our work.
            return Ok(());
        }
        let number = writing.flushes_begun.fetch_add(1, SeqCst) + 1;
        mutant!(CopiedAfterSync => self.sync_early(engine, writing).await?);
        let mut pass = Pass::begin(self, writing)?;
        pass.owes_sync |= writing.needs_sync.swap(false, SeqCst);
        pass.owes_sync |= writing.allocator.has_unnamed_blocks();
        if pass.owes_sync {
            let data_is_durable = self.write_pass(engine, writing, &mut pass).await?;
            if pass.has_pointers() && !mutant!(NoSyncAfterEntries) {
                match data_is_durable && !mutant!(DataFileSyncedLate) {
                    true => writing.allocator.barrier(engine, &self.storage).await?,
                    false => self.sync_files(engine, writing).await?,
                }
            }
        }
        let dropped = pass.complete();
        writing.allocator.limbo.dropped(dropped, &writing.allocator.epochs);
        mutant!(FreedDuringFlushReleased => writing.allocator.drop_announced());
        writing.allocator.release_ready(engine, &self.storage).await?;
        writing.flushes_done.store(number, SeqCst);
        Ok(())
    }

    /// Syncs the data file, if there is one, and the image file.
    async fn sync_files<E: Engine>(&self, engine: &E, writing: &Writing) -> Result<()> {
        if let Some(data) = self.data_file.as_deref().filter(|_| !mutant!(DataFileNotSynced)) {
            writing.allocator.barrier(engine, data).await?;
        }
        writing.allocator.barrier(engine, &self.storage).await
    }

    /// Everything up to the write of the pointers; what they drop is still theirs
    /// until a sync has followed. Returns whether all data that was written before is
    /// durable.
    async fn write_pass<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
        pass: &mut Pass<'_>,
    ) -> Result<bool> {
        let allocator = &writing.allocator;
        if pass.has_pointers() && writing.lazy {
            if !mutant!(DirtyBitNotSet, DirtyBitLate) {
                // The bit is durable before the first entry.
                pass.ordered |= self.mark_dirty(engine, writing).await?;
            }
        } else if pass.has_pointers() && !mutant!(RefcountsLeftForClose, EntriesBeforeRefcounts) {
            allocator.refcounts.write_back(engine, &self.storage).await?;
        }
        // The entries of new refcount blocks are durable before what these count is.
        pass.ordered |= allocator.name_blocks(engine, &self.storage).await?;
        // Without the order, for benchmarks of what it costs: never for data.
        let ordered = pass.ordered
            && !cfg!(qcow2rs_unordered)
            && !mutant!(NoSyncBeforeEntries, CopiedAfterSync);
        let syncs = ordered || !pass.has_pointers();
        if syncs && mutant!(DataFileSyncedLate) && pass.has_pointers() {
            allocator.barrier(engine, &self.storage).await?;
        } else if syncs {
            self.sync_files(engine, writing).await?;
        }
        pass.ordered = false;
        self.write_slices(engine, writing, pass).await?;
        for (index, value) in &pass.entries {
            let offset = self.l1.offset() + *index as u64 * 8;
            allocator.overlap.check_table(offset, 8, Metadata::L1)?;
            let block = Block::from_bytes(&value.to_be_bytes())?;
            self.storage.write(engine, &[Piece::Block(block.slice(0, 8))], offset).await?;
        }
        mutant!(EntriesBeforeRefcounts => {
            allocator.refcounts.write_back(engine, &self.storage).await?;
        });
        mutant!(DirtyBitLate => if writing.lazy {
            self.mark_dirty(engine, writing).await?;
        });
        Ok(syncs)
    }

    async fn write_slices<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
        pass: &mut Pass<'_>,
    ) -> Result<()> {
        while let Some(slice) = pass.slices.next() {
            let (offset, bytes) = (slice.key.get(), slice.bytes.len() as u64);
            writing.allocator.overlap.check_table(offset, bytes, Metadata::L2)?;
            mutant!(EntryWrittenInHalves => self.write_halves(engine, slice).await?);
            let block = Block::from_bytes(&slice.bytes)?;
            let written = self.storage.write(engine, &[Piece::Block(block.all())], offset).await;
            if !mutant!(EntryErrorForgotten) {
                written?;
            }
            pass.slices.mark_written();
        }
        Ok(())
    }

    /// Writes back so that slices can leave the cache. Not a flush: what was
    /// written still waits for a sync, and so does what it dropped.
    pub(super) async fn make_room<E: Engine>(&self, engine: &E) -> Result<()> {
        let Some(writing) = &self.writing else { return Ok(()) };
        let _leader = writing.flushing.lock().await;
        writing.allocator.health.check()?;
        let mut pass = Pass::begin(self, writing)?;
        mutant!(EvictionWithoutOrder => self.write_slices(engine, writing, &mut pass).await?);
        if pass.has_pointers() {
            self.write_pass(engine, writing, &mut pass).await?;
            pass.entries.clear();
            mutant!(EvictionFreesClusters => {
                writing.allocator.limbo.dropped(pass.complete(), &writing.allocator.epochs);
                return Ok(());
            });
        }
        Ok(())
    }

    /// Allocates up to `want` clusters; when nothing else is free, what waits in
    /// limbo is made free by a flush.
    pub(super) async fn allocate<E: Engine>(
        &self,
        engine: &E,
        want: u64,
    ) -> Result<Allocation<'_>> {
        let allocator = &self.writing()?.allocator;
        mutant!(NoLimbo => {
            allocator.drop_announced();
            allocator.release_ready(engine, &self.storage).await?;
        });
        if allocator.limbo.clusters() > LIMBO_BYTES >> self.geometry().cluster_bits {
            self.flush(engine).await?;
        }
        match allocator.allocate(engine, &self.storage, want).await {
            // By errno: callbacks report a full storage in their own kind.
            Err(error) if error.errno() == libc::ENOSPC && allocator.limbo.clusters() > 0 => {
                self.flush(engine).await?;
                // What was freed may still be read: wait for that rather than call
                // a storage full that is not.
                if allocator.limbo.clusters() > 0 {
                    allocator.epochs.all_left().await;
                    allocator.release_ready(engine, &self.storage).await?;
                }
                allocator.allocate(engine, &self.storage, want).await
            }
            other => other,
        }
    }

    /// Flushes where so much waits in limbo that remembering it costs memory. Not
    /// to be called with a claim.
    pub(super) async fn bound_limbo<E: Engine>(&self, engine: &E) -> Result<()> {
        match self.writing()?.allocator.limbo.ranges() {
            ..=MOST_RANGES => Ok(()),
            _ => self.flush(engine).await,
        }
    }

    /// Brings the image into the state that its next user should find: flushed,
    /// nothing reserved. Nobody may be inside.
    pub(crate) async fn settle<E: Engine>(&self, engine: &E) -> Result<()> {
        let Some(writing) = &self.writing else { return Ok(()) };
        let allocator = &writing.allocator;
        allocator.stop_filling(&mut *writing.filling.lock().await);
        self.flush(engine).await?;
        allocator.release_ready(engine, &self.storage).await?;
        let needed = allocator.give_back_all(engine, &self.storage).await?;
        let dirty = writing.features.dirty();
        mutant!(CleanedBeforeRefcounts => self.mark_clean(engine, writing).await?);
        if allocator.refcounts.is_dirty() || dirty {
            allocator.refcounts.write_back(engine, &self.storage).await?;
            // Some may have been written before, to make room, and not synced yet.
            allocator.barrier(engine, &self.storage).await?;
        }
        if dirty {
            self.mark_clean(engine, writing).await?;
        }
        if let Some(length) = needed {
            // Everything is durable; whether the file becomes shorter is a detail that
            // not every storage can see to.
            let _ = allocator.shrink_file(engine, &self.storage, length).await;
        }
        Ok(())
    }
}
