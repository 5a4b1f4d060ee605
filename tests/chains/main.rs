//! Images on top of images: what shines through, what does not, and how long a
//! chain may be.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test chains` replays it.

mod names;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};

use qcow2rs::{
    Error, ErrorKind, Image, OpenOptions, Policy, Result, Source, WriteFlags, ZeroFlags,
};
use support::dissect::{Dissected, field};
use support::operations::{Backing, Case, Op};
use support::refcounts::assert_exact;
use support::{
    Rng, Scratch, assert_content, assert_same, for_seeds, open, open_rw, open_somehow, qemu_create,
    qemu_img_check, qemu_img_compare, qemu_io, qemu_ok, read, text,
};

const KIB: u64 = 1024;

/// Makes an image on top of the file `below` in the same directory.
fn overlay(image: &Path, below: &str, format: &str, options: &str, size: u64) {
    let options = format!("backing_file={below},backing_fmt={format}{options}");
    qemu_create(image, &options, size);
}

fn try_open(image: &Path, options: &OpenOptions) -> Result<Image> {
    Image::open(Source::path(image), options)
}

fn paths() -> OpenOptions {
    OpenOptions::new().policy(Policy::Paths)
}

fn refusal(image: &Path, options: &OpenOptions) -> Error {
    try_open(image, options).err().expect("a refusal")
}

/// What QEMU reads is `content`.
fn assert_qemu_reads(image: &Path, content: &[u8]) {
    let flat = image.with_file_name("flat");
    std::fs::write(&flat, content).unwrap();
    qemu_img_compare(image, "qcow2", &flat, "raw");
}

/// A chain of images of all kinds, the topmost last, and what that reads as.
fn random_chain(scratch: &Scratch, rng: &mut Rng) -> (Vec<PathBuf>, Case, Vec<u8>) {
    let mut content = vec![0; (rng.below(300) * KIB + rng.below(3) * 123) as usize];
    rng.fill(&mut content);
    let base = scratch.path("l0");
    std::fs::write(&base, &content).unwrap();
    let (mut files, mut format) = (vec![base], "raw");
    loop {
        let number = files.len();
        let (cluster_size, extended_l2) = [
            (512, false),
            (4096, false),
            (65536, false),
            (1 << 20, false),
            (16384, true),
            (65536, true),
            (131072, true),
        ][rng.below(7) as usize];
        let version = if extended_l2 || rng.below(4) > 0 { 3 } else { 2 };
        let refcount_bits = if version == 2 { 16 } else { 1 << rng.below(7) };
        let size = (20 + rng.below(400)) * KIB + rng.below(8) * 512;
        let backing = Backing::Raw(content.len() as u64);
        let case = Case { version, cluster_size, extended_l2, refcount_bits, size, backing };
        let path = scratch.path(&format!("l{number}"));
        overlay(&path, &format!("l{}", number - 1), format, &format!(",{}", case.options()), size);
        content.resize(size as usize, 0);
        files.push(path.clone());
        if number > 1 && rng.below(4) == 0 || number == 6 {
            return (files, case, content);
        }
        let whole = size / cluster_size;
        let mut commands = Vec::new();
        if whole > 0 {
            let at = rng.below(whole) * cluster_size;
            commands.push(format!("write -c -P 99 {at} {cluster_size}"));
            content[at as usize..][..cluster_size as usize].fill(99);
        }
        let ops: Vec<Op> = (0..6).map(|_| case.op(rng, true)).collect();
        commands.extend(ops.iter().map(Op::qemu_io));
        qemu_io(&path, &commands);
        ops.iter().for_each(|op| op.model(&case, &mut content));
        format = "qcow2";
    }
}

#[test]
fn chains_of_all_kinds_read_and_write_as_in_qemu() {
    for_seeds("chains", 15, |seed| {
        let scratch = Scratch::new();
        let mut rng = Rng::new(seed);
        let (files, case, mut content) = random_chain(&scratch, &mut rng);
        let (top, lower) = files.split_last().unwrap();
        let before: Vec<_> = lower.iter().map(|path| std::fs::read(path).unwrap()).collect();
        assert_content(&open(top), &content);
        assert_qemu_reads(top, &content);
        let image = open_somehow(top, &mut rng);
        assert_eq!(image.info().unwrap().chain_depth as usize, lower.len());
        for _ in 0..30 {
            let op = case.op(&mut rng, false);
            op.apply(&image);
            op.follow(&case, &image, &mut content);
        }
        assert_content(&image, &content);
        image.close().unwrap();
        qemu_img_check(top);
        assert_exact(top);
        assert_qemu_reads(top, &content);
        for (path, before) in lower.iter().zip(before) {
            assert!(std::fs::read(path).unwrap() == before, "{} was written to", path.display());
        }
    });
}

