//! Which writes are refused because metadata is there: kind by kind and level by level,
//! beside QEMU's "overlap-check". Needs qemu-img and qemu-io.
//!
//! (The header is not among them: no entry of a table can lead to cluster 0. Its place
//! is a matter of `src/alloc/overlap.rs`.)

mod support;

use std::path::Path;

use qcow2rs::snapshots::Meta;
use qcow2rs::{ErrorKind, Image, OpenOptions, Policy, Result, Source, WriteFlags};
use support::dissect::{COPIED, Dissected, OFFSET, field};
use support::{
    Scratch, assert_content, describe, qemu, qemu_create, qemu_img_check, qemu_io, qemu_ok, text,
};

const CLUSTER: u64 = 65536;
/// The guest cluster whose entry leads to metadata.
const VICTIM: u64 = 7;
/// Its last sector: no table uses the end of its cluster.
const AT: u64 = VICTIM * CLUSTER + CLUSTER - 512;

const KINDS: [&str; 8] = [
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
];

/// An image that has metadata of each kind.
fn with_everything(path: &Path) {
    qemu_create(path, "cluster_size=64k", 16 * CLUSTER);
    qemu_io(path, &["write -P 1 0 64k".into()]);
    qemu_ok("qemu-img", &["snapshot", "-c", "a", text(path)]);
    // The active L2 table is one of its own now.
    qemu_io(path, &["write -P 2 320k 64k".into()]);
    qemu_ok("qemu-img", &["bitmap", "--add", "--disable", text(path), "b"]);
}

/// Where metadata of this kind is.
fn place(image: &Dissected, kind: &str) -> u64 {
    let first = |table: u64| image.u64(table as usize) & OFFSET;
    let inactive_l1 = || first(image.u64(field::SNAPSHOTS_OFFSET));
    match kind {
        "active-l1" => image.u64(field::L1_OFFSET),
        "active-l2" => first(image.u64(field::L1_OFFSET)),
        "refcount-table" => image.u64(field::REFTABLE_OFFSET),
        "refcount-block" => first(image.u64(field::REFTABLE_OFFSET)),
        "snapshot-table" => image.u64(field::SNAPSHOTS_OFFSET),
        "inactive-l1" => inactive_l1(),
        "inactive-l2" => first(inactive_l1()),
        "bitmap-directory" => {
            let at = image.bytes.windows(4).position(|bytes| bytes == [0x23, 0x85, 0x28, 0x75]);
            image.u64(at.expect("there are bitmaps") + 8 + 16)
        }
        _ => panic!("{kind}"),
    }
}

/// What is asked for: as QEMU takes it, and how often it was said another way.
fn levels(kind: &str) -> Vec<Vec<(String, &'static str)>> {
    let level = |level| vec![("overlap-check".to_owned(), level)];
    let single = |template, value| {
        vec![
            ("overlap-check.template".to_owned(), template),
            (format!("overlap-check.{kind}"), value),
        ]
    };
    vec![
        vec![],
        level("none"),
        level("constant"),
        level("cached"),
        level("all"),
        single("none", "on"),
        single("all", "off"),
    ]
}

fn open(path: &Path, options: &[(String, &str)]) -> Image {
    let mut open = OpenOptions::new().writable(true).policy(Policy::Paths);
    for (name, value) in options {
        open.set(name, value).unwrap();
    }
    Image::open(Source::path(path), &open).unwrap()
}

/// Whether QEMU writes.
fn qemu_writes(path: &Path, options: &[(String, &str)]) -> bool {
    let mut given = format!("driver=qcow2,file.driver=file,file.filename={}", text(path));
    for (name, value) in options {
        given += &format!(",{name}={value}");
    }
    let write = format!("write -P 9 {AT} 512");
    let done = qemu("qemu-io", &["--image-opts", &given, "-c", &write]);
    String::from_utf8_lossy(&done.stdout).contains("wrote 512/512")
}

fn we_write(path: &Path, options: &[(String, &str)]) -> Result<()> {
    let image = open(path, options);
    let written = image.write_at(&[9; 512], AT, WriteFlags::default());
    if written.is_err() {
        // So it is from now on.
        let later = image.write_at(&[9; 512], 0, WriteFlags::default()).unwrap_err();
        assert_eq!(later.kind(), ErrorKind::Shutdown);
    }
    assert_eq!(image.close().is_ok(), written.is_ok());
    written
}

