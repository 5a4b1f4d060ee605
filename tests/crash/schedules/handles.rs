//! One file opened again, and syncs of several requests: what one handle, or one
//! request, has left undone is not taken for done by the next.

use qcow2rs::image::Disk;
use qcow2rs::io::engine::Piece;
use qcow2rs::io::sim::{
    Crash, Fault, FileOptions, GuestRef, OpKind, Pattern, Rng, SimDisk, SimEngine, Task,
};
use qcow2rs::{Format, OpenOptions, Source};

use super::scene::{Before, Scene};
use super::{extended, play, tiny};

#[test]
fn the_first_flush_makes_durable_what_a_handle_before_has_written() {
    play(|seed| {
        for config in [tiny(), extended()] {
            let scene = Scene::new(&config, seed, |_| Before::Stored);
            scene.play(scene.write(0..4)).unwrap();
            // Given up without a flush, as by a process that is killed: what was
            // written in place is there to be read, but not durable.
            let Scene { disk, oracle, image, .. } = scene;
            drop(image);
            let scene = Scene::on(&config, seed, disk, oracle.into_inner(), Rng::new(seed));
            scene.play(async {
                scene.read(0..4).await.unwrap();
                scene.flush().await.unwrap();
            });
            for _ in 0..10 {
                scene.crash_quick();
            }
            scene.close();
        }
    });
}

#[test]
fn no_flush_of_a_raw_image_succeeds_beside_or_after_one_that_failed() {
    play(|seed| {
        let disk = SimDisk::new(seed);
        let file = disk.create_with("raw", FileOptions::default(), &[0; 4096]);
        let options = OpenOptions::new().format(Format::Raw).writable(true);
        let open = Disk::open(&SimEngine, Source::sim(file), &options);
        let image = disk.block_on(open).expect("it can be opened");
        let data = [7; 512];
        let write = image.write(&SimEngine, Piece::Guest(GuestRef::from_slice(&data)), 0, false);
        disk.block_on(write).expect("it can be written");
        // The system tells one of those who sync that data is lost.
        let pattern = Pattern::any().file("raw").kind(OpKind::Sync);
        disk.inject(Fault { pattern, errno: libc::EIO, forever: false });
        let flushes = [0, 1, 2].map(|n| {
            let (image, disk) = (&image, &disk);
            Task::new(["first", "second", "third"][n], async move {
                if image.flush(&SimEngine).await.is_ok() {
                    for crash in 0..4 {
                        let after = disk.crash(Crash::Power { unit: 512 }, crash);
                        let mut bytes = [0; 512];
                        after.file("raw").expect("it is there").peek(0, &mut bytes);
                        assert_eq!(bytes, data, "a flush has succeeded");
                    }
                }
            })
        });
        disk.run(flushes.into());
    });
}
