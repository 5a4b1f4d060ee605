//! The engine that submits to a ring of io_uring, and is driven by its owner.
//!
//! A future puts its operation into the submission queue when it is first polled and
//! is woken when the owner finds the completion; nothing here waits for I/O, but the
//! end of a future that is dropped with its operation under way. What the kernel
//! works on lives in a slot here until it is done with it.
//!
//! Done at once, on the polling thread, are: what a storage's callbacks do; setting a
//! length; and what is a copy of memory: reads of what the page cache holds, and
//! writes to it that need not read first (a ring would hand those to a thread of the
//! kernel's). Without a ring everything is done at once.

use std::future::poll_fn;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::blocking::{self, Blocking};
use super::engine::{Engine, Piece, Target, ZeroMode};
use super::file::File;
use super::storage::{Backend, Storage};
use crate::error::Result;
use crate::sys::file::SysResult;
use crate::sys::memory::{Block, BlockSlice};
use crate::sys::uring::{Call, Ring, Vectors};

/// Submits to a ring, or does without.
pub struct RingEngine {
    ring: Option<Mutex<State>>,
    /// Of the ring.
    fd: RawFd,
}

struct State {
    ring: Ring,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Wakers on their way: kept to use its memory again.
    wakers: Vec<Waker>,
    /// Readable when somebody else has something to tell; watched by the ring.
    bell: Arc<OwnedFd>,
    /// Where the bell's count goes.
    bell_count: BlockSlice,
    bell_watched: bool,
}

/// An operation's place.
#[derive(Default)]
struct Slot {
    vectors: Vectors,
    /// Buffers of ours that the operation works on.
    kept: Vec<BlockSlice>,
    waker: Option<Waker>,
    result: Option<i32>,
}

/// The number of the bell's operation; slots have small ones.
const BELL: u64 = u64::MAX;

impl RingEngine {
    /// Without a ring: everything is done at once.
    pub fn without() -> RingEngine {
        RingEngine { ring: None, fd: -1 }
    }

    /// With a ring for `operations` at a time. `bell`: an eventfd that ends
    /// [`wait`](RingEngine::wait) when it is written to.
    pub fn new(operations: u32, bell: Arc<OwnedFd>) -> SysResult<RingEngine> {
        /// Longer queues save no system call worth it.
        const MOST: u32 = 4096;
        let ring = Ring::new(operations.saturating_add(1).min(MOST))?;
        let fd = ring.fd();
        let count = Block::zeroed(size_of::<u64>()).map_err(|_| libc::ENOMEM)?;
        let state = State {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            wakers: Vec::new(),
            bell,
            bell_count: count.slice(0, size_of::<u64>()),
            bell_watched: false,
        };
        let engine = RingEngine { ring: Some(Mutex::new(state)), fd };
        engine.submit()?;
        Ok(engine)
    }

    fn state(&self) -> Option<MutexGuard<'_, State>> {
        // Nothing panics half-way while it is held.
        self.ring.as_ref().map(|ring| ring.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether there is a ring.
    pub fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// The ring's descriptor: readable while there are completions.
    pub fn fd(&self) -> Option<RawFd> {
        self.has_ring().then_some(self.fd)
    }

    /// Hands to the kernel what was put into the queue since the last time. `false`:
    /// it does not take everything now, and is to be asked again.
    pub fn submit(&self) -> SysResult<bool> {
        self.state().map_or(Ok(true), |mut state| state.submit())
    }

    /// Whether the kernel has completed something.
    pub fn has_completions(&self) -> bool {
        self.state().is_some_and(|mut state| state.ring.has_completions())
    }

    /// Operations under way, the bell's aside.
    pub fn flying(&self) -> usize {
        self.state().map_or(0, |state| state.slots.len() - state.free.len())
    }

    /// Takes what the kernel has completed and wakes who waits for it. Whether there
    /// was anything.
    pub fn complete(&self) -> bool {
        let Some(mut state) = self.state() else { return false };
        let any = state.complete();
        let mut wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers.drain(..).for_each(Waker::wake);
        if let Some(mut state) = self.state() {
            state.wakers = wakers;
        }
        any
    }

    /// Submits, and waits until something has completed or the bell was rung. ETIME:
    /// the time is over; EINTR: a signal came; both may be told as `Ok`. EAGAIN and
    /// EBUSY: to be tried again when completions have been taken.
    pub fn wait(&self, timeout: Option<Duration>) -> SysResult<()> {
        let Some(mut state) = self.state() else { return Ok(()) };
        state.watch_bell();
        if state.ring.has_completions() {
            return state.submit().map(|_| ());
        }
        state.ring.wait(timeout)
    }

    /// Has the kernel add to an eventfd with each completion.
    pub fn register_eventfd(&self, fd: BorrowedFd<'_>) -> SysResult<()> {
        self.state().map_or(Ok(()), |state| state.ring.register_eventfd(fd))
    }

    /// Whether it does so.
    pub fn set_eventfd_enabled(&self, enabled: bool) {
        if let Some(mut state) = self.state() {
            state.ring.set_eventfd_enabled(enabled);
        }
    }
}

impl State {
    /// Puts an operation into the queue, making room for it if need be.
    fn push(&mut self, fd: BorrowedFd<'_>, call: Call, slot: usize) -> SysResult<()> {
        while !self.ring.push(fd, call, &self.slots[slot].vectors, slot as u64) {
            self.submit_some()?;
        }
        Ok(())
    }

