//! Tests of the header's fields: rules and limits.

use super::header::{Header, autoclear, compatible, incompatible};
use super::header_samples::*;
use super::limits::*;
use crate::error::ErrorKind;
use crate::geometry::Geometry;

// ---------------------------------------------------------------- first bytes

#[test]
fn other_files_are_not_qcow2() {
    for bytes in [&b""[..], b"QFI", b"QFI\xfa\0\0\0\x03", &[0; 112]] {
        assert_eq!(kind(Header::bytes_wanted(bytes)), Some(ErrorKind::NotQcow2));
        assert_eq!(kind(Header::parse(bytes)), Some(ErrorKind::NotQcow2));
    }
}

#[test]
fn only_versions_2_and_3_are_supported() {
    for version in [0u32, 1, 4, u32::MAX] {
        let bytes = patched(&header(16), &[(4, &version.to_be_bytes())]);
        let error = Header::bytes_wanted(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnsupportedVersion);
        assert_eq!(error.message().contains("qemu-img convert"), version == 1);
    }
}

#[test]
fn cluster_size_is_512_bytes_to_2_mib() {
    for bits in [0u32, 8, 22, 32, 64, u32::MAX] {
        let bytes = patched(&header(16), &[(20, &bits.to_be_bytes())]);
        assert_eq!(kind(Header::bytes_wanted(&bytes)), Some(ErrorKind::BadHeader));
        assert_eq!(kind(Header::parse(&bytes)), Some(ErrorKind::BadHeader));
    }
    for bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
        let bytes = header(bits).to_bytes().unwrap();
        assert_eq!(Header::bytes_wanted(&bytes[..112]).unwrap(), 1 << bits);
        assert_eq!(Header::parse(&bytes).unwrap(), with_names(header(bits)));
    }
}

#[test]
fn a_file_cut_inside_the_header_is_refused_at_every_length() {
    let bytes = header(9).to_bytes().unwrap();
    for length in 4..bytes.len() {
        assert_eq!(kind(Header::parse(&bytes[..length])), Some(ErrorKind::BadHeader), "{length}");
    }
    for length in 4..24 {
        assert_eq!(kind(Header::bytes_wanted(&bytes[..length])), Some(ErrorKind::BadHeader));
    }
    assert_eq!(Header::bytes_wanted(&bytes[..24]).unwrap(), 512);
}

#[test]
fn bytes_behind_the_first_cluster_do_not_matter() {
    let mut bytes = header(9).to_bytes().unwrap();
    let parsed = Header::parse(&bytes).unwrap();
    bytes.extend([0xff; 1000]);
    assert_eq!(Header::parse(&bytes).unwrap(), parsed);
}

// ------------------------------------------------------- versions and lengths

#[test]
fn version_2_implies_its_features_whatever_follows() {
    let v2 = Header { version: 2, header_length: 72, ..header(16) };
    // Version 3 would find features and a refcount order here.
    let mut bytes = v2.to_bytes().unwrap();
    assert_eq!(bytes[72..80], [0; 8], "the end marker follows the 72 bytes at once");
    bytes[80..112].fill(0xff);
    let parsed = Header::parse(&bytes).unwrap();
    assert_eq!(parsed, v2);
    assert_eq!((parsed.refcount_bits(), parsed.incompatible), (16, 0));
}

#[test]
fn header_length_105_opens_103_does_not() {
    for (length, opens) in [(0u32, false), (72, false), (103, false), (104, true), (105, true)] {
        let result = parse_patched(&[(100, &length.to_be_bytes()), (112, &[0; 8])]);
        let expected = if opens { None } else { Some(ErrorKind::BadHeader) };
        assert_eq!(result.err(), expected, "{length}");
    }
}

#[test]
fn header_length_ends_at_the_cluster() {
    assert!(parse_patched(&[(100, &65536u32.to_be_bytes())]).is_ok());
    assert_eq!(parse_patched(&[(100, &65537u32.to_be_bytes())]), Err(ErrorKind::BadHeader));
    assert_eq!(parse_patched(&[(100, &u32::MAX.to_be_bytes())]), Err(ErrorKind::BadHeader));
}

