//! How large the tables of an image are, and where a new one has them. Pure.

use crate::error::{Error, Result};
use crate::format::limits::{MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFTABLE_BYTES, max_virtual_size};
use crate::format::refcount::RefcountWidth;
use crate::geometry::Geometry;

/// Where a new image has its tables; in clusters. The header is cluster 0, then come the
/// refcount table, the refcount blocks, the L1 table, the LUKS header if there is
/// one; then, where data is preallocated, the L2 tables and the data.
pub struct Layout {
    /// Clusters of the refcount table, which begins at cluster 1.
    pub reftable: u64,
    /// Refcount blocks, behind it.
    pub blocks: u64,
    /// Entries of the L1 table, which begins behind the blocks.
    pub l1_entries: u64,
    /// Clusters of the L1 table.
    l1: u64,
    /// Clusters of the LUKS header.
    pub encryption: u64,
    /// L2 tables, behind it, where they are made ahead.
    pub l2: u64,
    /// All clusters in use.
    pub used: u64,
}

impl Layout {
    /// First cluster of the refcount blocks.
    pub fn blocks_at(&self) -> u64 {
        1 + self.reftable
    }

    /// First cluster of the L1 table.
    pub fn l1_at(&self) -> u64 {
        1 + self.reftable + self.blocks
    }

    /// First cluster of the LUKS header.
    pub fn encryption_at(&self) -> u64 {
        self.l1_at() + self.l1
    }

    /// First cluster of the L2 tables.
    pub fn l2_at(&self) -> u64 {
        self.encryption_at() + self.encryption
    }

    /// First cluster of the data.
    pub fn data_at(&self) -> u64 {
        self.l2_at() + self.l2
    }
}

/// What is taken ahead of the disk's use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ahead {
    /// Nothing.
    Nothing,
    /// All L2 tables.
    Tables,
    /// And a host cluster for each guest cluster.
    Data,
}

/// The layout for a disk of `size` bytes; `InvalidArgument` where no image of this
/// geometry can be that large. `encryption`: clusters of a LUKS header.
pub fn layout(
    geometry: Geometry,
    width: RefcountWidth,
    size: u64,
    ahead: Ahead,
    encryption: u64,
) -> Result<Layout> {
    let l1_entries = size.div_ceil(geometry.l2_coverage());
    if size > max_virtual_size(geometry) || l1_entries * 8 > MAX_L1_BYTES {
        return Err(Error::invalid(format!(
            "a disk of {size} bytes is too large for clusters of {} bytes{}: the most is {}; \
             choose a larger cluster size",
            geometry.cluster_size(),
            if geometry.extended_l2 { " with extended L2 entries" } else { "" },
            max_virtual_size(geometry)
        )));
    }
    let l1 = geometry.clusters_for(l1_entries * 8);
    let (l2, data) = match ahead {
        Ahead::Nothing => (0, 0),
        Ahead::Tables => (l1_entries, 0),
        Ahead::Data => (l1_entries, geometry.clusters_for(size)),
    };
    let (blocks, reftable) = refcount_clusters(geometry, width, 1 + l1 + encryption + l2 + data);
    let used = 1 + reftable + blocks + l1 + encryption + l2 + data;
    if reftable << geometry.cluster_bits > MAX_REFTABLE_BYTES
        || used > MAX_HOST_OFFSET >> geometry.cluster_bits
    {
        return Err(Error::invalid(format!(
            "the data of a disk of {size} bytes is more than refcounts of {} bits can count with \
             clusters of {} bytes",
            width.bits(),
            geometry.cluster_size()
        )));
    }
    Ok(Layout { reftable, blocks, l1_entries, l1, encryption, l2, used })
}

/// Refcount blocks, and clusters of the table that names them, which it takes to
/// count `clusters` other clusters and themselves.
fn refcount_clusters(geometry: Geometry, width: RefcountWidth, clusters: u64) -> (u64, u64) {
    let per_block = width.entries_per(geometry.cluster_size());
    let (mut blocks, mut table) = (1, 1);
    loop {
        let needed = (clusters + blocks + table).div_ceil(per_block);
        let named = geometry.clusters_for(needed * 8);
        if needed <= blocks && named <= table {
            return (blocks, table);
        }
        // Both only ever grow, so this ends.
        (blocks, table) = (needed.max(blocks), named.max(table));
    }
}

/// Bytes of an image that holds `size` bytes of data and nothing unneeded, as
/// `qemu-img measure` reckons: tables in whole clusters.
pub fn fully_allocated(geometry: Geometry, width: RefcountWidth, size: u64) -> u64 {
    let cluster = geometry.cluster_size();
    let data = geometry.clusters_for(size);
    let l2 = data.div_ceil(cluster / geometry.l2_entry_size());
    let l1 = geometry.clusters_for(l2 * 8);
    let others = 1 + l2 + l1 + data;
    let (blocks, table) = refcount_clusters(geometry, width, others);
    (others + blocks + table) * cluster
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32) -> Geometry {
        Geometry { cluster_bits, extended_l2: false }
    }

    #[test]
    fn a_small_image_has_one_cluster_of_each() {
        let width = RefcountWidth::new(4).unwrap();
        let layout = layout(geometry(16), width, 1 << 20, Ahead::Nothing, 0).unwrap();
        assert_eq!((layout.reftable, layout.blocks, layout.l1_entries), (1, 1, 1));
        assert_eq!((layout.l1_at(), layout.used), (3, 4));
    }

    #[test]
    fn blocks_count_themselves_whatever_the_sizes() {
        for bits in 9..=21 {
            for order in 0..=6 {
                let (geometry, width) = (geometry(bits), RefcountWidth::new(order).unwrap());
                for size in [0, 1, 1 << 20, max_virtual_size(geometry)] {
                    let ahead = if size <= 1 << 20 { Ahead::Tables } else { Ahead::Nothing };
                    let layout = layout(geometry, width, size, ahead, 0).unwrap();
                    assert!(layout.blocks * width.entries_per(1 << bits) >= layout.used);
                    assert!(layout.reftable << bits >= layout.blocks * 8);
                }
                assert!(
                    layout(geometry, width, max_virtual_size(geometry) + 512, Ahead::Nothing, 0)
                        .is_err()
                );
            }
        }
    }

    #[test]
    fn measures_like_qemu() {
        let width = RefcountWidth::new(4).unwrap();
        assert_eq!(fully_allocated(geometry(16), width, 1 << 30), 1_074_135_040);
    }
}
