//! Tests of what follows the header's fields: extensions and backing file name.

use super::extensions::{BitmapsExt, CryptoExt, Extensions};
use super::header::{Header, autoclear, incompatible};
use super::header_samples::*;
use super::limits::*;
use crate::error::ErrorKind;

// -------------------------------------------------------------- backing file

#[test]
fn a_backing_name_of_length_0_is_no_backing_file() {
    let bytes = patched(&header(16), &[(8, &512u64.to_be_bytes()), (16, &[0; 4])]);
    assert_eq!(Header::parse(&bytes).unwrap().backing, None);
}

#[test]
fn a_backing_name_ends_at_its_first_nul() {
    assert_eq!(
        Header::parse(&with_area(&[0; 8], Some(b"base\0/etc/passwd"))).unwrap().backing,
        backing(b"base", None)
    );
    assert_eq!(Header::parse(&with_area(&[0; 8], Some(b"\0x"))).unwrap().backing, None);
}

#[test]
fn a_backing_name_has_at_most_1023_bytes() {
    for (length, opens) in [(1023u32, true), (1024, false), (65536, false), (u32::MAX, false)] {
        let result = parse_patched(&[
            (8, &600u64.to_be_bytes()),
            (16, &length.to_be_bytes()),
            (600, &[b'x'; 1024]),
        ]);
        assert_eq!(result.is_ok(), opens, "{length}");
    }
    let named = |length| Header { backing: backing(&vec![b'x'; length], None), ..header(16) };
    assert_eq!(
        Header::parse(&named(1023).to_bytes().unwrap()).unwrap().backing,
        named(1023).backing
    );
    assert_eq!(kind(named(1024).to_bytes()), Some(ErrorKind::InvalidArgument));
    assert_eq!(kind(named(0).to_bytes()), Some(ErrorKind::InvalidArgument));
}

#[test]
fn a_backing_name_ends_inside_the_first_cluster() {
    let place = |offset: u64, length: u32| {
        let patches: [(usize, &[u8]); 2] =
            [(8, &offset.to_be_bytes()), (16, &length.to_be_bytes())];
        Header::parse(&patched(&header(9), &patches)).map_err(|error| error.kind())
    };
    assert!(place(500, 12).is_ok());
    assert_eq!(place(500, 13), Err(ErrorKind::BadHeader));
    assert_eq!(place(512, 0).unwrap().backing, None);
    assert_eq!(place(512, 1), Err(ErrorKind::BadHeader));
    assert_eq!(place(513, 0), Err(ErrorKind::BadHeader));
    assert_eq!(place(u64::MAX, 1), Err(ErrorKind::BadHeader));
    // Legal nonsense: the name lies in the fields.
    assert_eq!(place(4, 4).unwrap().backing, None, "the version begins with a NUL");
}

#[test]
fn a_header_that_does_not_fit_is_an_error() {
    // 112 fields, 16 format, 8 end: 376 bytes are left of 512.
    let named =
        |length| Header { backing: backing(&vec![b'x'; length], Some(b"qcow2")), ..header(9) };
    assert_eq!(named(376).to_bytes().unwrap().len(), 512);
    let error = named(377).to_bytes().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.message().contains("513 bytes"), "{error}");
}

#[test]
fn a_backing_format_has_at_most_15_bytes() {
    let parse = |length| {
        let mut area = extension(BACKING_FORMAT, &vec![b'f'; length]);
        area.extend([0; 8]);
        Header::parse(&with_area(&area, Some(b"base")))
    };
    assert_eq!(parse(15).unwrap().backing.unwrap().format.unwrap().len(), 15);
    assert_eq!(kind(parse(16)), Some(ErrorKind::BadHeader));
    let header = Header { backing: backing(b"b", Some(&[b'f'; 16])), ..header(16) };
    assert_eq!(kind(header.to_bytes()), Some(ErrorKind::InvalidArgument));
}

#[test]
fn version_2_has_a_backing_format_too() {
    let v2 = Header {
        version: 2,
        header_length: 72,
        backing: backing(b"base.img", Some(b"raw")),
        ..header(16)
    };
    assert_eq!(Header::parse(&v2.to_bytes().unwrap()).unwrap(), v2);
}

// ---------------------------------------------------------------- extensions

