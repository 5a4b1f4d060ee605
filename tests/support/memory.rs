//! How much memory a piece of code takes, at most, and what it does when there is
//! none: an allocator that counts, and refuses, by thread. The library starts none, so
//! what it takes is taken by the caller's.
#![allow(dead_code)] // Each test uses its part.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static HELD: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
    static REFUSAL: Cell<Refusal> = const { Cell::new(Refusal { least: usize::MAX, left: 0 }) };
}

/// Of the allocations of so many bytes at least, the one after `left` others fails.
#[derive(Clone, Copy)]
struct Refusal {
    least: usize,
    left: u64,
}

/// Whether this one is to fail.
fn refused(bytes: usize) -> bool {
    REFUSAL.try_with(|refusal| {
        let Refusal { least, left } = refusal.get();
        if bytes < least {
            return false;
        }
        let next = if left == 0 { usize::MAX } else { least };
        refusal.set(Refusal { least: next, left: left.wrapping_sub(1) });
        left == 0
    }) == Ok(true)
}

fn count(bytes: i64) {
    // A thread that is ending is of no interest.
    let held = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        held.get()
    });
    if let Ok(held) = held {
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held)));
    }
}

struct Counting;

// SAFETY: everything is passed on to the system's allocator; counting allocates
// nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if refused(layout.size()) {
            return std::ptr::null_mut();
        }
        count(layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if refused(layout.size()) {
            return std::ptr::null_mut();
        }
        count(layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if refused(size) {
            return std::ptr::null_mut();
        }
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `work`; how many bytes more than before it held at most, on this thread.
pub fn peak<R>(work: impl FnOnce() -> R) -> (R, u64) {
    let before = HELD.get();
    PEAK.set(before);
    let result = work();
    (result, (PEAK.get() - before) as u64)
}

/// Runs `work`; of the allocations of at least `least` bytes that it makes on this
/// thread, number `index` fails. Whether there were that many.
pub fn refuse<R>(least: usize, index: u64, work: impl FnOnce() -> R) -> (R, bool) {
    REFUSAL.set(Refusal { least, left: index });
    let result = work();
    let met = REFUSAL.get().least == usize::MAX;
    REFUSAL.set(Refusal { least: usize::MAX, left: 0 });
    (result, met)
}

#[test]
fn what_is_refused_is_the_one_asked_for() {
    let take = || [1000, 5000, 100, 7000].map(|bytes| Vec::<u8>::new().try_reserve(bytes).is_ok());
    assert_eq!(refuse(4096, 0, take), ([true, false, true, true], true));
    assert_eq!(refuse(4096, 1, take), ([true, true, true, false], true));
    assert_eq!(refuse(4096, 2, take), ([true; 4], false));
}

#[test]
fn what_is_taken_is_counted() {
    let (kept, bytes) = peak(|| {
        drop(vec![0u8; 3 << 20]);
        vec![1u8; 1 << 20]
    });
    assert!((3 << 20..4 << 20).contains(&bytes), "{bytes}");
    let (_, bytes) = peak(|| drop(kept));
    assert!(bytes < 4096, "{bytes}");
}
