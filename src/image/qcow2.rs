//! One qcow2 image of a chain: its tables in memory, and the way from a guest
//! offset to what is stored there.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::claims::Claims;
use super::encryption::Unlocked;
use super::feature_bits::FeatureBits;
pub use super::l1_table::L1Table;
use crate::alloc::allocator::Allocator;
use crate::alloc::packing::Open;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::compressed::Compressed;
use crate::format::header::Header;
use crate::format::l2::{COPIED, Cluster, L2Entry, L2Format};
use crate::format::limits::OFFSET_MASK;
use crate::format::snapshot::Snapshot;
use crate::format::subcluster::Subcluster;
use crate::geometry::{DataOffset, Geometry, GuestCluster, GuestOffset, HostOffset};
use crate::io::engine::{Engine, Target};
use crate::io::storage::Storage;
use crate::io::wait::AsyncMutex;
use crate::metadata::cache::{Loaded, SliceCache, SliceMut};
use crate::metadata::tables::words_of;
use crate::sys::memory::Block;

/// An open qcow2 image, without what is below it.
pub struct Qcow2 {
    /// Where its bytes are; shared with the snapshots of it that are open.
    pub storage: Arc<Storage>,
    /// Where guest data is, if that is not in there. (Not opened for a mere check.)
    pub data_file: Option<Arc<Storage>>,
    /// As read at open, but for the bits that are changed later.
    pub header: Header,
    /// What encrypts guest data, if something does.
    pub unlocked: Unlocked,
    /// How its L2 entries are read.
    pub format: L2Format,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// The L1 table.
    pub l1: L1Table,
    /// Slices of L2 tables.
    pub l2: SliceCache,
    /// What only an image that is open for writing has.
    pub writing: Option<Writing>,
    /// Slices that had to be loaded.
    pub misses: AtomicU64,
    /// Its internal snapshots, once somebody has asked for them.
    pub snapshots: OnceLock<SnapshotTable>,
}

/// The internal snapshots of an image.
#[derive(Debug, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub list: Vec<Snapshot>,
    /// Bytes that the table takes in the file.
    pub bytes: u64,
}

/// The state of an image that is open for writing.
pub struct Writing {
    /// Host clusters.
    pub allocator: Allocator,
    /// Requests that change the mapping.
    pub claims: Claims,
    /// The host cluster that compressed data goes into.
    pub filling: AsyncMutex<Option<Open>>,
    /// Held by whoever writes metadata back.
    pub flushing: AsyncMutex<()>,
    /// Flushes begun and, the last of them, completed.
    pub flushes_begun: AtomicU64,
    /// The number of the last flush that completed.
    pub flushes_done: AtomicU64,
    /// Something was written, maybe before the image was opened, that no sync has
    /// covered yet.
    pub needs_sync: AtomicBool,
    /// The header's feature bits that change.
    pub features: FeatureBits,
    /// Refcounts need not be written before what they count is referred to: the
    /// dirty bit is, instead.
    pub lazy: bool,
    /// Whether the space of what is freed is given back.
    pub punch: bool,
    /// The same for what snapshots had.
    pub punch_snapshots: bool,
    /// Discards keep their host clusters.
    pub discard_keeps: bool,
    /// Bytes read from below (or from an older place) and copied.
    pub cow_bytes: AtomicU64,
}

/// A part of the virtual disk that is stored alike, in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// What its subclusters are.
    pub kind: Subcluster,
    /// Bytes from the offset asked for.
    pub len: u64,
    /// Where that offset is (or would be) in the file that guest data is in.
    pub host: Option<DataOffset>,
    /// Whether it may be written in place.
    pub copied: bool,
    /// Compressed data, of the whole cluster.
    pub compressed: Option<Compressed>,
}

/// The result of a lookup without I/O.
pub enum Lookup {
    /// Found.
    Run(Run),
    /// A slice has to be loaded first.
    Load(HostOffset),
}

impl Writing {
    /// Data was written that no sync has covered yet.
    #[inline]
    pub fn mark_unsynced(&self) {
        // If the load sees what a flush is about to take, that flush's sync comes
        // after our write: nothing is missed.
        if !self.needs_sync.load(Ordering::SeqCst) {
            self.needs_sync.store(true, Ordering::SeqCst);
        }
    }
}