#[test]
fn feature_names_are_written_above_4_kib_clusters_behind_the_backing_format() {
    for bits in [9, 12, 13, 16, 21] {
        for version in [2, 3] {
            let header =
                Header { version, backing: backing(b"base", Some(b"raw")), ..header(bits) };
            let bytes = header.to_bytes().unwrap();
            let start = if version == 2 { 72 } else { 112 };
            assert_eq!(bytes[start..start + 4], BACKING_FORMAT.to_be_bytes());
            let second = u32::from_be_bytes(bytes[start + 16..start + 20].try_into().unwrap());
            let names = version == 3 && bits > 12;
            assert_eq!(second, if names { FEATURE_NAMES } else { 0 });
        }
    }
}

#[test]
fn extensions_end_at_the_backing_name() {
    let unknown = (0x1234_5678, b"kept".to_vec());
    let area = extension(unknown.0, &unknown.1);
    // No end marker: the area ends with the extension.
    let parsed = Header::parse(&with_area(&area, Some(b"base"))).unwrap();
    assert_eq!(parsed.extensions.unknown, [unknown]);
    assert_eq!(parsed.backing, backing(b"base", None));
    // An extension that would pass into the name, by one byte.
    let mut long = area.clone();
    long[4..8].copy_from_slice(&9u32.to_be_bytes());
    assert_eq!(kind(Header::parse(&with_area(&long, Some(b"base")))), Some(ErrorKind::BadHeader));
    // A remainder that cannot hold an extension's head.
    let odd = [&area[..], &[0; 7]].concat();
    assert_eq!(kind(Header::parse(&with_area(&odd, Some(b"base")))), Some(ErrorKind::BadHeader));
}

#[test]
fn extensions_end_at_the_first_cluster() {
    let fill = |length: usize| with_area(&extension(7, &vec![1; length])[..400], None);
    assert_eq!(Header::parse(&fill(392)).unwrap().extensions.unknown[0].1.len(), 392);
    assert_eq!(kind(Header::parse(&fill(393))), Some(ErrorKind::BadHeader));
}

#[test]
fn an_extension_of_any_length_does_not_overflow() {
    for length in [0x7fff_ffffu32, 0xffff_fff8, 0xffff_fff9, u32::MAX] {
        for magic in [7, BACKING_FORMAT, FEATURE_NAMES, BITMAPS, DATA_FILE, CRYPTO, 0] {
            let mut area = extension(magic, b"12345678");
            area[4..8].copy_from_slice(&length.to_be_bytes());
            assert_eq!(kind(Header::parse(&with_area(&area, None))), Some(ErrorKind::BadHeader));
        }
    }
}

#[test]
fn nothing_behind_the_end_marker_is_read() {
    let area = [extension(0, &[]), vec![0xff; 64]].concat();
    assert_eq!(Header::parse(&with_area(&area, None)).unwrap().extensions, Extensions::default());
}

#[test]
fn unknown_extensions_survive_in_their_order() {
    let unknown = vec![(3, vec![]), (1, b"one".to_vec()), (2, b"12345678".to_vec()), (1, vec![0])];
    let mut expected = header(9);
    expected.extensions.unknown = unknown;
    assert_eq!(Header::parse(&expected.to_bytes().unwrap()).unwrap(), expected);
}

#[test]
fn a_feature_name_table_of_any_length_is_read() {
    for length in 0..=150 {
        let table: Vec<u8> = (0..length).map(|at| if at % 48 < 2 { 1 } else { b'n' }).collect();
        let parsed = Header::parse(&with_area(&extension(FEATURE_NAMES, &table), None)).unwrap();
        let names = parsed.extensions.feature_names.unwrap();
        assert_eq!(names.len(), length / 48 + usize::from(length % 48 > 2), "{length}");
        assert!(names.iter().all(|name| name.name.len() <= 46));
    }
}

