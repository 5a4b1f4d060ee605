//! The order in which things reach the file.

use std::sync::{Arc, Mutex};

use qcow2rs::{Image, OpenOptions, WriteFlags, ZeroFlags};

use crate::support::dissect::Dissected;
use crate::support::memory_disk::{MemoryDisk, Request};
use crate::support::{Rng, Scratch, describe, for_seeds, qemu_create, refcounts, smallest_caches};

/// A small image with many tables, and caches that hold next to nothing.
fn tiny(extended: bool) -> (Vec<u8>, OpenOptions) {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let options = if extended { "cluster_size=16k,extended_l2=on" } else { "cluster_size=512" };
    qemu_create(&path, options, 256 << 10);
    let mut options = OpenOptions::new().writable(true);
    smallest_caches(&mut options);
    (std::fs::read(&path).unwrap(), options)
}

/// Does something, anywhere on a disk of 256 KiB.
fn step(image: &Image, rng: &mut Rng) {
    let at = rng.below(250 << 10);
    let len = 1 + rng.below(6000);
    match rng.below(8) {
        0 => image.discard(at, len).unwrap(),
        1 => {
            let flags = ZeroFlags { may_unmap: rng.below(2) == 0, ..Default::default() };
            image.write_zeroes(at, len, flags).unwrap();
        }
        2 => image.flush().unwrap(),
        _ => image.write_at(&vec![7; len as usize], at, WriteFlags::default()).unwrap(),
    }
}

#[test]
fn a_process_that_dies_leaves_nothing_that_is_not_counted() {
    // Others wrote pointers to new tables before the refcounts: the next program
    // took the table for free space.
    for_seeds("peers", 4, |seed| {
        for extended in [false, true] {
            let (bytes, options) = tiny(extended);
            let file = Arc::new(Mutex::new(bytes.clone()));
            let seen = file.clone();
            // Each write is the last that reaches the file.
            let disk = MemoryDisk::with_hook(&bytes, move |request| {
                if let Request::Write(data, at) = request {
                    let mut file = seen.lock().unwrap();
                    let (start, end) = (at as usize, at as usize + data.len());
                    let length = file.len().max(end);
                    file.resize(length, 0);
                    file[start..end].copy_from_slice(data);
                    let low = refcounts::counted_too_low(&Dissected::of(file.clone()));
                    assert!(low.is_empty(), "after a write to {at:#x}: {low:?}");
                }
                Ok(())
            });
            let image = Image::open(disk.source(), &options).unwrap();
            let mut rng = Rng::new(seed);
            describe(format!("extended: {extended}"), || {
                (0..60).for_each(|_| step(&image, &mut rng));
            });
            image.close().unwrap();
            assert!(refcounts::faults(&Dissected::of(disk.bytes())).is_empty());
        }
    });
}

#[test]
fn one_call_makes_data_and_the_way_to_it_durable() {
    // Elsewhere a sync forgot the metadata, or a flush the sync.
    for extended in [false, true] {
        let (bytes, options) = tiny(extended);
        // What is in the file at the time of each sync.
        let durable = Arc::new(Mutex::new(bytes.clone()));
        let file = Arc::new(Mutex::new(bytes.clone()));
        let (all, kept) = (file.clone(), durable.clone());
        let disk = MemoryDisk::with_hook(&bytes, move |request| {
            match request {
                Request::Write(data, at) => {
                    let mut file = all.lock().unwrap();
                    let length = file.len().max(at as usize + data.len());
                    file.resize(length, 0);
                    file[at as usize..][..data.len()].copy_from_slice(data);
                }
                Request::Flush => kept.lock().unwrap().clone_from(&all.lock().unwrap()),
                _ => {}
            }
            Ok(())
        });
        let image = Image::open(disk.source(), &options).unwrap();
        for (number, at) in [0u64, 100_000, 200_000].into_iter().enumerate() {
            let data = [number as u8 + 1; 777];
            let flags = WriteFlags { fua: number == 2, ..Default::default() };
            image.write_at(&data, at, flags).unwrap();
            if number < 2 {
                image.flush().unwrap();
            }
            let left = MemoryDisk::new(&durable.lock().unwrap());
            let left = Image::open(left.source(), &OpenOptions::new()).unwrap();
            let mut found = [0; 777];
            left.read_at(&mut found, at).unwrap();
            assert_eq!(found, data, "extended: {extended}");
        }
    }
}
