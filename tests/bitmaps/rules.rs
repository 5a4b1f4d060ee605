//! Each rule of the functions: names, limits, what is refused, what the image alone
//! means, and what becomes of bitmaps when something else is done with the image.

use std::process::Command;
use std::sync::Arc;

use qcow2rs::{
    AmendOptions, Buffer, ErrorKind, Format, Image, OpenOptions, Queue, QueueOptions,
    ResizeOptions, Source, WriteFlags,
};

use super::support::dissect::{Dissected, field};
use super::support::{Scratch, open, open_rw, qemu_create, qemu_img_check, qemu_ok, text};
use super::{CLUSTER, dirty, dirty_by_qemu, listed_by_qemu, qemu_bitmap, write};

fn kind<T: std::fmt::Debug>(result: qcow2rs::Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

fn resize(image: &Image, size: u64) -> qcow2rs::Result<()> {
    let options = ResizeOptions { shrink: true, ..ResizeOptions::default() };
    image.resize(size, &options, &mut |_, _| true)
}

#[test]
fn names_granularities_and_numbers_have_limits() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 * CLUSTER);
    let image = open_rw(&path);
    for name in [&b""[..], b"a\0b", &[b'x'; 1024]] {
        assert_eq!(kind(image.bitmap_add(name, 512, true)), ErrorKind::InvalidArgument);
    }
    for granularity in [0, 1, 256, 513, 3 << 9, u32::MAX] {
        assert_eq!(kind(image.bitmap_add(b"b", granularity, true)), ErrorKind::InvalidArgument);
    }
    let longest = [b'x'; 1023];
    image.bitmap_add(&longest, 512, false).unwrap();
    image.bitmap_add(b"coarse", 1 << 31, true).unwrap();
    assert_eq!(kind(image.bitmap_add(b"coarse", 512, true)), ErrorKind::Exists);
    assert_eq!(image.bitmap_count().unwrap(), 2);
    assert_eq!(image.bitmap(1).unwrap().granularity, 1 << 31);
    assert_eq!(kind(image.bitmap(2)), ErrorKind::NotFound);
    for missing in [&b"no"[..], b""] {
        assert_eq!(kind(image.bitmap_remove(missing)), ErrorKind::NotFound);
        assert_eq!(kind(image.bitmap_clear(missing)), ErrorKind::NotFound);
        assert_eq!(kind(image.bitmap_set_enabled(missing, true)), ErrorKind::NotFound);
        assert_eq!(kind(image.bitmap_merge(b"coarse", missing)), ErrorKind::NotFound);
        assert_eq!(kind(image.bitmap_merge(missing, b"coarse")), ErrorKind::NotFound);
        let status = image.bitmap_status(missing, 0, 1, 1, &mut |_| ());
        assert_eq!(kind(status), ErrorKind::NotFound);
    }
    let past = image.bitmap_status(b"coarse", 1, image.size(), 1, &mut |_| ());
    assert_eq!(kind(past), ErrorKind::InvalidArgument);
    write(&image, 0, 1);
    image.close().unwrap();
    let names: Vec<_> = listed_by_qemu(&path).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names, [String::from_utf8(longest.to_vec()).unwrap(), "coarse".into()]);
    assert_eq!(dirty_by_qemu(&path, "coarse"), [0..64 * CLUSTER]);
    qemu_img_check(&path);
}

#[test]
fn images_without_bitmaps_are_told_from_those_that_cannot_have_any() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "compat=0.10", CLUSTER);
    let image = open_rw(&path);
    assert_eq!(image.bitmaps().unwrap(), []);
    assert_eq!(kind(image.bitmap_add(b"b", 512, true)), ErrorKind::NotSupported);
    image.close().unwrap();
    qemu_create(&path, "", 0);
    let image = open_rw(&path);
    assert_eq!(kind(image.bitmap_add(b"b", 512, true)), ErrorKind::NotSupported);
    image.close().unwrap();
    // 2 TiB in bits of 512 bytes are the limit of 512 MiB.
    qemu_create(&path, "", (2 << 40) + 512);
    let image = open_rw(&path);
    assert_eq!(kind(image.bitmap_add(b"b", 512, true)), ErrorKind::InvalidArgument);
    image.bitmap_add(b"b", 1 << 20, true).unwrap();
    image.abandon().unwrap();
    qemu_create(&path, "", CLUSTER);
    let image = open(&path);
    assert_eq!(kind(image.bitmap_add(b"b", 512, true)), ErrorKind::ReadOnly);
    image.close().unwrap();
    let mut raw = OpenOptions::new().writable(true);
    raw.format = Format::Raw;
    let path = scratch.path("raw");
    std::fs::write(&path, [0; 512]).unwrap();
    let image = Image::open(Source::path(&path), &raw).unwrap();
    assert_eq!(kind(image.bitmaps()), ErrorKind::NotSupported);
    assert_eq!(kind(image.bitmap_add(b"b", 512, true)), ErrorKind::NotSupported);
    write(&image, 0, 512);
    image.close().unwrap();
}

