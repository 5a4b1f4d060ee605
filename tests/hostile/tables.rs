//! Entries of L1, L2 and refcount tables that lead where they must not.

use qcow2rs::{ErrorKind, Image, WriteFlags};

use crate::images::{ALL, CHANGES, GUEST, Kind, change, image, open, options};
use crate::support::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, field};
use crate::support::memory_disk::MemoryDisk;

/// Places that a guest must never write to: name and range of the file.
fn metadata(image: &Dissected) -> Vec<(&'static str, std::ops::Range<u64>)> {
    let size = image.cluster_size();
    let table = image.u64(field::REFTABLE_OFFSET);
    let mut found = vec![
        ("the L1 table", image.l1_offset()..image.l1_offset() + image.l1_size() * 8),
        ("an L2 table", image.l1(0) & OFFSET..(image.l1(0) & OFFSET) + size),
        ("the refcount table", table..table + size),
        ("a refcount block", image.reftable()[0]..image.reftable()[0] + size),
    ];
    let (snapshots, end) = image.snapshots();
    if let Some((l1, entries)) = snapshots.first() {
        found.push(("the snapshot table", image.u64(field::SNAPSHOTS_OFFSET)..end));
        found.push(("the L1 table of a snapshot", *l1..l1 + entries * 8));
    }
    found
}

/// Whether that metadata changes when the entry of the [`victim`] does.
fn is_on_the_way(kind: Kind, image: &Dissected, name: &str) -> bool {
    match name {
        "an L2 table" if image.l1_size() == 1 => true,
        // The L2 table is shared: it is copied first.
        "the L1 table" | "an L2 table" | "a refcount block" => kind == Kind::Snapshots,
        _ => false,
    }
}

/// A guest cluster that is stored, and not in the first L2 table.
fn victim(image: &Dissected) -> u64 {
    let from = if image.l1_size() > 1 { image.l2_entries() } else { 0 };
    (from..image.guest_clusters())
        .find(|cluster| {
            image.entry(*cluster).0 & COMPRESSED == 0 && image.entry(*cluster).0 & OFFSET != 0
        })
        .unwrap()
}

/// The entry of a guest cluster at `host`, as if it were all right.
fn aim(image: &mut Dissected, cluster: u64, host: u64) {
    image.set_entry(cluster, (host | COPIED, 0xffff_ffff));
}

fn range<'a>(bytes: &'a [u8], range: &std::ops::Range<u64>) -> &'a [u8] {
    &bytes[range.start as usize..range.end as usize]
}

#[test]
fn guest_writes_never_reach_metadata() {
    for kind in ALL {
        for (name, place) in metadata(&image(kind)) {
            for what in CHANGES {
                let mut spoiled = image(kind);
                let cluster = victim(&spoiled);
                aim(&mut spoiled, cluster, place.start);
                let disk = MemoryDisk::new(&spoiled.bytes);
                let image = open(&disk, &options(true)).unwrap();
                let size = spoiled.cluster_size();
                let done = change(&image, what, cluster * size, size);
                if what.starts_with("write") {
                    let kind = done.expect_err(name).kind();
                    assert_eq!(kind, ErrorKind::Corrupt, "{name}, {what}");
                    let again = image.write_at(&[GUEST], 0, WriteFlags::default());
                    assert_eq!(again.unwrap_err().kind(), ErrorKind::Shutdown);
                    let marked = Dissected::of(disk.bytes()).is_marked_corrupt();
                    assert_eq!(marked, spoiled.version() > 2);
                }
                let _ = image.flush();
                let _ = image.close();
                let after = disk.bytes();
                let entry_changed = !what.starts_with("write");
                if entry_changed && is_on_the_way(kind, &spoiled, name) {
                    continue;
                }
                assert!(
                    range(&after, &place) == range(&spoiled.bytes, &place),
                    "{kind:?}: {what} has changed {name}"
                );
            }
        }
    }
}

