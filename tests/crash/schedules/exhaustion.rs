//! No space, or an operation that fails: each failure is rolled back, and what is
//! freed is used again, so that a file does not grow for ever.

use std::ops::{ControlFlow, Range};

use qcow2rs::io::sim::{Fault, OpKind, Outcome, Pattern, Task};
use qcow2rs::{ErrorKind, Result};

use super::super::random::config;
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, play, play_some, tiny};

/// A bit of everything, on an image of which each fourth cluster is compressed.
async fn work(scene: &Scene) -> Vec<Result<()>> {
    let clusters = scene.config().kind.clusters();
    let mut results = Vec::new();
    for step in 0..6 {
        let sectors = scene.cluster(step * (clusters / 6) + step % 4);
        let first = sectors.start..sectors.start + 1;
        results.push(scene.write(sectors.clone()).await);
        results.push(scene.write(sectors.end..sectors.end + 1).await);
        results.push(match step % 3 {
            0 => scene.discard(sectors).await,
            1 => scene.zero(sectors, true).await,
            _ => scene.zero(first, false).await,
        });
        if step % 2 == 1 {
            results.push(scene.flush().await);
        }
    }
    results
}

fn scene(config: &Config, seed: u64) -> Scene {
    Scene::new(config, seed, |cluster| match cluster % 4 {
        1 => Before::Compressed,
        2 => Before::Stored,
        _ => Before::Nothing,
    })
}

/// Lets the `index`th operation of a kind fail, or each from there on, and has
/// everything done again afterwards.
fn fail_and_go_on(scene: Scene, kind: OpKind, index: u64, errno: i32) {
    let pattern = Pattern::any().file("image").kind(kind).after(index / 2);
    scene.disk.inject(Fault { pattern, errno, forever: index % 2 == 1 });
    let expected = |kind| matches!(kind, ErrorKind::NoSpace | ErrorKind::Os(libc::EIO));
    for result in scene.play(work(&scene)) {
        match result {
            Err(error) if !expected(error.kind()) => scene.fail(format!("{error:?}")),
            _ => {}
        }
    }
    scene.disk.clear_faults();
    scene.crash_quick();
    scene.read_all();
    for result in scene.play(work(&scene)) {
        if let Err(error) = result {
            scene.fail(format!("nothing fails any more, and yet: {error:?}"));
        }
    }
    scene.crash_quick();
    scene.read_all();
    scene.close();
}

#[test]
fn each_failure_is_rolled_back_and_leaves_no_cluster_over() {
    play_some(1, |seed| {
        let snapshot = config(Kind { snapshot: true, size: 64 << 10, ..tiny().kind });
        let coarse = config(Kind { cluster: 4096, size: 256 << 10, ..tiny().kind });
        for config in [snapshot, coarse, extended()] {
            let clean = scene(&config, seed);
            clean.play(work(&clean)).into_iter().for_each(|result| result.unwrap());
            let counters = clean.file().counters();
            for (kind, count, errno) in [
                (OpKind::Write, counters.writes, libc::ENOSPC),
                (OpKind::Write, counters.writes, libc::EIO),
                (OpKind::Truncate, counters.truncates, libc::ENOSPC),
                (OpKind::Read, counters.reads, libc::EIO),
            ] {
                for index in 0..2 * count {
                    fail_and_go_on(scene(&config, seed * 1000 + index), kind, index, errno);
                }
            }
        }
    });
}

#[test]
fn a_full_device_goes_on_with_what_is_freed() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let scene = crowded_device(&config, seed);
            let full = fill(&scene);
            // Nobody has flushed: what is freed waits, and has to be fetched.
            scene.play(async {
                for cluster in full - 4..full {
                    scene.discard(scene.cluster(cluster)).await.unwrap();
                }
                scene.write_clusters(full..full + 3).await.unwrap();
            });
            scene.read_all();
            scene.crash_quick();
            scene.play(async {
                scene.discard(0..scene.sectors()).await.unwrap();
                scene.settle().await.unwrap();
            });
            assert_eq!(scene.leaks(), [0; 0]);
        }
    });
}

#[test]
fn a_full_device_waits_for_those_who_still_read_what_is_freed() {
    play(|seed| {
        let scene = crowded_device(&tiny(), seed);
        let full = fill(&scene);
        let hold = scene.hold(OpKind::Read);
        scene.run(vec![
            Task::new("reader", async {
                scene.read(scene.cluster(full - 1)).await.unwrap();
            }),
            Task::new("guest", async {
                assert!(hold.caught().await);
                hold.close();
                scene.discard(scene.cluster(full - 2)).await.unwrap();
                scene.write(scene.cluster(full)).await.unwrap();
            }),
        ]);
        scene.read_all();
        scene.crash_quick();
    });
}