#[test]
fn memory_for_bits_is_bounded() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 << 30);
    let mut options = OpenOptions::new().writable(true);
    options.set("max-metadata-size", "20M").unwrap();
    let image = Image::open(Source::path(&path), &options).unwrap();
    let held = image.stats().metadata_bytes;
    image.bitmap_add(b"a", 4096, true).unwrap();
    assert_eq!(image.stats().metadata_bytes, held + (2 << 20));
    // 16 MiB more than there is.
    assert_eq!(kind(image.bitmap_add(b"b", 512, true)), ErrorKind::Limit);
    write(&image, 1 << 30, 1);
    image.close().unwrap();
    qemu_bitmap(&path, &["--add", "-g", "512", "b"]);
    let again = Image::open(Source::path(&path), &options);
    assert_eq!(again.err().unwrap().kind(), ErrorKind::Limit);
    assert_eq!(dirty_by_qemu(&path, "a"), [1 << 30..(1 << 30) + 4096]);
}

/// A process that is killed leaves bitmaps that miss what it wrote: everybody is told.
#[test]
fn what_was_not_stored_is_out_of_date() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 * CLUSTER);
    qemu_bitmap(&path, &["--add", "-g", "64k", "on"]);
    qemu_bitmap(&path, &["--add", "--disable", "off"]);
    let image = open_rw(&path);
    let flags = |path| -> Vec<_> { listed_by_qemu(path).into_iter().map(|it| it.2).collect() };
    assert_eq!(flags(&path), [vec!["in-use", "auto"], vec![]], "while it is open");
    assert!(image.bitmaps().unwrap().iter().all(|info| !info.in_use));
    write(&image, 0, 512);
    image.abandon().unwrap();
    assert_eq!(flags(&path), [vec!["in-use", "auto"], vec![]]);

    for writable in [false, true] {
        let options = OpenOptions::new().writable(writable);
        let image = Image::open(Source::path(&path), &options).unwrap();
        let infos = image.bitmaps().unwrap();
        assert_eq!((infos[0].in_use, infos[0].dirty_bytes, infos[0].enabled), (true, 0, true));
        assert!(!infos[1].in_use);
        let status = image.bitmap_status(b"on", 0, 512, 1, &mut |_| ());
        assert_eq!(kind(status), ErrorKind::InvalidArgument);
        image.close().unwrap();
    }
    let image = open_rw(&path);
    let bad = ErrorKind::InvalidArgument;
    assert_eq!(kind(image.bitmap_clear(b"on")), bad);
    assert_eq!(kind(image.bitmap_set_enabled(b"on", false)), bad);
    assert_eq!(kind(image.bitmap_merge(b"on", b"off")), bad);
    assert_eq!(kind(image.bitmap_merge(b"off", b"on")), bad);
    assert_eq!(kind(image.bitmap_add(b"on", 512, true)), ErrorKind::Exists);
    assert_eq!(kind(resize(&image, CLUSTER)), ErrorKind::NotSupported);
    let json: serde_json::Value = serde_json::from_str(&image.info_json().unwrap()).unwrap();
    let listed = &json["format-specific"]["data"]["bitmaps"];
    assert_eq!(listed[0]["flags"], serde_json::json!(["in-use", "auto"]));
    write(&image, CLUSTER, 512);
    image.close().unwrap();
    assert_eq!(flags(&path), [vec!["in-use", "auto"], vec![]], "it stays as it is");
    qemu_img_check(&path);
    let image = open_rw(&path);
    image.bitmap_remove(b"on").unwrap();
    assert_eq!(listed_by_qemu(&path).len(), 1, "durably gone");
    image.bitmap_remove(b"off").unwrap();
    image.close().unwrap();
    assert_eq!(listed_by_qemu(&path), []);
    assert_eq!(Dissected::load(&path).u64(field::AUTOCLEAR), 0);
    qemu_img_check(&path);
}

