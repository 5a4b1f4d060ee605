//! The simulator's own tests: it must allow all that a disk may do, and nothing
//! that it may not.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::ControlFlow;

use super::engine::Operation;
use super::*;
use crate::error::{ErrorKind, Result};
use crate::io::engine::{Piece, Target, ZeroMode};
use crate::io::storage::{Access, Source, Storage};
use crate::sys::memory::{GuestMut, GuestRef};

pub(super) const POWER: Crash = Crash::Power { unit: 512 };

pub(super) async fn write(file: &SimFile, offset: u64, data: &[u8]) -> Result<()> {
    let pieces = [Piece::Guest(GuestRef::from_slice(data))];
    Operation::write(file, &pieces, offset).await
}

pub(super) async fn read(file: &SimFile, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0xee; len];
    Operation::read(file, Target::Guest(GuestMut::from_slice(&mut out)), offset).await?;
    Ok(out)
}

pub(super) async fn sync(file: &SimFile) -> Result<()> {
    Operation::sync(file).await
}

pub(super) fn file_of(disk: &SimDisk, sectors: usize) -> std::sync::Arc<SimFile> {
    disk.create_with("f", FileOptions::default(), &vec![0; sectors * 512])
}

/// First byte of each sector; each sector must be of one piece.
pub(super) fn tags(disk: &SimDisk) -> Vec<u8> {
    let bytes = disk.file("f").unwrap().bytes();
    bytes
        .chunks(512)
        .map(|sector| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is mixed");
            sector[0]
        })
        .collect()
}

/// All states of the file that crashes of this kind leave, in `tries` draws.
pub(super) fn states(disk: &SimDisk, crash: Crash, tries: u64) -> BTreeSet<Vec<u8>> {
    (0..tries).map(|seed| tags(&disk.crash(crash, seed))).collect()
}

#[test]
fn one_task_sees_a_plain_file() {
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        let file = disk.create("f", FileOptions::default());
        let mut rng = Rng::new(seed);
        disk.block_on(async {
            let mut plain: Vec<u8> = Vec::new();
            for _ in 0..200 {
                let (at, len) = (rng.below(20_000), rng.below(6000));
                let (start, end) = (at as usize, (at + len) as usize);
                match rng.below(6) {
                    0 | 1 => {
                        let data: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
                        write(&file, at, &data).await.unwrap();
                        if len > 0 {
                            plain.resize(plain.len().max(end), 0);
                            plain[start..end].copy_from_slice(&data);
                        }
                    }
                    2 => {
                        let mode = *rng.pick(&[ZeroMode::Punch, ZeroMode::Keep]);
                        Operation::zero(&file, at, len, mode).await.unwrap();
                        let end = end.min(plain.len());
                        if start < end {
                            plain[start..end].fill(0);
                        }
                    }
                    3 => {
                        Operation::truncate(&file, at).await.unwrap();
                        plain.resize(start, 0);
                    }
                    4 => sync(&file).await.unwrap(),
                    _ => {
                        let mut wanted = vec![0; len as usize];
                        if start < plain.len() {
                            let end = end.min(plain.len());
                            wanted[..end - start].copy_from_slice(&plain[start..end]);
                        }
                        assert_eq!(read(&file, at, len as usize).await.unwrap(), wanted);
                    }
                }
            }
            assert_eq!(file.bytes(), plain);
            sync(&file).await.unwrap();
            let after = disk.crash(POWER, seed).file("f").unwrap();
            assert!(after.same_bytes(&file), "what was synced is lost");
        });
    }
}

#[test]
fn same_seed_same_story() {
    let story = |seed| {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 16);
        let tasks = (0..4u8).map(|task| {
            let (file, mut rng) = (file.clone(), Rng::new(task.into()));
            Task::new("t", async move {
                for _ in 0..10 {
                    write(&file, rng.below(12) * 512, &[task; 2048]).await.unwrap();
                    sync(&file).await.unwrap();
                }
            })
        });
        assert_eq!(disk.run(tasks.collect()), Outcome::Done);
        (disk.journal(), tags(&disk.crash(POWER, 7)))
    };
    assert_eq!(story(5), story(5));
    assert_ne!(story(5).0, story(6).0);
}