/// Images `l1` to `l<count>` in a row, on a raw file `l0` of 64 KiB of `7`; each
/// holds its number in a sector of its own, as far as there is room.
fn long_chain(scratch: &Scratch, count: usize) {
    std::fs::write(scratch.path("l0"), vec![7; 64 << 10]).unwrap();
    let first = scratch.path("l1");
    overlay(&first, "l0", "raw", ",cluster_size=512", 64 * KIB);
    let template = Dissected::load(&first);
    let name_at = template.u64(field::BACKING_OFFSET) as usize;
    for number in 1..=count {
        let path = scratch.path(&format!("l{number}"));
        std::fs::write(&path, &template.bytes).unwrap();
        Dissected::patch(&path, |image| {
            let name = format!("l{}", number - 1);
            image.put32(field::BACKING_LENGTH, name.len() as u32);
            image.put(name_at, name.as_bytes());
            if number > 1 {
                let at =
                    image.bytes.windows(8).position(|bytes| bytes == b"\xe2\x79\x2a\xca\0\0\0\x03");
                image.put(at.unwrap() + 4, b"\0\0\0\x05qcow2");
            }
        });
    }
    for number in [1, count / 2, count] {
        let sector = number as u64 % 128;
        qemu_io(
            &scratch.path(&format!("l{number}")),
            &[format!("write -P {} {} 512", number % 250 + 1, sector * 512)],
        );
    }
}

#[test]
fn a_chain_has_up_to_200_images_below() {
    let scratch = Scratch::new();
    long_chain(&scratch, 201);
    let mut expected = vec![7; 64 << 10];
    for number in [1usize, 100] {
        expected[number * 512..][..512].fill(number as u8 + 1);
    }
    let top = scratch.path("l200");
    let image = open_rw(&top);
    assert_eq!(image.info().unwrap().chain_depth, 200);
    assert_content(&image, &expected);
    image.write_at(&[9; 100], 1000, WriteFlags::default()).unwrap();
    expected[1000..1100].fill(9);
    assert_content(&image, &expected);
    image.close().unwrap();
    qemu_img_check(&top);
    assert_qemu_reads(&top, &expected);
    let error = refusal(&scratch.path("l201"), &paths());
    assert_eq!((error.kind(), error.errno()), (ErrorKind::ChainDepth, libc::ELOOP));
    // The limit can be set.
    let mut options = paths();
    options.set("max-chain-depth", "201").unwrap();
    assert!(try_open(&scratch.path("l201"), &options).is_ok());
    options.set("max-chain-depth", "3").unwrap();
    assert!(try_open(&scratch.path("l3"), &options).is_ok());
    assert_eq!(refusal(&scratch.path("l4"), &options).kind(), ErrorKind::ChainDepth);
}

#[test]
fn a_chain_that_is_a_loop_is_refused() {
    let scratch = Scratch::new();
    let create = |name: &str, below: &str| {
        let options = format!("backing_file={below},backing_fmt=qcow2");
        let args = ["create", "-q", "-u", "-f", "qcow2", "-o", &options];
        qemu_ok("qemu-img", &[&args[..], &[text(&scratch.path(name)), "1M"]].concat());
    };
    create("self", "self");
    create("a", "b");
    create("b", "c");
    create("c", "a");
    create("other", "link");
    std::os::unix::fs::symlink(scratch.path("other"), scratch.path("link")).unwrap();
    create("hard", "harder");
    std::fs::hard_link(scratch.path("hard"), scratch.path("harder")).unwrap();
    for name in ["self", "a", "b", "other", "hard"] {
        for writable in [false, true] {
            let error = refusal(&scratch.path(name), &paths().writable(writable));
            assert_eq!(error.kind(), ErrorKind::ChainDepth, "{name}: {error}");
        }
    }
}

