//! Waiting: for a future to complete, for something to become true, for a turn.
//!
//! Nothing here knows what is waited for. A lock is never held while a waker
//! runs, and who waits is woken in the order in which they came.

use std::convert::Infallible;
use std::future::Future;
use std::ops::{ControlFlow, Deref, DerefMut};
use std::pin::{Pin, pin};
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use crate::sync::thread::{self, Thread};
use crate::sync::{Mutex, MutexGuard, thread_local};

/// Polls a future to its end; parks the thread while it is pending. Allocates
/// once in a thread's life.
#[inline]
pub fn block_on<F: Future>(future: F) -> F::Output {
    let park = |_: &Arc<Parked>| -> ControlFlow<Infallible> {
        thread::park();
        ControlFlow::Continue(())
    };
    match block_on_unless(future, park) {
        ControlFlow::Continue(output) => output,
        ControlFlow::Break(never) => match never {},
    }
}

/// As `block_on`, with another way to spend the time while there is nothing to do:
/// `idle` parks the thread for a while, or breaks to give the future up.
#[inline]
pub fn block_on_unless<F: Future, B>(
    future: F,
    mut idle: impl FnMut(&Arc<Parked>) -> ControlFlow<B>,
) -> ControlFlow<B, F::Output> {
    thread_local!(static PARKING: Parking = Parking::new());
    let mut future = pin!(future);
    // A thread whose local storage is gone makes do with a new one.
    match PARKING.try_with(|parking| parking.block_on(future.as_mut(), &mut idle)) {
        Ok(output) => output,
        Err(_) => Parking::new().block_on(future, &mut idle),
    }
}

/// A thread that waits, and its waker.
struct Parking {
    parked: Arc<Parked>,
    waker: Waker,
}

/// A thread that waits, as far as others may know it.
pub struct Parked {
    thread: Thread,
    woken: AtomicBool,
}