impl Qcow2 {
    /// Sizes.
    pub fn geometry(&self) -> Geometry {
        self.format.geometry
    }

    /// The state for writing; `ReadOnly` if there is none.
    pub fn writing(&self) -> Result<&Writing> {
        self.writing.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::ReadOnly, format!("{} is open read-only", self.storage.name()))
        })
    }

    /// Whether there is an image below (its offset 0 is not this one's zero).
    pub fn has_backing(&self) -> bool {
        self.header.backing.is_some()
    }

    /// The L2 table that an L1 entry names.
    pub fn table_of(&self, l1_entry: u64) -> Result<Option<HostOffset>> {
        let Some(table) = HostOffset::new(l1_entry & OFFSET_MASK) else { return Ok(None) };
        if self.geometry().in_cluster(table.get()) != 0 && !mutant!(TableNotAligned) {
            return Err(Error::corrupt(format!(
                "{}: an L1 entry points to {table}, which is not the start of a cluster",
                self.storage.name()
            )));
        }
        Ok(Some(table))
    }

    /// The slice of `table` that maps `cluster`, and the index of its entry there.
    #[inline]
    pub fn slice_of(&self, table: HostOffset, cluster: GuestCluster) -> (HostOffset, usize) {
        let bytes = self.geometry().l2_index(cluster) * self.geometry().l2_entry_size();
        let slice = self.l2.slice_bytes() as u64;
        let key = table.checked_add(bytes & !(slice - 1)).unwrap_or(table);
        (key, ((bytes & (slice - 1)) >> self.geometry().l2_entry_bits()) as usize)
    }

    /// Entries of a slice.
    pub fn entries_per_slice(&self) -> usize {
        self.l2.slice_bytes() / self.geometry().l2_entry_size() as usize
    }

    /// The common case of `lookup`: all `len` bytes (at least 1) lie in one host
    /// cluster, here, as the guest has them; and whether they may be written in place.
    /// `None`: anything else, or not known without I/O.
    #[inline]
    pub fn stored(&self, offset: GuestOffset, len: u64) -> Option<(DataOffset, bool)> {
        if self.is_encrypted() {
            return None;
        }
        let geometry = self.geometry();
        let cluster = geometry.guest_cluster(offset);
        let l1_entry = self.l1.get(geometry.l1_index(cluster));
        let table = HostOffset::new(l1_entry & OFFSET_MASK)?;
        let from = geometry.in_cluster(offset.0);
        if geometry.in_cluster(table.get()) != 0 || len > geometry.cluster_size() - from {
            return None;
        }
        let (key, index) = self.slice_of(table, cluster);
        let stored = |words: &_| self.format.stored(self.entry_at(words, index), from, len);
        let (host, copied) = self.l2.read(key, stored)??;
        if self.format.data_file && host.get() != offset.0 && !mutant!(DataFilePlaceBelieved) {
            return None;
        }
        // An L2 table that is shared makes all it maps shared.
        Some((host, copied && l1_entry & COPIED != 0))
    }

    /// What is stored at `offset`, up to `max` bytes (at least 1), without I/O.
    #[inline]
    pub fn lookup(&self, offset: GuestOffset, max: u64) -> Result<Lookup> {
        let geometry = self.geometry();
        let cluster = geometry.guest_cluster(offset);
        let l1_entry = self.l1.get(geometry.l1_index(cluster));
        let Some(table) = self.table_of(l1_entry)? else {
            let coverage = geometry.l2_coverage();
            let len = max.min(coverage - (offset.0 & (coverage - 1)));
            let kind = Subcluster::Unallocated;
            return Ok(Lookup::Run(Run { kind, len, host: None, copied: false, compressed: None }));
        };
        let (key, index) = self.slice_of(table, cluster);
        let found = self.l2.read(key, |words| self.walk(words, index, offset, max));
        match found {
            None => Ok(Lookup::Load(key)),
            Some(Ok(mut run)) => {
                // An L2 table that is shared makes all it maps shared.
                run.copied &= l1_entry & COPIED != 0;
                Ok(Lookup::Run(run))
            }
            Some(Err(error)) => {
                let name = self.storage.name();
                Err(error.context(format!("{name}: guest offset {offset}, L2 table at {table}")))
            }
        }
    }

    /// The longest run from entry `index` of a slice on.
    #[inline]
    fn walk(
        &self,
        words: &[AtomicU64],
        index: usize,
        offset: GuestOffset,
        max: u64,
    ) -> Result<Run> {
        let geometry = self.geometry();
        let (count, sub_bits) = (geometry.subclusters(), geometry.subcluster_bits());
        let in_cluster = geometry.in_cluster(offset.0);
        let first = (in_cluster >> sub_bits) as u32;
        let first_cluster = geometry.guest_cluster(offset).0;
        let cluster =
            self.format.decode_at(self.entry_at(words, index), GuestCluster(first_cluster))?;
        let (kind, subclusters) = cluster.run(first, count);
        let mut end = first + subclusters;
        let mut run = Run {
            kind,
            len: (u64::from(end) << sub_bits) - in_cluster,
            host: None,
            copied: false,
            compressed: None,
        };
        match cluster {
            Cluster::Standard { host, copied, .. } => {
                run.host = host.checked_add(in_cluster);
                run.copied = copied || mutant!(SharedWrittenInPlace);
            }
            Cluster::Compressed(data) => {
                run.compressed = Some(data);
                run.len = run.len.min(max);
                return Ok(run);
            }
            Cluster::None { .. } => {}
        }
        let mut next = index;
        while end == count && run.len < max {
            next += 1;
            if next >= self.entries_per_slice() {
                break;
            }
            let at = GuestCluster(first_cluster + (next - index) as u64);
            let Ok(cluster) = self.format.decode_at(self.entry_at(words, next), at) else { break };
            let (kind, subclusters) = cluster.run(0, count);
            let continues = match (cluster, run.host) {
                (Cluster::None { .. }, None) => true,
                (Cluster::Standard { host, copied, .. }, Some(start)) => {
                    copied == run.copied && start.checked_add(run.len) == Some(host)
                }
                _ => false,
            };
            if kind != run.kind || !continues {
                break;
            }
            end = subclusters;
            run.len += u64::from(subclusters) << sub_bits;
        }
        run.len = run.len.min(max);
        Ok(run)
    }

    #[inline]
    fn entry_at(&self, words: &[AtomicU64], index: usize) -> L2Entry {
        let word = |i: usize| words.get(i).map_or(0, |word| word.load(Ordering::Relaxed));
        if self.geometry().extended_l2 {
            L2Entry { descriptor: word(index * 2), bitmap: word(index * 2 + 1) }
        } else {
            L2Entry { descriptor: word(index), bitmap: 0 }
        }
    }

    /// As `lookup`, loading what is missing.
    pub async fn find<E: Engine>(&self, engine: &E, offset: GuestOffset, max: u64) -> Result<Run> {
        loop {
            match self.lookup(offset, max)? {
                Lookup::Run(run) => return Ok(run),
                Lookup::Load(key) => {
                    if !self.load(engine, key).await? {
                        return self.find_apart(engine, key, offset, max).await;
                    }
                }
            }
        }
    }

    /// As `find`, past a cache that is full of what can never be written back: the
    /// image is unhealthy, but what is sound can still be read.
    #[cold]
    async fn find_apart<E: Engine>(
        &self,
        engine: &E,
        key: HostOffset,
        offset: GuestOffset,
        max: u64,
    ) -> Result<Run> {
        let block = Block::zeroed(self.l2.slice_bytes())?;
        self.storage.read(engine, Target::Block(block.all()), key.get()).await?;
        let words: Vec<AtomicU64> = fallible::collect(
            self.l2.slice_bytes() / 8,
            words_of(&block.all().to_vec()?).map(AtomicU64::new),
        )?;
        let cluster = self.geometry().guest_cluster(offset);
        let index = self.geometry().l2_index(cluster) as usize % self.entries_per_slice();
        let run = self.walk(&words, index, offset, max)?;
        Ok(Run { copied: false, ..run })
    }

    /// Brings a slice of an L2 table into the cache. `false`: there is no room, and
    /// none to be had, for nothing is written back any more.
    pub async fn load<E: Engine>(&self, engine: &E, key: HostOffset) -> Result<bool> {
        self.misses.fetch_add(1, Ordering::Relaxed);
        loop {
            let ticket = self.l2.begin_load(key);
            let block = Block::zeroed(self.l2.slice_bytes())?;
            let read = self.storage.read(engine, Target::Block(block.all()), key.get()).await;
            mutant!(FailedLoadCached => if read.is_err() {
                self.l2.finish_load(key, ticket, &block.all().to_vec()?)?;
            });
            read?;
            match self.l2.finish_load(key, ticket, &block.all().to_vec()?)? {
                Loaded::Done => return Ok(true),
                Loaded::Stale => {}
                Loaded::Full if self.is_unhealthy() => return Ok(false),
                Loaded::Full => self.make_room(engine).await?,
            }
        }
    }

    fn is_unhealthy(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.allocator.health.check().is_err())
    }

    /// As `load`, for a request that changes something.
    pub async fn load_to_change<E: Engine>(&self, engine: &E, key: HostOffset) -> Result<()> {
        if !self.load(engine, key).await? {
            self.writing()?.allocator.health.check()?;
        }
        Ok(())
    }

    /// The entry of one cluster of `table`, and whether it says something valid.
    pub async fn entry<E: Engine>(
        &self,
        engine: &E,
        table: HostOffset,
        cluster: GuestCluster,
    ) -> Result<Cluster> {
        let (key, index) = self.slice_of(table, cluster);
        loop {
            if let Some(entry) = self.l2.read(key, |words| self.entry_at(words, index)) {
                return self.format.decode_at(entry, cluster).map_err(|error| {
                    let name = self.storage.name();
                    error.context(format!(
                        "{name}: guest cluster {}, L2 table at {table}",
                        cluster.0
                    ))
                });
            }
            self.load_to_change(engine, key).await?;
        }
    }

    /// Changes entries of one slice of `table` in one step: `change` gets each
    /// cluster's entry and returns the new one, or `None` to leave it.
    pub async fn change<E: Engine>(
        &self,
        engine: &E,
        table: HostOffset,
        first: GuestCluster,
        count: u64,
        mut change: impl FnMut(u64, Cluster) -> Option<Cluster>,
    ) -> Result<()> {
        let (key, index) = self.slice_of(table, first);
        loop {
            let words = self.format.words();
            #[cfg(qcow2rs_mutants)]
            let mut halves = Vec::new();
            let done = self.l2.update(key, |slice| {
                let entry = |slice: &SliceMut<'_>, n| {
                    let entry = entry_in(slice, index + n as usize, words);
                    self.format.decode_at(entry, GuestCluster(first.0 + n))
                };
                // All or nothing: see that every entry makes sense first.
                for n in 0..count {
                    entry(slice, n)?;
                }
                for n in 0..count {
                    if let Some(new) = change(n, entry(slice, n)?) {
                        let new = self.format.encode(new);
                        mutant!(EntryChangedInHalves => {
                            halves.push((index + n as usize, new));
                            let L2Entry { bitmap, .. } = entry_in(slice, index + n as usize, words);
                            let new = L2Entry { bitmap, ..new };
                            set_entry_in(slice, index + n as usize, words, new);
                            continue;
                        });
                        set_entry_in(slice, index + n as usize, words, new);
                    }
                }
                Ok(())
            });
            mutant!(EntryChangedInHalves => self.change_late(engine, key, &halves).await?);
            match done {
                Some(result) => return result,
                None => self.load_to_change(engine, key).await?,
            }
        }
    }
}

fn entry_in(slice: &SliceMut<'_>, index: usize, words: usize) -> L2Entry {
    L2Entry {
        descriptor: slice.get(index * words),
        bitmap: if words == 2 { slice.get(index * words + 1) } else { 0 },
    }
}

fn set_entry_in(slice: &mut SliceMut<'_>, index: usize, words: usize, entry: L2Entry) {
    slice.set(index * words, entry.descriptor);
    if words == 2 {
        slice.set(index * words + 1, entry.bitmap);
    }
}
