//! The limits of the format and those that QEMU sets, so that both programs
//! accept the same images. Numbers only.

use crate::geometry::Geometry;

/// log2 of the smallest cluster, 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// log2 of the largest cluster, 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// The smallest subcluster in bytes; extended L2 entries therefore need
/// clusters of at least 16 KiB.
pub const MIN_SUBCLUSTER_SIZE: u64 = 512;
/// The largest L1 table in bytes, of the active image or of a snapshot.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The largest refcount table in bytes.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// The widest refcount: 2^6 bits.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// The most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The largest snapshot table in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// The most extra data in bytes of one entry of the snapshot table.
pub const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// The most persistent bitmaps.
pub const MAX_BITMAPS: u32 = 65535;
/// The largest bitmap directory in bytes.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// The most entries of one bitmap's table.
pub const MAX_BITMAP_TABLE_ENTRIES: u32 = 0x800_0000;
/// The most bytes of clusters that one bitmap's table may describe.
pub const MAX_BITMAP_BYTES: u64 = 0x2000_0000;
/// log2 of the finest granularity of a bitmap, in bytes.
pub const MIN_BITMAP_GRANULARITY_BITS: u8 = 9;
/// log2 of the coarsest granularity of a bitmap, in bytes.
pub const MAX_BITMAP_GRANULARITY_BITS: u8 = 31;
/// The longest name of a bitmap in bytes.
pub const MAX_BITMAP_NAME: usize = 1023;
/// The highest byte of an image file that a table can name.
pub const MAX_HOST_OFFSET: u64 = (1 << 56) - 1;
/// The longest name of a backing file in bytes.
pub const MAX_BACKING_NAME: usize = 1023;
/// The longest name of a backing file's format in bytes.
pub const MAX_BACKING_FORMAT: usize = 15;
/// Where L1, L2 and bitmap table entries keep a host offset: bits 9 to 55.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The largest virtual disk in bytes: what a full L1 table can map.
pub fn max_virtual_size(geometry: Geometry) -> u64 {
    // At most 2^22 entries of 2^39 bytes each.
    (MAX_L1_BYTES / 8) << (geometry.cluster_bits + geometry.l2_bits())
}
