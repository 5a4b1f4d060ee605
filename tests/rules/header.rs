//! The header over the life of an open image: what is refused, what is changed,
//! and that all else survives.

use std::path::Path;

use qcow2rs::{ErrorKind, Image, OpenOptions, Policy, Source, WriteFlags};

use super::support::dissect::{Dissected, field};
use super::support::operations::Op;
use super::support::{
    Scratch, assert_content, assert_same, open, open_rw, qemu, qemu_create, qemu_img_check,
    qemu_io, qemu_ok, read, text,
};
use super::{CLUSTER, DONE, KIB, agreed};

fn image(scratch: &Scratch, options: &str) -> std::path::PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, 8 * CLUSTER);
    qemu_io(&path, &["write -P 1 0 256k".into()]);
    path
}

fn patch(path: &Path, at: usize, value: u64) {
    Dissected::patch(path, |image| image.put64(at, value));
}

fn refusal(path: &Path, writable: bool) -> ErrorKind {
    let before = std::fs::read(path).unwrap();
    let error = Image::open(Source::path(path), &OpenOptions::new().writable(writable));
    let kind = error.err().expect("a refusal").kind();
    assert!(std::fs::read(path).unwrap() == before, "the file was changed");
    kind
}

#[test]
fn unknown_autoclear_bits_go_when_the_image_is_opened_for_writing() {
    let unknown = 0xfff0_0000_0000_0004u64;
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    patch(&path, field::AUTOCLEAR, unknown);
    let before = Dissected::load(&path);
    open(&path).close().unwrap();
    assert!(Dissected::load(&path).bytes == before.bytes, "reading changes nothing");
    // No write is needed, neither here nor in QEMU.
    let (outcome, after) = agreed(&path, Op::Read { at: 0, len: 512 });
    assert_eq!(outcome, DONE);
    assert_eq!(after.u64(field::AUTOCLEAR), 0);
    assert_eq!(Dissected::load(&scratch.path("qemus")).u64(field::AUTOCLEAR), 0);
    let mut expected = before.clone();
    expected.put64(field::AUTOCLEAR, 0);
    assert!(after.bytes == expected.bytes);
}

#[test]
fn an_open_that_is_refused_for_its_chain_leaves_unknown_autoclear_bits() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    std::fs::write(&base, [1; 4096]).unwrap();
    let path = image(&scratch, &format!("backing_file={},backing_fmt=raw", text(&base)));
    patch(&path, field::AUTOCLEAR, 4);
    assert_eq!(refusal(&path, true), ErrorKind::Policy);
    std::fs::remove_file(&base).unwrap();
    let before = std::fs::read(&path).unwrap();
    let options = OpenOptions::new().writable(true).policy(Policy::Paths);
    let error = Image::open(Source::path(&path), &options).err().unwrap();
    assert!(matches!(error.kind(), ErrorKind::Backing(_)), "{error}");
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn what_we_do_not_know_in_the_header_survives_our_writes() {
    let scratch = Scratch::new();
    for condemned in [false, true] {
        let path = scratch.path("image");
        // So small a cluster has no table of feature names: there is room.
        qemu_create(&path, "cluster_size=4k,refcount_bits=64", 8 << 20);
        Dissected::patch(&path, |image| {
            image.put64(field::COMPATIBLE, 1 << 40 | 1);
            // Fields of a later version, then an extension, then the end.
            image.put32(field::HEADER_LENGTH, 128);
            image.put(112, &[0x77; 16]);
            image.put(128, b"\x12\x34\x56\x78\0\0\0\x05hello\0\0\0");
            image.put(144, &[0; 8]);
        });
        let before = Dissected::load(&path);
        let image = open_rw(&path);
        // Enough for more refcount blocks.
        image.write_at(&vec![9; 4 << 20], 0, WriteFlags::default()).unwrap();
        image.discard(0, 1 << 20).unwrap();
        image.flush().unwrap();
        if condemned {
            Dissected::patch(&path, |image| image.put64(image.l1_at(1), 0x1200));
            image.reopen(true, true).unwrap();
            assert!(image.read_at(&mut [0; 512], 2 << 20).is_err());
            assert!(image.close().is_err());
        } else {
            image.close().unwrap();
            qemu_img_check(&path);
        }
        let mut expected = before.clone();
        expected.put64(field::INCOMPATIBLE, if condemned { 2 } else { 0 });
        let after = Dissected::load(&path);
        assert_same(&after.bytes[..4096], &expected.bytes[..4096]);
        qemu_ok("qemu-img", &["info", "-f", "qcow2", text(&path)]);
    }
}

