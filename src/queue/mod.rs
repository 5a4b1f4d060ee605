//! Queues: requests that are submitted now and complete later, with no thread but
//! the caller's.
//!
//! A queue is a small executor that its caller drives: by submitting, reaping and
//! waiting. Its engine puts operations into a ring of io_uring; what completes there
//! wakes the request that waits for it, and so does another thread, or another
//! queue, that gets out of its way. All queues of an image and all blocking calls
//! share the one core: only the engine is another.
//!
//! `request` is what is asked for, `slots` all requests of a queue, `ready` who can
//! go on, `bells` the descriptors that say so, `drive` the loop around them and the
//! waiting, `engine` what all of these need of an engine; this file is what programs
//! hold.

mod bells;
mod drive;
mod engine;
mod flight;
mod options;
mod ready;
mod request;
#[cfg(feature = "sim")]
mod sim;
mod slots;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::image::attached::poisoned;
use crate::image::handle::{Image, WriteFlags, ZeroFlags};
use crate::io::ring::RingEngine;
pub use crate::sys::buffer::Buffer;
use crate::sys::memory::{GuestMut, GuestRef};
use drive::Inner;
pub use options::{Engine, QueueOptions};
use request::{From, Into, Work};
#[cfg(feature = "sim")]
pub use sim::SimQueue;
pub use slots::Completion;

/// Asynchronous requests on an image. Calls on one queue are carried out one after
/// the other; [`wake_up`](Queue::wake_up) and [`in_flight`](Queue::in_flight) never
/// wait. Dropping it waits for what is in flight.
///
/// Who must drive what: a request that another one is in the way of (both change the
/// same clusters, or both flush) goes on when that one is over. Requests of a queue
/// go on while somebody is inside `submit`, `reap` or `wait` of it; a `wait` that
/// would wait for another queue that its own thread drove last carries that one on.
pub struct Queue(Arc<Inner<RingEngine>>);

/// A request that was not accepted: there will be no completion.
#[derive(Debug)]
pub struct Refused {
    /// Why: `Os(EAGAIN)` if the queue is full.
    pub error: Error,
    /// The buffer that came with it.
    pub buffer: Option<Buffer>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl std::convert::From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        refused.error
    }
}

impl Queue {
    /// Makes a queue. Errors of the system, for want of descriptors or memory;
    /// `NotSupported` if io_uring was asked for and is not to be had.
    pub fn new(image: &Arc<Image>, options: &QueueOptions) -> Result<Queue> {
        Inner::new(image, options).map(Queue)
    }

    /// Whether operations go through io_uring.
    pub fn engine(&self) -> Engine {
        if self.0.engine.has_ring() { Engine::IoUring } else { Engine::Blocking }
    }

    /// Reads as many bytes as the buffer has, a `Vec<u8>` or an aligned [`Buffer`], which
    /// comes back with the completion.
    pub fn read(
        &self,
        buffer: impl std::convert::Into<Buffer>,
        offset: u64,
        user_data: u64,
    ) -> std::result::Result<(), Refused> {
        self.accept(Work::Read(Into::Owned(buffer.into()), offset), user_data)
    }

    /// Writes the buffer, which comes back with the completion.
    pub fn write(
        &self,
        buffer: impl std::convert::Into<Buffer>,
        offset: u64,
        flags: WriteFlags,
        user_data: u64,
    ) -> std::result::Result<(), Refused> {
        self.accept(Work::Write(From::Owned(buffer.into()), offset, flags), user_data)
    }

    /// Makes a range read as zero.
    pub fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        flags: ZeroFlags,
        user_data: u64,
    ) -> Result<()> {
        Ok(self.accept(Work::Zeroes(offset, length, flags), user_data)?)
    }

    /// Gives a range up: a hint.
    pub fn discard(&self, offset: u64, length: u64, user_data: u64) -> Result<()> {
        Ok(self.accept(Work::Discard(offset, length), user_data)?)
    }

    /// Makes durable what had completed, on any queue of the image, before this call.
    pub fn flush(&self, user_data: u64) -> Result<()> {
        Ok(self.accept(Work::Flush, user_data)?)
    }

    /// As `read`, into memory that the caller keeps until the completion.
    #[inline]
    pub(crate) fn read_guest(
        &self,
        to: GuestMut<'static>,
        offset: u64,
        user_data: u64,
    ) -> Result<()> {
        Ok(self.accept(Work::Read(Into::Guest(to), offset), user_data)?)
    }

    /// As `write`, from memory that the caller keeps until the completion.
    #[inline]
    pub(crate) fn write_guest(
        &self,
        from: GuestRef<'static>,
        offset: u64,
        flags: WriteFlags,
        user_data: u64,
    ) -> Result<()> {
        Ok(self.accept(Work::Write(From::Guest(from), offset, flags), user_data)?)
    }

    /// A request that cannot be carried out and says so when it completes.
    pub(crate) fn fail(&self, error: Error, user_data: u64) -> Result<()> {
        Ok(self.accept(Work::Fail(error), user_data)?)
    }

    #[inline(always)] // As that of `Inner`.
    fn accept(&self, work: Work, user_data: u64) -> std::result::Result<(), Refused> {
        self.0.accept(work, user_data).map_err(|(error, work)| {
            let buffer = work.into_buffer();
            Refused { error, buffer }
        })
    }

    /// Starts everything that was accepted; returns how many requests were newly
    /// started. Does not wait for I/O, unless the engine is `Blocking`.
    pub fn submit(&self) -> Result<usize> {
        self.0.submit()
    }

    /// Submits, then hands up to `max` completions to `out` without waiting; returns
    /// how many.
    pub fn reap(&self, max: usize, out: impl FnMut(Completion)) -> Result<usize> {
        self.0.reap(max, out)
    }

    /// Submits, then waits until there are `min` completions, the time is over, or
    /// [`wake_up`](Queue::wake_up) is called; hands up to `max` of them to `out` and
    /// returns how many. `InvalidArgument`: `min` is more than there are in flight.
    /// `Os(EINTR)`: a signal came before any completion.
    pub fn wait(
        &self,
        min: usize,
        max: usize,
        timeout: Option<Duration>,
        out: impl FnMut(Completion),
    ) -> Result<usize> {
        self.0.wait(min, max, timeout, out)
    }

    /// Ends a `wait` in another thread, or the next one.
    pub fn wake_up(&self) {
        self.0.ready.wake_up();
    }

    /// An eventfd that is readable whenever `reap` would hand out a completion or
    /// carry a request on. Reap and wait clear it. With io_uring, the kernel may
    /// interrupt a thread to complete what it submitted: its `poll` then fails with
    /// EINTR, without a signal. `None`: turned off.
    pub fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.ready.bell().signal_fd().map(OwnedFd::as_fd)
    }

    /// While it is disabled the descriptor may stay unreadable, which saves system
    /// calls. Enabling it makes it readable if there is something to reap.
    /// `NotSupported`: turned off.
    pub fn set_completion_fd_enabled(&self, enabled: bool) -> Result<()> {
        self.0.enable_signal(enabled)
    }

    /// Requests accepted whose completion was not taken.
    pub fn in_flight(&self) -> u32 {
        use crate::image::attached::Attached;
        self.0.in_flight()
    }

    /// A panic has left it in pieces: nothing more is accepted.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.0.is_poisoned()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.0.destroy();
    }
}

#[cold]
fn full(depth: usize) -> Error {
    Error::os(libc::EAGAIN, format!("the queue is full: {depth} requests are in flight"))
}

#[cold]
fn busy() -> Error {
    Error::new(ErrorKind::Busy, "another thread is in a call on a queue of this image")
}
