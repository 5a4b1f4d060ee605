//! Lazy refcounts: the dirty bit is there before anybody could need it, goes after
//! nobody does, and a crash during the repair is followed by another repair.

use std::ops::ControlFlow;

use qcow2rs::io::sim::{Crash, FileOptions, Outcome, Rng, SimDisk, SimEngine, Task};

use super::super::imagecheck;
use super::super::layout::{DIRTY, Header, read_guest};
use super::super::random::config;
use super::super::scenario::{Config, open};
use super::super::support::builder::{Cluster, Kind, build};
use super::scene::{Before, Scene};
use super::{extended, play, tiny};

fn lazy(config: Config) -> Config {
    Config { kind: Kind { lazy: true, ..config.kind }, ..config }
}

fn is_dirty(disk: &SimDisk) -> bool {
    let file = disk.file("image").expect("there is an image");
    Header::read(&*file).expect("it has a header").incompatible & DIRTY != 0
}

/// Some of all that changes refcounts.
async fn use_all(scene: &Scene) {
    let half = scene.config().kind.clusters() / 2;
    scene.write_clusters(4..10).await.unwrap();
    scene.write_clusters(half..half + 20).await.unwrap();
    scene.discard(scene.cluster(1)).await.unwrap();
    scene.flush().await.unwrap();
    scene.write_clusters(half + 20..half + 30).await.unwrap();
    scene.zero(scene.cluster(half + 2), true).await.unwrap();
}

#[test]
fn the_dirty_bit_is_durable_before_the_first_pointer() {
    play(|seed| {
        for config in [lazy(tiny()), lazy(extended())] {
            let scene = Scene::new(&config, seed, |cluster| match cluster {
                0..4 => Before::Stored,
                _ => Before::Nothing,
            });
            assert!(!is_dirty(&scene.disk));
            scene.run_crashing(3, vec![Task::new("guest", use_all(&scene))]);
            assert!(is_dirty(&scene.disk));
            scene.crash(2);
            scene.close();
        }
    });
}

#[test]
fn refcounts_are_durable_before_the_dirty_bit_goes() {
    play(|seed| {
        for config in [lazy(tiny()), lazy(extended())] {
            let scene = Scene::new(&config, seed, |_| Before::Nothing);
            scene.play(use_all(&scene));
            let settle = async { scene.settle().await.unwrap() };
            scene.run_crashing(1, vec![Task::new("close", settle)]);
            assert!(!is_dirty(&scene.disk));
            scene.crash_quick();
            scene.close();
        }
    });
}

/// Opens the image, and crashes at every step of that: what is left can be opened,
/// and is exact then; nothing of the guest's has changed.
fn repair_crashing(disk: &SimDisk, config: &Config, seed: u64) {
    let guest = |disk: &SimDisk| {
        let file = disk.file("image").expect("there is an image");
        read_guest(&*file, &Header::read(&*file).expect("it has a header"), None)
    };
    let exact = |disk: &SimDisk| {
        let report = imagecheck::check(&*disk.file("image").expect("there is an image"));
        assert_eq!((report.faults(), report.leaks, report.dirty), (vec![], vec![], false));
    };
    assert!(is_dirty(disk));
    let before = guest(disk);
    let mut rng = Rng::new(seed);
    let repair = Task::new("open", async {
        drop(open(disk, config).await.expect("it can be repaired"));
    });
    let outcome = disk.run_observed(vec![repair], |_| {
        let crash = *rng.pick(&[
            Crash::Process,
            Crash::Power { unit: 512 },
            Crash::Power { unit: 512 },
            Crash::Power { unit: 4096 },
        ]);
        let after = disk.crash(crash, rng.next_u64());
        assert!(guest(&after) == before, "seed {seed}: {crash:?} has changed the disk");
        let image = after.block_on(open(&after, config));
        image.unwrap_or_else(|error| panic!("seed {seed}, {crash:?}: {error:?}"));
        exact(&after);
        assert!(guest(&after) == before, "seed {seed}: the second repair has changed the disk");
        ControlFlow::Continue(())
    });
    assert_eq!(outcome, Outcome::Done);
    exact(disk);
    assert!(guest(disk) == before, "seed {seed}: the repair has changed the disk");
}

#[test]
fn a_crash_during_a_repair_leaves_an_image_that_can_be_repaired() {
    play(|seed| {
        for kind in [tiny().kind, extended().kind, Kind { refcount_bits: 1, ..tiny().kind }] {
            let config = lazy(config(kind));
            let scene = Scene::new(&config, seed, |cluster| match cluster % 4 {
                1 => Before::Stored,
                3 => Before::Reserved,
                _ => Before::Nothing,
            });
            scene.play(use_all(&scene));
            scene.play(scene.flush()).unwrap();
            repair_crashing(&scene.after_crash(), &config, seed);
        }
    });
}

/// Refcount blocks that are missing, refcounts and flags that are anything.
#[test]
fn a_crash_during_the_making_of_refcount_blocks_leaves_none_half_made() {
    play(|seed| {
        let mut rng = Rng::new(seed);
        for snapshot in [false, true] {
            let config = lazy(config(Kind { snapshot, size: 64 << 10, ..tiny().kind }));
            let content = vec![7; 512];
            let mut image = build(config.kind, |_| match rng.below(3) {
                0 => Cluster::Nothing,
                _ => Cluster::Data { bytes: content.clone(), alloc: 1, zero: 0 },
            });
            image[79] |= DIRTY as u8;
            let header = Header::read(&image).unwrap();
            for entry in 0..header.reftable.entries {
                let at = (header.reftable.offset + entry * 8) as usize;
                let block = u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize;
                match rng.below(3) {
                    0 => image[at..at + 8].fill(0),
                    1 if block != 0 => image[block..block + 512].fill(rng.next_u64() as u8),
                    _ => {}
                }
            }
            let disk = SimDisk::new(rng.next_u64());
            disk.create_with("image", FileOptions::default(), &image);
            repair_crashing(&disk, &config, seed);
        }
    });
}

/// A close whose last sync fails leaves a dirty image, or a clean one that is exact.
#[test]
fn a_close_that_fails_leaves_nothing_that_lies() {
    use qcow2rs::io::sim::{Fault, OpKind, Pattern};
    play(|seed| {
        for skip in 0..3 {
            let scene = Scene::new(&lazy(tiny()), seed, |_| Before::Nothing);
            scene.play(use_all(&scene));
            let kind = if seed % 2 == 0 { OpKind::Sync } else { OpKind::Write };
            let pattern = Pattern::any().file("image").kind(kind).after(skip);
            scene.disk.inject(Fault { pattern, errno: libc::EIO, forever: true });
            let closed = scene.play(scene.image.settle(&SimEngine));
            assert!(closed.is_err(), "there are more than {skip}");
            scene.disk.clear_faults();
            for _ in 0..4 {
                scene.crash_quick();
            }
        }
    });
}