#[test]
fn operations_in_flight_take_effect_in_any_order() {
    let mut results = BTreeSet::new();
    for seed in 0..500 {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 2);
        let (a, b) = (file.clone(), file.clone());
        let one = Task::new("a", async move { write(&a, 0, &[1; 1024]).await.unwrap() });
        let two = Task::new("b", async move { write(&b, 0, &[2; 1024]).await.unwrap() });
        disk.run(vec![one, two]);
        results.insert(tags(&disk));
    }
    // Parts of both, too: nobody promises that a write is one step.
    let all: BTreeSet<_> = [[1, 1], [2, 2], [1, 2], [2, 1]].map(Vec::from).into();
    assert_eq!(results, all);
}

#[test]
fn power_loss_keeps_any_subset_of_sectors() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 3);
    disk.block_on(write(&file, 0, &[1; 1536])).unwrap();
    let any: BTreeSet<_> = (0..8u8).map(|n| vec![n & 1, n >> 1 & 1, n >> 2 & 1]).collect();
    assert_eq!(states(&disk, POWER, 300), any);
    assert_eq!(states(&disk, Crash::Process, 20), [vec![1, 1, 1]].into());
    let blocks: BTreeSet<_> = [vec![0, 0, 0], vec![1, 1, 1]].into();
    assert_eq!(states(&disk, Crash::Power { unit: 4096 }, 300), blocks);
    // A crash is only looked at: the disk goes on.
    disk.block_on(sync(&file)).unwrap();
    assert_eq!(states(&disk, POWER, 50), [vec![1, 1, 1]].into());
}

#[test]
fn what_a_killed_process_wrote_may_be_lost_until_somebody_syncs() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 2);
    disk.block_on(write(&file, 0, &[1; 512])).unwrap();
    disk.block_on(write(&file, 1024, &[1; 512])).unwrap();
    for seed in 0..20 {
        let next = disk.crash(Crash::Process, seed);
        assert_eq!(tags(&next), [1, 0, 1], "readers see it");
        let lost = states(&next, POWER, 200);
        let all = [[0, 0].into(), [1, 0].into(), [0, 0, 0].into(), [1, 0, 0].into()];
        let more: [Vec<u8>; 2] = [[0, 0, 1].into(), [1, 0, 1].into()];
        assert_eq!(lost, all.into_iter().chain(more).collect());
        let file = next.file("f").unwrap();
        // Its writes are newer than those, and do not make them durable.
        next.block_on(write(&file, 0, &[2; 512])).unwrap();
        let firsts: BTreeSet<u8> = states(&next, POWER, 200).iter().map(|tags| tags[0]).collect();
        assert_eq!(firsts, [0, 1, 2].into());
        let third = next.crash(Crash::Process, seed);
        third.block_on(sync(&third.file("f").unwrap())).unwrap();
        assert_eq!(states(&third, POWER, 20), [vec![2, 0, 1]].into());
    }
}

#[test]
fn what_was_in_flight_when_a_process_was_killed_is_over() {
    let disk = SimDisk::new(3);
    let file = file_of(&disk, 1);
    let hold = disk.hold(Pattern::any(), Stage::Complete);
    let writer = Task::new("writer", async { write(&file, 0, &[1; 512]).await.unwrap() });
    let mut next = None;
    let killer = Task::new("killer", async {
        assert!(hold.caught().await);
        next = Some(disk.crash(Crash::Process, 1));
    });
    disk.run(vec![writer, killer]);
    let next = next.unwrap();
    assert_eq!(states(&next, POWER, 50), [vec![0], vec![1]].into());
    next.block_on(sync(&next.file("f").unwrap())).unwrap();
    assert_eq!(states(&next, POWER, 50), [vec![1]].into());
}

