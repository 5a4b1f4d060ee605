//! Headers whose fields are out of range or contradict each other.

use qcow2rs::ErrorKind::{self, *};

use crate::images::{Kind, MEMORY, image, open, options, verdicts};
use crate::memory::peak;
use crate::support::dissect::{Dissected, field};
use crate::support::memory_disk::MemoryDisk;

/// What is done to a header, and what opening then says: to a reader, to a writer.
type Case = (&'static str, fn(&mut Dissected), [Option<ErrorKind>; 2]);

const BAD: [Option<ErrorKind>; 2] = [Some(BadHeader); 2];
const UNSUPPORTED: [Option<ErrorKind>; 2] = [Some(UnsupportedFeature); 2];
/// A reader finds nothing wrong.
const CORRUPT: [Option<ErrorKind>; 2] = [None, Some(Corrupt)];

fn check(kind: Kind, cases: &[Case]) {
    assert_eq!(verdicts(&image(kind)), [None, None], "{kind:?} is sound to begin with");
    for (what, spoil, expected) in cases {
        let mut spoiled = image(kind);
        spoil(&mut spoiled);
        assert_eq!(verdicts(&spoiled), *expected, "{kind:?}: {what}");
    }
}

#[test]
fn fields_out_of_range() {
    use field::*;
    check(
        Kind::Standard,
        &[
            ("another magic", |i| i.put32(0, 0x5146_49fa), [Some(NotQcow2); 2]),
            ("version 0", |i| i.put32(VERSION, 0), [Some(UnsupportedVersion); 2]),
            ("version 1", |i| i.put32(VERSION, 1), [Some(UnsupportedVersion); 2]),
            ("version 4", |i| i.put32(VERSION, 4), [Some(UnsupportedVersion); 2]),
            ("version 2^31", |i| i.put32(VERSION, 1 << 31), [Some(UnsupportedVersion); 2]),
            ("clusters of 1 byte", |i| i.put32(CLUSTER_BITS, 0), BAD),
            ("clusters of 256 bytes", |i| i.put32(CLUSTER_BITS, 8), BAD),
            ("clusters of 4 MiB", |i| i.put32(CLUSTER_BITS, 22), BAD),
            ("clusters of 2^63 bytes", |i| i.put32(CLUSTER_BITS, 63), BAD),
            ("clusters of 2^64 bytes", |i| i.put32(CLUSTER_BITS, 64), BAD),
            ("clusters of 2^(2^32) bytes", |i| i.put32(CLUSTER_BITS, u32::MAX), BAD),
            ("one sector too large", |i| i.put64(SIZE, (256 << 10) + 512), BAD),
            ("size 2^63", |i| i.put64(SIZE, 1 << 63), BAD),
            ("the largest size", |i| i.put64(SIZE, u64::MAX), BAD),
            ("encryption method 3", |i| i.put32(CRYPT, 3), BAD),
            ("encrypted by AES", |i| i.put32(CRYPT, 1), [Some(Encrypted); 2]),
            ("LUKS without its header", |i| i.put32(CRYPT, 2), BAD),
            ("refcounts of 128 bits", |i| i.put32(REFCOUNT_ORDER, 7), BAD),
            ("refcounts of 2^(2^31) bits", |i| i.put32(REFCOUNT_ORDER, 1 << 31), BAD),
            ("a header of 103 bytes", |i| i.put32(HEADER_LENGTH, 103), BAD),
            ("a header without length", |i| i.put32(HEADER_LENGTH, 0), BAD),
            ("a header longer than its cluster", |i| i.put32(HEADER_LENGTH, 513), BAD),
            ("a header of 4 GiB", |i| i.put32(HEADER_LENGTH, u32::MAX), BAD),
            ("compression type 2", |i| i.put(COMPRESSION, &[2]), BAD),
            ("zstd without its bit", |i| i.put(COMPRESSION, &[1]), BAD),
            ("the bit without zstd", |i| i.put64(INCOMPATIBLE, 1 << 3), BAD),
            ("a raw data file and none", |i| i.put64(AUTOCLEAR, 1 << 1), BAD),
            ("the next feature", |i| i.put64(INCOMPATIBLE, 1 << 5), UNSUPPORTED),
            ("the last feature", |i| i.put64(INCOMPATIBLE, 1 << 63), UNSUPPORTED),
            ("all features", |i| i.put64(INCOMPATIBLE, u64::MAX), UNSUPPORTED),
            ("subclusters of 16 bytes", |i| i.put64(INCOMPATIBLE, 1 << 4), BAD),
            ("the corrupt bit", |i| i.put64(INCOMPATIBLE, 1 << 1), [None, Some(MarkedCorrupt)]),
        ],
    );
}

#[test]
fn tables_in_impossible_places() {
    use field::*;
    check(
        Kind::Snapshots,
        &[
            ("an L1 table too short", |i| i.put32(L1_SIZE, 7), BAD),
            ("no L1 table", |i| i.put32(L1_SIZE, 0), BAD),
            ("an L1 table over 32 MiB", |i| i.put32(L1_SIZE, (4 << 20) + 1), BAD),
            ("an L1 table of 32 GiB", |i| i.put32(L1_SIZE, u32::MAX), BAD),
            ("an unaligned L1 table", |i| i.put64(L1_OFFSET, 520), BAD),
            ("an L1 table that wraps around", |i| i.put64(L1_OFFSET, u64::MAX - 511), BAD),
            ("an L1 table past 2^56", |i| i.put64(L1_OFFSET, 1 << 56), BAD),
            ("an L1 table in the header", |i| i.put64(L1_OFFSET, 0), CORRUPT),
            ("no refcount table", |i| i.put32(REFTABLE_CLUSTERS, 0), BAD),
            ("a refcount table over 8 MiB", |i| i.put32(REFTABLE_CLUSTERS, (16 << 10) + 1), BAD),
            ("a refcount table of 2 TiB", |i| i.put32(REFTABLE_CLUSTERS, u32::MAX), BAD),
            ("an unaligned refcount table", |i| i.put64(REFTABLE_OFFSET, 513), BAD),
            (
                "a refcount table past 2^56",
                |i| i.put64(REFTABLE_OFFSET, (1 << 56) - 512 + 512),
                BAD,
            ),
            ("a refcount table in the header", |i| i.put64(REFTABLE_OFFSET, 0), CORRUPT),
            ("too many snapshots", |i| i.put32(SNAPSHOTS, 65537), BAD),
            ("2^32 snapshots", |i| i.put32(SNAPSHOTS, u32::MAX), BAD),
            ("an unaligned snapshot table", |i| i.put64(SNAPSHOTS_OFFSET, 8), BAD),
            ("a snapshot table that wraps around", |i| i.put64(SNAPSHOTS_OFFSET, !511), BAD),
            ("a snapshot table in the header", |i| i.put64(SNAPSHOTS_OFFSET, 0), CORRUPT),
            ("a snapshot table past the end", |i| i.put64(SNAPSHOTS_OFFSET, 1 << 40), CORRUPT),
            ("all snapshots there can be", |i| i.put32(SNAPSHOTS, 65536), CORRUPT),
        ],
    );
}

/// Puts a header extension, cut to what fits, behind the fields.
fn extend(image: &mut Dissected, magic: u32, length: u32, data: &[u8]) {
    let at = image.u32(field::HEADER_LENGTH) as usize;
    image.put32(at, magic);
    image.put32(at + 4, length);
    image.put(at + 8, data);
}

#[test]
fn extensions_that_do_not_fit() {
    const BITMAPS: u32 = 0x2385_2875;
    check(
        Kind::WideRefcounts,
        &[
            ("an unknown one past the end", |i| extend(i, 0x1234, 4096, b""), BAD),
            ("an unknown one of 4 GiB", |i| extend(i, 0x1234, u32::MAX, b""), BAD),
            ("a length whose padding wraps", |i| extend(i, 0x1234, u32::MAX - 6, b""), BAD),
            ("a backing format of 16 bytes", |i| extend(i, 0xe279_2aca, 16, &[b'x'; 16]), BAD),
            ("a feature table past the end", |i| extend(i, 0x6803_f857, 8000, b""), BAD),
            ("an encryption header", |i| extend(i, 0x0537_be77, 16, &[0; 16]), BAD),
            (
                "a feature table of one byte",
                |i| {
                    extend(i, 0x6803_f857, 1, &[0; 16]);
                },
                [None; 2],
            ),
            (
                "a feature table of one record and a byte",
                |i| {
                    extend(i, 0x6803_f857, 49, &[b'x'; 49]);
                    i.put32(100 + i.u32(field::HEADER_LENGTH) as usize, 0);
                },
                [None; 2],
            ),
            (
                "no bitmaps at all",
                |i| {
                    i.put64(field::AUTOCLEAR, 1);
                    extend(i, BITMAPS, 24, &[0; 24]);
                },
                BAD,
            ),
            (
                "a bitmap directory of 2^64 bytes",
                |i| {
                    i.put64(field::AUTOCLEAR, 1);
                    extend(i, BITMAPS, 24, &[0, 0, 0, 1, 0, 0, 0, 0]);
                    let at = i.u32(field::HEADER_LENGTH) as usize + 16;
                    i.put64(at, u64::MAX);
                    i.put64(at + 8, 4096);
                },
                BAD,
            ),
            (
                "an unaligned bitmap directory",
                |i| {
                    i.put64(field::AUTOCLEAR, 1);
                    extend(i, BITMAPS, 24, &[0, 0, 0, 1, 0, 0, 0, 0]);
                    let at = i.u32(field::HEADER_LENGTH) as usize + 16;
                    i.put64(at, 32);
                    i.put64(at + 8, 4097);
                },
                BAD,
            ),
            (
                "a bitmap directory past the end",
                |i| {
                    i.put64(field::AUTOCLEAR, 1);
                    extend(i, BITMAPS, 24, &[0, 0, 0, 1, 0, 0, 0, 0]);
                    let at = i.u32(field::HEADER_LENGTH) as usize + 16;
                    i.put64(at, 32);
                    i.put64(at + 8, 1 << 40);
                },
                CORRUPT,
            ),
        ],
    );
}

#[test]
fn files_that_end_too_early() {
    let whole = image(Kind::Standard).bytes;
    for length in (0..112).chain([511, 512, 513, 1024, 2048]) {
        let cut = Dissected::of(whole[..length].to_vec());
        // What is missing reads as zero, which is a version, too, and a length.
        let expected = match length {
            0..4 => Some(NotQcow2),
            4..8 => Some(UnsupportedVersion),
            8..104 => Some(BadHeader),
            _ => None,
        };
        assert_eq!(verdicts(&cut), [expected; 2], "{length} bytes");
    }
}

#[test]
fn a_disk_larger_than_allowed_is_refused_before_its_tables_are_read() {
    let mut huge = image(Kind::Standard);
    huge.put64(field::SIZE, 128 << 30);
    huge.put32(field::L1_SIZE, 4 << 20);
    let disk = MemoryDisk::new(&huge.bytes);
    let mut options = options(true);
    options.max_virtual_size = 1 << 30;
    let error = open(&disk, &options).err().unwrap();
    assert_eq!(error.kind(), Limit);
    assert!(disk.reads().1 <= 1024, "only the header");
}

#[test]
fn the_largest_tables_that_the_format_allows_fit_the_limit_of_the_caller() {
    // All that a header can ask for, in a file that says it has it.
    let mut greedy = image(Kind::Snapshots);
    greedy.put32(field::L1_SIZE, 4 << 20);
    greedy.put64(field::L1_OFFSET, 1 << 30);
    greedy.put32(field::REFTABLE_CLUSTERS, 16 << 10);
    greedy.put64(field::REFTABLE_OFFSET, 2 << 30);
    greedy.put32(field::SNAPSHOTS, 65536);
    greedy.put64(field::SNAPSHOTS_OFFSET, 3 << 30);
    let disk = MemoryDisk::new(&greedy.bytes).with_length(1 << 40);
    for (limit, writable) in [(1 << 20, false), (1 << 20, true), (40 << 20, true)] {
        let mut options = options(writable);
        options.max_metadata_size = limit;
        let error = open(&disk, &options).err().expect("it wants more than there is");
        assert_eq!(error.kind(), Limit, "{limit}");
    }
    // By default it may have a lot, but not much more.
    let mut options = options(true);
    options.max_metadata_size = qcow2rs::OpenOptions::new().max_metadata_size;
    let (opened, bytes) = peak(|| qcow2rs::Image::open(disk.source(), &options));
    opened.unwrap().close().unwrap();
    assert!(bytes < 4 * MEMORY, "{bytes}");
}

#[test]
fn questions_about_an_image_read_its_header_only() {
    let mut huge = image(Kind::Standard);
    huge.put64(field::SIZE, 128 << 30);
    huge.put32(field::L1_SIZE, 4 << 20);
    huge.put32(field::REFTABLE_CLUSTERS, 16 << 10);
    let disk = MemoryDisk::new(&huge.bytes);
    let mut options = options(false);
    options.check_only = true;
    let (info, bytes) = peak(|| open(&disk, &options).unwrap().info().unwrap());
    assert_eq!(info.virtual_size, 128 << 30);
    assert!(disk.reads().1 <= 1024 && bytes < 1 << 20, "{bytes} bytes");
}
