//! What has been freed is not used again while somebody may still look at it.

use interleavings::alloc::epoch::Epochs;
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

/// Two clusters, one of which is mapped.
struct Disk {
    epochs: Epochs,
    mapped: AtomicUsize,
    clusters: [UnsafeCell<u32>; 2],
}

// SAFETY: `epochs` says who may touch a cluster; the model checker sees if it is
// wrong.
unsafe impl Sync for Disk {}

impl Disk {
    fn new() -> Arc<Disk> {
        let clusters = [UnsafeCell::new(1), UnsafeCell::new(1)];
        Arc::new(Disk { epochs: Epochs::default(), mapped: AtomicUsize::new(0), clusters })
    }

    fn read(&self) {
        let _inside = self.epochs.enter();
        let cluster = &self.clusters[self.mapped.load(Ordering::Acquire)];
        // SAFETY: mapped when we were inside already.
        assert_eq!(cluster.with(|cluster| unsafe { *cluster }), 1);
    }

    /// Maps the other cluster; returns the stamp of the one that this frees.
    fn remap(&self) -> u64 {
        self.mapped.store(1, Ordering::Release);
        self.epochs.now()
    }

    fn reuse(&self) {
        // SAFETY: freed, and everybody has left.
        self.clusters[0].with_mut(|cluster| unsafe { *cluster = 2 });
    }
}

#[test]
fn what_has_passed_is_seen_by_nobody() {
    loom::model(|| {
        let disk = Disk::new();
        let reader = thread::spawn({
            let disk = disk.clone();
            move || {
                disk.read();
                disk.read();
            }
        });
        let stamp = disk.remap();
        disk.epochs.advance();
        if disk.epochs.has_passed(stamp) {
            disk.reuse();
        }
        reader.join().unwrap();
        disk.epochs.advance();
        assert!(disk.epochs.has_passed(stamp), "everybody has left");
    });
}

#[test]
fn it_is_so_if_another_one_moves_on() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(5);
    model.check(|| {
        let disk = Disk::new();
        let spawn = |work: fn(&Disk)| {
            let disk = disk.clone();
            thread::spawn(move || work(&disk))
        };
        // So far that who enters may have asked for the epoch one round ago.
        let mover = |disk: &Disk| (0..2).for_each(|_| disk.epochs.advance());
        let others = [spawn(Disk::read), spawn(mover)];
        let stamp = disk.remap();
        if disk.epochs.has_passed(stamp) {
            disk.reuse();
        }
        for other in others {
            other.join().unwrap();
        }
    });
}

#[test]
fn who_waits_for_others_to_leave_is_woken() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let disk = Disk::new();
        let reader = thread::spawn({
            let disk = disk.clone();
            move || disk.read()
        });
        disk.remap();
        // A wake-up that got lost would be a deadlock.
        block_on(disk.epochs.all_left());
        disk.reuse();
        reader.join().unwrap();
    });
}