/// QEMU tells us in the same way.
#[test]
fn what_qemu_could_not_store_is_out_of_date() {
    let scratch = Scratch::new();
    let (path, socket) = (scratch.path("image"), scratch.path("sock"));
    qemu_create(&path, "", 64 * CLUSTER);
    qemu_bitmap(&path, &["--add", "on"]);
    qemu_bitmap(&path, &["--add", "--disable", "off"]);
    let args = ["-f", "qcow2", "-k", text(&socket), text(&path)];
    let mut server = Command::new("qemu-nbd").args(args).spawn().unwrap();
    // The socket is there before the image is open.
    while !listed_by_qemu(&path).iter().all(|(.., flags)| flags.contains(&"in-use".into())) {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd {args:?}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
    let image = open_rw(&path);
    assert!(image.bitmaps().unwrap().iter().all(|info| info.in_use));
    write(&image, 0, 512);
    image.bitmap_remove(b"off").unwrap();
    image.bitmap_add(b"new", 512, true).unwrap();
    write(&image, CLUSTER, 512);
    image.close().unwrap();
    let listed = listed_by_qemu(&path);
    assert_eq!(listed[0], ("on".into(), 65536, vec!["in-use".into(), "auto".into()]));
    assert_eq!(listed[1], ("new".into(), 512, vec!["auto".into()]));
    assert_eq!(dirty_by_qemu(&path, "new"), [CLUSTER..CLUSTER + 512]);
    qemu_img_check(&path);
}

#[test]
fn the_image_is_needed_alone() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 * CLUSTER);
    let image = Arc::new(open_rw(&path));
    image.bitmap_add(b"b", 512, true).unwrap();
    let queue = Queue::new(&image, &QueueOptions::default()).unwrap();
    let buffer = Buffer::aligned(4096).unwrap();
    queue.write(buffer, 8192, WriteFlags::default(), 1).unwrap();
    let busy = ErrorKind::Busy;
    assert_eq!(kind(image.bitmap_add(b"c", 512, true)), busy);
    assert_eq!(kind(image.bitmap_remove(b"b")), busy);
    assert_eq!(kind(image.bitmap_clear(b"b")), busy);
    assert_eq!(kind(image.bitmap_set_enabled(b"b", false)), busy);
    assert_eq!(kind(image.bitmap_merge(b"b", b"b")), busy);
    assert_eq!(image.bitmap_count().unwrap(), 1, "a question may be asked");
    let mut done = 0;
    while done == 0 {
        queue
            .wait(1, 1, None, |completion| {
                completion.result.unwrap();
                done += 1;
            })
            .unwrap();
    }
    assert_eq!(dirty(&image, "b"), [8192..12288]);
    image.bitmap_clear(b"b").unwrap();
    // An idle queue goes on.
    queue.write(Buffer::aligned(512).unwrap(), 512, WriteFlags::default(), 1).unwrap();
    queue.wait(1, 1, None, |completion| completion.result.unwrap()).unwrap();
    assert_eq!(dirty(&image, "b"), [512..1024]);
    drop(queue);
    image.close().unwrap();
    assert_eq!(dirty_by_qemu(&path, "b"), [512..1024]);
}

