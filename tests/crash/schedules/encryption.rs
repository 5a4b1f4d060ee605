//! Encrypted images: what is moved, and what is written in part, passes through a buffer,
//! and sectors that several write in part are read and written back. And keys: whatever
//! is lost of a change, the image can be opened by the old key or the new one.

use std::ops::ControlFlow;
use std::sync::OnceLock;

use qcow2rs::image::Disk;
use qcow2rs::image::handle::Replacement;
use qcow2rs::io::engine::{Piece, Target};
use qcow2rs::io::sim::{
    Crash, Fault, FileOptions, GuestMut, GuestRef, OpKind, Outcome, Pattern, Rng, SimDisk,
    SimEngine, Task,
};
use qcow2rs::{
    AmendOptions, CreateOptions, EncryptionFormat, EncryptionOptions, ErrorKind, KeySlots,
    KeyState, OpenOptions, Result, Secret, Source,
};

use super::super::imagecheck;
use super::super::random::{SMALL, config};
use super::super::scenario::{Config, Scenario};
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{play, play_some};

fn configs() -> Vec<Config> {
    let small = Kind { encrypted: true, backing: true, ..SMALL };
    let extended = Kind { extended_l2: true, cluster: 16384, size: 512 << 10, ..small };
    let large = Kind { cluster: 4096, size: 500 << 10, ..small };
    let mut direct = config(large);
    direct.alignment = 4096;
    vec![config(small), config(extended), config(large), direct]
}

#[test]
fn what_is_moved_is_durable_and_encrypted_before_its_entry() {
    play(|seed| {
        for mut config in configs() {
            config.kind.snapshot = seed % 2 == 0;
            let scene = Scene::new(&config, seed, |cluster| match cluster % 4 {
                0 => Before::Compressed,
                1 => Before::Stored,
                2 => Before::Reserved,
                _ => Before::Nothing,
            });
            let part = async |cluster| {
                let sectors = scene.cluster(cluster);
                scene.write(sectors.start..sectors.start + 1).await.unwrap();
                scene.write(sectors.end - 1..sectors.end).await.unwrap();
            };
            let tasks = (0..3).map(|first| {
                let (scene, part) = (&scene, &part);
                Task::new(format!("guest {first}"), async move {
                    for cluster in (first..16).step_by(3) {
                        part(cluster).await;
                    }
                    scene.flush().await.unwrap();
                    scene.discard(scene.cluster(first)).await.unwrap();
                    scene.zero(scene.cluster(first + 3), true).await.unwrap();
                    part(first).await;
                })
            });
            scene.run_crashing(20, tasks.collect());
            scene.read_all();
            scene.crash(2);
            scene.close();
        }
    });
}

#[test]
fn random_requests_to_encrypted_images_survive_crashes() {
    play_some(4, |seed| {
        // Each seed another: in quiet, in haste, by queues, with failures.
        let mut config = configs().swap_remove(seed as usize % 4);
        config.give_up = seed / 4 % 2 == 1;
        config.queues = seed / 8 % 2 == 1 || seed % 4 == 0;
        config.faults = seed % 4 == 1;
        let scenario = Scenario::new(config, seed);
        if let Err(failure) = scenario.run() {
            panic!("{}", scenario.report(&failure));
        }
    });
}

