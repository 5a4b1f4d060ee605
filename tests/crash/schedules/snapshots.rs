//! Taking, applying, deleting and renaming snapshots: power may be lost, and every
//! operation may fail, at each step. The list of snapshots is the old one or the new
//! one, the active disk and every snapshot hold what they are to hold, no refcount is
//! too low; what else there is to put right, the dirty bit tells of.

use std::ops::ControlFlow;

use qcow2rs::image::Disk;
use qcow2rs::image::handle::Replacement;
use qcow2rs::io::engine::{Piece, Target};
use qcow2rs::io::sim::{
    Crash, Fault, FileOptions, GuestMut, GuestRef, OpKind, Outcome, Pattern, Rng, SimDisk,
    SimEngine, Task,
};
use qcow2rs::snapshots::Meta;
use qcow2rs::{ErrorKind, Result};

use super::super::imagecheck;
use super::super::layout::{Header, ReadAt, read_guest_data};
use super::super::random::{SMALL, config};
use super::super::scenario::{Config, open};
use super::super::support::builder::{Cluster, Kind, build_both};
use super::{extended, play_some, tiny};

/// What is done to the snapshots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    Create,
    Apply,
    Delete,
    DeleteLast,
    Rename,
}

const ALL: [Change; 5] =
    [Change::Create, Change::Apply, Change::Delete, Change::DeleteLast, Change::Rename];

impl Change {
    /// Carries it out on a disk with the snapshots "a" and "b".
    async fn play(self, disk: &Disk) -> (Result<()>, Replacement) {
        let engine = &SimEngine;
        match self {
            Change::Create => {
                let (result, disk) =
                    disk.snapshot_create(engine, b"c", &Meta::default(), |_| Ok(())).await.into();
                (result.map(drop), disk)
            }
            Change::Apply => disk.snapshot_apply(engine, b"a").await.into(),
            Change::Delete => disk.snapshot_delete(engine, b"a", |_| false).await.into(),
            Change::DeleteLast => disk.snapshot_delete(engine, b"b", |_| false).await.into(),
            Change::Rename => disk.snapshot_rename(engine, b"a", b"a longer name").await.into(),
        }
    }

    /// What a state is to become.
    fn model(self, before: &State) -> State {
        let mut after = before.clone();
        match self {
            Change::Create => after.snapshots.push((b"c".to_vec(), before.active.clone())),
            Change::Apply => after.active = before.snapshots[0].1.clone(),
            Change::Delete => drop(after.snapshots.remove(0)),
            Change::DeleteLast => drop(after.snapshots.pop()),
            Change::Rename => after.snapshots[0].0 = b"a longer name".to_vec(),
        }
        after
    }
}

/// All that an image holds: the disk, and the snapshots by their names.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    pub active: Vec<u8>,
    pub snapshots: Vec<(Vec<u8>, Vec<u8>)>,
}

impl State {
    /// Read with other code than the driver's.
    pub fn of(disk: &SimDisk) -> State {
        let file = disk.file("image").expect("there is an image");
        State::with_snapshots_of(disk, Header::read(&*file).expect("it has a header").size)
    }

    /// As `of`, where snapshots are of disks of another size.
    pub fn with_snapshots_of(disk: &SimDisk, snapshot_size: u64) -> State {
        let file = disk.file("image").expect("there is an image");
        let header = Header::read(&*file).expect("it has a header");
        let base = disk.file("base");
        let base = base.as_deref().map(|base| base as &dyn ReadAt);
        let data = disk.file("data");
        let data = data.as_deref().map_or(&*file as &dyn ReadAt, |data| data as &dyn ReadAt);
        let content = |header: &Header| read_guest_data(&*file, data, header, base);
        let (tables, _) = header.read_snapshots(&*file);
        let names = header.read_snapshot_names(&*file);
        let of = |l1| content(&Header { l1, size: snapshot_size, ..header.clone() });
        let snapshots = names.into_iter().zip(tables.into_iter().map(of)).collect();
        State { active: content(&header), snapshots }
    }
}

/// An image at the beginning of a change.
pub struct Stage {
    pub disk: SimDisk,
    pub image: Disk,
    pub before: State,
    pub rng: Rng,
}

pub async fn write(image: &Disk, cluster: u64, size: u64, value: u8) {
    write_maybe(image, cluster, size, value).await.unwrap();
}

