//! Random damage: bytes of headers and tables of small sound images are changed,
//! and then everything is done with the image that one can do. No panic, bounded
//! memory and work, and no guest data where metadata is.

use std::collections::BTreeSet;
use std::ops::Range;

use qcow2rs::{ErrorKind, Image};

use crate::images::{ALL, CHANGES, GUEST, Kind, MEMORY, change, image, open, options};
use crate::memory::peak;
use crate::support::dissect::{COPIED, Dissected, OFFSET, field};
use crate::support::memory_disk::{MemoryDisk, Request};
use crate::support::{Rng, describe, for_seeds};

/// Clusters that hold metadata, by what the tables say: those that are never freed
/// while the image is open, and those that the tables name now.
struct Map {
    constant: BTreeSet<u64>,
    tables: BTreeSet<u64>,
}

impl Map {
    fn of(image: &Dissected) -> Map {
        let length = image.bytes.len() as u64;
        let clusters = |range: Range<u64>| {
            let end = range.end.min(length);
            let bits = image.cluster_bits();
            range.start >> bits..end.div_ceil(1 << bits).max(range.start >> bits)
        };
        let l1 = image.l1_offset()..image.l1_offset() + image.l1_size() * 8;
        let mut constant: BTreeSet<u64> = clusters(0..1).chain(clusters(l1)).collect();
        if image.u32(field::SNAPSHOTS) > 0 {
            let (snapshots, end) = image.snapshots();
            constant.extend(clusters(image.u64(field::SNAPSHOTS_OFFSET)..end));
            for (l1, entries) in snapshots {
                constant.extend(clusters(l1..l1 + entries * 8));
            }
        }
        let entries = image.l1_size().min(length / 8);
        let aligned = |offset: &u64| *offset != 0 && offset % image.cluster_size() == 0;
        // A shared table is given up as soon as it is copied, before the L1 table in
        // the file says so.
        let tables = (0..entries)
            .map(|index| image.l1(index))
            .filter(|entry| entry & COPIED != 0)
            .map(|entry| entry & OFFSET)
            .chain(image.reftable().into_iter().map(|entry| entry & OFFSET))
            .filter(aligned)
            .map(|offset| offset >> image.cluster_bits())
            .collect();
        Map { constant, tables }
    }
}

/// Whether a cluster holds data that this test has written.
fn is_guests(image: &Dissected, cluster: u64) -> bool {
    let size = image.cluster_size();
    let start = (cluster * size).min(image.bytes.len() as u64) as usize;
    let end = (start + size as usize).min(image.bytes.len());
    image.bytes[start..end].windows(48).any(|bytes| bytes == [GUEST; 48])
}

/// Places in the file that are worth damaging: fields, and entries of tables.
fn targets(image: &Dissected) -> Vec<Range<u64>> {
    let size = image.cluster_size();
    let table = image.u64(field::REFTABLE_OFFSET);
    let mut found = vec![
        4..112,
        4..112,
        112..600,
        image.l1_offset()..image.l1_offset() + image.l1_size() * 8,
        table..table + 32,
        image.reftable()[0]..image.reftable()[0] + size.min(256),
    ];
    for index in 0..image.l1_size() {
        let l2 = image.l1(index) & OFFSET;
        if l2 != 0 {
            found.push(l2..l2 + size.min(512));
        }
    }
    let (snapshots, end) = image.snapshots();
    for (l1, entries) in snapshots {
        found.push(l1..l1 + entries * 8);
        found.push(image.u64(field::SNAPSHOTS_OFFSET)..end);
    }
    found
}

/// Changes a few bytes, bits, or whole entries, some to what is likely to hurt.
fn damage(image: &mut Dissected, rng: &mut Rng) {
    let targets = targets(image);
    let (size, length) = (image.cluster_size(), image.bytes.len() as u64);
    for _ in 0..rng.below(4) + 1 {
        let range = &targets[rng.below(targets.len() as u64) as usize];
        let at = (range.start + rng.below(range.end - range.start)) as usize;
        let entry = at & !7;
        let cluster = rng.below(length / size + 4) * size;
        match rng.below(8) {
            0 => image.put(at, &[rng.next() as u8]),
            1 => {
                let byte = image.bytes[at] ^ 1 << rng.below(8);
                image.put(at, &[byte]);
            }
            2 => image.put64(entry, cluster | 1 << 63),
            3 => image.put64(entry, cluster),
            4 => {
                let other = &targets[rng.below(targets.len() as u64) as usize];
                image.put64(entry, other.start & !(size - 1) | rng.below(2) << 63);
            }
            5 => {
                let extremes = [0, u64::MAX, 1 << 63, 1 << 62, (1 << 56) - size, 1 << 32];
                image.put64(entry, extremes[rng.below(6) as usize]);
            }
            6 => image.put32(at & !3, [0, 1, u32::MAX, 1 << 31][rng.below(4) as usize]),
            _ => {
                let mut bytes = [0; 16];
                rng.fill(&mut bytes);
                image.put(at, &bytes);
            }
        }
    }
}

