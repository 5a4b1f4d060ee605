//! The image's own refcounts: whether their blocks are sound, and whether they are
//! what was counted.

use std::collections::BTreeSet;

use super::Check;
use crate::error::Result;
use crate::format::refcount::RefcountWidth;
use crate::io::engine::Engine;

/// Bits of an entry of the refcount table that must be zero.
const RESERVED: u64 = 0x1ff;

/// The refcount table, and the block that was read last.
pub struct Blocks {
    table: Vec<u64>,
    width: RefcountWidth,
    /// Clusters that a block counts.
    per_block: u64,
    /// Those that could not be read, by their place in the table.
    failed: BTreeSet<u64>,
    last: Option<(u64, Vec<u8>)>,
}

/// The block that counts a cluster.
pub(super) enum Block {
    /// There is none: all counts are zero.
    None,
    /// It cannot be: its place is not that of a cluster, or reading it failed.
    Unreadable,
    At(u64),
}

impl Blocks {
    pub(super) async fn load<E: Engine>(check: &mut Check<'_, E>) -> Result<Blocks> {
        let size = check.geometry.cluster_size();
        let entries = u64::from(check.header.reftable_clusters) * size / 8;
        check.reserve(entries * 8)?;
        let table = check.read_words(check.header.reftable_offset, entries).await?;
        let (width, per_block) = (check.width, check.width.entries_per(size));
        Ok(Blocks { table, width, per_block, failed: BTreeSet::new(), last: None })
    }

    /// Clusters that a block counts.
    pub(super) fn per_block(&self) -> u64 {
        self.per_block
    }

    /// Entries of the table.
    pub(super) fn entries(&self) -> u64 {
        self.table.len() as u64
    }

    /// Names a block in the table in memory; false where the table has no such entry.
    pub(super) fn set(&mut self, index: u64, offset: u64) -> bool {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get_mut(index));
        entry.map(|entry| *entry = offset).is_some()
    }

    /// What an entry of the table names.
    pub(super) fn block(&self, index: u64, cluster_size: u64) -> Block {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index));
        match entry.map_or(0, |entry| entry & !RESERVED) {
            0 => Block::None,
            offset if offset % cluster_size != 0 || self.failed.contains(&index) => {
                Block::Unreadable
            }
            offset => Block::At(offset),
        }
    }

    /// The refcount at a place in the block that was read last.
    fn count(&self, place: u64) -> Option<u64> {
        let (_, bytes) = self.last.as_ref()?;
        self.width.get_in(bytes, place)
    }
}

impl<E: Engine> Check<'_, E> {
    /// Counts the refcount blocks, and looks whether each can be one.
    pub(super) fn refcount_blocks(&mut self, blocks: &Blocks) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let at = self.header.reftable_offset;
        for (index, entry) in blocks.table.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            let offset = entry & !RESERVED;
            if entry & RESERVED != 0 {
                let text = format!("refcount table entry {index} has reserved bits set");
                self.uncounted(at, text, 1);
            } else if self.geometry.in_cluster(offset) != 0 {
                let text = format!("refcount block {index} is not aligned to a cluster");
                self.uncounted(offset, text, 1);
            } else if offset >> bits >= self.clusters() {
                let text = format!("refcount block {index} lies past the end of the file");
                self.uncounted(offset, text, 1);
            } else {
                self.refer("a refcount block", offset, self.geometry.cluster_size(), 1)?;
                let references = self.references.get(offset >> bits);
                if references != 1 {
                    let text = format!("refcount block {index} has {references} references");
                    self.uncounted(offset, text, 1);
                }
            }
        }
        Ok(())
    }

    /// Compares what was counted with what the image says.
    pub(super) async fn compare(&mut self, blocks: &mut Blocks) -> Result<()> {
        let clusters = self.clusters();
        let mut highest = 0;
        let mut index = 0;
        while index * blocks.per_block < clusters {
            let first = index * blocks.per_block;
            let end = clusters.min(first + blocks.per_block);
            match self.load_block(index, blocks).await {
                Block::At(_) => {
                    for cluster in first..end {
                        let count = blocks.count(cluster - first).unwrap_or(0);
                        self.compare_one(cluster, count, &mut highest);
                    }
                }
                Block::Unreadable => {
                    let text = format!("refcount block {index} cannot be read");
                    self.unchecked(first << self.geometry.cluster_bits, text, end - first);
                }
                Block::None => {
                    let mut from = first;
                    while let Some((cluster, _)) = self.references.next(from, end) {
                        self.compare_one(cluster, 0, &mut highest);
                        from = cluster + 1;
                    }
                }
            }
            if index < blocks.table.len() as u64 {
                self.step()?;
                index += 1;
            } else {
                // Behind the table there is nothing but what is referred to.
                index = match self.references.next(end, clusters) {
                    Some((cluster, _)) => cluster / blocks.per_block,
                    None => break,
                };
            }
        }
        self.result.image_end_offset = (highest + 1) << self.geometry.cluster_bits;
        Ok(())
    }

    fn compare_one(&mut self, cluster: u64, refcount: u64, highest: &mut u64) {
        let references = self.references.get(cluster);
        if refcount == 1 {
            self.references.note_counted_once(cluster);
        }
        if refcount > 0 || references > 0 {
            *highest = cluster;
        }
        let at = cluster << self.geometry.cluster_bits;
        let text = || format!("cluster {cluster} has refcount {refcount}, {references} references");
        if refcount < references {
            self.corrupt(at, text(), 1);
        } else if refcount > references {
            self.leaked(at, text());
        }
    }

    /// Makes the block at a place in the table the one that was read last.
    async fn load_block(&mut self, index: u64, blocks: &mut Blocks) -> Block {
        let size = self.geometry.cluster_size();
        let block = blocks.block(index, size);
        let Block::At(offset) = block else { return block };
        if blocks.last.as_ref().is_none_or(|(at, _)| *at != offset) {
            let read =
                crate::metadata::tables::read(self.engine, self.storage, offset, size as usize);
            match read.await {
                Ok(bytes) => blocks.last = Some((offset, bytes)),
                Err(_) => {
                    blocks.failed.insert(index);
                    return Block::Unreadable;
                }
            }
        }
        block
    }

    /// Whether the image gives a cluster the refcount one; `None` if nobody knows.
    /// After `compare`.
    pub(super) async fn is_counted_once(
        &mut self,
        cluster: u64,
        blocks: &mut Blocks,
    ) -> Result<Option<bool>> {
        let index = cluster / blocks.per_block;
        match blocks.block(index, self.geometry.cluster_size()) {
            Block::None => return Ok(Some(false)),
            Block::Unreadable => return Ok(None),
            Block::At(_) => {}
        }
        if cluster < self.clusters() {
            if let Some(noted) = self.references.is_counted_once(cluster) {
                return Ok(Some(noted));
            }
        }
        Ok(match self.load_block(index, blocks).await {
            Block::At(_) => Some(blocks.count(cluster % blocks.per_block) == Some(1)),
            Block::None => Some(false),
            Block::Unreadable => None,
        })
    }
}