#[test]
fn what_lies_past_the_end_of_a_backing_file_is_zero() {
    for (base_size, options) in [
        (70_001, ""),
        (70_144, ""),
        (70_001, ",extended_l2=on"),
        (1, ",cluster_size=4k"),
        (0, ""),
        (70_001, ",compat=0.10"),
    ] {
        let scratch = Scratch::new();
        std::fs::write(scratch.path("base"), vec![7; base_size]).unwrap();
        let top = scratch.path("top");
        overlay(&top, "base", "raw", options, 300 * KIB);
        let mut expected = vec![7; base_size];
        expected.resize(300 << 10, 0);
        assert_content(&open(&top), &expected);
        let image = open_rw(&top);
        // Copying around these goes past the end.
        for at in [100, 66_000, 131_000, 250_000] {
            image.write_at(&[9; 10], at, WriteFlags::default()).unwrap();
            expected[at as usize..][..10].fill(9);
        }
        image.write_zeroes(69_000, 2000, ZeroFlags::default()).unwrap();
        expected[69_000..71_000].fill(0);
        assert_content(&image, &expected);
        image.close().unwrap();
        qemu_img_check(&top);
        assert_qemu_reads(&top, &expected);
    }
}

/// The last cluster of a disk that was made smaller still holds what was there.
#[test]
fn stale_bytes_behind_the_end_of_a_backing_image_do_not_show() {
    for options in ["compat=0.10", "compat=1.1", "extended_l2=on"] {
        for compressed in ["", "-c "] {
            let scratch = Scratch::new();
            let base = scratch.path("base");
            qemu_create(&base, options, 256 * KIB);
            let write = |n| format!("write {compressed}-P 7 {}k 64k", n * 64);
            qemu_io(&base, &(0..4).map(write).collect::<Vec<_>>());
            let shrink = ["resize", "-q", "--shrink", "-f", "qcow2", text(&base), "70144"];
            qemu_ok("qemu-img", &shrink);
            let top = scratch.path("top");
            overlay(&top, "base", "qcow2", "", 256 * KIB);
            let mut expected = vec![7; 70_144];
            expected.resize(256 << 10, 0);
            assert_content(&open(&top), &expected);
            let image = open_rw(&top);
            image.write_at(&[9; 10], 66_000, WriteFlags::default()).unwrap();
            expected[66_000..66_010].fill(9);
            assert_content(&image, &expected);
            image.close().unwrap();
            assert_qemu_reads(&top, &expected);
        }
    }
}

/// A layer that ends early hides what lies further down.
#[test]
fn a_short_image_in_the_middle_ends_what_shines_through() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![7; 256 << 10]).unwrap();
    overlay(&scratch.path("middle"), "base", "raw", "", 70_144);
    let top = scratch.path("top");
    overlay(&top, "middle", "qcow2", ",cluster_size=4k", 256 * KIB);
    let mut expected = vec![7; 70_144];
    expected.resize(256 << 10, 0);
    let image = open_rw(&top);
    assert_content(&image, &expected);
    let mut extents = Vec::new();
    image.block_status(0, 256 * KIB, false, 9, &mut |extent| extents.push(extent)).unwrap();
    assert_eq!((extents[0].depth, extents[0].length, extents[0].data), (2, 70_144, true));
    assert_eq!((extents[1].depth, extents[1].zero, extents[1].eof), (1, true, true));
    image.write_at(&[9; 10], 70_140, WriteFlags::default()).unwrap();
    expected[70_140..70_150].fill(9);
    image.close().unwrap();
    assert_qemu_reads(&top, &expected);
}

