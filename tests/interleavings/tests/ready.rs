//! A request that can go on is seen by the driver, or rings the bell.

use std::task::Wake;

use interleavings::queue::ready::{Bell, Ready, SlotWaker};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU32, Ordering::SeqCst};
use loom::thread;

/// Counts how often it was rung and not yet heard.
struct Counting(AtomicU32);

impl Bell for Counting {
    fn ring(&self) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// The ring, which takes a stroke of the bell whenever it likes.
fn hear(ready: &Ready<Counting>) -> bool {
    ready.bell().0.swap(0, SeqCst) > 0
}

/// Drives once; returns the slots that were carried on.
fn drive(ready: &Ready<Counting>, wakers: &[std::sync::Arc<SlotWaker<Counting>>]) -> Vec<usize> {
    let mut seen = Vec::new();
    ready.begin();
    // Completions are taken, the bell's among them.
    hear(ready);
    loop {
        while let Some(slot) = ready.pop() {
            wakers[slot].unlist();
            seen.push(slot);
        }
        if ready.end() {
            return seen;
        }
    }
}

#[test]
fn who_is_woken_is_carried_on_or_the_bell_is_rung() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let ready = std::sync::Arc::new(Ready::new(2, Counting(AtomicU32::new(0))));
        let wakers: Vec<_> = (0..2).map(|slot| SlotWaker::new(ready.clone(), slot)).collect();
        let threads: Vec<_> = wakers
            .iter()
            .map(|waker| {
                let waker = waker.clone();
                thread::spawn(move || waker.wake())
            })
            .collect();
        let mut seen = drive(&ready, &wakers);
        // Blocked from here on: only the bell makes it drive again.
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        while seen.len() < 2 {
            assert!(hear(&ready), "slots {seen:?} only, and the bell is silent");
            seen.extend(drive(&ready, &wakers));
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1]);
        assert!(ready.is_empty());
    });
}

/// A bell that was heard too early, by a driver that had no wait to end, is rung anew
/// for what comes later.
#[test]
fn a_wake_up_ends_the_next_wait_and_hides_no_later_one() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let ready = std::sync::Arc::new(Ready::new(1, Counting(AtomicU32::new(0))));
        let wakers = [SlotWaker::new(ready.clone(), 0)];
        let other = thread::spawn({
            let (ready, waker) = (ready.clone(), wakers[0].clone());
            move || {
                ready.wake_up();
                waker.wake();
            }
        });
        // A reap, which hears the bell if it was rung.
        let mut seen = drive(&ready, &wakers);
        let woken = ready.take_wakeup();
        other.join().unwrap();
        if seen.is_empty() {
            assert!(hear(&ready), "the request is never carried on");
            seen = drive(&ready, &wakers);
        }
        assert_eq!(seen, [0]);
        assert!(woken || ready.take_wakeup());
    });
}

/// What changed before a waker was called is seen by the poll that it causes.
#[test]
fn a_wake_up_during_a_poll_causes_another_one() {
    loom::model(|| {
        let ready = std::sync::Arc::new(Ready::new(1, Counting(AtomicU32::new(0))));
        let waker = SlotWaker::new(ready.clone(), 0);
        let value = std::sync::Arc::new(Mutex::new(0));
        waker.wake_by_ref();
        let other = thread::spawn({
            let (waker, value) = (waker.clone(), value.clone());
            move || {
                *value.lock().unwrap() = 1;
                waker.wake();
            }
        });
        let mut last = 0;
        let mut turn = || {
            ready.begin();
            loop {
                while ready.pop().is_some() {
                    waker.unlist();
                    last = *value.lock().unwrap();
                }
                if ready.end() {
                    break;
                }
            }
        };
        turn();
        other.join().unwrap();
        turn();
        assert_eq!(last, 1);
    });
}
