//! An image whose data is in a file of its own: nothing orders what two files hold after
//! a power loss but the syncs of both.

use qcow2rs::ErrorKind;
use qcow2rs::io::sim::{Fault, OpKind, Pattern, Task};

use super::super::random::config;
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, play, tiny};

fn configs() -> [Config; 3] {
    let small = Kind { data_file: true, ..tiny().kind };
    let coarse = Kind { data_file: true, backing: true, ..extended().kind };
    let lazy = Kind { lazy: true, ..small };
    [small, coarse, lazy].map(config)
}

fn scene(config: &Config, seed: u64) -> Scene {
    let at = |cluster| if cluster % 2 == 1 { Before::Stored } else { Before::Nothing };
    Scene::new(config, seed, at)
}

/// The syncs of the data file and of the image so far.
fn syncs(scene: &Scene) -> (u64, u64) {
    let data = scene.disk.file("data").expect("there is a data file");
    (data.counters().syncs, scene.file().counters().syncs)
}

#[test]
fn the_data_file_is_durable_before_what_points_into_it() {
    play(|seed| {
        for config in configs() {
            let scene = scene(&config, seed);
            scene.play(async {
                for cluster in [4, 6, 8] {
                    let first = scene.cluster(cluster).start;
                    scene.write(first..first + 1).await.unwrap();
                }
            });
            scene.run_crashing(1, vec![Task::new("flush", async { scene.flush().await.unwrap() })]);
            scene.crash(2);
            scene.close();
        }
    });
}

#[test]
fn a_flush_makes_both_files_durable() {
    play(|seed| {
        for config in configs() {
            let scene = scene(&config, seed);
            // In place; a new place; zeroes; both at once.
            for cluster in [1, 10, 3] {
                let sectors = scene.cluster(cluster);
                scene.play(scene.write(sectors.clone())).unwrap();
                let before = syncs(&scene);
                scene.play(scene.flush()).unwrap();
                let after = syncs(&scene);
                assert_eq!(after.0 - before.0, 1, "the data file, cluster {cluster}");
                assert!((1..=3).contains(&(after.1 - before.1)), "the image, cluster {cluster}");
                (0..8).for_each(|_| scene.crash_quick());
            }
            scene.play(scene.zero(scene.cluster(5), true)).unwrap();
            scene.play(scene.write(scene.cluster(7))).unwrap();
            scene.play(scene.flush()).unwrap();
            (0..8).for_each(|_| scene.crash_quick());
            let before = syncs(&scene);
            scene.play(scene.flush()).unwrap();
            assert_eq!(syncs(&scene), before, "nothing since");
            scene.close();
        }
    });
}

#[test]
fn a_failed_sync_of_either_file_is_for_good() {
    play(|seed| {
        for file in ["data", "image"] {
            let scene = scene(&configs()[0], seed);
            scene.play(async {
                scene.write(scene.cluster(4)).await.unwrap();
                scene.write(scene.cluster(1)).await.unwrap();
                let pattern = Pattern::any().file(file).kind(OpKind::Sync);
                scene.disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
                let failed = |result: qcow2rs::Result<()>| result.unwrap_err().kind();
                assert_eq!(failed(scene.flush().await), ErrorKind::FlushFailed, "{file}");
                assert_eq!(failed(scene.flush().await), ErrorKind::FlushFailed, "{file}");
                assert_eq!(failed(scene.write(0..1).await), ErrorKind::FlushFailed, "{file}");
            });
            scene.crash(2);
        }
    });
}

#[test]
fn places_that_were_given_up_are_used_again_at_once() {
    // There is no limbo for them: each is its guest's for ever.
    play(|seed| {
        for config in configs() {
            let scene = scene(&config, seed);
            let sectors = scene.cluster(1);
            scene.run_crashing(
                3,
                vec![Task::new("main", async {
                    scene.discard(sectors.clone()).await.unwrap();
                    scene.write(sectors.start..sectors.start + 1).await.unwrap();
                    scene.flush().await.unwrap();
                    scene.zero(sectors.clone(), true).await.unwrap();
                    scene.write(sectors.clone()).await.unwrap();
                    scene.flush().await.unwrap();
                })],
            );
            scene.close();
        }
    });
}
