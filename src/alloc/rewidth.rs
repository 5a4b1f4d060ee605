//! Refcounts of another width: a whole new table with new blocks, behind all that is
//! there, which the header names later, with the new width, by one write.
//!
//! The old structure counts none of the new one, and the new one none of the old: so
//! each is exact as long as the header names it. For who has the image alone, and
//! reads it again afterwards.

use std::ops::Range;

use super::allocator::Allocator;
use super::refcounts::Refcounts;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::limits::MAX_REFTABLE_BYTES;
use crate::format::refcount::RefcountWidth;
use crate::geometry::HostOffset;
use crate::io::engine::{Engine, Piece};
use crate::io::storage::Storage;
use crate::metadata::tables::read;
use crate::sys::memory::Block;

/// Is told how far it is, of how much; `false`: give up.
pub type Progress<'a> = &'a mut (dyn FnMut(u64, u64) -> bool + Send);

/// A refcount table that nothing names yet.
pub struct NewTable {
    /// Where it is.
    pub offset: u64,
    /// Its clusters.
    pub clusters: u64,
}

/// Where a new structure lies: its blocks, then its table.
struct Layout {
    start: u64,
    /// The places in the table that name a block, in order.
    blocks: Vec<u64>,
    table_clusters: u64,
}

impl Layout {
    fn end(&self) -> u64 {
        self.start + self.blocks.len() as u64 + self.table_clusters
    }
}

/// The refcounts as they are in the file, but for clusters that go with the change.
struct Old<'a> {
    refcounts: &'a Refcounts,
    /// Those clusters, in order.
    gone: Vec<u64>,
}

impl Old<'_> {
    /// The block at a place of the table; `None`: it counts nothing.
    async fn block<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        index: u64,
    ) -> Result<Option<Vec<u8>>> {
        let Some(block) = self.refcounts.block(index)? else { return Ok(None) };
        let size = self.refcounts.geometry.cluster_size() as usize;
        read(engine, storage, block.get(), size).await.map(Some)
    }

    /// The refcount of a cluster by the bytes of its block.
    fn get(&self, bytes: &[u8], cluster: u64) -> u64 {
        let index = cluster % self.refcounts.per_block();
        let count = self.refcounts.width.get_in(bytes, index).unwrap_or(0);
        match count {
            0 => 0,
            _ => count - u64::from(self.gone.binary_search(&cluster).is_ok()),
        }
    }
}

