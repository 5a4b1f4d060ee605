//! A ring of io_uring, and the memory that operations on it name.
//!
//! The kernel works on an operation while its caller goes on. What it is given by
//! address has to stay: the array of iovecs is in a [`Vectors`], which the caller
//! keeps until the completion, together with buffers of ours; for the guest's
//! memory whoever made the handle has promised it (see `Guest::from_raw`), and a
//! handle made of a borrow reaches a ring only within a future that waits for the
//! completion when it is dropped. This file knows nothing of storages; errors are
//! errno values.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};

use super::file::{Bytes, MAX_TRANSFER, SysResult, gather};
use super::memory::GuestMut;

/// Most iovecs that the kernel takes at a time.
const MOST_IOVECS: usize = 1024;

/// The memory of one operation, as the kernel wants it described. Its allocation is
/// used again and again.
#[derive(Default)]
pub struct Vectors {
    list: Vec<libc::iovec>,
}

// SAFETY: addresses of memory that may be used from any thread (see `Guest`).
unsafe impl Send for Vectors {}

impl Vectors {
    /// Describes what a read fills, as much of it as goes in one operation.
    pub fn fill(&mut self, to: GuestMut<'_>) {
        self.list.clear();
        let mut bytes = 0;
        to.for_each(|ptr, len| _ = self.push(&mut bytes, ptr, len));
    }

    /// Describes what a write takes, without the first `skip` bytes, as much of it
    /// as goes in one operation.
    pub fn take<'a>(&mut self, parts: impl Iterator<Item = Bytes<'a>>, skip: usize) {
        self.list.clear();
        let mut bytes = 0;
        gather(parts, skip, |ptr, len| self.push(&mut bytes, ptr, len));
    }

    /// Adds a range as far as it fits; false: full.
    fn push(&mut self, bytes: &mut usize, ptr: *mut u8, len: usize) -> bool {
        let now = len.min(MAX_TRANSFER - *bytes);
        if self.list.len() == MOST_IOVECS || now == 0 {
            return false;
        }
        self.list.push(libc::iovec { iov_base: ptr.cast(), iov_len: now });
        *bytes += now;
        now == len
    }
}

/// What the kernel is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// Read into the vectors from an offset on.
    Read(u64),
    /// Write the vectors at an offset.
    Write(u64),
    /// `fdatasync`.
    Sync,
    /// `fallocate`: mode, offset, length.
    Allocate(i32, u64, u64),
}

/// A submission queue and a completion queue.
pub struct Ring {
    io: IoUring,
}

impl Ring {
    /// A ring that takes at least `entries` operations at a time, or as many as the
    /// kernel allows. `ENOSYS` where the kernel's io_uring is too old for us.
    pub fn new(entries: u32) -> SysResult<Ring> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_submit_all();
        let io = match builder.build(entries) {
            // Before Linux 5.18 one bad entry ends a submission: there are none.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_clamp().build(entries)
            }
            other => other,
        };
        let io = io.map_err(errno)?;
        let params = io.params();
        // Timeouts in io_uring_enter(2); no completion is ever lost; operations on
        // pipes and the like do not take a thread (Linux 5.11 has all of them).
        if !(params.is_feature_ext_arg()
            && params.is_feature_nodrop()
            && params.is_feature_fast_poll())
        {
            return Err(libc::ENOSYS);
        }
        Ok(Ring { io })
    }

    /// The number of its descriptor, which can be polled: readable while there are
    /// completions.
    pub fn fd(&self) -> i32 {
        self.io.as_raw_fd()
    }

    /// Puts an operation into the submission queue; false: that is full. The
    /// vectors, what they describe and the descriptor stay until the completion,
    /// which carries `number`.
    pub fn push(&mut self, fd: BorrowedFd<'_>, call: Call, memory: &Vectors, number: u64) -> bool {
        let fd = Fd(fd.as_raw_fd());
        let (list, count) = (memory.list.as_ptr(), memory.list.len() as u32);
        let single = match memory.list.as_slice() {
            [one] => Some((one.iov_base.cast::<u8>(), one.iov_len as u32)),
            _ => None,
        };
        let entry: Entry = match (call, single) {
            (Call::Read(at), Some((ptr, len))) => {
                opcode::Read::new(fd, ptr, len).offset(at).build()
            }
            (Call::Read(at), None) => opcode::Readv::new(fd, list, count).offset(at).build(),
            (Call::Write(at), Some((ptr, len))) => {
                opcode::Write::new(fd, ptr, len).offset(at).build()
            }
            (Call::Write(at), None) => opcode::Writev::new(fd, list, count).offset(at).build(),
            (Call::Sync, _) => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            (Call::Allocate(mode, offset, length), _) => {
                opcode::Fallocate::new(fd, length).offset(offset).mode(mode).build()
            }
        };
        // SAFETY: all that the entry names stays until the completion (see above).
        unsafe { self.io.submission().push(&entry.user_data(number)) }.is_ok()
    }

    /// Operations that were not handed to the kernel yet.
    pub fn unsubmitted(&mut self) -> usize {
        self.io.submission().len()
    }

    /// Hands what is in the submission queue to the kernel. `EAGAIN`, `EBUSY`: it
    /// has no memory, or wants completions taken, before it accepts more. EINTR is
    /// retried.
    pub fn submit(&self) -> SysResult<()> {
        loop {
            match self.io.submit().map_err(errno) {
                Err(libc::EINTR) => {}
                other => return other.map(|_| ()),
            }
        }
    }

    /// As `submit`, and waits until there is a completion. `ETIME` when the time is
    /// over, `EINTR` when a signal came; neither is certain to be told if something
    /// was submitted on the way.
    pub fn wait(&self, timeout: Option<Duration>) -> SysResult<()> {
        let time = timeout.map(Timespec::from);
        let args = match &time {
            Some(time) => SubmitArgs::new().timespec(time),
            None => SubmitArgs::new(),
        };
        self.io.submitter().submit_with_args(1, &args).map(|_| ()).map_err(errno)
    }

    /// Whether there is a completion.
    pub fn has_completions(&mut self) -> bool {
        !self.io.completion().is_empty()
    }

    /// Calls `each` with the number and the result of every completion there is;
    /// returns how many there were.
    pub fn complete(&mut self, mut each: impl FnMut(u64, i32)) -> usize {
        let mut count = 0;
        for entry in self.io.completion() {
            each(entry.user_data(), entry.result());
            count += 1;
        }
        count
    }

    /// Has the kernel add to an eventfd with every completion.
    pub fn register_eventfd(&self, fd: BorrowedFd<'_>) -> SysResult<()> {
        self.io.submitter().register_eventfd(fd.as_raw_fd()).map_err(errno)
    }

    /// Whether it does so.
    pub fn set_eventfd_enabled(&mut self, enabled: bool) {
        let completion = self.io.completion();
        if enabled { completion.enable_eventfd() } else { completion.disable_eventfd() }
    }
}

fn errno(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