    /// Hands at least one operation to the kernel.
    fn submit_some(&mut self) -> SysResult<()> {
        match self.ring.submit() {
            // It wants completions taken; they are kept until they are asked for.
            Err(libc::EAGAIN | libc::EBUSY) => {
                if !self.complete() {
                    return Err(libc::EAGAIN);
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Hands everything to the kernel that it takes now; `false`: not all.
    fn submit(&mut self) -> SysResult<bool> {
        self.watch_bell();
        while self.ring.unsubmitted() > 0 {
            match self.submit_some() {
                // The rest goes with the next call, when something has completed.
                Err(libc::EAGAIN) => return Ok(false),
                other => other?,
            }
        }
        Ok(true)
    }

    /// Sees to it that the ring watches the bell. Full queues do that another time:
    /// with the next submission.
    fn watch_bell(&mut self) {
        if self.bell_watched {
            return;
        }
        let mut vectors = Vectors::default();
        vectors.fill(self.bell_count.guest_mut());
        // One range: the kernel is given the range, and the vectors may go.
        self.bell_watched = self.ring.push(self.bell.as_fd(), Call::Read(0), &vectors, BELL);
    }

    /// Notes results, and the wakers of those who wait for them.
    fn complete(&mut self) -> bool {
        let State { ring, slots, wakers, bell_watched, .. } = self;
        let count = ring.complete(|number, result| {
            if number == BELL {
                *bell_watched = false;
                return;
            }
            let slot = usize::try_from(number).ok().and_then(|number| slots.get_mut(number));
            if let Some(slot) = slot {
                slot.result = Some(result);
                slot.kept.clear();
                wakers.extend(slot.waker.take());
            }
        });
        count > 0
    }

    /// An empty slot.
    fn slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        })
    }
}

impl Drop for RingEngine {
    fn drop(&mut self) {
        // Operations end with their futures; the bell's has to be ended.
        let Some(mut state) = self.state() else { return };
        if state.bell_watched && rustix::io::write(&*state.bell, &1u64.to_ne_bytes()).is_ok() {
            while state.bell_watched {
                if state.ring.wait(None).is_err_and(|errno| errno != libc::EINTR) {
                    break;
                }
                state.complete();
            }
        }
    }
}

/// The memory of an operation.
enum Memory<'a> {
    None,
    Fill(&'a Target<'a>, usize),
    Take(&'a [Piece<'a>], usize),
}

/// An operation under way: in a slot until it has completed.
struct Flight<'a> {
    engine: &'a RingEngine,
    slot: Option<usize>,
}

impl RingEngine {
    /// Carries out one operation of the kernel; its result is that of the kernel.
    async fn fly(&self, fd: BorrowedFd<'_>, call: Call, memory: Memory<'_>) -> SysResult<i32> {
        let mut flight = Flight { engine: self, slot: None };
        flight.begin(fd, call, &memory)?;
        poll_fn(|context| flight.poll(context)).await
    }
}

