//! No wake-up is lost.

use interleavings::io::wait::{AsyncMutex, WaitList, block_on};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

#[test]
fn who_waits_for_a_change_sees_it() {
    loom::model(|| {
        let shared = Arc::new((WaitList::new(), AtomicBool::new(false)));
        let changer = thread::spawn({
            let shared = shared.clone();
            move || {
                // Waking itself orders this before the look at the list.
                shared.1.store(true, Ordering::Relaxed);
                shared.0.wake_all();
            }
        });
        block_on(shared.0.until(|| shared.1.load(Ordering::Relaxed).then_some(())));
        changer.join().unwrap();
    });
}

#[test]
fn a_turn_comes_to_everybody() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let mutex = Arc::new(AsyncMutex::new(0));
        let work = |mutex: Arc<AsyncMutex<u32>>| move || *block_on(mutex.lock()) += 1;
        let others = [thread::spawn(work(mutex.clone())), thread::spawn(work(mutex.clone()))];
        work(mutex.clone())();
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(*mutex.try_lock().unwrap(), 3);
    });
}
