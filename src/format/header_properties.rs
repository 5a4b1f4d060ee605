//! Properties of headers: round trips, and bytes of all kinds.

use proptest::collection::vec;
use proptest::prelude::*;

use super::extensions::{BitmapsExt, Extensions};
use super::header::{BackingRef, Header, autoclear, incompatible};
use super::header_samples::*;
use super::limits::*;
use crate::geometry::Geometry;

fn name_bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(1..=255u8, 1..=most)
}

fn any_extensions(cluster_bits: u32) -> impl Strategy<Value = Extensions> {
    let offset = (1..=(MAX_HOST_OFFSET >> cluster_bits)).prop_map(move |at| at << cluster_bits);
    let bitmaps = (1..=MAX_BITMAPS, 0..=MAX_BITMAP_DIRECTORY_BYTES, offset).prop_map(
        |(count, directory_size, directory_offset)| BitmapsExt {
            count,
            directory_size,
            directory_offset,
        },
    );
    let unknown = (1..0x1000u32, vec(any::<u8>(), 0..20));
    (proptest::option::of(bitmaps), proptest::option::of(name_bytes(40)), vec(unknown, 0..3))
        .prop_map(|(bitmaps, data_file, unknown)| Extensions {
            bitmaps,
            data_file,
            unknown,
            ..Extensions::default()
        })
}

prop_compose! {
    fn any_header()(cluster_bits in MIN_CLUSTER_BITS..=16)(
        cluster_bits in Just(cluster_bits),
        extended in any::<bool>(),
        (l1_size, size) in (1u32..10000, any::<u64>()),
        places in proptest::array::uniform3(0..(1u64 << 34)),
        (dirty, compatible, unknown_autoclear) in (0..4u64, any::<u64>(), any::<u64>()),
        refcount_order in 0..=6u32,
        snapshot_count in 0..=MAX_SNAPSHOTS,
        unknown_fields in vec(any::<u8>(), 0..30),
        name in proptest::option::of((name_bytes(60), proptest::option::of(name_bytes(15)))),
        extensions in any_extensions(cluster_bits),
    ) -> Header {
        let extended_l2 = extended && cluster_bits >= 14;
        let geometry = Geometry { cluster_bits, extended_l2 };
        let data = extensions.data_file.is_some();
        let bitmaps = extensions.bitmaps.is_some();
        with_names(Header {
            geometry,
            size: size % (u64::from(l1_size) * geometry.l2_coverage() + 1),
            backing: name.map(|(name, format)| BackingRef { name, format }),
            l1_offset: places[0] << cluster_bits,
            l1_size,
            reftable_offset: places[1] << cluster_bits,
            snapshots_offset: places[2] << cluster_bits,
            snapshot_count,
            incompatible: dirty
                | if data { incompatible::EXTERNAL_DATA } else { 0 }
                | if extended_l2 { incompatible::EXTENDED_L2 } else { 0 },
            compatible,
            autoclear: (unknown_autoclear & !autoclear::KNOWN)
                | if bitmaps { autoclear::BITMAPS } else { 0 },
            refcount_order,
            header_length: 112 + unknown_fields.len() as u32,
            unknown_fields,
            extensions,
            ..header(cluster_bits)
        })
    }
}

/// What a second reading of a header that was read and written must give.
fn normalized(header: &Header) -> Header {
    let mut header = with_names(header.clone());
    header.extensions.stale_bitmaps = false;
    if !header.external_data_file() {
        header.extensions.data_file = None;
    }
    header.header_length =
        if header.version == 2 { 72 } else { 112 + header.unknown_fields.len() as u32 };
    header
}

/// Reads arbitrary bytes; what is accepted must survive a rewrite.
fn read_and_rewrite(bytes: &[u8]) {
    let _ = Header::bytes_wanted(bytes);
    let Ok(header) = Header::parse_for_check(bytes) else {
        assert!(Header::parse(bytes).is_err());
        return;
    };
    let _ = (header.unsupported(true), header.l1_entries_needed(), header.refcount_bits());
    assert!(header.size <= max_virtual_size(header.geometry));
    match header.to_bytes() {
        Ok(rewritten) => {
            let again = Header::parse_for_check(&rewritten).unwrap();
            assert_eq!(again, normalized(&header));
        }
        // Feature names may find no room any more.
        Err(error) => assert!(error.message().contains("the header needs"), "{error}"),
    }
}

/// Byte values that have sent parsers astray, by position of the header.
fn mutations() -> impl Strategy<Value = Vec<(usize, u8)>> {
    let at = prop_oneof![3 => 0..112usize, 2 => 112..256usize, 1 => 256..4096usize];
    let value = prop_oneof![
        Just(0u8),
        Just(1),
        Just(2),
        Just(4),
        Just(8),
        Just(0x10),
        Just(0x7f),
        Just(0x80),
        Just(0xff),
        any::<u8>()
    ];
    vec((at, value), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn headers_survive_bytes(header in any_header()) {
        let bytes = match header.to_bytes() {
            Ok(bytes) => bytes,
            Err(error) => {
                prop_assert!(error.message().contains("the header needs"), "{}", error);
                prop_assert!(header.geometry.cluster_bits == 9, "{}", error);
                return Ok(());
            }
        };
        prop_assert_eq!(bytes.len() as u64, header.geometry.cluster_size());
        prop_assert_eq!(Header::parse(&bytes).unwrap(), header);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn mutated_headers_never_panic(
        bits in prop_oneof![Just(9u32), Just(12), Just(14)],
        version in 2..=3u32,
        with_backing in any::<bool>(),
        mutations in mutations(),
    ) {
        let mut original = Header { version, ..header(bits) };
        if with_backing {
            original.backing = backing(b"base.img", Some(b"qcow2"));
        }
        let mut bytes = original.to_bytes().unwrap();
        // Room for a larger cluster size.
        bytes.resize(1 << 16, 0);
        for (at, value) in mutations {
            bytes[at] = value;
        }
        read_and_rewrite(&bytes);
    }

    #[test]
    fn random_bytes_behind_the_magic_never_panic(
        version in 2..=3u8,
        cluster_bits in 8..=13u8,
        bytes in vec(any::<u8>(), 0..1024),
    ) {
        let mut bytes = [b"QFI\xfb\0\0\0", &[version][..], &bytes].concat();
        if let Some(field) = bytes.get_mut(20..24) {
            field.copy_from_slice(&u32::from(cluster_bits).to_be_bytes());
        }
        read_and_rewrite(&bytes);
    }

    #[test]
    fn random_extensions_never_panic(
        records in vec((0..8usize, vec(any::<u8>(), 0..60), -2..=2i32), 0..5),
        autoclear in 0..2u64,
        method in 0..3u32,
    ) {
        let magics = [BACKING_FORMAT, FEATURE_NAMES, CRYPTO, BITMAPS, DATA_FILE, 77, 0, u32::MAX];
        let mut area = Vec::new();
        for (magic, data, off) in records {
            let start = area.len();
            area.extend(extension(magics[magic], &data));
            let length = (data.len() as u32).wrapping_add_signed(off);
            area[start + 4..start + 8].copy_from_slice(&length.to_be_bytes());
        }
        let mut bytes = with_area(&area[..area.len().min(400)], None);
        bytes[88..96].copy_from_slice(&autoclear.to_be_bytes());
        bytes[32..36].copy_from_slice(&method.to_be_bytes());
        read_and_rewrite(&bytes);
    }
}
