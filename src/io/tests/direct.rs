//! Writes of parts of blocks, at the same time as others.

use std::thread;

use super::*;
use crate::io::file::Alignment;

/// Threads write neighbouring records that share blocks, and whole blocks that
/// the records' owners write in part at other times: nobody's write is undone.
fn nothing_is_lost(access: Access, alignment: Option<Alignment>) {
    const THREADS: usize = 4;
    const ROUNDS: u8 = 60;
    const RECORD: usize = 100;
    const RECORDS: usize = 40;
    let dir = direct_dir();
    let path = dir.path().join("shared");
    std::fs::write(&path, vec![0; THREADS * RECORD * RECORDS]).unwrap();
    let mut storage = open(&path, access);
    if let Some(alignment) = alignment {
        storage.set_alignment(alignment);
    }
    let storage = &storage;
    thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    for record in 0..RECORDS {
                        let offset = (record * THREADS + thread) * RECORD;
                        write(storage, offset as u64, &[round; RECORD]);
                        let back = read(storage, offset as u64, RECORD);
                        assert_eq!(back, [round; RECORD], "record {record} of {thread}");
                    }
                }
            });
        }
    });
}

#[test]
fn parts_of_blocks_are_not_lost() {
    nothing_is_lost(Access { direct: true, ..PLAIN }, None);
    nothing_is_lost(PLAIN, Some(Alignment { memory: 512, request: 4096 }));
}

/// A whole block and a part of it, both written again and again: the part's
/// old surroundings never come back after a whole write has completed.
#[test]
fn whole_blocks_are_not_undone() {
    let dir = direct_dir();
    let path = dir.path().join("whole");
    std::fs::write(&path, [0; 4096]).unwrap();
    let mut storage = open(&path, PLAIN);
    storage.set_alignment(Alignment { memory: 1, request: 4096 });
    let storage = &storage;
    thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..4000 {
                write(storage, 0, &[0xff; 8]);
            }
        });
        for round in 0..4000u32 {
            let byte = (round % 250) as u8 + 1;
            write(storage, 0, &[byte; 4096]);
            assert_eq!(read(storage, 8, 4088), [byte; 4088], "round {round}");
        }
    });
}

/// So do zeroes: a hole made while a part of the block is written stays one.
#[test]
fn zeroes_are_not_undone() {
    let dir = direct_dir();
    let path = dir.path().join("zeroes");
    std::fs::write(&path, [0; 8192]).unwrap();
    let mut storage = open(&path, PLAIN);
    storage.set_alignment(Alignment { memory: 1, request: 4096 });
    let storage = &storage;
    thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..2000 {
                write(storage, 0, &[0xff; 8]);
                write(storage, 8184, &[0xff; 8]);
            }
        });
        for round in 0..2000 {
            write(storage, 100, &[1; 7000]);
            let mode = [ZeroMode::Punch, ZeroMode::Keep][round % 2];
            block_on(storage.zero(&Strict, 8, 8176, mode)).unwrap();
            assert_eq!(read(storage, 8, 8176), [0; 8176], "round {round}");
        }
    });
}

#[test]
fn the_end_of_a_raw_image_stays() {
    let dir = direct_dir();
    let path = dir.path().join("raw");
    std::fs::write(&path, [1; 1000]).unwrap();
    let storage = open(&path, Access { direct: true, fixed_length: true, ..PLAIN });
    write(&storage, 990, &[2; 10]);
    assert_eq!(storage.length().unwrap(), 1000);
    write(&storage, 0, &[3; 1000]);
    assert_eq!(storage.length().unwrap(), 1000);
    let error = try_write(&storage, 990, &[2; 11]).unwrap_err();
    assert_eq!(error.kind(), crate::error::ErrorKind::InvalidArgument);
    assert_eq!(std::fs::read(&path).unwrap(), [3; 1000]);
}

#[test]
fn an_error_names_place_and_file() {
    let dir = direct_dir();
    let path = dir.path().join("in\nname");
    std::fs::write(&path, [1; 1000]).unwrap();
    let storage = open(&path, PLAIN);
    let error = try_write(&storage, i64::MAX as u64 - 1, &[1; 5]).unwrap_err();
    let message = error.message();
    assert!(message.contains("writing 5 bytes at offset 9223372036854775806"), "{message}");
    assert!(message.contains("in\\nname"), "{message}");
}
