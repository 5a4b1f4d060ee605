//! Values that threads write often and read rarely, one copy for each group of
//! threads, so that two threads on two cores do not fight for a cache line.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Number of copies; threads beyond it share.
const SHARDS: usize = 16;

/// A value on cache lines of its own (two: processors fetch them in pairs).
#[repr(align(128))]
#[derive(Default, Debug)]
struct Padded<T>(T);

/// One `T` for each group of threads.
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
    pub fn local(&self) -> &T {
        &self.0[index()].0
    }

    /// A copy by index (see [`index`]); the index wraps.
    pub fn at(&self, index: usize) -> &T {
        &self.0[index % SHARDS].0
    }

    /// All copies.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &padded.0)
    }
}

/// The index of the calling thread's copy.
pub fn index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static INDEX: Cell<usize> = const { Cell::new(usize::MAX) });
    // A thread that is being torn down has no local storage any more: any copy
    // will do.
    INDEX
        .try_with(|cell| {
            let mut index = cell.get();
            if index == usize::MAX {
                index = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
                cell.set(index);
            }
            index
        })
        .unwrap_or(0)
}
