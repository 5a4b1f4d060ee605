//! Persistent bitmaps that do not record anything, or are void, stay as they are. (All
//! others: tests/bitmaps.)

use std::path::{Path, PathBuf};

use qcow2rs::WriteFlags;
use serde_json::Value;

use super::CLUSTER;
use super::support::dissect::{Dissected, field};
use super::support::{Scratch, open_rw, qemu, qemu_create, qemu_img_check, qemu_io, qemu_ok, text};

/// An image whose bitmap knows of the first cluster only.
fn image(scratch: &Scratch, disabled: bool) -> PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, "", 8 * CLUSTER);
    qemu_ok("qemu-img", &["bitmap", "--add", "-g", "64k", text(&path), "b"]);
    qemu_io(&path, &["write -P 1 0 64k".into()]);
    if disabled {
        qemu_ok("qemu-img", &["bitmap", "--disable", text(&path), "b"]);
    }
    path
}

fn bitmaps(path: &Path) -> Value {
    let info = qemu_ok("qemu-img", &["info", "-f", "qcow2", "--output=json", text(path)]);
    let info: Value = serde_json::from_str(&info).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// Allocates, and frees.
fn write(path: &Path) {
    let image = open_rw(path);
    for cluster in 2..6 {
        image.write_at(&[9; 512], cluster * CLUSTER, WriteFlags::default()).unwrap();
    }
    image.discard(3 * CLUSTER, CLUSTER).unwrap();
    image.close().unwrap();
}

#[test]
fn a_disabled_bitmap_is_left_as_it_is() {
    let scratch = Scratch::new();
    let path = image(&scratch, true);
    let before = bitmaps(&path);
    assert_eq!(before[0]["name"], "b");
    write(&path);
    qemu_img_check(&path);
    assert_eq!(bitmaps(&path), before, "neither gone nor in use");
    assert_eq!(Dissected::load(&path).u64(field::AUTOCLEAR), 1);
    // Its bits are what they were: QEMU exports exactly the first cluster.
    let copy = scratch.path("copy");
    let convert = ["convert", "-f", "qcow2", "-O", "qcow2", "--bitmaps", text(&path), text(&copy)];
    qemu_ok("qemu-img", &convert);
    let merged = Dissected::load(&copy);
    let set = merged.bytes.chunks(512).filter(|it| it[0] == 1 && it[1..].iter().all(|b| *b == 0));
    assert_eq!(set.count(), 1, "one bit, in a cluster of its own");
}

/// Somebody who does not know bitmaps wrote to the image: they are void.
#[test]
fn bitmaps_that_are_not_vouched_for_hinder_nobody() {
    let scratch = Scratch::new();
    let path = image(&scratch, false);
    Dissected::patch(&path, |image| image.put64(field::AUTOCLEAR, 0));
    write(&path);
    assert_eq!(bitmaps(&path), Value::Null);
    let check = qemu("qemu-img", &["check", "-f", "qcow2", text(&path)]);
    assert_eq!(check.status.code(), Some(3), "what they took is leaked, no more");
    qemu_io(&path, &["read -P 9 128k 512".into(), "read -P 1 0 64k".into()]);
}
