//! Clusters for a table that has to lie in one piece.
//!
//! Refcount blocks for clusters that have none are put where counts exist already, so
//! that they are not in the way.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::allocator::Allocator;
use super::overlap::Metadata;
use crate::error::{Error, ErrorKind, Result};
use crate::format::limits::{MAX_HOST_OFFSET, MAX_REFTABLE_BYTES};
use crate::geometry::HostOffset;
use crate::io::engine::{Engine, Piece};
use crate::io::storage::Storage;

impl Allocator {
    /// The lowest `count` neighbouring clusters that are free; their refcounts are one
    /// from now on, and written with all others. `NoSpace`, `Os(EFBIG)`. Whoever does
    /// not need them any more lowers their refcounts.
    pub async fn allocate_together<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        count: u64,
    ) -> Result<Range<u64>> {
        loop {
            let one_at_a_time = self.refilling.lock().await;
            let clusters = self.find_together(engine, storage, count).await?;
            if clusters.is_empty() {
                return Ok(clusters);
            }
            self.check_room(storage, clusters.end - 1)?;
            // Before anything is made for them.
            if clusters.end.div_ceil(self.refcounts.per_block()) > MAX_REFTABLE_BYTES / 8 {
                let text = format!("{} has no refcounts for {count} clusters", storage.name());
                return Err(Error::new(ErrorKind::Os(libc::EFBIG), text));
            }
            if let Some(index) = self.first_without_block(&clusters)? {
                drop(one_at_a_time);
                self.add_block_elsewhere(engine, storage, index).await?;
                continue;
            }
            let start = clusters.start << self.geometry.cluster_bits;
            // A corrupt image may call clusters free that are not.
            self.overlap.check_data(start, count << self.geometry.cluster_bits)?;
            self.extend(engine, storage, clusters.end).await?;
            self.raise_free(engine, storage, clusters.clone()).await?;
            let mut state = self.lock();
            state.fresh_from = state.fresh_from.max(clusters.end);
            self.note_untouched(&state);
            return Ok(clusters);
        }
    }

    /// The lowest free neighbours; those that nothing counts are free.
    async fn find_together<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        count: u64,
    ) -> Result<Range<u64>> {
        let (mut start, mut at) = (0, 0);
        let end = MAX_HOST_OFFSET >> self.geometry.cluster_bits;
        while at - start < count && at < end {
            let Some(place) = self.refcounts.place(at)? else {
                let per_block = self.refcounts.per_block();
                at = (at / per_block + 1) * per_block;
                continue;
            };
            // The free clusters that the slice begins with, or those that it ends with.
            let run = start..at;
            let found = self
                .refcounts
                .look(engine, storage, place.key, |words| {
                    let mut run = run.clone();
                    for index in place.index..place.count {
                        let word = |n: usize| words.get(n).map_or(0, |w| w.load(Ordering::Relaxed));
                        match self.refcounts.get_in(index, word) {
                            0 => run.end += 1,
                            _ => run = run.end + 1..run.end + 1,
                        }
                        if run.end - run.start >= count {
                            break;
                        }
                    }
                    run
                })
                .await?;
            (start, at) = (found.start, found.end);
        }
        Ok(start..start + count)
    }

    /// The first place in the refcount table that would have to name a block for these
    /// clusters and does not.
    fn first_without_block(&self, clusters: &Range<u64>) -> Result<Option<u64>> {
        let per_block = self.refcounts.per_block();
        for index in clusters.start / per_block..=(clusters.end - 1) / per_block {
            if self.refcounts.block(index)?.is_none() {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// Makes a refcount block for a place in the table, which names it later: see
    /// `name_blocks`.
    async fn add_block_elsewhere<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        index: u64,
    ) -> Result<()> {
        let (table, entries) = {
            let table = self.refcounts.table();
            (table.offset, table.entries.len() as u64)
        };
        if index >= entries {
            let _one_at_a_time = self.refilling.lock().await;
            return self.grow_table(engine, storage).await;
        }
        let allocation = self.allocate(engine, storage, 1).await?;
        let block = allocation.start()?;
        let size = self.geometry.cluster_size();
        let _one_at_a_time = self.refilling.lock().await;
        // The search may have made the very block that was missing, or a larger table.
        if self.refcounts.block(index)?.is_some() || self.refcounts.table().offset != table {
            allocation.give_back();
            return Ok(());
        }
        self.overlap.check_data(block.get(), size)?;
        storage.write(engine, &[Piece::Zeroes(size as usize)], block.get()).await?;
        self.overlap.add(block.get(), size, Metadata::RefcountBlock);
        self.refcounts.publish_block(index, block);
        allocation.keep();
        Ok(())
    }

    /// Makes the refcounts of free clusters one.
    async fn raise_free<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        clusters: Range<u64>,
    ) -> Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            let Some(place) = self.refcounts.place(at)? else { break };
            let count = (place.count - place.index).min(clusters.end - at);
            self.refcounts
                .update(engine, storage, place.key, |slice| {
                    for index in place.index..place.index + count {
                        self.refcounts.set_in(slice, index, 1);
                    }
                })
                .await?;
            at += count;
        }
        Ok(())
    }

    /// Takes the references to what `allocate_together` gave out, or to any other
    /// table that nothing names any more. Durably so: they are free at once.
    pub async fn free_together<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        clusters: Range<u64>,
    ) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        self.refcounts.lower(engine, storage, clusters.clone()).await?;
        self.note_free(clusters.start);
        Ok(())
    }

    /// The number of the last cluster that is in use, plus one. Nothing may be taken ahead.
    pub async fn clusters_used<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<u64> {
        let per_block = self.refcounts.per_block();
        let entries = self.refcounts.table().entries.len() as u64;
        for index in (0..entries).rev() {
            if self.refcounts.block(index)?.is_none() {
                continue;
            }
            let (mut at, end) = (index * per_block, (index + 1) * per_block);
            let mut used = 0;
            while at < end {
                let Some(place) = self.refcounts.place(at)? else { break };
                let last = self
                    .refcounts
                    .look(engine, storage, place.key, |words| {
                        (place.index..place.count).rev().find(|&index| {
                            let word =
                                |n: usize| words.get(n).map_or(0, |w| w.load(Ordering::Relaxed));
                            self.refcounts.get_in(index, word) != 0
                        })
                    })
                    .await?;
                if let Some(last) = last {
                    used = at + (last - place.index) + 1;
                }
                at += place.count - place.index;
            }
            if used > 0 {
                return Ok(used);
            }
        }
        Ok(0)
    }

    /// The clusters of a table at `offset`, of so many bytes.
    pub fn clusters_of(&self, offset: u64, bytes: u64) -> Range<u64> {
        let first = offset >> self.geometry.cluster_bits;
        match HostOffset::new(offset) {
            Some(_) => first..first + self.geometry.clusters_for(bytes),
            None => first..first,
        }
    }
}
