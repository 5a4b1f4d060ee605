//! A ring of io_uring without the kernel: operations are queued, handed over to the
//! simulated disk when their owner submits, and told of when it takes what has
//! completed. It does what `io::ring` does for its owner, in the same steps, and knows
//! nothing of queues. Transfers that are launched may come back short or interrupted.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};

use super::SimDisk;
use super::content::{OpId, SECTOR};
use super::engine::{Operation, Prepared, simulated, zeroing};
use super::event::{SimEvent, give_way};
use super::rng::Rng;
use crate::error;
use crate::io::engine::{Engine, Piece, Target, ZeroMode};
use crate::io::range_lock::Turn;
use crate::io::ring::Landed;
use crate::io::storage::Storage;
use crate::io::turns::Transfer;
use crate::sys::file::SysResult;

/// An engine that puts operations on a simulated disk when its owner submits.
pub struct SimRing {
    disk: SimDisk,
    shared: Arc<Shared>,
    bell: SimEvent,
}

/// What completions reach, too.
struct Shared {
    state: Mutex<State>,
    /// Readable while there are completions.
    completions: SimEvent,
    /// Signalled with each completion.
    signal: SimEvent,
}

struct State {
    next: u64,
    slots: BTreeMap<u64, Slot>,
    /// Not handed over yet.
    queued: VecDeque<u64>,
    /// Not taken yet; the bell's among them.
    completed: VecDeque<u64>,
    /// Launched transfers that nobody has asked for yet.
    landed: Vec<Landed>,
    bell_watched: bool,
    signal_enabled: bool,
    rng: Rng,
    /// How often, out of 16 times, the kernel takes no more, or a signal comes.
    trouble: u64,
}

/// An operation's place.
enum Slot {
    Queued(Prepared, Waits),
    Flying(OpId, Waits),
    /// It has completed, and the owner has taken notice.
    Done(OpId),
}

/// Who waits for an operation.
enum Waits {
    Future(Waker),
    /// The owner asks for what it has launched.
    Owner(Launched),
}

/// A transfer without a future.
struct Launched {
    tag: usize,
    /// Where what is read goes.
    to: Option<Target<'static>>,
    len: usize,
    /// It comes back with this errno, whatever became of it.
    interrupted: Option<i32>,
}

/// The number of the bell's operation.
const BELL: u64 = u64::MAX;

/// Tells the ring that an operation has completed, or that the bell has rung.
struct Completes(Weak<Shared>, u64);

impl Wake for Completes {
    fn wake(self: Arc<Self>) {
        if let Some(shared) = self.0.upgrade() {
            shared.complete(self.1);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, number: u64) {
        let mut state = self.state();
        state.completed.push_back(number);
        let enabled = state.signal_enabled;
        drop(state);
        self.completions.signal();
        if enabled {
            self.signal.signal();
        }
    }
}

impl State {
    /// Puts an operation into the queue; its number.
    fn queue(&mut self, slot: Slot) -> u64 {
        let number = self.next;
        self.next += 1;
        self.slots.insert(number, slot);
        self.queued.push_back(number);
        number
    }

