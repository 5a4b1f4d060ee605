//! Disks that become longer and shorter: power may be lost, and every operation may
//! fail, at each step. The disk has the old size or the new one and all that belongs to
//! it, snapshots are what they were, no refcount is too low, and nothing needs to be
//! put right but leaks.

use std::ops::ControlFlow;

use qcow2rs::image::Disk;
use qcow2rs::image::handle::Replacement;
use qcow2rs::io::sim::{Crash, Fault, OpKind, Outcome, Pattern, SimDisk, SimEngine, Task};
use qcow2rs::{ErrorKind, Preallocation, ResizeOptions, Result};

use super::super::imagecheck;
use super::super::random::{SMALL, config};
use super::super::scenario::{Config, open};
use super::super::support::builder::Kind;
use super::snapshots::{Stage, State, configs, look, next, write};
use super::{extended, play_some};

/// What is done to the size, which is a number of clusters and a bit.
#[derive(Clone, Copy, Debug)]
struct Change {
    /// Of the old size, in percent.
    percent: u64,
    preallocation: Preallocation,
    /// The same again, half way back: what was cut off must not come back.
    again: bool,
}

const fn to(percent: u64, preallocation: Preallocation) -> Change {
    Change { percent, preallocation, again: false }
}

const ALL: [Change; 7] = [
    to(140, Preallocation::Off),
    to(400, Preallocation::Off),
    to(150, Preallocation::Metadata),
    to(130, Preallocation::Full),
    to(40, Preallocation::Off),
    to(0, Preallocation::Off),
    Change { percent: 40, preallocation: Preallocation::Falloc, again: true },
];

impl Change {
    fn size(self, config: &Config) -> u64 {
        (config.kind.size * self.percent / 100).next_multiple_of(512)
    }

    async fn play(self, disk: &Disk, size: u64) -> (Result<()>, Replacement) {
        let options = ResizeOptions { shrink: true, preallocation: self.preallocation };
        disk.resize(&SimEngine, size, &options, &mut |_, _| true).await.into()
    }
}

fn model(before: &State, size: u64) -> State {
    let mut after = before.clone();
    after.active.resize(size as usize, 0);
    after
}

/// An image with a snapshot (one of version 2, or with a data file, has none), and the size that it is to get.
fn begin(config: &Config, seed: u64, change: Change) -> (Stage, u64) {
    let writes: &[(u8, &[u8])] = match config.kind.version < 3 || config.kind.data_file {
        true => &[(3, b"")],
        false => &[(1, b"a"), (3, b"")],
    };
    let mut stage = Stage::with(config, seed, writes);
    let mut size = change.size(config);
    if change.again {
        let shorter = Change { preallocation: Preallocation::Off, ..change };
        let played = stage.disk.block_on(shorter.play(&stage.image, size));
        let (result, image) = next(stage.image, played);
        result.unwrap();
        stage.image = image.expect("it goes on");
        stage.before = model(&stage.before, size);
        size = config.kind.size;
    }
    (stage, size)
}

fn state(disk: &SimDisk, config: &Config) -> State {
    State::with_snapshots_of(disk, config.kind.size)
}

/// Looks at what a crash or a failure has left.
fn check(left: &SimDisk, config: &Config, states: &[&State], what: &str) -> State {
    let found = state(left, config);
    assert!(states.contains(&&found), "{what}: the disk is neither the old nor the new one");
    if config.kind.raw {
        let mut bytes = left.file("data").expect("there is a data file").bytes();
        bytes.resize(found.active.len(), 0);
        assert!(bytes == found.active, "{what}: the raw data file is not what the guest finds");
    }
    let (flags, dirty) = look(left, config.kind.lazy);
    assert!(!flags || dirty, "{what}: flags are wrong");
    found
}

/// The same; then it is opened, grows, shrinks, and is used.
fn live_on(left: &SimDisk, config: &Config, states: &[&State], what: &str) {
    let found = check(left, config, states, what);
    let image = left.block_on(open(left, config));
    let image = image.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let cluster = config.kind.cluster;
    let old = found.active.len() as u64;
    let mut then = model(&found, old + 20 * cluster);
    left.block_on(async {
        let longer = to(0, Preallocation::Off).play(&image, old + 20 * cluster).await;
        let (result, image) = next(image, longer);
        result.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        let image = image.expect("it goes on");
        write(&image, old / cluster + 3, cluster, 9).await;
        let shorter = to(0, Preallocation::Off).play(&image, old + 10 * cluster).await;
        let (result, image) = next(image, shorter);
        result.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        image.expect("it goes on").settle(&SimEngine).await.unwrap();
    });
    let at = (old / cluster + 3) as usize * cluster as usize;
    then.active[at..][..cluster as usize].fill(9);
    let then = model(&then, old + 10 * cluster);
    assert!(state(left, config) == then, "{what}: the disk has changed");
    assert_eq!(look(left, config.kind.lazy), (false, false), "{what}");
}

