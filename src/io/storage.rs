//! Where the bytes of an image live: a file, a device, or the user's callbacks.
//!
//! A storage takes requests at any offset and of any length, puts their
//! alignment right, counts them, and passes them to the engine that comes with
//! each. It holds the locks on its file and knows nothing of what the bytes
//! mean.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::callbacks::Callbacks;
pub use super::counters::CounterTotals;
use super::counters::Counters;
use super::direct;
use super::engine::{Engine, Piece, Target, ZeroMode};
use super::file::{Alignment, File, means_unsupported};
use super::range_lock::RangeLock;
use super::registry::Lock;
#[cfg(feature = "sim")]
use super::sim::SimFile;
use super::source::{self, Exclusive};
pub use super::source::{Access, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock::Mode;

/// A file, device or the user's storage, opened. Dropping it unlocks and closes.
pub struct Storage {
    backend: Backend,
    alignment: Alignment,
    access: Access,
    counters: Arc<Counters>,
    /// Bits of [`ZeroMode`]s found to be unsupported.
    unsupported: AtomicU8,
    ranges: RangeLock,
    /// Shared with the successor while the access is changed.
    lock: Arc<Mutex<Option<Lock>>>,
    name: String,
    source: Arc<Source>,
}

/// What engines carry operations out on.
#[derive(Debug)]
pub(crate) enum Backend {
    File(File),
    Callbacks(Callbacks),
    #[cfg(feature = "sim")]
    Sim(Arc<SimFile>),
}

impl Storage {
    /// Opens a source. The lock, if asked for, is taken before anything is read.
    ///
    /// Errors: those of open(2); `Os(EACCES)` where what cannot be written is
    /// to be written; `Locked`; `Os(ENOLCK)`; `NotSupported` where the file
    /// system has no direct I/O; `InvalidArgument` for anything but regular
    /// files and block devices, and where `direct` disagrees with a descriptor.
    pub fn open(source: Arc<Source>, access: Access) -> Result<Storage> {
        Storage::new(open_backend(&source, access)?, source, access)
    }

    /// Creates a file (mode 0644 less the umask), or empties the one there is
    /// once it is locked. `exclusive`: `Exists` if there is one. A block device
    /// is opened as it is. `access` must be writable.
    pub fn create(path: &Path, exclusive: bool, access: Access) -> Result<Storage> {
        if !access.writable {
            return Err(Error::invalid("a file to be created must be opened for writing"));
        }
        let source = Source::path(path);
        // Past the page cache only when it is known whose file it is.
        let buffered = Access { direct: false, ..access };
        let fd = source::open_path(path, buffered, Some(Exclusive(exclusive)))?;
        let made = source::set_direct(&fd, access, &source.name())
            .and_then(|()| file_backend(Arc::new(fd), access, &source.name()))
            .and_then(|backend| Storage::new(backend, source, access));
        match made {
            Ok(storage) => {
                storage.empty()?;
                Ok(storage)
            }
            Err(error) => {
                if exclusive {
                    // Ours for certain; whether it goes is no news.
                    _ = std::fs::remove_file(path);
                }
                Err(error)
            }
        }
    }

    fn new(backend: Backend, source: Arc<Source>, access: Access) -> Result<Storage> {
        let name = source.name();
        let lock = match &backend {
            Backend::File(file) if access.lock => Some(acquire(file, &source, access, &name)?),
            _ => None,
        };
        let alignment = match &backend {
            Backend::File(file) => file.alignment,
            Backend::Callbacks(_) => Alignment::NONE,
            #[cfg(feature = "sim")]
            Backend::Sim(file) => Alignment { memory: 1, request: file.alignment() },
        };
        Ok(Storage {
            backend,
            alignment,
            access,
            counters: Arc::default(),
            unsupported: AtomicU8::new(0),
            ranges: RangeLock::default(),
            lock: Arc::new(Mutex::new(lock)),
            name,
            source,
        })
    }

    /// Opens the same source once more. Fails as `Locked` while this one is open
    /// and either is writable and locked: see [`change_access`].
    ///
    /// [`change_access`]: Storage::change_access
    pub fn reopen(&self, access: Access) -> Result<Storage> {
        Storage::open(self.source.clone(), access)
    }

    /// Opens the same file with another access, sharing the lock of this one,
    /// and its counters. The lock is now enough for both, until one of the two
    /// is chosen by its [`settle_lock`]; the other is to be dropped then. There
    /// is no moment without a lock. On failure this one is as it was.
    ///
    /// Errors: as of `open`; `Os(ESTALE)` if the path names another file now.
    ///
    /// [`settle_lock`]: Storage::settle_lock
    pub fn change_access(&self, access: Access) -> Result<Storage> {
        let unlocked = Access { lock: false, ..access };
        let mut new = Storage::open(self.source.clone(), unlocked)?;
        new.access = access;
        new.counters = self.counters.clone();
        if let (Backend::File(file), Backend::File(old)) = (&new.backend, &self.backend) {
            if file.identity() != old.identity() {
                let context = format!("{} names another file than before", self.name);
                return Err(Error::os(libc::ESTALE, context));
            }
            new.lock = self.lock.clone();
            let lock = self.access.lock || access.lock;
            let writes = |access: Access| access.lock && access.writable;
            let writable = writes(self.access) || writes(access);
            new.hold(lock.then_some(Access { lock, writable, ..access }))?;
        }
        Ok(new)
    }

    /// Makes the lock what this storage needs: of the two that share it after
    /// `change_access`, this one stays. On failure the lock is as it was.
    pub fn settle_lock(&self) -> Result<()> {
        self.hold(Some(self.access).filter(|access| access.lock))
    }

    /// Takes, converts or gives up the lock, for an access.
    fn hold(&self, access: Option<Access>) -> Result<()> {
        let Backend::File(file) = &self.backend else { return Ok(()) };
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *held, access) {
            (Some(lock), Some(access)) => {
                lock.convert(file.shared_fd().clone(), mode(access), &self.name)?;
            }
            (None, Some(access)) => {
                *held = Some(acquire(file, &self.source, access, &self.name)?);
            }
            (_, None) => *held = None,
        }
        Ok(())
    }

    /// What it was opened from.
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// The name for messages: the path, "fd 7", "callbacks"; escaped.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path, where it was opened by one.
    pub fn path(&self) -> Option<&Path> {
        match &*self.source {
            Source::Path(path) => Some(path),
            _ => None,
        }
    }

    /// How it was opened.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Its length in bytes, now.
    pub fn length(&self) -> Result<u64> {
        let length = match &self.backend {
            Backend::File(file) => file.length(),
            Backend::Callbacks(callbacks) => callbacks.length(),
            #[cfg(feature = "sim")]
            Backend::Sim(file) => Ok(file.length()),
        };
        length.map_err(|errno| self.failed(errno, "asking for the length"))
    }

    /// The length that it cannot grow beyond: that of a block device.
    pub fn capacity(&self) -> Option<u64> {
        match &self.backend {
            // A device that does not say its size any more has none.
            Backend::File(file) if file.is_device() => Some(file.length().unwrap_or(0)),
            #[cfg(feature = "sim")]
            Backend::Sim(file) => file.options().device,
            _ => None,
        }
    }

    /// Bytes that it takes up on its file system; callbacks: its length.
    pub fn allocated(&self) -> Result<u64> {
        let allocated = match &self.backend {
            Backend::File(file) => file.allocated(),
            Backend::Callbacks(callbacks) => callbacks.length(),
            #[cfg(feature = "sim")]
            Backend::Sim(file) => Ok(file.occupied()),
        };
        allocated.map_err(|errno| self.failed(errno, "asking for the allocated size"))
    }

    /// What tells the file from others in this system: device and inode; for a
    /// block device, which may have many names, a pair made of its number.
    /// `None` for callbacks.
    pub fn identity(&self) -> Option<(u64, u64)> {
        match &self.backend {
            Backend::File(file) => Some(file.identity()),
            Backend::Callbacks(_) => None,
            #[cfg(feature = "sim")]
            Backend::Sim(file) => Some(file.identity()),
        }
    }

    /// Alignment of memory that spares a copy; 1 unless direct.
    pub fn buffer_alignment(&self) -> u32 {
        self.alignment.memory
    }

    /// Alignment of offsets and lengths that spares reading before writing; 1
    /// unless direct.
    pub fn request_alignment(&self) -> u32 {
        self.alignment.request
    }

    /// Whether [`zero`](Storage::zero) may be able to make holes: writable, and
    /// not found unable so far.
    pub fn can_punch(&self) -> bool {
        let able = match &self.backend {
            Backend::File(_) => true,
            Backend::Callbacks(callbacks) => callbacks.abilities().write_zeroes,
            #[cfg(feature = "sim")]
            Backend::Sim(file) => file.options().punch,
        };
        self.access.writable && able && self.unsupported.load(Relaxed) & bit(ZeroMode::Punch) == 0
    }

    /// Operations and bytes so far.
    pub fn counters(&self) -> CounterTotals {
        self.counters.totals()
    }

    pub(super) fn tally(&self) -> &Counters {
        &self.counters
    }

    /// Fills `to` from `offset` on; what lies past the end is zero.
    #[inline]
    pub async fn read<E: Engine>(&self, engine: &E, to: Target<'_>, offset: u64) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        if self.alignment.request == 1 {
            return self.pass_read(engine, to, offset).await;
        }
        direct::read(self, engine, to, offset).await
    }

    /// As `read`, where neither the engine nor alignment makes anybody wait; `None`
    /// elsewhere.
    #[inline]
    pub fn read_now<E: Engine>(
        &self,
        engine: &E,
        to: &Target<'_>,
        offset: u64,
    ) -> Option<Result<()>> {
        if self.alignment.request != 1 {
            return None;
        }
        let result = engine.read_now(self, to, offset)?;
        self.counters.read(to.len());
        Some(result)
    }

    /// Writes the pieces one after the other from `offset` on, extending the
    /// storage where needed: in direct mode to a whole block, unless its length
    /// is fixed. `ReadOnly`.
    #[inline]
    pub async fn write<E: Engine>(
        &self,
        engine: &E,
        pieces: &[Piece<'_>],
        offset: u64,
    ) -> Result<()> {
        self.check_writable()?;
        let length = total(pieces)?;
        if length == 0 {
            return Ok(());
        }
        if self.alignment.request == 1 {
            self.counters.write(length);
            return engine.write(self, pieces, offset).await;
        }
        direct::write(self, engine, pieces, offset, length as u64).await
    }

    /// As `write`, as `read_now` is to `read`.
    #[inline]
    pub fn write_now<E: Engine>(
        &self,
        engine: &E,
        pieces: &[Piece<'_>],
        offset: u64,
    ) -> Option<Result<()>> {
        if self.alignment.request != 1 || !self.access.writable {
            return None;
        }
        let length = total(pieces).ok()?;
        let result = engine.write_now(self, pieces, offset)?;
        self.counters.write(length);
        Some(result)
    }

    /// Makes durable what completed before. Does nothing if `no_flush`.
    pub async fn sync<E: Engine>(&self, engine: &E) -> Result<()> {
        if self.access.no_flush {
            return Ok(());
        }
        self.counters.sync();
        engine.sync(self).await
    }

    /// Makes a range read as zero without moving the end. `NotSupported` where
    /// the zeroes have to be written; what was found out is remembered.
    pub async fn zero<E: Engine>(
        &self,
        engine: &E,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        self.check_writable()?;
        if self.unsupported.load(Relaxed) & bit(mode) != 0 {
            return Err(self.zero_unsupported(mode));
        }
        let Some(end) = offset.checked_add(length) else {
            return Err(Error::invalid("a range to zero ends past the largest offset"));
        };
        let end = self.capacity().map_or(end, |capacity| end.min(capacity));
        // A device takes whole blocks only: their edges are written.
        let block = match &self.backend {
            Backend::File(file) => file.zero_alignment(),
            Backend::Callbacks(_) => 1,
            #[cfg(feature = "sim")]
            Backend::Sim(file) => file.zero_alignment(),
        };
        let whole = offset.checked_next_multiple_of(block).unwrap_or(end)..end / block * block;
        if whole.start < whole.end {
            let _turn = match self.alignment.request {
                1 => None,
                _ => Some(direct::lock(self, whole.clone()).await?),
            };
            engine.zero(self, whole.start, whole.end - whole.start, mode).await?;
        }
        let (head, tail) = match whole.start < whole.end {
            true => (offset..whole.start, whole.end..end),
            false => (offset..end, end..end),
        };
        for edge in [head, tail] {
            if edge.start < edge.end {
                // Less than two blocks.
                let zeroes = [Piece::Zeroes((edge.end - edge.start) as usize)];
                self.write(engine, &zeroes, edge.start).await?;
            }
        }
        Ok(())
    }

    /// Gives a range up: it reads as anything afterwards. `NotSupported` where
    /// the storage keeps everything.
    pub async fn discard<E: Engine>(&self, engine: &E, offset: u64, length: u64) -> Result<()> {
        match &self.backend {
            Backend::Callbacks(callbacks) if callbacks.abilities().discard => {
                self.check_writable()?;
                let what = format_args!("discarding {length} bytes at offset {offset}");
                callbacks.discard(offset, length).map_err(|errno| self.refused(errno, what))
            }
            _ => self.zero(engine, offset, length, ZeroMode::Punch).await,
        }
    }

    /// Sets the length. A block device keeps its own: `NoSpace` if that is too
    /// small. `NotSupported` where callbacks have no such operation: grow by
    /// writing.
    pub async fn truncate<E: Engine>(&self, engine: &E, length: u64) -> Result<()> {
        self.check_writable()?;
        if let Some(capacity) = self.capacity() {
            return match length <= capacity {
                true => Ok(()),
                false => Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("{} is a device of {capacity} bytes, {length} are needed", self.name),
                )),
            };
        }
        let _turn = match self.alignment.request {
            1 => None,
            // Nothing is written from the nearer end on meanwhile. Whoever
            // truncates twice at a time has to order that.
            request => {
                let start = length.min(self.length()?) / u64::from(request) * u64::from(request);
                Some(self.ranges.lock(start..u64::MAX, true).await)
            }
        };
        engine.truncate(self, length).await
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Storage");
        out.field("name", &self.name).field("access", &self.access);
        out.finish_non_exhaustive()
    }
}

