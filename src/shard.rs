//! Values that threads write often and read rarely, one copy for each thread, so
//! that two threads on two cores do not fight for a cache line.
//!
//! There are few copies, and each of them but the last belongs to one thread at a
//! time; all threads beyond share the last one. Which thread owns which is the
//! subject of `owner`.

use crate::owner::{Here, OWNERS};
use crate::sync::atomic::{AtomicU64, Ordering};

/// A value on cache lines of its own (two: processors fetch them in pairs).
#[repr(align(128))]
#[derive(Default, Debug)]
struct Padded<T>(T);

/// One `T` for each thread, as long as they are few.
#[derive(Debug)]
pub struct Sharded<T>(Box<[Padded<T>]>);

impl<T: Default> Default for Sharded<T> {
    fn default() -> Self {
        Sharded::new(T::default)
    }
}

impl<T> Sharded<T> {
    /// Makes each copy with `make`.
    pub fn new(mut make: impl FnMut() -> T) -> Sharded<T> {
        Sharded((0..=OWNERS).map(|_| Padded(make())).collect())
    }

    /// The copy of the calling thread.
    #[inline]
    pub fn at(&self, here: Here) -> &T {
        &self.0[here.index()].0
    }

    /// The copy of the thread whose `Here::index` this is.
    #[inline]
    pub fn copy(&self, index: usize) -> &T {
        &self.0[index].0
    }

    /// All copies.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &padded.0)
    }
}

/// A number that only rises, in a [`Sharded`] value. Adding to the copy of one's
/// own takes no locked instruction.
#[derive(Default, Debug)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to the copy that `at(here)` is in; returns what that is then.
    #[inline]
    pub fn add(&self, here: Here, amount: u64) -> u64 {
        if here.owned() {
            // Nobody else writes to it.
            let sum = self.0.load(Ordering::Relaxed).wrapping_add(amount);
            self.0.store(sum, Ordering::Relaxed);
            sum
        } else {
            self.0.fetch_add(amount, Ordering::Relaxed).wrapping_add(amount)
        }
    }

    /// The number in this copy.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::here::here;

    #[test]
    fn nothing_is_lost_however_many_threads_count() {
        // More threads than copies, at once and one after the other.
        let counts: Sharded<Count> = Sharded::default();
        for _ in 0..4 {
            std::thread::scope(|scope| {
                for _ in 0..2 * OWNERS {
                    scope.spawn(|| {
                        for _ in 0..1000 {
                            let here = here();
                            counts.at(here).add(here, 3);
                        }
                    });
                }
            });
        }
        let total: u64 = counts.iter().map(Count::get).sum();
        assert_eq!(total, 4 * 2 * OWNERS as u64 * 1000 * 3);
    }
}
