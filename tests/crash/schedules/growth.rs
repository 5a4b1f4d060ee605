//! The same work a thousand times over: a file reaches a size at which it stays.

use std::ops::Range;

use super::super::imagecheck;
use super::super::layout::Header;
use super::super::random::config;
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::super::support::for_seeds;
use super::scene::{Before, Scene};
use super::{extended, tiny};

const ROUNDS: u64 = 1000;

/// Plays a round again and again: after the first few, which bring the file to its
/// size, it has the same length after each.
fn repeat(scene: &Scene, round: impl AsyncFn()) -> u64 {
    const FIRST: u64 = 3;
    let mut steady = 0;
    for number in 0..ROUNDS {
        scene.play(round());
        let length = scene.file().length();
        if number <= FIRST {
            steady = length;
        } else if length != steady {
            scene.fail(format!("{steady:#x} bytes became {length:#x} in round {number}"));
        }
    }
    steady
}

/// Bytes of the clusters in use; there are no leaks among them.
fn in_use(scene: &Scene) -> u64 {
    let file = scene.file();
    assert_eq!(imagecheck::check(&*file).leaks, [0; 0]);
    let header = Header::read(&*file).unwrap();
    header.read_refcounts(&*file).in_use().count() as u64 * header.cluster
}

fn settle(scene: &Scene) {
    scene.play(scene.settle()).unwrap();
}

fn sectors(scene: &Scene, clusters: &Range<u64>) -> Range<u64> {
    scene.cluster(clusters.start).start..scene.cluster(clusters.end).start
}

fn small_extended() -> Config {
    config(Kind { size: 512 << 10, ..extended().kind })
}

#[test]
fn writes_and_discards_reach_a_steady_size_and_give_all_of_it_back() {
    for_seeds("crash", 1, |seed| {
        // What is live lies in the first run ever reserved: as many clusters as a slice
        // of 64 counts has left, or 1 MiB.
        let cases = [(tiny(), 0..20, 60 * 512), (small_extended(), 0..4, 1 << 20)];
        for (config, clusters, first_run) in cases {
            let scene = Scene::new(&config, seed, |_| Before::Nothing);
            let empty = scene.file().length();
            // A table, so that it is not counted for growth.
            scene.play(scene.write(scene.cluster(30))).unwrap();
            settle(&scene);
            let before = in_use(&scene);
            assert_eq!(scene.file().length(), before, "nothing else is in the file");
            let round = async || {
                scene.write_clusters(clusters.clone()).await.unwrap();
                scene.flush().await.unwrap();
                scene.discard(sectors(&scene, &clusters)).await.unwrap();
                scene.flush().await.unwrap();
            };
            assert_eq!(repeat(&scene, round), empty + first_run);
            settle(&scene);
            assert_eq!(in_use(&scene), before);
            scene.close();
        }
    });
}

#[test]
fn one_session_after_the_other_reaches_a_steady_size() {
    for_seeds("crash", 1, |seed| {
        for (config, clusters) in [(tiny(), 0..6), (small_extended(), 0..3)] {
            let scene = Scene::new(&config, seed, |_| Before::Nothing);
            let round = async || {
                scene.write_clusters(clusters.clone()).await.unwrap();
                scene.settle().await.unwrap();
                scene.discard(sectors(&scene, &clusters)).await.unwrap();
                scene.settle().await.unwrap();
            };
            let steady = repeat(&scene, round);
            let table = in_use(&scene);
            let live = (clusters.end - clusters.start) * config.kind.cluster;
            assert!(steady <= table + live, "{steady:#x} bytes for {table:#x} and {live:#x}");
            scene.close();
        }
    });
}

#[test]
fn what_a_snapshot_shares_is_copied_once_and_never_again() {
    for_seeds("crash", 1, |seed| {
        for kind in [tiny().kind, small_extended().kind] {
            let config = config(Kind { snapshot: true, ..kind });
            let at = |cluster| if cluster < 16 { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            let before = in_use(&scene);
            let round = async || {
                for cluster in 0..8 {
                    let first = scene.cluster(cluster).start;
                    scene.write(first..first + 1).await.unwrap();
                }
                scene.flush().await.unwrap();
            };
            repeat(&scene, round);
            settle(&scene);
            // The clusters and the one table that maps them.
            assert_eq!(in_use(&scene), before + (8 + 1) * kind.cluster);
            assert_eq!(scene.file().length(), before + (8 + 1) * kind.cluster);
            // Given up, the copies are free and are used again.
            let round = async || {
                scene.discard(sectors(&scene, &(0..8))).await.unwrap();
                scene.flush().await.unwrap();
                scene.write_clusters(0..8).await.unwrap();
                scene.flush().await.unwrap();
            };
            repeat(&scene, round);
            settle(&scene);
            assert_eq!(in_use(&scene), before + (8 + 1) * kind.cluster);
            scene.close();
        }
    });
}

#[test]
fn a_refcount_table_that_has_grown_leaves_nothing_behind() {
    for_seeds("crash", 1, |seed| {
        let config = config(Kind { crowded: true, ..tiny().kind });
        let scene = Scene::new(&config, seed, |_| Before::Nothing);
        let table = Header::read(&*scene.file()).unwrap().reftable;
        let round = async || {
            scene.write_clusters(0..64).await.unwrap();
            scene.flush().await.unwrap();
            scene.discard(sectors(&scene, &(0..64))).await.unwrap();
            scene.flush().await.unwrap();
        };
        scene.play(round());
        settle(&scene);
        let grown = Header::read(&*scene.file()).unwrap().reftable;
        assert!(grown.entries > table.entries, "the table has not grown");
        let used = in_use(&scene);
        repeat(&scene, round);
        settle(&scene);
        let now = Header::read(&*scene.file()).unwrap().reftable;
        assert_eq!((now.offset, now.entries), (grown.offset, grown.entries), "it grew again");
        assert_eq!(in_use(&scene), used);
        scene.close();
    });
}

#[test]
fn many_small_holes_do_not_make_a_file_grow_in_large_steps() {
    for_seeds("crash", 1, |seed| {
        let config = config(Kind { cluster: 4096, size: 512 << 10, ..tiny().kind });
        let at = |cluster| if cluster < 64 { Before::Stored } else { Before::Nothing };
        let scene = Scene::new(&config, seed, at);
        let before = scene.file().length();
        let work = async {
            for cluster in (0..64).step_by(2) {
                scene.discard(scene.cluster(cluster)).await.unwrap();
            }
            scene.flush().await.unwrap();
            // Each fills a hole; the last ones find none.
            for cluster in 64..100 {
                scene.write(scene.cluster(cluster)).await.unwrap();
            }
        };
        scene.play(work);
        // What is reserved ahead at first: little was written.
        let grown = scene.file().length() - before;
        assert!((1..=1 << 20).contains(&grown), "{grown:#x} bytes more");
        scene.close();
    });
}
