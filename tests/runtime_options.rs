//! Options of opening that decide how much memory an image takes, and when it is given
//! back; values that are refused, beside QEMU. (Others: `tests/overlap.rs`,
//! `tests/dirty.rs`, `tests/rules/zeroes.rs`, `tests/snapshot_operations/`.)

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2rs::{ErrorKind, Image, OpenOptions, Policy, Queue, QueueOptions, Source, WriteFlags};
use support::{Scratch, describe, qemu, qemu_create, read, text};

/// What a slice of 4 KiB maps, with clusters of 4 KiB.
const MAPPED: u64 = 2 << 20;
const SLICE: u64 = 4096;
const SLICES: u64 = 1024;
const SIZE: u64 = SLICES * MAPPED;

/// An image with all its L2 tables: 4 MiB of them.
fn mapped(path: &Path) {
    qemu_create(path, "cluster_size=4k,preallocation=metadata", SIZE);
}

fn open(path: &Path, settings: &[(&str, &str)]) -> Image {
    let mut options = OpenOptions::new().writable(true).policy(Policy::Paths);
    options.no_flush = true;
    settings.iter().for_each(|(name, value)| options.set(name, value).unwrap());
    Image::open(Source::path(path), &options).unwrap()
}

/// Reads something through each slice.
fn touch(image: &Image) {
    (0..SLICES).for_each(|slice| drop(read(image, slice * MAPPED, 512)));
}

/// Bytes of memory that this process has.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn memory_of_slices_that_nobody_uses_goes_back_to_the_system() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    mapped(&path);
    let image = open(&path, &[]);
    let empty = image.stats().metadata_bytes;
    touch(&image);
    let full = image.stats().metadata_bytes;
    assert!(full >= empty + SLICES * SLICE, "{empty} {full}");
    // A slice with a change that is not written yet.
    image.discard(5 * MAPPED, 4096).unwrap();
    image.trim().unwrap();
    assert_eq!(read(&image, 7 * MAPPED, 512), [0; 512]);
    let before = resident();
    let given = image.trim().unwrap();
    let after = resident();
    // But for the dirty one, the one that is in use, and those of refcount blocks.
    let expected = (SLICES - 2) * SLICE..=(SLICES + 64) * SLICE;
    assert!(expected.contains(&given), "{given}");
    assert_eq!(image.stats().metadata_bytes, full - given);
    // Other tests run in this process, but none that takes as much.
    assert!(after + given / 2 < before, "{before} {after}");
    let misses = image.stats().l2_cache_misses;
    assert_eq!(read(&image, 5 * MAPPED, 512), [0; 512]);
    assert_eq!(read(&image, 7 * MAPPED, 512), [0; 512]);
    assert_eq!(image.stats().l2_cache_misses, misses, "they have stayed");
    touch(&image);
    assert!(image.stats().l2_cache_misses >= misses + SLICES - 2);
    image.close().unwrap();
    support::qemu_img_check(&path);
}

#[test]
fn the_images_below_are_trimmed_too() {
    let scratch = Scratch::new();
    let (base, path) = (scratch.path("base"), scratch.path("image"));
    mapped(&base);
    qemu_create(&path, &format!("backing_file={},backing_fmt=qcow2", text(&base)), SIZE);
    let image = open(&path, &[]);
    touch(&image);
    image.trim().unwrap();
    let given = image.trim().unwrap();
    assert!(given >= SLICES * SLICE, "{given}");
}

/// Does something until the caches have become smaller, which they must in the end.
fn until_cleaned(path: &Path, what: &str, mut something: impl FnMut(&Arc<Image>)) {
    // Too small for all of it, so that there are misses.
    let settings = [("cache-clean-interval", "1"), ("l2-cache-size", "1M")];
    let image = Arc::new(open(path, &settings));
    touch(&image);
    let full = image.stats().metadata_bytes;
    let begun = Instant::now();
    while image.stats().metadata_bytes >= full {
        assert!(begun.elapsed() < Duration::from_secs(120), "{what}: nothing was given back");
        something(&image);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn whoever_comes_by_cleans_when_it_is_time() {
    let scratch = Scratch::new();
    let paths: Vec<_> = (0..6).map(|n| scratch.path(&n.to_string())).collect();
    paths.iter().for_each(|path| mapped(path));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            until_cleaned(&paths[0], "flushes", |image| image.flush().unwrap());
        });
        // Requests that find what they look for.
        scope.spawn(|| {
            until_cleaned(&paths[1], "reads", |image| {
                (0..5000).for_each(|_| drop(read(image, 0, 512)));
            });
        });
        scope.spawn(|| {
            until_cleaned(&paths[2], "writes", |image| {
                (0..5000).for_each(|_| image.write_at(&[1; 512], 0, Default::default()).unwrap());
            });
        });
        scope.spawn(|| {
            let mut slice = 0;
            until_cleaned(&paths[3], "misses", |image| {
                slice += 1;
                drop(read(image, slice % SLICES * MAPPED, 512));
            });
        });
        scope.spawn(|| {
            let mut queue = None;
            until_cleaned(&paths[4], "waiting", |image| {
                let queue = queue
                    .get_or_insert_with(|| Queue::new(image, &QueueOptions::default()).unwrap());
                for _ in 0..300 {
                    queue.read(vec![0; 512], 0, 0).unwrap();
                    assert_eq!(queue.wait(1, 1, None, |_| {}).unwrap(), 1);
                }
            });
        });
        scope.spawn(|| {
            let mut queue = None;
            until_cleaned(&paths[5], "reaping", |image| {
                let queue = queue
                    .get_or_insert_with(|| Queue::new(image, &QueueOptions::default()).unwrap());
                (0..300).for_each(|_| assert_eq!(queue.reap(1, |_| {}).unwrap(), 0));
            });
        });
    });
}

