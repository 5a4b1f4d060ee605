//! Which requests can go on, told from any thread to the one that drives a queue.
//!
//! Whoever wakes a request puts its slot on the list. If nobody is driving, the bell
//! is rung: it ends a wait, and makes the completion descriptor readable. The driver
//! stops driving first and looks at the list after that; a waker does it the other
//! way round. So one of the two sees the other.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

use crate::sys::event;

/// The list, and the bell.
pub struct Ready {
    list: Mutex<VecDeque<usize>>,
    driving: AtomicBool,
    /// The bell was rung since the driver went: once is enough.
    rung: AtomicBool,
    /// Somebody wants a wait to end.
    wakeup: AtomicBool,
    bell: Arc<OwnedFd>,
    /// The completion descriptor.
    signal: Option<OwnedFd>,
    signal_enabled: AtomicBool,
    /// It was made readable here, and not cleared since.
    signalled: AtomicBool,
}

impl Ready {
    /// Nothing is ready. `depth`: the number of slots.
    pub fn new(depth: usize, bell: Arc<OwnedFd>, signal: Option<OwnedFd>) -> Ready {
        Ready {
            list: Mutex::new(VecDeque::with_capacity(depth)),
            driving: AtomicBool::new(false),
            rung: AtomicBool::new(false),
            wakeup: AtomicBool::new(false),
            bell,
            signal_enabled: AtomicBool::new(signal.is_some()),
            signal,
            signalled: AtomicBool::new(false),
        }
    }

    fn list(&self) -> MutexGuard<'_, VecDeque<usize>> {
        // Nothing panics while it is held.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, slot: usize) {
        self.list().push_back(slot);
        if !self.driving.load(SeqCst) {
            self.ring();
        }
    }

    fn ring(&self) {
        if !self.rung.swap(true, SeqCst) {
            event::signal(&self.bell);
            self.signal();
        }
    }

    /// The next slot that can go on.
    pub fn pop(&self) -> Option<usize> {
        self.list().pop_front()
    }

    /// Whether there is one.
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
        self.rung.store(false, SeqCst);
        self.driving.store(false, SeqCst);
        if self.is_empty() {
            return true;
        }
        self.begin();
        false
    }

    /// Ends a wait: the one under way, or the next.
    pub fn wake_up(&self) {
        self.wakeup.store(true, SeqCst);
        self.ring();
    }

    /// Whether somebody wanted that.
    pub fn take_wakeup(&self) -> bool {
        self.wakeup.swap(false, SeqCst)
    }

    /// The bell, for those who wait.
    pub fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// The completion descriptor, if there is one.
    pub fn signal_fd(&self) -> Option<&OwnedFd> {
        self.signal.as_ref()
    }

    /// Whether the completion descriptor is in use now.
    pub fn signal_enabled(&self) -> bool {
        self.signal_enabled.load(SeqCst)
    }

    /// Whether it is to be used.
    pub fn enable_signal(&self, enabled: bool) {
        self.signal_enabled.store(enabled && self.signal.is_some(), SeqCst);
    }

    /// Makes the completion descriptor readable, unless it is disabled.
    pub fn signal(&self) {
        let Some(fd) = &self.signal else { return };
        if self.signal_enabled() && !self.signalled.swap(true, SeqCst) {
            event::signal(fd);
        }
    }

    /// Clears the completion descriptor. What it told of is to be looked for after
    /// this. `also`: somebody else may have made it readable.
    pub fn clear_signal(&self, also: bool) {
        let Some(fd) = &self.signal else { return };
        if self.signalled.swap(false, SeqCst) | (also && self.signal_enabled()) {
            event::clear(fd);
        }
    }
}

/// Wakes one slot's request.
pub struct SlotWaker {
    ready: Arc<Ready>,
    slot: usize,
    /// It is on the list.
    listed: AtomicBool,
}

impl SlotWaker {
    /// For slot number `slot`.
    pub fn new(ready: Arc<Ready>, slot: usize) -> Arc<SlotWaker> {
        Arc::new(SlotWaker { ready, slot, listed: AtomicBool::new(false) })
    }

    /// It is about to be polled: what comes from now on needs another poll.
    pub fn unlist(&self) {
        self.listed.store(false, SeqCst);
    }
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.listed.swap(true, SeqCst) {
            self.ready.push(self.slot);
        }
    }
}
