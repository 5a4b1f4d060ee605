//! Tests of the snapshot table: rules, limits, round trips, random bytes.

use proptest::collection::vec;
use proptest::prelude::*;

use super::limits::*;
use super::snapshot::{Snapshot, encode_table, parse_table};
use crate::error::ErrorKind;
use crate::geometry::Geometry;

fn sample() -> Snapshot {
    Snapshot {
        l1_offset: 0x50000,
        l1_size: 2,
        id: b"1".to_vec(),
        name: b"before".to_vec(),
        date_sec: 1_700_000_000,
        date_nsec: 999_999_999,
        vm_clock_nsec: 12345,
        vm_state_size: 0,
        disk_size: Some(1 << 30),
        icount: None,
        extra: Vec::new(),
    }
}

/// An entry as other writers may leave it: any extra data, any state size.
fn entry(snapshot: &Snapshot, short_state_size: u32, extra: &[u8]) -> Vec<u8> {
    let bytes = encode_table(std::slice::from_ref(snapshot), 0).unwrap();
    let mut out = bytes[..32].to_vec();
    out.extend(short_state_size.to_be_bytes());
    out.extend((extra.len() as u32).to_be_bytes());
    out.extend(extra);
    out.extend(&snapshot.id);
    out.extend(&snapshot.name);
    out
}

