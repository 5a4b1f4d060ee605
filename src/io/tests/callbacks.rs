//! Storage of the user.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use super::*;
use crate::error::ErrorKind;
use crate::io::callbacks::{Abilities, Callbacks, UserIo, UserResult};
use crate::sys::memory::Block;

/// What the tests look at, outside of the storage.
#[derive(Default)]
struct Seen {
    bytes: Mutex<Vec<u8>>,
    /// What each call is to answer, if it is to fail.
    error: AtomicUsize,
    closed: AtomicUsize,
    inside: AtomicUsize,
    met: AtomicBool,
    discarded: Mutex<Vec<(u64, u64)>>,
    zeroed: Mutex<Vec<(u64, u64, bool)>>,
}

struct Memory {
    seen: Arc<Seen>,
    abilities: Abilities,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.seen.closed.fetch_add(1, SeqCst);
    }
}

impl Memory {
    fn call<T>(&self, f: impl FnOnce(&mut Vec<u8>) -> T) -> UserResult<T> {
        if self.seen.inside.fetch_add(1, SeqCst) > 0 {
            self.seen.met.store(true, SeqCst);
        }
        std::thread::yield_now();
        let error = self.seen.error.load(SeqCst) as i32;
        let result = match error {
            0 => Ok(f(&mut self.seen.bytes.lock().unwrap())),
            error => Err(error),
        };
        self.seen.inside.fetch_sub(1, SeqCst);
        result
    }
}

impl UserIo for Memory {
    fn abilities(&self) -> Abilities {
        self.abilities
    }
    fn read(&self, to: GuestMut<'_>, offset: u64) -> UserResult<()> {
        self.call(|bytes| {
            to.fill_zero();
            let start = (offset as usize).min(bytes.len());
            let end = (start + to.len()).min(bytes.len());
            to.copy_from(0, &bytes[start..end]);
        })
    }
    fn write(&self, from: GuestRef<'_>, offset: u64) -> UserResult<()> {
        self.call(|bytes| {
            let (start, end) = (offset as usize, offset as usize + from.len());
            let length = bytes.len().max(end);
            bytes.resize(length, 0);
            from.copy_to(0, &mut bytes[start..end]);
        })
    }
    fn length(&self) -> UserResult<u64> {
        self.call(|bytes| bytes.len() as u64)
    }
    fn flush(&self) -> UserResult<()> {
        self.call(|_| ())
    }
    fn truncate(&self, length: u64) -> UserResult<()> {
        assert!(self.abilities.truncate);
        self.call(|bytes| bytes.resize(length as usize, 0))
    }
    fn discard(&self, offset: u64, length: u64) -> UserResult<()> {
        assert!(self.abilities.discard);
        self.call(|_| self.seen.discarded.lock().unwrap().push((offset, length)))
    }
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> UserResult<()> {
        assert!(self.abilities.write_zeroes);
        self.call(|_| self.seen.zeroed.lock().unwrap().push((offset, length, may_unmap)))
    }
}

const ALL: Abilities = Abilities { write: true, truncate: true, discard: true, write_zeroes: true };
const FEW: Abilities =
    Abilities { write: true, truncate: false, discard: false, write_zeroes: false };

fn memory(abilities: Abilities, serialized: bool) -> (Arc<Seen>, Arc<Source>) {
    let seen = Arc::<Seen>::default();
    let io = Box::new(Memory { seen: seen.clone(), abilities });
    (seen, Source::callbacks(Callbacks::new(io, serialized)))
}