    /// What becomes of a transfer of `len` bytes in whole blocks: how much of it is
    /// done, and what it is interrupted by.
    fn fate(&mut self, len: usize, block: u32) -> (usize, Option<i32>) {
        if !self.rng.chance(self.trouble, 16) {
            return (len, None);
        }
        let interruptions = [libc::EINTR, libc::ECANCELED, libc::EAGAIN];
        let blocks = (len as u64).div_ceil(block.into());
        match self.rng.chance(1, 2) || blocks < 2 {
            true => (len, Some(*self.rng.pick(&interruptions))),
            false => (self.rng.between(1, blocks - 1) as usize * block as usize, None),
        }
    }
}

impl Slot {
    /// What is to be seen to its end when nobody waits any more: as by the real ring,
    /// what was queued is handed over for that.
    fn end(self) -> Option<OpId> {
        match self {
            Slot::Queued(prepared, _) => prepared.issue_unless_stopped(),
            Slot::Flying(id, _) | Slot::Done(id) => Some(id),
        }
    }
}

impl Launched {
    /// How it comes back. `result`: what was read, or an errno.
    fn land(self, result: Result<Vec<u8>, i32>) -> Landed {
        let result = match (result, self.interrupted) {
            (Err(errno), _) | (Ok(_), Some(errno)) => -errno,
            (Ok(bytes), None) => {
                if let Some(to) = self.to {
                    to.copy_from(&bytes);
                }
                self.len as i32
            }
        };
        Landed { tag: self.tag, result }
    }
}

impl SimRing {
    /// A ring on this disk. `bell`: ends a wait when it is signalled. `signal`: is
    /// signalled with each completion.
    pub fn new(disk: &SimDisk, bell: SimEvent, signal: SimEvent) -> SimRing {
        let completions = disk.event();
        let mut rng = disk.world().rng.fork();
        let trouble = *rng.pick(&[0, 0, 1, 4]);
        let state = State {
            next: 0,
            slots: BTreeMap::new(),
            queued: VecDeque::new(),
            completed: VecDeque::new(),
            landed: Vec::new(),
            bell_watched: false,
            signal_enabled: true,
            rng,
            trouble,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), completions, signal });
        SimRing { disk: disk.clone(), shared, bell }
    }

    fn waker(&self, number: u64) -> Waker {
        Arc::new(Completes(Arc::downgrade(&self.shared), number)).into()
    }

    /// The number of what is readable while there are completions.
    pub fn number(&self) -> i32 {
        self.shared.completions.number()
    }

    /// The simulated thread that is running.
    pub fn this_thread(&self) -> u64 {
        self.disk.world().thread
    }

    /// Hands to the disk what was queued: all of it, unless the kernel happens to have
    /// no memory just now: `false`.
    pub fn submit(&self) -> bool {
        self.watch_bell();
        loop {
            let mut state = self.shared.state();
            if state.queued.is_empty() {
                return true;
            }
            let trouble = state.trouble;
            if state.rng.chance(trouble, 16) {
                return false;
            }
            let Some(number) = state.queued.pop_front() else { return true };
            if let Some(Slot::Queued(prepared, waits)) = state.slots.remove(&number) {
                let id = prepared.issue(Some(self.waker(number)));
                state.slots.insert(number, Slot::Flying(id, waits));
            }
        }
    }

    /// Sees to it that the bell is heard.
    fn watch_bell(&self) {
        if std::mem::replace(&mut self.shared.state().bell_watched, true) {
            return;
        }
        if self.bell.is_readable_or_wakes(&self.waker(BELL)) {
            self.shared.complete(BELL);
        }
    }

    /// Whether something has completed.
    pub fn has_completions(&self) -> bool {
        let state = self.shared.state();
        !(state.completed.is_empty() && state.landed.is_empty())
    }

    /// Operations under way.
    pub fn flying(&self) -> usize {
        self.shared.state().slots.len()
    }

    /// Takes what has completed and wakes who waits for it. Whether there was
    /// anything.
    pub fn complete(&self) -> bool {
        let mut state = self.shared.state();
        let completed = std::mem::take(&mut state.completed);
        self.shared.completions.clear();
        let mut wakers = Vec::new();
        for number in &completed {
            if *number == BELL {
                state.bell_watched = false;
                self.bell.clear();
                continue;
            }
            match state.slots.remove(number) {
                Some(Slot::Flying(id, Waits::Future(waker))) => {
                    state.slots.insert(*number, Slot::Done(id));
                    wakers.push(waker);
                }
                Some(Slot::Flying(id, Waits::Owner(launched))) => {
                    let result = self.disk.world().take_result(id);
                    state.landed.push(launched.land(result));
                }
                _ => {}
            }
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        !completed.is_empty()
    }

    /// See `RingEngine::launch`; writes are launched to any file here.
    pub fn launch(
        &self,
        storage: &Storage,
        transfer: &Transfer,
        offset: u64,
        tag: usize,
    ) -> Option<Turn> {
        let file = simulated(storage).ok()?;
        let turn = storage.turn(transfer, offset)?;
        let mut state = self.shared.state();
        let (len, interrupted) =
            state.fate(transfer.len(), storage.alignment().request.max(SECTOR as u32));
        let (prepared, to) = match transfer {
            Transfer::Read(to) => {
                let to = to.sub(0, len);
                (Operation::read(file, to.clone(), offset).prepare(), Some(to))
            }
            Transfer::Write(from) => {
                let pieces = [from.sub(0, len)];
                (Operation::write(file, &pieces, offset).prepare(), None)
            }
        };
        state.queue(Slot::Queued(prepared, Waits::Owner(Launched { tag, to, len, interrupted })));
        Some(turn)
    }

    /// Adds the launched transfers that are over since the last time.
    pub fn landed(&self, landed: &mut Vec<Landed>) {
        landed.append(&mut self.shared.state().landed);
    }

    /// Sees a launched transfer over, and forgets it.
    pub fn see_landed(&self, tag: usize) {
        let mut state = self.shared.state();
        state.landed.retain(|landed| landed.tag != tag);
        let launched = |slot: &Slot| match slot {
            Slot::Queued(_, Waits::Owner(l)) | Slot::Flying(_, Waits::Owner(l)) => l.tag == tag,
            _ => false,
        };
        let number = state.slots.iter().find(|(_, slot)| launched(slot)).map(|(number, _)| *number);
        let slot = number.and_then(|number| state.slots.remove(&number));
        drop(state);
        if let Some(id) = slot.and_then(Slot::end) {
            self.disk.world().abandon(id);
        }
    }

    /// Whether each completion is signalled.
    pub fn set_signal_enabled(&self, enabled: bool) {
        self.shared.state().signal_enabled = enabled;
    }

    /// Submits, and waits until something has completed or the bell was rung; the rest
    /// of the world goes on meanwhile. EAGAIN: the kernel takes nothing just now;
    /// EINTR: a signal came.
    pub async fn wait(&self) -> SysResult<()> {
        let taken = self.submit();
        give_way().await;
        if !taken {
            return Err(libc::EAGAIN);
        }
        self.readable(&[self.number()]).await
    }

    /// Waits until one of the events with these numbers is readable. EINTR: a signal
    /// came.
    pub async fn readable(&self, numbers: &[i32]) -> SysResult<()> {
        give_way().await;
        let interrupted = {
            let mut state = self.shared.state();
            let trouble = state.trouble;
            state.rng.chance(trouble, 16)
        };
        if interrupted {
            return Err(libc::EINTR);
        }
        self.disk.readable(numbers).await;
        Ok(())
    }

    /// Whether one of the events is readable now.
    pub fn is_readable(&self, numbers: &[i32]) -> bool {
        let world = self.disk.world();
        let event = |number: &i32| world.events.get(*number as usize);
        numbers.iter().filter_map(event).any(SimEvent::is_readable)
    }

    /// Carries out an operation.
    async fn fly(&self, operation: Operation<'_>) -> error::Result<()> {
        let mut flight = Flight { ring: self, operation, slot: None };
        poll_fn(|context| flight.poll(context)).await
    }
}

