//! Tests of compressed clusters: descriptors by example and by model, deflate
//! on good and bad data.

use proptest::collection::vec;
use proptest::prelude::*;

use super::compressed::{Compressed, decode, deflate, encode, inflate};
use super::limits::*;
use crate::error::ErrorKind;
use crate::geometry::Geometry;

fn geometry(cluster_bits: u32) -> Geometry {
    Geometry { cluster_bits, extended_l2: false }
}

const FLAG: u64 = 1 << 62;

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn deflated(data: &[u8]) -> Vec<u8> {
    let mut out = vec![0; data.len() + 100];
    let length = deflate(data, &mut out).unwrap();
    out.truncate(length);
    out
}

#[test]
fn the_count_is_of_additional_sectors() {
    let one = decode(0x4000_0000_0005_0000, geometry(16)).unwrap();
    assert_eq!(one, Compressed { offset: 0x50000, length: 512 });
    let two = decode(0x4040_0000_0005_0000, geometry(16)).unwrap();
    assert_eq!(two, Compressed { offset: 0x50000, length: 1024 });
}

#[test]
fn the_length_is_cut_by_the_sub_sector_part_of_the_offset() {
    let cut = decode(0x4000_0000_0005_004f, geometry(16)).unwrap();
    assert_eq!(cut, Compressed { offset: 0x5004f, length: 512 - 0x4f });
    let last = decode(0x4000_0000_0005_01ff, geometry(16)).unwrap();
    assert_eq!(last.length, 1);
}

#[test]
fn the_offset_field_shrinks_as_clusters_grow() {
    for cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
        let geometry = geometry(cluster_bits);
        let offset_bits = 70 - cluster_bits;
        // The most sectors: those of a cluster.
        let entry = FLAG | ((1 << 62) - (1 << offset_bits)) | 1 << 30;
        let expected = Compressed { offset: 1 << 30, length: geometry.cluster_size() * 2 };
        assert_eq!(decode(entry, geometry).unwrap(), expected);
        assert_eq!(encode(1 << 30, geometry.cluster_size() * 2, geometry), Some(entry));
        assert_eq!(encode(1 << 30, geometry.cluster_size() * 2 + 1, geometry), None);
    }
}

#[test]
fn copied_and_compressed_bits_are_ignored_by_decode() {
    let plain = decode(0x50000, geometry(16)).unwrap();
    for flags in [FLAG, 1 << 63, 3 << 62] {
        assert_eq!(decode(flags | 0x50000, geometry(16)).unwrap(), plain);
    }
    let entry = encode(0x50000, 512, geometry(16)).unwrap();
    assert_eq!(entry >> 62, 1, "compressed, and never COPIED");
}