/// Two layers may hold different data at the same place in their files.
#[test]
fn compressed_clusters_of_two_layers_are_told_apart() {
    let scratch = Scratch::new();
    let (base, middle) = (scratch.path("base"), scratch.path("middle"));
    let top = scratch.path("top");
    qemu_create(&base, "", 256 * KIB);
    overlay(&middle, "base", "qcow2", "", 256 * KIB);
    overlay(&top, "middle", "qcow2", ",extended_l2=on,cluster_size=128k", 256 * KIB);
    qemu_io(&base, &["write -c -P 1 64k 64k".into()]);
    qemu_io(&middle, &["write -c -P 2 0 64k".into()]);
    let place = |path: &Path, cluster| Dissected::load(path).entry(cluster).0;
    assert_eq!(place(&base, 1), place(&middle, 0));
    let image = open(&top);
    for _ in 0..3 {
        assert_same(&read(&image, 60 * KIB, 4096), &[2; 4096]);
        assert_same(&read(&image, 64 * KIB, 4096), &[1; 4096]);
    }
    image.close().unwrap();
    let image = open_rw(&top);
    image.write_at(&[9; 8192], 60 * KIB, WriteFlags::default()).unwrap();
    image.close().unwrap();
    let mut expected = [vec![2; 64 << 10], vec![1; 64 << 10], vec![0; 128 << 10]].concat();
    expected[60 << 10..68 << 10].fill(9);
    assert_content(&open(&top), &expected);
    assert_qemu_reads(&top, &expected);
}

/// What is wrong below is no reason to condemn the image on top.
#[test]
fn corruption_below_stays_below() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base"), scratch.path("top"));
    qemu_create(&base, "", 256 * KIB);
    qemu_io(&base, &["write -P 1 0 256k".into()]);
    overlay(&top, "base", "qcow2", "", 256 * KIB);
    Dissected::patch(&base, |image| {
        let (descriptor, _) = image.entry(1);
        image.set_entry(1, (descriptor | 512, 0));
    });
    let before = std::fs::read(&base).unwrap();
    let image = open_rw(&top);
    assert_eq!(image.read_at(&mut [0; 512], 64 * KIB).unwrap_err().kind(), ErrorKind::Corrupt);
    let copying = image.write_at(&[9; 512], 64 * KIB, WriteFlags::default());
    assert_eq!(copying.unwrap_err().errno(), libc::EIO);
    image.write_at(&[9; 65536], 128 * KIB, WriteFlags::default()).unwrap();
    image.write_at(&[9; 65536], 64 * KIB, WriteFlags::default()).unwrap();
    image.close().unwrap();
    assert!(!Dissected::load(&top).is_marked_corrupt());
    assert!(std::fs::read(&base).unwrap() == before);
    qemu_img_check(&top);
    let expected = [vec![1; 64 << 10], vec![9; 128 << 10], vec![1; 64 << 10]].concat();
    assert_content(&open(&top), &expected);
    assert_qemu_reads(&top, &expected);
}

#[test]
fn dirty_and_corrupt_images_serve_as_backing_files() {
    for bit in [1, 2] {
        let scratch = Scratch::new();
        let (base, top) = (scratch.path("base"), scratch.path("top"));
        qemu_create(&base, "", 256 * KIB);
        qemu_io(&base, &["write -P 1 0 256k".into()]);
        overlay(&top, "base", "qcow2", "", 256 * KIB);
        Dissected::patch(&base, |image| image.put64(field::INCOMPATIBLE, bit));
        let before = std::fs::read(&base).unwrap();
        let image = open_rw(&top);
        image.write_at(&[9; 512], 0, WriteFlags::default()).unwrap();
        image.close().unwrap();
        let mut expected = vec![1; 256 << 10];
        expected[..512].fill(9);
        assert_content(&open(&top), &expected);
        assert_qemu_reads(&top, &expected);
        assert!(std::fs::read(&base).unwrap() == before);
    }
}

#[test]
fn backing_files_are_locked_as_readers_lock() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base"), scratch.path("top"));
    qemu_create(&base, "", 256 * KIB);
    overlay(&top, "base", "qcow2", "", 256 * KIB);
    let above = open_rw(&top);
    // Readers share it; nobody writes to it.
    assert_content(&open(&base), &[0; 256 << 10]);
    qemu_ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 0 0 4k", text(&base)]);
    assert_eq!(refusal(&base, &paths().writable(true)).kind(), ErrorKind::Locked);
    let write = support::qemu("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", text(&base)]);
    assert!(!write.status.success());
    above.close().unwrap();
    let writer = open_rw(&base);
    assert_eq!(refusal(&top, &paths()).kind(), ErrorKind::Backing(libc::EAGAIN));
    writer.close().unwrap();
    open(&top).close().unwrap();
}
