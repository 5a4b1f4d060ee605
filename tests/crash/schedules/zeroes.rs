//! Zeroes over a backing file: what has been made zero, or given up, must hide
//! what is below, also after a crash.

use qcow2rs::io::engine::Target;
use qcow2rs::io::sim::{GuestMut, SimEngine};

use super::super::random::config;
use super::super::support::builder::Kind;
use super::scene::{Before, Scene};
use super::{over_backing, play};

fn read(scene: &Scene, sector: u64) -> [u8; 512] {
    let mut bytes = [0xee; 512];
    let target = Target::Guest(GuestMut::from_slice(&mut bytes));
    scene.play(scene.image.read(&SimEngine, target, sector * 512)).unwrap();
    bytes
}

#[test]
fn zeroes_hide_the_backing_file_and_go_on_to_do_so_after_a_crash() {
    play(|seed| {
        let mut configs = over_backing();
        configs.push(config(Kind { version: 2, ..configs[0].kind }));
        for config in configs {
            let (before, unmap) =
                ([Before::Nothing, Before::Stored, Before::Compressed], [false, true]);
            let clusters = config.kind.clusters();
            let scene = Scene::new(&config, seed, |cluster| before[cluster as usize % 3]);
            let mut made_zero = Vec::new();
            for (index, may_unmap) in (0..clusters / 8).zip(unmap.into_iter().cycle()) {
                // Whole clusters, their parts, and what crosses from one to the next.
                let sectors = scene.cluster(index * 8 + index % 3);
                let sectors = match index % 4 {
                    0 => sectors,
                    1 => sectors.start..sectors.start + 1,
                    2 => sectors.end - 1..sectors.end + 1,
                    _ => sectors.start..sectors.end + 1,
                };
                scene.play(scene.zero(sectors.clone(), may_unmap)).unwrap();
                made_zero.extend(sectors);
            }
            scene.play(scene.flush()).unwrap();
            scene.crash(2);
            let after = scene.crash_and_open();
            for sector in made_zero {
                assert_eq!(read(&scene, sector), [0; 512], "sector {sector:#x}");
                assert_eq!(read(&after, sector), [0; 512], "sector {sector:#x} after a crash");
            }
            scene.close();
        }
    });
}

#[test]
fn what_was_stored_and_is_discarded_does_not_show_the_backing_file() {
    play(|seed| {
        let mut configs = over_backing();
        configs.push(config(Kind { version: 2, ..configs[0].kind }));
        for config in configs {
            let clusters = config.kind.clusters();
            let before = [Before::Nothing, Before::Stored, Before::Compressed, Before::Stored];
            let scene = Scene::new(&config, seed, |cluster| before[cluster as usize % 4]);
            let below: Vec<_> = (0..scene.sectors()).map(|sector| read(&scene, sector)).collect();
            scene.play(async {
                for cluster in 0..clusters / 2 {
                    scene.discard(scene.cluster(cluster)).await.unwrap();
                }
                scene.flush().await.unwrap();
            });
            // Each sector is as it was, or zero: never the old data of another.
            for sector in 0..scene.cluster(clusters / 2).start {
                let now = read(&scene, sector);
                assert!(now == [0; 512] || now == below[sector as usize], "sector {sector:#x}");
            }
            scene.read_all();
            scene.crash(2);
            scene.close();
        }
    });
}
