//! Clusters that are used again: only when what freed them is durable, and with
//! nothing to be seen of what was in them.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use qcow2rs::io::sim::Task;

use super::super::random::{SMALL, config};
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, play, tiny};

#[test]
fn what_a_flush_frees_is_used_again_only_when_its_entries_are_durable() {
    play(|seed| {
        let at = |cluster| if cluster < 16 { Before::Stored } else { Before::Nothing };
        let scene = Scene::new(&tiny(), seed, at);
        scene.run_crashing(
            2,
            vec![Task::new("guest", async {
                scene.discard(0..scene.cluster(12).start).await.unwrap();
                scene.flush().await.unwrap();
                // The lowest free clusters are those that were freed.
                scene.write_clusters(20..32).await.unwrap();
                scene.flush().await.unwrap();
            })],
        );
        scene.read_all();
        scene.crash(1);
        scene.close();
    });
}

#[test]
fn what_left_a_full_cache_is_durable_before_what_it_freed_is_used_again() {
    play(|seed| {
        let at = |cluster| if cluster % 64 < 8 { Before::Stored } else { Before::Nothing };
        let scene = Scene::new(&tiny(), seed, at);
        scene.run_crashing(
            2,
            vec![Task::new("guest", async {
                // Two tables are dirty, which is all that fits; reading a third one
                // leaves nothing for the flush to write.
                scene.discard(scene.cluster(0).start..scene.cluster(6).start).await.unwrap();
                scene.discard(scene.cluster(64).start..scene.cluster(70).start).await.unwrap();
                scene.read(scene.cluster(128)).await.unwrap();
                scene.flush().await.unwrap();
                scene.write_clusters(200..212).await.unwrap();
            })],
        );
        scene.read_all();
        scene.crash(1);
        scene.close();
    });
}

/// Clusters of some sectors, and storages that leave in them what was there.
fn without_holes() -> Vec<Config> {
    let coarse = config(Kind { cluster: 4096, size: 256 << 10, ..SMALL });
    [tiny(), coarse, extended()].map(|config| Config { punch: false, ..config }).into()
}

#[test]
fn nothing_old_is_seen_in_a_cluster_that_is_used_again() {
    play(|seed| {
        for config in without_holes() {
            let at = |cluster| if cluster < 8 { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            scene.play(async {
                scene.discard(0..scene.cluster(8).start).await.unwrap();
                scene.flush().await.unwrap();
                // Parts of clusters; the first needs a table, where tables are small.
                let clusters = config.kind.clusters();
                for cluster in [clusters - 1, clusters - 3, 20] {
                    let start = scene.cluster(cluster).start;
                    scene.write(start..start + 1).await.unwrap();
                }
            });
            scene.read_all();
            scene.crash(1);
            scene.close();
        }
    });
}

#[test]
fn a_cluster_that_a_request_left_with_a_write_under_way_is_not_given_to_another() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let scene = Scene::new(&config, seed, |_| Before::Nothing);
            // Engines are to see to it that a write is over when nobody waits for it
            // any more; this one does not.
            scene.disk.leave_dropped(true);
            let hold = scene.hold_next_write(scene.cluster(0).start);
            scene.run(vec![
                Task::new("hasty", async {
                    let (mut caught, mut write) =
                        (pin!(hold.caught()), pin!(scene.write(scene.cluster(0))));
                    poll_fn(|context| match caught.as_mut().poll(context) {
                        Poll::Ready(_) => Poll::Ready(()),
                        Poll::Pending => write.as_mut().poll(context).map(|_| ()),
                    })
                    .await;
                }),
                Task::new("patient", async {
                    assert!(hold.caught().await);
                    scene.write_clusters(1..24).await.unwrap();
                    hold.release();
                }),
            ]);
            scene.read_all();
            scene.crash(1);
            scene.close();
        }
    });
}
