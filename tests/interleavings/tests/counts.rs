//! Nothing is lost when threads count, each in its own copy or in the shared one, and
//! give their copies back for others to go on from.

use interleavings::owner::Owners;
use interleavings::shard::{Count, Sharded};
use loom::sync::Arc;
use loom::sync::atomic::AtomicU32;
use loom::thread;

struct Counting {
    owners: Owners,
    counts: Sharded<Count>,
}

#[test]
fn nothing_is_lost() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let owners = Owners(AtomicU32::new(0));
        let counting = Arc::new(Counting { owners, counts: Sharded::default() });
        let count = |counting: Arc<Counting>| {
            move || {
                let here = counting.owners.take();
                counting.counts.at(here).add(here, 1);
                counting.counts.at(here).add(here, 2);
                counting.owners.give_back(here);
            }
        };
        let others =
            [thread::spawn(count(counting.clone())), thread::spawn(count(counting.clone()))];
        count(counting.clone())();
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(counting.counts.iter().map(Count::get).sum::<u64>(), 9);
    });
}
