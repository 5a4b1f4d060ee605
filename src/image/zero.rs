//! Making ranges read as zero, subcluster by subcluster: by the L2 entry where
//! the format can say it, by writing zero bytes at the edges where it cannot.

use std::ops::Range;

use super::claims::Region;
use super::disk::{Disk, Layer, Raw};
use super::qcow2::{Qcow2, Writing};
use crate::error::{Error, ErrorKind, Result};
use crate::format::l2::Cluster;
use crate::format::subcluster::{self, Mask, Subcluster};
use crate::geometry::{GuestCluster, GuestOffset};
use crate::io::engine::{Engine, Piece, ZeroMode};

/// Flags of a zero write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Durable on completion.
    pub fua: bool,
    /// May deallocate.
    pub may_unmap: bool,
    /// `NotSupported` rather than writing zero bytes.
    pub no_fallback: bool,
}

/// What to do about a piece of a range that the entries cannot express.
fn no_fallback(offset: u64) -> Error {
    Error::new(
        ErrorKind::NotSupported,
        format!("the zeroes at guest offset {offset:#x} would have to be written as data"),
    )
}

impl Disk {
    /// Makes a range read as zero.
    pub async fn write_zeroes<E: Engine>(
        &self,
        engine: &E,
        offset: u64,
        length: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        self.check_range(offset, length)?;
        self.requests.write(length);
        let range = offset..offset + length;
        self.record_unless(mutant!(BitmapMissesZeroes), range.clone());
        let done = match self.layers.first() {
            Some(Layer::Raw(raw)) => raw.write_zeroes(engine, range, flags).await,
            _ => self.zero_qcow2(engine, range, flags).await,
        };
        match done {
            Ok(()) if (flags.fua && !mutant!(FuaIgnored)) || self.options.writethrough => {
                self.flush(engine).await
            }
            Ok(()) => Ok(()),
            Err(error) => Err(self.note_corruption(engine, error).await),
        }
    }

