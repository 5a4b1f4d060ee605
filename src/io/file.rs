//! A file or block device behind a descriptor: its sizes, its alignment, and
//! the blocking operations on it. It knows neither locks nor whose descriptor
//! it is; errors are errno values.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Stat, StatxFlags, fallocate, fdatasync, fstat, ftruncate,
    ioctl_blksszget, statx,
};

use super::direct::BUFFER;
use super::engine::{Piece, Target, ZeroMode};
use crate::sys::file::{self as sys, Bytes, SysResult};
use crate::sys::memory::{BLOCK_ALIGNMENT, GuestMut};

/// What direct I/O demands; 1 where it is not used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Alignment {
    /// Of addresses of memory.
    pub memory: u32,
    /// Of offsets and lengths.
    pub request: u32,
}

impl Alignment {
    /// Nothing is demanded.
    pub const NONE: Alignment = Alignment { memory: 1, request: 1 };
}

/// Alignment taken for granted where the kernel does not say: every file system
/// that has direct I/O on blocks larger than this says so.
const USUAL: u32 = 4096;

#[derive(Debug)]
pub(crate) struct File {
    fd: Arc<OwnedFd>,
    /// Logical block size of a block device.
    device: Option<u32>,
    identity: (u64, u64),
    pub(super) alignment: Alignment,
}

impl File {
    /// Takes a descriptor that may be read, in direct mode or not. `None`: it
    /// has no direct I/O.
    pub(super) fn new(fd: Arc<OwnedFd>, direct: bool) -> SysResult<Option<File>> {
        let stat = fstat(&fd).map_err(errno)?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let device = match is_device {
            true => Some(ioctl_blksszget(&fd).map_err(errno)?),
            false => None,
        };
        let alignment = match direct {
            true => direct_alignment(fd.as_fd(), device),
            false => Some(Alignment::NONE),
        };
        let identity = identity(&stat, is_device);
        Ok(alignment.map(|alignment| File { fd, device, identity, alignment }))
    }

    pub(super) fn shared_fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    #[inline]
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What tells this file from others: device and inode; for a block device,
    /// which may have many names, a pair made of its number.
    pub(super) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    pub(super) fn length(&self) -> SysResult<u64> {
        match self.device {
            Some(_) => sys::device_length(self.fd()),
            None => Ok(u64::try_from(fstat(&self.fd).map_err(errno)?.st_size).unwrap_or(0)),
        }
    }

    pub(super) fn is_device(&self) -> bool {
        self.device.is_some()
    }

    /// What ranges to zero must be aligned to: the logical block of a device.
    pub(super) fn zero_alignment(&self) -> u64 {
        self.device.unwrap_or(1).into()
    }

    /// Bytes that the file takes up.
    pub(super) fn allocated(&self) -> SysResult<u64> {
        match self.device {
            Some(_) => self.length(),
            None => {
                let blocks = fstat(&self.fd).map_err(errno)?.st_blocks;
                Ok(u64::try_from(blocks).unwrap_or(0).saturating_mul(512))
            }
        }
    }

    #[inline]
    pub(super) fn read(&self, to: &Target<'_>, offset: u64) -> SysResult<()> {
        sys::read(self.fd(), to.memory(), offset, self.alignment.request)
    }

    /// Reads what is in the page cache, all of it or nothing.
    #[inline]
    pub(super) fn read_cached(&self, to: &Target<'_>, offset: u64) -> bool {
        !self.is_direct() && sys::read_cached(self.fd(), to.memory(), offset)
    }

    /// Whether a write goes to the page cache without waiting for a read.
    pub(super) fn writes_to_cache(&self, pieces: &[Piece<'_>], offset: u64) -> bool {
        let length: usize = pieces.iter().map(Piece::len).sum();
        !self.is_direct() && !sys::write_would_read(self.fd(), offset, length as u64)
    }

    #[inline]
    pub(super) fn write(&self, pieces: &[Piece<'_>], offset: u64) -> SysResult<()> {
        sys::write(self.fd(), pieces.iter().map(Piece::bytes), offset)
    }

    pub(super) fn sync(&self) -> SysResult<()> {
        retry(|| fdatasync(&self.fd))
    }

    pub(super) fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> SysResult<()> {
        retry(|| fallocate(&self.fd, zero_flags(mode), offset, length))
    }

    /// How fallocate is asked to zero a range, as it takes it.
    pub(super) fn zero_flags(mode: ZeroMode) -> i32 {
        // Small positive bits.
        zero_flags(mode).bits() as i32
    }

    /// Whether transfers bypass the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.alignment != Alignment::NONE
    }

    pub(super) fn truncate(&self, length: u64) -> SysResult<()> {
        retry(|| ftruncate(&self.fd, length))
    }
}

impl Target<'_> {
    /// What the system calls take.
    #[inline]
    pub(super) fn memory(&self) -> GuestMut<'_> {
        match self {
            Target::Guest(memory) => *memory,
            Target::Block(memory) => memory.guest_mut(),
        }
    }
}

impl Piece<'_> {
    /// What the system calls take.
    pub(super) fn bytes(&self) -> Bytes<'_> {
        match self {
            Piece::Guest(memory) => Bytes::Memory(*memory),
            Piece::Block(memory) => Bytes::Memory(memory.guest_ref()),
            Piece::Zeroes(len) => Bytes::Zeroes(*len),
        }
    }
}

/// Whether an errno of fallocate says that it cannot be done here, rather than
/// that it went wrong. Some file systems say EINVAL for ranges they do not like.
pub(crate) fn means_unsupported(errno: i32) -> bool {
    matches!(errno, libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS | libc::ENODEV | libc::EINVAL)
}

fn zero_flags(mode: ZeroMode) -> FallocateFlags {
    let mode = match mode {
        ZeroMode::Punch => FallocateFlags::PUNCH_HOLE,
        ZeroMode::Keep => FallocateFlags::ZERO_RANGE,
    };
    mode | FallocateFlags::KEEP_SIZE
}

fn retry(f: impl Fn() -> rustix::io::Result<()>) -> SysResult<()> {
    rustix::io::retry_on_intr(f).map_err(errno)
}

fn errno(error: rustix::io::Errno) -> i32 {
    error.raw_os_error()
}

fn identity(stat: &Stat, is_device: bool) -> (u64, u64) {
    // No file system has this device number.
    if is_device { (u64::MAX, stat.st_rdev) } else { (stat.st_dev, stat.st_ino) }
}

/// What direct I/O on this file demands; `None`: it has none.
fn direct_alignment(fd: BorrowedFd<'_>, device: Option<u32>) -> Option<Alignment> {
    let said = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|said| StatxFlags::from_bits_retain(said.stx_mask).contains(StatxFlags::DIOALIGN));
    let (memory, request) = match (said, device) {
        (Some(said), _) => (said.stx_dio_mem_align, said.stx_dio_offset_align),
        (None, Some(block)) => (block, block),
        (None, None) => (USUAL, USUAL),
    };
    let usable = memory.is_power_of_two()
        && request.is_power_of_two()
        && memory as usize <= BLOCK_ALIGNMENT
        && u64::from(request) <= BUFFER;
    usable.then_some(Alignment { memory, request })
}
