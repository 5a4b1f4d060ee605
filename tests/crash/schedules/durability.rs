//! What is on the medium, and in which order it gets there: a crash after every
//! few steps of what would go wrong if one sync were missing.

use std::cell::RefCell;
use std::ops::ControlFlow;

use qcow2rs::io::sim::{Crash, Fault, OpKind, Pattern, Stage, Task};
use qcow2rs::{ErrorKind, Result};

use super::super::images_taken::crash_image;
use super::super::layout::Header;
use super::super::random::config;
use super::super::scenario::open;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{extended, over_backing, play, tiny};

fn kind(result: Result<()>) -> ErrorKind {
    result.expect_err("it should fail").kind()
}

#[test]
fn a_freed_cluster_is_not_used_again_before_its_drop_is_durable() {
    play(|seed| {
        let scene = Scene::new(&tiny(), seed, |cluster| match cluster {
            0..8 => Before::Stored,
            8..16 => Before::Compressed,
            _ => Before::Nothing,
        });
        scene.run_crashing(
            40,
            vec![Task::new("guest", async {
                // Freed by a discard, by zeroes, by being rewritten elsewhere. The
                // L2 cache is too small: some of it is written back early.
                scene.discard(scene.cluster(1)).await.unwrap();
                scene.zero(scene.cluster(2), true).await.unwrap();
                scene.write_clusters(8..12).await.unwrap();
                scene.write_clusters(64..256).await.unwrap();
                scene.discard(scene.cluster(5)).await.unwrap();
                scene.write_clusters(20..60).await.unwrap();
            })],
        );
        scene.read_all();
        scene.crash(2);
        scene.close();
    });
}

#[test]
fn what_is_copied_is_durable_before_the_entry_that_points_to_it() {
    play(|seed| {
        for config in over_backing() {
            let scene = Scene::new(&config, seed, |cluster| match cluster % 4 {
                0 => Before::Compressed,
                _ => Before::Nothing,
            });
            let clusters = config.kind.clusters();
            let part = async |cluster| {
                let start = scene.cluster(cluster).start;
                scene.write(start..start + 1).await.unwrap();
            };
            scene.run_crashing(
                4,
                vec![
                    Task::new("first half", async {
                        for cluster in 0..6 {
                            part(cluster).await;
                        }
                        scene.flush().await.unwrap();
                    }),
                    Task::new("second half", async {
                        for cluster in clusters / 2..clusters / 2 + 6 {
                            part(cluster).await;
                            if cluster % 3 == 2 {
                                scene.flush().await.unwrap();
                            }
                        }
                    }),
                ],
            );
            scene.read_all();
            scene.crash(2);
            scene.close();
        }
    });
}

#[test]
fn data_is_durable_before_an_entry_leads_to_where_other_data_was() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let at = |cluster| if cluster < 8 { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            scene.play(async {
                scene.file().set_options(|options| options.punch = false);
                scene.discard(0..scene.cluster(4).start).await.unwrap();
                scene.settle().await.unwrap();
                // From here on the clusters are counted durably: nothing but the data
                // asks for order.
                scene.write_fua(scene.cluster(9), true).await.unwrap();
            });
            scene.run_crashing(
                1,
                vec![Task::new("guest", async {
                    for cluster in 10..13 {
                        scene.write(scene.cluster(cluster)).await.unwrap();
                    }
                    scene.flush().await.unwrap();
                })],
            );
            scene.crash(1);
            scene.close();
        }
    });
}

#[test]
fn an_entry_that_changes_while_a_flush_syncs_waits_for_the_next_flush() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let at = |cluster| if cluster < 4 { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            scene.play(async {
                scene.file().set_options(|options| options.punch = false);
                scene.discard(0..scene.cluster(4).start).await.unwrap();
                scene.settle().await.unwrap();
                scene.write_fua(scene.cluster(10), true).await.unwrap();
                scene.write(scene.cluster(8)).await.unwrap();
            });
            let hold = scene.hold(OpKind::Sync);
            scene.run(vec![
                Task::new("flusher", async {
                    scene.flush().await.unwrap();
                }),
                Task::new("writer", async {
                    assert!(hold.caught().await);
                    hold.close();
                    // To the same slice, after its copy was taken.
                    scene.write(scene.cluster(9)).await.unwrap();
                    hold.release();
                }),
            ]);
            for _ in 0..40 {
                scene.crash_quick();
            }
            scene.crash(1);
            scene.close();
        }
    });
}

