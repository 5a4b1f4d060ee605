//! Small sound images of all kinds, to begin with: made without the library, but for
//! the compression of a cluster.

use std::sync::LazyLock;

use crate::support::builder::{Cluster, Kind, build};

const TINY: Kind = Kind::PLAIN;
const EXTENDED: Kind = Kind { cluster: 16 << 10, extended_l2: true, size: 128 << 10, ..TINY };

/// Their names, for files, and what they are like.
pub const KINDS: [(&str, Kind); 10] = [
    ("standard", TINY),
    ("version2", Kind { version: 2, ..TINY }),
    ("backing", Kind { backing: true, ..TINY }),
    ("version2-backing", Kind { version: 2, backing: true, ..TINY }),
    ("snapshot", Kind { snapshot: true, ..TINY }),
    ("narrow", Kind { refcount_bits: 1, ..TINY }),
    ("wide", Kind { refcount_bits: 64, cluster: 4096, ..TINY }),
    ("crowded", Kind { refcount_bits: 64, crowded: true, ..TINY }),
    ("extended", EXTENDED),
    ("extended-backing", Kind { backing: true, snapshot: true, ..EXTENDED }),
];

/// Clusters of every sort, next to each other, in the first half of the disk.
fn cluster(kind: &Kind, index: u64) -> Cluster {
    let bytes = vec![index as u8 | 1; kind.cluster as usize];
    if index > kind.clusters() / 2 {
        return Cluster::Nothing;
    }
    match index % 6 {
        0 | 1 if kind.extended_l2 => Cluster::Data { bytes, alloc: 0x00ff_0f31, zero: 0x4000_7000 },
        0 | 1 => Cluster::Data { bytes, alloc: 1, zero: 0 },
        2 => Cluster::Compressed(bytes),
        3 if kind.version > 2 => Cluster::Reserved,
        4 if kind.version > 2 => Cluster::Data { bytes, alloc: 0, zero: u32::MAX },
        _ => Cluster::Nothing,
    }
}

/// The images, in the order of [`KINDS`].
pub static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    KINDS.iter().map(|(_, kind)| build(*kind, |index| cluster(kind, index))).collect()
});