fn parse_one(bytes: &[u8]) -> Result<Snapshot, ErrorKind> {
    match parse_table(bytes, 1) {
        Ok((mut snapshots, used)) => {
            assert_eq!((snapshots.len(), used), (1, bytes.len()));
            Ok(snapshots.remove(0))
        }
        Err(error) => Err(error.kind()),
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

#[test]
fn an_entry_lies_as_qemu_writes_it() {
    let snapshot = Snapshot { vm_state_size: 0x0102, icount: Some(7), ..sample() };
    let expected = [
        &words(&[0x50000])[..],
        &[0, 0, 0, 2],             // L1 entries
        &[0, 1, 0, 6],             // lengths of ID and name
        &[0x65, 0x53, 0xf1, 0x00], // seconds
        &[0x3b, 0x9a, 0xc9, 0xff], // nanoseconds
        &words(&[12345]),
        &[0, 0, 1, 2],  // VM state, short
        &[0, 0, 0, 24], // extra data
        &words(&[0x0102, 1 << 30, 7]),
        b"1before",
    ]
    .concat();
    let bytes = encode_table(std::slice::from_ref(&snapshot), 0).unwrap();
    assert_eq!(bytes, expected);
    assert_eq!(parse_one(&bytes), Ok(snapshot));
}

#[test]
fn an_empty_table_has_no_bytes() {
    assert_eq!(encode_table(&[], 0).unwrap(), []);
    assert_eq!(parse_table(&[1, 2, 3], 0).unwrap(), (vec![], 0));
}

#[test]
fn missing_extra_data_means_the_images_size_and_no_icount() {
    let with = |extra: &[u8]| parse_one(&entry(&sample(), 55, extra)).unwrap();
    let none = with(&[]);
    assert_eq!((none.vm_state_size, none.disk_size, none.icount), (55, None, None));
    let state = with(&words(&[66]));
    assert_eq!((state.vm_state_size, state.disk_size, state.icount), (66, None, None));
    let size = with(&words(&[66, 77]));
    assert_eq!((size.vm_state_size, size.disk_size, size.icount), (66, Some(77), None));
    let icount = with(&words(&[66, 77, 88]));
    assert_eq!((icount.vm_state_size, icount.disk_size, icount.icount), (66, Some(77), Some(88)));
    assert_eq!(with(&words(&[66, 77, u64::MAX])).icount, None);
    // Half a field is no field, and is not kept as unknown data either.
    let half = with(&[9; 12]);
    assert_eq!((half.disk_size, half.extra), (None, vec![]));
    // Written again, the entry is complete.
    let rewritten = encode_table(&[none], 4096).unwrap();
    assert_eq!(parse_one(&rewritten).unwrap().disk_size, Some(4096));
}

#[test]
fn the_long_vm_state_size_counts_and_the_short_one_is_0_if_it_does_not_fit() {
    for (size, short) in [(0, 0), (u64::from(u32::MAX), u32::MAX), (1 << 32, 0), (u64::MAX, 0)] {
        let snapshot = Snapshot { vm_state_size: size, ..sample() };
        let bytes = encode_table(std::slice::from_ref(&snapshot), 0).unwrap();
        assert_eq!(bytes[32..36], short.to_be_bytes());
        assert_eq!(parse_one(&bytes).unwrap().vm_state_size, size);
    }
    assert_eq!(parse_one(&entry(&sample(), 55, &words(&[0]))).unwrap().vm_state_size, 0);
}

#[test]
fn unknown_extra_data_is_preserved() {
    let snapshot = Snapshot { extra: b"future".to_vec(), ..sample() };
    let bytes = encode_table(std::slice::from_ref(&snapshot), 0).unwrap();
    assert_eq!(parse_one(&bytes), Ok(snapshot));
}

#[test]
fn extra_data_has_at_most_1024_bytes() {
    let most = MAX_SNAPSHOT_EXTRA as usize;
    assert_eq!(parse_one(&entry(&sample(), 0, &vec![1; most])).unwrap().extra.len(), most - 24);
    assert_eq!(parse_one(&entry(&sample(), 0, &vec![1; most + 1])), Err(ErrorKind::Corrupt));
    // The length alone is enough to refuse: nobody should wait for the data.
    let mut huge = entry(&sample(), 0, &[]);
    huge[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(parse_one(&huge), Err(ErrorKind::Corrupt));
    let encode = |extra| encode_table(&[Snapshot { extra: vec![1; extra], ..sample() }], 0);
    assert!(encode(most - 24).is_ok());
    assert_eq!(encode(most - 23).unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn entries_are_padded_between_but_not_at_the_end() {
    let snapshots: Vec<Snapshot> =
        (0..10).map(|length| Snapshot { name: vec![b'n'; length], ..sample() }).collect();
    let bytes = encode_table(&snapshots, 0).unwrap();
    let mut at = 0usize;
    for snapshot in &snapshots {
        at = at.next_multiple_of(8);
        assert_eq!(bytes[at..at + 8], snapshot.l1_offset.to_be_bytes());
        at += 40 + 24 + 1 + snapshot.name.len();
    }
    assert_eq!(bytes.len(), at);
    let garbage_behind = [&bytes[..], &[0xff; 50]].concat();
    assert_eq!(parse_table(&garbage_behind, 10).unwrap(), (snapshots, at));
}

#[test]
fn a_cut_table_is_corrupt_at_every_length() {
    let snapshots = [sample(), Snapshot { extra: b"more".to_vec(), ..sample() }];
    let bytes = encode_table(&snapshots, 0).unwrap();
    for length in 0..bytes.len() {
        let error = parse_table(&bytes[..length], 2).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{length}");
    }
}

#[test]
fn a_table_can_be_read_in_pieces() {
    let snapshots = [sample(), Snapshot { name: b"second".to_vec(), ..sample() }];
    let bytes = encode_table(&snapshots, 0).unwrap();
    let (mut at, mut length, mut found) = (0, 0, Vec::new());
    while found.len() < 2 {
        match Snapshot::parse_next(&bytes[..length], at).unwrap() {
            Some((snapshot, end)) => {
                assert_eq!(end, length, "an entry is complete as soon as it can be");
                found.push(snapshot);
                at = end;
            }
            None => length += 1,
        }
    }
    assert_eq!((found.as_slice(), at), (&snapshots[..], bytes.len()));
}

#[test]
fn there_are_at_most_65536_snapshots() {
    let small = Snapshot { id: vec![], name: vec![], ..sample() };
    let most = MAX_SNAPSHOTS as usize;
    let bytes = encode_table(&vec![small.clone(); most], 0).unwrap();
    assert_eq!(parse_table(&bytes, MAX_SNAPSHOTS).unwrap().0.len(), most);
    assert_eq!(parse_table(&bytes, MAX_SNAPSHOTS + 1).unwrap_err().kind(), ErrorKind::Corrupt);
    let error = encode_table(&vec![small; most + 1], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn the_table_has_at_most_64_mib() {
    // 512 entries that fill 128 KiB each.
    let large = Snapshot { id: vec![b'i'; 65535], name: vec![b'n'; 65473], ..sample() };
    let size = 40 + 24 + large.id.len() + large.name.len();
    assert_eq!(size as u64 * 512, MAX_SNAPSHOT_TABLE_BYTES);
    let mut snapshots = vec![large.clone(); 512];
    let bytes = encode_table(&snapshots, 0).unwrap();
    assert_eq!(parse_table(&bytes, 512).unwrap().1, bytes.len());
    snapshots.push(sample());
    assert_eq!(encode_table(&snapshots, 0).unwrap_err().kind(), ErrorKind::InvalidArgument);
    // One byte more in the last entry, and one entry more.
    let mut over = bytes;
    let last = over.len() - size;
    over[last + 14..last + 16].copy_from_slice(&65474u16.to_be_bytes());
    over.push(0);
    assert_eq!(parse_table(&over, 512).unwrap_err().kind(), ErrorKind::Corrupt);
    let end = over.len();
    assert_eq!(Snapshot::parse_next(&over, end).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn names_have_at_most_65535_bytes() {
    for (id, name) in [(65536, 1), (1, 65536)] {
        let long = Snapshot { id: vec![b'x'; id], name: vec![b'x'; name], ..sample() };
        let error = encode_table(&[long], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn l1_tables_have_at_most_32_mib_and_end_before_2_to_the_56() {
    let most = (MAX_L1_BYTES / 8) as u32;
    let last = (1 << 56) - MAX_L1_BYTES;
    let cases = [
        (0x50000, most, true),
        (0x50000, most + 1, false),
        (0x50000, u32::MAX, false),
        (last, most, true),
        (last + 8, most, false),
        (1 << 56, 0, true),
        (u64::MAX, 0, false),
        (u64::MAX, 1, false),
    ];
    for (l1_offset, l1_size, sound) in cases {
        let bytes = encode_table(&[Snapshot { l1_offset, l1_size, ..sample() }], 0).unwrap();
        let expected = if sound { None } else { Some(ErrorKind::Corrupt) };
        assert_eq!(parse_one(&bytes).err(), expected, "{l1_offset:#x} {l1_size}");
    }
}

#[test]
fn l1_tables_are_aligned_to_a_cluster() {
    let geometry = Geometry { cluster_bits: 16, extended_l2: false };
    assert!(sample().check_l1(geometry).is_ok());
    for l1_offset in [0x50200, 0x50001, u64::MAX] {
        let error = Snapshot { l1_offset, ..sample() }.check_l1(geometry).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}

prop_compose! {
    fn any_snapshot()(
        l1_offset in 0..(1u64 << 55),
        l1_size in 0..=(MAX_L1_BYTES / 8) as u32,
        id in vec(any::<u8>(), 0..20),
        name in vec(any::<u8>(), 0..300),
        (date_sec, date_nsec) in any::<(u32, u32)>(),
        (vm_clock_nsec, vm_state_size) in any::<(u64, u64)>(),
        disk_size in any::<u64>(),
        icount in proptest::option::of(0..u64::MAX),
        extra in vec(any::<u8>(), 0..50),
    ) -> Snapshot {
        Snapshot {
            l1_offset, l1_size, id, name, date_sec, date_nsec, vm_clock_nsec, vm_state_size,
            disk_size: Some(disk_size), icount, extra,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn tables_survive_bytes(snapshots in vec(any_snapshot(), 0..6)) {
        let bytes = encode_table(&snapshots, 0).unwrap();
        let (parsed, used) = parse_table(&bytes, snapshots.len() as u32).unwrap();
        prop_assert_eq!(used, bytes.len());
        prop_assert_eq!(parsed, snapshots);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn mutated_tables_never_panic(
        snapshots in vec(any_snapshot(), 1..4),
        mutations in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        count in 0..6u32,
    ) {
        let mut bytes = encode_table(&snapshots, 0).unwrap();
        for (at, value) in mutations {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok((parsed, used)) = parse_table(&bytes, count) {
            prop_assert!(used <= bytes.len() && parsed.len() == count as usize);
        }
    }

    #[test]
    fn random_tables_never_panic(bytes in vec(any::<u8>(), 0..400), at in any::<usize>()) {
        let _ = parse_table(&bytes, u32::MAX);
        let _ = parse_table(&bytes, 3);
        let _ = Snapshot::parse_next(&bytes, at);
        let _ = Snapshot::parse_next(&bytes, at % 400);
    }
}
