//! Writing: in place where the cluster is ours already, else by allocation.
//!
//! Data, and what has to be copied around it, is written before the L2 entry
//! says so, in one step that readers cannot see half of. What makes the entry
//! durable only after the data is `writeback`.

use super::claims::{Claim, Region};
use super::disk::{Disk, Layer, Raw};
use super::qcow2::{Lookup, Qcow2, Writing};
use crate::alloc::allocator::Allocation;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::l2::Cluster;
use crate::format::subcluster::{self, Mask, Subcluster};
use crate::geometry::{DataOffset, GuestCluster, GuestOffset, HostOffset};
use crate::io::engine::{Engine, Piece};

/// Longest part of a request that is handled in one go on the slow path.
const MAX_PART: u64 = 2 << 20;

/// A write on its way: data for neighbouring clusters of one L2 slice.
pub(super) struct Part<'a> {
    pub image: &'a Qcow2,
    pub writing: &'a Writing,
    pub table: HostOffset,
    pub offset: GuestOffset,
    pub data: Piece<'a>,
}

impl Part<'_> {
    /// The first cluster, and where the data begins in it.
    pub fn first(&self) -> (GuestCluster, u64) {
        let geometry = self.image.geometry();
        (geometry.guest_cluster(self.offset), geometry.in_cluster(self.offset.0))
    }

    pub fn end(&self) -> u64 {
        self.offset.0 + self.data.len() as u64
    }

    /// The bytes of its `index`th cluster that are written.
    pub fn bytes_in(&self, index: u64) -> std::ops::Range<u64> {
        let size = self.image.geometry().cluster_size();
        let (cluster, start) = self.first();
        let begin = if index == 0 { start } else { 0 };
        let cluster_start = (cluster.0 + index) * size;
        begin..(self.end() - cluster_start).min(size)
    }

    /// The subclusters of its `index`th cluster that are touched.
    pub fn mask_in(&self, index: u64) -> Mask {
        subcluster::mask(self.image.geometry().subcluster_range(self.bytes_in(index)))
    }

    pub fn clusters(&self) -> u64 {
        let geometry = self.image.geometry();
        geometry.clusters_for(self.first().1 + self.data.len() as u64)
    }

    fn region(&self) -> Region {
        let all = subcluster::all(self.image.geometry().subclusters());
        let all = if mutant!(WriteClaimsNothing) { 0 } else { all };
        let (first, _) = self.first();
        let count = self.clusters();
        Region { first, count, all, head: self.mask_in(0), tail: self.mask_in(count - 1) }
    }
}

/// What has to be done to write to a cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Everything that is touched is stored already.
    InPlace,
    /// A host cluster of our own is there; some subclusters are not stored yet.
    Fill(DataOffset),
    /// There is no host cluster.
    Allocate,
    /// The host cluster is shared, or the data is compressed: a new one takes
    /// over everything.
    Replace,
}

/// What host clusters hold before they are filled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ground {
    /// Anything.
    Used,
    /// They read as zero.
    Fresh,
    /// They read as zero, and an entry that points to them does no harm before that
    /// is changed.
    Zero,
}

impl Ground {
    fn of(image: &Qcow2, allocation: &Allocation<'_>) -> Ground {
        // Zeroes are no zeroes once they are decrypted.
        if image.is_encrypted() && !mutant!(EncryptedGroundTakenForZero) {
            return Ground::Used;
        }
        match (allocation.may_be_pointed_to(), allocation.is_fresh()) {
            (true, _) => Ground::Zero,
            (false, true) => Ground::Fresh,
            (false, false) => Ground::Used,
        }
    }
}

fn way(image: &Qcow2, guest: GuestCluster, cluster: &Cluster, mask: Mask) -> Way {
    match *cluster {
        // In a data file its place is its own from the beginning.
        Cluster::None { .. } => image.data_file_place(guest).map_or(Way::Allocate, Way::Fill),
        Cluster::Compressed(_) | Cluster::Standard { copied: false, .. } => Way::Replace,
        Cluster::Standard { alloc, .. } if alloc & mask == mask => Way::InPlace,
        Cluster::Standard { host, .. } => Way::Fill(host),
    }
}

