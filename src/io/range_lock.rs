//! Which byte ranges of a storage are being written, where only whole blocks can be: in
//! direct mode, or because they are encrypted.
//!
//! A write smaller than a block reads the block and writes it back: whoever
//! writes that block in between would be undone. So every write registers the
//! blocks that it touches: whole blocks together with others, parts of blocks
//! alone.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::wait::WaitList;

/// Ranges being written.
#[derive(Default, Debug)]
pub(crate) struct RangeLock {
    held: Mutex<Vec<Held>>,
    waiting: WaitList,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Held {
    range: Range<u64>,
    alone: bool,
}

impl Held {
    fn excludes(&self, other: &Held) -> bool {
        let overlap = self.range.start < other.range.end && other.range.start < self.range.end;
        overlap && (self.alone || other.alone)
    }
}

impl RangeLock {
    /// Waits until nobody stands in the way.
    pub(crate) async fn lock(&self, range: Range<u64>, alone: bool) -> RangeGuard<'_> {
        let wanted = Held { range, alone };
        self.waiting.until(|| self.try_lock(&wanted)).await
    }

    fn try_lock(&self, wanted: &Held) -> Option<RangeGuard<'_>> {
        let mut held = self.held();
        if held.iter().any(|other| other.excludes(wanted)) {
            return None;
        }
        held.push(wanted.clone());
        Some(RangeGuard { lock: self, held: wanted.clone() })
    }

    /// The range together with others, if nobody is in the way; to be ended.
    pub(super) fn try_turn(&self, range: Range<u64>) -> Option<Turn> {
        let wanted = Held { range, alone: false };
        let mut held = self.held();
        if held.iter().any(|other| other.excludes(&wanted)) {
            return None;
        }
        held.push(wanted);
        Some(Turn { taken: true })
    }

    /// Ends a turn of that range.
    #[inline]
    pub(super) fn end_turn(&self, turn: Turn, range: Range<u64>) {
        if turn.taken {
            self.unlock(&Held { range, alone: false });
        }
    }

    fn unlock(&self, range: &Held) {
        let mut held = self.held();
        // Equal entries are interchangeable.
        if let Some(index) = held.iter().position(|other| other == range) {
            held.swap_remove(index);
        }
        drop(held);
        self.waiting.wake_all();
    }

    fn held(&self) -> MutexGuard<'_, Vec<Held>> {
        // Nothing panics while it is held.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A locked range; dropping it unlocks.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    held: Held,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.unlock(&self.held);
    }
}

/// A locked range that borrows nothing, or none at all.
#[must_use]
#[derive(Debug)]
pub(crate) struct Turn {
    taken: bool,
}

impl Turn {
    /// Of a transfer that need not take turns with any other.
    pub(super) const ANYTIME: Turn = Turn { taken: false };
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn try_lock(lock: &RangeLock, range: Range<u64>, alone: bool) -> Option<RangeGuard<'_>> {
        let future = pin!(lock.lock(range, alone));
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn whole_blocks_share_and_parts_do_not() {
        let lock = RangeLock::default();
        let whole = try_lock(&lock, 0..8192, false).unwrap();
        let other = try_lock(&lock, 4096..12288, false).unwrap();
        assert!(try_lock(&lock, 4096..8192, true).is_none());
        assert!(try_lock(&lock, 12288..16384, true).is_some());
        drop(whole);
        assert!(try_lock(&lock, 4096..8192, true).is_none());
        drop(other);
        let alone = try_lock(&lock, 4096..8192, true).unwrap();
        assert!(try_lock(&lock, 0..8192, false).is_none());
        assert!(try_lock(&lock, 4096..8192, true).is_none());
        assert!(try_lock(&lock, 0..4096, false).is_some());
        assert!(try_lock(&lock, 8192..u64::MAX, true).is_some());
        drop(alone);
        assert!(lock.held().is_empty());
    }
}
