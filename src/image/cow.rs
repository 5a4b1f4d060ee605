//! Copying what a write does not cover.
//!
//! A write that covers whole subclusters copies nothing. Else the rest of the
//! first and the last subcluster is taken from what a reader sees there now: the
//! backing chain, zeroes, or an older place of the same data.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::claims::Region;
use super::disk::Disk;
use super::write::{Part, keep_or_give_back};
use crate::error::Result;
use crate::format::l2::Cluster;
use crate::format::subcluster::{self, Subcluster};
use crate::geometry::{DataOffset, GuestOffset};
use crate::io::engine::{Engine, Piece, Target};
use crate::sys::memory::{Block, BlockSlice};

/// What is written around the data of a part.
pub(super) struct Edges<'a> {
    pub head: Option<Piece<'a>>,
    pub tail: Option<Piece<'a>>,
}

/// What becomes of a range beside the data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Edge {
    /// Nothing.
    Left,
    /// It is zero.
    Zero,
    /// Old bytes are copied there.
    Copied,
}

/// One read for both edges costs less than two, even if it reads this much more.
const READ_ACROSS: usize = 16 << 10;

impl Edges<'_> {
    /// Length of the whole write.
    pub fn bytes(&self, data: &Piece<'_>) -> u64 {
        [self.head.as_ref(), Some(data), self.tail.as_ref()]
            .into_iter()
            .flatten()
            .map(|piece| piece.len() as u64)
            .sum()
    }
}