impl Disk {
    /// Writes to the virtual disk. `data` may be zeroes that have to be written.
    pub async fn write<E: Engine>(
        &self,
        engine: &E,
        data: Piece<'_>,
        offset: u64,
        fua: bool,
    ) -> Result<()> {
        self.check_range(offset, data.len() as u64)?;
        self.record_unless(mutant!(BitmapMissesWrite), offset..offset + data.len() as u64);
        self.write_unrecorded(engine, data, offset, fua).await
    }

    /// As `write`, of what the guest sees already: bitmaps do not record it.
    pub async fn write_unrecorded<E: Engine>(
        &self,
        engine: &E,
        data: Piece<'_>,
        offset: u64,
        fua: bool,
    ) -> Result<()> {
        self.check_range(offset, data.len() as u64)?;
        self.requests.write(data.len() as u64);
        let written = match self.layers.first() {
            Some(Layer::Raw(raw)) => raw.write(engine, data, offset).await,
            _ => self.write_qcow2(engine, data, offset).await,
        };
        match written {
            Ok(()) if (fua && !mutant!(FuaIgnored)) || self.options.writethrough => {
                self.flush(engine).await
            }
            Ok(()) => Ok(()),
            Err(error) => Err(self.note_corruption(engine, error).await),
        }
    }

    pub(super) async fn write_qcow2<E: Engine>(
        &self,
        engine: &E,
        data: Piece<'_>,
        offset: u64,
    ) -> Result<()> {
        let Some(image) = self.top() else { return Ok(()) };
        let writing = image.writing()?;
        writing.allocator.health.check()?;
        let mut done = 0;
        while done < data.len() {
            let at = GuestOffset(offset + done as u64);
            let left = data.len() - done;
            let count = match self.write_in_place(engine, image, writing, &data, done, at).await? {
                0 => self.write_part(engine, image, writing, data.sub(done, left), at).await?,
                count => count,
            };
            done += count;
        }
        if !mutant!(WriteInPlaceNotSynced) {
            writing.mark_unsynced();
        }
        Ok(())
    }

