//! Tests of the slice cache.

use super::*;

fn key(n: u64) -> HostOffset {
    HostOffset::new(n * 4096).unwrap()
}

fn load(cache: &SliceCache, n: u64) -> Loaded {
    let ticket = cache.begin_load(key(n));
    cache.finish_load(key(n), ticket, &[n as u8; 4096]).unwrap()
}

fn first(cache: &SliceCache, n: u64) -> Option<u64> {
    cache.read(key(n), |words| words[0].load(Ordering::Relaxed) & 0xff)
}

#[test]
fn what_is_loaded_is_found() {
    let cache = SliceCache::new(4096, 1 << 20).unwrap();
    assert_eq!(first(&cache, 7), None);
    assert_eq!(load(&cache, 7), Loaded::Done);
    assert_eq!(first(&cache, 7), Some(7));
}

#[test]
fn dirty_slices_stay_until_written() {
    let cache = SliceCache::new(4096, 2 * 4096).unwrap();
    for n in [1, 2] {
        assert_eq!(load(&cache, n), Loaded::Done);
        cache.update(key(n), |slice| slice.set(0, 99)).unwrap();
    }
    assert_eq!(load(&cache, 3), Loaded::Full);
    let mut copies = cache.take_dirty().unwrap();
    assert_eq!(copies.slices.len(), 2);
    assert_eq!(load(&cache, 3), Loaded::Full, "being written is not clean yet");
    copies.mark_written();
    assert_eq!(load(&cache, 3), Loaded::Done);
    assert_eq!(first(&cache, 1), None);
    drop(copies);
    assert_eq!(cache.take_dirty().unwrap().slices.len(), 1);
}

#[test]
fn a_load_that_began_before_a_write_back_is_stale() {
    let cache = SliceCache::new(4096, 2 * 4096).unwrap();
    let late = cache.begin_load(key(1));
    load(&cache, 1);
    cache.update(key(1), |slice| slice.set(0, 42)).unwrap();
    cache.take_dirty().unwrap().mark_written();
    cache.forget(key(1), 4096);
    assert_eq!(cache.finish_load(key(1), late, &[0; 4096]).unwrap(), Loaded::Stale);
    assert_eq!(load(&cache, 1), Loaded::Done);
}

#[test]
fn trimming_takes_what_is_clean_and_was_not_used() {
    let cache = SliceCache::new(4096, 64 * 4096).unwrap();
    let empty = cache.bytes();
    (1..=20).for_each(|n| assert_eq!(load(&cache, n), Loaded::Done));
    cache.update(key(1), |slice| slice.set(0, 99)).unwrap();
    cache.update(key(2), |slice| slice.set(0, 98)).unwrap();
    let copies = cache.take_dirty().unwrap();
    cache.update(key(1), |slice| slice.set(0, 97)).unwrap();
    assert_eq!(cache.bytes(), empty + 20 * 4096);
    assert_eq!(cache.trim(), 0, "all have been used just now");
    assert_eq!(first(&cache, 7), Some(7));
    assert_eq!(cache.trim(), 17 * 4096);
    assert_eq!(cache.bytes(), empty + 3 * 4096);
    let found: Vec<u64> = (1..=20).filter(|n| first(&cache, *n).is_some()).collect();
    assert_eq!(found, [1, 2, 7], "dirty, being written, used");
    drop(copies);
    (1..=20).for_each(|n| assert_eq!(load(&cache, n), Loaded::Done));
    (3..=20).for_each(|n| assert_eq!(first(&cache, n), Some(n)));
    cache.take_dirty().unwrap();
    cache.forget(key(1), 20 * 4096);
    assert_eq!(cache.trim(), 20 * 4096, "what is forgotten holds no memory");
    assert_eq!(cache.bytes(), empty);
}

#[test]
fn slices_smaller_than_a_page_go_page_by_page() {
    let key = |n: u64| HostOffset::new(n * 512).unwrap();
    let cache = SliceCache::new(512, 256 * 512).unwrap();
    let empty = cache.bytes();
    let load = |n: u64| {
        let ticket = cache.begin_load(key(n));
        cache.finish_load(key(n), ticket, &[n as u8; 512]).unwrap()
    };
    (1..=1000).for_each(|n| assert_eq!(load(n), Loaded::Done));
    assert_eq!(cache.bytes(), empty + 256 * 512);
    cache.trim();
    let given = cache.trim();
    assert!(given > 0 && given <= 256 * 512);
    assert_eq!(cache.bytes(), empty + 256 * 512 - given);
    (1..=100).for_each(|n| assert_eq!(load(n), Loaded::Done));
}

#[test]
fn nobody_sees_what_is_given_back() {
    let cache = SliceCache::new(4096, 2 * 4096).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                load(&cache, 1);
                for _ in 0..10 {
                    assert!(matches!(first(&cache, 1), None | Some(1)));
                }
            }
        });
        (0..2000).for_each(|_| _ = cache.trim());
        done.store(true, Ordering::Relaxed);
    });
    cache.trim();
    cache.trim();
    assert_eq!(first(&cache, 1), None);
}

#[test]
fn unchanged_words_do_not_make_dirty() {
    let cache = SliceCache::new(4096, 1 << 16).unwrap();
    load(&cache, 1);
    let word = cache.update(key(1), |slice| slice.get(5)).unwrap();
    cache.update(key(1), |slice| slice.set(5, word)).unwrap();
    assert!(!cache.has_dirty());
}

#[test]
fn readers_never_see_half_of_a_change() {
    let cache = SliceCache::new(4096, 2 * 4096).unwrap();
    load(&cache, 1);
    cache.update(key(1), |slice| (0..2).for_each(|i| slice.set(i, 0))).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..20_000u64 {
                cache.update(key(1), |slice| (0..2).for_each(|i| slice.set(i, n))).unwrap();
            }
        });
        scope.spawn(|| {
            let pair = || {
                cache.read(key(1), |words| {
                    (words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed))
                })
            };
            while let Some((a, b)) = pair() {
                assert_eq!(a, b);
                if a == 19_999 {
                    break;
                }
            }
        });
    });
}

#[test]
fn a_cache_that_covers_the_tables_twice_hardly_evicts() {
    let slices = 512;
    let cache = SliceCache::new(4096, 2 * slices * 4096).unwrap();
    // Tables of 16 slices, far apart by various strides.
    for stride in [16, 16 * 8193, 16 * 4096, 16 * 1001] {
        for table in 0..slices / 16 {
            for slice in 0..16 {
                load(&cache, 16 + table * stride + slice);
            }
        }
        cache.forget(key(1), 0);
    }
    let resident =
        (0..slices / 16).filter(|table| first(&cache, 16 + table * 16 * 1001).is_some()).count();
    assert!(resident as u64 >= slices / 16 * 9 / 10, "{resident}");
}