#[test]
fn header_length_104_means_deflate() {
    // The byte at 104 is part of the first extension's magic then.
    let end_of_extensions = [0; 8];
    let patches: &[(usize, &[u8])] = &[(100, &104u32.to_be_bytes()), (104, &end_of_extensions)];
    let parsed = parse_patched(patches).unwrap();
    assert_eq!(parsed.compression, 0);
    let zstd = [(104, &[1u8][..]), (72, &incompatible::COMPRESSION.to_be_bytes())];
    assert_eq!(parse_patched(&zstd).unwrap().compression, 1);
    let without_field = [zstd[0], zstd[1], (100, &104u32.to_be_bytes())];
    assert_eq!(parse_patched(&without_field), Err(ErrorKind::BadHeader));
}

#[test]
fn a_short_version_3_header_is_written_at_full_length() {
    let bytes = patched(&header(16), &[(100, &104u32.to_be_bytes())]);
    let parsed = Header::parse(&bytes).unwrap();
    assert_eq!(parsed.header_length, 104);
    assert_eq!(Header::parse(&parsed.to_bytes().unwrap()).unwrap().header_length, 112);
}

#[test]
fn unknown_header_fields_survive() {
    for length in [1, 7, 8, 100] {
        let unknown_fields: Vec<u8> = (1..=length).collect();
        let expected = Header {
            unknown_fields,
            header_length: 112 + u32::from(length),
            backing: backing(b"base", Some(b"raw")),
            ..header(9)
        };
        let parsed = Header::parse(&expected.to_bytes().unwrap()).unwrap();
        assert_eq!(parsed, expected);
    }
}

// -------------------------------------------------------------- feature bits

