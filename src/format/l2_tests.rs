//! Tests of L2 entries: each rule of the format by name, the layout by example,
//! and any entry at any cluster size.

use proptest::prelude::*;

use super::compressed::Compressed;
use super::l2::{COPIED, Cluster, L2Entry, L2Format};
use super::limits::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, OFFSET_MASK};
use super::subcluster::Subcluster;
use crate::error::ErrorKind;
use crate::geometry::{DataOffset, Geometry, HostOffset};

const COMPRESSED: u64 = 1 << 62;

fn format(cluster_bits: u32, extended_l2: bool) -> L2Format {
    L2Format { geometry: Geometry { cluster_bits, extended_l2 }, version: 3, data_file: false }
}

const STANDARD: L2Format = L2Format {
    geometry: Geometry { cluster_bits: 16, extended_l2: false },
    version: 3,
    data_file: false,
};
const EXTENDED: L2Format = L2Format {
    geometry: Geometry { cluster_bits: 16, extended_l2: true },
    version: 3,
    data_file: false,
};

fn decode(format: L2Format, descriptor: u64, bitmap: u64) -> Result<Cluster, ErrorKind> {
    format.decode(L2Entry { descriptor, bitmap }).map_err(|error| error.kind())
}

fn host(offset: u64) -> DataOffset {
    HostOffset::new(offset).unwrap().into()
}

fn standard(offset: u64, copied: bool, alloc: u32, zero: u32) -> Result<Cluster, ErrorKind> {
    Ok(Cluster::Standard { host: host(offset), copied, alloc, zero })
}

#[test]
fn standard_entries_by_example() {
    assert_eq!(decode(STANDARD, 0, 0), Ok(Cluster::None { zero: 0 }));
    assert_eq!(decode(STANDARD, 1, 0), Ok(Cluster::None { zero: 1 }));
    assert_eq!(decode(STANDARD, 0x50000, 0), standard(0x50000, false, 1, 0));
    assert_eq!(decode(STANDARD, COPIED | 0x50000, 0), standard(0x50000, true, 1, 0));
    // What discard-no-unref leaves: kept, but read as zero.
    assert_eq!(decode(STANDARD, 0x8000_0000_0005_0001, 0), standard(0x50000, true, 0, 1));
}

#[test]
fn extended_entries_by_example() {
    assert_eq!(decode(EXTENDED, 0, 0), Ok(Cluster::None { zero: 0 }));
    // What zeroing the first subcluster of an unallocated cluster leaves.
    assert_eq!(decode(EXTENDED, 0, 0x0000_0001_0000_0000), Ok(Cluster::None { zero: 1 }));
    // What discarding a whole cluster leaves.
    assert_eq!(decode(EXTENDED, 0, 0xffff_ffff_0000_0000), Ok(Cluster::None { zero: u32::MAX }));
    // What preallocation leaves: a place, nothing in it.
    assert_eq!(decode(EXTENDED, COPIED | 0x50000, 0), standard(0x50000, true, 0, 0));
    assert_eq!(
        decode(EXTENDED, COPIED | 0x50000, 0x8000_0000_01ff_ffff),
        standard(0x50000, true, 0x01ff_ffff, 0x8000_0000)
    );
}

#[test]
fn entries_are_written_as_they_are_read() {
    let extended = Cluster::Standard { host: host(0x50000), copied: true, alloc: 1, zero: 1 << 31 };
    let entry = EXTENDED.encode(extended);
    assert_eq!(entry.descriptor, 0x8000_0000_0005_0000);
    assert_eq!(entry.bitmap, 0x8000_0000_0000_0001);
    let entry = STANDARD.encode(Cluster::None { zero: 1 });
    assert_eq!(entry, L2Entry { descriptor: 1, bitmap: 0 });
    let compressed = Cluster::Compressed(Compressed { offset: 0x5004f, length: 1024 - 0x4f });
    let entry = EXTENDED.encode(compressed);
    assert_eq!(entry, L2Entry { descriptor: 0x4040_0000_0005_004f, bitmap: 0 });
}

