//! Locks inside one process: what the kernel does not see. (Against QEMU:
//! tests/locks.rs.)

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;

use super::*;
use crate::error::ErrorKind;
use crate::sys::lock::{self, Mode};

const READ: Access = Access { writable: false, lock: true, ..PLAIN };
const WRITE: Access = Access { lock: true, ..PLAIN };

struct Subject {
    _dir: TempDir,
    path: PathBuf,
}

impl Subject {
    fn new() -> Subject {
        let dir = direct_dir();
        let path = dir.path().join("image");
        std::fs::write(&path, [7; 5000]).unwrap();
        Subject { _dir: dir, path }
    }

    fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).unwrap()
    }

    fn by_path(&self, access: Access) -> Result<Storage> {
        Storage::open(Source::path(&self.path), access)
    }

    /// What somebody else, in another process, could open it for.
    fn leaves_room_for(&self) -> Option<Mode> {
        let file = self.file();
        [Mode::Write, Mode::Read].into_iter().find(|mode| lock::test(file.as_fd(), *mode).is_ok())
    }
}

fn by_fd(file: &File, access: Access) -> Result<Storage> {
    Storage::open(Source::fd(file.as_fd())?, access)
}

fn refused(result: Result<Storage>) {
    let error = result.expect_err("must be locked");
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    assert!(error.message().contains("image"), "{error}");
}

#[test]
fn one_writer_or_many_readers() {
    let subject = Subject::new();
    let writer = subject.by_path(WRITE).unwrap();
    assert_eq!(subject.leaves_room_for(), None);
    refused(subject.by_path(WRITE));
    refused(subject.by_path(READ));
    assert!(subject.by_path(PLAIN).is_ok(), "without lock nobody asks");
    drop(writer);
    assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
    let readers = [subject.by_path(READ).unwrap(), subject.by_path(READ).unwrap()];
    refused(subject.by_path(WRITE));
    assert_eq!(subject.leaves_room_for(), Some(Mode::Read));
    drop(readers);
    assert!(subject.by_path(WRITE).is_ok());
}

#[test]
fn descriptors_that_share_a_description_are_told_apart() {
    let subject = Subject::new();
    let file = subject.file();
    let copy = file.try_clone().unwrap();
    let name = |error: crate::error::Error| assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    let writer = by_fd(&file, WRITE).unwrap();
    name(by_fd(&file, WRITE).unwrap_err());
    name(by_fd(&copy, READ).unwrap_err());
    refused(subject.by_path(READ));
    // A failed attempt has not unlocked the first one's description.
    assert_eq!(subject.leaves_room_for(), None);
    drop(writer);
    // Unlocked, although the caller's descriptors are still open.
    assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
}

#[test]
fn the_locks_go_with_the_last_user() {
    let subject = Subject::new();
    let (first, second) = (subject.file(), subject.file());
    let copy = first.try_clone().unwrap();
    // In every order, with shared and separate descriptions.
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        let mut storages = [
            Some(by_fd(&first, READ).unwrap()),
            Some(by_fd(&copy, READ).unwrap()),
            Some(by_fd(&second, READ).unwrap()),
            Some(subject.by_path(READ).unwrap()),
        ];
        for index in order {
            assert_eq!(subject.leaves_room_for(), Some(Mode::Read), "{order:?} {index}");
            refused(subject.by_path(WRITE));
            storages[index] = None;
        }
        assert_eq!(subject.leaves_room_for(), Some(Mode::Write), "{order:?}");
    }
}

#[test]
fn a_lock_is_kept_after_a_failed_attempt() {
    let subject = Subject::new();
    let file = subject.file();
    let reader = by_fd(&file, READ).unwrap();
    // Somebody else reads, too: a writer cannot be, and a failed attempt at it
    // through the same description takes nothing from the reader.
    let other = subject.by_path(READ).unwrap();
    assert!(by_fd(&file, WRITE).is_err());
    drop(other);
    assert_eq!(subject.leaves_room_for(), Some(Mode::Read));
    drop(reader);
    assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
}

#[test]
fn access_changes_without_a_gap() {
    let subject = Subject::new();
    let file = subject.file();
    let sources = [Source::path(&subject.path), Source::fd(file.as_fd()).unwrap()];
    for source in sources {
        let reader = Storage::open(source, READ).unwrap();
        read(&reader, 0, 10);
        assert_eq!(reader.reopen(WRITE).unwrap_err().kind(), ErrorKind::Locked);
        let writer = changed(&reader, WRITE);
        assert_eq!(subject.leaves_room_for(), None);
        drop(reader);
        assert_eq!(subject.leaves_room_for(), None);
        assert_eq!(writer.counters().read_bytes, 10);
        write(&writer, 0, b"new");
        let again = changed(&writer, WRITE);
        drop(writer);
        assert_eq!(subject.leaves_room_for(), None);
        let reader = changed(&again, READ);
        drop(again);
        assert_eq!(subject.leaves_room_for(), Some(Mode::Read));
        assert_eq!(read(&reader, 0, 3), b"new");
        // Without lock, and back.
        let unlocked = changed(&reader, PLAIN);
        assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
        let locked = changed(&unlocked, WRITE);
        drop((reader, unlocked));
        assert_eq!(subject.leaves_room_for(), None);
        drop(locked);
        assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
    }
}