#[test]
fn the_same_writes_are_refused_at_the_same_levels() {
    let scratch = Scratch::new();
    let (sound, path, twin) = (scratch.path("sound"), scratch.path("image"), scratch.path("twin"));
    with_everything(&sound);
    for kind in KINDS {
        for options in levels(kind) {
            describe(format!("{kind}, {options:?}"), || {
                std::fs::copy(&sound, &path).unwrap();
                let target = Dissected::patch(&path, |image| {
                    let target = place(image, kind);
                    image.set_entry(VICTIM, (COPIED | target, 0));
                    target
                });
                std::fs::copy(&path, &twin).unwrap();
                let written = we_write(&path, &options);
                assert_eq!(written.is_ok(), qemu_writes(&twin, &options), "{written:?}");
                let left = Dissected::load(&path);
                assert_eq!(left.is_marked_corrupt(), written.is_err());
                let tail = (target + CLUSTER - 512) as usize;
                let found: Vec<u8> = (0..512)
                    .map(|index| left.bytes.get(tail + index).copied().unwrap_or(0))
                    .collect();
                match written {
                    Ok(()) => assert_eq!(found, [9; 512]),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Corrupt);
                        assert!(found.iter().all(|byte| *byte != 9), "it was written all the same");
                    }
                }
            });
        }
    }
}

#[test]
fn what_is_not_checked_is_not_freed_all_the_same() {
    let scratch = Scratch::new();
    let (sound, path) = (scratch.path("sound"), scratch.path("image"));
    with_everything(&sound);
    for kind in KINDS.into_iter().filter(|kind| *kind != "inactive-l2") {
        describe(kind.to_owned(), || {
            std::fs::copy(&sound, &path).unwrap();
            let before = Dissected::patch(&path, |image| {
                image.set_entry(VICTIM, (COPIED | place(image, kind), 0));
                image.bytes.clone()
            });
            let image = open(&path, &[("overlap-check".to_owned(), "none")]);
            let discarded = image.discard(VICTIM * CLUSTER, CLUSTER).and_then(|()| image.flush());
            assert_eq!(discarded.unwrap_err().kind(), ErrorKind::Corrupt);
            drop(image.close());
            let at = place(&Dissected::of(before.clone()), kind) as usize;
            let after = std::fs::read(&path).unwrap();
            if kind != "active-l2" {
                let end = before.len().min(at + 512);
                assert!(after[at..end] == before[at..end], "there is a hole");
            }
        });
    }
}

#[test]
fn a_sound_image_goes_through_all_that_can_be_done_at_each_level() {
    for level in ["none", "constant", "cached", "all"] {
        describe(level.to_owned(), || {
            let scratch = Scratch::new();
            let path = scratch.path("image");
            qemu_create(&path, "cluster_size=4k", 1 << 20);
            let image = open(&path, &[("overlap-check".to_owned(), level)]);
            let mut model = vec![0; 1 << 20];
            let mut states = Vec::new();
            for value in 1..4u8 {
                let part = usize::from(value) * 40_000..usize::from(value) * 40_000 + 300_000;
                model[part.clone()].fill(value);
                image
                    .write_at(&model[part.clone()], part.start as u64, WriteFlags::default())
                    .unwrap();
                image.snapshot_create(&[b'a' + value], &Meta::now()).unwrap();
                states.push(model.clone());
            }
            image.snapshot_apply(b"c").unwrap();
            model.clone_from(&states[1]);
            image.write_at(&[7; 100], 50_000, WriteFlags::default()).unwrap();
            model[50_000..50_100].fill(7);
            image.snapshot_delete(b"b").unwrap();
            image.snapshot_apply(b"d").unwrap();
            image.snapshot_delete(b"d").unwrap();
            image.discard(0, 500_000).unwrap();
            model.clone_from(&states[2]);
            model[..500_000 / 4096 * 4096].fill(0);
            assert_content(&image, &model);
            image.close().unwrap();
            qemu_img_check(&path);
        });
    }
}

#[test]
fn two_levels_must_be_one() {
    let mut options = OpenOptions::new();
    options.set("overlap-check", "all").unwrap();
    options.set("overlap-check.template", "all").unwrap();
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 1 << 20);
    Image::open(Source::path(&path), &options).unwrap();
    options.set("overlap-check.template", "none").unwrap();
    let error = Image::open(Source::path(&path), &options).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}
