//! Gives out host clusters.
//!
//! Refcounts are raised ahead, in runs; a request takes clusters off the current
//! run under a short lock and does no I/O. When the run is used up, one request
//! finds the next: the lowest free clusters, as QEMU does, after the end of the
//! file if there are none before it. What is left of a run when the image is
//! closed is given back; after a crash it is a leak, never corruption.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::epoch::Epochs;
use super::health::Health;
use super::limbo::Limbo;
use super::overlap::{Metadata, OverlapIndex};
use super::refcounts::Refcounts;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::limits::MAX_HOST_OFFSET;
use crate::geometry::{Geometry, HostOffset};
use crate::io::engine::{Engine, Piece, ZeroMode};
use crate::io::storage::Storage;
use crate::io::wait::AsyncMutex;
use crate::sys::memory::Block;

/// Runs begin with this many bytes and double, as they are used up, up to the maximum.
const FIRST_RUN: u64 = 1 << 20;
const LONGEST_RUN: u64 = 64 << 20;
const FEWEST_CLUSTERS: u64 = 16;

/// The allocator of an image that is open for writing.
pub struct Allocator {
    pub(super) geometry: Geometry,
    pub(super) state: Mutex<State>,
    /// Held by whoever looks for the next run.
    pub(super) refilling: AsyncMutex<()>,
    /// The refcounts.
    pub refcounts: Refcounts,
    /// Freed clusters that may not be used yet.
    pub limbo: Limbo,
    /// Who is inside.
    pub epochs: Epochs,
    /// Where metadata is.
    pub overlap: Arc<OverlapIndex>,
    /// Sticky failures.
    pub health: Arc<Health>,
    /// Holes are made only when clusters leave limbo: what a hole reads as must not be
    /// seen by who still finds the old pointer after a crash.
    pub late_holes: bool,
    /// No cluster from this byte on was ever given out.
    untouched_from: AtomicU64,
    /// Something was done that has to be durable before pointers are written.
    order_needed: AtomicBool,
    allocated: AtomicU64,
    freed: AtomicU64,
}

pub(super) struct State {
    /// Refcount raised, not given out.
    run: Range<u64>,
    run_is_fresh: bool,
    next_run_bytes: u64,
    /// No cluster below had a refcount of 0 when the last search began.
    hint: u64,
    /// The lowest cluster that became free since the search for the next run began,
    /// which may have passed it by.
    freed_since: u64,
    /// From here on no cluster has ever been written: they read as zero.
    pub fresh_from: u64,
    /// Length of the file as far as this allocator made it.
    pub file_length: u64,
    /// Given out, then not used: refcount raised, content arbitrary.
    returned: Vec<u64>,
    /// As `returned`, but an operation on them may still be under way.
    pub abandoned: Vec<u64>,
}

/// Neighbouring clusters just allocated, refcount 1. Whoever gets them must
/// `keep` them when a pointer to them is in place, or `give_back`; if neither
/// happens (a cancelled request) they stay unused until the image is closed.
pub struct Allocation<'a> {
    allocator: &'a Allocator,
    clusters: Range<u64>,
    fresh: bool,
    /// The file reaches over them.
    inside: bool,
}

