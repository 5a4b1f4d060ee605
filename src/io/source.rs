//! What a storage is opened from, and how: a path, a descriptor of the caller,
//! or callbacks. A source can be opened any number of times.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat};

use super::callbacks::Callbacks;
#[cfg(feature = "sim")]
use super::sim::SimFile;
use crate::error::{Error, ErrorKind, Result, escape};

/// What a storage is opened from.
#[derive(Debug)]
pub enum Source {
    /// A file by name: each opening gets a file description of its own.
    Path(PathBuf),
    /// A descriptor of the caller's. All openings share its file description,
    /// whose status flags are never changed.
    Fd {
        /// Our duplicate.
        fd: Arc<OwnedFd>,
        /// The number the caller knows it by, for messages.
        number: RawFd,
    },
    /// Storage of the user.
    Callbacks(Callbacks),
    /// A simulated file.
    #[cfg(feature = "sim")]
    Sim(Arc<SimFile>),
}

/// How a storage is opened.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Access {
    /// For writing, too.
    pub writable: bool,
    /// Past the page cache (O_DIRECT). Means nothing to callbacks.
    pub direct: bool,
    /// Locked against other users, as QEMU does it. Means nothing to callbacks.
    pub lock: bool,
    /// Syncs do nothing.
    pub no_flush: bool,
    /// The end must not move (raw images): a write past it is the caller's
    /// mistake, and aligning a write must not move it either.
    pub fixed_length: bool,
    /// Others may write to it, as far as the lock goes, but not change its length: QEMU
    /// locks data files like that.
    pub shares_writes: bool,
}

impl Source {
    /// A file by name.
    pub fn path(path: impl Into<PathBuf>) -> Arc<Source> {
        Arc::new(Source::Path(path.into()))
    }

    /// A duplicate of the caller's descriptor, close-on-exec.
    pub fn fd(fd: BorrowedFd<'_>) -> Result<Arc<Source>> {
        let number = fd.as_raw_fd();
        let copy = fd
            .try_clone_to_owned()
            .map_err(|error| os(&error, format!("duplicating descriptor {number}")))?;
        Ok(Arc::new(Source::Fd { fd: Arc::new(copy), number }))
    }

    /// Storage of the user.
    pub fn callbacks(callbacks: Callbacks) -> Arc<Source> {
        Arc::new(Source::Callbacks(callbacks))
    }

    /// A simulated file.
    #[cfg(feature = "sim")]
    pub fn sim(file: Arc<SimFile>) -> Arc<Source> {
        Arc::new(Source::Sim(file))
    }

    /// The name for messages: control characters are escaped.
    pub fn name(&self) -> String {
        match self {
            Source::Path(path) => escape(&path.to_string_lossy()),
            Source::Fd { number, .. } => format!("fd {number}"),
            Source::Callbacks(_) => "callbacks".to_owned(),
            #[cfg(feature = "sim")]
            Source::Sim(file) => file.name(),
        }
    }
}

/// Opens a file by name; `create` makes it if need be (`exclusive`: it must not
/// exist). Nothing is truncated.
pub(super) fn open_path(path: &Path, access: Access, create: Option<Exclusive>) -> Result<OwnedFd> {
    let name = || escape(&path.to_string_lossy());
    // O_NONBLOCK: the name may be that of a pipe that nobody has at the other
    // end. It must not last: io_uring heeds it even on regular files.
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    flags |= if access.writable { OFlags::RDWR } else { OFlags::RDONLY };
    if let Some(exclusive) = create {
        flags |= OFlags::CREATE;
        flags.set(OFlags::EXCL, exclusive.0);
    }
    let mode = Mode::from_raw_mode(0o644);
    let fd = rustix::fs::open(path, flags, mode).map_err(|error| match error {
        // A device or pipe without anybody behind it.
        rustix::io::Errno::NXIO => wrong_type(&name()),
        error => Error::os(error.raw_os_error(), format!("opening {}", name())),
    })?;
    check_type(fd.as_fd(), &name())?;
    set_direct(&fd, access, &name())?;
    Ok(fd)
}

/// Sets the status flags of a file description of ours.
pub(super) fn set_direct(fd: &OwnedFd, access: Access, name: &str) -> Result<()> {
    let status = if access.direct { OFlags::DIRECT } else { OFlags::empty() };
    fcntl_setfl(fd, status).map_err(|error| match error {
        rustix::io::Errno::INVAL if access.direct => no_direct(name),
        error => Error::os(error.raw_os_error(), format!("setting the flags of {name}")),
    })
}

/// Whether a file that is to be created must not exist yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Exclusive(pub bool);

/// Checks that a descriptor of the caller's serves for `access`.
pub(super) fn check_fd(fd: &OwnedFd, access: Access, name: &str) -> Result<()> {
    let flags = fcntl_getfl(fd)
        .map_err(|error| Error::os(error.raw_os_error(), format!("asking the flags of {name}")))?;
    if flags.contains(OFlags::PATH) {
        return Err(Error::os(libc::EBADF, format!("{name} is opened with O_PATH")));
    }
    check_type(fd.as_fd(), name)?;
    let mode = flags & OFlags::RWMODE;
    if mode == OFlags::WRONLY {
        return Err(Error::os(libc::EACCES, format!("{name} cannot be read from")));
    }
    if access.writable && mode != OFlags::RDWR {
        return Err(Error::os(
            libc::EACCES,
            format!("{name} cannot be written to: open it with O_RDWR"),
        ));
    }
    if access.writable && flags.contains(OFlags::APPEND) {
        return Err(Error::invalid(format!(
            "{name} is opened with O_APPEND: every write would go to the end"
        )));
    }
    match (access.direct, flags.contains(OFlags::DIRECT)) {
        (true, false) => Err(Error::invalid(format!(
            "{name} is opened without O_DIRECT, direct I/O is asked for: open it with O_DIRECT"
        ))),
        (false, true) => {
            Err(Error::invalid(format!("{name} is opened with O_DIRECT: ask for direct I/O")))
        }
        _ => Ok(()),
    }
}

/// Regular files and block devices only.
fn check_type(fd: BorrowedFd<'_>, name: &str) -> Result<()> {
    let stat = fstat(fd)
        .map_err(|error| Error::os(error.raw_os_error(), format!("asking the type of {name}")))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => Ok(()),
        FileType::Directory => Err(Error::os(libc::EISDIR, format!("opening {name}"))),
        _ => Err(wrong_type(name)),
    }
}

fn wrong_type(name: &str) -> Error {
    Error::invalid(format!("{name} is neither a regular file nor a block device"))
}

/// Direct I/O on a file that cannot do it.
pub(super) fn no_direct(name: &str) -> Error {
    Error::new(
        ErrorKind::NotSupported,
        format!(
            "the file system of {name} has no direct I/O: open it without, or put it elsewhere"
        ),
    )
}

/// An error of the standard library.
fn os(error: &std::io::Error, context: String) -> Error {
    Error::os(error.raw_os_error().unwrap_or(libc::EIO), context)
}