/// Parts of one sector, written by several at once, in memory that the oracle of sectors
/// does not know.
#[test]
fn parts_of_a_sector_do_not_undo_each_other() {
    play(|seed| {
        for config in configs() {
            let scene = Scene::new(&config, seed, |_| Before::Stored);
            let part = 512 / 8;
            let image = &scene.image;
            let tasks = (0..8u8).map(|n| {
                Task::new(format!("part {n}"), async move {
                    let bytes = [n + 1; 64];
                    let piece = Piece::Guest(GuestRef::from_slice(&bytes));
                    image.write(&SimEngine, piece, u64::from(n) * part, false).await.unwrap();
                    let mut read = [0; 64];
                    let target = Target::Guest(GuestMut::from_slice(&mut read));
                    image.read(&SimEngine, target, u64::from(n) * part).await.unwrap();
                    assert_eq!(read, bytes, "what was just written");
                })
            });
            let outcome = scene.disk.run_observed(tasks.collect(), |_| ControlFlow::Continue(()));
            assert_eq!(outcome, Outcome::Done);
            let mut sector = [0; 512];
            scene.disk.block_on(async {
                let target = Target::Guest(GuestMut::from_slice(&mut sector));
                image.read(&SimEngine, target, 0).await.unwrap();
            });
            for (n, part) in sector.chunks(64).enumerate() {
                assert!(part.iter().all(|byte| *byte == n as u8 + 1), "part {n}, seed {seed}");
            }
        }
    });
}

// ---------------------------------------------------------------------- keys

const OLD: &str = "old";
const NEW: &str = "new";

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes()).unwrap()
}

/// A LUKS image, quick to open, with a pattern on its disk.
fn luks() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("image");
        let mut options = CreateOptions::default();
        options.encryption = EncryptionOptions::new(EncryptionFormat::Luks, secret(OLD));
        for (name, value) in [
            ("size", "64k"),
            ("cluster_size", "4k"),
            ("encrypt.cipher-alg", "aes-128"),
            ("encrypt.cipher-mode", "cbc"),
            ("encrypt.hash-alg", "sha1"),
            ("encrypt.iter-time", "0"),
        ] {
            options.set(name, value).unwrap();
        }
        let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new()).unwrap();
        image.write_at(&[0x5a; 64 << 10], 0, Default::default()).unwrap();
        image.close().unwrap();
        std::fs::read(&path).unwrap()
    })
}

fn open(disk: &SimDisk, passphrase: &str) -> Result<Disk> {
    let options = OpenOptions::new().writable(true).secret(secret(passphrase));
    let file = disk.file("image").unwrap();
    disk.block_on(Disk::open(&SimEngine, Source::sim(file), &options))
}

/// Whether the passphrase opens the image, which then holds what it held.
fn opens(disk: &SimDisk, passphrase: &str, what: &str) -> bool {
    let image = match open(disk, passphrase) {
        Ok(image) => image,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Encrypted, "{what}: {error}");
            return false;
        }
    };
    let mut bytes = vec![0; 64 << 10];
    disk.block_on(async {
        let target = Target::Guest(GuestMut::from_slice(&mut bytes));
        image.read(&SimEngine, target, 0).await.unwrap();
    });
    assert!(bytes.iter().all(|byte| *byte == 0x5a), "{what}: another key");
    true
}

async fn amend(image: &Disk, keys: KeySlots) -> (Result<()>, Replacement) {
    let mut options = AmendOptions::default();
    options.keys = keys;
    image.amend(&SimEngine, &options, |_| false, &mut |_, _| true).await.into()
}

fn add(slot: u32) -> KeySlots {
    let mut keys = KeySlots::default();
    keys.state = Some(KeyState::Active);
    (keys.slot, keys.new_secret, keys.iter_time) = (Some(slot), Some(secret(NEW)), Some(0));
    keys
}

fn erase(slot: u32) -> KeySlots {
    let mut keys = KeySlots::default();
    (keys.state, keys.slot) = (Some(KeyState::Inactive), Some(slot));
    keys
}

/// An image with the old key, or with both, the new one in this slot.
fn stage(seed: u64, both: Option<u32>) -> (SimDisk, Disk) {
    let disk = SimDisk::new(seed);
    disk.create_with("image", FileOptions::default(), luks());
    let mut image = open(&disk, OLD).unwrap();
    if let Some(slot) = both {
        let (result, replacement) = disk.block_on(amend(&image, add(slot)));
        result.unwrap();
        let Replacement::Disk(next) = replacement else { panic!("it is read again") };
        image = *next;
    }
    (disk, image)
}

