//! Packs the bytes of compressed clusters into host clusters, one behind the other.
//!
//! The host cluster that is being filled (the open one) has one reference more than
//! there are compressed clusters in it. As long as it has that one it cannot become
//! free, be given to other data, and be packed into all the same. When it is full,
//! that reference goes to limbo, where it is lowered in its turn, or to the last
//! compressed cluster in it. After a crash it is a leak.
//!
//! No byte of a host cluster is given out twice in one life of it.

use std::ops::Range;

use super::allocator::{Allocation, Allocator};
use crate::error::Result;
use crate::io::engine::Engine;
use crate::io::storage::Storage;

/// The host cluster that is being filled.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    cluster: u64,
    /// Bytes given out.
    used: u64,
}

/// Room for the bytes of one compressed cluster, and a reference to each host cluster
/// that they touch. Whoever gets it must `keep` it when an entry points there, or
/// `give_back`; if neither happens (a cancelled request) the references stay until
/// the image is closed.
pub struct Packed<'a> {
    allocator: &'a Allocator,
    offset: u64,
    clusters: Range<u64>,
}

impl Packed<'_> {
    /// Where the bytes go in the image file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// An entry points there now.
    pub fn keep(mut self) {
        self.clusters = 0..0;
    }

    /// No entry points there, and nothing is under way.
    pub fn give_back(mut self) {
        self.allocator.limbo.announce(std::mem::replace(&mut self.clusters, 0..0));
    }
}

impl Drop for Packed<'_> {
    fn drop(&mut self) {
        if !self.clusters.is_empty() {
            self.allocator.lock().abandoned.extend(self.clusters.clone());
        }
    }
}

impl Allocator {
    /// Room for `len` bytes in the open cluster; `None`: they do not fit.
    pub async fn pack_open<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        open: &mut Option<Open>,
        len: u64,
    ) -> Result<Option<Packed<'_>>> {
        let size = self.geometry.cluster_size();
        let Some(Open { cluster, used }) = *open else { return Ok(None) };
        if len > size - used {
            return Ok(None);
        }
        let counted = self.raise(engine, storage, cluster).await?;
        *open = Some(Open { cluster, used: used + len });
        if !counted {
            // No more can be counted: ours is for this one, the last.
            *open = None;
        } else if used + len == size {
            self.stop_filling(open);
        }
        let offset = (cluster << self.geometry.cluster_bits) + used;
        Ok(Some(Packed { allocator: self, offset, clusters: cluster..cluster + 1 }))
    }

    /// Room for `len` bytes, which do not fit into the open cluster, in a new one: from
    /// the end of the open one on where the two are neighbours.
    pub async fn pack_new<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        open: &mut Option<Open>,
        allocation: Allocation<'_>,
        len: u64,
    ) -> Result<Packed<'_>> {
        let start = allocation.start()?.get();
        let cluster = start >> self.geometry.cluster_bits;
        let neighbour = open.filter(|open| open.cluster + 1 == cluster);
        let before =
            neighbour.map_or(0, |open| self.geometry.cluster_size().saturating_sub(open.used));
        let counted = match self.raise(engine, storage, cluster).await {
            Ok(counted) => counted,
            Err(error) => {
                allocation.give_back();
                return Err(error);
            }
        };
        allocation.keep();
        let first = match neighbour {
            // What lies in both takes over our reference to the first.
            Some(open) => open.cluster,
            None => {
                self.stop_filling(open);
                cluster
            }
        };
        let used = len.saturating_sub(before);
        *open = counted.then_some(Open { cluster, used });
        mutant!(PackedIntoFreed => self.limbo.announce(cluster..cluster + 1));
        Ok(Packed { allocator: self, offset: start - before, clusters: first..cluster + 1 })
    }

    /// Nothing more goes into the open cluster.
    pub fn stop_filling(&self, open: &mut Option<Open>) {
        if let Some(Open { cluster, .. }) = open.take() {
            mutant!(PackedIntoFreed => return);
            self.limbo.announce(cluster..cluster + 1);
        }
    }

    /// Whether one more reference could be counted.
    async fn raise<E: Engine>(&self, engine: &E, storage: &Storage, cluster: u64) -> Result<bool> {
        mutant!(PackedNotCounted => return Ok(true));
        self.refcounts.raise(engine, storage, cluster).await
    }
}