/// Does everything, anywhere. Errors are fine; what follows them must agree.
fn use_it(image: &Image, rng: &mut Rng) {
    let size = image.size().min(1 << 20);
    let (mut corrupt, writable) = (false, image.info().unwrap().writable);
    let mut buf = vec![0; 64 << 10];
    for _ in 0..40 {
        let at = rng.below(size.max(1));
        let len = (1 << rng.below(16)).min(size - at.min(size));
        let at = if rng.below(2) == 0 { at } else { at & !4095 };
        let done = match rng.below(9) {
            kind @ 0..=6 if len > 1 => change(image, CHANGES[(kind % 5) as usize], at, len),
            7 => image.flush(),
            _ => image.read_at(&mut buf[..len as usize], at),
        };
        match done.map_err(|error| error.kind()) {
            Err(ErrorKind::Corrupt) => corrupt = true,
            Err(ErrorKind::Shutdown) => assert!(corrupt, "nothing was wrong before"),
            Err(ErrorKind::ReadOnly) => assert!(!writable),
            Err(ErrorKind::InvalidArgument) => assert!(at + len > image.size()),
            Ok(())
            | Err(
                ErrorKind::DataLost
                | ErrorKind::NoSpace
                | ErrorKind::Callback(_)
                | ErrorKind::Os(_),
            ) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    let mut at = 0;
    while at < size {
        let piece = (size - at).min(64 << 10);
        let _ = image.read_at(&mut buf[..piece as usize], at);
        at += piece;
    }
    let _ = image.block_status(0, size, false, 1000, &mut |_| {});
    image.info_json().unwrap();
}

fn try_one(kind: Kind, rng: &mut Rng) {
    let mut spoiled = image(kind);
    damage(&mut spoiled, rng);
    let disk = MemoryDisk::new(&spoiled.bytes);
    if let Ok(reader) = open(&disk, &options(false)) {
        use_it(&reader, rng);
        assert_eq!(disk.writes(), 0, "a reader has written");
    }
    let disk = MemoryDisk::new(&spoiled.bytes);
    let Ok(image) = open(&disk, &options(true)) else { return };
    let (_, bytes) = peak(|| {
        use_it(&image, rng);
        let _ = image.close();
    });
    assert!(bytes < MEMORY, "{bytes} bytes of memory");
    assert!(disk.reads().0 < 50_000, "{} reads", disk.reads().0);

    let before = Map::of(&spoiled);
    let after = Dissected::of(disk.bytes());
    let now = Map::of(&after);
    let hit = |cluster: &&u64| is_guests(&after, **cluster);
    if let Some(cluster) = before.constant.iter().chain(&now.tables).find(hit) {
        panic!("guest data in cluster {cluster}, which holds metadata");
    }
}

#[test]
fn damaged_images_do_no_harm() {
    for_seeds("hostile", 40, |seed| {
        for (number, kind) in ALL.into_iter().enumerate() {
            let mut rng = Rng::new(seed * 100 + number as u64);
            describe(format!("{kind:?}"), || {
                for _ in 0..6 {
                    try_one(kind, &mut rng);
                }
            });
        }
    });
}

#[test]
fn storage_that_answers_differently_each_time_does_no_harm() {
    for_seeds("hostile", 40, |seed| {
        for (number, kind) in ALL.into_iter().enumerate() {
            let mut rng = Rng::new(seed * 100 + number as u64);
            let sound = image(kind);
            let targets = targets(&sound);
            let noise = std::sync::Mutex::new(rng.clone());
            let lie = move |request: Request<'_>| {
                let Request::Read(answer, offset) = request else { return Ok(()) };
                let mut noise = noise.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                for range in &targets {
                    if noise.below(3) > 0 {
                        continue;
                    }
                    let at = range.start + noise.below(range.end - range.start);
                    let inside = at.checked_sub(offset).filter(|at| *at < answer.len() as u64);
                    if let Some(at) = inside {
                        answer[at as usize] ^= 1 << noise.below(8);
                    }
                }
                Ok(())
            };
            let disk = MemoryDisk::with_hook(&sound.bytes, lie);
            describe(format!("{kind:?}"), || {
                for writable in [false, true] {
                    let mut options = options(writable);
                    // Slices are read again and again.
                    options.set("l2-cache-size", "1k").unwrap();
                    options.set("l2-cache-entry-size", "512").unwrap();
                    let Ok(image) = Image::open(disk.source(), &options) else { continue };
                    use_it(&image, &mut rng);
                    let _ = image.close();
                }
                assert!(disk.reads().0 < 50_000, "{} reads", disk.reads().0);
            });
        }
    });
}