impl Parked {
    /// Whether there is something to do for it.
    pub fn is_woken(&self) -> bool {
        self.woken.load(Ordering::Acquire)
    }
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
        let thread = thread::current();
        let parked = Arc::new(Parked { thread, woken: AtomicBool::new(false) });
        Parking { waker: parked.clone().into(), parked }
    }

    #[inline]
    fn block_on<F: Future, B>(
        &self,
        mut future: Pin<&mut F>,
        idle: &mut dyn FnMut(&Arc<Parked>) -> ControlFlow<B>,
    ) -> ControlFlow<B, F::Output> {
        let mut context = Context::from_waker(&self.waker);
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => ControlFlow::Continue(output),
            Poll::Pending => self.wait(future, &mut context, idle),
        }
    }

    #[cold]
    fn wait<F: Future, B>(
        &self,
        mut future: Pin<&mut F>,
        context: &mut Context<'_>,
        idle: &mut dyn FnMut(&Arc<Parked>) -> ControlFlow<B>,
    ) -> ControlFlow<B, F::Output> {
        loop {
            while !self.parked.woken.swap(false, Ordering::Acquire) {
                idle(&self.parked)?;
            }
            if let Poll::Ready(output) = future.as_mut().poll(context) {
                // What was taken may have been meant for a `block_on` further
                // up this thread's stack: let it look again.
                self.parked.woken.store(true, Ordering::Release);
                return ControlFlow::Continue(output);
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
    pub fn new() -> WaitList {
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
    pub fn new(value: T) -> AsyncMutex<T> {
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicU32;
    use std::sync::atomic::Ordering::SeqCst;
    use std::time::Duration;

    use super::*;

    /// Notes the order in which wakers are woken.
    struct Note(u32, Arc<Mutex<Vec<u32>>>);

    impl Wake for Note {
        fn wake(self: Arc<Self>) {
            self.1.lock().unwrap().push(self.0);
        }
    }

    fn notes(count: u32) -> (Vec<Waker>, Arc<Mutex<Vec<u32>>>) {
        let order = Arc::<Mutex<Vec<u32>>>::default();
        let waker = |i| Waker::from(Arc::new(Note(i, order.clone())));
        ((0..count).map(waker).collect(), order)
    }

    fn poll<F: Future>(future: Pin<&mut F>, waker: &Waker) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(waker))
    }

    #[test]
    fn woken_in_the_order_of_coming() {
        let list = WaitList::new();
        let (wakers, order) = notes(4);
        let mut tickets = [None; 4];
        for i in [2, 0, 3, 1] {
            list.register(&mut tickets[i], &wakers[i]);
        }
        // Registering again keeps the place, leaving gives it up.
        list.register(&mut tickets[2], &wakers[2]);
        list.unregister(tickets[3].unwrap());
        list.wake_all();
        list.wake_all();
        assert_eq!(*order.lock().unwrap(), [2, 0, 1]);
    }

    #[test]
    fn until_looks_leaves_and_follows_its_task() {
        let list = WaitList::new();
        let (wakers, order) = notes(3);
        let ready = AtomicBool::new(false);
        let is_ready = || ready.load(SeqCst).then_some(7);
        let mut first = pin!(list.until(is_ready));
        assert!(poll(first.as_mut(), &wakers[0]).is_pending());
        {
            let mut dropped = pin!(list.until(is_ready));
            assert!(poll(dropped.as_mut(), &wakers[1]).is_pending());
        }
        // Polled by another task now: that one is to be woken.
        assert!(poll(first.as_mut(), &wakers[2]).is_pending());
        ready.store(true, SeqCst);
        list.wake_all();
        assert_eq!(*order.lock().unwrap(), [2]);
        assert_eq!(poll(first, &wakers[2]), Poll::Ready(7));
        assert_eq!(list.count.load(SeqCst), 0);
    }

    /// A change between looking and registering must not be missed.
    #[test]
    fn no_wake_up_is_lost() {
        let list = WaitList::new();
        let turn = AtomicU32::new(0);
        const ROUNDS: u32 = 20_000;
        thread::scope(|scope| {
            for me in 0..2 {
                let (list, turn) = (&list, &turn);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let mine = round * 2 + me;
                        block_on(
                            list.until(|| (turn.load(Ordering::Acquire) == mine).then_some(())),
                        );
                        turn.store(mine + 1, Ordering::Release);
                        list.wake_all();
                    }
                });
            }
        });
        assert_eq!(turn.into_inner(), 2 * ROUNDS);
    }

    #[test]
    fn block_on_parks_until_woken() {
        let flag = Arc::new(AtomicBool::new(false));
        let polls = AtomicU32::new(0);
        let future = poll_fn(|context| {
            if flag.load(SeqCst) {
                return Poll::Ready(5);
            }
            if polls.fetch_add(1, SeqCst) == 0 {
                let (flag, waker) = (flag.clone(), context.waker().clone());
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(30));
                    flag.store(true, SeqCst);
                    waker.wake();
                });
            }
            Poll::Pending
        });
        assert_eq!(block_on(future), 5);
        // One more at most, left over from somebody else's use of the thread.
        assert!(polls.into_inner() <= 2, "it must not spin");
    }

    /// A wake-up that comes while an inner `block_on` parks is not lost to the
    /// outer one.
    #[test]
    fn block_on_nests() {
        let mut step = 0;
        let future = poll_fn(|context| {
            step += 1;
            if step > 1 {
                return Poll::Ready(());
            }
            // For the outer future, but the inner one takes the wake-up.
            context.waker().wake_by_ref();
            let mut inner = 0;
            block_on(poll_fn(|_| {
                inner += 1;
                if inner > 1 { Poll::Ready(()) } else { Poll::Pending }
            }));
            Poll::Pending
        });
        block_on(future);
        assert_eq!(step, 2);
    }

    /// Gives way once, so that others get to run while the mutex is held.
    async fn give_way() {
        let mut polled = false;
        poll_fn(|context| {
            context.waker().wake_by_ref();
            if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    #[test]
    fn one_has_the_mutex_at_a_time() {
        let mutex = AsyncMutex::new((0u32, 0u32));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        block_on(async {
                            let mut held = mutex.lock().await;
                            held.0 += 1;
                            let seen = held.0;
                            give_way().await;
                            held.1 += 1;
                            assert_eq!((held.0, held.1), (seen, seen));
                        });
                    }
                });
            }
        });
        assert_eq!(*mutex.try_lock().unwrap(), (8000, 8000));
    }

    #[test]
    fn a_task_nobody_drives_delays_nobody() {
        let mutex = AsyncMutex::new(());
        let (wakers, order) = notes(3);
        let held = mutex.try_lock().unwrap();
        assert!(mutex.try_lock().is_none());
        let mut asleep = pin!(mutex.lock());
        assert!(poll(asleep.as_mut(), &wakers[0]).is_pending());
        let mut awake = Box::pin(mutex.lock());
        assert!(poll(awake.as_mut(), &wakers[1]).is_pending());
        drop(held);
        assert_eq!(*order.lock().unwrap(), [0, 1]);
        let Poll::Ready(held) = poll(awake.as_mut(), &wakers[1]) else {
            panic!("free, and yet not to be had");
        };
        // Given up while waiting: leaves nothing behind.
        drop(held);
        drop(awake);
        assert!(poll(asleep, &wakers[0]).is_ready());
        assert_eq!(mutex.waiting.count.load(SeqCst), 0);
    }
}
