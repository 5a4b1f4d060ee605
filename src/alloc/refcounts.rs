//! The refcounts of host clusters: looked up and changed through a cache of
//! slices of refcount blocks, written back on demand.
//!
//! Rising counts may be written at any time. Counts are lowered here only after
//! the pointer was durably dropped (see `limbo`), so writing them early is safe
//! as well: a crash leaves leaks, never a count that is too low (or, with lazy
//! refcounts, an image that says that its counts are not to be believed).

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use super::overlap::{Metadata, OverlapIndex};
use crate::error::{Error, Result};
use crate::format::limits::OFFSET_MASK;
use crate::format::refcount::RefcountWidth;
use crate::geometry::{Geometry, HostOffset};
use crate::io::engine::{Engine, Piece, Target};
use crate::io::storage::Storage;
use crate::io::wait::AsyncMutex;
use crate::metadata::cache::{Loaded, SliceCache, SliceMut};
use crate::sys::memory::Block;

/// The refcount table as it is on disk, entry for entry.
pub struct Table {
    /// Host offsets of the refcount blocks; 0: none, all its counts are 0.
    pub entries: Vec<u64>,
    /// Where the table is.
    pub offset: u64,
}

/// The refcounts of an image.
pub struct Refcounts {
    pub(super) geometry: Geometry,
    pub(super) width: RefcountWidth,
    pub(super) table: RwLock<Table>,
    pub(super) cache: SliceCache,
    pub(super) overlap: Arc<OverlapIndex>,
    /// Refcount blocks that only the table in memory names yet, by their index there.
    unnamed: Mutex<Vec<(u64, HostOffset)>>,
    /// One write-back at a time: two copies of a slice must not overtake each
    /// other on their way to the storage.
    writing: AsyncMutex<()>,
}

/// Where the refcount of a cluster is: the slice, and its place in there.
pub(super) struct Place {
    pub key: HostOffset,
    pub index: u64,
    /// Counts in the slice.
    pub count: u64,
}

/// Clusters that each lost a reference.
pub(super) struct Lowered {
    /// How many.
    pub count: u64,
    /// How many of them are free now, and the lowest of those.
    pub freed: u64,
    pub lowest: Option<u64>,
}

impl Refcounts {
    /// `table`: as read from the image. `OutOfMemory`.
    pub fn new(
        geometry: Geometry,
        width: RefcountWidth,
        table: Table,
        cache_bytes: u64,
        overlap: Arc<OverlapIndex>,
    ) -> Result<Refcounts> {
        let slice = geometry.cluster_size().min(4096) as usize;
        Ok(Refcounts {
            geometry,
            width,
            table: RwLock::new(table),
            cache: SliceCache::new(slice, cache_bytes)?,
            overlap,
            unnamed: Mutex::default(),
            writing: AsyncMutex::new(()),
        })
    }

    pub(super) fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn unnamed(&self) -> MutexGuard<'_, Vec<(u64, HostOffset)>> {
        self.unnamed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clusters that one refcount block counts.
    pub(super) fn per_block(&self) -> u64 {
        self.width.entries_per(self.geometry.cluster_size())
    }

    /// Gives back memory of the cache; see `SliceCache::trim`.
    pub fn trim(&self) -> u64 {
        self.cache.trim()
    }

    /// Memory held, in bytes.
    pub fn bytes(&self) -> u64 {
        self.cache.bytes() + self.table().entries.len() as u64 * 8
    }

    /// The refcount block that a table entry names, checked; `None`: there is
    /// none.
    pub(super) fn block(&self, table_index: u64) -> Result<Option<HostOffset>> {
        let raw =
            usize::try_from(table_index).ok().and_then(|i| self.table().entries.get(i).copied());
        let Some(offset) = HostOffset::new(raw.unwrap_or(0) & OFFSET_MASK) else {
            return Ok(None);
        };
        if self.geometry.in_cluster(offset.get()) != 0 {
            return Err(Error::corrupt(format!(
                "refcount table entry {table_index} points to {offset}, which is not the start \
                 of a cluster"
            )));
        }
        Ok(Some(offset))
    }

    /// `None`: no block counts this cluster, so its refcount is 0.
    pub(super) fn place(&self, cluster: u64) -> Result<Option<Place>> {
        let per_block = self.per_block();
        let Some(block) = self.block(cluster / per_block)? else { return Ok(None) };
        let count = self.width.entries_per(self.cache.slice_bytes() as u64);
        let index = cluster % per_block;
        let key = block.checked_add(index / count * self.cache.slice_bytes() as u64);
        let key = key.ok_or_else(|| Error::corrupt("a refcount block lies past all offsets"))?;
        Ok(Some(Place { key, index: index % count, count }))
    }