/// An operation in a slot until it has completed.
struct Flight<'a> {
    ring: &'a SimRing,
    operation: Operation<'a>,
    slot: Option<u64>,
}

impl Flight<'_> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<error::Result<()>> {
        let mut state = self.ring.shared.state();
        let Some(number) = self.slot else {
            let waits = Waits::Future(context.waker().clone());
            self.slot = Some(state.queue(Slot::Queued(self.operation.prepare(), waits)));
            return Poll::Pending;
        };
        match state.slots.get_mut(&number) {
            Some(Slot::Queued(_, waits) | Slot::Flying(_, waits)) => {
                *waits = Waits::Future(context.waker().clone());
                Poll::Pending
            }
            Some(Slot::Done(id)) => {
                let id = *id;
                state.slots.remove(&number);
                drop(state);
                self.slot = None;
                self.operation.resume(id, context)
            }
            None => panic!("operation {number} was polled after it had completed"),
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let Some(number) = self.slot else { return };
        let slot = self.ring.shared.state().slots.remove(&number);
        self.operation.is_issued(slot.and_then(Slot::end));
    }
}

impl Engine for SimRing {
    async fn read<'a>(
        &'a self,
        storage: &'a Storage,
        to: Target<'a>,
        offset: u64,
    ) -> error::Result<()> {
        self.fly(Operation::read(simulated(storage)?, to, offset)).await
    }

    async fn write<'a>(
        &'a self,
        storage: &'a Storage,
        pieces: &'a [Piece<'a>],
        offset: u64,
    ) -> error::Result<()> {
        self.fly(Operation::write(simulated(storage)?, pieces, offset)).await
    }

    async fn sync<'a>(&'a self, storage: &'a Storage) -> error::Result<()> {
        self.fly(Operation::sync(simulated(storage)?)).await
    }

    async fn zero<'a>(
        &'a self,
        storage: &'a Storage,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> error::Result<()> {
        self.fly(zeroing(storage, offset, length, mode)?).await
    }

    async fn truncate<'a>(&'a self, storage: &'a Storage, length: u64) -> error::Result<()> {
        self.fly(Operation::truncate(simulated(storage)?, length)).await
    }
}