#[test]
fn the_shortest_header_of_version_3_can_be_written_to() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    Dissected::patch(&path, |image| image.put32(field::HEADER_LENGTH, 104));
    let write = Op::Write { at: 6 * CLUSTER, len: 4 * KIB, byte: 9 };
    let (outcome, after) = agreed(&path, write);
    assert_eq!(outcome, DONE);
    assert_eq!(after.u32(field::HEADER_LENGTH), 104);
    qemu_img_check(&scratch.path("ours"));
}

#[test]
fn a_size_that_is_not_whole_sectors_is_rounded_down() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    patch(&path, field::SIZE, 5 * CLUSTER + 1000);
    let image = open_rw(&path);
    assert_eq!(image.size(), 5 * CLUSTER + 512);
    let past = image.write_at(&[9; 1], image.size(), WriteFlags::default());
    assert_eq!(past.unwrap_err().kind(), ErrorKind::InvalidArgument);
    image.write_at(&[9; 512], 5 * CLUSTER, WriteFlags::default()).unwrap();
    image.close().unwrap();
    assert_eq!(Dissected::load(&path).size(), 5 * CLUSTER + 1000);
    let mut expected = vec![1; 4 * CLUSTER as usize];
    expected.resize(5 * CLUSTER as usize, 0);
    expected.resize(5 * CLUSTER as usize + 512, 9);
    assert_content(&open(&path), &expected);
    let flat = scratch.path("flat");
    qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&flat)]);
    assert_same(&std::fs::read(flat).unwrap(), &expected);
}

/// Refcounts may be stale: whoever only reads does not care, and changes nothing.
/// (What happens to it when it is opened for writing: `tests/dirty.rs`.)
#[test]
fn a_dirty_image_is_read_as_it_is() {
    let scratch = Scratch::new();
    let path = image(&scratch, "lazy_refcounts=on");
    patch(&path, field::INCOMPATIBLE, 1);
    let before = std::fs::read(&path).unwrap();
    let image = open(&path);
    assert_same(&read(&image, 0, 512), &[1; 512]);
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "it is dirty still");
}

#[test]
fn an_image_that_is_marked_corrupt_is_read_but_not_written_to() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    patch(&path, field::INCOMPATIBLE, 2);
    assert_eq!(refusal(&path, true), ErrorKind::MarkedCorrupt);
    // Dirty as well: it is not for a repair of refcounts.
    patch(&path, field::INCOMPATIBLE, 3);
    assert_eq!(refusal(&path, true), ErrorKind::MarkedCorrupt);
    let image = open(&path);
    assert_same(&read(&image, 0, 512), &[1; 512]);
    assert_eq!(image.reopen(true, true).unwrap_err().kind(), ErrorKind::MarkedCorrupt);
    assert_same(&read(&image, 0, 512), &[1; 512]);
    image.close().unwrap();
    qemu_ok("qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", text(&path)]);
    open_rw(&path).close().unwrap();
}

#[test]
fn features_of_qemus_that_are_not_ours_are_refused() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    for bit in [5, 40, 63] {
        patch(&path, field::INCOMPATIBLE, 1 << bit);
        for writable in [false, true] {
            assert_eq!(refusal(&path, writable), ErrorKind::UnsupportedFeature, "bit {bit}");
        }
        let read = ["-r", "-f", "qcow2", "-c", "read 0 4k", text(&path)];
        assert!(!qemu("qemu-io", &read).status.success());
    }
}

#[test]
fn an_l1_table_may_be_longer_than_the_disk_needs() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    // Each table maps 2 MiB.
    qemu_create(&path, "cluster_size=4k", 20 << 20);
    qemu_io(&path, &["write -P 1 0 20M".into()]);
    let resize = ["resize", "-q", "--shrink", "-f", "qcow2", text(&path), "3M"];
    qemu_ok("qemu-img", &resize);
    assert_eq!(Dissected::load(&path).l1_size(), 10);
    let image = open_rw(&path);
    image.write_at(&vec![9; 1 << 20], 2 << 20, WriteFlags::default()).unwrap();
    image.discard(0, 1 << 20).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
    let expected = [vec![0; 1 << 20], vec![1; 1 << 20], vec![9; 1 << 20]].concat();
    assert_content(&open(&path), &expected);
    qemu_io(&path, &["read -P 1 1M 1M".into(), "read -P 9 2M 1M".into()]);
}
