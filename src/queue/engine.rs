//! What a queue needs of its engine, besides operations: handing them over, finding
//! out what has completed, and waiting, which is where the time passes. Programs have
//! [`RingEngine`], whose waits block the thread and whose futures are thus complete at
//! the first poll; the crash tests put a simulated ring in its place.

use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::image::attached;
use crate::io::engine::Engine;
use crate::io::range_lock::Turn;
use crate::io::ring::{Landed, RingEngine};
use crate::io::storage::Storage;
use crate::io::turns::Transfer;
use crate::sys::event;
use crate::sys::file::SysResult;

/// What tells of work: an eventfd.
pub trait Event: Send + Sync {
    /// Makes it readable.
    fn signal(&self);
    /// Makes it unreadable.
    fn clear(&self);
    /// Its number.
    fn number(&self) -> RawFd;
}

impl Event for OwnedFd {
    fn signal(&self) {
        event::signal(self);
    }

    fn clear(&self) {
        event::clear(self);
    }

    fn number(&self) -> RawFd {
        self.as_raw_fd()
    }
}

/// An engine that a queue can drive. See [`RingEngine`] for what the methods mean.
pub trait QueueEngine: Engine + 'static {
    /// What its queues tell of work by.
    type Event: Event;

    /// Whether there is a ring; without, every operation is done at once.
    fn has_ring(&self) -> bool;
    /// The ring's descriptor: readable while there are completions.
    fn fd(&self) -> Option<RawFd>;
    /// Hands over what was put into the queue since the last time; `false`: not all.
    fn submit(&self) -> SysResult<bool>;
    /// Whether something has completed.
    fn has_completions(&self) -> bool;
    /// Operations under way.
    fn flying(&self) -> usize;
    /// Takes what has completed and wakes who waits for it.
    fn complete(&self) -> bool;
    /// Launches a transfer, if there is a ring and it can go as it is.
    fn launch(&self, storage: &Storage, transfer: &Transfer, at: u64, tag: usize) -> Option<Turn>;
    /// Adds the launched transfers that are over since the last time.
    fn landed(&self, landed: &mut Vec<Landed>);
    /// Waits until a launched transfer is over, and forgets it.
    fn see_landed(&self, tag: usize);
    /// Whether each completion signals the completion descriptor.
    fn set_eventfd_enabled(&self, enabled: bool);
    /// Submits, and waits until something has completed or the bell was rung.
    fn wait(&self, timeout: Option<Duration>) -> impl Future<Output = SysResult<()>>;
    /// Waits until one of the descriptors can be read; `false`: the time is over.
    fn wait_readable(
        &self,
        fds: &[RawFd],
        timeout: Option<Duration>,
    ) -> impl Future<Output = SysResult<bool>>;
    /// A number for the calling thread; see [`attached::this_thread`].
    fn this_thread(&self) -> u64;
}

impl QueueEngine for RingEngine {
    type Event = OwnedFd;

    fn has_ring(&self) -> bool {
        RingEngine::has_ring(self)
    }

    fn fd(&self) -> Option<RawFd> {
        RingEngine::fd(self)
    }

    fn submit(&self) -> SysResult<bool> {
        RingEngine::submit(self)
    }

    fn has_completions(&self) -> bool {
        RingEngine::has_completions(self)
    }

    fn flying(&self) -> usize {
        RingEngine::flying(self)
    }

    fn complete(&self) -> bool {
        RingEngine::complete(self)
    }

    #[inline]
    fn launch(&self, storage: &Storage, transfer: &Transfer, at: u64, tag: usize) -> Option<Turn> {
        RingEngine::launch(self, storage, transfer, at, tag)
    }

    fn landed(&self, landed: &mut Vec<Landed>) {
        RingEngine::landed(self, landed);
    }

    fn see_landed(&self, tag: usize) {
        RingEngine::see_landed(self, tag);
    }

    fn set_eventfd_enabled(&self, enabled: bool) {
        RingEngine::set_eventfd_enabled(self, enabled);
    }

    #[inline]
    async fn wait(&self, timeout: Option<Duration>) -> SysResult<()> {
        RingEngine::wait(self, timeout)
    }

    async fn wait_readable(&self, fds: &[RawFd], timeout: Option<Duration>) -> SysResult<bool> {
        event::wait_readable(fds, timeout)
    }

    fn this_thread(&self) -> u64 {
        attached::this_thread()
    }
}
