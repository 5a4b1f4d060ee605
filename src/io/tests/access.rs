//! What is opened how, and what is refused.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use rustix::fs::fcntl_getfl;

use super::*;
use crate::error::ErrorKind;

fn from_fd(file: &File, access: Access) -> Result<Storage> {
    Storage::open(Source::fd(file.as_fd())?, access)
}

fn kind(result: Result<Storage>) -> ErrorKind {
    result.expect_err("must be refused").kind()
}

const READ: Access = Access { writable: false, ..PLAIN };
const DIRECT: Access = Access { direct: true, ..PLAIN };

#[test]
fn a_descriptor_must_allow_what_is_asked_for() {
    let dir = direct_dir();
    let path = dir.path().join("file");
    std::fs::write(&path, [7; 100]).unwrap();
    let reader = File::open(&path).unwrap();
    assert_eq!(kind(from_fd(&reader, PLAIN)), ErrorKind::Os(libc::EACCES));
    let storage = from_fd(&reader, READ).unwrap();
    assert_eq!(read(&storage, 98, 4), [7, 7, 0, 0]);
    assert_eq!(try_write(&storage, 0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);

    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    assert_eq!(kind(from_fd(&writer, READ)), ErrorKind::Os(libc::EACCES));
    let appender = OpenOptions::new().read(true).append(true).open(&path).unwrap();
    assert_eq!(kind(from_fd(&appender, PLAIN)), ErrorKind::InvalidArgument);
    assert!(from_fd(&appender, READ).is_ok());
    let nothing = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    assert_eq!(kind(from_fd(&nothing, READ)), ErrorKind::Os(libc::EBADF));
    assert_eq!(std::fs::read(&path).unwrap(), [7; 100]);
}

#[test]
fn a_descriptors_flags_are_heeded_and_left_alone() {
    let dir = direct_dir();
    let path = dir.path().join("file");
    std::fs::write(&path, [7; 5000]).unwrap();
    let both = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    let (cached, direct) = (both(0).unwrap(), both(libc::O_DIRECT).unwrap());
    assert_eq!(kind(from_fd(&cached, DIRECT)), ErrorKind::InvalidArgument);
    assert_eq!(kind(from_fd(&direct, PLAIN)), ErrorKind::InvalidArgument);
    for (file, access) in [(&cached, PLAIN), (&direct, DIRECT)] {
        let before = fcntl_getfl(file).unwrap();
        let storage = from_fd(file, access).unwrap();
        assert_eq!(storage.request_alignment() > 1, access.direct);
        write(&storage, 3, &[1, 2]);
        assert_eq!(read(&storage, 2, 4), [7, 1, 2, 7]);
        drop(storage);
        assert_eq!(fcntl_getfl(file).unwrap(), before);
    }
}

#[test]
fn a_descriptors_position_is_left_alone() {
    let dir = direct_dir();
    let path = dir.path().join("file");
    std::fs::write(&path, [7; 5000]).unwrap();
    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(17)).unwrap();
    let storage = from_fd(&file, PLAIN).unwrap();
    assert_eq!(storage.length().unwrap(), 5000);
    write(&storage, 100, &[1; 100]);
    read(&storage, 0, 5000);
    block_on(storage.truncate(&Strict, 4000)).unwrap();
    assert_eq!(std::io::Seek::stream_position(&mut file).unwrap(), 17);
}

#[test]
fn only_files_and_devices_are_opened() {
    let dir = direct_dir();
    let by_path = |path: &Path| kind(Storage::open(Source::path(path), READ));
    assert_eq!(by_path(dir.path()), ErrorKind::Os(libc::EISDIR));
    assert_eq!(by_path(&dir.path().join("nothing")), ErrorKind::Os(libc::ENOENT));
    assert_eq!(by_path(Path::new("/dev/null")), ErrorKind::InvalidArgument);
    // A pipe with nobody at the other end must not stop us.
    let pipe = dir.path().join("pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert_eq!(by_path(&pipe), ErrorKind::InvalidArgument);
    let error = Storage::open(Source::path(&pipe), PLAIN).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn descriptors_of_ours_are_not_inherited_and_do_block() {
    let dir = direct_dir();
    let path = dir.path().join("file");
    std::fs::write(&path, b"").unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    for storage in [open(&path, PLAIN), open(&path, DIRECT), from_fd(&file, PLAIN).unwrap()] {
        let fd = storage.fd().unwrap();
        assert_ne!(fd.as_raw_fd(), file.as_raw_fd());
        let flags = rustix::io::fcntl_getfd(fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert!(!fcntl_getfl(fd).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    }
}

#[test]
fn no_direct_io_is_said_in_words() {
    // Files of the kernel's own have none.
    let access = Access { direct: true, ..READ };
    let error = Storage::open(Source::path("/proc/self/status"), access).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    assert!(error.message().contains("/proc/self/status"), "{error}");
    assert!(error.message().contains("direct I/O"), "{error}");
}

#[test]
fn names_paths_and_identities() {
    let dir = direct_dir();
    let (path, link) = (dir.path().join("a\tb"), dir.path().join("link"));
    std::fs::write(&path, b"").unwrap();
    std::fs::hard_link(&path, &link).unwrap();
    let storage = open(&path, READ);
    assert!(storage.name().ends_with("a\\tb"));
    assert_eq!(storage.path(), Some(&*path));
    assert_eq!(storage.capacity(), None);
    assert_eq!(storage.identity(), open(&link, READ).identity());
    std::fs::write(dir.path().join("other"), b"").unwrap();
    assert_ne!(storage.identity(), open(&dir.path().join("other"), READ).identity());
    let file = File::open(&path).unwrap();
    let by_fd = from_fd(&file, READ).unwrap();
    assert_eq!(by_fd.name(), format!("fd {}", file.as_raw_fd()));
    assert_eq!(by_fd.path(), None);
    assert_eq!(by_fd.identity(), storage.identity());
}

/// The umask, which can be asked only by setting it, or so.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:")).unwrap();
    u32::from_str_radix(line.trim(), 8).unwrap()
}

#[test]
fn created_files() {
    let dir = direct_dir();
    let path = dir.path().join("new");
    for direct in [false, true] {
        let access = Access { lock: true, direct, ..PLAIN };
        let storage = Storage::create(&path, true, access).unwrap();
        assert_eq!(storage.request_alignment() > 1, direct);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644 & !umask());
        write(&storage, 0, &[1; 1000]);
        drop(storage);
        assert_eq!(kind(Storage::create(&path, true, access)), ErrorKind::Exists);
        assert!(std::fs::metadata(&path).unwrap().len() >= 1000);
        let storage = Storage::create(&path, false, access).unwrap();
        assert_eq!(storage.length().unwrap(), 0);
        drop(storage);
        std::fs::remove_file(&path).unwrap();
    }
    let access = Access { writable: false, ..PLAIN };
    assert_eq!(kind(Storage::create(&path, true, access)), ErrorKind::InvalidArgument);
    assert!(!path.exists());
}

#[test]
fn creating_does_not_empty_what_somebody_uses() {
    let dir = direct_dir();
    let path = dir.path().join("used");
    std::fs::write(&path, [5; 100]).unwrap();
    let locked = Access { lock: true, ..PLAIN };
    let user = open(&path, Access { writable: false, ..locked });
    assert_eq!(kind(Storage::create(&path, false, locked)), ErrorKind::Locked);
    assert_eq!(kind(Storage::create(&path, true, locked)), ErrorKind::Exists);
    assert_eq!(std::fs::read(&path).unwrap(), [5; 100]);
    drop(user);
    assert!(Storage::create(&path, false, locked).is_ok());
}
