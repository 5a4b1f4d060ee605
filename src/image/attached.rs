//! The queues of an image, as far as the image has to know them: whether their
//! requests are in flight, how to bring those to an end, and whether a blocking call
//! waits for one that only its own thread could carry on.

use std::future::Future;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError, Weak};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::here::here;
use crate::io::wait::Parked;
use crate::owner::Here;
use crate::shard::Sharded;

/// A queue, seen from its image.
pub trait Attached: Send + Sync {
    /// Requests accepted whose completion was not taken.
    fn in_flight(&self) -> u32;
    /// Requests accepted that have not completed.
    fn unfinished(&self) -> u32;
    /// The thread that drove it last; see [`this_thread`].
    fn last_driver(&self) -> u64;
    /// Carries its requests on as far as they go now, unless another thread is at it.
    /// `true`: the kernel did not take everything, so there is nothing to wait for yet.
    fn carry_on(&self) -> bool;
    /// Readable when they can be carried on again; valid as long as the queue.
    fn poll_fd(&self) -> RawFd;
    /// Waits for all of its requests; `Busy` if another thread is at it.
    fn finish(&self) -> Finishing<'_>;
    /// Ends all of its requests without carrying them on; `Busy` as for `finish`.
    fn give_up(&self) -> Result<()>;
}

/// The end of all requests of a queue; complete at the first poll where waiting
/// blocks the thread.
pub type Finishing<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// The queues of an image, and the blocking calls that wait.
#[derive(Default)]
pub struct Queues {
    list: Mutex<Vec<Weak<dyn Attached>>>,
    asleep: Mutex<Vec<Sleeper>>,
    /// A panic has left the image in pieces.
    poisoned: AtomicBool,
}

impl Queues {
    fn list(&self) -> MutexGuard<'_, Vec<Weak<dyn Attached>>> {
        // Nothing panics while it is held.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one.
    pub fn attach(&self, queue: Weak<dyn Attached>) {
        let mut list = self.list();
        list.retain(|queue| queue.strong_count() > 0);
        list.push(queue);
    }

    /// All there are.
    pub fn all(&self) -> Vec<Arc<dyn Attached>> {
        self.list().iter().filter_map(Weak::upgrade).collect()
    }

    /// `Busy` if a request is in flight.
    pub fn check_idle(&self) -> Result<()> {
        match self.all().iter().any(|queue| queue.in_flight() > 0) {
            true => Err(Error::new(ErrorKind::Busy, "requests of a queue are in flight")),
            false => Ok(()),
        }
    }

    /// Waits for all requests.
    pub async fn finish(&self) -> Result<()> {
        for queue in self.all() {
            queue.finish().await?;
            mutant!(CloseForgetsQueues => break);
        }
        Ok(())
    }

    /// Ends all requests.
    pub fn give_up(&self) -> Result<()> {
        self.all().iter().try_for_each(|queue| queue.give_up())
    }

    /// From now on the image can only be released.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    /// Whether that is so.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}

/// A blocking call that waits.
struct Sleeper {
    thread: u64,
    /// Index of its door, if that is its own.
    door: Option<usize>,
    parked: Arc<Parked>,
}

/// What a blocking call may hope for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hope {
    /// Somebody else is to wake it.
    Sure,
    /// Somebody else may, who is under way.
    Some,
    /// Nobody can.
    None,
}

/// How often a call that may wait in vain looks around.
const LOOK: Duration = Duration::from_millis(20);

impl Queues {
    /// Waits for a wake-up of a blocking call, or for a while. `Deadlock`: there will
    /// be none, for everything that the call may wait for is a request of a queue that
    /// the calling thread drove last.
    #[cold]
    pub fn idle<T>(&self, parked: &Arc<Parked>, doors: &Sharded<RwLock<T>>) -> ControlFlow<Error> {
        let asleep = || self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        let me = this_thread();
        let door = Some(here()).filter(|here| here.owned()).map(Here::index);
        asleep().push(Sleeper { thread: me, door, parked: parked.clone() });
        let mut hope = self.hope(me, door, doors);
        match hope {
            Hope::Sure => std::thread::park(),
            Hope::Some | Hope::None => std::thread::park_timeout(LOOK),
        }
        if hope == Hope::None && !parked.is_woken() {
            hope = self.hope(me, door, doors);
        }
        asleep().retain(|sleeper| !Arc::ptr_eq(&sleeper.parked, parked));
        if hope == Hope::None && !parked.is_woken() {
            return ControlFlow::Break(Error::new(
                ErrorKind::Deadlock,
                "the call would wait for a request of a queue that only this thread drives",
            ));
        }
        ControlFlow::Continue(())
    }

    /// Whether anybody can wake the calling thread. Whoever wakes somebody does so
    /// before leaving: so first come those who are under way, then who sleeps.
    fn hope<T>(&self, me: u64, door: Option<usize>, doors: &Sharded<RwLock<T>>) -> Hope {
        let mut drivers = self.all();
        drivers.retain(|queue| queue.unfinished() > 0);
        let drivers: Vec<u64> = drivers.iter().map(|queue| queue.last_driver()).collect();
        if !drivers.contains(&me) {
            return Hope::Sure;
        }
        // With whom this thread shares its door cannot be told.
        let Some(own) = door else { return Hope::Some };
        let occupied = |door: &RwLock<T>| matches!(door.try_write(), Err(TryLockError::WouldBlock));
        let inside: Vec<usize> = doors
            .iter()
            .enumerate()
            .filter(|(index, door)| *index != own && occupied(door))
            .map(|(index, _)| index)
            .collect();
        let asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        let sleeps = |who: &dyn Fn(&Sleeper) -> bool| {
            asleep.iter().any(|sleeper| who(sleeper) && !sleeper.parked.is_woken())
        };
        let driven = drivers
            .iter()
            .any(|driver| *driver != me && !sleeps(&|sleeper| sleeper.thread == *driver));
        let busy = inside.iter().any(|index| !sleeps(&|sleeper| sleeper.door == Some(*index)));
        if driven || busy { Hope::Some } else { Hope::None }
    }
}

/// What a call on a poisoned image or queue gets.
#[cold]
pub fn poisoned() -> Error {
    Error::new(ErrorKind::Panic, "unusable after an internal error: it can only be released")
}

/// A number for the calling thread that no other one ever had; 0 is none.
pub fn this_thread() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static THIS: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    THIS.try_with(|number| *number).unwrap_or(0)
}