/// Those that may become longer: version 2 has nothing to hide a backing file with.
fn some() -> impl Iterator<Item = (Config, Change)> {
    let small = Kind { size: 64 << 10, data_file: true, ..SMALL };
    let coarse = Kind { size: 1 << 20, data_file: true, ..extended().kind };
    let data_files = [
        small,
        Kind { raw: true, lazy: true, ..small },
        Kind { backing: true, ..coarse },
        Kind { backing: false, raw: true, ..coarse },
    ];
    configs()
        .into_iter()
        .chain(data_files.map(config))
        .flat_map(|config| ALL.into_iter().map(move |change| (config.clone(), change)))
}

#[test]
fn a_crash_leaves_the_old_size_or_the_new() {
    play_some(2, |seed| {
        for (config, change) in some() {
            let (mut stage, size) = begin(&config, seed, change);
            let (before, after) = (stage.before.clone(), model(&stage.before, size));
            let mut result = None;
            let mut steps = 0;
            let disk = stage.disk.clone();
            let image = &stage.image;
            let task = Task::new("resize", async {
                let (done, replacement) = change.play(image, size).await;
                result = Some(done);
                drop(replacement);
            });
            let mut rng = stage.rng.fork();
            let outcome = disk.run_observed(vec![task], |step| {
                steps += 1;
                let power = |unit| Crash::Power { unit };
                let crash = *rng.pick(&[Crash::Process, power(512), power(512), power(4096)]);
                let left = disk.crash(crash, rng.next_u64());
                let what =
                    format!("seed {seed}, {change:?}, {:?}, {crash:?} at step {step}", config.kind);
                match step % 4 {
                    0 => live_on(&left, &config, &[&before, &after], &what),
                    _ => drop(check(&left, &config, &[&before, &after], &what)),
                }
                ControlFlow::Continue(())
            });
            assert_eq!(outcome, Outcome::Done);
            assert!(steps > 4, "{change:?}: {steps} steps");
            let done = result.expect("it came to its end");
            done.unwrap_or_else(|error| panic!("{change:?}, {:?}: {error:?}", config.kind));
            // What has returned is durable.
            let (crash, left) = stage.crash();
            let what = format!("seed {seed}, {change:?}, {:?}, {crash:?} at the end", config.kind);
            assert_eq!(look(&left, config.kind.lazy), (false, false), "{what}");
            let report = imagecheck::check(&*left.file("image").unwrap());
            assert_eq!(report.leaks, [], "{what}");
            live_on(&left, &config, &[&after], &what);
        }
    });
}

#[test]
fn an_operation_that_fails_leaves_the_old_size_or_the_new() {
    let kinds = [OpKind::Read, OpKind::Write, OpKind::Sync, OpKind::Truncate];
    play_some(1, |seed| {
        for (config, change) in some() {
            for (file, kind) in [("image", kinds), ("data", kinds)]
                .into_iter()
                .filter(|(file, _)| *file == "image" || config.kind.data_file)
                .flat_map(|(file, kinds)| kinds.map(|kind| (file, kind)))
            {
                let mut index = 0;
                while fail_one(&config, seed, change, (file, kind), index) {
                    index += 1 + index / 4;
                }
            }
        }
    });
}

/// Lets the `index`th operation of a kind on a file fail, or all from there on; false if
/// there are not that many.
fn fail_one(
    config: &Config,
    seed: u64,
    change: Change,
    (file, kind): (&str, OpKind),
    index: u64,
) -> bool {
    let (Stage { disk, image, before, .. }, size) = begin(config, seed + index, change);
    let after = model(&before, size);
    let forever = index % 3 == 1;
    let errno = if kind == OpKind::Sync || index % 2 == 1 { libc::EIO } else { libc::ENOSPC };
    let pattern = Pattern::any().file(file).kind(kind).after(index);
    let what = format!(
        "seed {seed}, {change:?}, {:?}: {kind:?} {index} of {file}, forever: {forever}",
        config.kind
    );
    disk.inject(Fault { pattern, errno, forever });
    let played = disk.block_on(change.play(&image, size));
    disk.clear_faults();
    let (result, image) = next(image, played);
    let failed = result.is_err();
    match &result {
        Ok(()) => assert!(state(&disk, config) == after, "{what}"),
        Err(error) => {
            let expected = [ErrorKind::NoSpace, ErrorKind::Os(libc::EIO), ErrorKind::FlushFailed];
            assert!(expected.contains(&error.kind()), "{what}: {error:?}");
        }
    }
    let found = check(&disk, config, &[&before, &after], &what);
    if let (Some(image), false) = (&image, kind == OpKind::Sync) {
        // It goes on at once, and nothing is left over.
        assert_eq!(image.size(), found.active.len() as u64, "{what}");
        let settled = disk.block_on(image.settle(&SimEngine));
        settled.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        if !forever {
            assert_eq!(look(&disk, config.kind.lazy), (false, false), "{what}");
            let report = imagecheck::check(&*disk.file("image").unwrap());
            assert_eq!(report.leaks, [], "{what}");
        }
        assert!(state(&disk, config) == found, "{what}: the content has changed");
    }
    drop(image);
    live_on(&disk, config, &[&before, &after], &what);
    failed
}
