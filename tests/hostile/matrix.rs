//! Damage that can be seen, in images of every cluster size, width of refcounts,
//! version, and kind of entry: who meets it gets an error, everybody else their data;
//! the image stays as it was, but for the mark that says it is corrupt.

use std::ops::Range;

use qcow2rs::{ErrorKind, Image, WriteFlags, ZeroFlags};

use crate::images::{CHANGES, change, open, options};
use crate::support::builder::{Cluster, Kind, build};
use crate::support::describe;
use crate::support::dissect::{COMPRESSED, COPIED, Dissected, field};
use crate::support::memory_disk::MemoryDisk;

/// Clusters of the virtual disk, in one L2 table where clusters are not tiny.
const CLUSTERS: u64 = 80;
/// A cluster with data, which is damaged.
const VICTIM: u64 = 5;

fn kinds() -> Vec<Kind> {
    let tiny = Kind { size: 0, ..Kind::PLAIN };
    let mut kinds = Vec::new();
    for cluster in [512, 4096, 64 << 10] {
        kinds.push(Kind { version: 2, cluster, ..tiny });
        kinds.extend([1, 4, 16, 64].map(|refcount_bits| Kind { cluster, refcount_bits, ..tiny }));
    }
    for (cluster, refcount_bits) in [(16 << 10, 1), (16 << 10, 64), (64 << 10, 16)] {
        kinds.push(Kind { cluster, extended_l2: true, refcount_bits, ..tiny });
    }
    kinds.iter().map(|kind| Kind { size: CLUSTERS * kind.cluster, ..*kind }).collect()
}

/// What a cluster reads as before anything is damaged.
fn byte(cluster: u64) -> u8 {
    if cluster % 4 == 3 { 0 } else { cluster as u8 + 1 }
}

fn image(kind: &Kind) -> Dissected {
    let alloc = if kind.extended_l2 { u32::MAX } else { 1 };
    Dissected::of(build(*kind, |index| {
        let bytes = vec![byte(index); kind.cluster as usize];
        match index % 4 {
            3 => Cluster::Nothing,
            2 => Cluster::Compressed(bytes),
            _ => Cluster::Data { bytes, alloc, zero: 0 },
        }
    }))
}

/// Where there is something wrong, and what reading there says.
type Harm = (Range<u64>, ErrorKind);