#[test]
fn data_ends_before_2_to_the_56() {
    // Offsets of more than 56 bits exist with clusters below 16 KiB only.
    for cluster_bits in 9..=13 {
        let geometry = geometry(cluster_bits);
        let end = MAX_HOST_OFFSET + 1;
        assert!(decode(FLAG | (end - 512), geometry).is_ok());
        assert!(decode(FLAG | (end - 1), geometry).is_ok());
        for offset in [end, end + 512, (1 << (70 - cluster_bits)) - 1] {
            let error = decode(FLAG | offset, geometry).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert_eq!(encode(offset, 1, geometry), None);
        }
        // One more sector passes the end.
        let entry = FLAG | 1 << (70 - cluster_bits) | (end - 512);
        assert_eq!(decode(entry, geometry).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(encode(end - 512, 513, geometry), None);
        assert!(encode(end - 512, 512, geometry).is_some());
    }
    let geometry = geometry(21);
    assert!(encode((1 << 49) - 1, 1, geometry).is_some());
    assert_eq!(encode(1 << 49, 1, geometry), None, "the offset field has 49 bits");
}

#[test]
fn the_headers_cluster_holds_no_data() {
    assert_eq!(decode(FLAG, geometry(16)).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(decode(FLAG | 0xffff, geometry(16)).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(decode(FLAG | 0x10000, geometry(16)).is_ok());
    assert_eq!(encode(0xffff, 1, geometry(16)), None);
}

#[test]
fn nothing_is_not_a_compressed_cluster() {
    assert_eq!(encode(0x50000, 0, geometry(16)), None);
    assert_eq!(encode(u64::MAX, u64::MAX, geometry(16)), None);
    assert_eq!(encode(0x50001, u64::MAX, geometry(16)), None);
}

#[test]
fn host_clusters_are_those_touched() {
    let touched = |offset, length| Compressed { offset, length }.host_clusters(geometry(16));
    assert_eq!(touched(0x50000, 512), 5..=5);
    assert_eq!(touched(0x5fe00, 512), 5..=5, "up to the last byte");
    assert_eq!(touched(0x5fe01, 512), 5..=6, "into the next");
    assert_eq!(touched(0x5ffff, 1), 5..=5);
    assert_eq!(touched(0x50000, 0x20000), 5..=6);
    assert_eq!(touched(0x50001, 0x20000), 5..=7);
    assert_eq!(touched(u64::MAX, u64::MAX), 0xffff_ffff_ffff..=0xffff_ffff_ffff);
}

#[test]
fn trailing_garbage_is_normal() {
    let data = b"subcluster ".repeat(100);
    let mut input = deflated(&data);
    input.extend([0xff; 511]);
    let mut output = vec![0; data.len()];
    inflate(&input, &mut output).unwrap();
    assert_eq!(output, data);
}

#[test]
fn data_that_is_too_short_is_corrupt() {
    let data = b"subcluster ".repeat(100);
    let input = deflated(&data);
    let kind = |input: &[u8], length| inflate(input, &mut vec![0; length]).unwrap_err().kind();
    assert_eq!(kind(&input, data.len() + 1), ErrorKind::Corrupt, "the stream ends");
    for length in 0..input.len() - 2 {
        assert_eq!(kind(&input[..length], data.len()), ErrorKind::Corrupt, "cut at {length}");
    }
    assert_eq!(kind(&[], 1), ErrorKind::Corrupt);
    assert_eq!(kind(&[0xff; 64], 512), ErrorKind::Corrupt, "no deflate data");
}

#[test]
fn data_that_is_too_long_fills_the_cluster() {
    // A bomb costs one cluster, however much it would expand to.
    let bomb = deflated(&vec![0; 8 << 20]);
    assert!(bomb.len() < 16 << 10);
    let mut output = vec![1; 65536];
    inflate(&bomb, &mut output).unwrap();
    assert_eq!(output, vec![0; 65536]);
}

#[test]
fn zlib_and_gzip_framing_is_corrupt() {
    let data = b"subcluster ".repeat(100);
    let zlib = [&[0x78, 0x9c], &deflated(&data)[..]].concat();
    let mut output = vec![0; data.len()];
    assert!(inflate(&zlib, &mut output).is_err() || output != data);
    let gzip = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3], &deflated(&data)[..]].concat();
    assert_eq!(inflate(&gzip, &mut output).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn the_window_has_4_kib() {
    // A repetition within 4 KiB is found, one at a distance of 5000 bytes is
    // not: decoders need not remember that far.
    let near = noise(2048).repeat(8);
    assert!(deflated(&near).len() < near.len() / 4);
    let far = noise(5000).repeat(4);
    assert!(deflated(&far).len() > far.len() * 9 / 10);
}

#[test]
fn a_farther_window_is_read_all_the_same() {
    use flate2::{Compress, Compression, FlushCompress};
    let far = noise(16384).repeat(2);
    let mut input = vec![0; far.len()];
    let mut wide = Compress::new(Compression::default(), false);
    wide.compress(&far, &mut input, FlushCompress::Finish).unwrap();
    input.truncate(wide.total_out() as usize);
    assert!(input.len() < far.len() * 2 / 3, "the repetition was found");
    let mut output = vec![0; far.len()];
    inflate(&input, &mut output).unwrap();
    assert_eq!(output, far);
}

#[test]
fn what_does_not_get_smaller_is_not_compressed() {
    let data = noise(65536);
    assert_eq!(deflate(&data, &mut vec![0; 65535]), None);
    assert_eq!(deflate(&data, &mut []), None);
    let exact = deflated(&[7; 65536]).len();
    assert_eq!(deflate(&[7; 65536], &mut vec![0; exact + 1]), Some(exact));
    assert_eq!(deflate(&[7; 65536], &mut vec![0; exact - 1]), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn descriptors_survive(
        cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS,
        offset in any::<u64>(),
        shift in 0..64u32,
        length in any::<u64>(),
    ) {
        let geometry = geometry(cluster_bits);
        let (offset, length) = (offset >> shift, length % (4 << cluster_bits));
        if let Some(entry) = encode(offset, length, geometry) {
            let found = decode(entry, geometry).unwrap();
            prop_assert_eq!(found.offset, offset);
            // All of the data, and less than a sector more.
            prop_assert!(found.length >= length && found.length < length + 512);
            prop_assert_eq!((found.offset + found.length) % 512, 0);
        } else {
            let fits = (1..=geometry.cluster_size()).contains(&length)
                && (geometry.cluster_size()..1 << 48).contains(&offset);
            prop_assert!(!fits, "{} bytes at {:#x} can be expressed", length, offset);
        }
    }

    #[test]
    fn any_entry_decodes_or_is_corrupt(
        entry in any::<u64>(),
        cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS,
    ) {
        let geometry = geometry(cluster_bits);
        match decode(entry, geometry) {
            Ok(found) => {
                prop_assert!(found.offset + found.length <= MAX_HOST_OFFSET + 1);
                prop_assert!(found.length <= geometry.cluster_size() * 2);
                let touched = found.host_clusters(geometry);
                prop_assert!(*touched.start() > 0 && touched.count() <= 3);
                let again = encode(found.offset, found.length, geometry).unwrap();
                prop_assert_eq!(again, (entry | FLAG) & !(1 << 63));
            }
            Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Corrupt),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn data_survives_deflate(
        pieces in vec((any::<u8>(), 1..2000usize), 1..20),
        garbage in vec(any::<u8>(), 0..600),
    ) {
        let data: Vec<u8> =
            pieces.iter().flat_map(|(byte, count)| std::iter::repeat_n(*byte, *count)).collect();
        let input = [deflated(&data), garbage].concat();
        let mut output = vec![0; data.len()];
        inflate(&input, &mut output).unwrap();
        prop_assert_eq!(output, data);
    }

    #[test]
    fn damaged_data_never_panics(
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        random in vec(any::<u8>(), 0..300),
        length in 0..6000usize,
    ) {
        let mut input = deflated(&b"subcluster ".repeat(400));
        for (at, value) in damage {
            let at = at.index(input.len());
            input[at] = value;
        }
        let _ = inflate(&input, &mut vec![0; length]);
        let _ = inflate(&random, &mut vec![0; length]);
    }
}
