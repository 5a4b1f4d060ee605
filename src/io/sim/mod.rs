//! A simulated disk, for tests of what happens at power loss, on failing
//! operations, and between requests that are in flight at once.
//!
//! Operations are issued, take effect, and complete at times that a seeded
//! scheduler chooses, in any order. What readers see and what would survive a
//! power loss are kept apart; from any moment of a run crash images can be
//! drawn, each a new disk. Everything follows from the seed: there is no clock,
//! no thread and no random state here. It knows nothing of qcow2.

mod content;
mod crash;
mod engine;
mod event;
mod exec;
#[cfg(test)]
mod fault_tests;
mod file;
mod journal;
mod outcomes;
mod pages;
mod pattern;
mod ring;
mod rng;
#[cfg(test)]
mod tests;
mod world;

use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

pub use self::crash::Crash;
pub use self::engine::SimEngine;
pub use self::event::SimEvent;
pub use self::exec::{Outcome, Task, give_up_after};
pub use self::file::{Counters, FileOptions, SimFile};
pub use self::journal::OpKind;
pub use self::outcomes::{AtStake, Remains};
pub use self::pattern::{Fault, Pattern, Stage};
pub(crate) use self::ring::SimRing;
pub use self::rng::Rng;
pub use crate::sys::memory::{GuestMut, GuestRef, live_blocks};

use self::journal::Event;
use self::world::{HoldState, World};

/// A set of files and all that is in flight on them. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<World>>);

impl SimDisk {
    /// An empty disk, whose every choice follows from the seed.
    pub fn new(seed: u64) -> SimDisk {
        SimDisk(Arc::new(Mutex::new(World::new(seed))))
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of steps made.
    pub fn step(&self) -> u64 {
        self.world().step
    }

    /// What happened, one line for each event.
    pub fn journal(&self) -> String {
        let world = self.world();
        world.journal.text(|file| world.file_name(file))
    }

    /// The last few lines that were put into it by `note`.
    pub fn last_notes(&self, count: usize) -> Vec<String> {
        self.world().journal.last_notes(count)
    }

    /// Puts a line of one's own into the journal.
    pub fn note(&self, text: impl Into<String>) {
        let mut world = self.world();
        let step = world.step;
        world.journal.add(step, 0, Event::Note(text.into()));
    }

    /// What was asked of the disk and must not be: changes to read-only files,
    /// unaligned operations, operations after the end.
    pub fn violations(&self) -> Vec<String> {
        self.world().violations.clone()
    }

    /// Number of operations that were issued and have not completed.
    pub fn in_flight(&self) -> usize {
        let done = |op: &&world::Op| matches!(op.state, world::State::Completed(_));
        self.world().ops.values().filter(|op| !done(op)).count()
    }

    /// Makes operations fail from now on.
    pub fn inject(&self, fault: Fault) {
        self.world().faults.push(fault);
    }

    /// Nothing fails any more.
    pub fn clear_faults(&self) {
        self.world().faults.clear();
    }

    /// Whether an operation whose future is dropped stays in flight, to take
    /// effect at any later time. Otherwise it is over when the future is gone,
    /// done in whole, in part, or not at all.
    pub fn leave_dropped(&self, leave: bool) {
        self.world().leave_dropped = leave;
    }

    /// Holds back what matches, until it is released or nothing else can go on.
    pub fn hold(&self, pattern: Pattern, stage: Stage) -> Hold {
        let mut world = self.world();
        let waiters = Vec::new();
        world.holds.push(HoldState {
            pattern,
            stage,
            active: true,
            closed: false,
            caught: false,
            idle: false,
            waiters,
        });
        Hold { disk: self.clone(), index: world.holds.len() - 1 }
    }
}

/// Operations held back, by [`SimDisk::hold`].
pub struct Hold {
    disk: SimDisk,
    index: usize,
}

impl Hold {
    /// Waits until an operation is caught; `false` if nothing is in flight any
    /// more that could be.
    pub fn caught(&self) -> impl Future<Output = bool> + '_ {
        poll_fn(|context| {
            let mut world = self.disk.world();
            let hold = &mut world.holds[self.index];
            if hold.caught || hold.idle {
                return Poll::Ready(hold.caught);
            }
            hold.waiters.push(context.waker().clone());
            Poll::Pending
        })
    }

    /// Catches nothing more; what is held stays so.
    pub fn close(&self) {
        self.disk.world().holds[self.index].closed = true;
    }

    /// Lets go of what is held, and catches nothing more.
    pub fn release(&self) {
        self.disk.world().release(self.index);
    }
}
