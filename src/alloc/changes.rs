//! References gained or lost by many clusters at once: gathered cluster by cluster,
//! then carried out refcount block by refcount block, each read and written once.
//!
//! For who has the image alone: it goes past the cache of refcounts, which must have
//! nothing to write. It knows nothing of who refers to the clusters.

use std::ops::Range;

use super::overlap::Metadata;
use super::refcounts::Refcounts;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::geometry::HostOffset;
use crate::io::engine::{Engine, Piece};
use crate::io::storage::Storage;
use crate::metadata::tables::read;
use crate::sys::memory::Block;

/// Clusters whose numbers lie together.
const CHUNK: u64 = 1024;

/// A number for each cluster of a file.
pub struct Changes {
    chunks: Vec<Option<Box<[u32]>>>,
    clusters: u64,
    /// Bytes that may still be taken.
    room: u64,
}

impl Changes {
    /// No change, for a file of so many clusters; no more than `memory` bytes are
    /// taken. `Limit`, `OutOfMemory`.
    pub fn new(clusters: u64, memory: u64) -> Result<Changes> {
        let count = clusters.div_ceil(CHUNK);
        let mut changes = Changes { chunks: Vec::new(), clusters, room: memory };
        changes.take(count.saturating_mul(size_of::<Option<Box<[u32]>>>() as u64))?;
        let none = std::iter::repeat_with(|| None);
        changes.chunks = fallible::collect(usize::try_from(count).unwrap_or(usize::MAX), none)?;
        Ok(changes)
    }

    fn take(&mut self, bytes: u64) -> Result<()> {
        self.room = self.room.checked_sub(bytes).ok_or_else(|| {
            let text = "counting the references of a snapshot takes more than \
                        \"max-metadata-size\"";
            Error::new(ErrorKind::Limit, text)
        })?;
        Ok(())
    }

    /// `references` more for a cluster. `Corrupt` past the end of the file.
    #[inline]
    pub fn add(&mut self, cluster: u64, references: u32) -> Result<()> {
        if cluster >= self.clusters {
            return Err(Error::corrupt(format!(
                "host cluster {cluster} is referred to, but lies past the end of the file"
            )));
        }
        let chunk = (cluster / CHUNK) as usize;
        if self.chunks.get(chunk).is_some_and(Option::is_none) {
            self.take(CHUNK * size_of::<u32>() as u64)?;
            self.chunks[chunk] = Some(fallible::filled(CHUNK as usize, 0)?.into());
        }
        let Some(Some(counts)) = self.chunks.get_mut(chunk) else { return Ok(()) };
        let count = &mut counts[(cluster % CHUNK) as usize];
        *count = count.checked_add(references).ok_or_else(|| {
            Error::corrupt(format!("host cluster {cluster} is referred to 2^32 times"))
        })?;
        Ok(())
    }

    /// The number of a cluster.
    pub fn get(&self, cluster: u64) -> u32 {
        match self.chunks.get((cluster / CHUNK) as usize) {
            Some(Some(counts)) => counts[(cluster % CHUNK) as usize],
            _ => 0,
        }
    }

    fn get_mut(&mut self, cluster: u64) -> Option<&mut u32> {
        let counts = self.chunks.get_mut((cluster / CHUNK) as usize)?.as_mut()?;
        Some(&mut counts[(cluster % CHUNK) as usize])
    }

    /// Takes from both what they have in common: what one gains and the other loses
    /// need not change at all.
    pub fn cancel(&mut self, other: &mut Changes) {
        for (ours, theirs) in self.chunks.iter_mut().zip(&mut other.chunks) {
            let (Some(ours), Some(theirs)) = (ours, theirs) else { continue };
            for (a, b) in ours.iter_mut().zip(theirs.iter_mut()) {
                let common = (*a).min(*b);
                *a -= common;
                *b -= common;
            }
        }
    }