    async fn zero_qcow2<E: Engine>(
        &self,
        engine: &E,
        range: Range<u64>,
        flags: ZeroFlags,
    ) -> Result<()> {
        let Some(image) = self.top() else { return Ok(()) };
        let writing = image.writing()?;
        writing.allocator.health.check()?;
        let geometry = image.geometry();
        let version_2 = image.format.version < 3;
        if version_2 && image.has_backing() {
            // Nothing in this version can hide the backing file but data.
            return self.write_zero_bytes(engine, range, flags).await;
        }
        let size = geometry.cluster_size();
        let mut at = range.start;
        while at < range.end {
            image.bound_limbo(engine).await?;
            let first = geometry.guest_cluster(GuestOffset(at));
            let start = geometry.guest_start(first).0;
            let whole = self.whole_clusters(image, first, range.end);
            if at == start && whole > 0 {
                if version_2 {
                    self.discard_clusters(engine, image, writing, first, whole).await?;
                } else {
                    self.zero_clusters(engine, image, writing, first, whole, flags).await?;
                }
                at = (start + whole * size).min(range.end);
                continue;
            }
            let end = range.end.min(start + size);
            if !version_2 {
                self.zero_in_cluster(engine, image, writing, at..end, flags).await?;
            } else if !self.is_zero(engine, at..end).await? {
                self.write_zero_bytes(engine, at..end, flags).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// How many clusters from `first` on, in one L2 slice, end before `end`. The
    /// last cluster of the disk ends where the disk does.
    pub(super) fn whole_clusters(&self, image: &Qcow2, first: GuestCluster, end: u64) -> u64 {
        let geometry = image.geometry();
        let last = match end == image.size {
            true => geometry.clusters_for(end),
            false => end >> geometry.cluster_bits,
        };
        let per_slice = image.entries_per_slice() as u64;
        (last - first.0.min(last)).min(per_slice - first.0 % per_slice)
    }

    /// Whole clusters of one slice.
    async fn zero_clusters<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        first: GuestCluster,
        count: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        let all = subcluster::all(image.geometry().subclusters());
        let table = image.table_for_writing(engine, image.geometry().l1_index(first)).await?;
        let claimed = if mutant!(ZeroClaimsNothing) { 0 } else { all };
        let _claim = writing.claims.acquire(Region::whole(first, count, claimed)).await;
        let mut freed = Vec::new();
        let raw = image.is_raw_data();
        if raw {
            let size = image.geometry().cluster_size();
            let bytes = first.0 * size..(first.0 + count) * size;
            image.zero_raw(engine, writing, bytes, flags.may_unmap).await?;
        }
        image
            .change(engine, table, first, count, |_, cluster| {
                Some(match cluster {
                    Cluster::None { .. } if mutant!(ZeroShowsBacking) => cluster,
                    Cluster::None { .. } => Cluster::None { zero: all },
                    Cluster::Standard { host, copied, alloc, .. } if raw => {
                        Cluster::Standard { host, copied, alloc, zero: all & !alloc }
                    }
                    Cluster::Standard { host, copied, .. } if !flags.may_unmap => {
                        Cluster::Standard { host, copied, alloc: 0, zero: all }
                    }
                    Cluster::Standard { .. } | Cluster::Compressed(_) => {
                        freed.push(cluster);
                        Cluster::None { zero: all }
                    }
                })
            })
            .await?;
        image.free(engine, writing, &freed).await
    }

    /// A part of one cluster.
    async fn zero_in_cluster<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        bytes: Range<u64>,
        flags: ZeroFlags,
    ) -> Result<()> {
        let geometry = image.geometry();
        let cluster = geometry.guest_cluster(GuestOffset(bytes.start));
        let base = geometry.guest_start(cluster).0;
        let all = subcluster::all(geometry.subclusters());
        let touched = geometry.subcluster_range(bytes.start - base..bytes.end - base);
        let mask = subcluster::mask(touched.clone());
        let table = image.table_for_writing(engine, geometry.l1_index(cluster)).await?;
        let claim = writing
            .claims
            .acquire(Region { first: cluster, count: 1, all, head: mask, tail: mask })
            .await;
        let old = image.entry(engine, table, cluster).await?;
        if let Cluster::Compressed(_) = old {
            drop(claim);
            return self.write_zero_bytes(engine, bytes, flags).await;
        }
        // A subcluster that is touched in part can be zero as a whole if the rest
        // of it is; else its part is written.
        let sub = geometry.subcluster_size();
        let mut zero: Mask = mask;
        let mut data: Vec<Range<u64>> = Vec::new();
        let edges = [touched.start, touched.end - 1];
        let edges = if edges[0] == edges[1] { &edges[..1] } else { &edges[..] };
        for &index in edges {
            let whole = base + u64::from(index) * sub..base + u64::from(index + 1) * sub;
            let part = whole.start.max(bytes.start)..whole.end.min(bytes.end);
            let disk_end = whole.end.min(image.size.max(part.end));
            if part.start == whole.start && part.end == disk_end {
                continue;
            }
            let stored = old.subcluster(index) == Subcluster::Normal;
            let rest = [whole.start..part.start, part.end..disk_end];
            let mut rest_is_zero = !stored;
            for piece in rest {
                rest_is_zero = rest_is_zero && self.is_zero(engine, piece).await?;
            }
            if !rest_is_zero {
                zero &= !subcluster::mask(index..index + 1);
                data.push(part);
            }
        }
        if let (true, Some(part)) = (flags.no_fallback, data.first()) {
            return Err(no_fallback(part.start));
        }
        let raw = image.is_raw_data();
        if raw {
            for run in subcluster::runs(zero) {
                let bytes = base + u64::from(run.start) * sub..base + u64::from(run.end) * sub;
                image.zero_raw(engine, writing, bytes, flags.may_unmap).await?;
            }
        }
        let mut punch = None;
        image
            .change(engine, table, cluster, 1, |_, cluster| {
                Some(match cluster {
                    Cluster::None { zero: old } => Cluster::None { zero: old | zero },
                    Cluster::Standard { host, copied, alloc, zero: old } if raw => {
                        let zero = old | zero & !alloc;
                        Cluster::Standard { host, copied, alloc, zero }
                    }
                    Cluster::Standard { host, copied, alloc, zero: old } => {
                        if copied && alloc & zero != 0 {
                            punch = Some((host, alloc & zero));
                        }
                        let (alloc, zero) = (alloc & !zero, old | zero);
                        Cluster::Standard { host, copied, alloc, zero }
                    }
                    Cluster::Compressed(_) => cluster,
                })
            })
            .await?;
        if let (true, Some((host, gone))) = (flags.may_unmap, punch) {
            image.punch_subclusters(engine, writing, host, gone).await;
        }
        drop(claim);
        for part in data {
            self.write_zero_bytes(engine, part, flags).await?;
        }
        Ok(())
    }

    async fn write_zero_bytes<E: Engine>(
        &self,
        engine: &E,
        range: Range<u64>,
        flags: ZeroFlags,
    ) -> Result<()> {
        if flags.no_fallback {
            return Err(no_fallback(range.start));
        }
        let mut at = range.start;
        while at < range.end {
            // In pieces whose length any platform can express.
            let len = (range.end - at).min(1 << 30);
            self.write_qcow2(engine, Piece::Zeroes(len as usize), at).await?;
            at += len;
        }
        Ok(())
    }
}

impl Raw {
    async fn write_zeroes<E: Engine>(
        &self,
        engine: &E,
        range: Range<u64>,
        flags: ZeroFlags,
    ) -> Result<()> {
        self.check_writable()?;
        let mode = if flags.may_unmap { ZeroMode::Punch } else { ZeroMode::Keep };
        let length = range.end - range.start;
        match self.storage.zero(engine, range.start, length, mode).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                if flags.no_fallback {
                    return Err(no_fallback(range.start));
                }
                let mut at = range.start;
                while at < range.end {
                    let len = (range.end - at).min(1 << 30);
                    self.storage.write(engine, &[Piece::Zeroes(len as usize)], at).await?;
                    at += len;
                }
                Ok(())
            }
            other => other,
        }
    }
}