#[test]
fn bitmaps_extension_is_validated() {
    let parse = |count: u32, reserved: u32, size: u64, offset: u64, extra: &[u8]| {
        let mut data = count.to_be_bytes().to_vec();
        data.extend(reserved.to_be_bytes());
        data.extend(size.to_be_bytes());
        data.extend(offset.to_be_bytes());
        data.extend(extra);
        let mut bytes = with_area(&extension(BITMAPS, &data), None);
        bytes[88..96].copy_from_slice(&autoclear::BITMAPS.to_be_bytes());
        Header::parse(&bytes).map(|header| header.extensions.bitmaps).map_err(|error| error.kind())
    };
    let most = MAX_BITMAP_DIRECTORY_BYTES;
    let found = BitmapsExt { count: MAX_BITMAPS, directory_size: most, directory_offset: 0x1200 };
    assert_eq!(parse(MAX_BITMAPS, 0, most, 0x1200, &[]), Ok(Some(found)));
    let bad = Err(ErrorKind::BadHeader);
    assert_eq!(parse(0, 0, 32, 0x1200, &[]), bad, "no bitmaps");
    assert_eq!(parse(MAX_BITMAPS + 1, 0, 32, 0x1200, &[]), bad, "too many");
    assert_eq!(parse(1, 1, 32, 0x1200, &[]), bad, "reserved field");
    assert_eq!(parse(1, 0, most + 1, 0x1200, &[]), bad, "directory too large");
    assert_eq!(parse(1, 0, 32, 0x1201, &[]), bad, "unaligned");
    assert_eq!(parse(1, 0, 32, 1 << 56, &[]), bad, "too far");
    assert_eq!(parse(1, 0, 32, 0x1200, &[0]), bad, "25 bytes");
}

#[test]
fn bitmaps_without_the_autoclear_bit_are_dropped_in_both_versions() {
    // Not even an impossible count is looked at.
    let stale = extension(BITMAPS, &[0xff; 24]);
    let v3 = Header::parse(&with_area(&stale, None)).unwrap();
    let mut bytes = Header { version: 2, ..header(9) }.to_bytes().unwrap();
    bytes[72..72 + stale.len()].copy_from_slice(&stale);
    let v2 = Header::parse(&bytes).unwrap();
    for header in [v2, v3] {
        assert!(header.extensions.stale_bitmaps);
        assert_eq!(header.extensions.bitmaps, None);
        let again = Header::parse(&header.to_bytes().unwrap()).unwrap();
        assert!(!again.extensions.stale_bitmaps, "gone once the header is rewritten");
    }
    let short = extension(BITMAPS, &[0; 23]);
    assert_eq!(kind(Header::parse(&with_area(&short, None))), Some(ErrorKind::BadHeader));
}

#[test]
fn encryption_header_is_for_luks_16_bytes_and_aligned() {
    let parse = |method: u32, data: &[u8]| {
        let mut bytes = with_area(&extension(CRYPTO, data), None);
        bytes[32..36].copy_from_slice(&method.to_be_bytes());
        Header::parse(&bytes).map(|header| header.extensions.crypto).map_err(|error| error.kind())
    };
    let data = [0x1200u64.to_be_bytes(), 99u64.to_be_bytes()].concat();
    assert_eq!(parse(2, &data), Ok(Some(CryptoExt { offset: 0x1200, length: 99 })));
    assert_eq!(parse_patched(&[(32, &2u32.to_be_bytes())]), Err(ErrorKind::BadHeader), "none");
    assert_eq!(parse(1, &data), Err(ErrorKind::BadHeader));
    assert_eq!(parse(0, &data), Err(ErrorKind::BadHeader));
    assert_eq!(parse(2, &data[..15]), Err(ErrorKind::BadHeader));
    let unaligned = [0x1201u64.to_be_bytes(), 99u64.to_be_bytes()].concat();
    assert_eq!(parse(2, &unaligned), Err(ErrorKind::BadHeader));
    for (offset, length) in [(1 << 56, 99), (0x1_0000, 1 << 60), (0x1_0000, u64::MAX)] {
        let nowhere = [u64::to_be_bytes(offset), u64::to_be_bytes(length)].concat();
        assert_eq!(parse(2, &nowhere), Err(ErrorKind::BadHeader), "{length} at {offset:#x}");
    }
}

#[test]
fn a_data_file_name_is_opaque_and_written_only_with_its_feature() {
    let name = br#"json:{"driver":"nbd"}"#;
    let mut bytes = with_area(&extension(DATA_FILE, name), None);
    let without = Header::parse(&bytes).unwrap();
    assert_eq!(without.extensions.data_file.as_deref(), Some(&name[..]));
    let rewritten = Header::parse(&without.to_bytes().unwrap()).unwrap();
    assert_eq!(rewritten.extensions.data_file, None);
    bytes[72..80].copy_from_slice(&incompatible::EXTERNAL_DATA.to_be_bytes());
    let with = Header::parse(&bytes).unwrap();
    assert_eq!(Header::parse(&with.to_bytes().unwrap()).unwrap(), with);
}