#[test]
fn clusters_of_metadata_are_never_given_out() {
    for kind in ALL {
        let mut places = metadata(&image(kind));
        places.push(("the header", 0..image(kind).cluster_size()));
        for (name, place) in places {
            let mut spoiled = image(kind);
            let host = place.start / spoiled.cluster_size();
            // Nothing else is free below it.
            for cluster in 0..spoiled.bytes.len() as u64 / spoiled.cluster_size() {
                let count = spoiled.refcount(cluster);
                spoiled.set_refcount(cluster, if cluster == host { 0 } else { count.max(1) });
            }
            let disk = MemoryDisk::new(&spoiled.bytes);
            let image = open(&disk, &options(true)).unwrap();
            let empty = image.size() / 4 * 3;
            let error = image.write_at(&[GUEST; 512], empty, WriteFlags::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{kind:?}: {name}: {error}");
            let _ = image.close();
            let (mut after, mut before) = (disk.bytes(), spoiled.bytes);
            if name == "the header" {
                // It says that the image is corrupt.
                after[field::INCOMPATIBLE..field::COMPATIBLE].fill(0);
                before[field::INCOMPATIBLE..field::COMPATIBLE].fill(0);
            }
            assert!(range(&after, &place) == range(&before, &place), "{kind:?}: {name}");
        }
    }
}

#[test]
fn a_table_that_an_entry_names_as_data_is_not_freed_with_the_entry() {
    for kind in ALL {
        for (name, place) in metadata(&image(kind)) {
            for what in ["zero and unmap", "discard"] {
                let mut spoiled = image(kind);
                let cluster = victim(&spoiled);
                aim(&mut spoiled, cluster, place.start);
                let disk = MemoryDisk::new(&spoiled.bytes);
                let image = open(&disk, &options(true)).unwrap();
                let size = spoiled.cluster_size();
                change(&image, what, cluster * size, size).unwrap();
                let error = image.flush().expect_err(name);
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{kind:?}: {name}");
                let _ = image.close();
                let host = place.start / size;
                assert_eq!(Dissected::of(disk.bytes()).refcount(host), spoiled.refcount(host));
            }
        }
    }
}

#[test]
fn a_table_that_two_l1_entries_share_stays_one_when_the_first_is_copied() {
    let mut spoiled = image(Kind::Standard);
    let table = spoiled.l1(0) & OFFSET;
    spoiled.put64(spoiled.l1_at(0), table);
    spoiled.put64(spoiled.l1_at(1), table);
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(true)).unwrap();
    image.write_at(&[GUEST; 512], 0, WriteFlags::default()).unwrap();
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Corrupt);
    let _ = image.close();
    let place = table..table + spoiled.cluster_size();
    assert!(range(&disk.bytes(), &place) == range(&spoiled.bytes, &place));
    assert_eq!(Dissected::of(disk.bytes()).refcount(table / 512), 1);
}

/// What reading says of an entry, and what writing does.
fn reads(spoiled: &Dissected, cluster: u64) -> Result<Vec<u8>, ErrorKind> {
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(false)).unwrap();
    let mut data = vec![0xee; spoiled.cluster_size() as usize];
    let read = image.read_at(&mut data, cluster * spoiled.cluster_size());
    assert_eq!(disk.writes(), 0);
    read.map(|()| data).map_err(|error| error.kind())
}

/// A write fails, and not a byte of the file but the corrupt bit changes.
fn refuses_writes(spoiled: &Dissected, cluster: u64) {
    for what in CHANGES {
        let disk = MemoryDisk::new(&spoiled.bytes);
        let image = open(&disk, &options(true)).unwrap();
        let size = spoiled.cluster_size();
        let error = change(&image, what, cluster * size, size).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Shutdown);
        let _ = image.close();
        let mut after = Dissected::of(disk.bytes());
        if spoiled.version() > 2 {
            assert!(after.is_marked_corrupt());
            after.put64(field::INCOMPATIBLE, spoiled.incompatible());
        }
        assert!(after.bytes[..spoiled.bytes.len()] == spoiled.bytes[..], "{what}");
    }
}

