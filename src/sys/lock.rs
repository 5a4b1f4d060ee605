//! Byte locks that belong to an open file description (OFD locks), laid out as
//! QEMU lays them out.
//!
//! Each way of using an image is a permission with a number. Whoever uses
//! permission n holds byte 100 + n, whoever does not share it with others holds
//! byte 200 + n: always with a read lock, which all can have. Whether somebody
//! objects is then found out by asking who would stand in the way of a write
//! lock. This file knows bytes; who may lock what inside this process is the
//! registry's business.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::file::{SysResult, errno};

/// Permissions of QEMU's block layer that an image format takes.
const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;

/// First byte of those that say "I use this permission".
const USED: u8 = 100;
/// First byte of those that say "I do not share this permission".
const UNSHARED: u8 = 200;

/// What a file is locked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Many may read; nobody writes.
    Read,
    /// One writes; nobody else uses the file.
    Write,
    /// As `Read`, but that somebody may write who does not change the length.
    ReadData,
    /// As `Write`, but that somebody else may write who does not change the length.
    WriteData,
}

impl Mode {
    /// Whether it is for writing.
    pub fn writes(self) -> bool {
        match self {
            Mode::Read | Mode::ReadData => false,
            Mode::Write | Mode::WriteData => true,
        }
    }

    /// The permissions used.
    fn used(self) -> &'static [u8] {
        match self.writes() {
            false => &[CONSISTENT_READ],
            true => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// The permissions not shared.
    fn unshared(self) -> &'static [u8] {
        match self {
            Mode::Read | Mode::Write => &[WRITE, RESIZE],
            Mode::ReadData | Mode::WriteData => &[RESIZE],
        }
    }

    /// The bytes to hold.
    pub fn bytes(self) -> &'static [u8] {
        match self {
            Mode::Read => &[USED, UNSHARED + WRITE, UNSHARED + RESIZE],
            Mode::Write => {
                &[USED, USED + WRITE, USED + RESIZE, UNSHARED + WRITE, UNSHARED + RESIZE]
            }
            Mode::ReadData => &[USED, UNSHARED + RESIZE],
            Mode::WriteData => &[USED, USED + WRITE, USED + RESIZE, UNSHARED + RESIZE],
        }
    }

    /// The bytes that only the mode for writing holds.
    pub fn excess(self) -> &'static [u8] {
        match self.writes() {
            false => &[USED + WRITE, USED + RESIZE],
            true => &[],
        }
    }
}

/// Why a lock could not be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Somebody else holds this byte.
    Held(u8),
    /// The file system does not do such locks.
    Unsupported,
    /// Another errno.
    Os(i32),
}

impl Refused {
    /// What stands in the way, for a person.
    pub fn describe(byte: u8) -> String {
        let name = |permission| match permission {
            CONSISTENT_READ => "consistent read",
            WRITE => "write",
            2 => "write unchanged",
            RESIZE => "resize",
            _ => "unknown",
        };
        if byte >= UNSHARED {
            format!("\"{}\" lock refused: another user does not share it", name(byte - UNSHARED))
        } else {
            format!("shared \"{}\" lock refused: another user has it", name(byte - USED))
        }
    }
}

/// Takes read locks on `bytes`. What was taken stays taken if a later one fails.
pub fn take(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Refused> {
    for &byte in bytes {
        control(fd, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map_err(|errno| match errno {
            libc::EAGAIN | libc::EACCES => Refused::Held(byte),
            libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP => Refused::Unsupported,
            errno => Refused::Os(errno),
        })?;
    }
    Ok(())
}

/// Gives `bytes` back. Unlocking what is not locked does nothing; there is
/// nothing to be done about an error.
pub fn give_back(fd: BorrowedFd<'_>, bytes: &[u8]) {
    for &byte in bytes {
        _ = control(fd, libc::F_OFD_SETLK, libc::F_UNLCK, byte);
    }
}

/// Whether others, seen from `fd`'s description, leave room for `mode`.
pub fn test(fd: BorrowedFd<'_>, mode: Mode) -> Result<(), Refused> {
    let used = mode.used().iter().map(|permission| UNSHARED + permission);
    let unshared = mode.unshared().iter().map(|permission| USED + permission);
    for byte in used.chain(unshared) {
        match control(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte) {
            Ok(libc::F_UNLCK) => {}
            Ok(_) => return Err(Refused::Held(byte)),
            Err(errno) => return Err(Refused::Os(errno)),
        }
    }
    Ok(())
}

/// One fcntl about one byte; the kind of lock that the kernel answered with.
fn control(fd: BorrowedFd<'_>, command: i32, kind: i32, byte: u8) -> SysResult<i32> {
    loop {
        // SAFETY: `flock` is plain integers, for which zero is a value.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = libc::off_t::from(byte);
        lock.l_len = 1;
        // SAFETY: these commands read, and F_OFD_GETLK writes, one `flock`.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(&mut lock)) };
        if result >= 0 {
            return Ok(i32::from(lock.l_type));
        }
        match errno() {
            libc::EINTR => {}
            errno => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn open(path: &std::path::Path) -> std::fs::File {
        std::fs::File::options().read(true).write(true).open(path).unwrap()
    }

    /// The read-locked bytes, as any other description sees them.
    fn held(path: &std::path::Path) -> Vec<u8> {
        let probe = open(path);
        let is_held = |&byte: &u8| {
            control(probe.as_fd(), libc::F_OFD_GETLK, libc::F_WRLCK, byte).unwrap() != libc::F_UNLCK
        };
        (0..=255).filter(is_held).collect()
    }

    #[test]
    fn the_bytes_are_qemus() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let a = open(file.path());
        take(a.as_fd(), Mode::Write.bytes()).unwrap();
        assert_eq!(held(file.path()), [100, 101, 103, 201, 203]);
        give_back(a.as_fd(), &[101, 103]);
        assert_eq!(held(file.path()), [100, 201, 203]);
        assert_eq!(Mode::Read.bytes(), [100, 201, 203]);
        give_back(a.as_fd(), Mode::Read.bytes());
        assert!(held(file.path()).is_empty());
    }

    #[test]
    fn who_may_share_with_whom() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(file.path()), open(file.path()));
        for (mine, theirs, conflict) in [
            (Mode::Read, Mode::Read, None),
            (Mode::Read, Mode::Write, Some(201)),
            (Mode::Write, Mode::Read, Some(101)),
            (Mode::Write, Mode::Write, Some(201)),
        ] {
            take(a.as_fd(), mine.bytes()).unwrap();
            take(b.as_fd(), theirs.bytes()).unwrap();
            let expected = conflict.map_or(Ok(()), |byte| Err(Refused::Held(byte)));
            assert_eq!(test(b.as_fd(), theirs), expected, "{mine:?} {theirs:?}");
            give_back(a.as_fd(), mine.bytes());
            assert_eq!(test(b.as_fd(), theirs), Ok(()));
            give_back(b.as_fd(), theirs.bytes());
        }
    }
}