/// An image on a device that has room for some more clusters, but not for all.
fn crowded_device(config: &Config, seed: u64) -> Scene {
    let cluster = config.kind.cluster;
    let length = scene(config, seed).file().length();
    let room = length + cluster * config.kind.clusters() / 8;
    let device = |options: &mut qcow2rs::io::sim::FileOptions| options.device = Some(room);
    Scene::with(config, seed, device, |_| {}, |_| Before::Nothing)
}

/// Writes to one cluster after the other until there is no more space; the first
/// that found none.
fn fill(scene: &Scene) -> u64 {
    scene.play(async {
        for cluster in 0..scene.config().kind.clusters() {
            match scene.write(scene.cluster(cluster)).await {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NoSpace => return cluster,
                Err(error) => scene.fail(format!("{error:?}")),
            }
        }
        scene.fail("there is too much space")
    })
}

#[test]
fn the_same_work_again_and_again_needs_no_more_space() {
    // All that is live, as much that waits to be free, a run, some metadata.
    const CLUSTERS: u64 = 250 + 250 + 64 + 20;
    play(|seed| {
        let scene = Scene::new(&tiny(), seed, |_| Before::Nothing);
        for round in 0..30 {
            let worker = async |clusters: Range<u64>| {
                scene.write_clusters(clusters.clone()).await.unwrap();
                let (start, end) = (scene.cluster(clusters.start), scene.cluster(clusters.end));
                scene.flush().await.unwrap();
                scene.discard(start.start..end.start).await.unwrap();
                scene.flush().await.unwrap();
            };
            scene.run(vec![
                Task::new("one", worker(0..100)),
                Task::new("another", worker(100..150)),
                Task::new("a third", worker(150..250)),
            ]);
            let length = scene.file().length();
            if length > CLUSTERS * 512 {
                scene.fail(format!("{length} bytes after round {round}"));
            }
        }
        scene.close();
    });
}

#[test]
fn what_is_freed_during_a_search_for_free_clusters_is_found_by_the_next() {
    /// So many clusters are freed.
    const FREED: u64 = 64;
    play(|seed| {
        let at = |cluster| if cluster < FREED { Before::Stored } else { Before::Nothing };
        // How many clusters are written before the file grows.
        let room = |freed: bool| {
            let scene = Scene::new(&tiny(), seed, at);
            // The search has found a run behind the end of the file, and extends it.
            let hold = scene.hold(OpKind::Truncate);
            scene.run(vec![
                Task::new("writer", async {
                    scene.write_clusters(100..101).await.unwrap();
                }),
                Task::new("discarder", async {
                    assert!(hold.caught().await);
                    if freed {
                        scene.discard(0..scene.cluster(FREED).start).await.unwrap();
                    }
                    scene.flush().await.unwrap();
                    hold.release();
                }),
            ]);
            let length = scene.file().length();
            let grows = |cluster: &u64| {
                scene.play(scene.write_clusters(*cluster..cluster + 1)).unwrap();
                scene.file().length() > length
            };
            let end = tiny().kind.size / tiny().kind.cluster;
            let room = (101..end).find(grows).unwrap_or(end) - 101;
            scene.close();
            room
        };
        // Some of what was freed is for tables.
        assert!(room(true) >= room(false) + FREED / 2, "it grows, though there is room inside");
    });
}

#[test]
fn the_header_is_never_a_place_for_data() {
    play_some(2, |seed| {
        for index in 0..60 {
            let scene = scene(&tiny(), seed * 1000 + index);
            let header = scene.file().bytes()[..512].to_vec();
            let pattern = Pattern::any().file("image").kind(OpKind::Write).after(index);
            scene.disk.inject(Fault { pattern, errno: libc::ENOSPC, forever: index % 2 == 0 });
            let task = Task::new("guest", async {
                work(&scene).await;
            });
            let outcome = scene.disk.run_observed(vec![task], |_| {
                let mut now = vec![0; 512];
                scene.file().peek(0, &mut now);
                if now != header {
                    scene.fail("the header has changed");
                }
                ControlFlow::Continue(())
            });
            assert_eq!(outcome, Outcome::Done);
        }
    });
}

#[test]
fn clusters_of_metadata_that_count_as_free_are_not_given_out() {
    play(|seed| {
        // The refcount block is the last cluster: its counts become 0, but for that
        // of the header in each other image.
        let forget = |image: &mut Vec<u8>| {
            let block = image.len() - 512 + (seed as usize % 2) * 8;
            image[block..].fill(0);
        };
        let scene = Scene::with(&tiny(), seed, |_| {}, forget, |_| Before::Nothing);
        let before = scene.file().bytes();
        let result = scene.play(scene.write(scene.cluster(0)));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt);
        let after = scene.file().bytes();
        // But for the bit that says so.
        assert_eq!((&before[..72], &before[80..]), (&after[..72], &after[80..]));
        assert_eq!(after[79], before[79] | 2, "the corrupt bit is not set");
        let result = scene.play(scene.write(scene.cluster(0)));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Shutdown);
    });
}