#[test]
fn l2_entries_that_contradict_themselves() {
    let mut unaligned = image(Kind::WideRefcounts);
    let host = unaligned.host(3);
    unaligned.set_entry(3, ((host + 512) | COPIED, 0));
    let mut zero_in_version_2 = image(Kind::Version2);
    let entry = zero_in_version_2.entry(3);
    zero_in_version_2.set_entry(3, (entry.0 | 1, 0));
    let mut both = image(Kind::Extended);
    let entry = both.entry(3);
    both.set_entry(3, (entry.0, entry.1 | 1 << 63));
    let mut homeless = image(Kind::Extended);
    homeless.set_entry(3, (0, 1 << 31));
    for spoiled in [unaligned, zero_in_version_2, both, homeless] {
        assert_eq!(reads(&spoiled, 3), Err(ErrorKind::Corrupt));
        refuses_writes(&spoiled, 3);
        // Its neighbours are all right.
        assert!(reads(&spoiled, 2).is_ok() && reads(&spoiled, 4).is_ok());
    }
}

#[test]
fn reserved_bits_stop_nobody() {
    for kind in [Kind::Standard, Kind::Extended] {
        let mut spoiled = image(kind);
        let sound = reads(&spoiled, 1).unwrap();
        let entry = spoiled.entry(1);
        spoiled.set_entry(1, (entry.0 | 0x3f00_0000_0000_01fe, entry.1));
        let l1 = spoiled.l1(0);
        spoiled.put64(spoiled.l1_at(0), l1 | 0x7f00_0000_0000_01ff);
        assert!(reads(&spoiled, 1).unwrap() == sound, "{kind:?}");
    }
}

#[test]
fn l1_entries_in_the_middle_of_a_cluster() {
    let mut spoiled = image(Kind::WideRefcounts);
    let l1 = spoiled.l1(0);
    spoiled.put64(spoiled.l1_at(0), l1 + 512);
    assert_eq!(reads(&spoiled, 3), Err(ErrorKind::Corrupt));
    refuses_writes(&spoiled, 3);
}

#[test]
fn l1_entries_that_name_other_metadata() {
    for kind in [Kind::Standard, Kind::Snapshots, Kind::Extended] {
        for (name, place) in metadata(&image(kind)) {
            if name == "an L2 table" {
                continue;
            }
            let mut spoiled = image(kind);
            spoiled.put64(spoiled.l1_at(0), place.start | COPIED);
            let disk = MemoryDisk::new(&spoiled.bytes);
            let image = open(&disk, &options(true)).unwrap();
            // Whatever the entries look like: nothing comes of it.
            for cluster in 0..spoiled.l2_entries().min(64) {
                for what in CHANGES {
                    let size = spoiled.cluster_size();
                    let _ = change(&image, what, cluster * size, size);
                }
                let _ = image.flush();
            }
            let _ = image.close();
            let after = disk.bytes();
            // Refcounts, and the L1 table's other entries, change as they should.
            let touched = range(&after, &place).windows(16).any(|bytes| bytes == [GUEST; 16]);
            assert!(!touched, "{kind:?}: {name} as an L2 table");
            if name != "a refcount block" {
                assert!(range(&after, &place) == range(&spoiled.bytes, &place), "{kind:?}: {name}");
            }
        }
    }
}

#[test]
fn a_refcount_block_that_is_other_metadata_is_not_written() {
    for kind in ALL {
        for (name, place) in metadata(&image(kind)) {
            if name == "a refcount block" {
                continue;
            }
            let mut spoiled = image(kind);
            let table = spoiled.u64(field::REFTABLE_OFFSET) as usize;
            spoiled.put64(table, place.start);
            let disk = MemoryDisk::new(&spoiled.bytes);
            let image = open(&disk, &options(true)).unwrap();
            let empty = image.size() / 4 * 3;
            let _ = image.write_at(&[GUEST; 512], empty, WriteFlags::default());
            let error = image.flush().expect_err(name);
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Shutdown), "{error}");
            let _ = image.close();
            let after = disk.bytes();
            assert!(range(&after, &place) == range(&spoiled.bytes, &place), "{kind:?}: {name}");
        }
    }
}

