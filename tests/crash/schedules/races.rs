//! Requests that meet on the same clusters: whoever is late must not do harm.

use qcow2rs::io::sim::{Hold, OpKind, Pattern, Stage, Task};

use super::super::layout::Kind as EntryKind;
use super::super::random::config;
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, over_backing, play, tiny};

/// The guest cluster that the requests meet on.
const G: u64 = 3;

/// Writes to every other cluster but the first few, so that whatever is free, or
/// thought to be, is used.
async fn use_what_is_free(scene: &Scene) {
    let clusters = scene.config().kind.clusters();
    scene.flush().await.unwrap();
    scene.write_clusters(8..clusters).await.unwrap();
    scene.flush().await.unwrap();
}

fn finish(scene: Scene) {
    scene.read_all();
    scene.crash(1);
    scene.close();
}

#[test]
fn a_discard_does_not_free_the_cluster_that_a_write_is_about_to_enter() {
    play(|seed| {
        for (config, before) in [
            (tiny(), Before::Nothing),
            (tiny(), Before::Reserved),
            (extended(), Before::Nothing),
            (extended(), Before::Reserved),
        ] {
            let at = |cluster| if cluster == G { before } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            let sectors = scene.cluster(G);
            let hold = scene.hold_next_write(sectors.start);
            scene.run(vec![
                Task::new("writer", async {
                    scene.write(sectors.clone()).await.unwrap();
                }),
                Task::new("discarder", async {
                    assert!(hold.caught().await);
                    scene.discard(sectors.clone()).await.unwrap();
                }),
                Task::new("others", async {
                    assert!(hold.caught().await);
                    use_what_is_free(&scene).await;
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn a_write_in_place_keeps_its_cluster_from_being_reused_after_a_discard() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let at = |cluster| if cluster == G { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            let sectors = scene.cluster(G);
            let hold = scene.hold_next_write(sectors.start);
            scene.run(vec![
                Task::new("writer", async {
                    scene.write(sectors.clone()).await.unwrap();
                }),
                Task::new("discarder", async {
                    assert!(hold.caught().await);
                    scene.discard(sectors.clone()).await.unwrap();
                    use_what_is_free(&scene).await;
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn a_hole_that_is_punched_late_does_not_hit_the_next_owner() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let scene = Scene::new(&config, seed, |cluster| match cluster {
                G => Before::Stored,
                _ => Before::Nothing,
            });
            let hold = scene.hold(OpKind::Punch);
            scene.run(vec![
                Task::new("discarder", async {
                    scene.discard(scene.cluster(G)).await.unwrap();
                }),
                Task::new("others", async {
                    assert!(hold.caught().await);
                    use_what_is_free(&scene).await;
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn a_hole_inside_a_cluster_does_not_hit_a_write_next_to_what_was_discarded() {
    play(|seed| {
        let scene = Scene::new(&extended(), seed, |_| Before::Nothing);
        let first = scene.cluster(G).start;
        scene.play(async {
            scene.write(first..first + 1).await.unwrap();
            scene.write(first + 20..first + 21).await.unwrap();
            scene.flush().await.unwrap();
        });
        // The hole is as large as a block of the host: it covers what is free
        // around the subcluster.
        let hold = scene.hold(OpKind::Punch);
        scene.run(vec![
            Task::new("discarder", async {
                scene.discard(first..first + 1).await.unwrap();
            }),
            Task::new("writer", async {
                assert!(hold.caught().await);
                scene.write(first + 1..first + 8).await.unwrap();
                scene.flush().await.unwrap();
                hold.release();
            }),
        ]);
        finish(scene);
    });
}

/// A scene in which G is like this and alone, and a hold on what reads its bytes.
fn reading(config: &Config, seed: u64, before: Before) -> (Scene, Hold) {
    let at = |cluster| if cluster == G { before } else { Before::Nothing };
    let scene = Scene::new(config, seed, at);
    let bytes = match scene.entry(G).map(|entry| entry.kind) {
        Some(EntryKind::Compressed(bytes)) => bytes,
        Some(EntryKind::Normal(host)) => host..host + config.kind.cluster,
        other => panic!("{before:?} is stored as {other:?}"),
    };
    let reads = Pattern::any().file("image").kind(OpKind::Read).touching(bytes);
    let hold = scene.disk.hold(reads, Stage::Apply);
    (scene, hold)
}

#[test]
fn a_compressed_cluster_may_be_rewritten_while_it_is_read() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let (scene, hold) = reading(&config, seed, Before::Compressed);
            let sectors = scene.cluster(G);
            scene.run(vec![
                Task::new("reader", async {
                    scene.read(sectors.clone()).await.unwrap();
                }),
                Task::new("writer", async {
                    assert!(hold.caught().await);
                    // The copy reads the same bytes and must not be stopped.
                    hold.close();
                    scene.write(sectors.start..sectors.start + 1).await.unwrap();
                    use_what_is_free(&scene).await;
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn a_read_does_not_see_what_its_cluster_is_used_for_next() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let (scene, hold) = reading(&config, seed, Before::Stored);
            scene.run(vec![
                Task::new("reader", async {
                    scene.read(scene.cluster(G)).await.unwrap();
                }),
                Task::new("discarder", async {
                    assert!(hold.caught().await);
                    scene.discard(scene.cluster(G)).await.unwrap();
                    use_what_is_free(&scene).await;
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn a_write_that_comes_while_its_cluster_is_discarded_is_not_undone() {
    play(|seed| {
        // One that keeps its host cluster, and fills it while it becomes a hole.
        let kind = Kind { cluster: 4096, size: 256 << 10, ..tiny().kind };
        let keeps = Config { discard_keeps: true, ..config(kind) };
        for config in [tiny(), extended(), keeps] {
            let at = |cluster| if cluster == G { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            let hold = scene.hold(OpKind::Punch);
            scene.run(vec![
                Task::new("discarder", async {
                    scene.discard(scene.cluster(G)).await.unwrap();
                }),
                Task::new("writer", async {
                    assert!(hold.caught().await);
                    // It may wait for the discard: the hold ends when nothing else
                    // can go on.
                    scene.write(scene.cluster(G)).await.unwrap();
                    scene.flush().await.unwrap();
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn what_a_cluster_held_before_is_not_seen_while_a_write_fills_it() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let at = |cluster| if cluster < 8 { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            scene.play(async {
                // Free, and full of old data.
                scene.file().set_options(|options| options.punch = false);
                scene.discard(0..scene.cluster(8).start).await.unwrap();
                scene.settle().await.unwrap();
            });
            let sectors = scene.cluster(9);
            let hold = scene.hold_next_write(sectors.start);
            scene.run(vec![
                Task::new("writer", async {
                    scene.write(sectors.start..sectors.start + 1).await.unwrap();
                }),
                Task::new("reader", async {
                    assert!(hold.caught().await);
                    scene.read(sectors.clone()).await.unwrap();
                    scene.write(sectors.end..sectors.end + 1).await.unwrap();
                    scene.flush().await.unwrap();
                    scene.read(sectors.clone()).await.unwrap();
                    (0..8).for_each(|_| scene.crash_quick());
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn a_read_sees_what_is_below_until_the_data_above_it_is_there() {
    play(|seed| {
        for config in over_backing() {
            let scene = Scene::new(&config, seed, |_| Before::Nothing);
            let sectors = scene.cluster(G);
            let hold = scene.hold_next_write(sectors.start);
            scene.run(vec![
                Task::new("writer", async {
                    scene.write(sectors.start..sectors.start + 1).await.unwrap();
                }),
                Task::new("reader", async {
                    assert!(hold.caught().await);
                    scene.read(sectors.clone()).await.unwrap();
                    hold.release();
                }),
            ]);
            finish(scene);
        }
    });
}

#[test]
fn queues_on_a_warm_overlay_with_the_smallest_cache_do_not_mix_up_tables() {
    play(|seed| {
        for config in over_backing() {
            let at = |cluster| match cluster % 3 {
                0 => Before::Nothing,
                1 => Before::Stored,
                _ => Before::Compressed,
            };
            let scene = Scene::new(&config, seed, at);
            // Each queue goes its own way over the disk, jumping from table to table.
            let queue = async |number: u64| {
                let clusters = config.kind.clusters();
                for step in 0..clusters / 8 {
                    let cluster = (step * 4 + number) * 37 % clusters;
                    let sectors = scene.cluster(cluster);
                    match step % 4 {
                        0 => scene.discard(sectors).await.unwrap(),
                        3 => scene.read(sectors).await.unwrap(),
                        _ => scene.write(sectors.start..sectors.start + 1).await.unwrap(),
                    }
                }
            };
            let queues = (0..4).map(|n| Task::new(format!("queue {n}"), queue(n)));
            scene.run(queues.collect());
            finish(scene);
        }
    });
}
