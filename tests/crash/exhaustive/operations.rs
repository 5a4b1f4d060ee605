//! The operations that sequences are made of: each with its place on the disk.

use std::ops::Range;

use qcow2rs::Result;

use super::super::oracle::SECTOR;
use super::super::schedules::scene::Scene;
use super::super::support::builder::Kind;

/// What can be done. What the driver learns to do later (resizing, snapshots,
/// commit) comes in here and into `perform`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Write,
    /// As if a flush followed.
    WriteFua,
    Zero,
    ZeroAndUnmap,
    Discard,
    /// Refused where the cluster is allocated.
    Compress,
    Flush,
    /// The last of all.
    Close,
}

use Action::*;

/// An action at its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Op {
    pub action: Action,
    pub sectors: Range<u64>,
    pub name: String,
}

impl Op {
    pub async fn perform(&self, scene: &Scene) -> Result<()> {
        let sectors = self.sectors.clone();
        match self.action {
            Write => scene.write(sectors).await,
            WriteFua => scene.write_fua(sectors, true).await,
            Zero => scene.zero(sectors, false).await,
            ZeroAndUnmap => scene.zero(sectors, true).await,
            Discard => scene.discard(sectors).await,
            Compress => scene.compress(sectors).await.map(drop),
            Flush => scene.flush().await,
            Close => scene.settle().await,
        }
    }

    fn makes_durable(&self) -> bool {
        matches!(self.action, WriteFua | Flush | Close)
    }
}

/// Whether a sequence of `len` operations may go on like this: what changes nothing
/// is left out, unless it is all there is.
pub fn may_follow(sequence: &[&Op], op: &Op, len: usize) -> bool {
    match op.action {
        Close => sequence.len() + 1 == len,
        Flush => len == 1 || sequence.last().is_some_and(|last| !last.makes_durable()),
        _ => true,
    }
}

/// Entries of the slices that the cache is told to use.
pub fn entries_per_slice(kind: &Kind) -> u64 {
    512 / kind.l2_entry()
}

/// Sectors of something.
struct Sizes {
    sub: u64,
    cluster: u64,
}

impl Sizes {
    fn of(kind: &Kind) -> Sizes {
        let cluster = kind.cluster / SECTOR;
        Sizes { sub: (cluster / kind.subclusters()).max(1), cluster }
    }
}

/// All operations on a disk of this kind: over the edges of subclusters, clusters
/// and slices of L2 tables, and at the end of the disk.
pub fn all(kind: &Kind) -> Vec<Op> {
    let Sizes { sub, cluster } = Sizes::of(kind);
    let double = 2 * cluster + 1;
    let end = kind.size / SECTOR;
    let at = |start| move |len: u64| start..start + len;
    let over = |edge: u64| {
        move |len: u64| {
            let start = edge.saturating_sub(len / 2);
            start..start + len
        }
    };
    let (whole, inside) = (at(cluster), over(cluster + cluster / 2));
    let (between, slices) = (over(2 * cluster), over(entries_per_slice(kind) * cluster));
    let last = |len: u64| end - len..end;
    let mut ops: Vec<Op> = Vec::new();
    let mut add = |action, size: &str, place: &str, sectors: Range<u64>| {
        let known = ops.iter().any(|op| op.action == action && op.sectors == sectors);
        if !known {
            let name = format!("{action:?} {size} {place}");
            ops.push(Op { action, sectors, name });
        }
    };
    for (size, len) in [("sector", 1), ("4K", 8), ("subcluster", sub)] {
        add(Write, size, "inside", inside(len));
        add(Write, size, "between", between(len));
    }
    for (size, len) in [("cluster", cluster), ("2 clusters and a sector", double)] {
        add(Write, size, "whole", whole(len));
        add(Write, size, "between", between(len));
    }
    for (size, len) in [("sector", 1), ("cluster", cluster), ("2 clusters and a sector", double)] {
        add(Write, size, "slices", slices(len));
        add(Write, size, "last", last(len));
    }
    for action in [Zero, ZeroAndUnmap, Discard] {
        add(action, "cluster", "whole", whole(cluster));
        add(action, "subcluster", "inside", inside(sub));
        add(action, "2 clusters and a sector", "between", between(double));
        add(action, "2 clusters and a sector", "slices", slices(double));
        add(action, "cluster", "last", last(cluster));
    }
    add(Compress, "cluster", "whole", whole(cluster));
    add(Compress, "2 clusters", "whole", 2 * cluster..4 * cluster);
    add(WriteFua, "sector", "between", between(1));
    add(WriteFua, "cluster", "whole", whole(cluster));
    add(WriteFua, "2 clusters and a sector", "slices", slices(double));
    add(Flush, "all", "over", 0..0);
    add(Close, "all", "over", 0..0);
    ops
}
