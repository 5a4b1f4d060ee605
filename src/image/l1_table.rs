//! The L1 table in memory, and a longer one in the file: VM state lies behind the disk,
//! where the table may end.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::qcow2::{Qcow2, Writing};
use crate::alloc::overlap::Metadata;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Header;
use crate::format::limits::MAX_L1_BYTES;
use crate::io::engine::{Engine, Piece};
use crate::metadata::tables::read;
use crate::sys::memory::Block;

/// The L1 table: host offsets of L2 tables, with the COPIED flag.
pub struct L1Table {
    entries: Box<[AtomicU64]>,
    /// Those behind them, where the table has grown since it was read.
    more: RwLock<Vec<u64>>,
    /// Where the table is in the file.
    offset: AtomicU64,
    dirty: Mutex<BTreeSet<usize>>,
}

impl L1Table {
    /// The table at `offset`, with these entries.
    pub fn new(offset: u64, entries: impl Iterator<Item = u64>) -> L1Table {
        L1Table {
            entries: entries.map(AtomicU64::new).collect(),
            more: RwLock::default(),
            offset: AtomicU64::new(offset),
            dirty: Mutex::default(),
        }
    }

    /// Where it is in the file. It moves only while nothing is written back.
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Acquire)
    }

    /// The entry at `index`; 0 past the end: there is no L2 table.
    #[inline]
    pub fn get(&self, index: u64) -> u64 {
        let entry = usize::try_from(index).ok().and_then(|index| self.entries.get(index));
        match entry {
            Some(entry) => entry.load(Ordering::Acquire),
            None => self.get_more(index),
        }
    }

    #[cold]
    fn get_more(&self, index: u64) -> u64 {
        let index = usize::try_from(index).ok().and_then(|i| i.checked_sub(self.entries.len()));
        index.and_then(|index| self.more().get(index).copied()).unwrap_or(0)
    }

    fn more(&self) -> RwLockReadGuard<'_, Vec<u64>> {
        self.more.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn more_mut(&self) -> RwLockWriteGuard<'_, Vec<u64>> {
        self.more.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes an entry; it is written with the next flush.
    pub fn set(&self, index: u64, value: u64) {
        let Ok(index) = usize::try_from(index) else { return };
        let mut dirty = self.dirty();
        match self.entries.get(index) {
            Some(entry) => entry.store(value, Ordering::Release),
            None => match self.more_mut().get_mut(index - self.entries.len()) {
                Some(entry) => *entry = value,
                None => return,
            },
        }
        dirty.insert(index);
    }

    fn dirty(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What changed since the last call: indices and values, in order.
    pub fn take_dirty(&self) -> Vec<(usize, u64)> {
        let mut dirty = self.dirty();
        let list = std::mem::take(&mut *dirty);
        list.into_iter().map(|index| (index, self.get(index as u64))).collect()
    }

    /// These did not reach the storage.
    pub fn put_back(&self, entries: &[(usize, u64)]) {
        self.dirty().extend(entries.iter().map(|(index, _)| *index));
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len() + self.more().len()
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        let first = self.entries.iter().map(|entry| entry.load(Ordering::Acquire));
        first.chain(self.more().clone())
    }

    /// It is elsewhere now, with so many entries, the new ones empty. `OutOfMemory`,
    /// and nothing has happened, if `place` is `None`.
    fn grow(&self, entries: u64, place: Option<u64>) -> Result<()> {
        let mut more = self.more_mut();
        let wanted = (entries as usize).saturating_sub(self.entries.len());
        let missing = wanted.saturating_sub(more.len());
        more.try_reserve_exact(missing)
            .map_err(|_| Error::new(ErrorKind::OutOfMemory, "no memory for a longer L1 table"))?;
        if let Some(offset) = place {
            more.resize(wanted, 0);
            self.offset.store(offset, Ordering::Release);
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Makes the L1 table at least so long, while requests go on. `Os(EFBIG)` where no
    /// table can be; `NoSpace`.
    pub(super) async fn grow_l1<E: Engine>(&self, engine: &E, entries: u64) -> Result<()> {
        let writing = self.writing()?;
        if entries <= self.l1.len() as u64 {
            return Ok(());
        }
        // Nothing is written to the old table meanwhile, so nothing is lost in it.
        let _leader = writing.flushing.lock().await;
        writing.allocator.health.check()?;
        let old = self.l1.len() as u64;
        let most = MAX_L1_BYTES / 8;
        if entries > most {
            let text = format!("{}: no L1 table is longer than 32 MiB", self.storage.name());
            return Err(Error::new(ErrorKind::Os(libc::EFBIG), text));
        }
        if entries <= old {
            return Ok(());
        }
        let entries = entries.max(old + old / 2).min(most);
        self.l1.grow(entries, None)?;
        let (allocator, storage) = (&writing.allocator, &self.storage);
        let count = self.geometry().clusters_for(entries * 8);
        let clusters = allocator.allocate_together(engine, storage, count).await?;
        let place = clusters.start << self.geometry().cluster_bits;
        if let Err(error) = self.copy_l1(engine, writing, place, entries).await {
            allocator.free_together(engine, storage, clusters).await?;
            return Err(error);
        }
        let old_place = self.l1.offset();
        let switched = self.switch_l1(engine, place, entries).await;
        if let Err(error) = switched {
            // Nobody can tell from the error whether it was written.
            let now = read(engine, storage, Header::L1_AT + 4, 8).await?;
            if now != place.to_be_bytes() {
                allocator.free_together(engine, storage, clusters).await?;
                return Err(error);
            }
        }
        allocator.overlap.add(place, entries * 8, Metadata::L1);
        self.l1.grow(entries, Some(place))?;
        allocator.overlap.remove(old_place, old * 8, Metadata::L1);
        allocator.barrier(engine, storage).await?;
        // The next flush frees it.
        allocator.limbo.announce(allocator.clusters_of(old_place, old * 8));
        Ok(())
    }

    /// Writes what the table in the file says to a new place; durable on return.
    async fn copy_l1<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
        place: u64,
        entries: u64,
    ) -> Result<()> {
        let old = self.l1.len() * 8;
        let block = Block::zeroed((entries * 8) as usize)?;
        block
            .slice(0, old)
            .copy_from(0, &read(engine, &self.storage, self.l1.offset(), old).await?);
        let piece = [Piece::Block(block.slice(0, (entries * 8) as usize))];
        self.storage.write(engine, &piece, place).await?;
        writing.allocator.write_refcounts(engine, &self.storage).await?;
        writing.allocator.barrier(engine, &self.storage).await
    }

    async fn switch_l1<E: Engine>(&self, engine: &E, place: u64, entries: u64) -> Result<()> {
        let header = Header { l1_offset: place, l1_size: entries as u32, ..self.header.clone() };
        let block = Block::from_bytes(&header.l1_patch())?;
        self.storage.write(engine, &[Piece::Block(block.slice(0, 12))], Header::L1_AT).await
    }
}
