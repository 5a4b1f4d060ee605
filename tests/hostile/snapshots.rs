//! Snapshot tables and bitmap directories that lie.

use qcow2rs::{ErrorKind, WriteFlags};

use crate::images::{GUEST, Kind, image, open, options, verdicts};
use crate::support::dissect::{COPIED, Dissected, OFFSET, field};
use crate::support::memory_disk::MemoryDisk;

/// Snapshots that have nothing but an L1 table: `entries` at `offset`, the next at
/// the next 32 MiB.
fn claim(image: &mut Dissected, count: u32, offset: u64, entries: u32) {
    let at = image.bytes.len().next_multiple_of(512);
    image.put32(field::SNAPSHOTS, count);
    image.put64(field::SNAPSHOTS_OFFSET, at as u64);
    image.put(at, &vec![0; count as usize * 40]);
    for number in 0..count as usize {
        image.put64(at + number * 40, offset + ((number as u64) << 25));
        image.put32(at + number * 40 + 8, entries);
    }
}

#[test]
fn snapshots_cannot_claim_more_memory_than_the_caller_allows() {
    let mut spoiled = image(Kind::Standard);
    // 2^32 clusters of 512 bytes, by a table of 2.6 MB.
    claim(&mut spoiled, 65536, 1 << 40, 4 << 20);
    let disk = MemoryDisk::new(&spoiled.bytes);
    let mut options = options(true);
    options.max_metadata_size = 16 << 20;
    let error = open(&disk, &options).err().expect("there is no room for all that");
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
    // A reader does not look at them.
    options.writable = false;
    open(&disk, &options).unwrap().close().unwrap();
}

#[test]
fn a_long_table_of_small_snapshots_is_read_once() {
    let mut sound = image(Kind::Standard);
    claim(&mut sound, 65536, 0, 0);
    let disk = MemoryDisk::new(&sound.bytes).with_length(1 << 40);
    open(&disk, &options(true)).unwrap().close().unwrap();
    let (_, bytes) = disk.reads();
    assert!(bytes < 6 << 20, "{bytes} bytes for 65536 entries of 40");
}

#[test]
fn entries_that_pass_the_limits() {
    let at = |image: &Dissected| image.u64(field::SNAPSHOTS_OFFSET) as usize;
    let corrupt = [None, Some(ErrorKind::Corrupt)];
    type Spoil = fn(&mut Dissected, usize);
    let cases: [(&str, Spoil); 6] = [
        ("an L1 table over 32 MiB", |i, at| i.put32(at + 8, (4 << 20) + 1)),
        ("an L1 table of 32 GiB", |i, at| i.put32(at + 8, u32::MAX)),
        ("an L1 table past 2^56", |i, at| i.put64(at, 1 << 56)),
        ("an L1 table that wraps around", |i, at| i.put64(at, u64::MAX - 7)),
        ("extra data over 1 KiB", |i, at| i.put32(at + 36, 1025)),
        ("extra data of 4 GiB", |i, at| i.put32(at + 36, u32::MAX)),
    ];
    for (what, spoil) in cases {
        let mut spoiled = image(Kind::Snapshots);
        let at = at(&spoiled);
        spoil(&mut spoiled, at);
        assert_eq!(verdicts(&spoiled), corrupt, "{what}");
    }
    // A name that goes on past the end of the file.
    let mut spoiled = image(Kind::Snapshots);
    let at = at(&spoiled);
    spoiled.bytes.truncate(at + 100);
    spoiled.put(at + 12, &[0xff; 4]);
    assert_eq!(verdicts(&spoiled), corrupt);
}

#[test]
fn a_table_of_64_mebibytes_is_the_largest() {
    // 507 entries with the longest names fit; the next passes the limit.
    for (count, verdict) in [(507, None), (508, Some(ErrorKind::Corrupt))] {
        let mut spoiled = image(Kind::Standard);
        let (at, entry) = (spoiled.bytes.len().next_multiple_of(512), 40 + 1024 + 2 * 65535 + 2);
        spoiled.put32(field::SNAPSHOTS, count);
        spoiled.put64(field::SNAPSHOTS_OFFSET, at as u64);
        let mut disk = spoiled.bytes.clone();
        disk.resize(at + count as usize * entry, 0);
        for number in 0..count as usize {
            let at = at + number * entry;
            disk[at + 12..at + 16].fill(0xff);
            disk[at + 36..at + 40].copy_from_slice(&1024u32.to_be_bytes());
        }
        let disk = MemoryDisk::new(&disk);
        let opened = qcow2rs::Image::open(disk.source(), &options(true));
        assert_eq!(opened.err().map(|error| error.kind()), verdict, "{count}");
    }
}

/// Where the fields of the bitmaps extension are.
fn bitmaps(image: &Dissected) -> usize {
    let magic = 0x2385_2875u32.to_be_bytes();
    image.bytes.windows(4).position(|bytes| bytes == magic).unwrap() + 8
}

#[test]
fn a_bitmap_directory_longer_than_its_entries_is_not_even_read() {
    let mut spoiled = image(Kind::Bitmap);
    let at = bitmaps(&spoiled);
    spoiled.put64(at + 8, 60 << 20);
    assert_eq!(verdicts(&spoiled), [None, Some(ErrorKind::Corrupt)]);
    // As many entries as there can be, and no room for them.
    spoiled.put32(at, 65535);
    assert_eq!(verdicts(&spoiled), [None, Some(ErrorKind::Limit)]);
}

#[test]
fn the_bitmap_directory_is_metadata() {
    let mut spoiled = image(Kind::Bitmap);
    let directory = spoiled.u64(bitmaps(&spoiled) + 16);
    let before = spoiled.bytes[directory as usize..][..32].to_vec();
    spoiled.set_entry(0, (directory | COPIED, 0));
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(true)).unwrap();
    let error = image.write_at(&[GUEST; 512], 0, WriteFlags::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let _ = image.close();
    assert_eq!(disk.bytes()[directory as usize..][..32], before);
}

#[test]
fn the_tables_of_snapshots_are_left_alone() {
    // Everything is written to; the snapshots keep what they had.
    let sound = image(Kind::Snapshots);
    let disk = MemoryDisk::new(&sound.bytes);
    let image = open(&disk, &options(true)).unwrap();
    image.write_at(&vec![GUEST; image.size() as usize], 0, WriteFlags::default()).unwrap();
    image.close().unwrap();
    let after = Dissected::of(disk.bytes());
    let (snapshots, _) = sound.snapshots();
    assert!(!snapshots.is_empty());
    for (l1, entries) in snapshots {
        for index in 0..entries {
            let at = (l1 + index * 8) as usize;
            assert_eq!(sound.u64(at) & OFFSET, after.u64(at) & OFFSET);
            let table = sound.u64(at) & OFFSET;
            if table != 0 {
                assert!(sound.table(table).eq(after.table(table)));
            }
        }
    }
}