/// The successor, chosen.
fn changed(storage: &Storage, access: Access) -> Storage {
    let new = storage.change_access(access).unwrap();
    new.settle_lock().unwrap();
    new
}

#[test]
fn a_successor_that_is_given_up_leaves_the_lock() {
    const NOTHING: Access = Access { lock: false, ..READ };
    let subject = Subject::new();
    let file = subject.file();
    let sources = [Source::path(&subject.path), Source::fd(file.as_fd()).unwrap()];
    let cases = [(READ, Some(Mode::Read)), (WRITE, None), (NOTHING, Some(Mode::Write))];
    for source in sources {
        for (before, room) in cases {
            for (after, room_after) in cases {
                let storage = Storage::open(source.clone(), before).unwrap();
                // While it is not decided, the lock is enough for both.
                let least = [room, room_after].into_iter().min_by_key(|room| match room {
                    None => 0,
                    Some(Mode::Read | Mode::ReadData) => 1,
                    Some(Mode::Write | Mode::WriteData) => 2,
                });
                let successor = storage.change_access(after).unwrap();
                assert_eq!(subject.leaves_room_for(), least.unwrap(), "{before:?} {after:?}");
                drop(successor);
                assert_eq!(subject.leaves_room_for(), least.unwrap(), "{before:?} {after:?}");
                storage.settle_lock().unwrap();
                assert_eq!(subject.leaves_room_for(), room, "{before:?} {after:?}");
                drop(storage);
                assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
            }
        }
    }
}

#[test]
fn access_stays_where_it_cannot_change() {
    let subject = Subject::new();
    let file = subject.file();
    let sources = [Source::path(&subject.path), Source::fd(file.as_fd()).unwrap()];
    for source in sources {
        let reader = Storage::open(source, READ).unwrap();
        // Another reader in this process.
        let other = subject.by_path(READ).unwrap();
        refused_change(&reader);
        drop(other);
        // Another reader elsewhere: a description of its own, not registered.
        let elsewhere = subject.file();
        lock::take(elsewhere.as_fd(), Mode::Read.bytes()).unwrap();
        refused_change(&reader);
        drop(elsewhere);
        assert_eq!(subject.leaves_room_for(), Some(Mode::Read));
        assert!(reader.change_access(WRITE).is_ok());
        drop(reader);
        assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
    }
}

fn refused_change(reader: &Storage) {
    let error = reader.change_access(WRITE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
}

#[test]
fn what_lingers_does_not_hinder_an_upgrade() {
    let subject = Subject::new();
    let (first, second) = (subject.file(), subject.file());
    let gone = by_fd(&first, READ).unwrap();
    let stays = by_fd(&second, READ).unwrap();
    drop(gone);
    let writer = changed(&stays, WRITE);
    drop(stays);
    assert_eq!(subject.leaves_room_for(), None);
    drop(writer);
    assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
}

#[test]
fn another_file_of_the_same_name_is_refused() {
    let subject = Subject::new();
    let reader = subject.by_path(READ).unwrap();
    std::fs::remove_file(&subject.path).unwrap();
    std::fs::write(&subject.path, b"another").unwrap();
    let error = reader.change_access(WRITE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Os(libc::ESTALE), "{error}");
    assert_eq!(read(&reader, 0, 2), [7, 7]);
}

#[test]
fn writers_race_for_a_file() {
    let subject = Subject::new();
    let file = subject.file();
    let inside = std::sync::atomic::AtomicUsize::new(0);
    let won = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for by_path in [true, true, false, false] {
            let (inside, won, subject, file) = (&inside, &won, &subject, &file);
            scope.spawn(move || {
                use std::sync::atomic::Ordering::SeqCst;
                for _ in 0..300 {
                    let opened = match by_path {
                        true => subject.by_path(WRITE),
                        false => by_fd(file, WRITE),
                    };
                    let Ok(storage) = opened else { continue };
                    assert_eq!(inside.fetch_add(1, SeqCst), 0);
                    std::thread::yield_now();
                    won.fetch_add(1, SeqCst);
                    inside.fetch_sub(1, SeqCst);
                    drop(storage);
                }
            });
        }
    });
    assert!(won.into_inner() > 0);
    assert_eq!(subject.leaves_room_for(), Some(Mode::Write));
}