    /// The next cluster from `from` on, before `end`, whose number is not zero.
    fn next(&self, from: u64, end: u64) -> Option<u64> {
        let end = end.min(self.clusters);
        let mut at = from;
        while at < end {
            let rest = CHUNK - at % CHUNK;
            if let Some(Some(counts)) = self.chunks.get((at / CHUNK) as usize) {
                let counts = &counts[(at % CHUNK) as usize..];
                if let Some(found) = counts.iter().position(|count| *count != 0) {
                    return Some(at + found as u64).filter(|found| *found < end);
                }
            }
            at += rest;
        }
        None
    }
}

/// What became of clusters that lost references.
pub struct Lowered {
    /// 1 + what is left, for those that lost any.
    left: Changes,
}

impl Lowered {
    /// Whether a cluster lost references and has just one left.
    pub fn is_once(&self, cluster: u64) -> bool {
        self.left.get(cluster) == 2
    }

    /// The next clusters from `from` on, neighbours, that are free now.
    pub fn next_freed(&self, mut from: u64) -> Option<Range<u64>> {
        while let Some(first) = self.left.next(from, u64::MAX) {
            let mut end = first;
            while self.left.get(end) == 1 {
                end += 1;
            }
            if end > first {
                return Some(first..end);
            }
            from = first + 1;
        }
        None
    }
}

/// What is to be done with the counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    CheckRaise,
    Raise,
    /// Tables of this kind may become free.
    CheckLower(Option<Metadata>),
    Lower,
}

impl Refcounts {
    /// Whether all counts have room for these references. `InvalidArgument` where one
    /// has not; `Corrupt` for a cluster that counts as free.
    pub async fn check_raise<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        changes: &mut Changes,
    ) -> Result<()> {
        self.each_block(engine, storage, changes, Step::CheckRaise).await
    }

    /// Adds references; does not sync. After `check_raise`.
    pub async fn raise_all<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        changes: &mut Changes,
    ) -> Result<()> {
        self.each_block(engine, storage, changes, Step::Raise).await
    }

    /// Whether there are these references to be taken. `Corrupt` where there are not,
    /// and where metadata of another kind than `own` would become free.
    pub async fn check_lower<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        changes: &mut Changes,
        own: Option<Metadata>,
    ) -> Result<()> {
        self.each_block(engine, storage, changes, Step::CheckLower(own)).await
    }

    /// Takes references; does not sync. Whoever calls this knows that they are durably
    /// gone.
    pub async fn lower_all<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        mut changes: Changes,
    ) -> Result<Lowered> {
        self.each_block(engine, storage, &mut changes, Step::Lower).await?;
        Ok(Lowered { left: changes })
    }

    async fn each_block<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        changes: &mut Changes,
        step: Step,
    ) -> Result<()> {
        let per_block = self.per_block();
        let size = self.geometry.cluster_size();
        let mut from = 0;
        while let Some(first) = changes.next(from, u64::MAX) {
            let base = first / per_block * per_block;
            from = base + per_block;
            let Some(block) = self.block(first / per_block)? else {
                return Err(uncounted(storage, first));
            };
            let mut bytes = read(engine, storage, block.get(), size as usize).await?;
            let mut next = Some(first);
            while let Some(cluster) = next {
                self.change_one(storage, changes, &mut bytes, cluster, step)?;
                next = changes.next(cluster + 1, from);
            }
            if matches!(step, Step::Raise | Step::Lower) {
                self.write_block(engine, storage, block, &bytes).await?;
            }
        }
        Ok(())
    }

    /// Changes the count of a cluster in the bytes of its block.
    #[inline]
    fn change_one(
        &self,
        storage: &Storage,
        changes: &mut Changes,
        bytes: &mut [u8],
        cluster: u64,
        step: Step,
    ) -> Result<()> {
        let Some(change) = changes.get_mut(cluster) else { return Ok(()) };
        let index = cluster % self.per_block();
        let (by, max) = (u64::from(*change), self.width.max());
        let old = self.width.get_in(bytes, index).filter(|old| *old > 0);
        let Some(old) = old else { return Err(uncounted(storage, cluster)) };
        let new = match step {
            Step::CheckRaise | Step::Raise => old.checked_add(by).filter(|new| *new <= max),
            Step::CheckLower(_) | Step::Lower => old.checked_sub(by),
        };
        match (step, new) {
            (Step::CheckRaise | Step::Raise, None) => {
                return Err(Error::invalid(format!(
                    "{}: host cluster {cluster} has {old} references, and refcounts of {} bits \
                     cannot count more: delete snapshots, or convert the image to one with wider \
                     refcounts (refcount_bits)",
                    storage.name(),
                    self.width.bits()
                )));
            }
            (Step::CheckLower(_) | Step::Lower, None) => return Err(uncounted(storage, cluster)),
            (Step::CheckLower(own), Some(0)) => self.overlap.check_free_but(cluster, own)?,
            (Step::CheckRaise | Step::CheckLower(_), Some(_)) => {}
            (Step::Raise, Some(new)) => {
                self.width.set_in(bytes, index, new);
            }
            (Step::Lower, Some(new)) => {
                self.width.set_in(bytes, index, new);
                *change = u32::try_from(new).unwrap_or(u32::MAX - 1).saturating_add(1);
            }
        }
        Ok(())
    }

    async fn write_block<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        block: HostOffset,
        bytes: &[u8],
    ) -> Result<()> {
        self.overlap.check_table(block.get(), bytes.len() as u64, Metadata::RefcountBlock)?;
        let content = Block::from_bytes(bytes)?;
        let piece = [Piece::Block(content.slice(0, bytes.len()))];
        let written = storage.write(engine, &piece, block.get()).await;
        self.cache.forget(block, bytes.len() as u64);
        written
    }
}

