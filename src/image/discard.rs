//! Giving ranges up, subcluster by subcluster.
//!
//! A subcluster that is given up reads as zero from then on; its bytes are
//! punched out of the file, and a cluster whose last subcluster goes is freed.
//! What was not stored here stays as it was, but for whole clusters over a
//! backing file: those become zero, as QEMU leaves them.

use std::ops::Range;

use super::claims::Region;
use super::disk::{Disk, Layer};
use super::qcow2::{Qcow2, Writing};
use crate::alloc::limbo::Limbo;
use crate::error::{ErrorKind, Result};
use crate::format::l2::Cluster;
use crate::format::subcluster::{self, Mask, Subcluster};
use crate::geometry::{DataOffset, GuestCluster, GuestOffset};
use crate::io::engine::{Engine, ZeroMode};

/// File systems give space back in blocks of this many bytes.
const HOST_BLOCK: u64 = 4096;

impl Disk {
    /// Gives a range up: a hint. Afterwards each part of it reads as the old data
    /// or as zero (or, in a version 2 image with a backing file, as that).
    pub async fn discard<E: Engine>(&self, engine: &E, offset: u64, length: u64) -> Result<()> {
        self.check_range(offset, length)?;
        let range = offset..offset + length;
        self.record_unless(mutant!(BitmapMissesDiscard), range.clone());
        let done = match self.layers.first() {
            Some(Layer::Raw(raw)) => {
                raw.check_writable()?;
                match raw.storage.zero(engine, offset, length, ZeroMode::Punch).await {
                    Err(error) if error.kind() == ErrorKind::NotSupported => Ok(()),
                    other => other,
                }
            }
            _ => self.discard_qcow2(engine, range).await,
        };
        match done {
            Ok(()) if self.options.writethrough => self.flush(engine).await,
            Ok(()) => Ok(()),
            Err(error) => Err(self.note_corruption(engine, error).await),
        }
    }