#[test]
fn bytes_go_both_ways() {
    let (seen, source) = memory(ALL, false);
    // Neither locks nor direct I/O mean anything here.
    let access = Access { lock: true, direct: true, ..PLAIN };
    let storage = Storage::open(source, access).unwrap();
    assert_eq!((storage.name(), storage.path(), storage.identity()), ("callbacks", None, None));
    let block = Block::from_bytes(b"ours").unwrap();
    let pieces = [
        Piece::Guest(GuestRef::from_slice(b"theirs")),
        Piece::Zeroes(2),
        Piece::Block(block.slice(0, 4)),
    ];
    block_on(storage.write(&Strict, &pieces, 3)).unwrap();
    assert_eq!(*seen.bytes.lock().unwrap(), b"\0\0\0theirs\0\0ours");
    assert_eq!(read(&storage, 9, 8), b"\0\0ours\0\0");
    let part = block.slice(0, 3);
    block_on(storage.read(&Strict, Target::Block(part.clone()), 3)).unwrap();
    assert_eq!(part.to_vec().unwrap(), b"the");
    assert_eq!((storage.length().unwrap(), storage.allocated().unwrap()), (15, 15));
    block_on(storage.truncate(&Strict, 4)).unwrap();
    assert_eq!(storage.length().unwrap(), 4);
    block_on(storage.zero(&Strict, 1, 2, ZeroMode::Keep)).unwrap();
    block_on(storage.zero(&Strict, 3, 4, ZeroMode::Punch)).unwrap();
    assert_eq!(*seen.zeroed.lock().unwrap(), [(1, 2, false), (3, 4, true)]);
    block_on(storage.discard(&Strict, 5, 6)).unwrap();
    assert_eq!(*seen.discarded.lock().unwrap(), [(5, 6)]);
    block_on(storage.sync(&Strict)).unwrap();
    assert_eq!(storage.counters().syncs, 1);
}

#[test]
fn what_is_missing_is_not_supported() {
    let (_, source) = memory(FEW, false);
    let storage = Storage::open(source, PLAIN).unwrap();
    assert!(!storage.can_punch());
    let missing = [
        block_on(storage.truncate(&Strict, 4)),
        block_on(storage.zero(&Strict, 0, 1, ZeroMode::Keep)),
        block_on(storage.zero(&Strict, 0, 1, ZeroMode::Punch)),
        block_on(storage.discard(&Strict, 0, 1)),
    ];
    for result in missing {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NotSupported);
    }
    let (_, source) = memory(Abilities::default(), false);
    let error = Storage::open(source.clone(), PLAIN).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Os(libc::EACCES));
    assert!(Storage::open(source, Access::default()).is_ok());
}

#[test]
fn errors_keep_their_errno() {
    let (seen, source) = memory(ALL, false);
    let storage = Storage::open(source, PLAIN).unwrap();
    for (answer, errno) in [(libc::ENOSPC, libc::ENOSPC), (5000, libc::EIO), (-7, libc::EIO)] {
        seen.error.store(answer as usize, SeqCst);
        let mut byte = [0];
        let to = Target::Guest(GuestMut::from_slice(&mut byte));
        let errors = [
            block_on(storage.read(&Strict, to, 0)).unwrap_err(),
            try_write(&storage, 0, &[1]).unwrap_err(),
            storage.length().unwrap_err(),
            block_on(storage.sync(&Strict)).unwrap_err(),
            block_on(storage.truncate(&Strict, 1)).unwrap_err(),
            block_on(storage.discard(&Strict, 1, 1)).unwrap_err(),
            block_on(storage.zero(&Strict, 1, 1, ZeroMode::Keep)).unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Callback(errno), "{error}");
            assert_eq!(error.errno(), errno);
        }
    }
}

#[test]
fn closed_once_and_last() {
    let (seen, source) = memory(ALL, false);
    let storage = Storage::open(source, PLAIN).unwrap();
    let second = storage.reopen(Access::default()).unwrap();
    let third = second.change_access(PLAIN).unwrap();
    drop(storage);
    drop(second);
    assert_eq!(seen.closed.load(SeqCst), 0);
    write(&third, 0, b"x");
    drop(third);
    assert_eq!(seen.closed.load(SeqCst), 1);
    // A source that was never opened is closed, too.
    let (seen, source) = memory(ALL, false);
    drop(source);
    assert_eq!(seen.closed.load(SeqCst), 1);
}

#[test]
fn one_call_at_a_time_where_asked_for() {
    let (seen, source) = memory(ALL, true);
    let storage = Storage::open(source, PLAIN).unwrap();
    let other = storage.reopen(PLAIN).unwrap();
    std::thread::scope(|scope| {
        for storage in [&storage, &other, &storage] {
            scope.spawn(move || {
                for i in 0..300 {
                    write(storage, i, b"x");
                    read(storage, i, 2);
                    storage.length().unwrap();
                    block_on(storage.discard(&Strict, i, 1)).unwrap();
                }
            });
        }
    });
    assert!(!seen.met.load(SeqCst));
}
