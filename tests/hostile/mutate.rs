//! Random damage: bytes of headers and tables of small sound images are changed,
//! and then everything is done with the image that one can do. No panic, bounded
//! memory and work, and no guest data where metadata is.

use qcow2rs::{ErrorKind, Image};

use crate::images::{ALL, CHANGES, GUEST, Kind, MEMORY, change, image, open, options};
use crate::memory::peak;
use crate::support::damage::{assert_no_data_in_metadata, damage, targets};
use crate::support::dissect::Dissected;
use crate::support::memory_disk::MemoryDisk;
use crate::support::{Rng, describe, for_seeds};

/// Does everything, anywhere. Errors are fine; what follows them must agree.
fn use_it(image: &Image, rng: &mut Rng) {
    let size = image.size().min(1 << 20);
    let (mut corrupt, writable) = (false, image.info().unwrap().writable);
    let mut buf = vec![0; 64 << 10];
    for _ in 0..40 {
        let at = rng.below(size.max(1));
        let len = (1 << rng.below(16)).min(size - at.min(size));
        let at = if rng.below(2) == 0 { at } else { at & !4095 };
        let done = match rng.below(9) {
            kind @ 0..=6 if len > 1 => change(image, CHANGES[(kind % 5) as usize], at, len),
            7 => image.flush(),
            _ => image.read_at(&mut buf[..len as usize], at),
        };
        match done.map_err(|error| error.kind()) {
            Err(ErrorKind::Corrupt) => corrupt = true,
            Err(ErrorKind::Shutdown) => assert!(corrupt, "nothing was wrong before"),
            Err(ErrorKind::ReadOnly) => assert!(!writable),
            Err(ErrorKind::InvalidArgument) => assert!(at + len > image.size()),
            Ok(())
            | Err(
                ErrorKind::DataLost
                | ErrorKind::NoSpace
                | ErrorKind::Callback(_)
                | ErrorKind::Os(_),
            ) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    let mut at = 0;
    while at < size {
        let piece = (size - at).min(64 << 10);
        let _ = image.read_at(&mut buf[..piece as usize], at);
        at += piece;
    }
    let _ = image.block_status(0, size, false, 1000, &mut |_| {});
    image.info_json().unwrap();
}

fn try_one(kind: Kind, rng: &mut Rng) {
    let mut spoiled = image(kind);
    let places = targets(&spoiled);
    damage(&mut spoiled, &places, rng);
    let disk = MemoryDisk::new(&spoiled.bytes);
    if let Ok(reader) = open(&disk, &options(false)) {
        use_it(&reader, rng);
        assert_eq!(disk.writes(), 0, "a reader has written");
    }
    let disk = MemoryDisk::new(&spoiled.bytes);
    let Ok(image) = open(&disk, &options(true)) else { return };
    let (_, bytes) = peak(|| {
        use_it(&image, rng);
        let _ = image.close();
    });
    assert!(bytes < MEMORY, "{bytes} bytes of memory");
    assert!(disk.reads().0 < 50_000, "{} reads", disk.reads().0);

    assert_no_data_in_metadata(&spoiled, &Dissected::of(disk.bytes()), GUEST);
}

#[test]
fn damaged_images_do_no_harm() {
    for_seeds("hostile", 40, |seed| {
        for (number, kind) in ALL.into_iter().enumerate() {
            let mut rng = Rng::new(seed * 100 + number as u64);
            describe(format!("{kind:?}"), || {
                for _ in 0..6 {
                    try_one(kind, &mut rng);
                }
            });
        }
    });
}
