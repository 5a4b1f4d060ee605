//! Making the refcounts of a dirty image right: each becomes what was counted, and
//! the COPIED flags follow. Nothing else is mended, and nothing at all is written
//! where something could not be counted.
//!
//! The dirty bit stays for the caller to clear, after all of this is durable. Until
//! then no refcount and no flag is believed by anybody, so they may be written in any
//! order; only a new refcount block has to be durable before the table names it.

use super::counts::{Block, Blocks};
use super::tables::{Entry, L2Uses};
use super::{Check, Finding, Observer};
use crate::error::{Error, Result};
use crate::fallible;
use crate::format::header::Header;
use crate::format::l2::COPIED;
use crate::format::limits::{MAX_HOST_OFFSET, OFFSET_MASK};
use crate::io::engine::{Engine, Piece};
use crate::io::storage::Storage;
use crate::log;
use crate::sys::memory;

/// Logs what is found: damage, of which there should be none.
struct Log<'a> {
    name: &'a str,
}

impl Observer for Log<'_> {
    fn finding(&mut self, finding: &Finding) {
        log::emit(log::WARN, "repair", || format!("{}: {}", self.name, finding.message));
    }
}

/// Makes the refcounts and COPIED flags of the image on a storage right, while
/// nobody else uses it; durable on return. `memory`: how many bytes may be taken.
///
/// `Corrupt` where references cannot be counted, or metadata lies in the same place
/// as something else: the image is as it was then. `Limit`, and errors of I/O, after
/// which the refcounts are no better and no worse than before.
pub async fn repair<E: Engine>(
    engine: &E,
    storage: &Storage,
    header: &Header,
    memory: u64,
) -> Result<()> {
    let mut log = Log { name: storage.name() };
    let mut check = Check::new(engine, storage, header, memory, &mut log)?;
    check.repair().await.map_err(|error| {
        let text = format!("{}: repairing refcounts after an unclean close", storage.name());
        error.context(text)
    })
}

fn beyond_repair(what: &str) -> Error {
    Error::corrupt(format!(
        "{what}: refcounts alone cannot be repaired (open it read-only, or see what `qemu-img \
         check -r all` can do)"
    ))
}

