//! Zero writes and discards: what they leave in the entries, as QEMU does, and
//! where we do more than QEMU.

use std::path::{Path, PathBuf};

use qcow2rs::{Image, OpenOptions, Policy, Source, WriteFlags, ZeroFlags};

use super::support::dissect::{COPIED, Dissected, Entry, OFFSET, ZERO};
use super::support::operations::Op;
use super::support::refcounts::assert_exact;
use super::support::{
    Scratch, assert_content, open, qemu, qemu_create, qemu_img_check, qemu_io, text,
};
use super::{CLUSTER, DONE, KIB, agreed};

const SUB: u64 = CLUSTER / 32;
/// All subclusters zero.
const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;

/// An image of 4 clusters; the first holds data. `backed`: all of a backing file
/// shines through elsewhere.
fn image(scratch: &Scratch, options: &str, backed: bool) -> PathBuf {
    let path = scratch.path("image");
    std::fs::write(scratch.path("base"), vec![7; 4 * CLUSTER as usize]).unwrap();
    let mut options = vec![options];
    if backed {
        options.push("backing_file=base,backing_fmt=raw");
    }
    options.retain(|option| !option.is_empty());
    qemu_create(&path, &options.join(","), 4 * CLUSTER);
    qemu_io(&path, &["write -P 1 0 64k".into()]);
    path
}

const fn zero(at: u64, len: u64) -> Op {
    Op::Zero { at, len, unmap: false }
}

const fn unmap(at: u64, len: u64) -> Op {
    Op::Zero { at, len, unmap: true }
}

const fn discard(at: u64, len: u64) -> Op {
    Op::Discard { at, len }
}

/// The entry of a cluster afterwards, in our image and in QEMU's alike, its host
/// offset reduced to whether there is one.
fn left(path: &Path, op: Op, cluster: u64) -> Entry {
    let (outcome, after) = agreed(path, op);
    assert_eq!(outcome, DONE);
    let qemus = Dissected::load(&path.with_file_name("qemus"));
    let reduce = |(descriptor, bitmap): Entry| {
        (descriptor & !OFFSET | u64::from(descriptor & OFFSET != 0) << 16, bitmap)
    };
    let entries = [&after, &qemus].map(|image| reduce(image.entry(cluster)));
    assert_eq!(entries[0], entries[1], "{op:?}: we, and QEMU");
    qemu_img_check(&path.with_file_name("ours"));
    assert_exact(&path.with_file_name("ours"));
    entries[0]
}

/// As `left` reports a host cluster.
const HOST: u64 = 1 << 16;

#[test]
fn a_zero_write_keeps_the_host_cluster_unless_it_may_unmap() {
    for backed in [false, true] {
        let scratch = Scratch::new();
        let path = image(&scratch, "", backed);
        assert_eq!(left(&path, zero(0, CLUSTER), 0), (COPIED | HOST | ZERO, 0));
        assert_eq!(left(&path, unmap(0, CLUSTER), 0), (ZERO, 0));
        let path = image(&scratch, "extended_l2=on", backed);
        assert_eq!(left(&path, zero(0, CLUSTER), 0), (COPIED | HOST, ALL_ZERO));
        assert_eq!(left(&path, unmap(0, CLUSTER), 0), (0, ALL_ZERO));
    }
}

#[test]
fn a_discard_never_shows_the_backing_file() {
    let scratch = Scratch::new();
    for (options, entry) in [("", (ZERO, 0)), ("extended_l2=on", (0, ALL_ZERO))] {
        let path = image(&scratch, options, true);
        for cluster in [0, 1] {
            assert_eq!(left(&path, discard(cluster * CLUSTER, CLUSTER), cluster), entry);
        }
    }
}

#[test]
fn a_discard_of_nothing_over_nothing_changes_nothing() {
    let scratch = Scratch::new();
    for (options, entry) in [("", (ZERO, 0)), ("extended_l2=on", (0, ALL_ZERO))] {
        let path = image(&scratch, options, false);
        // What was allocated becomes zero all the same.
        assert_eq!(left(&path, discard(0, CLUSTER), 0), entry);
        assert_eq!(left(&path, discard(CLUSTER, CLUSTER), 1), (0, 0));
    }
}

