//! The engine that submits to a ring of io_uring, and is driven by its owner.
//!
//! A future puts its operation into the submission queue when it is first polled and
//! is woken when the owner finds the completion; nothing here waits for I/O, but the
//! end of a future that is dropped with its operation under way. What the kernel
//! works on lives in a slot here until it is done with it.
//!
//! A transfer that goes to a file just as it is needs no future: it is launched with a
//! tag, and has landed when its owner finds the tag again, with the result.
//!
//! Done at once, on the polling thread, are: what a storage's callbacks do; setting a
//! length; and what is a copy of memory: reads of what the page cache holds, and
//! writes to it that need not read first (a ring would hand those to a thread of the
//! kernel's). Without a ring everything is done at once.

mod operations;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use super::range_lock::Turn;
use super::storage::{Backend, Storage};
use super::turns::Transfer;
use crate::sys::file::SysResult;
use crate::sys::memory::{Block, BlockSlice};
use crate::sys::uring::{Call, Ring, Vectors};
use operations::Memory;

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
    /// Launched transfers that nobody has asked for yet.
    landed: Vec<Landed>,
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
    /// It was launched: nobody waits, its owner asks.
    tag: Option<usize>,
}

/// A transfer that has landed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Landed {
    /// What it was launched with.
    pub tag: usize,
    /// Bytes, or the negative errno.
    pub result: i32,
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
            landed: Vec::new(),
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

    /// Whether the kernel has completed something that nobody was told of.
    pub fn has_completions(&self) -> bool {
        self.state().is_some_and(|mut state| state.has_completions())
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
        self.wait_unless(timeout, State::has_completions)
    }

    /// Waits for the kernel, for those who want nothing else.
    fn wait_for_kernel(&self) -> SysResult<()> {
        self.wait_unless(None, |state| state.ring.has_completions())
    }

    fn wait_unless(
        &self,
        timeout: Option<Duration>,
        over: impl FnOnce(&mut State) -> bool,
    ) -> SysResult<()> {
        let Some(mut state) = self.state() else { return Ok(()) };
        state.watch_bell();
        if over(&mut state) {
            return state.submit().map(|_| ());
        }
        state.ring.wait(timeout)
    }

    /// Launches a transfer, if it can go to the storage as it is; it ends as one of
    /// those that [`landed`](RingEngine::landed) tells of. `None`: nothing was done.
    pub fn launch(
        &self,
        storage: &Storage,
        transfer: &Transfer,
        offset: u64,
        tag: usize,
    ) -> Option<Turn> {
        let (Backend::File(file), Some(mut state)) = (storage.backend(), self.state()) else {
            return None;
        };
        let (memory, call) = match transfer {
            Transfer::Read(to) => (Memory::Fill(to, 0), Call::Read(offset)),
            // Of those to the page cache the kernel would make work for a thread.
            Transfer::Write(_) if !file.is_direct() => return None,
            Transfer::Write(from) => (Memory::Take(slice::from_ref(from), 0), Call::Write(offset)),
        };
        let turn = storage.turn(transfer, offset)?;
        let index = state.slot();
        let slot = &mut state.slots[index];
        slot.tag = Some(tag);
        slot.take(&memory);
        if state.push(file.fd(), call, index).is_err() {
            state.give_back(index);
            storage.end_turn(turn, transfer, offset);
            return None;
        }
        Some(turn)
    }

    /// Adds those to `landed` that have come back since the last time.
    pub fn landed(&self, landed: &mut Vec<Landed>) {
        if let Some(mut state) = self.state() {
            landed.append(&mut state.landed);
        }
    }

    /// Waits until a launched transfer is over, and forgets it.
    pub fn see_landed(&self, tag: usize) {
        while let Some(mut state) = self.state() {
            if let Some(place) = state.landed.iter().position(|landed| landed.tag == tag) {
                state.landed.swap_remove(place);
                return;
            }
            if !state.slots.iter().any(|slot| slot.tag == Some(tag)) {
                return;
            }
            drop(state);
            if !self.complete() {
                // Not to be given up, whatever it says: the memory is in use.
                let _ = self.wait_for_kernel();
            }
        }
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

    fn has_completions(&mut self) -> bool {
        !self.landed.is_empty() || self.ring.has_completions()
    }

    /// Notes results, and the wakers of those who wait for them.
    fn complete(&mut self) -> bool {
        let State { ring, slots, free, wakers, landed, bell_watched, .. } = self;
        let count = ring.complete(|number, result| {
            if number == BELL {
                *bell_watched = false;
                return;
            }
            let slot = usize::try_from(number).ok().and_then(|number| slots.get_mut(number));
            let Some(slot) = slot else { return };
            slot.kept.clear();
            match slot.tag.take() {
                Some(tag) => {
                    landed.push(Landed { tag, result });
                    free.push(number as usize);
                }
                None => {
                    slot.result = Some(result);
                    wakers.extend(slot.waker.take());
                }
            }
        });
        count > 0
    }

    /// A slot whose operation the kernel was never given.
    fn give_back(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.kept.clear();
        slot.tag = None;
        self.free.push(index);
    }

    /// An empty slot.
    fn slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        })
    }
}

/// Whether an operation is to be tried again. The kernel may cancel those of a thread
/// that ends: somebody else drives the queue then.
pub(super) fn is_interrupted(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::ECANCELED)
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