#[test]
fn hostile_power_loss_tears_sectors() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 1);
    disk.block_on(write(&file, 0, &[1; 512])).unwrap();
    let torn = (0..100).any(|seed| {
        let bytes = disk.crash(Crash::Power { unit: 8 }, seed).file("f").unwrap().bytes();
        assert!(bytes.chunks(8).all(|word| word == [word[0]; 8]));
        bytes.contains(&0) && bytes.contains(&1)
    });
    assert!(torn);
}

#[test]
fn never_an_older_write_over_a_newer_durable_one() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 1);
    disk.block_on(async {
        write(&file, 0, &[1; 512]).await.unwrap();
        write(&file, 0, &[2; 512]).await.unwrap();
        assert_eq!(states(&disk, POWER, 100), [vec![0], vec![1], vec![2]].into());
        sync(&file).await.unwrap();
        write(&file, 0, &[3; 512]).await.unwrap();
        Operation::zero(&file, 0, 512, ZeroMode::Punch).await.unwrap();
    });
    assert_eq!(states(&disk, POWER, 100), [vec![2], vec![3], vec![0]].into());
}

#[test]
fn a_write_in_flight_during_a_sync_may_go_either_way() {
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 1);
        let hold = disk.hold(Pattern::any().kind(OpKind::Write), Stage::Complete);
        let writer = Task::new("writer", async { write(&file, 0, &[1; 512]).await.unwrap() });
        let syncer = Task::new("syncer", async {
            assert!(hold.caught().await);
            sync(&file).await.unwrap();
            // Applied and seen, and yet not durable: it had not completed.
            assert_eq!(read(&file, 0, 512).await.unwrap(), [1; 512]);
            seen.extend(states(&disk, POWER, 10));
        });
        assert_eq!(disk.run(vec![writer, syncer]), Outcome::Done);
    }
    assert_eq!(seen, [vec![0], vec![1]].into());
}

#[test]
fn what_is_issued_but_not_applied_may_be_found_after_a_crash() {
    for crash in [POWER, Crash::Process] {
        let disk = SimDisk::new(3);
        let file = file_of(&disk, 1);
        let hold = disk.hold(Pattern::any(), Stage::Apply);
        let mut seen = BTreeSet::new();
        let writer = Task::new("writer", async { write(&file, 0, &[1; 512]).await.unwrap() });
        let watcher = Task::new("watcher", async {
            hold.caught().await;
            assert_eq!(tags(&disk), [0]);
            seen = states(&disk, crash, 50);
        });
        disk.run(vec![writer, watcher]);
        assert_eq!(seen, [vec![0], vec![1]].into());
    }
}

#[test]
fn the_length_is_durable_on_its_own() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 1);
    disk.block_on(write(&file, 512, &[1; 512])).unwrap();
    let all = [vec![0], vec![0, 0], vec![0, 1]].into();
    assert_eq!(states(&disk, POWER, 100), all);
    disk.block_on(sync(&file)).unwrap();
    assert_eq!(states(&disk, POWER, 20), [vec![0, 1]].into());
    disk.block_on(Operation::truncate(&file, 512)).unwrap();
    disk.block_on(Operation::truncate(&file, 1024)).unwrap();
    // What was cut off may be back only together with the old end.
    let seen = states(&disk, POWER, 100);
    assert_eq!(seen, [vec![0], vec![0, 0], vec![0, 1]].into());
    disk.block_on(sync(&file)).unwrap();
    assert_eq!(states(&disk, POWER, 20), [vec![0, 0]].into());
}

#[test]
fn syncing_a_write_makes_the_end_durable_that_another_moved() {
    for seed in 0..50 {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 0);
        let hold = disk.hold(Pattern::any().touching(512..1024), Stage::Complete);
        let far = Task::new("far", async { write(&file, 512, &[1; 512]).await.unwrap() });
        let near = Task::new("near", async {
            hold.caught().await;
            write(&file, 0, &[2; 512]).await.unwrap();
            sync(&file).await.unwrap();
            assert!(states(&disk, POWER, 20).iter().all(|state| state[0] == 2));
        });
        assert_eq!(disk.run(vec![far, near]), Outcome::Done);
    }
}

