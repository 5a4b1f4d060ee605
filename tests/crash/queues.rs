//! Many requests at once on few clusters: up to 32 in flight, from up to four
//! queues, where the cache holds two slices and every cluster lies in another one
//! than the last.
//!
//! `QCOW2RS_SEED=n` runs one seed; `QCOW2RS_ROUNDS=n` runs n times as many.

use std::cell::Cell;
use std::ops::Range;

use qcow2rs::io::sim::{Rng, Task};

use super::random::{SMALL, config};
use super::scenario::Config;
use super::schedules::scene::{Before, Scene};
use super::support::builder::Kind;
use super::support::for_seeds;

/// Bytes of a slice: as few as there may be.
const SLICE: u64 = 512;

/// A disk of several slices, but for clusters that would make it too large.
fn kind(cluster: u64, extended_l2: bool, refcount_bits: u64) -> Kind {
    let mut kind = Kind { cluster, extended_l2, refcount_bits, ..SMALL };
    let slice = SLICE / kind.l2_entry() * cluster;
    kind.size = (3 * slice + 5 * cluster).min((16 << 20).max(4 * cluster));
    kind
}

fn kinds() -> Vec<Kind> {
    let small = kind(512, false, 16);
    let extended = kind(16384, true, 16);
    vec![
        small,
        Kind { backing: true, ..small },
        Kind { snapshot: true, ..kind(512, false, 2) },
        Kind { backing: true, ..kind(512, false, 1) },
        Kind { version: 2, ..small },
        Kind { version: 2, snapshot: true, ..small },
        kind(4096, false, 64),
        Kind { backing: true, ..kind(4096, false, 1) },
        kind(65536, false, 16),
        kind(2 << 20, false, 16),
        extended,
        Kind { backing: true, ..extended },
        Kind { snapshot: true, ..extended },
        Kind { backing: true, ..kind(65536, true, 64) },
        kind(131_072, true, 2),
    ]
}

/// What most requests are.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// A bit of everything.
    Mixed,
    /// Writes and discards, large and small, of the same clusters.
    GiveAndTake,
    /// Parts are rewritten that are being read.
    Rewrite,
    /// Everything is to be durable at once.
    Durable,
}

const MANNERS: [Manner; 4] = [Manner::Mixed, Manner::GiveAndTake, Manner::Rewrite, Manner::Durable];

/// The clusters that all is about: eight, two of each slice if there are as many.
fn hot_spot(kind: &Kind) -> Vec<u64> {
    let per_slice = SLICE / kind.l2_entry();
    let whole = kind.size / kind.cluster;
    let slices = kind.clusters().div_ceil(per_slice);
    let mut hot: Vec<u64> = (0..8 / slices.min(4) + 1)
        .flat_map(|n| (0..slices.min(4)).map(move |slice| slice * per_slice + n))
        .filter(|cluster| *cluster < whole)
        .collect();
    hot.truncate(8);
    hot
}

/// One place in a queue: the requests that follow upon one another there.
struct Place<'a> {
    scene: &'a Scene,
    hot: &'a [u64],
    manner: Manner,
    rng: Rng,
}

impl Place<'_> {
    /// A part of a hot cluster, all of it, or a bit more.
    fn range(&mut self) -> Range<u64> {
        let kind = self.scene.config().kind;
        let cluster = self.scene.cluster(*self.rng.pick(self.hot));
        let len = cluster.end - cluster.start;
        let sub = (len / kind.subclusters()).max(1);
        let anywhere = self.rng.below(len);
        let start = cluster.start + *self.rng.pick(&[0, sub % len, anywhere]);
        let len = *self.rng.pick(&[1, sub, len, len + 1, 2 * sub + 1]);
        start..(start + len.min(2048)).min(self.scene.sectors())
    }

    async fn request(&mut self) -> qcow2rs::Result<()> {
        let (scene, range, rng) = (self.scene, self.range(), &mut self.rng);
        let what = match self.manner {
            Manner::Mixed => rng.below(8),
            Manner::GiveAndTake => *rng.pick(&[0, 0, 2, 2, 2, 3, 5, 6]),
            Manner::Rewrite => *rng.pick(&[0, 0, 0, 5, 5, 5, 5, 6]),
            Manner::Durable => *rng.pick(&[1, 1, 1, 2, 4, 5, 6, 6]),
        };
        match what {
            0 => scene.write(range).await,
            1 => scene.write_fua(range, true).await,
            2 => scene.discard(range).await,
            3 => scene.zero(range, true).await,
            4 => scene.zero(range, false).await,
            5 => scene.read(range).await,
            6 => scene.flush().await,
            _ => scene.write(scene.cluster(*rng.pick(self.hot))).await,
        }
    }
}

fn run(seed: u64, index: usize, config: &Config) {
    let mut rng = Rng::new(seed * 1000 + index as u64);
    let hot = hot_spot(&config.kind);
    let stored = rng.next_u64();
    let scene = Scene::new(config, seed, |cluster| match stored >> (cluster % 21 * 3) & 7 {
        _ if !hot.contains(&cluster) => Before::Nothing,
        0..2 => Before::Nothing,
        2..4 => Before::Stored,
        // Only what is deflated is smaller; version 2 has no zeroes.
        4 if config.kind.version > 2 => Before::Reserved,
        _ => Before::Compressed,
    });
    let (queues, depth) = (rng.between(1, 4), *rng.pick(&[1, 4, 16, 32]));
    let manner = *rng.pick(&MANNERS);
    scene.disk.note(format!("{queues} queues, {depth} requests in flight, {manner:?}"));
    let (requests, every) = (rng.between(1, 96 / depth), *rng.pick(&[30, 100, 300]));
    let steps = Cell::new(0);
    let places = (0..depth.max(queues)).map(|number| {
        let mut place = Place { scene: &scene, hot: &hot, manner, rng: rng.fork() };
        let steps = &steps;
        Task::new(format!("queue {}, place {number}", number % queues), async move {
            for _ in 0..requests {
                if let Err(error) = place.request().await {
                    place.scene.fail(format!("{error:?}"));
                }
                steps.set(steps.get() + 1);
            }
        })
    });
    scene.run_crashing(every, places.collect());
    assert_eq!(steps.get(), requests * depth.max(queues), "all were played");
    scene.read_all();
    scene.crash(1);
    scene.close();
}

fn play(change: impl Fn(&mut Config)) {
    for_seeds("crash", 6, |seed| {
        for (index, kind) in kinds().into_iter().enumerate() {
            // Those of large disks take long.
            if kind.size > 1 << 20 && seed % 3 != 1 {
                continue;
            }
            let mut config = Config { cache: (2 * SLICE, SLICE), ..config(kind) };
            change(&mut config);
            run(seed, index, &config);
        }
    });
}

#[test]
fn full_queues_on_a_hot_spot_survive_crashes() {
    play(|_| {});
}

#[test]
fn full_queues_on_a_hot_spot_survive_crashes_in_direct_mode() {
    play(|config| {
        config.alignment = if config.kind.cluster > 4096 { 4096 } else { 512 };
        config.discard_keeps = config.kind.cluster == 4096;
    });
}