impl Allocator {
    /// Makes refcount blocks and a table of another width; none of it durable. `gone`:
    /// clusters that lose a reference with the switch, besides the old blocks and the
    /// old table. Nothing may wait to be written back.
    ///
    /// `InvalidArgument` where a refcount does not fit; `Os(EFBIG)`, `NoSpace`;
    /// `Cancelled`. After an error the image is as it was.
    pub async fn rewidth<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        width: RefcountWidth,
        gone: &[Range<u64>],
        progress: Progress<'_>,
    ) -> Result<NewTable> {
        let old = Old { refcounts: &self.refcounts, gone: self.gone(gone)? };
        let length = storage.length()?;
        let layout = self.layout_for(engine, storage, width, &old, length, progress).await?;
        let written = async {
            self.extend(engine, storage, layout.end()).await?;
            self.write_structure(engine, storage, width, &old, &layout, progress).await
        }
        .await;
        if let Err(error) = written {
            if storage.capacity().is_none() {
                // Nothing refers to what lies behind; whether it goes is a detail.
                let _ = self.shrink_file(engine, storage, length).await;
            }
            return Err(error);
        }
        let offset = (layout.start + layout.blocks.len() as u64) << self.geometry.cluster_bits;
        Ok(NewTable { offset, clusters: layout.table_clusters })
    }

    /// The clusters of the old structure, and others.
    fn gone(&self, others: &[Range<u64>]) -> Result<Vec<u64>> {
        let (offset, bytes) = self.refcounts.table_place();
        let table = self.clusters_of(offset, bytes);
        let entries = bytes / 8;
        let ranges = || others.iter().chain([&table]);
        let count = ranges().map(|range| range.end - range.start).sum::<u64>() + entries;
        let mut gone = fallible::room_for(usize::try_from(count).unwrap_or(usize::MAX))?;
        for range in ranges() {
            gone.extend(range.clone());
        }
        for index in 0..entries {
            let block = self.refcounts.block(index)?;
            gone.extend(block.map(|block: HostOffset| self.geometry.host_cluster(block.into()).0));
        }
        gone.sort_unstable();
        mutant!(AmendCountsOld => gone.clear());
        Ok(gone)
    }

    /// Looks at every refcount: whether it fits, and which blocks are needed.
    async fn layout_for<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        width: RefcountWidth,
        old: &Old<'_>,
        length: u64,
        progress: Progress<'_>,
    ) -> Result<Layout> {
        let per_block = width.entries_per(self.geometry.cluster_size());
        let old_per_block = self.refcounts.per_block();
        let entries = self.refcounts.table_place().1 / 8;
        let mut blocks: Vec<u64> = Vec::new();
        let mut start = self.geometry.clusters_for(length);
        for index in 0..entries {
            go_on(progress, index, entries * 2)?;
            let Some(bytes) = old.block(engine, storage, index).await? else { continue };
            let first = index * old_per_block;
            for cluster in first..first + old_per_block {
                let count = old.get(&bytes, cluster);
                if count == 0 {
                    continue;
                }
                if count > width.max() {
                    return Err(Error::invalid(format!(
                        "{}: host cluster {cluster} has {count} references, which refcounts of \
                         {} bits cannot count",
                        storage.name(),
                        width.bits()
                    )));
                }
                start = start.max(cluster + 1);
                if blocks.last() != Some(&(cluster / per_block)) {
                    blocks.try_reserve(1).map_err(|_| no_memory())?;
                    blocks.push(cluster / per_block);
                }
            }
        }
        let mut layout = Layout { start, blocks, table_clusters: 1 };
        loop {
            let end = layout.end();
            let last = (end - 1) / per_block;
            let mut complete = true;
            for index in start / per_block..=last {
                if let Err(at) = layout.blocks.binary_search(&index) {
                    layout.blocks.try_reserve(1).map_err(|_| no_memory())?;
                    layout.blocks.insert(at, index);
                    complete = false;
                }
            }
            let needed = self.geometry.clusters_for((last + 1) * 8);
            if needed > MAX_REFTABLE_BYTES >> self.geometry.cluster_bits {
                let text = format!(
                    "{}: refcounts of {} bits need a larger table than there can be",
                    storage.name(),
                    width.bits()
                );
                return Err(Error::new(ErrorKind::Os(libc::EFBIG), text));
            }
            if complete && needed <= layout.table_clusters {
                break;
            }
            layout.table_clusters = needed.max(layout.table_clusters);
        }
        self.check_room(storage, layout.end() - 1)?;
        Ok(layout)
    }

    async fn write_structure<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        width: RefcountWidth,
        old: &Old<'_>,
        layout: &Layout,
        progress: Progress<'_>,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let (per_block, old_per_block) = (width.entries_per(size), self.refcounts.per_block());
        let own = layout.start..layout.end();
        let count = layout.blocks.len() as u64;
        let mut table = fallible::filled((layout.table_clusters * size / 8) as usize, 0u64)?;
        let mut last: Option<(u64, Option<Vec<u8>>)> = None;
        for (number, index) in layout.blocks.iter().enumerate() {
            go_on(progress, count + number as u64, count * 2)?;
            let mut bytes = fallible::filled(size as usize, 0u8)?;
            let first = index * per_block;
            for cluster in first..(first + per_block).min(own.end) {
                let value = if own.contains(&cluster) {
                    1
                } else {
                    let at = cluster / old_per_block;
                    if last.as_ref().is_none_or(|(loaded, _)| *loaded != at) {
                        last = Some((at, old.block(engine, storage, at).await?));
                    }
                    match &last {
                        Some((_, Some(bytes))) => old.get(bytes, cluster),
                        _ => 0,
                    }
                };
                if value != 0 {
                    width.set_in(&mut bytes, cluster - first, value);
                }
            }
            let offset = (layout.start + number as u64) << self.geometry.cluster_bits;
            self.overlap.check_data(offset, size)?;
            let block = Block::from_bytes(&bytes)?;
            storage.write(engine, &[Piece::Block(block.all())], offset).await?;
            if let Some(entry) = table.get_mut(*index as usize) {
                *entry = offset;
            }
        }
        let offset = (layout.start + count) << self.geometry.cluster_bits;
        self.overlap.check_data(offset, layout.table_clusters * size)?;
        let raw = table.iter().flat_map(|entry| entry.to_be_bytes());
        let bytes = fallible::collect(table.len() * 8, raw)?;
        let block = Block::from_bytes(&bytes)?;
        storage.write(engine, &[Piece::Block(block.all())], offset).await
    }
}

/// `Cancelled` if that is wanted.
fn go_on(progress: Progress<'_>, done: u64, total: u64) -> Result<()> {
    match progress(done, total) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Cancelled, "the change of the image was cancelled")),
    }
}

#[cold]
fn no_memory() -> Error {
    Error::new(ErrorKind::OutOfMemory, "no memory for the list of refcount blocks")
}