impl Allocation<'_> {
    /// Number of clusters.
    pub fn count(&self) -> u64 {
        self.clusters.end - self.clusters.start
    }

    /// Where the first cluster begins.
    pub fn start(&self) -> Result<HostOffset> {
        HostOffset::new(self.clusters.start << self.allocator.geometry.cluster_bits)
            .ok_or_else(|| Error::corrupt("the header's cluster was taken for a free one"))
    }

    /// Whether their bytes are known to be zero, also after a power loss.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Whether a pointer to them does no harm before anything is written there: they
    /// are fresh, and the file reaches over them. (That it does so durably, and
    /// that their refcounts are raised durably, `order_needed` sees to.)
    pub fn may_be_pointed_to(&self) -> bool {
        self.fresh && self.inside
    }

    /// Something points to the clusters now.
    pub fn keep(mut self) {
        self.allocator.allocated.fetch_add(self.count(), Ordering::Relaxed);
        self.clusters = 0..0;
    }

    /// Something points to those clusters that `used` (by index) says so of; the
    /// others were not needed, and nothing is under way on them.
    pub fn keep_only(mut self, used: impl Fn(u64) -> bool) {
        let clusters = std::mem::replace(&mut self.clusters, 0..0);
        let (kept, unused): (Vec<u64>, Vec<u64>) =
            clusters.clone().partition(|cluster| used(cluster - clusters.start));
        self.allocator.allocated.fetch_add(kept.len() as u64, Ordering::Relaxed);
        self.allocator.lock().returned.extend(unused);
    }

    /// Not needed after all, and nothing is under way on them.
    pub fn give_back(mut self) {
        let clusters = std::mem::replace(&mut self.clusters, 0..0);
        self.allocator.lock().returned.extend(clusters);
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        if !self.clusters.is_empty() {
            mutant!(AbandonedReused => {
                self.allocator.lock().returned.extend(self.clusters.clone());
                return;
            });
            self.allocator.lock().abandoned.extend(self.clusters.clone());
        }
    }
}