#[test]
fn version_2_has_no_zero_clusters() {
    let scratch = Scratch::new();
    let path = image(&scratch, "compat=0.10", false);
    assert_eq!(left(&path, discard(0, CLUSTER), 0), (0, 0));
    assert_eq!(left(&path, unmap(0, CLUSTER), 0), (0, 0));
    // Over a backing file data stays data, and zeroes have to be written.
    let path = image(&scratch, "compat=0.10", true);
    assert_eq!(left(&path, discard(0, CLUSTER), 0), (COPIED | HOST, 0));
    let mut expected = vec![7; 4 * CLUSTER as usize];
    expected[..CLUSTER as usize].fill(1);
    assert_content(&open(&path.with_file_name("ours")), &expected);
    assert_eq!(left(&path, zero(CLUSTER, CLUSTER), 1), (COPIED | HOST, 0));
    expected[CLUSTER as usize..2 * CLUSTER as usize].fill(0);
    assert_content(&open(&path.with_file_name("ours")), &expected);
}

#[test]
fn version_2_keeps_no_host_cluster_of_a_discard() {
    let scratch = Scratch::new();
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    options.set("discard-no-unref", "on").unwrap();
    let path = image(&scratch, "compat=0.10", false);
    let error = Image::open(Source::path(&path), &options).err().unwrap();
    assert_eq!(error.kind(), qcow2rs::ErrorKind::InvalidArgument);
    let image = format!("driver=qcow2,file.filename={},discard-no-unref=on", text(&path));
    assert!(!qemu("qemu-io", &["--image-opts", "-c", "read 0 512", &image]).status.success());
    // Below one of version 3 it does not matter.
    let top = scratch.path("top");
    qemu_create(&top, "backing_file=image,backing_fmt=qcow2", 4 * CLUSTER);
    Image::open(Source::path(&top), &options).unwrap().close().unwrap();
}

#[test]
fn zeroes_in_an_empty_extended_cluster_allocate_nothing() {
    let scratch = Scratch::new();
    for backed in [false, true] {
        let path = image(&scratch, "extended_l2=on", backed);
        assert_eq!(left(&path, zero(CLUSTER, SUB), 1), (0, 1 << 32));
        assert_eq!(left(&path, zero(CLUSTER + 5 * SUB, 3 * SUB), 1), (0, 0b111 << 37));
    }
}

#[test]
fn zeroes_in_a_full_extended_cluster_clear_their_subclusters_only() {
    let scratch = Scratch::new();
    let path = image(&scratch, "extended_l2=on", true);
    let expected = (COPIED | HOST, 1 << 34 | 0xffff_fffb);
    assert_eq!(left(&path, zero(2 * SUB, SUB), 0), expected);
}

#[test]
fn a_write_into_a_zeroed_extended_cluster_changes_one_subcluster() {
    let scratch = Scratch::new();
    let path = image(&scratch, "extended_l2=on", true);
    for operation in ["write -z 64k 64k", "discard 64k 64k"] {
        qemu_io(&path, &[operation.into()]);
        let write = Op::Write { at: CLUSTER + 2 * SUB, len: 100, byte: 9 };
        assert_eq!(left(&path, write, 1), (COPIED | HOST, 0xffff_fffb_0000_0004));
    }
}

/// Whether zeroes can be noted in the entry depends on what else is in the
/// subcluster.
#[test]
fn zeroes_beside_data_are_written_and_beside_zeroes_are_noted() {
    let scratch = Scratch::new();
    let path = image(&scratch, "", true);
    assert_eq!(left(&path, zero(CLUSTER, 4 * KIB), 1), (COPIED | HOST, 0));
    let path = image(&scratch, "", false);
    assert_eq!(left(&path, zero(CLUSTER, 4 * KIB), 1), (ZERO, 0));
    let path = image(&scratch, "extended_l2=on", true);
    assert_eq!(left(&path, zero(CLUSTER + 100, 200), 1), (COPIED | HOST, 1));
    // Refused, where that is asked for, before anything changes.
    let before = std::fs::read(&path).unwrap();
    let image = super::support::open_rw(&path);
    let flags = ZeroFlags { no_fallback: true, ..Default::default() };
    let refused = image.write_zeroes(CLUSTER + 100, 200, flags).unwrap_err();
    assert_eq!(refused.errno(), libc::ENOTSUP);
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn zeroes_beside_what_is_zero_further_down_are_noted() {
    let scratch = Scratch::new();
    let (base, path) = (scratch.path("base"), scratch.path("image"));
    qemu_create(&base, "", 4 * CLUSTER);
    qemu_io(
        &base,
        &["write -P 7 0 256k".into(), "write -z 64k 64k".into(), "discard 128k 64k".into()],
    );
    for (options, noted) in [("", (ZERO, 0)), ("extended_l2=on,", (0, 0b111 << 32))] {
        let options = format!("{options}backing_file=base,backing_fmt=qcow2");
        qemu_create(&path, &options, 4 * CLUSTER);
        for cluster in [1, 2] {
            // Two subclusters, and a part of one that lies in zeroes itself.
            let op = zero(cluster * CLUSTER, 2 * SUB + 512);
            assert_eq!(left(&path, op, cluster), noted);
        }
        let (entry, bitmap) = left(&path, zero(3 * CLUSTER + 100, 100), 3);
        assert_eq!((entry, bitmap & !1), (COPIED | HOST, 0));
    }
}

#[test]
fn the_last_cluster_ends_where_the_disk_does() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 100 * KIB);
    qemu_io(&path, &["write -P 1 0 100k".into()]);
    assert_eq!(left(&path, zero(CLUSTER, 36 * KIB), 1), (COPIED | HOST | ZERO, 0));
    assert_eq!(left(&path, discard(CLUSTER, 36 * KIB), 1), (ZERO, 0));
    assert_eq!(left(&path, discard(CLUSTER, 35 * KIB), 1), (COPIED | HOST, 0));
}

