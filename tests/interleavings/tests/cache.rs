//! Readers of the slice cache, who take no lock, see each slice whole and as itself.

use interleavings::geometry::HostOffset;
use interleavings::metadata::cache::{Loaded, SliceCache};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

/// An entry of two words.
const SLICE: usize = 16;

fn key(n: u64) -> HostOffset {
    HostOffset::new(n * SLICE as u64).unwrap()
}

/// Slice `n` holds two words `n`.
fn load(cache: &SliceCache, n: u64) -> Loaded {
    let ticket = cache.begin_load(key(n));
    let word = n.to_be_bytes();
    cache.finish_load(key(n), ticket, &[word, word].concat()).unwrap()
}

fn read(cache: &SliceCache, n: u64) -> Option<(u64, u64)> {
    let word = |words: &[AtomicU64], i: usize| words[i].load(Ordering::Relaxed);
    cache.read(key(n), |words| (word(words, 0), word(words, 1)))
}

/// One set of two slots.
fn cache() -> Arc<SliceCache> {
    let cache = SliceCache::new(SLICE, 2 * SLICE as u64).unwrap();
    assert!(load(&cache, 1) == Loaded::Done && load(&cache, 2) == Loaded::Done);
    Arc::new(cache)
}

fn check(bound: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    builder.check(model);
}

#[test]
fn a_change_is_seen_whole() {
    check(3, || {
        let cache = cache();
        let writer = thread::spawn({
            let cache = cache.clone();
            move || {
                cache.update(key(1), |slice| (0..2).for_each(|i| slice.set(i, 7))).unwrap();
            }
        });
        let seen = read(&cache, 1).unwrap();
        assert!(seen == (1, 1) || seen == (7, 7), "{seen:?}");
        writer.join().unwrap();
        assert_eq!(read(&cache, 1), Some((7, 7)));
    });
}

#[test]
fn a_slot_that_is_given_to_another_slice_is_not_mistaken() {
    check(3, || {
        let cache = cache();
        let loader = thread::spawn({
            let cache = cache.clone();
            move || {
                // A reader may keep both slots in use.
                let loaded = load(&cache, 3);
                assert!(loaded == Loaded::Done || loaded == Loaded::Full);
            }
        });
        for n in [1, 2, 3] {
            let seen = read(&cache, n);
            assert!(seen.is_none_or(|words| words == (n, n)), "slice {n}: {seen:?}");
        }
        loader.join().unwrap();
    });
}

#[test]
fn what_is_forgotten_and_loaded_again_is_not_mixed_up() {
    check(3, || {
        let cache = cache();
        let other = thread::spawn({
            let cache = cache.clone();
            move || {
                cache.forget(key(1), SLICE as u64);
                assert!(load(&cache, 4) == Loaded::Done);
            }
        });
        for n in [1, 4] {
            let seen = read(&cache, n);
            assert!(seen.is_none_or(|words| words == (n, n)), "slice {n}: {seen:?}");
        }
        other.join().unwrap();
    });
}

#[test]
fn a_change_during_a_write_back_is_written_later() {
    check(3, || {
        let cache = cache();
        cache.update(key(1), |slice| slice.set(0, 5)).unwrap();
        let writer = thread::spawn({
            let cache = cache.clone();
            move || cache.update(key(1), |slice| slice.set(0, 6)).unwrap()
        });
        let mut on_disk = 0;
        let mut copies = cache.take_dirty().unwrap();
        while let Some(copy) = copies.next() {
            on_disk = u64::from_be_bytes(copy.bytes[..8].try_into().unwrap());
            copies.mark_written();
        }
        drop(copies);
        writer.join().unwrap();
        assert!(on_disk == 6 || cache.has_dirty(), "{on_disk}");
    });
}

#[test]
fn memory_that_is_given_back_is_not_taken_for_a_slice() {
    check(2, || {
        let cache = cache();
        // Neither has been used since.
        cache.trim();
        let trimmer = thread::spawn({
            let cache = cache.clone();
            move || {
                cache.trim();
                assert!(load(&cache, 3) == Loaded::Done);
            }
        });
        for n in [1, 3] {
            let seen = read(&cache, n);
            assert!(seen.is_none_or(|words| words == (n, n)), "slice {n}: {seen:?}");
        }
        trimmer.join().unwrap();
    });
}