impl Disk {
    /// What has to be written before and behind the data, so that each subcluster
    /// that becomes allocated is whole. `fresh`: the host clusters read as zero.
    pub(super) async fn edges<'a, E: Engine>(
        &self,
        engine: &E,
        part: &Part<'_>,
        fresh: bool,
    ) -> Result<Edges<'a>> {
        let sub = part.image.geometry().subcluster_size();
        let head = part.offset.0 & !(sub - 1)..part.offset.0;
        let tail = part.end()..part.image.last_byte_to_store(part.end().div_ceil(sub) * sub);
        let head_is = self.edge(engine, part, head.clone()).await?;
        let tail_is = self.edge(engine, part, tail.clone()).await?;
        if (head_is, tail_is) == (Edge::Copied, Edge::Copied) && part.data.len() <= READ_ACROSS {
            let (len, behind) =
                ((tail.end - head.start) as usize, (tail.start - head.start) as usize);
            let block = self.read_old(engine, head.start..tail.end).await?;
            self.note_copied(part, head.clone());
            self.note_copied(part, tail.clone());
            return Ok(Edges {
                head: Some(Piece::Block(block.sub(0, (head.end - head.start) as usize))),
                tail: Some(Piece::Block(block.sub(behind, len - behind))),
            });
        }
        Ok(Edges {
            head: self.piece(engine, part, head_is, head, fresh).await?,
            tail: self.piece(engine, part, tail_is, tail, fresh).await?,
        })
    }

    /// What is to be done about a range beside the data.
    async fn edge<E: Engine>(
        &self,
        engine: &E,
        part: &Part<'_>,
        range: Range<u64>,
    ) -> Result<Edge> {
        if range.is_empty() || mutant!(EdgesNotCopied) {
            return Ok(Edge::Left);
        }
        // A subcluster that is stored already keeps its own rest.
        let stored = part.image.find(engine, GuestOffset(range.start), 1).await?;
        if stored.kind == Subcluster::Normal && stored.copied {
            return Ok(Edge::Left);
        }
        Ok(if self.is_zero(engine, range).await? { Edge::Zero } else { Edge::Copied })
    }

    async fn piece<'a, E: Engine>(
        &self,
        engine: &E,
        part: &Part<'_>,
        edge: Edge,
        range: Range<u64>,
        fresh: bool,
    ) -> Result<Option<Piece<'a>>> {
        match edge {
            Edge::Left => Ok(None),
            Edge::Zero if fresh => Ok(None),
            Edge::Zero => Ok(Some(Piece::Zeroes((range.end - range.start) as usize))),
            Edge::Copied => Ok(Some(Piece::Block(self.old_bytes(engine, part, range).await?))),
        }
    }

    /// Whether a range reads as zero, as far as the mapping tells. What lies past
    /// the end of the disk (in the last cluster) does.
    pub(crate) async fn is_zero<E: Engine>(&self, engine: &E, range: Range<u64>) -> Result<bool> {
        let end = range.end.min(self.size());
        let mut at = range.start;
        while at < end {
            let part = self.locate(engine, 0, GuestOffset(at), end - at).await?;
            if !part.is_zero() {
                return Ok(false);
            }
            at += part.run.len;
        }
        Ok(true)
    }

    /// Whether it is known without I/O that a range reads as zero now. What is wrong
    /// below is found by who reads it.
    pub(super) fn is_known_zero(&self, range: Range<u64>) -> bool {
        let end = range.end.min(self.size());
        let mut at = range.start;
        while at < end {
            match self.try_locate(0, GuestOffset(at), end - at) {
                Ok(Ok(part)) if part.is_zero() => at += part.run.len,
                _ => return false,
            }
        }
        true
    }

    /// What a reader sees in a range now, to be copied.
    async fn old_bytes<E: Engine>(
        &self,
        engine: &E,
        part: &Part<'_>,
        range: Range<u64>,
    ) -> Result<BlockSlice> {
        let bytes = self.read_old(engine, range.clone()).await?;
        self.note_copied(part, range);
        Ok(bytes)
    }

    /// What a reader sees in a range now; zeroes past the end of the disk.
    async fn read_old<E: Engine>(&self, engine: &E, range: Range<u64>) -> Result<BlockSlice> {
        let len = (range.end - range.start) as usize;
        let block = Block::zeroed(len)?;
        let on_disk = self.on_disk(&range) as usize;
        let target = Target::Block(block.slice(0, on_disk));
        self.read_from(engine, 0, target, GuestOffset(range.start)).await?;
        Ok(block.slice(0, len))
    }

    fn note_copied(&self, part: &Part<'_>, range: Range<u64>) {
        part.writing.cow_bytes.fetch_add(self.on_disk(&range), Ordering::Relaxed);
    }

    /// Bytes of a range that lie on the disk.
    fn on_disk(&self, range: &Range<u64>) -> u64 {
        range.end.min(self.size()).saturating_sub(range.start)
    }

    /// Writes to a cluster whose host cluster is shared or whose data is
    /// compressed: a new host cluster takes over all that is stored, the old one
    /// loses a reference. The part lies in one cluster; returns its length, or 0 if
    /// the cluster is not of that kind any more.
    pub(super) async fn replace<E: Engine>(&self, engine: &E, part: &Part<'_>) -> Result<usize> {
        let image = part.image;
        let geometry = image.geometry();
        let all = subcluster::all(geometry.subclusters());
        let (cluster, _) = part.first();
        let all = if mutant!(ReplaceClaimsNothing) { 0 } else { all };
        let _claim = part.writing.claims.acquire(Region::whole(cluster, 1, all)).await;
        let old = image.entry(engine, part.table, cluster).await?;
        let (stored, zero, freed) = match old {
            Cluster::Compressed(data) => {
                let touched = data.host_clusters(geometry);
                (subcluster::all(geometry.subclusters()), 0, *touched.start()..*touched.end() + 1)
            }
            Cluster::Standard { host, copied: false, alloc, zero } => {
                let number = geometry.host_cluster(host).0;
                (alloc, zero, number..number + 1)
            }
            Cluster::Standard { copied: true, .. } | Cluster::None { .. } => return Ok(0),
        };
        let alloc = stored | part.mask_in(0);
        mutant!(FreedBeforeReplaced => part.writing.allocator.limbo.announce(freed.clone()));
        let allocation = image.allocate(engine, 1).await?;
        let host = allocation.start()?.into();
        let moved = async {
            for run in subcluster::runs(alloc) {
                self.write_run(engine, part, host, run).await?;
            }
            let zero = zero & !alloc;
            let new = Cluster::Standard { host, copied: true, alloc, zero };
            part.writing.allocator.need_order();
            image.change(engine, part.table, cluster, 1, |_, _| Some(new)).await
        }
        .await;
        keep_or_give_back(allocation, moved)?;
        if !mutant!(FreedBeforeReplaced) {
            part.writing.allocator.limbo.announce(freed);
        }
        Ok(part.data.len())
    }

    /// Writes a run of subclusters to the new host cluster: the data of the part
    /// where it lies in the run, old bytes elsewhere.
    async fn write_run<E: Engine>(
        &self,
        engine: &E,
        part: &Part<'_>,
        host: DataOffset,
        run: Range<u32>,
    ) -> Result<()> {
        let geometry = part.image.geometry();
        let base = geometry.guest_start(part.first().0).0;
        let sub = geometry.subcluster_size();
        let run = base + u64::from(run.start) * sub..base + u64::from(run.end) * sub;
        let data = part.offset.0.clamp(run.start, run.end)..part.end().clamp(run.start, run.end);
        let mut pieces = Vec::with_capacity(3);
        if run.start < data.start {
            pieces.push(Piece::Block(self.old_bytes(engine, part, run.start..data.start).await?));
        }
        if !data.is_empty() {
            let at = (data.start - part.offset.0) as usize;
            pieces.push(part.data.sub(at, (data.end - data.start) as usize));
        }
        if data.end < run.end {
            pieces.push(Piece::Block(self.old_bytes(engine, part, data.end..run.end).await?));
        }
        let at = host.get() + (run.start - base);
        part.writing.allocator.check_data(at, run.end - run.start)?;
        mutant!(CopiedInPlainText => return part.image.storage.write(engine, &pieces, at).await);
        let guest = if mutant!(CopiedUnderOtherIv) { run.start + 512 } else { run.start };
        part.image.write_data(engine, &pieces, at, guest).await
    }
}