/// The disk that goes on after a change.
pub fn next(
    disk: Disk,
    (result, replacement): (Result<()>, Replacement),
) -> (Result<()>, Option<Disk>) {
    match replacement {
        Replacement::None => (result, Some(disk)),
        Replacement::Disk(disk) => (result, Some(*disk)),
        Replacement::Closed => (result, None),
    }
}

impl Stage {
    /// An image with two snapshots, each of which has something of its own, and shares
    /// something with each other state.
    fn new(config: &Config, seed: u64) -> Stage {
        Stage::with(config, seed, &[(1, &b"a"[..]), (2, b"b"), (3, b"")])
    }

    /// The same with the snapshots that are named.
    pub fn with(config: &Config, seed: u64, writes: &[(u8, &[u8])]) -> Stage {
        let mut rng = Rng::new(seed);
        let disk = SimDisk::new(rng.next_u64());
        let kind = config.kind;
        let size = kind.cluster;
        let stored = |byte| {
            let alloc = if kind.extended_l2 && kind.raw { u32::MAX } else { 1 };
            Cluster::Data { bytes: vec![byte; size as usize], alloc, zero: 0 }
        };
        let (bytes, data) = build_both(kind, |cluster| match cluster % 5 {
            0 => stored(0x11),
            1 if kind.data_file => stored(0x22),
            1 => Cluster::Compressed(vec![0x22; size as usize]),
            // A raw data file has a place for all from the beginning.
            _ if kind.raw => stored(0),
            2 if kind.version > 2 => Cluster::Reserved,
            _ => Cluster::Nothing,
        });
        disk.create_with("image", FileOptions::default(), &bytes);
        if kind.data_file {
            disk.create_with("data", FileOptions::default(), &data);
        }
        if kind.backing {
            let read_only = FileOptions { read_only: true, ..FileOptions::default() };
            disk.create_with("base", read_only, &vec![0x33; kind.size as usize]);
        }
        let image = disk.block_on(open(&disk, config)).expect("the image can be opened");
        let far = kind.clusters() - 1;
        let image = disk.block_on(async {
            let mut image = image;
            for &(value, name) in writes {
                for cluster in [0, 1, 3, u64::from(value) * 5, u64::from(value) * 5 + 1, far] {
                    write(&image, cluster, size, value).await;
                }
                image.discard(&SimEngine, (20 + u64::from(value) * 5) * size, size).await.unwrap();
                if !name.is_empty() {
                    let meta = Meta::default();
                    let changed = image.snapshot_create(&SimEngine, name, &meta, |_| Ok(())).await;
                    let (result, disk): (Result<_>, _) = changed.into();
                    result.expect("the snapshot can be taken");
                    image = next(image, (Ok(()), disk)).1.expect("it goes on");
                }
            }
            image.settle(&SimEngine).await.unwrap();
            image
        });
        let before = State::of(&disk);
        assert_eq!(before.snapshots.len(), writes.len() - 1);
        assert!(before.snapshots.iter().all(|(_, content)| *content != before.active));
        Stage { disk, image, before, rng }
    }

    pub fn crash(&mut self) -> (Crash, SimDisk) {
        let power = |unit| Crash::Power { unit };
        let crash = *self.rng.pick(&[Crash::Process, power(512), power(512), power(4096)]);
        (crash, self.disk.crash(crash, self.rng.next_u64()))
    }
}

/// What `imagecheck` finds, the dirty bit aside: refcounts that are too low and
/// pointers that lead astray are wrong at any time; flags may be, for a time. (With lazy
/// refcounts the dirty bit excuses both, before the image is settled.) Returns
/// whether anything is left to be put right, and whether the dirty bit says so.
pub fn look(disk: &SimDisk, lazy: bool) -> (bool, bool) {
    let mut bytes = disk.file("image").expect("there is an image").bytes();
    let dirty = Header::read(&bytes).unwrap().version > 2 && bytes[79] & 1 != 0;
    if dirty {
        bytes[79] &= !1;
    }
    let report = imagecheck::check(&bytes);
    let (flags, faults): (Vec<_>, Vec<_>) = report
        .faults()
        .into_iter()
        .partition(|fault| fault.starts_with("I5") || lazy && dirty && fault.starts_with("I4"));
    assert!(faults.is_empty(), "{faults:#?}");
    (!flags.is_empty(), dirty)
}

