//! Requests that are given up at any of the points at which they wait: what they
//! did not do is done by the next, and nothing is lost or left over.

use qcow2rs::io::sim::{Task, give_up_after};

use super::super::random::config;
use super::super::scenario::Config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, over_backing, play, tiny};

/// More points than any of the requests here has.
const POINTS: u64 = 30;

#[test]
fn a_flush_that_is_given_up_leaves_its_work_to_the_next() {
    play(|seed| {
        let at = |cluster| if cluster < 64 { Before::Stored } else { Before::Nothing };
        let scene = Scene::new(&tiny(), seed, at);
        for point in 1..POINTS {
            scene.play(async {
                scene.write(scene.cluster(point)).await.unwrap();
                if point % 2 == 0 {
                    scene.discard(scene.cluster(point + POINTS)).await.unwrap();
                    scene.write(scene.cluster(64 + point)).await.unwrap();
                }
                give_up_after(point, scene.flush()).await;
                scene.flush().await.unwrap();
            });
            for _ in 0..6 {
                scene.crash_quick();
            }
        }
        scene.close();
    });
}

#[test]
fn a_flush_that_is_given_up_does_not_take_the_order_with_it() {
    play(|seed| {
        let at = |cluster| if cluster < 64 { Before::Stored } else { Before::Nothing };
        let scene = Scene::new(&tiny(), seed, at);
        scene.play(async {
            // What is used next holds old data, and is counted durably.
            scene.file().set_options(|options| options.punch = false);
            scene.discard(0..scene.cluster(40).start).await.unwrap();
            scene.settle().await.unwrap();
            scene.write_fua(scene.cluster(70), true).await.unwrap();
        });
        for number in 1..POINTS {
            scene.play(async {
                scene.write(scene.cluster(70 + number)).await.unwrap();
                give_up_after(1 + number % 3, scene.flush()).await;
            });
            scene.run_crashing(1, vec![Task::new("next", async { scene.flush().await.unwrap() })]);
        }
        scene.close();
    });
}

/// Something to be given up: a request that has to do with a cluster.
async fn request(scene: &Scene, number: u64, cluster: u64) {
    let sectors = scene.cluster(cluster);
    let first = sectors.start..sectors.start + 1;
    let result = match number {
        0 => scene.write(sectors).await,
        1 => scene.write(first).await,
        2 => scene.write(sectors.start..sectors.end + 1).await,
        3 => scene.write_fua(first, true).await,
        4 => scene.zero(sectors, true).await,
        5 => scene.zero(sectors, false).await,
        6 => scene.zero(first, true).await,
        7 => scene.discard(sectors.start..sectors.end + 1).await,
        8 => scene.discard(first).await,
        9 => scene.read(sectors).await,
        _ => scene.flush().await,
    };
    result.unwrap();
}

const REQUESTS: u64 = 11;

#[test]
fn a_request_that_is_given_up_loses_nothing_and_leaves_nothing_over() {
    play(|seed| {
        let snapshot = config(Kind { snapshot: true, ..tiny().kind });
        for config in over_backing().into_iter().chain([tiny(), extended(), snapshot]) {
            let clusters = config.kind.clusters();
            let scene = Scene::new(&config, seed, |cluster| match cluster % 4 {
                0 => Before::Stored,
                1 => Before::Compressed,
                2 => Before::Reserved,
                _ => Before::Nothing,
            });
            for point in 1..POINTS {
                let patient = async {
                    request(&scene, point % REQUESTS, (point * 3 + 1) % (clusters - 1)).await;
                };
                let hasty = async |number: u64| {
                    let cluster = (point * 5 + number + seed * 7) % (clusters - 1);
                    give_up_after(point, request(&scene, number, cluster)).await;
                };
                let numbers = [point, point + seed, point + 5].map(|n| n % REQUESTS);
                let hasty = numbers.map(|number| Task::new("hasty", hasty(number)));
                let patient = [Task::new("patient", patient)];
                scene.run(hasty.into_iter().chain(patient).collect());
                scene.crash_quick();
            }
            scene.read_all();
            scene.crash(1);
            scene.close();
        }
    });
}

#[test]
fn a_discard_that_keeps_clusters_loses_none_of_the_others_when_it_is_given_up() {
    play(|seed| {
        // Large enough for a hole in each.
        let kind = Kind { cluster: 4096, size: 256 << 10, ..tiny().kind };
        let config = Config { discard_keeps: true, ..config(kind) };
        let scene = Scene::new(&config, seed, |cluster| match cluster % 2 {
            0 => Before::Stored,
            _ => Before::Compressed,
        });
        for point in 1..8 {
            let sectors = scene.cluster(point * 4).start..scene.cluster(point * 4 + 4).start;
            scene.play(give_up_after(point, scene.discard(sectors)));
        }
        scene.close();
    });
}