#[test]
fn a_failed_sync_forgets_what_it_claimed() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 2);
    let pattern = Pattern::any().kind(OpKind::Sync);
    disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
    disk.block_on(async {
        write(&file, 0, &[1; 512]).await.unwrap();
        assert_eq!(sync(&file).await.unwrap_err().kind(), ErrorKind::Os(libc::EIO));
        write(&file, 512, &[2; 512]).await.unwrap();
        sync(&file).await.unwrap();
        assert_eq!(read(&file, 0, 512).await.unwrap(), [1; 512]);
    });
    assert_eq!(states(&disk, POWER, 100), [vec![0, 2], vec![1, 2]].into());
}

#[test]
fn faults_hit_the_operation_named() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 8);
    let pattern = Pattern::any().kind(OpKind::Write).touching(512..1024).after(1);
    disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
    let pattern = Pattern::any().carrying(u64::from_ne_bytes([9; 8]));
    disk.inject(Fault { pattern, errno: libc::ENOSPC, forever: true });
    disk.block_on(async {
        write(&file, 512, &[1; 512]).await.unwrap();
        write(&file, 1024, &[1; 512]).await.unwrap();
        assert!(write(&file, 0, &[1; 1024]).await.is_err());
        write(&file, 512, &[1; 512]).await.unwrap();
        for _ in 0..3 {
            let error = write(&file, 2048, &[9; 512]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace);
        }
        disk.clear_faults();
        write(&file, 2048, &[9; 512]).await.unwrap();
    });
}

#[test]
fn a_failed_write_may_have_been_done_in_part() {
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 2);
        let pattern = Pattern::any().kind(OpKind::Write);
        disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
        assert!(disk.block_on(write(&file, 0, &[1; 1024])).is_err());
        seen.insert(tags(&disk));
    }
    assert_eq!(seen, [vec![0, 0], vec![0, 1], vec![1, 0], vec![1, 1]].into());
}

#[test]
fn space_runs_out_and_holes_give_it_back() {
    let disk = SimDisk::new(1);
    let space = FileOptions { space: Some(3 * 4096), ..FileOptions::default() };
    let file = disk.create("f", space);
    let device = FileOptions { device: Some(8192), ..FileOptions::default() };
    let device = disk.create("device", device);
    let no_space = |result: Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::NoSpace);
    disk.block_on(async {
        write(&file, 1 << 40, &[1; 8192]).await.unwrap();
        no_space(write(&file, 0, &[1; 8192]).await);
        assert!(file.occupied() <= 3 * 4096);
        write(&file, (1 << 40) + 4000, &[1; 96]).await.unwrap();
        Operation::zero(&file, 0, 1 << 41, ZeroMode::Punch).await.unwrap();
        assert_eq!(file.occupied(), 0);
        write(&file, 0, &[1; 12288]).await.unwrap();
        no_space(Operation::zero(&file, 16384, 1, ZeroMode::Keep).await);

        assert_eq!(device.length(), 8192);
        write(&device, 7680, &[1; 512]).await.unwrap();
        no_space(write(&device, 7680, &[2; 1024]).await);
        assert_eq!(device.length(), 8192);
        assert_eq!(disk.violations(), [""; 0]);
        assert!(Operation::truncate(&device, 4096).await.is_err());
    });
    assert_eq!(disk.violations().len(), 1);
}

#[test]
fn violations_are_noticed() {
    let disk = SimDisk::new(1);
    let options = FileOptions { alignment: 512, read_only: true, ..FileOptions::default() };
    let file = disk.create_with("base", options, &[5; 1024]);
    disk.block_on(async {
        read(&file, 0, 512).await.unwrap();
        sync(&file).await.unwrap();
        assert_eq!(disk.violations(), [""; 0]);
        assert!(read(&file, 0, 10).await.is_err());
        assert!(write(&file, 0, &[1; 512]).await.is_err());
        assert!(Operation::truncate(&file, 0).await.is_err());
        assert!(Operation::zero(&file, 0, 512, ZeroMode::Punch).await.is_err());
    });
    assert_eq!(disk.violations().len(), 4);
    assert_eq!(file.bytes(), [5; 1024]);
    assert_eq!(file.counters().writes, 1);
}

