//! The descriptors that tell of work: the bell, which ends a wait, and the completion
//! descriptor, which the program watches.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::engine::Event;
use super::ready::Bell;

/// Both of them.
pub struct Bells<D> {
    /// Shared with the ring that watches it.
    bell: Arc<D>,
    signal: Option<D>,
    signal_enabled: AtomicBool,
    /// It was made readable here, and not cleared since.
    signalled: AtomicBool,
}

impl<D: Event> Bell for Bells<D> {
    fn ring(&self) {
        self.bell.signal();
        self.signal();
    }
}

impl<D: Event> Bells<D> {
    /// Neither of them tells of anything. `signal`: the completion descriptor, if
    /// there is to be one.
    pub fn new(bell: Arc<D>, signal: Option<D>) -> Bells<D> {
        Bells {
            bell,
            signal_enabled: AtomicBool::new(signal.is_some()),
            signal,
            signalled: AtomicBool::new(false),
        }
    }

    /// The bell, for those who wait.
    pub fn bell(&self) -> &D {
        &self.bell
    }

    /// The completion descriptor, if there is one.
    pub fn signal_fd(&self) -> Option<&D> {
        self.signal.as_ref()
    }

    /// Whether it is to be used.
    pub fn enable_signal(&self, enabled: bool) {
        self.signal_enabled.store(enabled && self.signal.is_some(), SeqCst);
    }

    /// Makes the completion descriptor readable, unless it is disabled.
    pub fn signal(&self) {
        let Some(fd) = &self.signal else { return };
        if self.signal_enabled.load(SeqCst) && !self.signalled.swap(true, SeqCst) {
            fd.signal();
        }
    }

    /// Clears the completion descriptor. What it told of is to be looked for after
    /// this. `also`: somebody else may have made it readable.
    pub fn clear_signal(&self, also: bool) {
        let Some(fd) = &self.signal else { return };
        if self.signalled.swap(false, SeqCst) | (also && self.signal_enabled.load(SeqCst)) {
            fd.clear();
        }
    }
}