#[test]
fn alloc_and_zero_of_any_subcluster_spoil_the_entry() {
    for index in 0..32 {
        let both = 1 << index | 1 << (index + 32);
        assert_eq!(decode(EXTENDED, COPIED | 0x50000, both), Err(ErrorKind::Corrupt), "{index}");
    }
    assert!(decode(EXTENDED, COPIED | 0x50000, 0x5555_5555_aaaa_aaaa).is_ok());
}

#[test]
fn alloc_of_any_subcluster_needs_a_host_cluster() {
    for index in 0..32 {
        assert_eq!(decode(EXTENDED, 0, 1 << index), Err(ErrorKind::Corrupt), "{index}");
        assert_eq!(decode(EXTENDED, COPIED, 1 << index), Err(ErrorKind::Corrupt), "{index}");
    }
}

#[test]
fn copied_without_a_host_cluster_is_unallocated() {
    assert_eq!(decode(STANDARD, COPIED, 0), Ok(Cluster::None { zero: 0 }));
    assert_eq!(decode(EXTENDED, COPIED, 1 << 32), Ok(Cluster::None { zero: 1 }));
}

#[test]
fn the_second_word_means_nothing_to_standard_entries() {
    assert_eq!(decode(STANDARD, 0x50000, u64::MAX), standard(0x50000, false, 1, 0));
    assert_eq!(decode(STANDARD, 0, u64::MAX), Ok(Cluster::None { zero: 0 }));
}

#[test]
fn reserved_bits_are_ignored() {
    for bit in (1..9).chain(56..62) {
        assert_eq!(decode(STANDARD, 0x50000 | 1 << bit, 0), standard(0x50000, false, 1, 0));
        assert_eq!(decode(EXTENDED, 0x50000 | 1 << bit, 2), standard(0x50000, false, 2, 0));
    }
    assert_eq!(decode(EXTENDED, 1, 0), Ok(Cluster::None { zero: 0 }), "the standard zero flag");
}

#[test]
fn a_compressed_cluster_reads_whatever_its_bitmap_says() {
    let expected = Ok(Cluster::Compressed(Compressed { offset: 0x50000, length: 512 }));
    for bitmap in [0, 1, 1 << 63 | 1 << 31, u64::MAX] {
        assert_eq!(decode(EXTENDED, COMPRESSED | 0x50000, bitmap), expected);
        assert_eq!(decode(EXTENDED, COPIED | COMPRESSED | 0x50000, bitmap), expected);
    }
    // No zero flag either: bit 0 belongs to the offset.
    assert_eq!(
        decode(STANDARD, COMPRESSED | 0x50001, 0),
        Ok(Cluster::Compressed(Compressed { offset: 0x50001, length: 511 }))
    );
}

#[test]
fn host_offsets_are_aligned_to_the_cluster_not_to_512() {
    for bit in 9..16 {
        for descriptor in [0x50000 | 1 << bit, 1 << bit] {
            assert_eq!(decode(STANDARD, descriptor, 0), Err(ErrorKind::Corrupt), "{bit}");
            assert_eq!(decode(STANDARD, descriptor | 1, 0), Err(ErrorKind::Corrupt), "{bit}");
            assert_eq!(decode(EXTENDED, descriptor, 0), Err(ErrorKind::Corrupt), "{bit}");
        }
    }
    assert_eq!(
        decode(STANDARD, OFFSET_MASK & !0xffff, 0),
        standard((1 << 56) - 65536, false, 1, 0)
    );
    assert_eq!(decode(format(9, false), 512, 0), standard(512, false, 1, 0));
}

#[test]
fn version_2_knows_no_zero_clusters() {
    let v2 = L2Format { version: 2, ..STANDARD };
    for descriptor in [1, COPIED | 0x50001] {
        assert_eq!(decode(v2, descriptor, 0), Err(ErrorKind::Corrupt));
    }
    assert!(matches!(decode(v2, COMPRESSED | 0x50001, 0), Ok(Cluster::Compressed(_))));
}

