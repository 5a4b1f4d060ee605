//! Tests of the bitmap directory: rules, limits, round trips, random bytes.

use proptest::collection::vec;
use proptest::prelude::*;

use super::bitmap::*;
use super::limits::*;
use crate::error::ErrorKind;
use crate::geometry::{Geometry, HostOffset};

const GEOMETRY: Geometry = Geometry { cluster_bits: 16, extended_l2: false };

fn sample() -> BitmapEntry {
    BitmapEntry {
        table_offset: 0x50000,
        table_entries: 1,
        flags: AUTO,
        granularity_bits: 16,
        name: b"daily".to_vec(),
    }
}

/// The sample's bytes with some replaced.
fn parse_patched(patches: &[(usize, &[u8])]) -> Result<BitmapEntry, ErrorKind> {
    let mut bytes = encode_directory(&[sample()]).unwrap();
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    parse_directory(&bytes, 1).map(|mut found| found.remove(0)).map_err(|error| error.kind())
}

#[test]
fn an_entry_lies_as_qemu_writes_it() {
    let expected = [
        &0x50000u64.to_be_bytes()[..],
        &[0, 0, 0, 1],  // table entries
        &[0, 0, 0, 2],  // flags
        &[1, 16, 0, 5], // type, granularity, length of the name
        &[0, 0, 0, 0],  // no extra data
        b"daily\0\0\0", // padded to a multiple of 8
    ]
    .concat();
    assert_eq!(encode_directory(&[sample()]).unwrap(), expected);
    assert_eq!(parse_directory(&expected, 1).unwrap(), [sample()]);
}

#[test]
fn a_directory_has_exactly_its_entries() {
    let two = encode_directory(&[sample(), BitmapEntry { name: vec![], ..sample() }]).unwrap();
    assert_eq!(parse_directory(&two, 2).unwrap().len(), 2);
    let kind = |bytes: &[u8], count| parse_directory(bytes, count).unwrap_err().kind();
    assert_eq!(kind(&two, 1), ErrorKind::Corrupt, "more than the header says");
    assert_eq!(kind(&two, 3), ErrorKind::Corrupt, "fewer than the header says");
    assert_eq!(kind(&[&two[..], &[0; 8]].concat(), 2), ErrorKind::Corrupt, "bytes behind");
    for length in 0..two.len() {
        assert_eq!(kind(&two[..length], 2), ErrorKind::Corrupt, "{length}");
    }
    assert_eq!(parse_directory(&[], 0).unwrap(), []);
    assert_eq!(kind(&[], MAX_BITMAPS + 1), ErrorKind::Corrupt);
}