/// Looks at what a crash or a failure has left; opens it, uses it.
fn live_on(disk: &SimDisk, config: &Config, states: &[&State], what: &str) {
    let found = State::of(disk);
    assert!(states.contains(&&found), "{what}: the image holds neither the old nor the new");
    let (flags, dirty) = look(disk, config.kind.lazy);
    let v2 = config.kind.version < 3;
    assert!(!flags || dirty || v2, "{what}: flags are wrong, and nothing says so");
    let image = disk.block_on(open(disk, config));
    let image = image.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    // Whatever was left half done does not matter any more.
    let image = disk.block_on(async {
        write(&image, 2, config.kind.cluster, 9).await;
        let (result, replacement): (Result<_>, _) =
            image.snapshot_delete(&SimEngine, &found.snapshots[0].0, |_| false).await.into();
        result.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        next(image, (Ok(()), replacement)).1.expect("it goes on")
    });
    disk.block_on(image.settle(&SimEngine)).unwrap();
    let mut then = State::of(disk);
    let at = 2 * config.kind.cluster as usize;
    then.active[at..][..config.kind.cluster as usize]
        .copy_from_slice(&found.active[at..][..config.kind.cluster as usize]);
    assert!(then.active == found.active, "{what}: the disk has changed");
    assert!(then.snapshots[..] == found.snapshots[1..], "{what}: a snapshot has changed");
    let (flags, dirty) = look(disk, config.kind.lazy);
    assert!(!dirty && (!flags || v2), "{what}: flags are wrong after all");
}

pub fn configs() -> Vec<Config> {
    let small = Kind { size: 64 << 10, ..SMALL };
    vec![
        Config { kind: Kind { size: 64 << 10, ..tiny().kind }, ..tiny() },
        Config { kind: Kind { size: 1 << 20, ..extended().kind }, ..extended() },
        config(Kind { version: 2, ..small }),
        config(Kind { refcount_bits: 8, backing: true, ..small }),
        config(Kind { lazy: true, ..small }),
    ]
}

#[test]
fn a_crash_leaves_the_old_snapshots_or_the_new() {
    play_some(2, |seed| {
        for config in configs() {
            for change in ALL {
                let mut stage = Stage::new(&config, seed);
                let after = change.model(&stage.before);
                let (before, image) = (stage.before.clone(), &stage.image);
                let mut result = None;
                let mut crashes = Vec::new();
                let disk = stage.disk.clone();
                let task = Task::new("change", async {
                    let (done, replacement) = change.play(image).await;
                    result = Some(done);
                    drop(replacement);
                });
                let mut rng = stage.rng.fork();
                let outcome = disk.run_observed(vec![task], |step| {
                    let power = |unit| Crash::Power { unit };
                    let crash = *rng.pick(&[Crash::Process, power(512), power(512), power(4096)]);
                    let left = disk.crash(crash, rng.next_u64());
                    let what = format!(
                        "seed {seed}, {change:?}, {:?}, {crash:?} at step {step}",
                        config.kind
                    );
                    if step % 3 == 0 {
                        live_on(&left, &config, &[&before, &after], &what);
                    } else {
                        let found = State::of(&left);
                        assert!(found == before || found == after, "{what}: neither old nor new");
                        let (flags, dirty) = look(&left, config.kind.lazy);
                        assert!(!flags || dirty || config.kind.version < 3, "{what}: flags");
                    }
                    crashes.push(crash);
                    ControlFlow::Continue(())
                });
                assert_eq!(outcome, Outcome::Done);
                assert!(crashes.len() > 10);
                let done = result.expect("it came to its end");
                done.unwrap_or_else(|error| panic!("{change:?}, {:?}: {error:?}", config.kind));
                // What has returned is durable.
                let (crash, left) = stage.crash();
                let what =
                    format!("seed {seed}, {change:?}, {:?}, {crash:?} at the end", config.kind);
                assert_eq!(look(&left, config.kind.lazy), (false, false), "{what}");
                live_on(&left, &config, &[&after], &what);
            }
        }
    });
}

#[test]
fn an_operation_that_fails_leaves_the_old_snapshots_or_the_new() {
    let kinds = [OpKind::Read, OpKind::Write, OpKind::Sync, OpKind::Truncate];
    play_some(1, |seed| {
        for config in configs() {
            for change in ALL {
                for kind in kinds {
                    let mut index = 0;
                    while fail_one(&config, seed, change, kind, index) {
                        // Some of many, or all of few.
                        index += 1 + index / 4;
                    }
                    assert!(index > 0 || kind == OpKind::Truncate, "{change:?}: no {kind:?}");
                }
            }
        }
    });
}

