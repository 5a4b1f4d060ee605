//! Driving a queue: accepting, starting, carrying on, waiting.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use super::bells::Bells;
use super::engine::{Event, QueueEngine};
use super::options::{Engine, QueueOptions};
use super::ready::Ready;
use super::request::{Request, Work};
use super::slots::{Completion, Slots};
use super::{busy, full, poisoned};
use crate::error::{Error, ErrorKind, Result};
use crate::image::attached::{Attached, Finishing};
use crate::image::handle::Image;
use crate::io::ring::RingEngine;
use crate::io::wait::block_on;
use crate::sys::event;
use crate::sys::file::SysResult;

/// A queue. The image knows it as [`Attached`].
pub struct Inner<E: QueueEngine> {
    image: Arc<Image>,
    pub(super) engine: Arc<E>,
    pub(super) ready: Arc<Ready<Bells<E::Event>>>,
    /// Whoever has it drives.
    slots: Mutex<Slots<E>>,
    in_flight: AtomicU32,
    unfinished: AtomicU32,
    last_driver: AtomicU64,
    poisoned: AtomicBool,
    depth: usize,
    itself: Weak<Inner<E>>,
}

/// Why a ring is not to be had, rather than that something is exhausted.
fn means_none(errno: i32) -> bool {
    matches!(errno, libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENOMEM)
}

fn engine(options: &QueueOptions, bell: &Arc<std::os::fd::OwnedFd>) -> Result<RingEngine> {
    if options.engine == Engine::Blocking {
        return Ok(RingEngine::without());
    }
    match RingEngine::new(options.depth(), bell.clone()) {
        Ok(engine) => Ok(engine),
        Err(errno) if options.engine == Engine::Auto && means_none(errno) => {
            Ok(RingEngine::without())
        }
        Err(errno) => {
            let error = Error::os(errno, "setting up io_uring");
            Err(match means_none(errno) && errno != libc::ENOMEM {
                true => error.wrap_as(ErrorKind::NotSupported, "there is no io_uring to be had"),
                false => error,
            })
        }
    }
}

impl Inner<RingEngine> {
    pub(super) fn new(image: &Arc<Image>, options: &QueueOptions) -> Result<Arc<Self>> {
        let eventfd = |blocking| {
            event::eventfd(blocking).map_err(|errno| Error::os(errno, "making an eventfd"))
        };
        // A ring watches the bell by reading it.
        let mut bell = Arc::new(eventfd(true)?);
        let engine = engine(options, &bell)?;
        if !engine.has_ring() {
            bell = Arc::new(eventfd(false)?);
        }
        let signal = if options.completion_fd { Some(eventfd(false)?) } else { None };
        if let Some(signal) = &signal {
            let registered = engine.register_eventfd(std::os::fd::AsFd::as_fd(signal));
            registered.map_err(|errno| Error::os(errno, "setting up io_uring's eventfd"))?;
        }
        Inner::with(image, engine, Bells::new(bell, signal), options.depth() as usize)
    }
}

impl<E: QueueEngine> Inner<E> {
    /// A queue of that many requests on the image.
    pub(super) fn with(
        image: &Arc<Image>,
        engine: E,
        bells: Bells<E::Event>,
        depth: usize,
    ) -> Result<Arc<Inner<E>>> {
        let inner = Arc::new_cyclic(|itself| Inner {
            image: image.clone(),
            last_driver: AtomicU64::new(engine.this_thread()),
            engine: Arc::new(engine),
            ready: Arc::new(Ready::new(depth, bells)),
            slots: Mutex::new(Slots::new(depth)),
            in_flight: AtomicU32::new(0),
            unfinished: AtomicU32::new(0),
            poisoned: AtomicBool::new(false),
            depth,
            itself: itself.clone(),
        });
        let attached: Weak<Inner<E>> = Arc::downgrade(&inner);
        image.accept(|disk| {
            disk?;
            image.queues().attach(attached);
            Result::Ok(())
        })?;
        Ok(inner)
    }

