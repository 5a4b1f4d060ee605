//! The simulator's own tests of what goes wrong: hostile media, operations that
//! fail at random or unheard, and those that must not be.

use super::engine::Operation;
use super::tests::{POWER, file_of, read, states, sync, write};
use super::*;
use crate::error::ErrorKind;
use crate::sys::memory::Block;

fn first(disk: &SimDisk) -> [u8; 512] {
    let mut bytes = [0; 512];
    disk.file("f").unwrap().peek(0, &mut bytes);
    bytes
}

#[test]
fn a_unit_that_is_being_written_may_become_garbage() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 2);
    disk.block_on(async {
        write(&file, 0, &[1; 512]).await.unwrap();
        sync(&file).await.unwrap();
        write(&file, 512, &[2; 512]).await.unwrap();
    });
    let mut garbage = 0;
    for seed in 0..200 {
        let after = disk.crash(Crash::Garbage { unit: 512 }, seed);
        let bytes = after.file("f").unwrap().bytes();
        assert_eq!(bytes[..512], [1; 512], "it was durable");
        garbage += u32::from(![[0; 512], [2; 512]].contains(&bytes[512..].try_into().unwrap()));
    }
    assert!((1..200).contains(&garbage), "{garbage} of 200");
    assert_eq!(states(&disk, POWER, 100), [vec![1, 0], vec![1, 2]].into());
}

#[test]
fn a_process_may_die_in_the_middle_of_a_write() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 4);
    let hold = disk.hold(Pattern::any().kind(OpKind::Write), Stage::Apply);
    let writer = Task::new("writer", async {
        let _ = write(&file, 0, &[1; 2048]).await;
    });
    let killer = Task::new("killer", async {
        assert!(hold.caught().await);
        let seen = states(&disk, Crash::Process, 500);
        let prefixes = (0..=4).map(|n| [vec![1; n], vec![0; 4 - n]].concat());
        assert_eq!(seen, prefixes.collect());
        hold.release();
    });
    assert_eq!(disk.run(vec![writer, killer]), Outcome::Done);
}

#[test]
fn what_the_first_sector_held_is_remembered_through_crashes() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 2);
    disk.block_on(async {
        write(&file, 0, &[1; 1024]).await.unwrap();
        write(&file, 8, &[2; 8]).await.unwrap();
        write(&file, 512, &[3; 512]).await.unwrap();
    });
    let mut mixed = [1; 512];
    mixed[8..16].fill(2);
    assert_eq!(file.first_sectors(), [[0; 512], [1; 512], mixed]);
    let known = |after: &SimDisk| after.file("f").unwrap().first_sectors().contains(&first(after));
    assert!((0..50).all(|seed| known(&disk.crash(POWER, seed))));
    let torn = (0..50).filter(|seed| !known(&disk.crash(Crash::Power { unit: 8 }, *seed)));
    assert!(torn.count() > 0, "a medium that tears sectors makes headers that never were");
}

#[test]
fn a_closed_file_is_left_alone_or_it_is_a_violation() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 2);
    disk.block_on(write(&file, 0, &[1; 512])).unwrap();
    file.retire();
    assert_eq!(disk.violations(), [""; 0]);
    assert_eq!(disk.block_on(read(&file, 0, 512)).unwrap_err().kind(), ErrorKind::Os(libc::EBADF));
    assert!(disk.violations()[0].contains("closed"));
    assert_eq!(first(&disk), [1; 512]);
}

#[test]
fn operations_fail_at_random() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 2);
    let pattern = Pattern::any().kind(OpKind::Write).one_in(4);
    disk.inject(Fault { pattern, errno: libc::EIO, forever: true });
    let failed = (0..400).filter(|_| disk.block_on(write(&file, 0, &[1; 512])).is_err()).count();
    assert!((50..150).contains(&failed), "{failed} of 400");
    assert_eq!(file.counters().failed, failed as u64);
}

#[test]
fn a_sync_that_fails_unheard_makes_the_next_one_fail() {
    let disk = SimDisk::new(1);
    let file = file_of(&disk, 1);
    let pattern = Pattern::any().kind(OpKind::Sync);
    disk.inject(Fault { pattern: pattern.clone(), errno: libc::EIO, forever: false });
    let hold = disk.hold(pattern, Stage::Complete);
    disk.block_on(async {
        write(&file, 0, &[1; 512]).await.unwrap();
        let mut lost = Box::pin(Operation::sync(&file));
        let caught = hold.caught();
        let mut caught = std::pin::pin!(caught);
        poll_fn(|context| {
            assert!(lost.as_mut().poll(context).is_pending());
            caught.as_mut().poll(context)
        })
        .await;
        assert_eq!(disk.in_flight(), 1);
        drop(lost);
        assert_eq!((disk.in_flight(), file.counters().failed_syncs), (0, 0));
        hold.release();
        assert!(sync(&file).await.is_err());
        assert_eq!(file.counters().failed_syncs, 1);
        sync(&file).await.unwrap();
    });
    assert_eq!(states(&disk, POWER, 50).len(), 2, "what the first one claimed stays lost");
}

#[test]
fn buffers_that_live_are_counted() {
    let before = live_blocks();
    let block = Block::zeroed(100).unwrap();
    let slice = block.slice(0, 10);
    drop(block);
    assert_eq!(live_blocks(), before + 1);
    drop(slice);
    assert_eq!(live_blocks(), before);
}