/// Lets the `index`th operation of a kind fail, or all from there on; false if there
/// are not that many.
fn fail_one(config: &Config, seed: u64, change: Change, kind: OpKind, index: u64) -> bool {
    let Stage { disk, image, before, .. } = Stage::new(config, seed.wrapping_add(index));
    let after = change.model(&before);
    let forever = index % 3 == 1;
    let errno = if kind == OpKind::Sync { libc::EIO } else { libc::ENOSPC };
    let errno = if index % 2 == 0 { errno } else { libc::EIO };
    let pattern = Pattern::any().file("image").kind(kind).after(index);
    let what =
        format!("seed {seed}, {change:?}, {:?}: {kind:?} {index}, forever: {forever}", config.kind);
    disk.inject(Fault { pattern, errno, forever });
    let played = disk.block_on(change.play(&image));
    disk.clear_faults();
    let (result, image) = next(image, played);
    let failed = result.is_err();
    match &result {
        Ok(()) => assert!(State::of(&disk) == after, "{what}"),
        Err(error) => {
            let expected = [ErrorKind::NoSpace, ErrorKind::Os(libc::EIO), ErrorKind::FlushFailed];
            assert!(expected.contains(&error.kind()), "{what}: {error:?}");
        }
    }
    let found = State::of(&disk);
    assert!(found == before || found == after, "{what}: neither old nor new");
    if let (Some(image), false) = (&image, kind == OpKind::Sync) {
        // It goes on at once; nothing is lost, and nothing left over.
        let settled = disk.block_on(image.settle(&SimEngine));
        settled.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        let (flags, dirty) = look(&disk, config.kind.lazy);
        if !forever {
            assert!(!flags && !dirty, "{what}: not mended");
            let report = imagecheck::check(&*disk.file("image").unwrap());
            assert_eq!(report.leaks, [], "{what}");
        }
        assert!(State::of(&disk) == found, "{what}: the content has changed");
    }
    drop(image);
    live_on(&disk, config, &[&before, &after], &what);
    failed
}

#[test]
fn a_full_storage_refuses_a_snapshot_and_is_as_it_was() {
    play_some(1, |seed| {
        for config in configs() {
            for change in [Change::Create, Change::Apply, Change::Rename, Change::Delete] {
                let Stage { disk, image, before, .. } = Stage::new(&config, seed);
                disk.block_on(image.settle(&SimEngine)).unwrap();
                let file = disk.file("image").unwrap();
                let bytes = file.bytes();
                let pattern = Pattern::any().file("image").kind(OpKind::Truncate);
                disk.inject(Fault { pattern, errno: libc::ENOSPC, forever: true });
                let played = disk.block_on(change.play(&image));
                disk.clear_faults();
                let (result, image) = next(image, played);
                if let Err(error) = result {
                    assert_eq!(error.kind(), ErrorKind::NoSpace);
                    assert!(State::of(&disk) == before);
                    let image = image.expect("it is still open");
                    disk.block_on(image.settle(&SimEngine)).unwrap();
                    assert!(file.bytes() == bytes, "{change:?}, {:?}", config.kind);
                }
            }
        }
    });
}

/// The other reading of the format, by which all of this is judged, agrees with the
/// driver's.
#[test]
fn the_state_of_an_image_is_what_the_driver_reads() {
    for config in configs() {
        let Stage { disk, image, before, .. } = Stage::new(&config, 1);
        let mut bytes = vec![0; config.kind.size as usize];
        let target = Target::Guest(GuestMut::from_slice(&mut bytes));
        disk.block_on(image.read(&SimEngine, target, 0)).unwrap();
        assert!(bytes == before.active);
    }
}

/// Writes VM state in several places, each of which needs a longer L1 table.
async fn save(image: &Disk) -> Result<()> {
    let (cluster, coverage) = {
        let qcow2 = image.info()?.qcow2.expect("it is qcow2");
        let cluster = u64::from(qcow2.cluster_size);
        (cluster, cluster * cluster / if qcow2.extended_l2 { 16 } else { 8 })
    };
    for (value, entry) in [(5, 0), (6, 70), (7, 200)] {
        let data = vec![value; cluster as usize];
        let piece = Piece::Guest(GuestRef::from_slice(&data));
        image.write_vm_state(&SimEngine, piece, entry * coverage).await?;
        // Beside it, the disk.
        write(image, 3, cluster, value).await;
    }
    Ok(())
}