impl Flight<'_> {
    fn begin(&mut self, fd: BorrowedFd<'_>, call: Call, memory: &Memory<'_>) -> SysResult<()> {
        let Some(mut state) = self.engine.state() else { return Err(libc::ENOSYS) };
        let index = state.slot();
        let Slot { vectors, kept, .. } = &mut state.slots[index];
        match *memory {
            Memory::None => {}
            Memory::Fill(Target::Guest(guest), done) => {
                vectors.fill(guest.sub(done, guest.len() - done));
            }
            Memory::Fill(Target::Block(block), done) => {
                vectors.fill(block.guest_mut().sub(done, block.len() - done));
                kept.push(block.clone());
            }
            Memory::Take(pieces, done) => {
                vectors.take(pieces.iter().map(Piece::bytes), done);
                kept.extend(pieces.iter().filter_map(|piece| match piece {
                    Piece::Block(block) => Some(block.clone()),
                    Piece::Guest(_) | Piece::Zeroes(_) => None,
                }));
            }
        }
        match state.push(fd, call, index) {
            Ok(()) => {
                self.slot = Some(index);
                Ok(())
            }
            Err(errno) => {
                state.slots[index].kept.clear();
                state.free.push(index);
                Err(errno)
            }
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<SysResult<i32>> {
        let (Some(index), Some(mut state)) = (self.slot, self.engine.state()) else {
            return Poll::Ready(Err(libc::EIO));
        };
        match state.slots[index].result.take() {
            Some(result) => {
                state.free.push(index);
                self.slot = None;
                Poll::Ready(if result < 0 { Err(-result) } else { Ok(result) })
            }
            None => {
                let waker = &mut state.slots[index].waker;
                match waker {
                    Some(waker) => waker.clone_from(context.waker()),
                    None => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let Some(index) = self.slot else { return };
        // The kernel may be using memory that is about to go: see it done.
        loop {
            let Some(mut state) = self.engine.state() else { return };
            if state.slots[index].result.take().is_some() {
                state.slots[index].waker = None;
                state.free.push(index);
                return;
            }
            drop(state);
            if !self.engine.complete() {
                // Not to be given up, whatever it says: the memory is in use.
                let _ = self.engine.wait(None);
            }
        }
    }
}

impl Engine for RingEngine {
    async fn read<'a>(&'a self, storage: &'a Storage, to: Target<'a>, offset: u64) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => {
                let result = self.read_file(file, &to, offset).await;
                blocking::done(storage, result, || blocking::reading(to.len(), offset))
            }
            _ => Blocking.read(storage, to, offset).await,
        }
    }

    #[inline]
    fn read_now(&self, storage: &Storage, to: &Target<'_>, offset: u64) -> Option<Result<()>> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => file.read_cached(to, offset).then_some(Ok(())),
            _ => Blocking.read_now(storage, to, offset),
        }
    }

    async fn write<'a>(
        &'a self,
        storage: &'a Storage,
        pieces: &'a [Piece<'a>],
        offset: u64,
    ) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) if !file.writes_to_cache(pieces, offset) => {
                let result = self.write_file(file, pieces, offset).await;
                blocking::done(storage, result, || blocking::writing(pieces, offset))
            }
            _ => Blocking.write(storage, pieces, offset).await,
        }
    }

    async fn sync<'a>(&'a self, storage: &'a Storage) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => {
                let result = self.simple(file, Call::Sync).await;
                blocking::done(storage, result, || "syncing")
            }
            _ => Blocking.sync(storage).await,
        }
    }

    async fn zero<'a>(
        &'a self,
        storage: &'a Storage,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => {
                let call = Call::Allocate(File::zero_flags(mode), offset, length);
                let result = self.simple(file, call).await;
                result.map_err(|errno| storage.zero_failed(errno, offset, length, mode))
            }
            _ => Blocking.zero(storage, offset, length, mode).await,
        }
    }

    async fn truncate<'a>(&'a self, storage: &'a Storage, length: u64) -> Result<()> {
        Blocking.truncate(storage, length).await
    }
}

/// Whether an operation is to be tried again. The kernel may cancel those of a thread
/// that ends: somebody else drives the queue then.
fn is_interrupted(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::ECANCELED)
}

impl RingEngine {
    /// See `sys::file::read`.
    async fn read_file(&self, file: &File, to: &Target<'_>, offset: u64) -> SysResult<()> {
        if file.read_cached(to, offset) {
            return Ok(());
        }
        let alignment = file.alignment.request as usize;
        let mut done = 0;
        while done < to.len() {
            let call = Call::Read(offset + done as u64);
            let got = match self.fly(file.fd(), call, Memory::Fill(to, done)).await {
                Ok(got) => got as usize,
                Err(errno) if is_interrupted(errno) => continue,
                // Somebody's descriptor with O_NONBLOCK: the ring heeds it.
                Err(libc::EAGAIN) => {
                    let rest = to.sub(done, to.len() - done);
                    return file.read(&rest, offset + done as u64);
                }
                Err(errno) => return Err(errno),
            };
            done += got;
            if got == 0 || got % alignment != 0 {
                to.sub(done, to.len() - done).fill_zero();
                break;
            }
        }
        Ok(())
    }

    /// See `sys::file::write`.
    async fn write_file(&self, file: &File, pieces: &[Piece<'_>], offset: u64) -> SysResult<()> {
        let total: usize = pieces.iter().map(Piece::len).sum();
        let mut done = 0;
        while done < total {
            let call = Call::Write(offset + done as u64);
            match self.fly(file.fd(), call, Memory::Take(pieces, done)).await {
                // Nothing written and no error: not to be tried forever.
                Ok(0) => return Err(libc::EIO),
                Ok(put) => done += put as usize,
                Err(errno) if is_interrupted(errno) => {}
                // All of it once more: the same bytes to the same place.
                Err(libc::EAGAIN) => return file.write(pieces, offset),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    async fn simple(&self, file: &File, call: Call) -> SysResult<()> {
        loop {
            match self.fly(file.fd(), call, Memory::None).await {
                Ok(_) => return Ok(()),
                Err(errno) if is_interrupted(errno) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}