    async fn discard_qcow2<E: Engine>(&self, engine: &E, range: Range<u64>) -> Result<()> {
        let Some(image) = self.top() else { return Ok(()) };
        let writing = image.writing()?;
        writing.allocator.health.check()?;
        if image.format.version < 3 && image.has_backing() {
            // Freeing would show the backing file's old data: keep ours.
            return Ok(());
        }
        if !image.can_discard(writing) {
            return Ok(());
        }
        let geometry = image.geometry();
        let size = geometry.cluster_size();
        let mut at = range.start;
        while at < range.end {
            image.bound_limbo(engine).await?;
            let first = geometry.guest_cluster(GuestOffset(at));
            let start = geometry.guest_start(first).0;
            if self.nothing_to_discard(image, first) {
                at = (start / geometry.l2_coverage() + 1) * geometry.l2_coverage();
                continue;
            }
            let whole = self.whole_clusters(image, first, range.end);
            if at == start && whole > 0 {
                self.discard_clusters(engine, image, writing, first, whole).await?;
                at = start + whole * size;
                continue;
            }
            let end = range.end.min(start + size);
            if geometry.extended_l2 {
                self.discard_in_cluster(engine, image, writing, at..end).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// Without an L2 table and without a backing file there is nothing stored and
    /// nothing to hide.
    fn nothing_to_discard(&self, image: &Qcow2, cluster: GuestCluster) -> bool {
        let l1_entry = image.l1.get(image.geometry().l1_index(cluster));
        !image.has_backing() && matches!(image.table_of(l1_entry), Ok(None))
    }

    /// Whole clusters of one slice.
    pub(super) async fn discard_clusters<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        first: GuestCluster,
        count: u64,
    ) -> Result<()> {
        if self.nothing_to_discard(image, first) {
            return Ok(());
        }
        let all = subcluster::all(image.geometry().subclusters());
        let zero = if image.format.version >= 3 { all } else { 0 };
        let zero = if mutant!(DiscardShowsBacking) { 0 } else { zero };
        let all = if mutant!(DiscardClaimsNothing) { 0 } else { all };
        let has_backing = image.has_backing();
        let table = image.table_for_writing(engine, image.geometry().l1_index(first)).await?;
        let _claim = writing.claims.acquire(Region::whole(first, count, all)).await;
        if image.is_raw_data() {
            let size = image.geometry().cluster_size();
            let bytes = first.0 * size..(first.0 + count) * size;
            return image.zero_raw(engine, writing, bytes, true).await;
        }
        let mut freed = Vec::new();
        let mut kept = Vec::new();
        image
            .change(engine, table, first, count, |_, cluster| match cluster {
                Cluster::None { .. } => has_backing.then_some(Cluster::None { zero }),
                Cluster::Standard { host, copied: true, alloc, .. }
                    if writing.discard_keeps && image.format.version >= 3 =>
                {
                    kept.push((host, alloc));
                    Some(Cluster::Standard { host, copied: true, alloc: 0, zero })
                }
                Cluster::Standard { .. } | Cluster::Compressed(_) => {
                    freed.push(cluster);
                    Some(Cluster::None { zero })
                }
            })
            .await?;
        // First what would be lost if this were given up.
        image.free(engine, writing, &freed).await?;
        for (host, alloc) in kept {
            image.punch_subclusters(engine, writing, host, alloc).await;
        }
        Ok(())
    }

    /// The subclusters of one cluster that a range covers.
    async fn discard_in_cluster<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        bytes: Range<u64>,
    ) -> Result<()> {
        let geometry = image.geometry();
        let cluster = geometry.guest_cluster(GuestOffset(bytes.start));
        let base = geometry.guest_start(cluster).0;
        let sub = geometry.subcluster_size();
        let all = subcluster::all(geometry.subclusters());
        // The disk's last subcluster ends where the disk does.
        let end = if bytes.end == image.size { bytes.end.div_ceil(sub) * sub } else { bytes.end };
        let covered = (bytes.start - base).div_ceil(sub)..(end - base) / sub;
        if covered.start >= covered.end {
            return Ok(());
        }
        let wanted = subcluster::mask(covered.start as u32..covered.end as u32);
        let l1_index = geometry.l1_index(cluster);
        if image.table_of(image.l1.get(l1_index))?.is_none() {
            return Ok(());
        }
        let table = image.table_for_writing(engine, l1_index).await?;
        // The whole cluster: neighbours may be punched too, or the cluster freed.
        let region = if mutant!(SubclusterDiscardClaimsNothing) { 0 } else { all };
        let _claim = writing.claims.acquire(Region::whole(cluster, 1, region)).await;
        if image.is_raw_data() {
            let old = image.entry(engine, table, cluster).await?;
            let stored = (0..geometry.subclusters())
                .filter(|index| old.subcluster(*index) == Subcluster::Normal)
                .fold(0, |stored, index| stored | subcluster::mask(index..index + 1));
            for run in subcluster::runs(stored & wanted) {
                let bytes = base + u64::from(run.start) * sub..base + u64::from(run.end) * sub;
                image.zero_raw(engine, writing, bytes, true).await?;
            }
            return Ok(());
        }
        let mut freed = Vec::new();
        let mut punch = None;
        image
            .change(engine, table, cluster, 1, |_, old| {
                let Cluster::Standard { host, copied, alloc, zero } = old else { return None };
                let gone = alloc & wanted;
                if gone == 0 {
                    return None;
                }
                let (alloc, zero) = (alloc & !gone, zero | gone);
                if alloc == 0 && !writing.discard_keeps {
                    freed.push(old);
                    return Some(Cluster::None { zero });
                }
                if copied {
                    punch = Some((host, widen(gone, !alloc & all)));
                }
                Some(Cluster::Standard { host, copied, alloc, zero })
            })
            .await?;
        if let Some((host, gone)) = punch {
            image.punch_subclusters(engine, writing, host, gone).await;
        }
        image.free(engine, writing, &freed).await
    }
}

/// Extends each run of `set` over its neighbours in `free`: small subclusters
/// fill a block of the host's file system only together.
fn widen(set: Mask, free: Mask) -> Mask {
    subcluster::runs(free)
        .filter(|run| subcluster::mask(run.clone()) & set != 0)
        .fold(0, |wide, run| wide | subcluster::mask(run))
}

impl Qcow2 {
    /// Gives up the bytes of subclusters that are not stored any more. A hint: it
    /// does not matter whether it works.
    pub(super) async fn punch_subclusters<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
        host: DataOffset,
        set: Mask,
    ) {
        let sub = self.geometry().subcluster_size();
        for run in subcluster::runs(set) {
            let start = host.get() + u64::from(run.start) * sub;
            let end = host.get() + u64::from(run.end) * sub;
            let blocks = start.div_ceil(HOST_BLOCK) * HOST_BLOCK..end / HOST_BLOCK * HOST_BLOCK;
            mutant!(HoleRoundedOut => {
                let blocks = start / HOST_BLOCK * HOST_BLOCK..end.next_multiple_of(HOST_BLOCK);
                self.punch(engine, writing, blocks).await;
            });
            if blocks.start < blocks.end {
                self.punch(engine, writing, blocks).await;
            }
        }
    }