#[test]
fn a_storage_may_be_simulated() {
    let disk = SimDisk::new(1);
    let options = FileOptions { punch: false, alignment: 512, ..FileOptions::default() };
    let file = disk.create_with("f", options, &[5; 1024]);
    let access = Access { writable: true, ..Access::default() };
    let storage = Storage::open(Source::sim(file.clone()), access).unwrap();
    let engine = &SimEngine;
    assert_eq!((storage.name(), storage.length().unwrap()), ("f", 1024));
    disk.block_on(async {
        assert!(storage.can_punch() == file.options().punch);
        let punched = storage.zero(engine, 0, 512, ZeroMode::Punch).await;
        assert_eq!(punched.unwrap_err().kind(), ErrorKind::NotSupported);
        storage.zero(engine, 0, 512, ZeroMode::Keep).await.unwrap();
        let pieces = [Piece::Zeroes(10), Piece::Guest(GuestRef::from_slice(&[7; 1014]))];
        storage.write(engine, &pieces, 1024).await.unwrap();
        let mut out = [1; 20];
        let target = Target::Guest(GuestMut::from_slice(&mut out));
        storage.read(engine, target, 1024 - 5).await.unwrap();
        assert_eq!(out, *b"\x05\x05\x05\x05\x05\0\0\0\0\0\0\0\0\0\0\x07\x07\x07\x07\x07");
        storage.sync(engine).await.unwrap();
        storage.truncate(engine, 512).await.unwrap();
    });
    assert_eq!(disk.violations(), [""; 0]);
    assert_eq!(tags(&disk), [0]);
    assert_eq!(tags(&disk.crash(Crash::Process, 1)), [0]);
}

#[test]
fn a_simulated_device_has_an_end() {
    let disk = SimDisk::new(1);
    let options = FileOptions { device: Some(4096), alignment: 512, ..FileOptions::default() };
    let file = disk.create("f", options);
    let access = Access { writable: true, ..Access::default() };
    let storage = Storage::open(Source::sim(file), access).unwrap();
    assert_eq!(storage.capacity(), Some(4096));
    disk.block_on(async {
        let pieces = [Piece::Guest(GuestRef::from_slice(&[7; 4096]))];
        storage.write(&SimEngine, &pieces, 0).await.unwrap();
        storage.zero(&SimEngine, 1, 8192, ZeroMode::Punch).await.unwrap();
        assert!(storage.write(&SimEngine, &pieces, 512).await.is_err());
        let mut out = [1; 4096];
        let target = Target::Guest(GuestMut::from_slice(&mut out));
        storage.read(&SimEngine, target, 0).await.unwrap();
        assert_eq!(out[0], 7);
    });
    assert_eq!(disk.violations(), [""; 0]);
}

#[test]
fn waiting_in_vain_is_reported() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 1);
    let good = Task::new("good", async { write(&file, 0, &[1; 512]).await.unwrap() });
    let lost = Task::new("lost", std::future::pending());
    assert_eq!(disk.run(vec![good, lost]), Outcome::Deadlock(vec!["lost".to_owned()]));
    assert_eq!(tags(&disk), [1]);
}

