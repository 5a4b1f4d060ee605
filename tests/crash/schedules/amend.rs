//! Amending: power may be lost, and every operation may fail, at each step. The header
//! is the old one or the new one, refcounts are exact by either, and the disk and its
//! snapshots hold what they held.

use std::ops::ControlFlow;

use qcow2rs::image::Disk;
use qcow2rs::image::handle::Replacement;
use qcow2rs::io::engine::Target;
use qcow2rs::io::sim::{
    Crash, Fault, FileOptions, GuestMut, OpKind, Outcome, Pattern, Rng, SimDisk, SimEngine, Task,
};
use qcow2rs::{AmendOptions, ErrorKind, Result};

use super::super::imagecheck;
use super::super::layout::{Header, be64};
use super::super::random::{SMALL, config};
use super::super::scenario::{Config, open};
use super::super::support::builder::{Cluster, Kind, build};
use super::play_some;
use super::snapshots::{State, next, write};

/// What an image is made into: options by name, and what it is then.
struct Change {
    options: &'static [(&'static str, &'static str)],
    after: Claims,
}

/// Version, width of refcounts, lazy refcounts.
type Claims = (u64, u64, bool);

fn claims(disk: &SimDisk) -> Claims {
    let bytes = disk.file("image").expect("there is an image").bytes();
    let header = Header::read(&bytes).expect("it has a header");
    let lazy = header.version > 2 && bytes[87] & 1 != 0;
    (header.version, header.refcount_bits(), lazy)
}

/// Images and what becomes of them.
fn cases() -> Vec<(Config, Change)> {
    let small = Kind { size: 48 << 10, ..SMALL };
    let case = |kind, options, after| (config(kind), Change { options, after });
    let snapshot = Kind { snapshot: true, ..small };
    vec![
        case(small, &[("compat", "0.10")], (2, 16, false)),
        case(Kind { backing: true, ..small }, &[("compat", "0.10")], (2, 16, false)),
        case(
            Kind { backing: true, lazy: true, refcount_bits: 64, ..small },
            &[("compat", "0.10"), ("refcount_bits", "16")],
            (2, 16, false),
        ),
        case(Kind { version: 2, ..snapshot }, &[("compat", "1.1")], (3, 16, false)),
        case(
            Kind { version: 2, ..snapshot },
            &[("compat", "1.1"), ("refcount_bits", "64"), ("lazy_refcounts", "on")],
            (3, 64, true),
        ),
        case(snapshot, &[("refcount_bits", "8")], (3, 8, false)),
        // With zero clusters in the snapshot.
        case(snapshot, &[("compat", "0.10")], (2, 16, false)),
        case(
            Kind { backing: true, lazy: true, refcount_bits: 64, ..snapshot },
            &[("compat", "0.10"), ("refcount_bits", "16")],
            (2, 16, false),
        ),
        case(Kind { lazy: true, ..small }, &[("lazy_refcounts", "off")], (3, 16, false)),
        case(Kind { refcount_bits: 1, ..small }, &[("refcount_bits", "32")], (3, 32, false)),
    ]
}

struct Stage {
    disk: SimDisk,
    image: Disk,
    before: State,
    claimed: Claims,
    rng: Rng,
}

impl Stage {
    fn new(config: &Config, seed: u64) -> Stage {
        let mut rng = Rng::new(seed);
        let disk = SimDisk::new(rng.next_u64());
        let (kind, size) = (config.kind, config.kind.cluster);
        let mut bytes = build(kind, |cluster| match cluster % 7 {
            0 | 3 => Cluster::Data { bytes: vec![0x11; size as usize], alloc: 1, zero: 0 },
            1 => Cluster::Compressed(vec![0x22; size as usize]),
            2 if kind.version > 2 => Cluster::Reserved,
            _ => Cluster::Nothing,
        });
        if kind.snapshot && kind.version < 3 {
            // As programs wrote it that knew no extra data.
            let table = be64(&bytes, 64) as usize;
            bytes[table + 36..table + 42].copy_from_slice(b"\0\0\0\x001s");
        }
        disk.create_with("image", FileOptions::default(), &bytes);
        if kind.backing {
            let read_only = FileOptions { read_only: true, ..FileOptions::default() };
            disk.create_with("base", read_only, &vec![0x33; kind.size as usize]);
        }
        let image = disk.block_on(open(&disk, config)).expect("the image can be opened");
        disk.block_on(async {
            for cluster in [4, 5, 20] {
                write(&image, cluster, size, 7).await;
            }
            if !kind.snapshot {
                image.discard(&SimEngine, 7 * size, 2 * size).await.unwrap();
                image.discard(&SimEngine, 20 * size, size).await.unwrap();
            }
            image.flush(&SimEngine).await.unwrap();
            if rng.chance(1, 2) {
                // With something left to be written back.
                write(&image, 6, size, 8).await;
            }
            image.settle(&SimEngine).await.unwrap();
        });
        let (before, claimed) = (State::of(&disk), claims(&disk));
        Stage { disk, image, before, claimed, rng }
    }
}

async fn play(change: &Change, disk: &Disk) -> (Result<()>, Replacement) {
    let mut options = AmendOptions::default();
    for (name, value) in change.options {
        options.set(name, value).unwrap();
    }
    disk.amend(&SimEngine, &options, |_| false, &mut |_, _| true).await.into()
}