/// `save` and a flush, with clusters of a sector: other tables would be long.
fn with_short_tables() -> Vec<Config> {
    configs().into_iter().filter(|config| config.kind.cluster == 512).collect()
}

#[test]
fn a_crash_while_the_l1_table_grows_loses_nothing() {
    play_some(2, |seed| {
        for config in with_short_tables() {
            let stage = Stage::new(&config, seed);
            let (disk, mut rng) = (stage.disk.clone(), stage.rng);
            let at = 3 * config.kind.cluster as usize..4 * config.kind.cluster as usize;
            let task = Task::new("save", async {
                save(&stage.image).await.unwrap();
                stage.image.flush(&SimEngine).await.unwrap();
            });
            let mut steps = 0;
            let outcome = disk.run_observed(vec![task], |step| {
                steps += 1;
                let power = |unit| Crash::Power { unit };
                let crash = *rng.pick(&[Crash::Process, power(512), power(512), power(4096)]);
                let left = disk.crash(crash, rng.next_u64());
                let what = format!("seed {seed}, {:?}, {crash:?} at step {step}", config.kind);
                let mut found = State::of(&left);
                assert!((0..8).contains(&found.active[at.start]), "{what}");
                found.active[at.clone()].copy_from_slice(&stage.before.active[at.clone()]);
                assert!(found == stage.before, "{what}: something else has changed");
                if config.kind.lazy {
                    return ControlFlow::Continue(());
                }
                assert_eq!(look(&left, config.kind.lazy), (false, false), "{what}");
                ControlFlow::Continue(())
            });
            assert_eq!((outcome, steps > 10), (Outcome::Done, true));
            let left = disk.crash(Crash::Power { unit: 512 }, rng.next_u64());
            assert_eq!(State::of(&left).active[at.start], 7);
            let image = left.block_on(open(&left, &config)).unwrap();
            let mut bytes = vec![0; config.kind.cluster as usize];
            for (value, entry) in [(5, 0), (6, 70), (7, 200)] {
                let target = Target::Guest(GuestMut::from_slice(&mut bytes));
                let offset = entry * config.kind.cluster * config.kind.cluster / 8;
                left.block_on(image.read_vm_state(&SimEngine, target, offset)).unwrap();
                assert!(bytes.iter().all(|byte| *byte == value));
            }
        }
    });
}

#[test]
fn a_failure_while_the_l1_table_grows_loses_nothing() {
    let kinds = [OpKind::Read, OpKind::Write, OpKind::Sync, OpKind::Truncate];
    play_some(1, |seed| {
        for config in with_short_tables() {
            for kind in kinds {
                // Each one that there is.
                for index in 0.. {
                    let Stage { disk, image, before, .. } = Stage::new(&config, seed + index);
                    let pattern = Pattern::any().file("image").kind(kind).after(index);
                    disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
                    let saved = disk.block_on(async {
                        let data = vec![5; 512];
                        let piece = Piece::Guest(GuestRef::from_slice(&data));
                        let offset = 70 * 512 * 64;
                        image.write_vm_state(&SimEngine, piece, offset).await?;
                        image.flush(&SimEngine).await
                    });
                    disk.clear_faults();
                    let what = format!("seed {seed}, {:?}: {kind:?} {index}", config.kind);
                    assert!(State::of(&disk) == before, "{what}");
                    // Unless nobody knows what is durable, it goes on.
                    let flushed = disk.block_on(async {
                        write_maybe(&image, 2, config.kind.cluster, 9).await?;
                        image.settle(&SimEngine).await
                    });
                    match flushed {
                        Ok(()) => {
                            assert_eq!(look(&disk, config.kind.lazy), (false, false), "{what}")
                        }
                        Err(error) => assert_eq!(error.kind(), ErrorKind::FlushFailed, "{what}"),
                    }
                    drop(image);
                    live_on_as(&disk, &config, &what);
                    if saved.is_ok() {
                        assert!(index > 0 || kind == OpKind::Truncate, "no {kind:?}");
                        break;
                    }
                }
            }
        }
    });
}

async fn write_maybe(image: &Disk, cluster: u64, size: u64, value: u8) -> Result<()> {
    let data = vec![value; size as usize];
    let piece = Piece::Guest(GuestRef::from_slice(&data));
    image.write(&SimEngine, piece, cluster * size, false).await
}

/// Opens what is there, whatever it holds, and goes on.
fn live_on_as(disk: &SimDisk, config: &Config, what: &str) {
    let state = State::of(disk);
    live_on(disk, config, &[&state], what);
}
