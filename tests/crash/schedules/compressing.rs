//! Compressed clusters that are written: packed into host clusters that they share,
//! freed with the last of them, and packed into again in another life.

use std::ops::Range;

use qcow2rs::io::sim::{Hold, OpKind, Pattern, Stage, Task};

use super::super::layout::Kind as EntryKind;
use super::super::random::{SMALL, config};
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, play};

/// Clusters into which several compressed ones go.
fn roomy() -> Config {
    config(Kind { cluster: 4096, size: 256 << 10, refcount_bits: 64, ..SMALL })
}

fn configs() -> [Config; 4] {
    let kind = roomy().kind;
    let narrow = config(Kind { refcount_bits: 1, ..kind });
    let direct = Config { alignment: 4096, ..roomy() };
    [roomy(), narrow, direct, extended()]
}

fn empty(config: &Config, seed: u64) -> Scene {
    Scene::new(config, seed, |_| Before::Nothing)
}

async fn compress_each(scene: &Scene, clusters: Range<u64>) {
    for cluster in clusters {
        assert!(scene.compress(scene.cluster(cluster)).await.unwrap());
    }
}

/// The bytes of a compressed cluster in the image file.
fn place(scene: &Scene, cluster: u64) -> Range<u64> {
    match scene.entry(cluster).map(|entry| entry.kind) {
        Some(EntryKind::Compressed(bytes)) => bytes,
        other => panic!("cluster {cluster} is not compressed: {other:?}"),
    }
}

fn finish(scene: Scene) {
    scene.read_all();
    scene.crash(1);
    scene.close();
}

#[test]
fn nothing_points_to_compressed_data_that_is_not_durable() {
    play(|seed| {
        for config in configs() {
            let scene = empty(&config, seed);
            scene.run_crashing(
                1,
                vec![Task::new("guest", async {
                    compress_each(&scene, 0..3).await;
                    scene.flush().await.unwrap();
                    // Behind what is durable, in the same host cluster, over what has
                    // data, and over what is compressed.
                    compress_each(&scene, 3..5).await;
                    scene.write(scene.cluster(6)).await.unwrap();
                    scene.discard(scene.cluster(1)).await.unwrap();
                    compress_each(&scene, 1..3).await;
                    scene.flush().await.unwrap();
                })],
            );
            finish(scene);
        }
    });
}

#[test]
fn a_host_cluster_is_counted_for_each_that_shares_it() {
    play(|seed| {
        for config in configs() {
            let scene = empty(&config, seed);
            let clusters = config.kind.clusters();
            scene.run_crashing(
                7,
                vec![Task::new("guest", async {
                    compress_each(&scene, 0..6).await;
                    scene.flush().await.unwrap();
                    // Five of six go; the last one stays where it is.
                    for cluster in [0, 1, 3, 4, 5] {
                        scene.discard(scene.cluster(cluster)).await.unwrap();
                    }
                    scene.settle().await.unwrap();
                    scene.write_clusters(8..clusters).await.unwrap();
                    scene.read(scene.cluster(2)).await.unwrap();
                })],
            );
            finish(scene);
        }
    });
}

/// QEMU 10.0.2 goes on packing into such a cluster.
#[test]
fn what_is_freed_while_it_is_being_filled_is_filled_no_more() {
    play(|seed| {
        for config in configs() {
            let scene = empty(&config, seed);
            let clusters = config.kind.clusters();
            scene.run_crashing(
                9,
                vec![Task::new("guest", async {
                    compress_each(&scene, 0..2).await;
                    scene.discard(scene.cluster(0).start..scene.cluster(1).end).await.unwrap();
                    for _ in 0..3 {
                        scene.flush().await.unwrap();
                    }
                    // Whatever is free is given to others; then packing goes on.
                    scene.write_clusters(8..clusters / 2).await.unwrap();
                    compress_each(&scene, 2..5).await;
                    scene.flush().await.unwrap();
                    scene.write_clusters(clusters / 2..clusters).await.unwrap();
                })],
            );
            finish(scene);
        }
    });
}

/// A hold on what reads a compressed cluster.
fn hold_reads(scene: &Scene, cluster: u64) -> Hold {
    let bytes = place(scene, cluster);
    let reads = Pattern::any().file("image").kind(OpKind::Read).touching(bytes);
    scene.disk.hold(reads, Stage::Apply)
}

#[test]
fn a_compressed_cluster_may_be_rewritten_compressed_while_it_is_read() {
    play(|seed| {
        for config in [roomy(), extended()] {
            let scene = empty(&config, seed);
            let clusters = config.kind.clusters();
            scene.play(async {
                compress_each(&scene, 0..1).await;
                scene.flush().await.unwrap();
                // The host cluster is not being filled any more.
                scene.settle().await.unwrap();
            });
            let hold = hold_reads(&scene, 0);
            scene.run(vec![
                Task::new("reader", async {
                    scene.read(scene.cluster(0)).await.unwrap();
                    scene.read(scene.cluster(0)).await.unwrap();
                }),
                Task::new("writer", async {
                    assert!(hold.caught().await);
                    hold.close();
                    compress_each(&scene, 0..1).await;
                    for _ in 0..3 {
                        scene.flush().await.unwrap();
                    }
                    for cluster in 8..clusters {
                        compress_each(&scene, cluster..cluster + 1).await;
                    }
                    scene.flush().await.unwrap();
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

/// Data of the same length at the same place as other data in an earlier life.
#[test]
fn a_place_that_is_used_again_is_not_answered_from_memory() {
    let mut again = 0;
    for seed in 1..=4 {
        let scene = empty(&roomy(), seed);
        let mut places = Vec::new();
        for round in 0..6 {
            let cluster = round % 3;
            scene.play(async {
                compress_each(&scene, cluster..cluster + 1).await;
                scene.read(scene.cluster(cluster)).await.unwrap();
                scene.settle().await.unwrap();
            });
            let place = place(&scene, cluster);
            again += u64::from(places.contains(&place));
            places.push(place);
            scene.play(async {
                scene.read(scene.cluster(cluster)).await.unwrap();
                scene.discard(scene.cluster(cluster)).await.unwrap();
                scene.settle().await.unwrap();
            });
        }
        finish(scene);
    }
    assert!(again > 0, "no place was used again");
}

#[test]
fn requests_that_compress_meet_others_on_the_same_clusters() {
    play(|seed| {
        for config in configs() {
            let scene = empty(&config, seed);
            let worker = async |number: u64| {
                for step in 0..12 {
                    let cluster = (step * 5 + number) % 4;
                    let sectors = scene.cluster(cluster);
                    match (step + number) % 6 {
                        0..=2 => drop(scene.compress(sectors).await.unwrap()),
                        3 => scene.discard(sectors).await.unwrap(),
                        4 => scene.write(sectors.start..sectors.start + 1).await.unwrap(),
                        _ => scene.read(sectors).await.unwrap(),
                    }
                }
                scene.flush().await.unwrap();
            };
            let workers = (0..5).map(|n| Task::new(format!("worker {n}"), worker(n)));
            scene.run_crashing(40, workers.collect());
            finish(scene);
        }
    });
}
