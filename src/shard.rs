//! Values that threads write often and read rarely, one copy for each thread, so
//! that two threads on two cores do not fight for a cache line.
//!
//! There are few copies, and each of them but the last belongs to one thread at a
//! time; all threads beyond share the last one. A thread that ends gives its copy
//! to the next one that comes.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Number of copies.
const SHARDS: usize = 16;
/// The copy that threads share.
const SHARED: usize = SHARDS - 1;

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
        Sharded((0..SHARDS).map(|_| Padded(make())).collect())
    }

    /// The copy of the calling thread.
    #[inline]
    pub fn at(&self, here: Here) -> &T {
        &self.0[here.index].0
    }

    /// All copies.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &padded.0)
    }
}

/// Which copies are the calling thread's. Stays on its thread.
#[derive(Clone, Copy)]
pub struct Here {
    index: usize,
    thread: PhantomData<*const ()>,
}

/// A number that only rises, in a [`Sharded`] value. Adding to the copy of one's
/// own takes no locked instruction.
#[derive(Default, Debug)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to the copy that `at(here)` is in.
    #[inline]
    pub fn add(&self, here: Here, amount: u64) {
        if here.index == SHARED {
            self.0.fetch_add(amount, Ordering::Relaxed);
        } else {
            // Nobody else writes to it.
            self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
        }
    }

    /// The number in this copy.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Asks which copies are the calling thread's.
#[inline]
pub fn here() -> Here {
    let index = INDEX.try_with(Cell::get).unwrap_or(SHARED);
    let index = if index < SHARDS { index } else { first_time() };
    Here { index, thread: PhantomData }
}

/// Bit by bit, the copies that belong to a thread.
static TAKEN: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// The index of this thread's copies; `usize::MAX`: it has not asked yet.
    static INDEX: Cell<usize> = const { Cell::new(usize::MAX) };
    /// Gives the copies back when the thread ends.
    static OWNED: Owned = const { Owned(Cell::new(SHARED)) };
}

struct Owned(Cell<usize>);

impl Drop for Owned {
    fn drop(&mut self) {
        let index = self.0.get();
        if index != SHARED {
            // What the thread still does while it is torn down it does as one of
            // those that share.
            let _ = INDEX.try_with(|cell| cell.set(SHARED));
            TAKEN.fetch_and(!(1 << index), Ordering::Release);
        }
    }
}

#[cold]
fn first_time() -> usize {
    let index = OWNED.try_with(|owned| {
        let index = take();
        owned.0.set(index);
        index
    });
    // A thread that is being torn down owns nothing any more.
    let index = index.unwrap_or(SHARED);
    let _ = INDEX.try_with(|cell| cell.set(index));
    index
}

/// Takes a copy that belongs to nobody, or `SHARED`.
fn take() -> usize {
    let mut taken = TAKEN.load(Ordering::Relaxed);
    loop {
        let free = taken.trailing_ones() as usize;
        if free >= SHARED {
            return SHARED;
        }
        // Acquire: what its last owner counted is seen, and added to.
        let new = taken | 1 << free;
        match TAKEN.compare_exchange(taken, new, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => return free,
            Err(now) => taken = now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_however_many_threads_count() {
        // More threads than copies, at once and one after the other.
        let counts: Sharded<Count> = Sharded::default();
        for _ in 0..4 {
            std::thread::scope(|scope| {
                for _ in 0..2 * SHARDS {
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
        assert_eq!(total, 4 * 2 * SHARDS as u64 * 1000 * 3);
    }

    #[test]
    fn a_copy_belongs_to_one_thread_at_a_time() {
        let owners: Sharded<AtomicU64> = Sharded::default();
        for _ in 0..20 {
            std::thread::scope(|scope| {
                for _ in 0..2 * SHARDS {
                    scope.spawn(|| {
                        let here = here();
                        let others = owners.at(here).fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        assert!(here.index == SHARED || others == 0, "copy {}", here.index);
                        owners.at(here).fetch_sub(1, Ordering::SeqCst);
                    });
                }
            });
        }
    }
}
