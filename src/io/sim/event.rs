//! What tells of work on a simulated disk, and waiting for it: an eventfd without
//! the kernel. It knows nothing of rings and queues.

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use super::SimDisk;

/// Readable or not, until it is cleared. Clones are the same.
#[derive(Clone)]
pub struct SimEvent(Arc<Inner>);

struct Inner {
    /// What it is known by on its disk.
    number: i32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    readable: bool,
    waiting: Vec<Waker>,
}

impl fmt::Debug for SimEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimEvent({})", self.0.number)
    }
}

impl SimDisk {
    /// An event that is not readable.
    pub fn event(&self) -> SimEvent {
        let mut world = self.world();
        let number = world.events.len() as i32;
        let event = SimEvent(Arc::new(Inner { number, state: Mutex::default() }));
        world.events.push(event.clone());
        event
    }

    /// Waits until one of the events with these numbers is readable.
    pub fn readable(&self, numbers: &[i32]) -> impl Future<Output = ()> + use<> {
        let events: Vec<SimEvent> = {
            let world = self.world();
            numbers.iter().filter_map(|n| world.events.get(*n as usize).cloned()).collect()
        };
        poll_fn(move |context| {
            let readable = |event: &SimEvent| event.is_readable_or_wakes(context.waker());
            // All of them are asked, so that each one wakes.
            match events.iter().filter(|event| readable(event)).count() {
                0 => Poll::Pending,
                _ => Poll::Ready(()),
            }
        })
    }
}

impl SimEvent {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is known by on its disk.
    pub fn number(&self) -> i32 {
        self.0.number
    }

    /// Makes it readable.
    pub fn signal(&self) {
        let waiting = {
            let mut state = self.state();
            state.readable = true;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        self.state().readable = false;
    }

    /// Whether it is readable.
    pub fn is_readable(&self) -> bool {
        self.state().readable
    }

    /// Whether it is readable; if not, the next signal wakes this waker.
    pub(super) fn is_readable_or_wakes(&self, waker: &Waker) -> bool {
        let mut state = self.state();
        if !state.readable && !state.waiting.iter().any(|other| other.will_wake(waker)) {
            state.waiting.push(waker.clone());
        }
        state.readable
    }
}

/// Lets others go on before the caller does.
pub(super) async fn give_way() {
    let mut gave_way = false;
    poll_fn(|context| {
        if std::mem::replace(&mut gave_way, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