/// What is wrong with an image, leaks aside. The dirty bit excuses what it says: with
/// lazy refcounts, and while tables of snapshots are replaced.
fn look(disk: &SimDisk, what: &str) {
    let report = imagecheck::check(&*disk.file("image").expect("there is an image"));
    let faults = report.faults();
    let excused =
        |fault: &String| report.dirty && (fault.starts_with("I4") || fault.starts_with("I5"));
    assert!(faults.iter().all(excused), "{what}: {faults:#?}");
}

/// Looks at what a crash or a failure has left; opens it, uses it.
fn live_on(disk: &SimDisk, config: &Config, before: &State, what: &str) {
    assert!(State::of(disk) == *before, "{what}: the content has changed");
    look(disk, what);
    let image = disk.block_on(open(disk, config));
    let image = image.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let mut bytes = vec![0; config.kind.size as usize];
    disk.block_on(async {
        let target = Target::Guest(GuestMut::from_slice(&mut bytes));
        let read = image.read(&SimEngine, target, 0).await;
        read.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        for cluster in 0..config.kind.clusters() {
            write(&image, cluster, config.kind.cluster, 9).await;
        }
        image.settle(&SimEngine).await.unwrap();
    });
    assert!(bytes == before.active, "{what}: the driver reads something else");
    look(disk, what);
    let then = State::of(disk);
    assert!(then.active.iter().all(|byte| *byte == 9), "{what}");
    assert!(then.snapshots == before.snapshots, "{what}: a snapshot has changed");
}

#[test]
fn a_crash_leaves_the_old_image_or_the_new() {
    play_some(2, |seed| {
        for (config, change) in cases() {
            let stage = Stage::new(&config, seed);
            let Stage { disk, image, before, claimed, mut rng } = stage;
            let mut result = None;
            let task = Task::new("amend", async {
                let (done, replacement) = play(&change, &image).await;
                result = Some(done);
                drop(replacement);
            });
            let mut steps = 0;
            let outcome = disk.run_observed(vec![task], |step| {
                steps += 1;
                let power = |unit| Crash::Power { unit };
                let crash = *rng.pick(&[Crash::Process, power(512), power(512), power(4096)]);
                let left = disk.crash(crash, rng.next_u64());
                let kind = config.kind;
                let what =
                    format!("seed {seed}, {:?}, {kind:?}, {crash:?} at {step}", change.options);
                let now = claims(&left);
                assert!(now == claimed || now == change.after, "{what}: {now:?}");
                if step % 3 == 0 {
                    live_on(&left, &config, &before, &what);
                } else {
                    assert!(State::of(&left) == before, "{what}: the content has changed");
                    look(&left, &what);
                }
                ControlFlow::Continue(())
            });
            assert_eq!((outcome, steps > 3), (Outcome::Done, true));
            let what = format!("seed {seed}, {:?}, {:?}", change.options, config.kind);
            result.expect("it came to its end").unwrap_or_else(|e| panic!("{what}: {e:?}"));
            // What has returned is durable, and nothing leaks.
            let left = disk.crash(Crash::Power { unit: 512 }, rng.next_u64());
            assert_eq!(claims(&left), change.after, "{what}");
            let report = imagecheck::check(&*left.file("image").unwrap());
            assert_eq!((report.leaks, report.dirty), (vec![], false), "{what}");
            live_on(&left, &config, &before, &what);
        }
    });
}

#[test]
fn an_amendment_that_fails_leaves_the_old_image_or_the_new() {
    let kinds = [OpKind::Read, OpKind::Write, OpKind::Sync, OpKind::Truncate];
    play_some(1, |seed| {
        for (config, change) in cases() {
            for kind in kinds {
                let mut index = 0;
                while fail_one(&config, seed, &change, kind, index) {
                    // Each of the first, some of many.
                    index += 1 + index / 8;
                }
                assert!(index > 0 || kind == OpKind::Truncate, "{:?}: no {kind:?}", change.options);
            }
        }
    });
}

/// Lets the `index`th operation of a kind fail, or all from there on; false if there
/// are not that many.
fn fail_one(config: &Config, seed: u64, change: &Change, kind: OpKind, index: u64) -> bool {
    let stage = Stage::new(config, seed.wrapping_add(index));
    let Stage { disk, image, before, claimed, .. } = stage;
    let forever = index % 3 == 1;
    let errno = if index % 2 == 0 && kind != OpKind::Sync { libc::ENOSPC } else { libc::EIO };
    let pattern = Pattern::any().file("image").kind(kind).after(index);
    let what = format!(
        "seed {seed}, {:?}, {:?}: {kind:?} {index}, forever: {forever}",
        change.options, config.kind
    );
    disk.inject(Fault { pattern, errno, forever });
    let played = disk.block_on(play(change, &image));
    disk.clear_faults();
    let (result, image) = next(image, played);
    let failed = result.is_err();
    if let Err(error) = result {
        let expected = [ErrorKind::NoSpace, ErrorKind::Os(libc::EIO), ErrorKind::FlushFailed];
        assert!(expected.contains(&error.kind()), "{what}: {error:?}");
    }
    let now = claims(&disk);
    assert!(now == change.after || failed && now == claimed, "{what}: {now:?}");
    if let (Some(image), false) = (&image, kind == OpKind::Sync) {
        // It goes on at once; nothing is lost, and nothing left over.
        let settled = disk.block_on(image.settle(&SimEngine));
        settled.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        if !forever {
            let report = imagecheck::check(&*disk.file("image").unwrap());
            assert_eq!((report.leaks, report.dirty), (vec![], false), "{what}");
        }
    }
    drop(image);
    live_on(&disk, config, &before, &what);
    failed
}