impl Allocator {
    /// The allocator of an image whose file is `file_length` bytes long.
    pub fn new(
        geometry: Geometry,
        refcounts: Refcounts,
        overlap: Arc<OverlapIndex>,
        health: Arc<Health>,
        storage: &Storage,
        file_length: u64,
    ) -> Allocator {
        // Metadata that is said to lie past the end comes into being when written.
        let file_length = file_length.max(overlap.end());
        // Nobody knows what a device holds behind the image.
        let fixed = storage.capacity().is_some();
        let fresh_from = if fixed { u64::MAX } else { geometry.clusters_for(file_length) };
        Allocator {
            untouched_from: AtomicU64::new(fresh_from.saturating_mul(geometry.cluster_size())),
            geometry,
            state: Mutex::new(State {
                run: 0..0,
                run_is_fresh: false,
                next_run_bytes: FIRST_RUN,
                hint: 0,
                freed_since: u64::MAX,
                fresh_from,
                file_length,
                returned: Vec::new(),
                abandoned: Vec::new(),
            }),
            refilling: AsyncMutex::new(()),
            order_needed: AtomicBool::new(false),
            refcounts,
            limbo: Limbo::default(),
            epochs: Epochs::default(),
            overlap,
            health,
            late_holes: false,
            allocated: AtomicU64::new(0),
            freed: AtomicU64::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clusters given out and freed since open.
    pub fn totals(&self) -> (u64, u64) {
        (self.allocated.load(Ordering::Relaxed), self.freed.load(Ordering::Relaxed))
    }

    /// To be called before guest data is written in place or to what was given out:
    /// `Corrupt` where metadata is.
    #[inline]
    pub fn check_data(&self, offset: u64, bytes: u64) -> Result<()> {
        self.overlap.check_data(offset, bytes)?;
        let end = offset.saturating_add(bytes);
        if end > self.untouched_from.load(Ordering::Relaxed) {
            self.touch(end);
        }
        Ok(())
    }

    /// Only a corrupt image leads to clusters that were never given out. They are
    /// not known to be zero any more, and the file does not end before them.
    #[cold]
    fn touch(&self, end: u64) {
        let mut state = self.lock();
        let clusters = self.geometry.clusters_for(end);
        state.run_is_fresh &= clusters <= state.run.start;
        state.fresh_from = state.fresh_from.max(clusters);
        state.file_length = state.file_length.max(end);
        self.note_untouched(&state);
    }

    /// To be called after a change of the run, or of where fresh clusters begin.
    pub(super) fn note_untouched(&self, state: &State) {
        let cluster = if state.run_is_fresh { state.run.start } else { state.fresh_from };
        let offset = cluster.saturating_mul(self.geometry.cluster_size());
        self.untouched_from.store(offset, Ordering::Relaxed);
    }

    /// Up to `want` neighbouring clusters off the current run, without I/O.
    fn take(&self, want: u64) -> Option<Allocation<'_>> {
        let mut state = self.lock();
        if let Some(cluster) = state.returned.pop() {
            let clusters = cluster..cluster + 1;
            let fresh = mutant!(ReturnedTakenForFresh);
            return Some(Allocation { allocator: self, clusters, fresh, inside: false });
        }
        if state.run.is_empty() {
            return None;
        }
        let end = state.run.end.min(state.run.start + want.max(1));
        let clusters = state.run.start..end;
        state.run.start = end;
        self.note_untouched(&state);
        let inside = end <= state.file_length >> self.geometry.cluster_bits;
        Some(Allocation { allocator: self, clusters, fresh: state.run_is_fresh, inside })
    }

    /// Allocates between 1 and `want` neighbouring clusters; `NoSpace` if there
    /// are none now (some may wait in limbo: a flush may help).
    pub async fn allocate<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        want: u64,
    ) -> Result<Allocation<'_>> {
        loop {
            if let Some(allocation) = self.take(want) {
                return Ok(allocation);
            }
            let _one_at_a_time = self.refilling.lock().await;
            if self.lock().run.is_empty() {
                self.refill(engine, storage).await?;
            }
        }
    }

    /// Finds the next run of free clusters and raises their refcounts.
    async fn refill<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<()> {
        let mut at = {
            let mut state = self.lock();
            state.freed_since = u64::MAX;
            state.hint
        };
        loop {
            let place = match self.refcounts.place(at)? {
                Some(place) => place,
                None => {
                    self.add_block(engine, storage, at).await?;
                    continue;
                }
            };
            let found = self
                .refcounts
                .look(engine, storage, place.key, |words| {
                    (place.index..place.count).find(|&i| {
                        let word = |n: usize| words.get(n).map_or(0, |w| w.load(Ordering::Relaxed));
                        self.refcounts.get_in(i, word) == 0
                    })
                })
                .await?;
            let Some(index) = found else {
                at += place.count - place.index;
                continue;
            };
            let first = at + (index - place.index);
            self.check_room(storage, first)?;
            let limit = self.run_limit(storage, first);
            let clusters = self
                .refcounts
                .update(engine, storage, place.key, |slice| {
                    let mut end = index;
                    while end < place.count && end - index < limit {
                        if self.refcounts.get_in(end, |i| slice.get(i)) != 0 {
                            break;
                        }
                        self.refcounts.set_in(slice, end, 1);
                        end += 1;
                    }
                    first..first + (end - index)
                })
                .await?;
            self.note_run(&clusters);
            return self.adopt_run(engine, storage, clusters).await;
        }
    }

    /// After a run as long as they may be, the next may be longer. Shorter ones, which
    /// are holes, say nothing of how much is written.
    fn note_run(&self, run: &Range<u64>) {
        let mut state = self.lock();
        if (run.end - run.start) << self.geometry.cluster_bits >= state.next_run_bytes {
            state.next_run_bytes = (state.next_run_bytes * 2).min(LONGEST_RUN);
        }
    }

    /// How many clusters a run from `first` on may have.
    fn run_limit(&self, storage: &Storage, first: u64) -> u64 {
        let state = self.lock();
        let mut limit = (state.next_run_bytes >> self.geometry.cluster_bits).max(FEWEST_CLUSTERS);
        // A run is fresh as a whole or not at all.
        if first < state.fresh_from {
            limit = limit.min(state.fresh_from - first);
        }
        if let Some(capacity) = storage.capacity() {
            limit = limit.min((capacity >> self.geometry.cluster_bits).saturating_sub(first));
        }
        limit
    }

    /// Whether `cluster` lies inside what a file of this kind can have.
    pub(super) fn check_room(&self, storage: &Storage, cluster: u64) -> Result<()> {
        let end = cluster.checked_add(1).and_then(|n| n.checked_mul(self.geometry.cluster_size()));
        let end = end.filter(|end| *end <= MAX_HOST_OFFSET).ok_or_else(|| {
            Error::new(
                ErrorKind::Os(libc::EFBIG),
                format!("{} cannot grow past 2^56 bytes", storage.name()),
            )
        })?;
        match storage.capacity() {
            Some(capacity) if end > capacity => Err(Error::new(
                ErrorKind::NoSpace,
                format!("{} is full: it has {capacity} bytes", storage.name()),
            )),
            _ => Ok(()),
        }
    }

    /// Makes a run whose refcounts are raised the current one.
    async fn adopt_run<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        run: Range<u64>,
    ) -> Result<()> {
        // If this is given up half way, they are unused until close.
        let clusters = run.clone();
        let mut raised = Allocation { allocator: self, clusters, fresh: false, inside: false };
        let start = run.start << self.geometry.cluster_bits;
        let bytes = (run.end - run.start) << self.geometry.cluster_bits;
        // A corrupt image may call clusters free that are not.
        self.overlap.check_data(start, bytes)?;
        if let Err(error) = self.extend(engine, storage, run.end).await {
            if !mutant!(RunNotRolledBack) {
                self.refcounts.lower(engine, storage, run).await?;
            }
            raised.clusters = 0..0;
            return Err(error);
        }
        raised.clusters = 0..0;
        // Before anybody gets a cluster of it.
        self.need_order();
        let mut state = self.lock();
        state.run_is_fresh = run.start >= state.fresh_from || mutant!(UsedTakenForFresh);
        if state.run_is_fresh {
            state.fresh_from = run.end;
        }
        state.hint = run.end.min(state.freed_since);
        mutant!(SearchForgetsFreed => state.hint = run.end);
        state.run = run;
        self.note_untouched(&state);
        Ok(())
    }

    /// Makes the file reach up to the end of a cluster. Nobody can be writing
    /// past its end: clusters there have not been given out.
    pub(super) async fn extend<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        end_cluster: u64,
    ) -> Result<()> {
        let end = end_cluster << self.geometry.cluster_bits;
        let known = end <= self.lock().file_length || mutant!(FileNotExtended);
        if storage.capacity().is_some() || known {
            return Ok(());
        }
        match storage.truncate(engine, end).await {
            Ok(()) => self.lock().file_length = end,
            // It grows by being written, then, and reads as zero meanwhile.
            Err(error) if error.kind() == ErrorKind::NotSupported => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Cuts off the end of the file, which nothing uses.
    pub async fn shrink_file<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        length: u64,
    ) -> Result<()> {
        storage.truncate(engine, length).await?;
        self.lock().file_length = length;
        Ok(())
    }

    /// Gives the clusters that `cluster` belongs to a refcount block, which lies
    /// in `cluster` and so counts itself. The table on disk names it later: see
    /// `name_blocks`.
    async fn add_block<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        cluster: u64,
    ) -> Result<()> {
        self.check_room(storage, cluster)?;
        let table_index = cluster / self.refcounts.per_block();
        if table_index >= self.refcounts.table().entries.len() as u64 {
            return self.grow_table(engine, storage).await;
        }
        let size = self.geometry.cluster_size();
        let Some(offset) = HostOffset::new(cluster << self.geometry.cluster_bits) else {
            return Err(Error::corrupt("the cluster of the header is not counted as in use"));
        };
        self.overlap.check_data(offset.get(), size)?;
        self.extend(engine, storage, cluster + 1).await?;
        let counts = self.counts_for_block(cluster % self.refcounts.per_block(), 1)?;
        let block = Block::from_bytes(&counts)?;
        storage.write(engine, &[Piece::Block(block.all())], offset.get()).await?;
        self.overlap.add(offset.get(), size, Metadata::RefcountBlock);
        self.refcounts.publish_block(table_index, offset);
        let mut state = self.lock();
        state.fresh_from = state.fresh_from.max(cluster + 1);
        self.note_untouched(&state);
        Ok(())
    }

    /// The bytes of a refcount block in which `count` counts from `first` on are
    /// one and the others zero.
    pub(super) fn counts_for_block(&self, first: u64, count: u64) -> Result<Vec<u8>> {
        let width = self.refcounts.width;
        let size = self.geometry.cluster_size() as usize;
        let mut words = fallible::filled(size / 8, 0u64)?;
        for index in first..first + count {
            if let Some(word) = words.get_mut((index / width.per_word()) as usize) {
                *word = width.set(*word, index % width.per_word(), 1);
            }
        }
        fallible::collect(size, words.iter().flat_map(|word| word.to_be_bytes()))
    }

    /// To be called before a pointer is changed to what was written, or to what is
    /// counted or reached by the file, and need not be durable yet.
    pub fn need_order(&self) {
        self.order_needed.store(true, Ordering::SeqCst);
    }

    /// Whether a sync has to come before the pointers that were copied before this
    /// call; it has to come after this call.
    pub fn take_order(&self) -> bool {
        self.order_needed.swap(false, Ordering::SeqCst)
    }

    /// Syncs; a failure is for good.
    pub async fn barrier<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<()> {
        self.health.sync(engine, storage).await
    }

    /// Lowers the refcounts of what has left limbo; the clusters are free then.
    pub async fn release_ready<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<()> {
        let mut ready = self.limbo.take_ready(&self.epochs);
        while let Some(clusters) = ready.next() {
            if self.late_holes {
                self.punch_last(engine, storage, clusters.clone()).await?;
            }
            let lowered = self.refcounts.lower_some(engine, storage, clusters).await?;
            ready.done(lowered.count);
            self.freed.fetch_add(lowered.freed, Ordering::Relaxed);
            if let Some(lowest) = lowered.lowest {
                self.note_free(lowest);
            }
        }
        Ok(())
    }

    /// Gives back the space of those clusters at the start of a range, as many as
    /// `lower_some` takes, that nothing else refers to. It does not matter whether it
    /// works.
    async fn punch_last<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        clusters: Range<u64>,
    ) -> Result<()> {
        let first = clusters.start;
        let Some(place) = self.refcounts.place(first)? else { return Ok(()) };
        let count = (clusters.end - first).min(place.count - place.index);
        let last = |words: &[AtomicU64], n| {
            let word = |i: usize| words.get(i).map_or(0, |word| word.load(Ordering::Relaxed));
            self.refcounts.get_in(place.index + n, word) == 1
        };
        let lasts = |words: &[AtomicU64]| {
            fallible::collect(count as usize, (0..count).map(|n| last(words, n)))
        };
        let lasts: Vec<bool> = self.refcounts.look(engine, storage, place.key, lasts).await??;
        let bits = self.geometry.cluster_bits;
        let mut start = first;
        for run in lasts.chunk_by(|a, b| a == b) {
            let (offset, length) = (start << bits, (run.len() as u64) << bits);
            start += run.len() as u64;
            let own = run.first() == Some(&true);
            if own && storage.can_punch() && self.overlap.may_punch(offset, length) {
                _ = storage.zero(engine, offset, length, ZeroMode::Punch).await;
            }
        }
        Ok(())
    }

    /// Has the next search, or the one after the search that is under way, begin
    /// no later than here.
    pub(super) fn note_free(&self, cluster: u64) {
        let mut state = self.lock();
        state.hint = state.hint.min(cluster);
        state.freed_since = state.freed_since.min(cluster);
    }

    /// Gives back what was raised ahead and not used. Nothing may be under way.
    /// Returns the length that the file needs, if it may be shortened.
    pub async fn give_back_all<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
    ) -> Result<Option<u64>> {
        let (mut run, mut unused, file_length) = {
            let mut state = self.lock();
            let mut unused = std::mem::take(&mut state.returned);
            unused.append(&mut state.abandoned);
            state.hint = 0;
            (std::mem::replace(&mut state.run, 0..0), unused, state.file_length)
        };
        let unused_tail = run.end << self.geometry.cluster_bits == file_length && !run.is_empty();
        let needed = run.start << self.geometry.cluster_bits;
        unused.sort_unstable_by(|a, b| b.cmp(a));
        let given_back = async {
            while let Some(cluster) = unused.last() {
                self.refcounts.lower(engine, storage, *cluster..cluster + 1).await?;
                unused.pop();
            }
            while !run.is_empty() {
                run.start += self.refcounts.lower_some(engine, storage, run.clone()).await?.count;
            }
            Ok(())
        }
        .await;
        // What an error leaves is given back the next time.
        let mut state = self.lock();
        state.returned.append(&mut unused);
        state.returned.extend(run);
        given_back.map(|()| unused_tail.then_some(needed))
    }
}