fn uncounted(storage: &Storage, cluster: u64) -> Error {
    Error::corrupt(format!(
        "{}: host cluster {cluster} has fewer references by its refcount than there are \
         (repair: qemu-img check -r all)",
        storage.name()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_found_in_order_and_cancel_each_other() {
        let mut gained = Changes::new(5000, 1 << 20).unwrap();
        let mut lost = Changes::new(5000, 1 << 20).unwrap();
        for cluster in [3, 1024, 4999] {
            gained.add(cluster, 2).unwrap();
        }
        lost.add(1024, 2).unwrap();
        lost.add(4999, 3).unwrap();
        assert_eq!(gained.add(5000, 1).unwrap_err().kind(), ErrorKind::Corrupt);
        gained.cancel(&mut lost);
        assert_eq!((gained.next(0, 5000), gained.next(4, 5000)), (Some(3), None));
        assert_eq!((lost.next(0, 4999), lost.next(0, 5000)), (None, Some(4999)));
        assert_eq!((gained.get(3), lost.get(4999)), (2, 1));
    }

    #[test]
    fn memory_is_bounded() {
        assert_eq!(Changes::new(1 << 40, 1 << 20).err().unwrap().kind(), ErrorKind::Limit);
        let mut changes = Changes::new(1 << 20, 20 << 10).unwrap();
        changes.add(0, 1).unwrap();
        changes.add(1, 1).unwrap();
        assert_eq!(changes.add(CHUNK, 1).unwrap_err().kind(), ErrorKind::Limit);
    }

    #[test]
    fn freed_clusters_are_told_in_runs() {
        let mut left = Changes::new(100, 1 << 20).unwrap();
        for (cluster, value) in [(2, 1), (3, 1), (4, 2), (5, 3), (9, 1)] {
            left.add(cluster, value).unwrap();
        }
        let lowered = Lowered { left };
        assert_eq!(lowered.next_freed(0), Some(2..4));
        assert_eq!(lowered.next_freed(4), Some(9..10));
        assert_eq!(lowered.next_freed(10), None);
        assert!(lowered.is_once(4) && !lowered.is_once(5) && !lowered.is_once(2));
    }
}