#[test]
fn caches_are_as_large_as_was_said() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    mapped(&path);
    // How much is held in the end, and read for each slice.
    let measure = |settings: &[(&str, &str)]| {
        let image = open(&path, settings);
        let empty = image.stats();
        touch(&image);
        let full = image.stats();
        let loads = full.l2_cache_misses - empty.l2_cache_misses;
        let bytes = full.storage_read_bytes - empty.storage_read_bytes;
        (full.metadata_bytes - empty.metadata_bytes, (bytes - SLICES * 512) / loads)
    };
    let (all, each) = measure(&[]);
    assert_eq!((all, each), (SLICES * SLICE, SLICE));
    assert_eq!(measure(&[("l2-cache-size", "1M")]).0, 1 << 20);
    assert_eq!(measure(&[("cache-size", "1280k")]).0, 1 << 20, "less 256 KiB for refcounts");
    assert_eq!(measure(&[("cache-size", "1M"), ("refcount-cache-size", "512k")]).0, 1 << 19);
    assert_eq!(measure(&[("l2-cache-entry-size", "512")]), (SLICES * 512, 512));

    // Refcount blocks, each used by an allocation far from the others.
    let refcounts = |settings: &[(&str, &str)]| {
        qemu_create(&path, "cluster_size=512", 64 << 20);
        let image = open(&path, settings);
        let held = |image: &Image| image.stats().metadata_bytes;
        let empty = held(&image);
        for at in 0..512 {
            image.write_at(&[1; 65536], at * 65536, WriteFlags::default()).unwrap();
        }
        image.flush().unwrap();
        held(&image) - empty
    };
    let l2 = ("l2-cache-size", "1k");
    let (small, large) = (
        refcounts(&[l2, ("refcount-cache-size", "4k")]),
        refcounts(&[l2, ("refcount-cache-size", "1M")]),
    );
    assert!(large > small + (64 << 10), "{small} {large}");
}

#[test]
fn what_qemu_refuses_is_refused() {
    let scratch = Scratch::new();
    let (path, old) = (scratch.path("image"), scratch.path("old"));
    qemu_create(&path, "", 1 << 20);
    qemu_create(&old, "compat=0.10", 1 << 20);
    for (image, list) in [
        (&path, "l2-cache-size=1M"),
        (&path, "l2-cache-size=64k,refcount-cache-size=256k,cache-size=1M"),
        (&path, "l2-cache-size=2M,cache-size=1M"),
        (&path, "refcount-cache-size=2M,cache-size=1M"),
        (&path, "l2-cache-entry-size=512"),
        (&path, "l2-cache-entry-size=256"),
        (&path, "l2-cache-entry-size=128k"),
        (&path, "l2-cache-entry-size=5000"),
        (&path, "l2-cache-size=x"),
        (&path, "cache-size=-1"),
        (&path, "cache-clean-interval=0"),
        (&path, "cache-clean-interval=4294967295"),
        (&path, "cache-clean-interval=4294967296"),
        (&path, "cache-clean-interval=soon"),
        (&path, "lazy-refcounts=on"),
        (&path, "lazy-refcounts=maybe"),
        (&old, "lazy-refcounts=on"),
        (&path, "discard-no-unref=on"),
        (&old, "discard-no-unref=on"),
        (&path, "pass-discard-request=off"),
        (&path, "pass-discard-request=perhaps"),
        (&path, "pass-discard-snapshot=1"),
        (&path, "pass-discard-other=off"),
        (&path, "pass-discard-other=none"),
        (&path, "overlap-check=some"),
        (&path, "overlap-check.template=all,overlap-check.inactive-l2=off"),
        (&path, "overlap-check.template=on"),
        (&path, "overlap-check.template=none,overlap-check.active-l2=all"),
        (&path, "overlap-check.template=none,overlap-check.l3=on"),
        (&path, "no-such-option=1"),
        (&path, "data-file.driver=file,data-file.filename=/dev/null"),
    ] {
        describe(list.to_owned(), || {
            let mut options = OpenOptions::new().writable(true);
            let set = list
                .split(',')
                .filter(|pair| *pair != "data-file.driver=file")
                .map(|pair| pair.split_once('=').unwrap())
                .try_for_each(|(name, value)| options.set(name, value));
            let ours = set.and_then(|()| Image::open(Source::path(image), &options)).map(drop);
            let all = format!("driver=qcow2,file.driver=file,file.filename={},{list}", text(image));
            let theirs = qemu("qemu-io", &["--image-opts", &all, "-c", "read 0 512"]);
            assert_eq!(ours.is_ok(), theirs.status.success(), "{ours:?} {theirs:?}");
            if let Err(error) = ours {
                let expected = [ErrorKind::InvalidArgument, ErrorKind::NotFound];
                assert!(expected.contains(&error.kind()), "{error:?}");
            }
        });
    }
}