#[test]
fn a_table_that_a_snapshot_shares_is_copied_before_it_is_pointed_to() {
    play(|seed| {
        for kind in [tiny().kind, extended().kind] {
            let config = config(Kind { snapshot: true, size: kind.size / 2, ..kind });
            let clusters = config.kind.clusters();
            let at = |cluster| if cluster % 2 == 0 { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            scene.run_crashing(
                8,
                vec![Task::new("guest", async {
                    for cluster in (0..clusters).step_by(clusters as usize / 4) {
                        let start = scene.cluster(cluster).start;
                        scene.write(start..start + 1).await.unwrap();
                        scene.write(scene.cluster(cluster + 1)).await.unwrap();
                        scene.flush().await.unwrap();
                        scene.discard(scene.cluster(cluster + 2)).await.unwrap();
                    }
                })],
            );
            scene.read_all();
            scene.crash(2);
            scene.close();
        }
    });
}

#[test]
fn a_shared_table_is_copied_durably_also_where_only_a_discard_needs_a_copy() {
    play(|seed| {
        let config = config(Kind { snapshot: true, ..tiny().kind });
        let scene = Scene::new(&config, seed, |_| Before::Stored);
        let clusters = config.kind.clusters();
        // The clusters are counted durably: nothing but the copies asks for order.
        scene.play(scene.write_fua(0..1, true)).unwrap();
        scene.run_crashing(
            1,
            vec![Task::new("guest", async {
                for cluster in [clusters / 4, clusters / 2, clusters * 3 / 4] {
                    scene.discard(scene.cluster(cluster)).await.unwrap();
                    scene.flush().await.unwrap();
                }
            })],
        );
        scene.crash(1);
        scene.close();
    });
}

#[test]
fn a_table_where_other_data_was_is_empty_before_it_is_pointed_to() {
    play(|seed| {
        let at = |cluster| if cluster < 40 { Before::Stored } else { Before::Nothing };
        let scene = Scene::new(&tiny(), seed, at);
        let clusters = scene.config().kind.clusters();
        scene.play(async {
            scene.file().set_options(|options| options.punch = false);
            scene.discard(0..scene.cluster(20).start).await.unwrap();
            scene.settle().await.unwrap();
            scene.write_fua(scene.cluster(41), true).await.unwrap();
        });
        scene.run_crashing(
            1,
            vec![Task::new("guest", async {
                // Only the tables are new: nothing is pointed to from them.
                for cluster in [clusters / 4, clusters / 2, clusters * 3 / 4] {
                    scene.zero(scene.cluster(cluster), true).await.unwrap();
                    scene.flush().await.unwrap();
                }
            })],
        );
        scene.crash(1);
        scene.close();
    });
}

#[test]
fn a_larger_refcount_table_is_durable_before_the_header_names_it() {
    play(|seed| {
        let config = config(Kind { crowded: true, ..tiny().kind });
        let scene = Scene::new(&config, seed, |_| Before::Nothing);
        // The switch is visible, and may be durable or not.
        let header = Pattern::any().file("image").kind(OpKind::Write).touching(0..512);
        let hold = scene.disk.hold(header, Stage::Complete);
        scene.run(vec![
            Task::new("guest", async {
                scene.write_clusters(0..40).await.unwrap();
            }),
            Task::new("power", async {
                assert!(hold.caught().await);
                (0..16).for_each(|_| scene.crash_quick());
                hold.release();
            }),
        ]);
        // What was the old table is used for data; no flush has come by.
        (0..16).for_each(|_| scene.crash_quick());
        scene.read_all();
        scene.crash(2);
        scene.close();
    });
}

#[test]
fn refcount_blocks_and_larger_tables_are_complete_before_they_are_named() {
    play(|seed| {
        // New blocks, one after the other; a new table, at once.
        for (crowded, clusters, every) in [(false, 200, 1), (true, 40, 2)] {
            let config = config(Kind { crowded, ..tiny().kind });
            let scene = Scene::new(&config, seed, |_| Before::Nothing);
            let table = Header::read(&*scene.file()).unwrap().reftable.offset;
            scene.run_crashing(
                every,
                vec![Task::new("guest", async {
                    scene.write_clusters(0..clusters / 2).await.unwrap();
                    scene.flush().await.unwrap();
                    scene.write_clusters(clusters / 2..clusters).await.unwrap();
                    scene.flush().await.unwrap();
                })],
            );
            let now = Header::read(&*scene.file()).unwrap().reftable.offset;
            assert_eq!(now != table, crowded, "a table that grows moves");
            scene.read_all();
            scene.crash(1);
            scene.close();
        }
    });
}

#[test]
fn a_second_crash_while_the_first_is_recovered_from_does_no_more_harm() {
    play(|seed| {
        let scene = Scene::new(&tiny(), seed, |cluster| match cluster {
            0..8 => Before::Stored,
            _ => Before::Nothing,
        });
        scene.play(async {
            scene.write_clusters(16..40).await.unwrap();
            scene.flush().await.unwrap();
            scene.discard(scene.cluster(20)).await.unwrap();
            scene.write_clusters(100..140).await.unwrap();
        });
        // What was written and lost lies where the next life allocates.
        for _ in 0..4 {
            let second = scene.crash_and_open();
            second.run_crashing(
                16,
                vec![Task::new("guest", async {
                    second.write_clusters(200..204).await.unwrap();
                    second.zero(second.cluster(17), true).await.unwrap();
                    second.settle().await.unwrap();
                })],
            );
            second.crash(1);
            let third = second.crash_and_open();
            third.read_all();
            third.play(third.settle()).unwrap();
            third.crash_quick();
        }
    });
}

/// Where the header keeps its autoclear bits.
const AUTOCLEAR: usize = 88;

#[test]
fn bits_that_a_writer_must_clear_are_clear_before_anything_changes() {
    play(|seed| {
        let patch = |image: &mut Vec<u8>| image[AUTOCLEAR] = 0x80;
        let scene = Scene::with(&tiny(), seed, |_| {}, patch, |_| Before::Stored);
        let autoclear = |scene: &Scene| scene.file().bytes()[AUTOCLEAR];
        assert_eq!(autoclear(&scene), 0);
        for _ in 0..20 {
            assert_eq!(autoclear(&scene.crash_and_open()), 0);
            let after = crash_image(&scene.disk, Crash::Power { unit: 512 }, seed);
            assert_eq!(after.file("image").unwrap().bytes()[AUTOCLEAR], 0, "not durable");
        }
        scene.close();
    });
}

/// Whoever cleared them was killed before its sync: they are clear only to see.
#[test]
fn bits_that_a_killed_writer_cleared_are_clear_before_anything_changes() {
    play(|seed| {
        let patch = |image: &mut Vec<u8>| image[AUTOCLEAR] = 0x80;
        let before = |_| Before::Stored;
        let (disk, oracle, mut rng) = Scene::prepare(&tiny(), seed, |_| {}, patch, before);
        let killed = RefCell::new(Vec::new());
        let opening = Task::new("open", async {
            drop(open(&disk, &tiny()).await.unwrap());
        });
        disk.run_observed(vec![opening], |step| {
            let after = crash_image(&disk, Crash::Process, step);
            if after.file("image").unwrap().bytes()[AUTOCLEAR] == 0 {
                killed.borrow_mut().push(after);
            }
            ControlFlow::Continue(())
        });
        assert!(killed.borrow().len() > 1);
        for disk in killed.take() {
            let scene = Scene::on(&tiny(), seed, disk, oracle.clone(), rng.fork());
            scene.play(scene.write(0..1)).unwrap();
            for _ in 0..10 {
                scene.crash_quick();
            }
            scene.close();
        }
    });
}

#[test]
fn after_a_failed_sync_nothing_is_taken_for_durable() {
    play(|seed| {
        let scene = Scene::new(&tiny(), seed, |_| Before::Stored);
        scene.play(async {
            scene.write(0..4).await.unwrap();
            scene.flush().await.unwrap();
            scene.write(2..6).await.unwrap();
            scene.discard(8..9).await.unwrap();
            // The system forgets what was to be written; the next sync succeeds.
            let pattern = Pattern::any().file("image").kind(OpKind::Sync);
            scene.disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
            assert_eq!(kind(scene.flush().await), ErrorKind::FlushFailed);
            assert_eq!(kind(scene.flush().await), ErrorKind::FlushFailed);
            assert_eq!(kind(scene.write(0..1).await), ErrorKind::FlushFailed);
            assert_eq!(kind(scene.zero(0..1, true).await), ErrorKind::FlushFailed);
            assert_eq!(kind(scene.discard(0..1).await), ErrorKind::FlushFailed);
            assert_eq!(kind(scene.settle().await), ErrorKind::FlushFailed);
        });
        scene.read_all();
        scene.crash(4);
    });
}

#[test]
fn nothing_is_named_on_the_word_of_a_sync_that_comes_after_a_failed_one() {
    play(|seed| {
        let config = config(Kind { crowded: true, ..tiny().kind });
        let before = |cluster| if cluster == 100 { Before::Stored } else { Before::Nothing };
        let scene = Scene::new(&config, seed, before);
        // The flush has something to sync.
        scene.play(scene.write(scene.cluster(100))).unwrap();
        // A larger refcount table is written and waits for its sync; a flush has one
        // that fails: the system forgets both.
        let hold = scene.hold(OpKind::Sync);
        scene.run(vec![
            Task::new("writer", async {
                let _ = scene.write_clusters(0..64).await;
            }),
            Task::new("flusher", async {
                assert!(hold.caught().await);
                hold.close();
                let pattern = Pattern::any().file("image").kind(OpKind::Sync);
                scene.disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
                let _ = scene.flush().await;
                hold.release();
            }),
        ]);
        for _ in 0..20 {
            scene.crash_quick();
        }
    });
}

#[test]
fn a_write_that_is_to_be_durable_is_so_when_it_returns() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let at = |cluster| if cluster < 4 { Before::Stored } else { Before::Nothing };
            let scene = Scene::new(&config, seed, at);
            for cluster in [1, 6] {
                let sectors = scene.cluster(cluster);
                scene.play(scene.write_fua(sectors.start..sectors.start + 2, true)).unwrap();
                scene.crash(2);
            }
            scene.close();
        }
    });
}