    /// Makes a hole where guest data was. Not where it was encrypted: a hole reads as
    /// anything once it is decrypted, and until the next flush a crash brings the old
    /// entry back. (Whole clusters get theirs later; see `Allocator::late_holes`.)
    pub(super) async fn punch<E: Engine>(&self, engine: &E, writing: &Writing, bytes: Range<u64>) {
        if self.is_encrypted() && !mutant!(EncryptedPunchedEarly) {
            return;
        }
        let length = bytes.end - bytes.start;
        let overlap = &writing.allocator.overlap;
        let own = self.format.data_file || overlap.may_punch(bytes.start, length);
        if length > 0 && writing.punch && own && self.data().can_punch() {
            // Not a discard, which may leave anything: until the next flush a crash
            // brings the old entry back.
            let _ = self.data().zero(engine, bytes.start, length, ZeroMode::Punch).await;
        }
    }

    /// Frees what these entries pointed to. The entries are changed already; the
    /// caller still claims the guest clusters. Only when the holes are punched do
    /// the clusters go on their way to reuse.
    pub(super) async fn free<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
        clusters: &[Cluster],
    ) -> Result<()> {
        if self.format.data_file {
            self.punch_data_file(engine, writing, clusters).await;
            return Ok(());
        }
        let geometry = self.geometry();
        let mut own: Vec<Range<u64>> = Vec::new();
        for cluster in clusters {
            match *cluster {
                Cluster::Standard { host, copied, .. } => {
                    let copied = copied || mutant!(SharedPunched);
                    let number = geometry.host_cluster(host).0;
                    match own.last_mut() {
                        Some(last) if copied && last.end == number => last.end += 1,
                        _ if copied => own.push(number..number + 1),
                        // A snapshot still has it: not ours to punch.
                        _ => writing.allocator.limbo.announce(number..number + 1),
                    }
                }
                Cluster::Compressed(data) => {
                    let touched = data.host_clusters(geometry);
                    writing.allocator.limbo.announce(*touched.start()..*touched.end() + 1);
                }
                Cluster::None { .. } => {}
            }
        }
        let mut leaving = Leaving { limbo: &writing.allocator.limbo, clusters: own };
        while let Some(range) = leaving.clusters.last().cloned() {
            let size = geometry.cluster_size();
            mutant!(LatePunch => leaving.limbo.announce(leaving.clusters.pop().unwrap_or(0..0)));
            self.punch(engine, writing, range.start * size..range.end * size).await;
            mutant!(LatePunch => continue);
            leaving.clusters.pop();
            leaving.limbo.announce(range);
        }
        Ok(())
    }
}

/// Clusters that nothing points to any more. They go on their way to reuse also
/// if the request is given up before all holes are punched.
struct Leaving<'a> {
    limbo: &'a Limbo,
    clusters: Vec<Range<u64>>,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        for range in self.clusters.drain(..) {
            self.limbo.announce(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_widen_over_what_is_free_next_to_them() {
        assert_eq!(widen(0b0000_0100, 0b0011_1110), 0b0011_1110);
        assert_eq!(widen(0b0000_0100, 0b1100_0100), 0b0000_0100);
        assert_eq!(widen(0, u32::MAX), 0);
    }
}