    /// Writes as much as is allocated to us already; 0: nothing is.
    #[inline]
    async fn write_in_place<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        data: &Piece<'_>,
        done: usize,
        at: GuestOffset,
    ) -> Result<usize> {
        loop {
            let inside = (!mutant!(WriteOutsideEpoch)).then(|| writing.allocator.epochs.enter());
            let run = match image.lookup(at, (data.len() - done) as u64)? {
                Lookup::Run(run) => run,
                Lookup::Load(key) => {
                    drop(inside);
                    image.load_to_change(engine, key).await?;
                    continue;
                }
            };
            let (Subcluster::Normal, true, Some(host)) = (run.kind, run.copied, run.host) else {
                return Ok(0);
            };
            image.check_data(writing, host, run.len)?;
            let pieces = [data.sub(done, run.len as usize)];
            image.write_data(engine, &pieces, host.get(), at.0).await?;
            return Ok(run.len as usize);
        }
    }

    /// Writes the first part of what is not (all) allocated; returns how much.
    async fn write_part<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        data: Piece<'_>,
        offset: GuestOffset,
    ) -> Result<usize> {
        let geometry = image.geometry();
        let table = image
            .table_for_writing(engine, geometry.l1_index(geometry.guest_cluster(offset)))
            .await?;
        let (_, entry) = image.slice_of(table, geometry.guest_cluster(offset));
        let entries = (image.entries_per_slice() - entry) as u64;
        let room = entries.min((MAX_PART >> geometry.cluster_bits).max(1)) << geometry.cluster_bits;
        let len = (data.len() as u64).min(room - geometry.in_cluster(offset.0)) as usize;
        let mut part = Part { image, writing, table, offset, data: data.sub(0, len) };

        let mut claim = writing.claims.acquire(part.region()).await;
        let (first, _) = part.first();
        let cluster = image.entry(engine, table, first).await?;
        let way_of_first = way(image, first, &cluster, part.mask_in(0));
        match way_of_first {
            // Somebody else allocated it meanwhile.
            Way::InPlace => return Ok(0),
            Way::Replace => {
                drop(claim);
                let bytes = part.bytes_in(0);
                part.data = data.sub(0, (bytes.end - bytes.start) as usize);
                return self.replace(engine, &part).await;
            }
            Way::Allocate | Way::Fill(_) => {}
        }
        // How many clusters can be done alike, in one write?
        let mut count = 1;
        while count < part.clusters() {
            let guest = GuestCluster(first.0 + count);
            let next = image.entry(engine, table, guest).await?;
            let alike = match (way_of_first, way(image, guest, &next, part.mask_in(count))) {
                (Way::Allocate, Way::Allocate) => true,
                (Way::Fill(start), Way::Fill(host)) => {
                    start.checked_add(count << geometry.cluster_bits) == Some(host)
                }
                _ => false,
            };
            if !alike {
                break;
            }
            count += 1;
        }
        match way_of_first {
            Way::Fill(host) => {
                self.shrink(&mut part, &mut claim, count);
                self.fill(engine, &part, host, Ground::Used).await?;
            }
            _ => {
                let allocation = image.allocate(engine, count).await?;
                self.shrink(&mut part, &mut claim, allocation.count());
                self.write_allocated(engine, &part, allocation).await?;
            }
        }
        Ok(part.data.len())
    }

    fn shrink(&self, part: &mut Part<'_>, claim: &mut Claim<'_>, clusters: u64) {
        claim.shrink(clusters);
        let room = clusters * part.image.geometry().cluster_size() - part.first().1;
        let len = part.data.len().min(room as usize);
        part.data = part.data.sub(0, len);
    }

    /// Writes to clusters that had no host cluster.
    async fn write_allocated<E: Engine>(
        &self,
        engine: &E,
        part: &Part<'_>,
        allocation: Allocation<'_>,
    ) -> Result<()> {
        let image = part.image;
        let geometry = image.geometry();
        let host: DataOffset = allocation.start()?.into();
        let ground = Ground::of(image, &allocation);
        if !geometry.extended_l2 {
            let written = self.fill(engine, part, host, ground).await;
            return keep_or_give_back(allocation, written);
        }
        // The host clusters are entered first, with no subcluster allocated: who
        // writes to other subclusters of them need not wait for our data.
        let mut taken = fallible::filled(part.clusters() as usize, false)?;
        let entered = image
            .change(engine, part.table, part.first().0, part.clusters(), |index, cluster| {
                match cluster {
                    Cluster::None { zero } => {
                        let host = host.checked_add(index << geometry.cluster_bits)?;
                        taken[index as usize] = true;
                        let early = mutant!(AllocatedBeforeData);
                        let alloc = if early { part.mask_in(index) } else { 0 };
                        Some(Cluster::Standard { host, copied: true, alloc, zero: zero & !alloc })
                    }
                    // Somebody else was faster, for other subclusters.
                    Cluster::Standard { .. } | Cluster::Compressed(_) => None,
                }
            })
            .await;
        if entered.is_err() || !taken.contains(&true) {
            allocation.give_back();
            entered?;
            // Somebody else has entered one.
            let host = match image.entry(engine, part.table, part.first().0).await? {
                Cluster::Standard { host, copied: true, .. } => host,
                _ => return Err(changed_under_claim()),
            };
            return match part.clusters() {
                1 => self.fill(engine, part, host, Ground::Used).await,
                _ => self.fill_each(engine, part).await,
            };
        }
        let all_taken = !taken.contains(&false);
        allocation.keep_only(|index| taken.get(index as usize).is_some_and(|taken| *taken));
        if all_taken {
            return self.fill(engine, part, host, ground).await;
        }
        self.fill_each(engine, part).await
    }

    /// Fills clusters that lie anywhere, one by one. (Rare: two requests raced for
    /// the host clusters of one range.)
    async fn fill_each<E: Engine>(&self, engine: &E, part: &Part<'_>) -> Result<()> {
        let size = part.image.geometry().cluster_size();
        let mut done = 0;
        for index in 0..part.clusters() {
            let cluster = GuestCluster(part.first().0.0 + index);
            let Cluster::Standard { host, copied: true, .. } =
                part.image.entry(engine, part.table, cluster).await?
            else {
                return Err(changed_under_claim());
            };
            let bytes = part.bytes_in(index);
            let len = (bytes.end - bytes.start) as usize;
            let one = Part {
                offset: GuestOffset(cluster.0 * size + bytes.start),
                data: part.data.sub(done, len),
                ..*part
            };
            self.fill(engine, &one, host, Ground::Used).await?;
            done += len;
        }
        Ok(())
    }

    /// Writes the data of a part, and what has to be copied at its edges, to host
    /// clusters of our own that begin at `host`; then says so in the entries.
    pub(super) async fn fill<E: Engine>(
        &self,
        engine: &E,
        part: &Part<'_>,
        host: DataOffset,
        ground: Ground,
    ) -> Result<()> {
        let geometry = part.image.geometry();
        let (first, start) = part.first();
        let edges = self.edges(engine, part, ground != Ground::Used).await?;
        // A power loss that spares the entry and not the data leaves what was there.
        let harmless = ground == Ground::Zero
            && edges.head.is_none()
            && edges.tail.is_none()
            && self.is_known_zero(part.offset.0..part.end());
        let at = host.get() + start - edges.head.as_ref().map_or(0, Piece::len) as u64;
        let data = part.data.clone();
        let place = DataOffset::in_data_file(at);
        part.image.check_data(part.writing, place, edges.bytes(&data))?;
        let guest = part.offset.0 - edges.head.as_ref().map_or(0, Piece::len) as u64;
        let image = part.image;
        match (edges.head, edges.tail) {
            (None, None) => image.write_data(engine, &[data], at, guest).await?,
            (Some(head), None) => image.write_data(engine, &[head, data], at, guest).await?,
            (None, Some(tail)) => image.write_data(engine, &[data, tail], at, guest).await?,
            (Some(head), Some(tail)) => {
                image.write_data(engine, &[head, data, tail], at, guest).await?;
            }
        }
        if !harmless {
            part.writing.allocator.need_order();
        }
        let mut unexpected = false;
        part.image
            .change(engine, part.table, first, part.clusters(), |index, cluster| {
                let mask = part.mask_in(index);
                let expected = host.checked_add(index << geometry.cluster_bits)?;
                let (alloc, zero) = match cluster {
                    Cluster::None { zero } => (0, zero),
                    Cluster::Standard { alloc, zero, host, copied: true } if host == expected => {
                        (alloc, zero)
                    }
                    Cluster::Standard { .. } | Cluster::Compressed(_) => {
                        unexpected = true;
                        return None;
                    }
                };
                let (alloc, zero) = (alloc | mask, zero & !mask);
                Some(Cluster::Standard { host: expected, copied: true, alloc, zero })
            })
            .await?;
        // Only a storage that returns other bytes than were written gets here.
        if unexpected { Err(changed_under_claim()) } else { Ok(()) }
    }
}

#[cold]
fn changed_under_claim() -> Error {
    Error::corrupt("an L2 entry is not what it was a moment ago: the storage is not reliable")
}

/// Keeps an allocation that was used, gives back one whose use failed.
pub(super) fn keep_or_give_back(allocation: Allocation<'_>, used: Result<()>) -> Result<()> {
    match used {
        Ok(()) => allocation.keep(),
        Err(_) if mutant!(FailedWriteKeepsCluster) => allocation.keep(),
        Err(_) => allocation.give_back(),
    }
    used
}

impl Raw {
    async fn write<E: Engine>(&self, engine: &E, data: Piece<'_>, offset: u64) -> Result<()> {
        self.check_writable()?;
        self.storage.write(engine, &[data], offset).await
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.storage.access().writable {
            return self.health.check();
        }
        Err(Error::new(ErrorKind::ReadOnly, format!("{} is open read-only", self.storage.name())))
    }
}
