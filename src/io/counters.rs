//! What a storage was asked to do, counted without threads getting in each
//! other's way.

use crate::here::here;
use crate::shard::{Count, Sharded};

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
    reads: Count,
    read_bytes: Count,
    writes: Count,
    write_bytes: Count,
    syncs: Count,
}

#[derive(Default, Debug)]
pub(super) struct Counters(Sharded<Shard>);

impl Counters {
    #[inline]
    pub(super) fn read(&self, bytes: usize) {
        let here = here();
        let shard = self.0.at(here);
        shard.reads.add(here, 1);
        shard.read_bytes.add(here, bytes as u64);
    }

    #[inline]
    pub(super) fn write(&self, bytes: usize) {
        let here = here();
        let shard = self.0.at(here);
        shard.writes.add(here, 1);
        shard.write_bytes.add(here, bytes as u64);
    }

    pub(super) fn sync(&self) {
        let here = here();
        self.0.at(here).syncs.add(here, 1);
    }

    pub(super) fn totals(&self) -> CounterTotals {
        let mut totals = CounterTotals::default();
        for shard in self.0.iter() {
            totals.reads += shard.reads.get();
            totals.read_bytes += shard.read_bytes.get();
            totals.writes += shard.writes.get();
            totals.write_bytes += shard.write_bytes.get();
            totals.syncs += shard.syncs.get();
        }
        totals
    }
}