#[test]
fn a_crash_leaves_the_old_key_or_the_new() {
    play_some(1, |seed| {
        // Slot 6 lies in both sectors of the header.
        for (slot, keys, both) in
            [(1, add(1), false), (6, add(6), false), (6, erase(6), true), (2, erase(0), true)]
        {
            let (disk, image) = stage(seed, both.then_some(slot));
            let mut rng = Rng::new(seed);
            let mut result = None;
            let what = format!("seed {seed}, {keys:?}");
            let erases_old = keys.slot == Some(0);
            let task = Task::new("amend", async {
                result = Some(amend(&image, keys).await.0);
            });
            let mut step = 0;
            let outcome = disk.run_observed(vec![task], |_| {
                step += 1;
                // Overwriting a key forty times is all the same.
                if step > 12 && step % 16 != 0 {
                    return ControlFlow::Continue(());
                }
                for _ in 0..4 {
                    let crash = *rng.pick(&[Crash::Process, Crash::Power { unit: 512 }]);
                    let left = disk.crash(crash, rng.next_u64());
                    let what = format!("{what}: {crash:?} at step {step}");
                    let stays = if erases_old { NEW } else { OLD };
                    assert!(opens(&left, stays, &what), "{what}: nobody opens it");
                    // The other key is whole, or it is gone; nothing else has changed.
                    opens(&left, if erases_old { OLD } else { NEW }, &what);
                    let report = imagecheck::check(&*left.file("image").unwrap());
                    assert!(report.faults().is_empty(), "{what}: {:?}", report.faults());
                }
                ControlFlow::Continue(())
            });
            assert_eq!(outcome, Outcome::Done);
            result.unwrap().unwrap();
            // What has returned is durable.
            let left = disk.crash(Crash::Power { unit: 512 }, rng.next_u64());
            assert_eq!(opens(&left, NEW, &what), erases_old || !both, "{what}");
            assert_eq!(opens(&left, OLD, &what), !erases_old, "{what}");
        }
    });
}

/// A power loss that spares of the material what it will, once the slot is said to have
/// a key; and that spares the slot, once its material is overwritten.
#[test]
fn a_key_slot_never_says_what_its_material_does_not() {
    play_some(2, |seed| {
        for (keys, both) in [(add(1), false), (erase(1), true)] {
            let (disk, image) = stage(seed, both.then_some(1));
            let mut rng = Rng::new(seed);
            let what = format!("seed {seed}, {keys:?}");
            let mut done = None;
            let task = Task::new("amend", async {
                done = Some(amend(&image, keys).await.0);
            });
            let mut steps = 0;
            disk.run_observed(vec![task], |_| {
                steps += 1;
                if steps > 14 {
                    return ControlFlow::Break(());
                }
                for _ in 0..6 {
                    let left = disk.crash(Crash::Power { unit: 512 }, rng.next_u64());
                    let slots = open(&left, OLD).unwrap().info().unwrap().qcow2.unwrap();
                    let active = slots.luks.unwrap().slots[1].active;
                    let what = format!("{what}: step {steps}");
                    assert_eq!(opens(&left, NEW, &what), active, "{what}");
                }
                ControlFlow::Continue(())
            });
        }
    });
}

#[test]
fn a_change_of_keys_that_fails_leaves_the_old_key() {
    play_some(1, |seed| {
        for kind in [OpKind::Write, OpKind::Sync] {
            for index in 0..6 {
                for (keys, both) in [(add(1), false), (erase(1), true)] {
                    let (disk, image) = stage(seed, both.then_some(1));
                    let pattern = Pattern::any().file("image").kind(kind).after(index);
                    let (errno, forever) = (libc::EIO, index % 2 == 0);
                    disk.inject(Fault { pattern, errno, forever });
                    let what = format!("seed {seed}, {keys:?}: {kind:?} {index}");
                    let (result, _) = disk.block_on(amend(&image, keys));
                    disk.clear_faults();
                    assert!(opens(&disk, OLD, &what), "{what}: {result:?}");
                }
            }
        }
    });
}
