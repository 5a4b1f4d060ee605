//! New tables: L2 tables that are made, copied and made room for; refcounts that
//! are written back from two sides.

use qcow2rs::io::sim::{OpKind, Pattern, Stage, Task};

use super::super::layout::Header;
use super::super::random::config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{over_backing, play, tiny};

#[test]
fn two_writes_that_need_the_same_table_make_one() {
    play(|seed| {
        let scene = Scene::new(&tiny(), seed, |_| Before::Nothing);
        let writer = async |cluster| scene.write(scene.cluster(cluster)).await.unwrap();
        let writers = (64..72).map(|n| Task::new(format!("writer {n}"), writer(n)));
        scene.run(writers.collect());
        scene.read_all();
        scene.crash(1);
        scene.close();
    });
}

#[test]
fn a_table_that_is_being_copied_is_seen_by_nobody() {
    play(|seed| {
        let kind = Kind { snapshot: true, size: 64 << 10, ..tiny().kind };
        let scene = Scene::new(&config(kind), seed, |_| Before::Stored);
        // The first write is that of the table.
        let hold = scene.hold(OpKind::Write);
        scene.run(vec![
            Task::new("writer", async {
                scene.write(scene.cluster(1)).await.unwrap();
            }),
            Task::new("reader", async {
                assert!(hold.caught().await);
                scene.read(scene.cluster(2)).await.unwrap();
                hold.release();
            }),
        ]);
        scene.read_all();
        scene.crash(1);
        scene.close();
    });
}

#[test]
fn what_leaves_a_full_cache_points_to_what_is_durable() {
    play(|seed| {
        for config in [over_backing().swap_remove(0), tiny()] {
            let scene = Scene::new(&config, seed, |_| Before::Nothing);
            scene.run_crashing(
                1,
                vec![Task::new("guest", async {
                    // From table to table, of which two fit; nobody flushes.
                    for step in 0..24 {
                        scene.write(scene.cluster(step * 67 % 256)).await.unwrap();
                    }
                })],
            );
            scene.read_all();
            scene.crash(1);
            scene.close();
        }
    });
}

#[test]
fn an_older_copy_of_refcounts_does_not_overwrite_a_newer_one() {
    play(|seed| {
        // A run is half of what a refcount block counts; two blocks fit in the cache.
        let kind = Kind { cluster: 4096, size: 8 << 20, ..tiny().kind };
        let scene = Scene::new(&config(kind), seed, |_| Before::Nothing);
        let table = Header::read(&*scene.file()).unwrap().reftable.offset;
        let block = table + kind.cluster;
        let writes = Pattern::any().file("image").kind(OpKind::Write);
        let hold = scene.disk.hold(writes.touching(block..block + kind.cluster), Stage::Apply);
        scene.run(vec![
            Task::new("flusher", async {
                scene.write(scene.cluster(0)).await.unwrap();
                scene.flush().await.unwrap();
            }),
            Task::new("writer", async {
                assert!(hold.caught().await);
                hold.close();
                // The other half, then so many more blocks that room has to be made.
                scene.write_clusters(1..1100).await.unwrap();
                hold.release();
            }),
        ]);
        scene.play(scene.flush()).unwrap();
        scene.crash(1);
        scene.close();
    });
}
