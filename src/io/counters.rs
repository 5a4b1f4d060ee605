//! What a storage was asked to do, counted without threads getting in each
//! other's way.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::shard::Sharded;

/// Operations and bytes that reached a storage, those that alignment costs
/// included.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct CounterTotals {
    /// Reads.
    pub reads: u64,
    /// Bytes asked for by reads.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes of those writes.
    pub write_bytes: u64,
    /// Syncs.
    pub syncs: u64,
}

#[derive(Default, Debug)]
struct Shard {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    syncs: AtomicU64,
}

#[derive(Default, Debug)]
pub(super) struct Counters(Sharded<Shard>);

impl Counters {
    #[inline]
    pub(super) fn read(&self, bytes: usize) {
        let shard = self.0.local();
        shard.reads.fetch_add(1, Relaxed);
        shard.read_bytes.fetch_add(bytes as u64, Relaxed);
    }

    #[inline]
    pub(super) fn write(&self, bytes: usize) {
        let shard = self.0.local();
        shard.writes.fetch_add(1, Relaxed);
        shard.write_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn sync(&self) {
        self.0.local().syncs.fetch_add(1, Relaxed);
    }

    pub(super) fn totals(&self) -> CounterTotals {
        let mut totals = CounterTotals::default();
        for shard in self.0.iter() {
            totals.reads += shard.reads.load(Relaxed);
            totals.read_bytes += shard.read_bytes.load(Relaxed);
            totals.writes += shard.writes.load(Relaxed);
            totals.write_bytes += shard.write_bytes.load(Relaxed);
            totals.syncs += shard.syncs.load(Relaxed);
        }
        totals
    }
}