#[test]
fn bitmaps_follow_the_size_as_in_qemu() {
    let scratch = Scratch::new();
    let (path, twin) = (scratch.path("image"), scratch.path("twin"));
    qemu_create(&path, "", 64 * CLUSTER);
    let image = open_rw(&path);
    image.bitmap_add(b"on", 1024, true).unwrap();
    image.bitmap_add(b"off", 64 << 10, true).unwrap();
    write(&image, 0, 512);
    write(&image, 63 * CLUSTER, CLUSTER as usize);
    image.bitmap_set_enabled(b"off", false).unwrap();
    image.close().unwrap();
    std::fs::copy(&path, &twin).unwrap();
    for size in [62 * CLUSTER + 512, 500 * CLUSTER, CLUSTER / 2 + 512, 64 * CLUSTER] {
        let image = open_rw(&path);
        resize(&image, size).unwrap();
        let ours = dirty(&image, "on");
        image.close().unwrap();
        let arg = size.to_string();
        qemu_ok("qemu-img", &["resize", "-f", "qcow2", "--shrink", text(&twin), &arg]);
        for name in ["on", "off"] {
            assert_eq!(dirty_by_qemu(&path, name), dirty_by_qemu(&twin, name), "{name} {size}");
        }
        assert_eq!(dirty_by_qemu(&path, "on"), ours);
        qemu_img_check(&path);
    }
    // More than a bitmap can be.
    let image = open_rw(&path);
    image.bitmap_add(b"fine", 512, false).unwrap();
    assert_eq!(kind(resize(&image, 3 << 40)), ErrorKind::InvalidArgument);
    assert_eq!(kind(resize(&image, 0)), ErrorKind::NotSupported);
    assert_eq!(image.size(), 64 * CLUSTER);
    write(&image, 5 * CLUSTER, 1);
    let after = dirty(&image, "on");
    image.close().unwrap();
    assert_eq!(dirty_by_qemu(&path, "on"), after);
    qemu_img_check(&path);
}

#[test]
fn what_else_is_done_with_an_image_leaves_its_bitmaps() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 * CLUSTER);
    let image = open_rw(&path);
    image.bitmap_add(b"b", 4096, true).unwrap();
    write(&image, 0, 512);
    let id = image.snapshot_create(b"s", &Default::default()).unwrap();
    write(&image, 3 * CLUSTER, 512);
    // It would not be recorded.
    assert_eq!(kind(image.snapshot_apply(&id)), ErrorKind::NotSupported);
    let mut amend = AmendOptions::default();
    amend.set("refcount_bits", "64").unwrap();
    image.amend(&amend, &mut |_, _| true).unwrap();
    write(&image, 5 * CLUSTER, 512);
    let mut old = AmendOptions::default();
    old.set("compat", "0.10").unwrap();
    old.set("refcount_bits", "16").unwrap();
    assert_eq!(kind(image.amend(&old, &mut |_, _| true)), ErrorKind::NotSupported);
    // A snapshot that is open has none.
    let snapshot = image.snapshot_open(&id).unwrap();
    assert_eq!(snapshot.bitmaps().unwrap(), []);
    assert_eq!(kind(snapshot.bitmap_add(b"b", 512, true)), ErrorKind::NotSupported);
    snapshot.close().unwrap();
    image.snapshot_rename(b"s", b"t").unwrap();
    image.snapshot_delete(b"t").unwrap();
    write(&image, 7 * CLUSTER, 512);
    let (result, outcome) = image.check(&mut ());
    outcome.unwrap();
    assert_eq!((result.corruptions, result.leaks), (0, 0));
    // Read-only and back: stored, and taken up again.
    image.reopen(false, true).unwrap();
    assert_eq!(listed_by_qemu(&path)[0].2, ["auto"]);
    let expected = [0, 3, 5, 7].map(|cluster| cluster * CLUSTER..cluster * CLUSTER + 4096);
    assert_eq!(dirty(&image, "b"), expected);
    image.reopen(true, true).unwrap();
    assert_eq!(listed_by_qemu(&path)[0].2, ["in-use", "auto"]);
    write(&image, 9 * CLUSTER, 512);
    image.bitmap_set_enabled(b"b", false).unwrap();
    write(&image, 11 * CLUSTER, 512);
    let id = image.snapshot_create(b"s", &Default::default()).unwrap();
    image.snapshot_apply(&id).unwrap();
    image.snapshot_delete(&id).unwrap();
    image.close().unwrap();
    let mut all = expected.to_vec();
    all.push(9 * CLUSTER..9 * CLUSTER + 4096);
    assert_eq!(dirty_by_qemu(&path, "b"), all);
    qemu_img_check(&path);
}