impl<E: Engine> Check<'_, E> {
    async fn repair(&mut self) -> Result<()> {
        let uses = self.count().await?;
        let mut blocks = Blocks::load(self).await?;
        self.refcount_blocks(&blocks)?;
        if let Some(what) = &self.uncounted {
            return Err(beyond_repair(what));
        }
        self.tables_are_tables(&uses)?;
        self.add_blocks(&mut blocks).await?;
        self.write_counts(&blocks).await?;
        self.write_l1_flags().await?;
        for (table, _) in uses.tables.iter().filter(|(table, uses)| **table != 0 && uses.active > 0)
        {
            self.write_l2_flags(*table).await?;
        }
        mutant!(RepairNotSynced => return Ok(()));
        self.storage.sync(self.engine).await
    }

    /// What is going to be written to is that and nothing else.
    fn tables_are_tables(&self, uses: &L2Uses) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let reftable = u64::from(self.header.reftable_clusters) << bits;
        let once = [
            ("the header", 0, 1),
            ("the L1 table", self.header.l1_offset, u64::from(self.header.l1_size) * 8),
            ("the refcount table", self.header.reftable_offset, reftable),
        ];
        for (what, offset, bytes) in once {
            let clusters = offset >> bits..offset.saturating_add(bytes).div_ceil(1 << bits);
            if self.geometry.in_cluster(offset) != 0
                || clusters.into_iter().any(|cluster| self.references.get(cluster) != 1)
            {
                return Err(beyond_repair(&format!("{what} lies where something else is")));
            }
        }
        for (table, uses) in uses.tables.iter().filter(|(table, _)| **table != 0) {
            if self.geometry.in_cluster(*table) != 0
                || self.references.get(table >> bits) != uses.all
            {
                let text = format!("the L2 table at {table:#x} lies where something else is");
                return Err(beyond_repair(&text));
            }
        }
        Ok(())
    }

    /// Gives every cluster in use a refcount block, at the end of all that there is.
    async fn add_blocks(&mut self, blocks: &mut Blocks) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut new = Vec::new();
        let mut from = 0;
        while let Some((cluster, _)) = self.references.next(from, u64::MAX) {
            let index = cluster / blocks.per_block();
            from = (index + 1) * blocks.per_block();
            if !matches!(blocks.block(index, 1 << bits), Block::None) {
                continue;
            }
            // This one is counted as well, by itself or by one that is yet to come.
            let place = self.clusters();
            let offset = place << bits;
            if offset > MAX_HOST_OFFSET - (1 << bits) || !blocks.set(index, offset) {
                return Err(beyond_repair(&format!("no refcount table counts cluster {cluster}")));
            }
            self.references.add(place, 1)?;
            new.push(index);
        }
        for index in &new {
            self.write_block(*index, blocks).await?;
        }
        if !new.is_empty() {
            self.storage.sync(self.engine).await?;
        }
        for index in new {
            let Block::At(offset) = blocks.block(index, 1 << bits) else { continue };
            self.write(&offset.to_be_bytes(), self.header.reftable_offset + index * 8).await?;
        }
        Ok(())
    }

    /// Writes all refcount blocks that do not say what was counted.
    async fn write_counts(&mut self, blocks: &Blocks) -> Result<()> {
        for index in 0..blocks.entries() {
            self.write_block(index, blocks).await?;
        }
        Ok(())
    }

    async fn write_block(&mut self, index: u64, blocks: &Blocks) -> Result<()> {
        let size = self.geometry.cluster_size();
        let Block::At(offset) = blocks.block(index, size) else { return Ok(()) };
        let mut bytes = fallible::filled(size as usize, 0u8)?;
        let first = index * blocks.per_block();
        let mut from = first;
        while let Some((cluster, count)) = self.references.next(from, first + blocks.per_block()) {
            self.width.set_in(&mut bytes, cluster - first, count);
            from = cluster + 1;
        }
        if self.read(offset, size).await? != bytes {
            self.write(&bytes, offset).await?;
        }
        Ok(())
    }

    async fn write_l1_flags(&mut self) -> Result<()> {
        const PIECE: u64 = 16 << 10;
        let (offset, entries) = (self.header.l1_offset, u64::from(self.header.l1_size));
        for first in (0..entries).step_by(PIECE as usize) {
            let at = offset + first * 8;
            let old = self.read_words(at, PIECE.min(entries - first)).await?;
            let flagged = |entry: &u64| match entry & OFFSET_MASK {
                0 => *entry,
                table => self.flagged(*entry, table),
            };
            let new = fallible::collect(old.len(), old.iter().map(flagged))?;
            if new != old {
                let bytes = new.iter().flat_map(|entry| entry.to_be_bytes());
                let bytes = fallible::collect(new.len() * 8, bytes)?;
                self.write(&bytes, at).await?;
            }
        }
        Ok(())
    }

    async fn write_l2_flags(&mut self, table: u64) -> Result<()> {
        let old = self.l2_entries(table).await?;
        let flagged = |entry: &Entry| match entry.is_standard() {
            // Nobody shares what is in a data file.
            true if entry.is_external() => entry.with_descriptor(entry.descriptor() | COPIED),
            true => entry.with_descriptor(self.flagged(entry.descriptor(), entry.offset())),
            false => *entry,
        };
        let new = fallible::collect(old.len(), old.iter().map(flagged))?;
        if new == old {
            return Ok(());
        }
        let size = self.geometry.cluster_size() as usize;
        let bytes = fallible::collect(size, new.iter().flat_map(|entry| entry.bytes()))?;
        self.write(&bytes, table).await
    }

    /// An entry of a table with the COPIED flag that the count of `offset` asks for.
    fn flagged(&self, entry: u64, offset: u64) -> u64 {
        match self.references.get(offset >> self.geometry.cluster_bits) {
            1 => entry | COPIED,
            _ => entry & !COPIED,
        }
    }

    async fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let block = memory::Block::from_bytes(bytes)?;
        let piece = Piece::Block(block.slice(0, bytes.len()));
        self.storage.write(self.engine, &[piece], offset).await
    }
}