// For engines and alignment.
impl Storage {
    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    #[cfg(test)]
    pub(crate) fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        match &self.backend {
            Backend::File(file) => Some(file.fd()),
            _ => None,
        }
    }

    pub(super) fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Demands another alignment than the file does.
    #[cfg(test)]
    pub(super) fn set_alignment(&mut self, alignment: Alignment) {
        self.alignment = alignment;
        if let Backend::File(file) = &mut self.backend {
            file.alignment = alignment;
        }
    }

    pub(super) fn ranges(&self) -> &RangeLock {
        &self.ranges
    }

    /// Counts and passes on a read that is aligned.
    #[inline]
    pub(super) async fn pass_read<E: Engine>(
        &self,
        engine: &E,
        to: Target<'_>,
        offset: u64,
    ) -> Result<()> {
        self.counters.read(to.len());
        engine.read(self, to, offset).await
    }

    /// Counts and passes on a write that is aligned.
    pub(super) async fn pass_write<E: Engine>(
        &self,
        engine: &E,
        pieces: &[Piece<'_>],
        offset: u64,
    ) -> Result<()> {
        self.counters.write(total(pieces)?);
        engine.write(self, pieces, offset).await
    }

    /// The error for an errno that an operation on this storage ended with.
    #[cold]
    pub(crate) fn failed(&self, errno: i32, what: impl fmt::Display) -> Error {
        let context = format!("{what} of {}", self.name);
        match &self.backend {
            Backend::Callbacks(_) => {
                let cause = Error::os(errno, "the callback failed");
                cause.wrap_as(ErrorKind::Callback(errno), context)
            }
            _ => Error::os(errno, context),
        }
    }

    /// The same for an operation that need not be there: `NotSupported` where
    /// that is what the user's storage says.
    #[cold]
    pub(crate) fn refused(&self, errno: i32, what: impl fmt::Display) -> Error {
        match &self.backend {
            Backend::Callbacks(_) if errno == libc::ENOTSUP => {
                let context = format!("{what} of {} is not supported", self.name);
                Error::new(ErrorKind::NotSupported, context)
            }
            _ => self.failed(errno, what),
        }
    }

    /// The error for an errno that zeroing ended with. What cannot be done is
    /// remembered, unless it may be due to this range only.
    #[cold]
    pub(crate) fn zero_failed(
        &self,
        errno: i32,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Error {
        if !means_unsupported(errno) {
            let what = format_args!("zeroing {length} bytes at offset {offset}");
            return self.failed(errno, what);
        }
        if errno != libc::EINVAL {
            self.unsupported.fetch_or(bit(mode), Relaxed);
        }
        self.zero_unsupported(mode)
    }

    fn zero_unsupported(&self, mode: ZeroMode) -> Error {
        let what = match mode {
            ZeroMode::Punch => "making holes in",
            ZeroMode::Keep => "zeroing ranges of",
        };
        Error::new(ErrorKind::NotSupported, format!("{what} {} is not supported", self.name))
    }

    fn check_writable(&self) -> Result<()> {
        match self.access.writable {
            true => Ok(()),
            false => Err(self.read_only()),
        }
    }

    #[cold]
    fn read_only(&self) -> Error {
        Error::new(ErrorKind::ReadOnly, format!("{} is opened read-only", self.name))
    }

    /// Empties a regular file just created or taken over.
    fn empty(&self) -> Result<()> {
        match &self.backend {
            Backend::File(file) if !file.is_device() => {
                file.truncate(0).map_err(|errno| self.failed(errno, "emptying"))
            }
            _ => Ok(()),
        }
    }
}

fn open_backend(source: &Source, access: Access) -> Result<Backend> {
    match source {
        Source::Path(path) => {
            let fd = source::open_path(path, access, None)?;
            file_backend(Arc::new(fd), access, &source.name())
        }
        Source::Fd { fd, .. } => {
            source::check_fd(fd, access, &source.name())?;
            file_backend(fd.clone(), access, &source.name())
        }
        Source::Callbacks(callbacks) => {
            if access.writable && !callbacks.abilities().write {
                let context = "there is no write callback: open it read-only";
                return Err(Error::os(libc::EACCES, context));
            }
            Ok(Backend::Callbacks(callbacks.clone()))
        }
        #[cfg(feature = "sim")]
        Source::Sim(file) => Ok(Backend::Sim(file.clone())),
    }
}

fn file_backend(fd: Arc<std::os::fd::OwnedFd>, access: Access, name: &str) -> Result<Backend> {
    let file = File::new(fd, access.direct)
        .map_err(|errno| Error::os(errno, format!("asking the properties of {name}")))?;
    file.map(Backend::File).ok_or_else(|| source::no_direct(name))
}

fn acquire(file: &File, source: &Source, access: Access, name: &str) -> Result<Lock> {
    let private = matches!(source, Source::Path(_));
    Lock::acquire(file.shared_fd().clone(), private, file.identity(), mode(access), name)
}

fn mode(access: Access) -> Mode {
    match (access.writable, access.shares_writes) {
        (false, false) => Mode::Read,
        (true, false) => Mode::Write,
        (false, true) => Mode::ReadData,
        (true, true) => Mode::WriteData,
    }
}

fn bit(mode: ZeroMode) -> u8 {
    match mode {
        ZeroMode::Punch => 1,
        ZeroMode::Keep => 2,
    }
}

/// Bytes in all pieces; an error if memory could not hold them.
#[inline]
fn total(pieces: &[Piece<'_>]) -> Result<usize> {
    let mut total = 0usize;
    for piece in pieces {
        total = total
            .checked_add(piece.len())
            .ok_or_else(|| Error::invalid("a write is longer than the address space"))?;
    }
    Ok(total)
}
