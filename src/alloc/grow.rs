//! More refcount blocks, as the refcount table names them; and a larger table, when
//! the clusters that the old one can count are used up.
//!
//! The new table and the blocks that count it lie in the first clusters that the
//! old table could not count, so that nothing of the old structure changes until
//! one write of the header switches over.

use super::allocator::Allocator;
use super::overlap::Metadata;
use super::refcounts::Refcounts;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::header::Header;
use crate::format::limits::MAX_REFTABLE_BYTES;
use crate::geometry::HostOffset;
use crate::io::engine::{Engine, Piece};
use crate::io::storage::Storage;
use crate::sys::memory::Block;

/// The clusters of a larger table.
struct Layout {
    /// First cluster: the blocks, then the table.
    start: u64,
    blocks: u64,
    table_clusters: u64,
}

impl Refcounts {
    /// The table in memory names a new block from now on.
    pub(super) fn publish_block(&self, table_index: u64, offset: HostOffset) {
        // What is cached of those clusters is from an earlier use.
        self.cache.forget(offset, self.geometry.cluster_size());
        let mut table = self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(entry) =
            usize::try_from(table_index).ok().and_then(|i| table.entries.get_mut(i))
        {
            *entry = offset.get();
            self.unnamed().push((table_index, offset));
        }
    }
}

impl Allocator {
    fn layout_for_growth(&self, old_entries: u64) -> Result<Layout> {
        let size = self.geometry.cluster_size();
        let per_block = self.refcounts.per_block();
        let too_large = || {
            Error::new(
                ErrorKind::Os(libc::EFBIG),
                "the refcount table cannot grow: the image has reached the largest size for its \
                 cluster size and refcount width",
            )
        };
        let max_clusters = MAX_REFTABLE_BYTES / size;
        let mut table_clusters = ((old_entries + old_entries / 2 + 1) * 8).div_ceil(size);
        table_clusters = table_clusters.min(max_clusters);
        let mut blocks = 1;
        loop {
            let needed = (blocks + table_clusters).div_ceil(per_block);
            let entries_needed = ((old_entries + needed) * 8).div_ceil(size);
            if needed <= blocks && entries_needed <= table_clusters {
                break;
            }
            blocks = blocks.max(needed);
            table_clusters = table_clusters.max(entries_needed);
            if table_clusters > max_clusters {
                return Err(too_large());
            }
        }
        Ok(Layout { start: old_entries * per_block, blocks, table_clusters })
    }

    /// Writes all refcounts that have changed, and what leads to them; a sync has to
    /// follow before anything points to what they count.
    pub async fn write_refcounts<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<()> {
        self.refcounts.write_back(engine, storage).await?;
        self.name_blocks(engine, storage).await.map(|_| ())
    }

    /// Whether there are refcount blocks that the table on disk does not name.
    pub fn has_unnamed_blocks(&self) -> bool {
        !self.refcounts.unnamed().is_empty()
    }

    /// Has the table on disk name the refcount blocks that are new; whether there were
    /// any. Before a pointer leads to a cluster that they count, a sync follows.
    pub async fn name_blocks<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<bool> {
        // Whoever has a pointer to write has made the block that it needs before. So there
        // is no waiting for a search for free clusters that is under way.
        if !self.has_unnamed_blocks() {
            return Ok(false);
        }
        // The table stays where it is meanwhile, and gets no more entries.
        let _one_at_a_time = self.refilling.lock().await;
        let unnamed = self.refcounts.unnamed().clone();
        if unnamed.is_empty() {
            return Ok(false);
        }
        if !mutant!(NoSyncBeforeNewBlock) {
            self.barrier(engine, storage).await?;
        }
        let table_offset = self.refcounts.table().offset;
        for (index, block) in unnamed {
            let entry = Block::from_bytes(&block.get().to_be_bytes())?;
            let at = table_offset + index * 8;
            self.overlap.check_table(at, 8, Metadata::RefcountTable)?;
            storage.write(engine, &[Piece::Block(entry.slice(0, 8))], at).await?;
        }
        self.refcounts.unnamed().clear();
        Ok(true)
    }

    /// Switches to a larger table. One at a time (the caller holds `refilling`).
    pub(super) async fn grow_table<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<()> {
        let (mut entries, old_offset) = {
            let table = self.refcounts.table();
            // Room for the new one, too.
            let mut entries = fallible::room_for(table.entries.len() * 2)?;
            entries.extend_from_slice(&table.entries);
            (entries, table.offset)
        };
        let old_entries = entries.len() as u64;
        let size = self.geometry.cluster_size();
        let per_block = self.refcounts.per_block();
        let Layout { start, blocks, table_clusters } = self.layout_for_growth(old_entries)?;
        let end = start + blocks + table_clusters;
        self.check_room(storage, end - 1)?;
        self.overlap.check_data(start * size, (end - start) * size)?;
        self.extend(engine, storage, end).await?;

        for block in 0..blocks {
            let used = (end - start).saturating_sub(block * per_block).min(per_block);
            let counts = Block::from_bytes(&self.counts_for_block(0, used)?)?;
            storage.write(engine, &[Piece::Block(counts.all())], (start + block) * size).await?;
            entries.push((start + block) * size);
        }
        entries.resize((table_clusters * size / 8) as usize, 0);
        let offset = (start + blocks) * size;
        let raw = entries.iter().flat_map(|entry| entry.to_be_bytes());
        let bytes = fallible::collect(entries.len() * 8, raw)?;
        let block = Block::from_bytes(&bytes)?;
        storage.write(engine, &[Piece::Block(block.all())], offset).await?;
        if !mutant!(NoSyncBeforeTableSwitch) {
            self.barrier(engine, storage).await?;
        }

        let mut fields = offset.to_be_bytes().to_vec();
        fields.extend_from_slice(&(table_clusters as u32).to_be_bytes());
        let block = Block::from_bytes(&fields)?;
        storage.write(engine, &[Piece::Block(block.slice(0, 12))], Header::REFTABLE_AT).await?;
        if !mutant!(NoSyncAfterTableSwitch) {
            self.barrier(engine, storage).await?;
        }

        self.overlap.add(start * size, blocks * size, Metadata::RefcountBlock);
        self.overlap.add(offset, table_clusters * size, Metadata::RefcountTable);
        self.overlap.remove(old_offset, old_entries * 8, Metadata::RefcountTable);
        if let Some(first) = HostOffset::new(start * size) {
            self.refcounts.cache.forget(first, (end - start) * size);
        }
        {
            let mut table =
                self.refcounts.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            table.entries = entries;
            table.offset = offset;
        }
        // The new table names them all.
        self.refcounts.unnamed().clear();
        {
            let mut state = self.lock();
            state.fresh_from = state.fresh_from.max(end);
            self.note_untouched(&state);
        }
        // Nobody reads the table but through memory, and the switch is durable.
        let old = old_offset / size..old_offset / size + (old_entries * 8).div_ceil(size);
        self.refcounts.lower(engine, storage, old.clone()).await?;
        self.note_free(old.start);
        Ok(())
    }
}
