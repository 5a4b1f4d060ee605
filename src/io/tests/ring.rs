//! The engine that submits to a ring, driven by the test.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::io::file::Alignment;
use crate::io::ring::RingEngine;
use crate::sys::event::{eventfd, signal};
use crate::sys::memory::Block;

/// `None` where the system has no io_uring.
fn engine(operations: u32) -> Option<(RingEngine, Arc<std::os::fd::OwnedFd>)> {
    let bell = Arc::new(eventfd(true).unwrap());
    Some((RingEngine::new(operations, bell.clone()).ok()?, bell))
}

/// Polls a future to its end, driving the ring meanwhile.
fn drive<F: Future>(engine: &RingEngine, future: F) -> F::Output {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        engine.wait(None).unwrap();
        engine.complete();
    }
}

/// A storage whose transfers all go to the ring.
fn direct(dir: &TempDir) -> Storage {
    let path = dir.path().join("file");
    std::fs::write(&path, b"").unwrap();
    let mut storage = open(&path, PLAIN);
    storage.set_alignment(Alignment { memory: 1, request: 512 });
    storage
}

#[test]
fn lists_and_ranges_longer_than_an_operation() {
    let Some((engine, _)) = engine(2) else { return };
    let dir = tempfile::tempdir().unwrap();
    let storage = direct(&dir);
    let mut random = Random(7);
    // More than a transfer takes in tests (64 KiB), and more iovecs than the kernel
    // takes; memory of the caller, of ours, and zeroes.
    for (parts, size) in [(1, 512), (1, 200_000 / 512 * 512), (3000, 512), (5, 66_048)] {
        let data: Vec<Vec<u8>> = (0..parts).map(|_| random.bytes(size)).collect();
        let mut expected = Vec::new();
        let mut pieces = Vec::new();
        for (index, bytes) in data.iter().enumerate() {
            match index % 3 {
                1 => pieces.push(Piece::Block(Block::from_bytes(bytes).unwrap().slice(0, size))),
                2 => pieces.push(Piece::Zeroes(size)),
                _ => pieces.push(Piece::Guest(GuestRef::from_slice(bytes))),
            }
            match index % 3 {
                2 => expected.resize(expected.len() + size, 0),
                _ => expected.extend(bytes),
            }
        }
        drive(&engine, storage.write(&engine, &pieces, 1024)).unwrap();
        assert!(super::read(&storage, 1024, expected.len()) == expected, "{parts} of {size}");
        let mut back = vec![0xee; expected.len()];
        let to = Target::Guest(GuestMut::from_slice(&mut back));
        drive(&engine, storage.read(&engine, to, 1024)).unwrap();
        assert!(back == expected, "{parts} of {size}");
        drive(&engine, storage.truncate(&engine, 0)).unwrap();
    }
    assert_eq!(engine.flying(), 0);
}

#[test]
fn what_lies_past_the_end_is_zero() {
    let Some((engine, _)) = engine(2) else { return };
    let dir = tempfile::tempdir().unwrap();
    let storage = direct(&dir);
    std::fs::write(dir.path().join("file"), [7; 1000]).unwrap();
    for (offset, there) in [(0, 1000), (512, 488), (1024, 0), (1 << 40, 0)] {
        let block = Block::from_bytes(&[0xee; 4096]).unwrap();
        drive(&engine, storage.read(&engine, Target::Block(block.all()), offset)).unwrap();
        let bytes = block.all().to_vec().unwrap();
        assert!(bytes[..there].iter().all(|byte| *byte == 7), "{offset}");
        assert!(bytes[there..].iter().all(|byte| *byte == 0), "{offset}");
    }
}

#[test]
fn zeroing_and_syncing_and_errors() {
    let Some((engine, _)) = engine(2) else { return };
    let dir = tempfile::tempdir().unwrap();
    let storage = direct(&dir);
    write(&storage, 0, &[9; 8192]);
    drive(&engine, storage.sync(&engine)).unwrap();
    match drive(&engine, storage.zero(&engine, 512, 4096, ZeroMode::Punch)) {
        Ok(()) => assert_eq!(super::read(&storage, 0, 8192)[512..4608], [0; 4096]),
        Err(error) => assert_eq!(error.kind(), crate::error::ErrorKind::NotSupported),
    }
    // The kernel refuses offsets that it cannot have.
    let to = Target::Block(Block::zeroed(512).unwrap().all());
    let error = drive(&engine, storage.read(&engine, to, 1 << 63)).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.message().contains("reading 512 bytes"), "{error}");
}

/// The kernel is done with the memory of an operation when its future is gone.
#[test]
fn a_future_that_is_dropped_waits_for_its_operation() {
    let Some((engine, _)) = engine(1) else { return };
    let dir = tempfile::tempdir().unwrap();
    let storage = direct(&dir);
    for round in 0..50 {
        let data = vec![round as u8 + 1; 65_536];
        let pieces = [Piece::Guest(GuestRef::from_slice(&data))];
        {
            let mut write = pin!(storage.write(&engine, &pieces, 0));
            let mut context = Context::from_waker(Waker::noop());
            assert!(write.as_mut().poll(&mut context).is_pending());
            assert_eq!(engine.flying(), 1);
        }
        assert_eq!(engine.flying(), 0);
        assert_eq!(super::read(&storage, 0, 65_536), data);
    }
}

/// Cached data is a copy of memory: nothing is submitted for it.
#[test]
fn the_page_cache_is_used_at_once() {
    let Some((engine, _)) = engine(1) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"").unwrap();
    let storage = open(&path, PLAIN);
    write(&storage, 0, &[3; 10_000]);
    let mut bytes = vec![0; 10_000];
    let to = Target::Guest(GuestMut::from_slice(&mut bytes));
    assert!(storage.read_now(&engine, &to, 0).unwrap().is_ok());
    assert_eq!(bytes, [3; 10_000]);
    let pieces = [Piece::Guest(GuestRef::from_slice(&[4; 5000]))];
    let mut write = pin!(storage.write(&engine, &pieces, 100));
    let mut context = Context::from_waker(Waker::noop());
    assert!(write.as_mut().poll(&mut context).is_ready());
}

#[test]
fn the_bell_ends_a_wait_again_and_again() {
    let Some((engine, bell)) = engine(1) else { return };
    for _ in 0..3 {
        signal(&bell);
        engine.wait(None).unwrap();
        assert!(engine.complete());
        assert!(!engine.has_completions());
    }
    // The end of the time is told where nothing was submitted on the way.
    engine.submit().unwrap();
    let limit = std::time::Duration::from_millis(5);
    assert_eq!(engine.wait(Some(limit)), Err(libc::ETIME));
}