#[test]
fn a_directory_has_at_most_65535_bitmaps() {
    let most = vec![sample(); MAX_BITMAPS as usize];
    let bytes = encode_directory(&most).unwrap();
    assert_eq!(parse_directory(&bytes, MAX_BITMAPS).unwrap(), most);
    let over = vec![sample(); MAX_BITMAPS as usize + 1];
    assert_eq!(encode_directory(&over).unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn a_directory_has_at_most_64_mib_less_1_kib() {
    // Entries of 1040 bytes: fewer than 65535 of them are too large.
    let large = BitmapEntry { name: vec![b'n'; 1016], ..sample() };
    let fits = (MAX_BITMAP_DIRECTORY_BYTES / 1040) as usize;
    let bytes = encode_directory(&vec![large.clone(); fits]).unwrap();
    assert_eq!(parse_directory(&bytes, fits as u32).unwrap().len(), fits);
    let error = encode_directory(&vec![large; fits + 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let zeros = vec![0; MAX_BITMAP_DIRECTORY_BYTES as usize + 1];
    assert_eq!(parse_directory(&zeros, 1).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn entries_are_validated() {
    let corrupt = |patch: (usize, &[u8])| {
        assert_eq!(parse_patched(&[patch]), Err(ErrorKind::Corrupt), "{patch:x?}");
    };
    corrupt((0, &[0; 8])); // no table
    corrupt((0, &(1u64 << 56).to_be_bytes()));
    corrupt((0, &[0xff; 8]));
    corrupt((8, &[0; 4])); // no entries
    corrupt((8, &(MAX_BITMAP_TABLE_ENTRIES + 1).to_be_bytes()));
    corrupt((8, &[0xff; 4]));
    for flag in 2..32 {
        corrupt((12, &(1u32 << flag).to_be_bytes()));
    }
    corrupt((16, &[0])); // types
    corrupt((16, &[2]));
    corrupt((17, &[8])); // granularities
    corrupt((17, &[32]));
    corrupt((17, &[255]));
    corrupt((18, &1024u16.to_be_bytes())); // name passes the end
    corrupt((20, &[0xff; 4])); // extra data passes the end
    let most = parse_patched(&[
        (8, &MAX_BITMAP_TABLE_ENTRIES.to_be_bytes()),
        (12, &[0, 0, 0, 3]),
        (17, &[31]),
    ]);
    let most = most.unwrap();
    assert_eq!((most.table_entries, most.flags), (MAX_BITMAP_TABLE_ENTRIES, IN_USE | AUTO));
    assert_eq!(parse_patched(&[(17, &[9])]).unwrap().granularity_bits, 9);
}

#[test]
fn extra_data_is_refused() {
    // The first 4 bytes of the name become extra data.
    let patches: [(usize, &[u8]); 2] = [(18, &[0, 1]), (20, &4u32.to_be_bytes())];
    assert_eq!(parse_patched(&patches), Err(ErrorKind::Corrupt));
}

#[test]
fn a_name_has_at_most_1023_bytes() {
    let named = |length| BitmapEntry { name: vec![b'n'; length], ..sample() };
    let bytes = encode_directory(&[named(1023)]).unwrap();
    assert_eq!(parse_directory(&bytes, 1).unwrap(), [named(1023)]);
    let error = encode_directory(&[named(1024)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    // 1023 bytes are padded by one: the same bytes hold a name of 1024.
    let mut bytes = bytes;
    bytes[18..20].copy_from_slice(&1024u16.to_be_bytes());
    assert_eq!(parse_directory(&bytes, 1).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn an_entry_is_checked_against_the_image() {
    let fails = |entry: BitmapEntry, size: u64| {
        entry.check(GEOMETRY, size).err().map(|error| error.kind()) == Some(ErrorKind::Corrupt)
    };
    // One cluster of bits of 64 KiB each.
    let covered = (65536 * 8) << 16;
    assert!(!fails(sample(), covered));
    assert!(fails(sample(), covered + 1), "the table is too small for the disk");
    let stale = BitmapEntry { flags: IN_USE, ..sample() };
    assert!(!fails(stale, covered + 1), "a stale bitmap may have any size");
    assert!(fails(BitmapEntry { table_offset: 0x50200, ..sample() }, 1), "unaligned");
    let clusters = (MAX_BITMAP_BYTES >> 16) as u32;
    assert!(!fails(BitmapEntry { table_entries: clusters, ..sample() }, 1 << 48));
    assert!(fails(BitmapEntry { table_entries: clusters, ..sample() }, (1 << 48) + 1));
    assert!(fails(BitmapEntry { table_entries: clusters + 1, ..sample() }, 1), "too large");
    assert!(fails(BitmapEntry { granularity_bits: 64, ..sample() }, 1), "by itself invalid");
}

#[test]
fn a_table_entry_is_zeros_ones_or_a_cluster() {
    let decode = |entry| BitmapCluster::decode(entry, GEOMETRY).map_err(|error| error.kind());
    assert_eq!(decode(0), Ok(BitmapCluster::Zeros));
    assert_eq!(decode(1), Ok(BitmapCluster::Ones));
    let stored = BitmapCluster::Stored(HostOffset::new(0x50000).unwrap());
    assert_eq!(decode(0x50000), Ok(stored));
    assert_eq!(decode(0x50001), Err(ErrorKind::Corrupt), "ones and an offset");
    assert_eq!(decode(0x50200), Err(ErrorKind::Corrupt), "unaligned");
    for bit in (1..9).chain(56..64) {
        assert_eq!(decode(1 << bit), Err(ErrorKind::Corrupt), "reserved bit {bit}");
        assert_eq!(decode(0x50000 | 1 << bit), Err(ErrorKind::Corrupt), "reserved bit {bit}");
    }
}

prop_compose! {
    fn any_entry()(
        table_offset in 1..(1u64 << 55),
        table_entries in 1..=MAX_BITMAP_TABLE_ENTRIES,
        flags in 0..4u32,
        granularity_bits in 9..=31u8,
        name in vec(any::<u8>(), 0..80),
    ) -> BitmapEntry {
        BitmapEntry { table_offset, table_entries, flags, granularity_bits, name }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn directories_survive_bytes(entries in vec(any_entry(), 0..6)) {
        let bytes = encode_directory(&entries).unwrap();
        prop_assert_eq!(bytes.len() % 8, 0);
        prop_assert_eq!(parse_directory(&bytes, entries.len() as u32).unwrap(), entries);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn table_entries_survive(entry in any::<u64>(), mask in any::<bool>()) {
        let entry = if mask { entry & 0x00ff_ffff_ffff_0000 } else { entry };
        if let Ok(cluster) = BitmapCluster::decode(entry, GEOMETRY) {
            prop_assert_eq!(cluster.encode(), entry);
        }
    }

    #[test]
    fn mutated_directories_never_panic(
        entries in vec(any_entry(), 1..4),
        mutations in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        count in 0..5u32,
        size in any::<u64>(),
        cluster_bits in 9..=21u32,
    ) {
        let mut bytes = encode_directory(&entries).unwrap();
        for (at, value) in mutations {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for entry in parse_directory(&bytes, count).unwrap_or_default() {
            let _ = entry.check(Geometry { cluster_bits, extended_l2: false }, size);
        }
    }

    #[test]
    fn random_directories_never_panic(bytes in vec(any::<u8>(), 0..300), count in 0..5u32) {
        let _ = parse_directory(&bytes, count);
        let _ = parse_directory(&bytes, u32::MAX);
    }
}