#[test]
fn a_stopped_disk_stands_still() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 1);
    let written = RefCell::new(0);
    let writer = Task::new("writer", async {
        for tag in 1..100 {
            write(&file, 0, &[tag; 512]).await.unwrap();
            *written.borrow_mut() = tag;
        }
    });
    let outcome = disk.run_observed(vec![writer], |_| match *written.borrow() {
        10 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(outcome, Outcome::Stopped);
    assert!([[10], [11]].contains(&tags(&disk).try_into().unwrap()));
    let all: BTreeSet<_> = (0..=11).map(|tag| vec![tag]).collect();
    assert!(states(&disk, POWER, 500).is_subset(&all));
}

#[test]
fn a_hold_keeps_an_operation_till_nothing_else_can_go_on() {
    for seed in 0..50 {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 3);
        let hold = disk.hold(Pattern::any().kind(OpKind::Write).touching(0..512), Stage::Apply);
        let held = Task::new("held", async {
            write(&file, 0, &[1; 512]).await.unwrap();
            assert_eq!(read(&file, 512, 512).await.unwrap(), [50; 512]);
        });
        let other = Task::new("other", async {
            assert!(hold.caught().await);
            for tag in 1..=50 {
                write(&file, 512, &[tag; 512]).await.unwrap();
                assert_eq!(read(&file, 0, 512).await.unwrap()[0], 0);
            }
        });
        assert_eq!(disk.run(vec![held, other]), Outcome::Done);
    }
}

#[test]
fn who_waits_for_a_catch_that_cannot_come_is_told() {
    let disk = SimDisk::new(1);
    let hold = disk.hold(Pattern::any(), Stage::Apply);
    assert!(!disk.block_on(hold.caught()));
}

#[test]
fn a_dropped_future_touches_no_memory() {
    let mut written = BTreeSet::new();
    for seed in 0..100 {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 2);
        let mut out = vec![7; 512];
        disk.block_on(async {
            let target = Target::Guest(GuestMut::from_slice(&mut out));
            let given_up = give_up_after(1, Operation::read(&file, target, 0)).await;
            assert!(given_up.is_none());
            give_up_after(1, write(&file, 0, &[1; 1024])).await;
            let state = tags(&disk);
            for _ in 0..5 {
                sync(&file).await.unwrap();
            }
            assert_eq!(tags(&disk), state, "a dropped write came late");
            written.insert(state);
        });
        assert_eq!(out, [7; 512]);
    }
    assert_eq!(written, [vec![0, 0], vec![1, 0], vec![1, 1]].into());
}

#[test]
fn a_dropped_write_may_be_left_in_flight() {
    let late = (0..50).any(|seed| {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 1);
        disk.leave_dropped(true);
        disk.block_on(async {
            give_up_after(1, write(&file, 0, &[1; 512])).await;
            let state = tags(&disk);
            for _ in 0..5 {
                sync(&file).await.unwrap();
            }
            tags(&disk) != state
        })
    });
    assert!(late);
}

#[test]
fn files_go_out_and_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let disk = SimDisk::new(1);
    let file = disk.create("f", FileOptions::default());
    disk.block_on(async {
        write(&file, 1 << 20, &[1; 700]).await.unwrap();
        Operation::truncate(&file, (1 << 20) + 100).await.unwrap();
        Operation::truncate(&file, 3 << 20).await.unwrap();
    });
    file.dump(&path).unwrap();
    let again = disk.load("again", FileOptions::default(), &path).unwrap();
    assert!(again.same_bytes(&file));
    assert_eq!(again.length(), 3 << 20);
    assert_eq!(again.occupied(), 4096);
    disk.block_on(write(&again, 0, &[1])).unwrap();
    assert!(!again.same_bytes(&file));
}

#[test]
fn a_closed_hold_keeps_what_it_caught_and_lets_the_rest_pass() {
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        let file = file_of(&disk, 2);
        let hold = disk.hold(Pattern::any().kind(OpKind::Write), Stage::Apply);
        let held = Task::new("held", async { write(&file, 0, &[1; 512]).await.unwrap() });
        let other = Task::new("other", async {
            assert!(hold.caught().await);
            hold.close();
            write(&file, 512, &[2; 512]).await.unwrap();
            assert_eq!(tags(&disk), [0, 2]);
            hold.release();
        });
        assert_eq!(disk.run(vec![held, other]), Outcome::Done);
        assert_eq!(tags(&disk), [1, 2]);
    }
}
