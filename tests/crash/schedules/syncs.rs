//! How many syncs a flush costs, by what was done before it.

use qcow2rs::Result;

use super::super::random::config;
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, play, tiny};

/// With a cache that never has to write back early.
fn roomy(kind: Kind) -> Config {
    Config { cache: (64 << 10, 512), ..config(kind) }
}

/// Clusters to do things to, apart from one another.
const NOTHING: u64 = 4;
const STORED: u64 = 1;
const COMPRESSED: u64 = 2;
const RESERVED: u64 = 3;

fn scene(config: &Config, seed: u64) -> Scene {
    let scene = Scene::new(config, seed, |cluster| match cluster % 8 {
        STORED => Before::Stored,
        COMPRESSED => Before::Compressed,
        RESERVED => Before::Reserved,
        _ => Before::Nothing,
    });
    // From here on there is a run of clusters whose refcounts are raised durably.
    scene.play(async {
        let sectors = scene.cluster(NOTHING + 1);
        scene.write_fua(sectors, true).await.unwrap();
    });
    scene
}

/// The syncs of a request and of the flush that follows.
fn syncs(scene: &Scene, request: impl Future<Output = Result<()>>) -> u64 {
    let before = scene.file().counters().syncs;
    scene.play(async {
        request.await.unwrap();
        scene.flush().await.unwrap();
    });
    scene.file().counters().syncs - before
}

fn kinds() -> [Kind; 2] {
    [Kind { cluster: 4096, size: 256 << 10, ..tiny().kind }, extended().kind]
}

#[test]
fn a_flush_of_nothing_syncs_nothing_and_one_of_data_in_place_syncs_once() {
    play(|seed| {
        for config in kinds().map(roomy) {
            let scene = scene(&config, seed);
            let stored = scene.cluster(STORED);
            assert_eq!(syncs(&scene, async { Ok(()) }), 0, "nothing");
            assert_eq!(syncs(&scene, scene.read(0..scene.sectors())), 0, "reads");
            assert_eq!(syncs(&scene, scene.write(stored.clone())), 1, "in place");
            assert_eq!(syncs(&scene, scene.write(stored.start..stored.start + 1)), 1, "a part");
            assert_eq!(syncs(&scene, async { Ok(()) }), 0, "nothing since");
            let fua = async {
                scene.write_fua(stored.clone(), true).await?;
                scene.write_fua(stored.clone(), true).await
            };
            assert_eq!(syncs(&scene, fua), 2, "one each, and the flush none");
            scene.close();
        }
    });
}

#[test]
fn what_must_be_durable_before_its_entry_costs_a_second_sync() {
    play(|seed| {
        for kind in kinds() {
            let scene = scene(&roomy(kind), seed);
            for cluster in [COMPRESSED, RESERVED] {
                let sectors = scene.cluster(cluster);
                assert_eq!(syncs(&scene, scene.write(sectors)), 2, "cluster {cluster}");
            }
            // A cluster that was used before holds what it held.
            let freed = scene.discard(scene.cluster(STORED));
            assert_eq!(syncs(&scene, freed), 1, "nothing is pointed to");
            scene.play(scene.settle()).unwrap();
            let reused = scene.write(scene.cluster(NOTHING));
            assert_eq!(syncs(&scene, reused), 2, "used before");
            scene.close();

            // The guest must not see zeroes where the backing file shows.
            let scene = self::scene(&roomy(Kind { backing: true, ..kind }), seed);
            let first = scene.cluster(NOTHING).start;
            assert_eq!(syncs(&scene, scene.write(first..first + 1)), 2, "over a backing file");
            scene.close();
        }
        // A table, and a cluster, that a snapshot shares.
        let shared = Kind { snapshot: true, ..kinds()[0] };
        let scene = scene(&roomy(shared), seed);
        for _ in 0..2 {
            let sectors = scene.cluster(STORED);
            scene.play(scene.write(sectors.start..sectors.start + 1)).unwrap();
        }
        let other = scene.cluster(8 + STORED);
        assert_eq!(syncs(&scene, scene.write(other)), 2, "shared");
        scene.close();
    });
}

#[test]
fn zeroes_that_make_way_and_data_where_zeroes_were_cost_one_sync() {
    play(|seed| {
        for config in kinds().map(roomy) {
            let scene = scene(&config, seed);
            let at = |cluster| scene.cluster(cluster);
            assert_eq!(syncs(&scene, scene.zero(at(STORED), false)), 1, "zeroes");
            assert_eq!(syncs(&scene, scene.zero(at(8 + STORED), true)), 1, "unmapped");
            assert_eq!(syncs(&scene, scene.discard(at(8 + COMPRESSED))), 1, "discarded");
            let new = at(NOTHING);
            assert_eq!(
                syncs(&scene, scene.write(new.start..new.start + 1)),
                1,
                "where zeroes were"
            );
            assert_eq!(syncs(&scene, scene.write(at(8 + NOTHING))), 1, "a cluster");
            let mixed = async {
                scene.write(at(16 + NOTHING)).await?;
                scene.discard(at(16 + STORED)).await?;
                scene.write(at(24 + STORED)).await
            };
            assert_eq!(syncs(&scene, mixed), 1, "all that together");
            // As soon as one thing needs it, all wait for it.
            let mixed = async {
                scene.write(at(24 + NOTHING)).await?;
                scene.write(at(24 + RESERVED)).await
            };
            assert_eq!(syncs(&scene, mixed), 2, "with one that is not harmless");
            scene.crash(1);
            scene.close();
        }
    });
}

#[test]
fn the_first_flush_after_refcounts_were_raised_syncs_twice() {
    play(|seed| {
        let kind = kinds()[0];
        // Counts of 64 bits: a run is at most a slice of 512 counts long.
        let scene = Scene::new(&roomy(kind), seed, |_| Before::Nothing);
        let counts: Vec<u64> =
            (0..8).map(|cluster| syncs(&scene, scene.write(scene.cluster(cluster)))).collect();
        assert_eq!(counts, [2, 1, 1, 1, 1, 1, 1, 1]);
        scene.crash(1);
        scene.close();
    });
}