#[test]
fn unknown_incompatible_features_are_named_by_the_image() {
    let mut table = vec![0u8; 96];
    table[..10].copy_from_slice(b"\0\x05teleport");
    table[48..56].copy_from_slice(b"\x01\x06wrong!");
    let mut bytes = with_area(&extension(FEATURE_NAMES, &table), None);
    bytes[72..80].copy_from_slice(&(0x61u64 | 1 << 63).to_be_bytes());
    let error = Header::parse(&bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
    let message = error.message();
    assert!(message.contains("teleport, bit 6 (0x40), bit 63 (0x8000000000000000)"), "{message}");
    assert!(!message.contains("dirty"), "known bits are not to blame: {message}");
}

#[test]
fn unknown_features_are_named_although_the_extensions_are_broken() {
    let mut area = extension(FEATURE_NAMES, b"\0\x07sorcery");
    area.extend(extension(BITMAPS, b"short"));
    area.extend([0xff; 16]);
    let mut bytes = with_area(&area, None);
    bytes[72..80].copy_from_slice(&(1u64 << 7).to_be_bytes());
    let error = Header::parse(&bytes).unwrap_err();
    assert!(error.message().contains("sorcery"), "{error}");
}

#[test]
fn a_hostile_feature_name_cannot_forge_lines() {
    let mut bytes = with_area(&extension(FEATURE_NAMES, b"\0\x07a\nerror: b\x1b[2J"), None);
    bytes[72..80].copy_from_slice(&(1u64 << 7).to_be_bytes());
    let message = Header::parse(&bytes).unwrap_err().message();
    assert!(message.contains("a\\nerror: b") && !message.contains(['\n', '\x1b']), "{message}");
}

#[test]
fn each_undefined_incompatible_bit_is_refused() {
    for bit in 0..64 {
        let result = parse_patched(&[(72, &(1u64 << bit).to_be_bytes())]);
        let expected = match bit {
            0 | 1 | 2 | 4 => None,
            3 => Some(ErrorKind::BadHeader), // without the compression type
            _ => Some(ErrorKind::UnsupportedFeature),
        };
        assert_eq!(result.err(), expected, "bit {bit}");
    }
}

#[test]
fn unknown_compatible_bits_survive() {
    let expected = with_names(Header { compatible: u64::MAX, ..header(16) });
    let parsed = Header::parse(&expected.to_bytes().unwrap()).unwrap();
    assert_eq!(parsed, expected);
    assert!(parsed.lazy_refcounts());
    assert!(!Header { compatible: !compatible::LAZY_REFCOUNTS, ..parsed }.lazy_refcounts());
}

#[test]
fn unknown_autoclear_bits_are_kept_and_reported() {
    let bits = autoclear::BITMAPS | 1 << 2 | 1 << 63;
    let parsed = parse_patched(&[(88, &bits.to_be_bytes())]).unwrap();
    assert_eq!((parsed.autoclear, parsed.unknown_autoclear()), (bits, 1 << 2 | 1 << 63));
}

#[test]
fn compression_type_and_bit_agree_in_both_directions() {
    let bit = incompatible::COMPRESSION.to_be_bytes();
    let none = [0; 8];
    for (kind, bit, opens) in
        [(0, &none, true), (1, &bit, true), (0, &bit, false), (1, &none, false)]
    {
        let result = parse_patched(&[(104, &[kind]), (72, bit)]);
        assert_eq!(result.is_ok(), opens, "{kind}");
    }
    for unknown in [2, 255] {
        assert_eq!(parse_patched(&[(104, &[unknown]), (72, &bit)]), Err(ErrorKind::BadHeader));
    }
}

#[test]
fn extended_l2_needs_16_kib_clusters() {
    let parse = |bits| {
        let patch = (72, &incompatible::EXTENDED_L2.to_be_bytes()[..]);
        Header::parse(&patched(&header(bits), &[patch]))
    };
    assert_eq!(kind(parse(13)), Some(ErrorKind::BadHeader));
    assert!(parse(13).unwrap_err().message().contains("256 bytes"));
    let parsed = parse(14).unwrap();
    assert!(parsed.extended_l2() && parsed.geometry.subcluster_size() == MIN_SUBCLUSTER_SIZE);
}

#[test]
fn raw_data_file_needs_a_data_file() {
    let raw = (88, &autoclear::RAW_EXTERNAL_DATA.to_be_bytes()[..]);
    assert_eq!(parse_patched(&[raw]), Err(ErrorKind::BadHeader));
    let parsed = parse_patched(&[raw, (72, &incompatible::EXTERNAL_DATA.to_be_bytes())]).unwrap();
    assert!(parsed.raw_external_data() && parsed.external_data_file());
}

#[test]
fn what_this_build_cannot_do_is_refused_by_name() {
    let refused = |header: Header, writable: bool| {
        header.unsupported(writable).err().map(|error| (error.kind(), error.message()))
    };
    let zstd = Header { compression: 1, incompatible: incompatible::COMPRESSION, ..header(16) };
    for sound in [header(16), zstd] {
        assert_eq!(refused(sound, true), None);
    }
}

#[test]
fn a_corrupt_image_may_be_read_only() {
    let corrupt = Header { incompatible: incompatible::CORRUPT, ..header(16) };
    assert!(corrupt.unsupported(false).is_ok());
    assert_eq!(kind(corrupt.unsupported(true)), Some(ErrorKind::MarkedCorrupt));
}

#[test]
fn a_dirty_image_is_one_like_others() {
    let dirty = Header { incompatible: incompatible::DIRTY, ..header(16) };
    assert!(dirty.unsupported(false).is_ok() && dirty.unsupported(true).is_ok());
}

#[test]
fn a_table_at_offset_0_is_readable_but_not_writable() {
    let tables = [
        Header { reftable_offset: 0, ..header(16) },
        Header { l1_offset: 0, ..header(16) },
        Header { snapshot_count: 1, ..header(16) },
    ];
    for header in tables {
        let parsed = Header::parse(&header.to_bytes().unwrap()).unwrap();
        assert!(parsed.unsupported(false).is_ok());
        assert_eq!(kind(parsed.unsupported(true)), Some(ErrorKind::Corrupt));
    }
    let empty = Header { size: 0, l1_size: 0, l1_offset: 0, ..header(16) };
    assert!(empty.unsupported(true).is_ok());
}

#[test]
fn encryption_methods_end_at_luks_which_needs_a_header() {
    for (method, opens) in [(0u32, true), (1, true), (2, false), (3, false), (u32::MAX, false)] {
        assert_eq!(parse_patched(&[(32, &method.to_be_bytes())]).is_ok(), opens, "{method}");
    }
}

// -------------------------------------------------------- sizes and tables

#[test]
fn size_is_rounded_down_to_sectors_but_kept_as_stored() {
    let parsed = parse_patched(&[(24, &1000u64.to_be_bytes())]).unwrap();
    assert_eq!((parsed.size, parsed.virtual_size()), (1000, 512));
    assert_eq!(parsed.to_bytes().unwrap()[24..32], 1000u64.to_be_bytes());
}

#[test]
fn l1_may_be_larger_than_the_disk_needs_but_not_smaller() {
    let l1 = |size: u64, l1_size: u32| {
        parse_patched(&[(24, &size.to_be_bytes()), (36, &l1_size.to_be_bytes())])
    };
    let coverage = header(16).geometry.l2_coverage();
    assert_eq!(l1(0, 0).unwrap().l1_entries_needed(), 0);
    assert_eq!(l1(1, 1).unwrap().l1_entries_needed(), 1);
    assert_eq!(l1(coverage, 1).unwrap().l1_entries_needed(), 1);
    // The size as stored counts, not that rounded down to sectors.
    assert_eq!(l1(coverage + 1, 1), Err(ErrorKind::BadHeader));
    assert_eq!(l1(coverage + 1, 2).unwrap().l1_entries_needed(), 2);
    assert!(l1(1, 1000).is_ok());
    assert_eq!(l1(1, 0), Err(ErrorKind::BadHeader));
}

#[test]
fn l1_has_at_most_32_mib() {
    let entries = (MAX_L1_BYTES / 8) as u32;
    assert!(parse_patched(&[(36, &entries.to_be_bytes())]).is_ok());
    assert_eq!(parse_patched(&[(36, &(entries + 1).to_be_bytes())]), Err(ErrorKind::BadHeader));
    assert_eq!(parse_patched(&[(36, &u32::MAX.to_be_bytes())]), Err(ErrorKind::BadHeader));
}

#[test]
fn max_virtual_size_is_what_a_full_l1_maps() {
    let cases = [
        (9, false, 128u64 << 30),
        (12, false, 8 << 40),
        (16, false, 2 << 50),
        (16, true, 1 << 50),
        (21, false, 2 << 60),
        (21, true, 1 << 60),
    ];
    for (bits, extended_l2, expected) in cases {
        let geometry = Geometry { cluster_bits: bits, extended_l2 };
        assert_eq!(max_virtual_size(geometry), expected);
        let full = Header {
            geometry,
            incompatible: if extended_l2 { incompatible::EXTENDED_L2 } else { 0 },
            size: expected,
            l1_size: (MAX_L1_BYTES / 8) as u32,
            ..header(bits)
        };
        let parsed = Header::parse(&full.to_bytes().unwrap()).unwrap();
        assert_eq!(parsed.virtual_size(), expected);
        let over = Header { size: expected + 512, ..full.clone() };
        assert_eq!(kind(Header::parse(&over.to_bytes().unwrap())), Some(ErrorKind::BadHeader));
        let huge = Header { size: u64::MAX, ..full };
        assert_eq!(kind(Header::parse(&huge.to_bytes().unwrap())), Some(ErrorKind::BadHeader));
    }
}

#[test]
fn reftable_has_at_most_8_mib() {
    for (bits, most) in [(9u32, 16384u32), (16, 128), (21, 4)] {
        for (clusters, opens) in [(1, true), (most, true), (most + 1, false), (u32::MAX, false)] {
            let header = Header { reftable_clusters: clusters, ..header(bits) };
            let result = Header::parse(&header.to_bytes().unwrap());
            assert_eq!(result.is_ok(), opens, "{clusters} clusters of 2^{bits}");
        }
    }
}

#[test]
fn only_a_check_does_without_a_refcount_table() {
    let bytes = patched(&header(16), &[(56, &[0; 4])]);
    assert_eq!(kind(Header::parse(&bytes)), Some(ErrorKind::BadHeader));
    assert_eq!(Header::parse_for_check(&bytes).unwrap().reftable_clusters, 0);
}

#[test]
fn there_are_at_most_65536_snapshots_except_for_a_check() {
    let count = |count: u32| patched(&header(16), &[(60, &count.to_be_bytes())]);
    assert_eq!(Header::parse(&count(MAX_SNAPSHOTS)).unwrap().snapshot_count, MAX_SNAPSHOTS);
    assert_eq!(kind(Header::parse(&count(MAX_SNAPSHOTS + 1))), Some(ErrorKind::BadHeader));
    let unaligned = patched(&header(16), &[(64, &512u64.to_be_bytes())]);
    assert_eq!(kind(Header::parse(&unaligned)), Some(ErrorKind::BadHeader));
    for bytes in [count(MAX_SNAPSHOTS + 1), unaligned] {
        assert!(Header::parse_for_check(&bytes).is_ok());
    }
}

#[test]
fn tables_are_aligned_and_end_before_2_to_the_56() {
    // Offset of the field and bytes of the table that the patches below make.
    let snapshots = (60, &16u32.to_be_bytes()[..]);
    for (at, length) in [(40, 8u64), (48, 65536), (64, 16 * 40)] {
        let last = ((1u64 << 56) - length) & !0xffff;
        let offset = |offset: u64| parse_patched(&[snapshots, (at, &offset.to_be_bytes())]);
        assert!(offset(last).is_ok(), "field {at}");
        assert!(offset(0).is_ok(), "field {at}");
        for bad in [last + 65536, last + 1, 1, 512, 1 << 56, 1 << 62, 1 << 63, !0xffff] {
            assert_eq!(offset(bad), Err(ErrorKind::BadHeader), "field {at}: {bad:#x}");
        }
    }
}

#[test]
fn refcounts_have_1_to_64_bits() {
    for order in 0..=6u32 {
        let parsed = parse_patched(&[(96, &order.to_be_bytes())]).unwrap();
        assert_eq!(parsed.refcount_bits(), 1 << order);
    }
    for order in [7u32, 32, u32::MAX] {
        assert_eq!(parse_patched(&[(96, &order.to_be_bytes())]), Err(ErrorKind::BadHeader));
    }
}

#[test]
fn in_place_patches_hit_their_fields() {
    let old = header(16);
    let new = Header {
        size: 0x1234_5600,
        l1_offset: 0xab_0000,
        l1_size: 77,
        reftable_offset: 0xcd_0000,
        reftable_clusters: 5,
        snapshot_count: 9,
        snapshots_offset: 0xef_0000,
        incompatible: incompatible::DIRTY,
        ..old.clone()
    };
    let bytes = patched(
        &old,
        &[
            (Header::SIZE_AT as usize, &new.size.to_be_bytes()),
            (Header::L1_AT as usize, &new.l1_patch()),
            (Header::REFTABLE_AT as usize, &new.reftable_patch()),
            (Header::SNAPSHOTS_AT as usize, &new.snapshots_patch()),
            (Header::INCOMPATIBLE_AT as usize, &new.incompatible.to_be_bytes()),
        ],
    );
    assert_eq!(Header::parse(&bytes).unwrap(), with_names(new.clone()));
    assert_eq!(bytes, new.to_bytes().unwrap());
}

#[test]
fn contradictions_are_not_written() {
    let contradictions = [
        Header { version: 4, ..header(16) },
        Header { version: 2, incompatible: incompatible::DIRTY, ..header(16) },
        Header { version: 2, compatible: compatible::LAZY_REFCOUNTS, ..header(16) },
        Header { version: 2, autoclear: autoclear::BITMAPS, ..header(16) },
        Header { version: 2, refcount_order: 5, ..header(16) },
        Header { version: 2, unknown_fields: vec![1], ..header(16) },
        Header { incompatible: incompatible::EXTENDED_L2, ..header(16) },
        Header { geometry: Geometry { cluster_bits: 16, extended_l2: true }, ..header(16) },
        Header { compression: 1, ..header(16) },
        Header { incompatible: incompatible::COMPRESSION, ..header(16) },
        Header { geometry: Geometry { cluster_bits: 8, extended_l2: false }, ..header(16) },
        Header { geometry: Geometry { cluster_bits: 64, extended_l2: false }, ..header(16) },
        Header { backing: backing(b"a\0b", None), ..header(16) },
    ];
    for header in contradictions {
        assert_eq!(kind(header.to_bytes()), Some(ErrorKind::InvalidArgument), "{header:?}");
    }
}
