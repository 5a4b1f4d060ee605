//! Queues on a simulated disk, for the crash tests: what programs hold, with waits
//! that let the simulated world go on.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use super::Refused;
use super::bells::Bells;
use super::drive::Inner;
use super::engine::{Event, QueueEngine};
use super::request::{From, Into, Work};
use super::slots::Completion;
use crate::error::Result;
use crate::image::disk::Disk;
use crate::image::handle::{Image, WriteFlags, ZeroFlags};
use crate::io::range_lock::Turn;
use crate::io::ring::Landed;
use crate::io::sim::{SimDisk, SimEngine, SimEvent, SimRing};
use crate::io::storage::Storage;
use crate::io::turns::Transfer;
use crate::sys::buffer::Buffer;
use crate::sys::file::SysResult;

impl Event for SimEvent {
    fn signal(&self) {
        SimEvent::signal(self);
    }

    fn clear(&self) {
        SimEvent::clear(self);
    }

    fn number(&self) -> RawFd {
        SimEvent::number(self)
    }
}

impl QueueEngine for SimRing {
    type Event = SimEvent;

    fn has_ring(&self) -> bool {
        true
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.number())
    }

    fn submit(&self) -> SysResult<bool> {
        Ok(SimRing::submit(self))
    }

    fn has_completions(&self) -> bool {
        SimRing::has_completions(self)
    }

    fn flying(&self) -> usize {
        SimRing::flying(self)
    }

    fn complete(&self) -> bool {
        SimRing::complete(self)
    }

    fn launch(&self, storage: &Storage, transfer: &Transfer, at: u64, tag: usize) -> Option<Turn> {
        SimRing::launch(self, storage, transfer, at, tag)
    }

    fn landed(&self, landed: &mut Vec<Landed>) {
        SimRing::landed(self, landed);
    }

    fn see_landed(&self, tag: usize) {
        SimRing::see_landed(self, tag);
    }

    fn set_eventfd_enabled(&self, enabled: bool) {
        self.set_signal_enabled(enabled);
    }

    /// There is no clock: the time is never over.
    async fn wait(&self, _timeout: Option<Duration>) -> SysResult<()> {
        SimRing::wait(self).await
    }

    async fn wait_readable(&self, fds: &[RawFd], timeout: Option<Duration>) -> SysResult<bool> {
        match timeout {
            Some(Duration::ZERO) => Ok(self.is_readable(fds)),
            _ => self.readable(fds).await.map(|()| true),
        }
    }

    fn this_thread(&self) -> u64 {
        SimRing::this_thread(self)
    }
}

impl Image {
    /// The image of a disk that others use, too, past its queues.
    pub fn simulated(disk: Arc<Disk>) -> Arc<Image> {
        Arc::new(Image::sharing(disk))
    }

    /// As `close`, on a simulated disk.
    pub async fn close_simulated(&self) -> Result<()> {
        self.close_by(&SimEngine).await
    }
}

/// A [`Queue`](super::Queue) on a simulated disk. Dropped without `destroy`, its
/// requests end where they are, as the process that has them.
pub struct SimQueue {
    inner: Arc<Inner<SimRing>>,
    signal: SimEvent,
}

impl SimQueue {
    /// Makes a queue of that many requests, on an image of this disk.
    pub fn new(image: &Arc<Image>, disk: &SimDisk, depth: usize) -> Result<SimQueue> {
        let (bell, signal) = (disk.event(), disk.event());
        let engine = SimRing::new(disk, bell.clone(), signal.clone());
        let bells = Bells::new(Arc::new(bell), Some(signal.clone()));
        Ok(SimQueue { inner: Inner::with(image, engine, bells, depth)?, signal })
    }

    fn accept(&self, work: Work, user_data: u64) -> std::result::Result<(), Refused> {
        let accepted = self.inner.accept(work, user_data);
        accepted.map_err(|(error, work)| Refused { error, buffer: work.into_buffer() })
    }

    /// See [`Queue::read`](super::Queue::read); so for the following.
    pub fn read(
        &self,
        buffer: impl std::convert::Into<Buffer>,
        offset: u64,
        user_data: u64,
    ) -> std::result::Result<(), Refused> {
        self.accept(Work::Read(Into::Owned(buffer.into()), offset), user_data)
    }

    #[allow(missing_docs)]
    pub fn write(
        &self,
        buffer: impl std::convert::Into<Buffer>,
        offset: u64,
        flags: WriteFlags,
        user_data: u64,
    ) -> std::result::Result<(), Refused> {
        self.accept(Work::Write(From::Owned(buffer.into()), offset, flags), user_data)
    }

    #[allow(missing_docs)]
    pub fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        flags: ZeroFlags,
        user_data: u64,
    ) -> std::result::Result<(), Refused> {
        self.accept(Work::Zeroes(offset, length, flags), user_data)
    }

    #[allow(missing_docs)]
    pub fn discard(
        &self,
        offset: u64,
        length: u64,
        user_data: u64,
    ) -> std::result::Result<(), Refused> {
        self.accept(Work::Discard(offset, length), user_data)
    }

    #[allow(missing_docs)]
    pub fn flush(&self, user_data: u64) -> std::result::Result<(), Refused> {
        self.accept(Work::Flush, user_data)
    }

    #[allow(missing_docs)]
    pub fn submit(&self) -> Result<usize> {
        self.inner.submit()
    }

    #[allow(missing_docs)]
    pub fn reap(&self, max: usize, out: impl FnMut(Completion)) -> Result<usize> {
        self.inner.reap(max, out)
    }

    /// See [`Queue::wait`](super::Queue::wait); without a time limit.
    // Who calls meanwhile breaks the rule that calls on one queue come one by one.
    #[allow(clippy::await_holding_lock)]
    pub async fn wait(&self, min: usize, max: usize, out: impl FnMut(Completion)) -> Result<usize> {
        let mut slots = self.inner.call();
        self.inner.wait_for(&mut slots, min, None).await?;
        Ok(self.inner.hand_out(&mut slots, max, out))
    }

    #[allow(missing_docs)]
    pub fn wake_up(&self) {
        self.inner.ready.wake_up();
    }

    /// The completion descriptor.
    pub fn completion_event(&self) -> &SimEvent {
        &self.signal
    }

    #[allow(missing_docs)]
    pub fn set_completion_event_enabled(&self, enabled: bool) -> Result<()> {
        self.inner.enable_signal(enabled)
    }

    #[allow(missing_docs)]
    pub fn in_flight(&self) -> u32 {
        use crate::image::attached::Attached;
        self.inner.in_flight()
    }

    /// As dropping a [`Queue`](super::Queue) does, waits for what is in flight.
    #[allow(clippy::await_holding_lock)]
    pub async fn destroy(&self) {
        self.inner.destroy_with(&mut self.inner.call()).await;
    }
}