#[test]
fn refcount_blocks_in_impossible_places() {
    for (what, entry) in [("unaligned", 0x10200), ("in the header", 0)] {
        let mut spoiled = image(Kind::WideRefcounts);
        let table = spoiled.u64(field::REFTABLE_OFFSET) as usize;
        spoiled.put64(table, entry);
        let disk = MemoryDisk::new(&spoiled.bytes);
        let image = open(&disk, &options(true)).unwrap();
        let empty = image.size() / 4 * 3;
        let error = image.write_at(&[GUEST; 512], empty, WriteFlags::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
    }
}

#[test]
fn a_refcount_block_that_counts_twice_is_refused() {
    let mut spoiled = image(Kind::Standard);
    let table = spoiled.u64(field::REFTABLE_OFFSET) as usize;
    let first = spoiled.u64(table);
    spoiled.put64(table + 8, first);
    let verdicts = crate::images::verdicts(&spoiled);
    assert_eq!(verdicts, [None, Some(ErrorKind::Corrupt)]);
}

#[test]
fn what_lies_past_the_end_reads_as_zero() {
    for kind in [Kind::Standard, Kind::Extended, Kind::Version2] {
        for host in [1 << 30, 1 << 55, OFFSET & !0xffff] {
            let mut spoiled = image(kind);
            aim(&mut spoiled, 1, host);
            assert!(
                reads(&spoiled, 1).unwrap().iter().all(|byte| *byte == 0),
                "{kind:?} {host:#x}"
            );
            let mut spoiled = image(kind);
            spoiled.put64(spoiled.l1_at(0), host | COPIED);
            assert!(
                reads(&spoiled, 1).unwrap().iter().all(|byte| *byte == 0),
                "{kind:?} {host:#x}"
            );
            // Writing there works, or says that it does not.
            let disk = MemoryDisk::new(&spoiled.bytes);
            let image = open(&disk, &options(true)).unwrap();
            for what in CHANGES {
                let _ = change(&image, what, 0, spoiled.cluster_size());
            }
            let _ = image.close();
        }
    }
}

#[test]
fn tables_that_contain_themselves_lead_nowhere() {
    // The L1 table's first L2 table is the L1 table, whose first entry is a cluster
    // of data that is the L1 table, ...
    let mut spoiled = image(Kind::Standard);
    let l1 = spoiled.l1_offset();
    for index in 0..spoiled.l1_size() {
        spoiled.put64(spoiled.l1_at(index), l1 | COPIED);
    }
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(false)).unwrap();
    let mut all = vec![0; image.size() as usize];
    image.read_at(&mut all, 0).unwrap();
    let mut extents = 0;
    image.block_status(0, image.size(), false, 10_000, &mut |_| extents += 1).unwrap();
    assert!(extents > 0 && disk.reads().0 < 2000, "{:?}", disk.reads());
    check_unharmed(&spoiled, |image| {
        for at in (0..image.size()).step_by(512) {
            let _ = image.write_at(&[GUEST; 512], at, WriteFlags::default());
        }
    });
}

/// No guest data in the first clusters, whatever is done.
fn check_unharmed(spoiled: &Dissected, work: impl FnOnce(&Image)) {
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(true)).unwrap();
    work(&image);
    let _ = image.close();
    let after = disk.bytes();
    for (name, place) in metadata(spoiled) {
        let touched = range(&after, &place).windows(16).any(|bytes| bytes == [GUEST; 16]);
        assert!(!touched, "{name}");
    }
}