/// Here we give back more than QEMU, which ignores it.
#[test]
fn a_discard_of_subclusters_makes_them_zero_and_the_last_one_frees_the_cluster() {
    let scratch = Scratch::new();
    let path = image(&scratch, "extended_l2=on", true);
    let host = Dissected::load(&path).host(0);
    let run = |ranges: &[(u64, u64)]| {
        let image = super::support::open_rw(&path);
        ranges.iter().for_each(|(at, len)| image.discard(*at, *len).unwrap());
        image.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
        Dissected::load(&path).entry(0)
    };
    // Less than one is nothing.
    assert_eq!(run(&[(100, SUB)]), (COPIED | host, 0xffff_ffff));
    assert_eq!(run(&[(100, 2 * SUB)]), (COPIED | host, 1 << 33 | 0xffff_fffd));
    assert_eq!(run(&[(0, 20 * SUB)]), (COPIED | host, 0x000f_ffff << 32 | 0xfff0_0000));
    qemu_io(&path, &["read -P 0 0 40k".into(), "read -P 1 40k 24k".into()]);
    assert_eq!(run(&[(10 * SUB, 22 * SUB)]), (0, ALL_ZERO));
    assert_eq!(Dissected::load(&path).refcount(host / CLUSTER), 0);
    let mut expected = vec![7; 4 * CLUSTER as usize];
    expected[..CLUSTER as usize].fill(0);
    assert_content(&open(&path), &expected);
}

#[test]
fn a_discard_that_keeps_the_reference_keeps_the_host_cluster() {
    for (options, entry) in [("", (ZERO, 0)), ("extended_l2=on", (0, ALL_ZERO))] {
        let scratch = Scratch::new();
        let path = image(&scratch, options, true);
        let copy = scratch.path("copy");
        std::fs::copy(&path, &copy).unwrap();
        let image_options =
            format!("driver=qcow2,discard-no-unref=on,file.filename={}", text(&copy));
        let args = ["--image-opts", "-d", "unmap", "-c", "discard 0 128k", &image_options];
        assert!(qemu("qemu-io", &args).status.success());
        let mut keep = OpenOptions::new().policy(Policy::Paths).writable(true);
        keep.set("discard-no-unref", "on").unwrap();
        let image = Image::open(Source::path(&path), &keep).unwrap();
        image.discard(0, 2 * CLUSTER).unwrap();
        image.close().unwrap();
        let (ours, qemus) = (Dissected::load(&path), Dissected::load(&copy));
        assert_eq!(ours.entry(0), qemus.entry(0));
        assert_eq!(ours.entry(0), (COPIED | ours.host(0) | entry.0, entry.1));
        assert_eq!((ours.entry(1), qemus.entry(1)), (entry, entry));
        qemu_img_check(&path);
        assert_exact(&path);
        let mut expected = vec![7; 4 * CLUSTER as usize];
        expected[..2 * CLUSTER as usize].fill(0);
        assert_content(&open(&path), &expected);
        // And it is used again.
        let image = Image::open(Source::path(&path), &keep).unwrap();
        image.write_at(&[9; 512], 0, WriteFlags::default()).unwrap();
        image.close().unwrap();
        assert_eq!(Dissected::load(&path).host(0), ours.host(0));
        expected[..512].fill(9);
        assert_content(&open(&path), &expected);
    }
}