    /// The slots, for a call of the program's.
    pub(super) fn call(&self) -> MutexGuard<'_, Slots<E>> {
        self.last_driver.store(self.engine.this_thread(), Release);
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Slots<E>> {
        // Panics of requests are caught before they get here.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Slots<E>>> {
        match self.slots.try_lock() {
            Ok(slots) => Some(slots),
            Err(TryLockError::Poisoned(slots)) => Some(slots.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Acquire)
    }

    /// For the image and other threads.
    fn publish(&self, slots: &Slots<E>) {
        self.unfinished.store(slots.unfinished() as u32, Release);
        self.in_flight.store(slots.in_flight() as u32, Release);
    }

    #[inline(always)] // Else the request is copied several times on its way to its slot.
    pub(super) fn accept(
        &self,
        work: Work,
        user_data: u64,
    ) -> std::result::Result<(), (Error, Work)> {
        if self.is_poisoned() {
            return Err((poisoned(), work));
        }
        // Nothing is driven: what does not run holds nothing up.
        let mut slots = self.lock();
        if slots.is_full() {
            return Err((full(self.depth), work));
        }
        self.image.accept(|disk| {
            slots.accept(&self.ready, Request { work, disk }, user_data);
            self.publish(&slots);
        });
        Ok(())
    }

    /// Notes that a request of this image has panicked.
    #[cold]
    fn poison(&self) {
        self.poisoned.store(true, Release);
        self.image.queues().poison();
    }

    /// Carries everything on that can be, and submits. `reaping`: what the kernel
    /// has completed meanwhile, too.
    fn drive(&self, slots: &mut Slots<E>, reaping: bool) -> Result<()> {
        self.ready.begin();
        loop {
            if reaping {
                let completed = self.engine.has_completions();
                // What the descriptor tells of is looked for after it is cleared.
                self.ready.bell().clear_signal(completed);
                if completed {
                    self.engine.complete();
                    if slots.land(&self.engine).is_err() {
                        self.poison();
                    }
                }
            }
            if slots.start(&self.engine).is_err() {
                self.poison();
            }
            while let Some(slot) = self.ready.pop() {
                if slots.poll(slot, &self.engine).is_err() {
                    self.poison();
                }
            }
            let submitted = self.engine.submit();
            if (reaping && self.engine.has_completions()) || !self.ready.end() {
                continue;
            }
            self.publish(slots);
            slots.unsubmitted = submitted == Ok(false) && !mutant!(UnsubmittedForgotten);
            if let Err(errno) = submitted {
                return Err(Error::os(errno, "submitting to io_uring"));
            }
            return Ok(());
        }
    }

    pub(super) fn submit(&self) -> Result<usize> {
        let mut slots = self.call();
        let started = slots.accepted();
        self.drive(&mut slots, false)?;
        self.tell(&slots);
        Ok(started)
    }

    /// Makes the completion descriptor readable if there are completions, or if
    /// nothing else may tell that the kernel is to be asked again.
    fn tell(&self, slots: &Slots<E>) {
        mutant!(RestNotTold => return);
        if slots.completed() > 0 || slots.unsubmitted {
            self.ready.bell().signal();
        }
    }

    pub(super) fn hand_out(
        &self,
        slots: &mut Slots<E>,
        max: usize,
        mut out: impl FnMut(Completion),
    ) -> usize {
        let count = slots.completed().min(max);
        for _ in 0..count {
            if let Some(completion) = slots.take() {
                out(completion);
            }
        }
        self.publish(slots);
        self.tell(slots);
        count
    }

    pub(super) fn reap(&self, max: usize, out: impl FnMut(Completion)) -> Result<usize> {
        let mut slots = self.call();
        self.drive(&mut slots, true)?;
        self.clean_now_and_then(&mut slots);
        Ok(self.hand_out(&mut slots, max, out))
    }

    /// Has the caches cleaned, if it is time, once in many calls.
    fn clean_now_and_then(&self, slots: &mut Slots<E>) {
        slots.calls = slots.calls.wrapping_add(1);
        if slots.calls == 0 {
            self.image.clean_if_due(&*self.engine);
        }
    }

    pub(super) fn wait(
        &self,
        min: usize,
        max: usize,
        timeout: Option<Duration>,
        out: impl FnMut(Completion),
    ) -> Result<usize> {
        let mut slots = self.call();
        block_on(self.wait_for(&mut slots, min, timeout))?;
        self.clean_now_and_then(&mut slots);
        Ok(self.hand_out(&mut slots, max, out))
    }

    /// Waits until there are `min` completions, the time is over, or somebody wants
    /// the wait to end.
    pub(super) async fn wait_for(
        &self,
        slots: &mut Slots<E>,
        min: usize,
        timeout: Option<Duration>,
    ) -> Result<()> {
        if min > slots.in_flight() {
            let in_flight = slots.in_flight();
            let text = format!("{min} completions are waited for, {in_flight} are in flight");
            return Err(Error::invalid(text));
        }
        // A time past all clocks is none.
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.drive(slots, true)?;
            if self.ready.take_wakeup() || slots.completed() >= min {
                break;
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let woken = self.block(slots, left).await;
            // Whoever has slept has time.
            slots.calls = u8::MAX;
            match woken {
                Ok(()) => {}
                Err(libc::EINTR) if slots.completed() > 0 => break,
                Err(libc::EINTR) => {
                    return Err(Error::os(libc::EINTR, "waiting for completions"));
                }
                Err(errno) => return Err(Error::os(errno, "waiting for completions")),
            }
        }
        Ok(())
    }

    /// Blocks until something can be carried on, the time is over, or a signal came.
    async fn block(&self, slots: &Slots<E>, left: Option<Duration>) -> SysResult<()> {
        // Requests without an operation of their own wait for somebody else's.
        if slots.unfinished() > self.engine.flying() {
            let me = self.engine.this_thread();
            let others = self.others(|other| other.last_driver() == me && !mutant!(WaitedAlone));
            if !others.is_empty() {
                return self.block_with(slots, &others, left).await;
            }
        }
        if !self.engine.has_ring() {
            return self.block_with(slots, &[], left).await;
        }
        let end = left.and_then(|left| Instant::now().checked_add(left));
        match self.engine.wait(left).await {
            Ok(()) if self.engine.has_completions() => Ok(()),
            // Submitting is told, then, rather than what ended the waiting.
            Ok(()) if end.is_some_and(|end| Instant::now() >= end) => Ok(()),
            Ok(()) => Err(libc::EINTR),
            Err(libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// The other queues of the image with requests that have not completed.
    fn others(&self, wanted: impl Fn(&dyn Attached) -> bool) -> Vec<Arc<dyn Attached>> {
        let mut others = self.image.queues().all();
        others.retain(|other| {
            let itself = std::ptr::addr_eq(Arc::as_ptr(other), self.itself.as_ptr());
            !itself && other.unfinished() > 0 && wanted(&**other)
        });
        others
    }

    /// Carries other queues on, and blocks until they or this one can be again.
    async fn block_with(
        &self,
        slots: &Slots<E>,
        others: &[Arc<dyn Attached>],
        left: Option<Duration>,
    ) -> SysResult<()> {
        let mut again = slots.unsubmitted;
        others.iter().for_each(|other| again |= other.carry_on());
        if again || !self.ready.is_empty() {
            return Ok(());
        }
        let fds: Vec<RawFd> =
            std::iter::once(self.poll_fd()).chain(others.iter().map(|o| o.poll_fd())).collect();
        let readable = match self.engine.wait_readable(&fds, left).await {
            // The kernel may interrupt a thread to complete what it submitted.
            Err(libc::EINTR) => {
                let readable = self.engine.wait_readable(&fds, Some(Duration::ZERO)).await?;
                if readable { true } else { return Err(libc::EINTR) }
            }
            other => other?,
        };
        if readable && !self.engine.has_ring() {
            self.ready.bell().bell().clear();
        }
        Ok(())
    }

    /// Waits until nothing is unfinished, carrying on whatever may be in the way.
    async fn drain(&self, slots: &mut Slots<E>) {
        loop {
            if self.drive(slots, true).is_err() {
                // The kernel takes nothing more: what it has is seen to its end.
                slots.give_up_all(&*self.engine, || {
                    Error::os(libc::EIO, "io_uring takes no more requests")
                });
            }
            if slots.unfinished() == 0 {
                break;
            }
            mutant!(DrainLeavesWaiting => if self.engine.flying() == 0 { break });
            let others = self.others(|_| !mutant!(DrainedAlone));
            // A signal is no reason to give up, nor is anything else.
            let _ = self.block_with(slots, &others, None).await;
        }
    }

    /// Brings all requests to an end.
    async fn end(&self, slots: &mut Slots<E>) {
        if self.is_poisoned() {
            slots.give_up_all(&*self.engine, poisoned);
        } else {
            self.drain(slots).await;
        }
        self.publish(slots);
    }

    pub(super) fn destroy(&self) {
        block_on(self.destroy_with(&mut self.call()));
    }

    pub(super) async fn destroy_with(&self, slots: &mut Slots<E>) {
        self.end(slots).await;
        *slots = Slots::new(0);
        self.publish(slots);
    }

    pub(super) fn enable_signal(&self, enabled: bool) -> Result<()> {
        if self.ready.bell().signal_fd().is_none() {
            let text = "the queue was made without a completion descriptor";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        let slots = self.call();
        self.ready.bell().enable_signal(enabled);
        self.engine.set_eventfd_enabled(enabled);
        let waiting = slots.completed() > 0 || !self.ready.is_empty();
        if enabled && (waiting || self.engine.has_completions()) {
            self.ready.bell().signal();
        }
        Ok(())
    }
}

impl<E: QueueEngine> Attached for Inner<E> {
    fn in_flight(&self) -> u32 {
        self.in_flight.load(Acquire)
    }

    fn unfinished(&self) -> u32 {
        self.unfinished.load(Acquire)
    }

    fn last_driver(&self) -> u64 {
        self.last_driver.load(Acquire)
    }

    fn carry_on(&self) -> bool {
        let Some(mut slots) = self.try_lock() else { return false };
        // An error comes up again where its owner sees it.
        let _ = self.drive(&mut slots, true);
        self.tell(&slots);
        slots.unsubmitted
    }

    fn poll_fd(&self) -> RawFd {
        self.engine.fd().unwrap_or_else(|| self.ready.bell().bell().number())
    }

    fn finish(&self) -> Finishing<'_> {
        // Whoever comes meanwhile is to find it locked.
        #[allow(clippy::await_holding_lock)]
        Box::pin(async move {
            let mut slots = self.try_lock().ok_or_else(busy)?;
            self.end(&mut slots).await;
            self.tell(&slots);
            Ok(())
        })
    }

    fn give_up(&self) -> Result<()> {
        let mut slots = self.try_lock().ok_or_else(busy)?;
        slots.give_up_all(&*self.engine, || {
            Error::new(ErrorKind::Cancelled, "the image was abandoned")
        });
        self.publish(&slots);
        self.tell(&slots);
        Ok(())
    }
}
