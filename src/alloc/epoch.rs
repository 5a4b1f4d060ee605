//! Who may still be using what was looked up: epochs.
//!
//! A request enters before it looks at the mapping and leaves when its I/O is
//! over. What was freed at one moment may be reused when everybody who had
//! entered by then has left. Entering and leaving touch only the calling
//! thread's counters.

use crate::here::here;
use crate::io::wait::WaitList;
use crate::shard::Sharded;
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst, fence};
use crate::sync::in_this_order;

/// The epochs of an image.
#[derive(Default)]
pub struct Epochs {
    current: AtomicU64,
    /// Requests inside that entered at an even or an odd epoch.
    inside: Sharded<[AtomicU64; 2]>,
    /// Those who wait for somebody to leave, and how many they are: mostly none,
    /// so that leaving need not look at the list.
    waiting: AtomicU64,
    left: WaitList,
}

/// A request that is inside; leaves when dropped.
pub struct Inside<'a> {
    epochs: &'a Epochs,
    counter: &'a AtomicU64,
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        self.epochs.leave_by(self.counter);
    }
}

/// A request that is inside, without borrowing: to be given back with
/// [`Epochs::leave`], or nothing that is freed is ever used again.
#[must_use]
#[derive(Debug)]
pub struct Stay {
    /// Small, as requests carry it along.
    copy: u16,
    odd: u16,
}

/// Somebody who waits for others to leave.
struct Waiting<'a>(&'a Epochs);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

impl Epochs {
    /// Enters.
    #[inline]
    pub fn enter(&self) -> Inside<'_> {
        let counters = self.inside.at(here());
        let odd = self.enter_by(counters);
        Inside { epochs: self, counter: &counters[odd] }
    }

    /// Enters, until [`leave`](Epochs::leave), which any thread may call.
    #[inline]
    pub fn stay(&self) -> Stay {
        let here = here();
        // There are a few copies, of two counters each.
        Stay { copy: here.index() as u16, odd: self.enter_by(self.inside.at(here)) as u16 }
    }

    /// Leaves.
    #[inline]
    pub fn leave(&self, stay: Stay) {
        self.leave_by(&self.inside.copy(stay.copy.into())[usize::from(stay.odd)]);
    }

    /// Enters by a thread's counters; which of them it was.
    #[inline]
    fn enter_by(&self, counters: &[AtomicU64; 2]) -> usize {
        loop {
            let epoch = self.current.load(SeqCst);
            let odd = (epoch & 1) as usize;
            counters[odd].fetch_add(1, SeqCst);
            in_this_order();
            if self.current.load(SeqCst) == epoch {
                return odd;
            }
            // The epoch moved on before we were counted in it.
            counters[odd].fetch_sub(1, SeqCst);
        }
    }

    #[inline]
    fn leave_by(&self, counter: &AtomicU64) {
        counter.fetch_sub(1, SeqCst);
        in_this_order();
        if self.waiting.load(SeqCst) != 0 {
            self.left.wake_all();
        }
    }

    /// The current epoch: the stamp for what has been freed.
    pub fn now(&self) -> u64 {
        // Whoever enters when the epoch has moved on sees that it is not mapped.
        fence(SeqCst);
        self.current.load(SeqCst)
    }

    /// Whether everybody has left who could know what was freed at `stamp`.
    pub fn has_passed(&self, stamp: u64) -> bool {
        self.now() >= stamp.saturating_add(2) || mutant!(LimboIgnoresReaders)
    }

    /// Waits until everybody has left who is inside now. Not to be called from
    /// inside.
    pub async fn all_left(&self) {
        let stamp = self.now();
        self.waiting.fetch_add(1, SeqCst);
        in_this_order();
        let _waiting = Waiting(self);
        let passed = || {
            self.advance();
            self.has_passed(stamp).then_some(())
        };
        self.left.until(passed).await;
    }

    /// Moves on as far as the requests inside allow; two steps release all that
    /// has been stamped so far.
    pub fn advance(&self) {
        for _ in 0..2 {
            in_this_order();
            let epoch = self.current.load(SeqCst);
            let previous = ((epoch + 1) & 1) as usize;
            if self.inside.iter().any(|counters| counters[previous].load(SeqCst) != 0) {
                return;
            }
            // Losing the race means that somebody else moved on.
            let _ = self.current.compare_exchange(epoch, epoch + 1, SeqCst, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::wait::block_on;

    #[test]
    fn nothing_passes_while_somebody_is_inside() {
        let epochs = Epochs::default();
        let guard = epochs.enter();
        let stamp = epochs.now();
        for _ in 0..5 {
            epochs.advance();
        }
        assert!(!epochs.has_passed(stamp));
        drop(guard);
        epochs.advance();
        assert!(epochs.has_passed(stamp));
    }

    #[test]
    fn nothing_passes_while_somebody_stays_whoever_ends_that() {
        let epochs = Epochs::default();
        let stay = epochs.stay();
        let stamp = epochs.now();
        (0..5).for_each(|_| epochs.advance());
        assert!(!epochs.has_passed(stamp));
        std::thread::scope(|scope| scope.spawn(|| epochs.leave(stay)).join()).unwrap();
        epochs.advance();
        assert!(epochs.has_passed(stamp));
    }

    #[test]
    fn later_entries_do_not_hold_up_what_was_freed_before() {
        let epochs = Epochs::default();
        let early = epochs.enter();
        let stamp = epochs.now();
        epochs.advance();
        let _late = epochs.enter();
        drop(early);
        epochs.advance();
        assert!(epochs.has_passed(stamp));
    }

    #[test]
    fn freed_values_are_never_seen_after_they_passed() {
        // Each "free" replaces the shared value and poisons the old one when it
        // has passed; a reader that meets poison has been failed.
        let epochs = Epochs::default();
        let slots: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(1)).collect();
        let live = AtomicU64::new(0);
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while done.load(SeqCst) == 0 {
                        let _inside = epochs.enter();
                        let slot = live.load(SeqCst) as usize;
                        std::thread::yield_now();
                        assert_eq!(slots[slot].load(SeqCst), 1);
                    }
                });
            }
            for round in 0..2000usize {
                let old = live.load(SeqCst) as usize;
                let new = (round + 1) % slots.len();
                slots[new].store(1, SeqCst);
                live.store(new as u64, SeqCst);
                let stamp = epochs.now();
                while !epochs.has_passed(stamp) {
                    epochs.advance();
                }
                slots[old].store(0, SeqCst);
            }
            done.store(1, SeqCst);
        });
    }

    #[test]
    fn waiting_for_others_to_leave_ends_when_they_have() {
        let epochs = Epochs::default();
        let left = AtomicU64::new(0);
        for _ in 0..200 {
            let inside = epochs.enter();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    block_on(epochs.all_left());
                    assert_eq!(left.swap(0, SeqCst), 1, "somebody is inside");
                });
                std::thread::yield_now();
                left.store(1, SeqCst);
                drop(inside);
            });
            assert_eq!(epochs.waiting.load(SeqCst), 0);
        }
    }
}
