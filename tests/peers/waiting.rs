//! Who waits for whom: requests are held up in the storage, and others must get
//! through, or must not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use qcow2rs::{Image, OpenOptions, WriteFlags, ZeroFlags};

use crate::support::dissect::{Dissected, OFFSET};
use crate::support::memory_disk::{Gate, MemoryDisk, Request};
use crate::support::{Scratch, qemu_create, qemu_io, read, refcounts};

fn made(options: &str, commands: &[&str]) -> Dissected {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, options, 1 << 20);
    qemu_io(&path, &commands.iter().map(ToString::to_string).collect::<Vec<_>>());
    Dissected::load(&path)
}

fn open(disk: &MemoryDisk) -> Image {
    Image::open(disk.source(), &OpenOptions::new().writable(true)).unwrap()
}

fn write(image: &Image, at: u64, data: &[u8]) {
    image.write_at(data, at, WriteFlags::default()).unwrap();
}

fn check(disk: &MemoryDisk) {
    let faults = refcounts::faults(&Dissected::of(disk.bytes()));
    assert!(faults.is_empty(), "{faults:?}");
}

const LAYOUTS: [&str; 2] = ["cluster_size=64k", "cluster_size=64k,extended_l2=on"];

/// An image whose requests stop at the gate if `stops` says so; while one stops
/// there, `meanwhile` runs.
fn held(
    image: &Dissected,
    stops: impl Fn(&Request<'_>) -> bool + Send + Sync + 'static,
    request: impl FnOnce(&Image) + Send,
    meanwhile: impl FnOnce(&Image),
) -> (Image, MemoryDisk) {
    let gate = Gate::new();
    let in_hook = gate.clone();
    let disk = MemoryDisk::with_hook(&image.bytes, move |request| {
        if stops(&request) {
            in_hook.pass();
        }
        Ok(())
    });
    let image = open(&disk);
    gate.close();
    std::thread::scope(|scope| {
        let held = scope.spawn(|| request(&image));
        gate.wait_for_one();
        meanwhile(&image);
        gate.open();
        held.join().unwrap();
    });
    (image, disk)
}

/// A write of this byte.
fn writes(byte: u8) -> impl Fn(&Request<'_>) -> bool {
    move |request| matches!(request, Request::Write(data, _) if data[data.len() / 2] == byte)
}

#[test]
fn requests_go_on_during_a_sync() {
    let sound = made("", &["write -P 1 0 64k"]);
    let (image, disk) = held(
        &sound,
        |request| matches!(request, Request::Flush),
        |image| {
            write(image, 0, &[2; 512]);
            image.flush().unwrap();
        },
        |image| {
            assert_eq!(read(image, 4096, 512), [1; 512]);
            write(image, 4096, &[3; 512]);
            write(image, 512 << 10, &[4; 512]);
            assert_eq!(read(image, 512 << 10, 512), [4; 512]);
        },
    );
    image.close().unwrap();
    check(&disk);
}

#[test]
fn a_hit_does_not_wait_for_somebody_elses_miss() {
    let sound = made("cluster_size=512", &["write -P 1 0 256k"]);
    let other = sound.l1(1) & OFFSET;
    let (image, _) = held(
        &sound,
        move |request| matches!(request, Request::Read(_, at) if *at == other),
        |image| assert_eq!(read(image, 40 << 10, 512), [1; 512]),
        |image| {
            assert_eq!(read(image, 0, 512), [1; 512]);
            write(image, 0, &[2; 512]);
            assert_eq!(read(image, 0, 512), [2; 512]);
        },
    );
    image.close().unwrap();
}

#[test]
fn allocating_writes_under_one_table_do_not_wait_for_each_other() {
    for layout in LAYOUTS {
        let (image, disk) = held(
            &made(layout, &["write -P 1 960k 64k"]),
            writes(2),
            |image| write(image, 0, &[2; 4096]),
            |image| {
                write(image, 128 << 10, &[3; 4096]);
                // With subclusters not even in the same cluster.
                if layout.contains("extended") {
                    write(image, 32 << 10, &[4; 4096]);
                    assert_eq!(read(image, 32 << 10, 4096), [4; 4096]);
                }
                image.flush().unwrap();
                // What is not written yet does not show, nor does what was there.
                assert_eq!(read(image, 0, 8192), [0; 8192]);
                assert_eq!(read(image, 128 << 10, 4096), [3; 4096]);
            },
        );
        assert_eq!(read(&image, 0, 4096), [2; 4096]);
        image.close().unwrap();
        check(&disk);
    }
}

#[test]
fn readers_are_inside_at_the_same_time() {
    let sound = made("", &["write -P 1 0 128k"]);
    let data = sound.host(0);
    let (image, _) = held(
        &sound,
        move |request| matches!(request, Request::Read(_, at) if *at >= data),
        |image| assert_eq!(read(image, 0, 512), [1; 512]),
        |image| assert_eq!(read(image, 64 << 10, 512), [1; 512]),
    );
    image.close().unwrap();
}

#[test]
fn what_is_being_written_back_is_still_there() {
    // Another driver took tables out of its cache before they were written: who came
    // meanwhile read the old ones from the file.
    for layout in LAYOUTS {
        let sound = made(layout, &["write -P 1 0 64k"]);
        let table = sound.l1(0) & OFFSET;
        let (image, disk) = held(
            &sound,
            move |request| matches!(request, Request::Write(_, at) if *at & !0xffff == table),
            |image| {
                write(image, 512 << 10, &[2; 4096]);
                image.flush().unwrap();
            },
            |image| {
                assert_eq!(read(image, 512 << 10, 4096), [2; 4096]);
                write(image, 576 << 10, &[3; 4096]);
                assert_eq!(read(image, 576 << 10, 4096), [3; 4096]);
            },
        );
        assert_eq!(read(&image, 576 << 10, 4096), [3; 4096]);
        image.close().unwrap();
        check(&disk);
    }
}

#[test]
fn a_late_write_does_not_land_in_somebody_elses_cluster() {
    // One driver let a discard free the cluster that a write was on its way to: two
    // guest clusters ended in one host cluster.
    for layout in LAYOUTS {
        let (image, disk) = held(
            &made(layout, &["write -P 1 0 128k"]),
            writes(2),
            |image| write(image, 4096, &[2; 8192]),
            |image| {
                image.discard(0, 64 << 10).unwrap();
                for at in (256 << 10..1 << 20).step_by(64 << 10) {
                    image.flush().unwrap();
                    write(image, at, &vec![3; 64 << 10]);
                }
                image.flush().unwrap();
            },
        );
        assert!(read(&image, 256 << 10, 768 << 10).iter().all(|byte| *byte == 3), "{layout}");
        let late = read(&image, 4096, 8192);
        assert!(late == [0; 8192] || late == [2; 8192], "either was the last");
        image.close().unwrap();
        check(&disk);
    }
}

#[test]
fn a_late_read_finds_what_was_there() {
    // The place of compressed data was given to somebody else while it was read.
    for layout in LAYOUTS {
        let sound = made(layout, &["write -c -P 1 0 64k", "write -c -P 2 64k 64k"]);
        let (offset, _) = sound.compressed(sound.entry(0).0);
        let (image, disk) = held(
            &sound,
            move |request| matches!(request, Request::Reading(at) if *at == offset),
            |image| {
                let found = read(image, 0, 4096);
                assert!(found == [1; 4096] || found == [5; 4096]);
            },
            |image| {
                write(image, 512, &[5; 512]);
                write(image, 64 << 10, &[5; 512]);
                // Until all that is free has been used.
                let places = (256 << 10..1 << 20).step_by(64 << 10);
                for at in places.clone().chain(places) {
                    image.discard(at, 64 << 10).unwrap();
                    image.flush().unwrap();
                    write(image, at, &vec![3; 64 << 10]);
                }
            },
        );
        assert_eq!(read(&image, 0, 512), [1; 512]);
        assert_eq!(read(&image, 512, 512), [5; 512]);
        image.close().unwrap();
        check(&disk);
    }
}

#[test]
fn a_zero_write_waits_for_the_write_that_allocates_its_cluster() {
    for layout in LAYOUTS {
        let gate = Gate::new();
        let (in_hook, begun) = (gate.clone(), Arc::new(AtomicUsize::new(0)));
        let stops = writes(2);
        let disk = MemoryDisk::with_hook(&made(layout, &[]).bytes, move |request| {
            if stops(&request) {
                in_hook.pass();
            }
            Ok(())
        });
        let image = open(&disk);
        gate.close();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| write(&image, 0, &[2; 4096]));
            gate.wait_for_one();
            let others: Vec<_> = (0..3)
                .map(|number| {
                    let (image, begun) = (&image, begun.clone());
                    scope.spawn(move || {
                        begun.fetch_add(1, SeqCst);
                        match number {
                            0 => image.discard(0, 64 << 10),
                            1 => image.write_at(&[3; 512], 0, WriteFlags::default()),
                            _ => {
                                let flags = ZeroFlags { may_unmap: true, ..Default::default() };
                                image.write_zeroes(0, 64 << 10, flags)
                            }
                        }
                        .unwrap();
                    })
                })
                .collect();
            while begun.load(SeqCst) < 3 {
                std::thread::yield_now();
            }
            gate.open();
            writer.join().unwrap();
            others.into_iter().for_each(|other| other.join().unwrap());
        });
        write(&image, 128 << 10, &vec![9; 640 << 10]);
        assert!(read(&image, 0, 4096).iter().all(|byte| [0, 2, 3].contains(byte)), "{layout}");
        image.close().unwrap();
        check(&disk);
    }
}
