//! Waiting: for a future to complete, for something to become true, for a turn.
//!
//! Nothing here knows what is waited for. A lock is never held while a waker
//! runs, and who waits is woken in the order in which they came.

use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

/// Polls a future to its end; parks the thread while it is pending. Allocates
/// once in a thread's life.
pub fn block_on<F: Future>(future: F) -> F::Output {
    thread_local!(static PARKING: Parking = Parking::new());
    let mut future = pin!(future);
    // A thread whose local storage is gone makes do with a new one.
    match PARKING.try_with(|parking| parking.block_on(future.as_mut())) {
        Ok(output) => output,
        Err(_) => Parking::new().block_on(future),
    }
}

/// A thread that waits, and its waker.
struct Parking {
    parked: Arc<Parked>,
    waker: Waker,
}

struct Parked {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::Release) {
            self.thread.unpark();
        }
    }
}

impl Parking {
    fn new() -> Parking {
        let thread = std::thread::current();
        let parked = Arc::new(Parked { thread, woken: AtomicBool::new(false) });
        Parking { waker: parked.clone().into(), parked }
    }

    #[inline]
    fn block_on<F: Future>(&self, mut future: Pin<&mut F>) -> F::Output {
        let mut context = Context::from_waker(&self.waker);
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => output,
            Poll::Pending => self.wait(future, &mut context),
        }
    }

    #[cold]
    fn wait<F: Future>(&self, mut future: Pin<&mut F>, context: &mut Context<'_>) -> F::Output {
        loop {
            while !self.parked.woken.swap(false, Ordering::Acquire) {
                std::thread::park();
            }
            if let Poll::Ready(output) = future.as_mut().poll(context) {
                // What was taken may have been meant for a `block_on` further
                // up this thread's stack: let it look again.
                self.parked.woken.store(true, Ordering::Release);
                return output;
            }
        }
    }
}

/// A lock whose holders do not panic half-way: what a panic poisons is sound.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tasks that wait for something to change.
#[derive(Default, Debug)]
pub struct WaitList {
    /// Length of the list, so that waking nobody costs next to nothing.
    count: AtomicUsize,
    list: Mutex<List>,
}

#[derive(Default, Debug)]
struct List {
    next: u64,
    waiting: Vec<(u64, Waker)>,
}

impl WaitList {
    /// A list without anybody on it.
    pub const fn new() -> WaitList {
        let list = List { next: 0, waiting: Vec::new() };
        WaitList { count: AtomicUsize::new(0), list: Mutex::new(list) }
    }

    /// Has `waker` woken by the next [`wake_all`](WaitList::wake_all). What is
    /// waited for may have come just before: look again after registering.
    /// `ticket` is the place on the list; with it, registering again keeps the
    /// place and [`unregister`](WaitList::unregister) leaves it.
    pub fn register(&self, ticket: &mut Option<Ticket>, waker: &Waker) {
        let mut list = guard(&self.list);
        let place = |list: &List, Ticket(ticket)| {
            list.waiting.iter().position(|(other, _)| *other == ticket)
        };
        match ticket.and_then(|ticket| place(&list, ticket)) {
            Some(place) => list.waiting[place].1.clone_from(waker),
            None => {
                let number = list.next;
                list.next += 1;
                list.waiting.push((number, waker.clone()));
                *ticket = Some(Ticket(number));
            }
        }
        self.count.store(list.waiting.len(), Ordering::Relaxed);
        drop(list);
        // Pairs with the fence in `wake_all`: either the caller sees the change
        // when it looks again, or the other side sees it on the list.
        fence(Ordering::SeqCst);
    }

    /// Takes a task off the list, if it is still there.
    pub fn unregister(&self, ticket: Ticket) {
        let mut list = guard(&self.list);
        list.waiting.retain(|(other, _)| *other != ticket.0);
        self.count.store(list.waiting.len(), Ordering::Relaxed);
    }

    /// Wakes all, in the order in which they came. To be called after what they
    /// wait for has changed.
    #[inline]
    pub fn wake_all(&self) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::Relaxed) > 0 {
            self.wake_those();
        }
    }

    #[cold]
    fn wake_those(&self) {
        let waiting = {
            let mut list = guard(&self.list);
            self.count.store(0, Ordering::Relaxed);
            std::mem::take(&mut list.waiting)
        };
        for (_, waker) in waiting {
            waker.wake();
        }
    }

    /// Waits until `ready` gives something. It is asked at once, and again
    /// whenever the list is woken. Dropping the future leaves nothing behind.
    pub fn until<T, F: FnMut() -> Option<T>>(&self, ready: F) -> Until<'_, F> {
        Until { list: self, ready, ticket: None }
    }
}

/// A place on a [`WaitList`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket(u64);

/// See [`WaitList::until`].
#[must_use = "futures do nothing unless polled"]
pub struct Until<'a, F> {
    list: &'a WaitList,
    ready: F,
    ticket: Option<Ticket>,
}

// No reference into itself.
impl<F> Unpin for Until<'_, F> {}

impl<T, F: FnMut() -> Option<T>> Future for Until<'_, F> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        if let Some(value) = (this.ready)() {
            return Poll::Ready(value);
        }
        this.list.register(&mut this.ticket, context.waker());
        match (this.ready)() {
            Some(value) => Poll::Ready(value),
            None => Poll::Pending,
        }
    }
}

impl<F> Drop for Until<'_, F> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.list.unregister(ticket);
        }
    }
}

/// A value that one task at a time has, also across awaits.
///
/// Whoever comes while it is free gets it; all who wait are woken when it
/// becomes free. So a task that nobody drives delays nobody.
#[derive(Debug)]
pub struct AsyncMutex<T> {
    /// Empty while somebody has the value.
    value: Mutex<Option<T>>,
    waiting: WaitList,
}

impl<T> AsyncMutex<T> {
    /// A free value.
    pub const fn new(value: T) -> AsyncMutex<T> {
        AsyncMutex { value: Mutex::new(Some(value)), waiting: WaitList::new() }
    }

    /// Waits for the value.
    pub async fn lock(&self) -> AsyncGuard<'_, T> {
        self.waiting.until(|| self.try_lock()).await
    }

    /// The value, if it is free.
    pub fn try_lock(&self) -> Option<AsyncGuard<'_, T>> {
        let value = guard(&self.value).take()?;
        Some(AsyncGuard { mutex: self, value: Some(value) })
    }
}

/// The value of an [`AsyncMutex`]; dropping it passes it on.
#[derive(Debug)]
pub struct AsyncGuard<'a, T> {
    mutex: &'a AsyncMutex<T>,
    /// There until it is dropped.
    value: Option<T>,
}

const HELD: &str = "a guard has its value until it is dropped";

impl<T> Deref for AsyncGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect(HELD)
    }
}

impl<T> DerefMut for AsyncGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect(HELD)
    }
}

impl<T> Drop for AsyncGuard<'_, T> {
    fn drop(&mut self) {
        *guard(&self.mutex.value) = self.value.take();
        self.mutex.waiting.wake_all();
    }
}