    /// Brings a slice into the cache.
    pub(super) async fn load<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        key: HostOffset,
    ) -> Result<()> {
        loop {
            let ticket = self.cache.begin_load(key);
            let block = Block::zeroed(self.cache.slice_bytes())?;
            storage.read(engine, Target::Block(block.all()), key.get()).await?;
            match self.cache.finish_load(key, ticket, &block.all().to_vec()?)? {
                Loaded::Done => return Ok(()),
                Loaded::Stale => {}
                Loaded::Full => self.write_back(engine, storage).await?,
            }
        }
    }

    /// Looks at the slice that holds `cluster`'s refcount.
    pub(super) async fn look<E: Engine, R>(
        &self,
        engine: &E,
        storage: &Storage,
        key: HostOffset,
        look: impl Fn(&[AtomicU64]) -> R,
    ) -> Result<R> {
        loop {
            if let Some(result) = self.cache.read(key, &look) {
                return Ok(result);
            }
            self.load(engine, storage, key).await?;
        }
    }

    /// Changes the slice `key`.
    pub(super) async fn update<E: Engine, R>(
        &self,
        engine: &E,
        storage: &Storage,
        key: HostOffset,
        mut change: impl FnMut(&mut SliceMut<'_>) -> R,
    ) -> Result<R> {
        loop {
            if let Some(result) = self.cache.update(key, &mut change) {
                return Ok(result);
            }
            self.load(engine, storage, key).await?;
        }
    }

    /// The count at `index` of a slice whose words `word` returns.
    pub(super) fn get_in(&self, index: u64, word: impl Fn(usize) -> u64) -> u64 {
        let per_word = self.width.per_word();
        self.width.get(word((index / per_word) as usize), index % per_word)
    }

    /// Sets the count at `index` of a slice.
    pub(super) fn set_in(&self, slice: &mut SliceMut<'_>, index: u64, value: u64) {
        let per_word = self.width.per_word();
        let at = (index / per_word) as usize;
        slice.set(at, self.width.set(slice.get(at), index % per_word, value));
    }

    /// Adds a reference to a cluster that has some; `false`: no more can be counted.
    /// `Corrupt` where there is none.
    pub(super) async fn raise<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        cluster: u64,
    ) -> Result<bool> {
        let none = || {
            let name = storage.name();
            Error::corrupt(format!(
                "{name}: host cluster {cluster} is in use but its refcount is 0"
            ))
        };
        let place = self.place(cluster)?.ok_or_else(none)?;
        let raised = self
            .update(engine, storage, place.key, |slice| {
                let count = self.get_in(place.index, |i| slice.get(i));
                let possible = count < self.width.max();
                if possible {
                    self.set_in(slice, place.index, count + 1);
                }
                (count > 0).then_some(possible)
            })
            .await?;
        raised.ok_or_else(none)
    }

    /// Takes one reference from each cluster of a range. `Corrupt` where there was
    /// none to take, and for metadata, which has left the overlap index before it is
    /// freed.
    pub async fn lower<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        mut clusters: Range<u64>,
    ) -> Result<()> {
        while !clusters.is_empty() {
            clusters.start += self.lower_some(engine, storage, clusters.clone()).await?.count;
        }
        Ok(())
    }

    /// As `lower`, for those clusters at the start of a range that one slice
    /// counts: all in one step.
    pub(super) async fn lower_some<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        clusters: Range<u64>,
    ) -> Result<Lowered> {
        let none_left = |cluster| {
            Error::corrupt(format!(
                "{}: host cluster {cluster} was in use but its refcount is 0",
                storage.name()
            ))
        };
        let first = clusters.start;
        let place = self.place(first)?.ok_or_else(|| none_left(first))?;
        let count = (clusters.end - first).min(place.count - place.index);
        self.overlap.check_free(first..first + count)?;
        let lowered = self
            .update(engine, storage, place.key, |slice| {
                // All of them or none: what fails is tried again as a whole.
                let counted =
                    |slice: &SliceMut<'_>, n| self.get_in(place.index + n, |i| slice.get(i));
                if let Some(n) = (0..count).find(|n| counted(slice, *n) == 0) {
                    return Err(first + n);
                }
                let mut lowered = Lowered { count, freed: 0, lowest: None };
                for n in 0..count {
                    let left = counted(slice, n) - 1;
                    self.set_in(slice, place.index + n, left);
                    if left == 0 {
                        lowered.freed += 1;
                        lowered.lowest = lowered.lowest.or(Some(first + n));
                    }
                }
                Ok(lowered)
            })
            .await?;
        lowered.map_err(none_left)
    }

    /// Where the refcount table is, and its bytes.
    pub fn table_place(&self) -> (u64, u64) {
        let table = self.table();
        (table.offset, table.entries.len() as u64 * 8)
    }

    /// Whether anything waits to be written.
    pub fn is_dirty(&self) -> bool {
        self.cache.has_dirty()
    }

    /// Writes all changed slices; does not sync.
    pub async fn write_back<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<()> {
        let _one_at_a_time = self.writing.lock().await;
        mutant!(RefcountWritesOvertake => drop(_one_at_a_time));
        let mut copies = self.cache.take_dirty()?;
        while let Some(copy) = copies.next() {
            // A corrupt table may name other metadata as a refcount block.
            let (offset, bytes) = (copy.key.get(), copy.bytes.len() as u64);
            self.overlap.check_table(offset, bytes, Metadata::RefcountBlock)?;
            let block = Block::from_bytes(&copy.bytes)?;
            storage.write(engine, &[Piece::Block(block.all())], offset).await?;
            copies.mark_written();
        }
        Ok(())
    }
}