#[test]
fn a_run_of_a_compressed_cluster_is_the_rest_of_it() {
    let cluster = Cluster::Compressed(Compressed { offset: 0x50000, length: 512 });
    assert_eq!(cluster.run(0, 32), (Subcluster::Compressed, 32));
    assert_eq!(cluster.run(31, 32), (Subcluster::Compressed, 1));
    assert_eq!(cluster.run(0, 1), (Subcluster::Compressed, 1));
}

/// What a subcluster is, straight from the format's table.
fn model(descriptor: u64, bitmap: u64, index: u32) -> Subcluster {
    let (alloc, zero) = (bitmap >> index & 1 == 1, bitmap >> (index + 32) & 1 == 1);
    match (descriptor & OFFSET_MASK != 0, alloc, zero) {
        (_, true, true) | (false, true, _) => unreachable!("such entries do not decode"),
        (true, true, false) => Subcluster::Normal,
        (true, false, true) => Subcluster::ZeroReserved,
        (true, false, false) => Subcluster::Reserved,
        (false, false, true) => Subcluster::Zero,
        (false, false, false) => Subcluster::Unallocated,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn each_subcluster_is_what_its_two_bits_say(
        at in 0..1u64 << 40,
        (sparse, copied) in any::<(bool, bool)>(),
        (a, b, c) in any::<(u32, u32, u32)>(),
    ) {
        let descriptor =
            if sparse { 0 } else { at << 16 } | if copied { COPIED } else { 0 };
        let alloc = if descriptor & OFFSET_MASK == 0 { 0 } else { a & b };
        let bitmap = u64::from(c & !alloc) << 32 | u64::from(alloc);
        let cluster = decode(EXTENDED, descriptor, bitmap).unwrap();
        for index in 0..32 {
            prop_assert_eq!(cluster.subcluster(index), model(descriptor, bitmap, index));
        }
    }

    #[test]
    fn what_decodes_survives_and_loses_only_what_is_ignored(
        cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS,
        extended in any::<bool>(),
        version in 2..=3u32,
        (descriptor, a, b) in any::<(u64, u64, u64)>(),
        (aligned, sparse) in any::<(bool, bool)>(),
    ) {
        let format = L2Format { version, ..format(cluster_bits, extended && cluster_bits >= 14) };
        let flags = 1 << 63 | 1 << 62 | 1;
        let size = format.geometry.cluster_size();
        let descriptor = if aligned { descriptor & (!(size - 1) | flags) } else { descriptor };
        let bitmap = if sparse { a & b & !(a << 32) & !(a >> 32) } else { a };
        let Ok(cluster) = decode(format, descriptor, bitmap) else { return Ok(()) };
        let entry = format.encode(cluster);
        prop_assert_eq!(format.decode(entry).unwrap(), cluster);
        match cluster {
            Cluster::Compressed(_) => {
                let kept = descriptor & !COPIED;
                prop_assert_eq!(entry, L2Entry { descriptor: kept, bitmap: 0 });
            }
            _ => {
                prop_assert_eq!(entry.descriptor & OFFSET_MASK, descriptor & OFFSET_MASK);
                let bitmap = if format.geometry.extended_l2 { bitmap } else { 0 };
                prop_assert_eq!(entry.bitmap, bitmap);
            }
        }
        if let Cluster::Standard { alloc, zero, copied, .. } = cluster {
            prop_assert_eq!(alloc & zero, 0);
            prop_assert_eq!(copied, descriptor & COPIED != 0);
        }
        let count = format.geometry.subclusters();
        let mut index = 0;
        while index < count {
            let (_, length) = cluster.run(index, count);
            prop_assert!(length > 0);
            index += length;
        }
        prop_assert_eq!(index, count);
    }
}