/// A kind of damage: its name, and how it is done, where the format has it.
type Damage = (&'static str, fn(&mut Dissected) -> Option<Harm>);

/// All that can be told from what is sound.
const DAMAGES: [Damage; 9] = [
    ("an entry in the middle of a cluster", |image| {
        let (descriptor, bitmap) = image.entry(VICTIM);
        (image.cluster_size() > 512)
            .then(|| image.set_entry(VICTIM, (descriptor + 512, bitmap)))?;
        Some((VICTIM..VICTIM + 1, ErrorKind::Corrupt))
    }),
    ("an L1 entry in the middle of a cluster", |image| {
        let entry = image.l1(0);
        (image.cluster_size() > 512).then(|| image.put64(image.l1_at(0), entry + 512))?;
        Some((0..image.l2_entries(), ErrorKind::Corrupt))
    }),
    ("a subcluster that is stored and zero", |image| {
        let (descriptor, bitmap) = image.entry(VICTIM);
        image.extended_l2().then(|| image.set_entry(VICTIM, (descriptor, bitmap | 1 << 37)))?;
        Some((VICTIM..VICTIM + 1, ErrorKind::Corrupt))
    }),
    ("a subcluster that is stored nowhere", |image| {
        image.extended_l2().then(|| image.set_entry(VICTIM, (0, 1 << 31)))?;
        Some((VICTIM..VICTIM + 1, ErrorKind::Corrupt))
    }),
    ("a zero cluster in version 2", |image| {
        let (descriptor, _) = image.entry(VICTIM);
        (image.version() == 2).then(|| image.set_entry(VICTIM, (descriptor | 1, 0)))?;
        Some((VICTIM..VICTIM + 1, ErrorKind::Corrupt))
    }),
    ("compressed data in the header", |image| {
        image.set_entry(VICTIM, (COMPRESSED, 0));
        Some((VICTIM..VICTIM + 1, ErrorKind::Corrupt))
    }),
    ("compressed data that is none", |image| {
        // A block of a type that does not exist.
        let host = image.host(VICTIM);
        image.put(host as usize, &[0xff; 300]);
        image.set_entry(VICTIM, (COMPRESSED | host, 0));
        Some((VICTIM..VICTIM + 1, ErrorKind::DataLost))
    }),
    ("compressed data past the end", |image| {
        let end = (image.bytes.len() as u64).next_multiple_of(512);
        image.set_entry(VICTIM, (COMPRESSED | end, 0));
        Some((VICTIM..VICTIM + 1, ErrorKind::DataLost))
    }),
    ("compressed data that ends too early", |image| {
        let (descriptor, _) = image.entry(6);
        let (at, _) = image.compressed(descriptor);
        // A last, empty block.
        image.put(at as usize, &[3, 0]);
        let packed = (0..CLUSTERS).filter(|cluster| {
            let entry = image.entry(*cluster).0;
            entry & COMPRESSED != 0 && image.compressed(entry).0 == at
        });
        assert_eq!(packed.count(), 1);
        Some((6..7, ErrorKind::DataLost))
    }),
];

/// Each cluster reads as it should, or not at all.
fn read_all(image: &Image, size: u64, harm: &Harm) {
    let mut buf = vec![0xee; size as usize];
    for cluster in 0..CLUSTERS {
        let done = image.read_at(&mut buf, cluster * size).map_err(|error| error.kind());
        if harm.0.contains(&cluster) {
            assert_eq!(done, Err(harm.1), "cluster {cluster}");
        } else {
            assert_eq!(done, Ok(()), "cluster {cluster}");
            assert!(buf.iter().all(|read| *read == byte(cluster)), "cluster {cluster}");
        }
    }
    // One request for all of it fails, rather than be short.
    let all = image.read_at(&mut vec![0; (CLUSTERS * size) as usize], 0);
    assert_eq!(all.map_err(|error| error.kind()), Err(harm.1));
}

/// The same but for the corrupt bit, which is there if `corrupt` and there can be one.
fn assert_untouched(before: &Dissected, after: Vec<u8>, corrupt: bool) {
    let mut after = Dissected::of(after);
    if corrupt && before.version() > 2 {
        assert!(after.is_marked_corrupt());
        let bits = after.incompatible() & !2;
        after.put64(field::INCOMPATIBLE, bits);
    }
    assert!(after.bytes == before.bytes, "the image was changed");
}

#[test]
fn who_meets_damage_gets_an_error_and_everybody_else_their_data() {
    for kind in kinds() {
        let size = kind.cluster;
        for (name, damage) in DAMAGES {
            let mut spoiled = image(&kind);
            let Some(harm) = damage(&mut spoiled) else { continue };
            describe(format!("{kind:?}, {name}"), || {
                let disk = MemoryDisk::new(&spoiled.bytes);
                let reader = open(&disk, &options(false)).unwrap();
                read_all(&reader, size, &harm);
                assert_eq!(disk.writes(), 0, "a reader has written");
                let corrupt = harm.1 == ErrorKind::Corrupt;
                for what in CHANGES {
                    let disk = MemoryDisk::new(&spoiled.bytes);
                    let image = open(&disk, &options(true)).unwrap();
                    // Data that is lost can be replaced, as a whole.
                    if !corrupt && what != "write a part" {
                        change(&image, what, harm.0.start * size, size).unwrap();
                        // What was past the end is not counted: that shows as it goes.
                        if let Err(error) = image.close() {
                            assert_eq!(error.kind(), ErrorKind::Corrupt);
                            assert!(name.ends_with("past the end"));
                        }
                        continue;
                    }
                    let error = change(&image, what, harm.0.start * size, size).unwrap_err();
                    assert_eq!(error.kind(), harm.1, "{what}");
                    if corrupt {
                        // From then on it is not written to.
                        for what in CHANGES {
                            let again = change(&image, what, 0, size).unwrap_err().kind();
                            assert!([ErrorKind::Shutdown, harm.1].contains(&again), "{what}");
                        }
                        read_all(&image, size, &harm);
                        assert!(image.close().is_err());
                        assert_untouched(&spoiled, disk.bytes(), true);
                    }
                }
            });
        }
    }
}

#[test]
fn refcounts_that_make_no_sense_stop_what_needs_them_and_nothing_else() {
    for kind in kinds() {
        let size = kind.cluster;
        let sound = image(&kind);
        let table = sound.u64(field::REFTABLE_OFFSET) as usize;
        for (name, entry) in [("unaligned", sound.reftable()[0] + 512), ("missing", 0)] {
            if name == "unaligned" && size == 512 {
                continue;
            }
            let mut spoiled = sound.clone();
            spoiled.put64(table, entry);
            describe(format!("{kind:?}, a refcount block is {name}"), || {
                let disk = MemoryDisk::new(&spoiled.bytes);
                let Ok(image) = open(&disk, &options(true)) else {
                    return assert_untouched(&spoiled, disk.bytes(), false);
                };
                let mut buf = vec![0; size as usize];
                for cluster in 0..CLUSTERS {
                    image.read_at(&mut buf, cluster * size).unwrap();
                    assert!(buf.iter().all(|read| *read == byte(cluster)));
                }
                // Nothing is allocated.
                let error = image.write_at(&[1; 512], 3 * size, WriteFlags::default()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                let zero = image.write_zeroes(0, size, ZeroFlags::default()).unwrap_err();
                assert_eq!(zero.kind(), ErrorKind::Shutdown);
                assert!(image.close().is_err());
                assert_untouched(&spoiled, disk.bytes(), true);
            });
        }
    }
    // The entry that is right in all of them.
    assert_eq!(image(&kinds()[0]).entry(VICTIM).0 & COPIED, COPIED);
}
