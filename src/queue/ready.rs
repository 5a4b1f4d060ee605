//! Which requests can go on, told from any thread to the one that drives a queue.
//!
//! Whoever wakes a request puts its slot on the list. If nobody is driving, the bell
//! is rung. The driver stops driving first and looks at the list after that; a waker
//! does it the other way round. So one of the two sees the other. What the bell is,
//! this file does not know.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::task::Wake;

use crate::sync::atomic::{AtomicBool, Ordering::SeqCst};
use crate::sync::{Mutex, MutexGuard, in_this_order};

/// Tells the driver that there is something to do.
pub trait Bell {
    /// Tells it.
    fn ring(&self);
}

/// The list, and the bell.
pub struct Ready<B> {
    list: Mutex<VecDeque<usize>>,
    driving: AtomicBool,
    /// The bell was rung since the driver went: once is enough.
    rung: AtomicBool,
    /// Somebody wants a wait to end.
    wakeup: AtomicBool,
    bell: B,
}

impl<B: Bell> Ready<B> {
    /// Nothing is ready. `depth`: the number of slots.
    pub fn new(depth: usize, bell: B) -> Ready<B> {
        Ready {
            list: Mutex::new(VecDeque::with_capacity(depth)),
            driving: AtomicBool::new(false),
            rung: AtomicBool::new(false),
            wakeup: AtomicBool::new(false),
            bell,
        }
    }

    fn list(&self) -> MutexGuard<'_, VecDeque<usize>> {
        // Nothing panics while it is held.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot can go on.
    pub fn push(&self, slot: usize) {
        self.list().push_back(slot);
        in_this_order();
        if !self.driving.load(SeqCst) && !mutant!(WakeUpNotRung) {
            self.ring();
        }
    }

    fn ring(&self) {
        if !self.rung.swap(true, SeqCst) {
            self.bell.ring();
        }
    }

    /// The next slot that can go on.
    pub fn pop(&self) -> Option<usize> {
        self.list().pop_front()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list().is_empty()
    }

    /// From now on somebody looks at the list.
    pub fn begin(&self) {
        self.driving.store(true, SeqCst);
    }

    /// Nobody looks at the list any more; `false`: there is something on it, and the
    /// caller goes on driving.
    pub fn end(&self) -> bool {
        self.rung.swap(mutant!(BellRungOnce), SeqCst);
        self.driving.store(false, SeqCst);
        in_this_order();
        if self.is_empty() {
            return true;
        }
        self.begin();
        false
    }

    /// Ends a wait: the one under way, or the next.
    pub fn wake_up(&self) {
        self.wakeup.swap(true, SeqCst);
        in_this_order();
        self.ring();
    }

    /// Whether somebody wanted that.
    pub fn take_wakeup(&self) -> bool {
        self.wakeup.swap(false, SeqCst)
    }

    /// The bell.
    pub fn bell(&self) -> &B {
        &self.bell
    }
}

/// Wakes one slot's request.
pub struct SlotWaker<B> {
    ready: Arc<Ready<B>>,
    slot: usize,
    /// It is on the list.
    listed: AtomicBool,
}

impl<B: Bell> SlotWaker<B> {
    /// For slot number `slot`.
    pub fn new(ready: Arc<Ready<B>>, slot: usize) -> Arc<SlotWaker<B>> {
        Arc::new(SlotWaker { ready, slot, listed: AtomicBool::new(false) })
    }

    /// It is about to be polled: what comes from now on needs another poll.
    pub fn unlist(&self) {
        mutant!(ListedOnce => return);
        self.listed.store(false, SeqCst);
        in_this_order();
    }
}

impl<B: Bell> Wake for SlotWaker<B> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.listed.swap(true, SeqCst) {
            self.ready.push(self.slot);
        }
    }
}
