//! Changing images in place, beside `qemu-img amend`: the same is refused, the same
//! comes out, whoever does it, and the disk reads as before.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test amend` replays it.

mod support;

use std::fs;
use std::path::Path;

use qcow2rs::{
    AmendOptions, Buffer, ErrorKind, Format, Image, OpenOptions, Policy, Queue, QueueOptions,
    Result, Source,
};
use support::dissect::{Dissected, OFFSET};
use support::operations::{Backing, Case};
use support::refcounts::assert_exact;
use support::{
    Rng, Scratch, assert_content, describe, for_seeds, open, open_rw, qemu, qemu_create,
    qemu_img_check, qemu_io, qemu_ok, text,
};

fn options(list: &str) -> Result<AmendOptions> {
    let mut options = AmendOptions::default();
    for option in list.split(',') {
        let (name, value) = option.split_once('=').unwrap();
        options.set(name, value)?;
    }
    Ok(options)
}

/// Amends by us.
fn amend(image: &Path, list: &str) -> Result<()> {
    let options = options(list)?;
    let open = OpenOptions::new().policy(Policy::Paths).writable(true);
    let image = Image::open(Source::path(image), &open)?;
    let done = image.amend(&options, &mut |_, _| true);
    image.close().unwrap();
    done
}

/// Amends by QEMU; whether it did.
fn qemu_amend(image: &Path, list: &str) -> bool {
    qemu("qemu-img", &["amend", "-f", "qcow2", "-o", list, text(image)]).status.success()
}

/// What QEMU calls special in an image.
fn facts(image: &Path) -> serde_json::Value {
    let out = qemu_ok("qemu-img", &["info", "-f", "qcow2", "--output=json", text(image)]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    json["format-specific"]["data"].clone()
}

/// The features that an image claims: incompatible, compatible, autoclear.
fn features(image: &Path) -> Vec<u8> {
    let bytes = fs::read(image).unwrap();
    if bytes[7] == 2 { vec![0; 24] } else { bytes[72..96].to_vec() }
}

/// A disk with some of everything; what it reads as.
fn furnish(case: &Case, path: &Path, rng: &mut Rng) -> Vec<u8> {
    let mut content = case.create_backing(path, rng);
    case.create(path);
    let mut commands = Vec::new();
    for _ in 0..30 {
        let op = case.op(rng, true);
        op.model(case, &mut content);
        commands.push(op.qemu_io());
    }
    let size = case.cluster_size;
    for (at, byte) in [(0, 0x61), (1, 0x62)] {
        // Zero clusters with a place, and without one.
        commands.push(format!("write -P {byte} {} {size}", at * size));
        let unmap = if at == 0 { "" } else { "-u" };
        commands.push(format!("write -z {unmap} {} {size}", at * size));
        content[(at * size) as usize..((at + 1) * size) as usize].fill(0);
    }
    qemu_io(path, &commands);
    content
}

fn cases() -> Vec<Case> {
    let plain = Case {
        version: 3,
        cluster_size: 4096,
        extended_l2: false,
        refcount_bits: 16,
        size: 600 << 10,
        backing: Backing::None,
    };
    vec![
        plain,
        Case { version: 2, ..plain },
        Case { backing: Backing::Raw(512 << 10), cluster_size: 65536, ..plain },
        Case { backing: Backing::Qcow2(512 << 10), refcount_bits: 1, cluster_size: 512, ..plain },
        Case { backing: Backing::Raw(512 << 10), version: 2, size: 601 << 10, ..plain },
        Case { extended_l2: true, cluster_size: 16384, refcount_bits: 64, ..plain },
    ]
}

const CHANGES: [&str; 12] = [
    "compat=0.10",
    "compat=0.10,refcount_bits=16",
    "compat=1.1",
    "compat=1.1,lazy_refcounts=on",
    "compat=1.1,refcount_bits=64",
    "compat=v3,refcount_bits=1",
    "lazy_refcounts=on",
    "lazy_refcounts=off",
    "refcount_bits=4",
    "refcount_bits=32,lazy_refcounts=on",
    "compat=0.10,lazy_refcounts=on",
    "compat=0.10,refcount_bits=8",
];

#[test]
fn what_comes_out_is_what_qemu_makes_of_it() {
    for_seeds("amend", 1, |seed| {
        for (number, case) in cases().into_iter().enumerate() {
            let mut rng = Rng::new(seed.wrapping_mul(100) + number as u64);
            let scratch = Scratch::new();
            let (path, twin) = (scratch.path("image"), scratch.path("twin"));
            let content = furnish(&case, &path, &mut rng);
            let mut changes = CHANGES;
            for last in (1..changes.len()).rev() {
                changes.swap(last, rng.below(last as u64 + 1) as usize);
            }
            for change in changes {
                describe(format!("{case:?}, {change}"), || {
                    fs::copy(&path, &twin).unwrap();
                    let ours = amend(&path, change);
                    assert_eq!(ours.is_ok(), qemu_amend(&twin, change), "{ours:?}");
                    if ours.is_err() {
                        // QEMU may have done a part of it.
                        fs::copy(&path, &twin).unwrap();
                    }
                    assert_eq!(facts(&path), facts(&twin));
                    assert_eq!(features(&path), features(&twin));
                    assert_exact(&path);
                    for (image, by) in [(&path, "us"), (&twin, "QEMU")] {
                        describe(format!("changed by {by}"), || {
                            qemu_img_check(image);
                            assert_content(&open(image), &content);
                        });
                    }
                    // Sometimes QEMU's goes on.
                    if rng.below(2) == 0 {
                        fs::copy(&twin, &path).unwrap();
                    }
                    let write = format!("write -P 0x62 {} 512", case.size - 512);
                    qemu_io(&path, &[write]);
                });
                fs::copy(&path, &twin).unwrap();
                // Both go on writing.
                let end = content.len() - 512;
                let image = open_rw(&path);
                image.write_at(&content[end..], end as u64, Default::default()).unwrap();
                image.close().unwrap();
                assert_exact(&path);
            }
        }
    });
}

/// The entry of a cluster of the guest's.
fn entry(image: &Path, cluster: u64) -> u64 {
    Dissected::load(image).entry(cluster).0
}

#[test]
fn version_2_has_no_zero_clusters() {
    let scratch = Scratch::new();
    let (path, twin) = (scratch.path("image"), scratch.path("twin"));
    for backed in [false, true] {
        fs::write(scratch.path("base"), vec![7; 1 << 20]).unwrap();
        let below = if backed { "backing_file=base,backing_fmt=raw" } else { "" };
        qemu_create(&path, below, 1 << 20);
        qemu_io(
            &path,
            &[
                "write -P 1 0 256k".into(),
                "write -z 0 64k".into(),
                "write -z -u 64k 64k".into(),
                "write -z 256k 64k".into(),
            ],
        );
        fs::copy(&path, &twin).unwrap();
        amend(&path, "compat=0.10").unwrap();
        assert!(qemu_amend(&twin, "compat=0.10"));
        for cluster in 0..16 {
            let allocated = |image: &Path| entry(image, cluster) & OFFSET != 0;
            assert_eq!(allocated(&path), allocated(&twin), "{cluster}, backed: {backed}");
            assert_eq!(entry(&path, cluster) & 1, 0);
        }
        assert_exact(&path);
        support::qemu_img_compare(&path, "qcow2", &twin, "qcow2");
    }
}

#[test]
fn the_same_is_refused() {
    let scratch = Scratch::new();
    let (path, twin) = (scratch.path("image"), scratch.path("twin"));
    let kind = |list: &str| amend(&path, list).err().map(|error| error.kind());
    let (no, bad) = (Some(ErrorKind::NotSupported), Some(ErrorKind::InvalidArgument));
    qemu_create(&path, "", 1 << 20);
    for (list, expected) in [
        ("cluster_size=4096", no),
        ("extended_l2=on", no),
        ("compression_type=zstd", no),
        ("preallocation=full", no),
        ("backing_file=b", no),
        ("backing_fmt=raw", no),
        ("data_file=x", bad),
        ("data_file_raw=on", bad),
        ("data_file_raw=off", None),
        ("refcount_bits=7", bad),
        ("refcount_bits=0", bad),
        ("compat=0.9", bad),
        ("compat=0.10,refcount_bits=8", bad),
        ("compat=0.10,lazy_refcounts=on", bad),
        ("lazy_refcounts=maybe", bad),
        ("bogus=1", Some(ErrorKind::NotFound)),
        ("encrypt.format=luks", no),
        ("size=1M", None),
    ] {
        fs::copy(&path, &twin).unwrap();
        let before = fs::read(&path).unwrap();
        assert_eq!(kind(list), expected, "{list}");
        assert_eq!(qemu_amend(&twin, list), expected.is_none(), "{list}");
        assert!(fs::read(&path).unwrap() == before, "{list}");
    }
    // What is there may be named; the size has a call of its own.
    fs::write(scratch.path("base"), [0; 512]).unwrap();
    qemu_create(&path, "backing_file=base,backing_fmt=raw", 1 << 20);
    assert_eq!(kind("backing_file=base,backing_fmt=raw"), None);
    assert_eq!(kind("size=2M"), no);
    // What version 2 cannot say.
    for made in ["extended_l2=on", "compression_type=zstd"] {
        qemu_create(&path, made, 1 << 20);
        fs::copy(&path, &twin).unwrap();
        assert_eq!(kind("compat=0.10"), no, "{made}");
        if made == "extended_l2=on" {
            assert!(!qemu_amend(&twin, "compat=0.10"));
        }
    }
    qemu_create(&path, "", 1 << 20);
    qemu_ok("qemu-img", &["bitmap", "--add", text(&path), "b"]);
    qemu_ok("qemu-img", &["bitmap", "--disable", text(&path), "b"]);
    assert_eq!(kind("compat=0.10"), no, "bitmaps");
}

#[test]
fn snapshots_go_along() {
    let scratch = Scratch::new();
    let (path, twin) = (scratch.path("image"), scratch.path("twin"));
    let no = Some(ErrorKind::NotSupported);
    let kind = |list: &str| amend(&path, list).err().map(|error| error.kind());
    qemu_create(&path, "", 1 << 20);
    qemu_io(&path, &["write -P 1 0 256k".into()]);
    for name in ["a", "b", "c"] {
        qemu_ok("qemu-img", &["snapshot", "-c", name, text(&path)]);
    }
    qemu_io(&path, &["write -P 2 64k 64k".into(), "write -z 0 64k".into()]);
    fs::copy(&path, &twin).unwrap();
    for change in
        ["compat=0.10", "compat=1.1", "refcount_bits=8", "refcount_bits=4", "refcount_bits=16"]
    {
        assert_eq!(kind(change), None, "{change}");
        qemu_img_check(&path);
        assert_exact(&path);
        let image = open(&path);
        assert_eq!(image.snapshot_count().unwrap(), 3);
        for name in ["a", "c"] {
            let snapshot = image.snapshot_open(name.as_bytes()).unwrap();
            assert_eq!(support::read(&snapshot, 0, 256 << 10), vec![1; 256 << 10]);
        }
        support::qemu_img_compare(&path, "qcow2", &twin, "qcow2");
    }
    // Four references are more than two bits can count.
    let before = fs::read(&path).unwrap();
    assert_eq!(kind("refcount_bits=2"), Some(ErrorKind::InvalidArgument));
    assert!(!qemu_amend(&twin, "refcount_bits=2"));
    assert!(fs::read(&path).unwrap() == before);
    // One of another size.
    qemu_create(&path, "", 1 << 20);
    qemu_ok("qemu-img", &["snapshot", "-c", "a", text(&path)]);
    qemu_ok("qemu-img", &["resize", "-q", "-f", "qcow2", text(&path), "2M"]);
    fs::copy(&path, &twin).unwrap();
    assert_eq!(kind("compat=0.10"), no);
    assert!(!qemu_amend(&twin, "compat=0.10"));
}

#[test]
fn zero_clusters_go_from_snapshots_too() {
    let scratch = Scratch::new();
    let (path, twin) = (scratch.path("image"), scratch.path("twin"));
    for (backed, options) in [
        (false, "cluster_size=64k"),
        (true, "cluster_size=64k"),
        (false, "cluster_size=512"),
        (true, "cluster_size=512,refcount_bits=64"),
    ] {
        support::describe(format!("{options}, backed: {backed}"), || {
            fs::write(scratch.path("base"), vec![7; 1 << 20]).unwrap();
            let below = if backed { ",backing_file=base,backing_fmt=raw" } else { "" };
            qemu_create(&path, &format!("{options}{below}"), 1 << 20);
            let take = |name| qemu_ok("qemu-img", &["snapshot", "-c", name, text(&path)]);
            let play = |ops: &[&str]| {
                qemu_io(&path, &ops.iter().map(|op| (*op).to_owned()).collect::<Vec<_>>());
            };
            play(&["write -P 1 0 512k", "write -z 0 64k", "write -z -u 64k 64k"]);
            take("a");
            // Shares all tables with the one before.
            take("b");
            play(&["write -z 128k 64k", "write -z -u 576k 64k", "write -P 2 64k 4k"]);
            take("c");
            // Without zero clusters where others have them, and other tables.
            play(&["write -P 3 0 640k", "write -P 4 900k 4k"]);
            take("d");
            play(&["write -z -u 0 1M", "write -P 5 256k 64k"]);
            let contents = |path: &Path| {
                let image = open(path);
                let of = |name: &str| {
                    let snapshot = image.snapshot_open(name.as_bytes()).unwrap();
                    support::read(&snapshot, 0, 1 << 20)
                };
                let mut all: Vec<_> = ["a", "b", "c", "d"].map(of).into();
                all.push(support::read(&image, 0, 1 << 20));
                all
            };
            let before = contents(&path);
            fs::copy(&path, &twin).unwrap();
            amend(&path, "compat=0.10,refcount_bits=16").unwrap();
            assert_eq!(Dissected::load(&path).version(), 2);
            qemu_img_check(&path);
            assert_exact(&path);
            assert!(contents(&path) == before);
            // QEMU does it, too, but zeroes host clusters that other snapshots have data in
            // (10.0.2): what they hold afterwards is nothing to be compared with.
            assert!(qemu_amend(&twin, "refcount_bits=16") && qemu_amend(&twin, "compat=0.10"));
            // All of it can be used by QEMU, and goes back.
            for name in ["b", "c", "a", "d"] {
                qemu_ok("qemu-img", &["snapshot", "-a", name, text(&path)]);
                let index = usize::from(name.as_bytes()[0] - b'a');
                assert!(support::read(&open(&path), 0, 1 << 20) == before[index], "{name}");
            }
            amend(&path, "compat=1.1").unwrap();
            for name in ["a", "b", "c", "d"] {
                qemu_ok("qemu-img", &["snapshot", "-d", name, text(&path)]);
            }
            qemu_img_check(&path);
            assert_exact(&path);
        });
    }
}

#[test]
fn a_snapshot_that_is_open_keeps_its_zero_clusters() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 1 << 20);
    qemu_io(&path, &["write -z 0 64k".into()]);
    qemu_ok("qemu-img", &["snapshot", "-c", "a", text(&path)]);
    let open = OpenOptions::new().policy(Policy::Paths).writable(true);
    let image = Image::open(Source::path(&path), &open).unwrap();
    let snapshot = image.snapshot_open(b"a").unwrap();
    let change = options("compat=0.10").unwrap();
    let busy = image.amend(&change, &mut |_, _| true).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    assert_eq!(support::read(&snapshot, 0, 512), [0; 512]);
    snapshot.close().unwrap();
    // It can be called off before anything has changed.
    let cancelled = image.amend(&change, &mut |_, _| false).unwrap_err();
    assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
    assert_eq!(Dissected::load(&path).version(), 3);
    image.amend(&change, &mut |_, _| true).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
}

#[test]
fn what_the_image_was_opened_with_must_still_be_possible() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for (name, value, change, expected) in [
        ("lazy-refcounts", "on", "compat=0.10", ErrorKind::InvalidArgument),
        ("discard-no-unref", "on", "compat=0.10", ErrorKind::InvalidArgument),
    ] {
        qemu_create(&path, "cluster_size=512", 16 << 20);
        qemu_io(&path, &["write -P 1 0 6M".into()]);
        let mut open = OpenOptions::new().writable(true);
        open.set(name, value).unwrap();
        let image = Image::open(Source::path(&path), &open).unwrap();
        let before = fs::read(&path).unwrap();
        let done = image.amend(&options(change).unwrap(), &mut |_, _| true);
        assert_eq!(done.unwrap_err().kind(), expected, "{name}");
        // It is still open, and what it was.
        assert_eq!(support::read(&image, 0, 512), [1; 512]);
        image.close().unwrap();
        assert!(fs::read(&path).unwrap() == before, "{name}");
    }
}

#[test]
fn who_may_not_is_told_so() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 1 << 20);
    let wider = options("refcount_bits=64").unwrap();
    let kind = |image: &Image| image.amend(&wider, &mut |_, _| true).unwrap_err().kind();
    assert_eq!(kind(&open(&path)), ErrorKind::ReadOnly);
    let image = std::sync::Arc::new(open_rw(&path));
    {
        let queue = Queue::new(&image, &QueueOptions::default()).unwrap();
        queue.read(Buffer::from(vec![0; 512]), 0, 1).unwrap();
        assert_eq!(kind(&image), ErrorKind::Busy);
        assert_eq!(queue.wait(1, 1, None, |_| ()).unwrap(), 1);
    }
    // Given up, whenever: nothing has changed.
    let before = fs::read(&path).unwrap();
    let mut calls = 0;
    for stop in 0.. {
        let (mut step, mut last) = (0, 0);
        let done = image.amend(&wider, &mut |done, total| {
            assert!(done >= last && done <= total);
            (step, last) = (step + 1, done);
            step <= stop
        });
        match done {
            Ok(()) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled),
        }
        calls += 1;
        assert!(fs::read(&path).unwrap() == before);
    }
    assert!(calls > 1);
    // The image goes on as what it is now.
    image.write_at(&[5; 65536], 0, Default::default()).unwrap();
    image.close().unwrap();
    assert_eq!(facts(&path)["refcount-bits"], 64);
    assert_exact(&path);
    let raw = OpenOptions::new().writable(true).format(Format::Raw);
    fs::write(scratch.path("raw"), [0; 512]).unwrap();
    let raw = Image::open(Source::path(scratch.path("raw")), &raw).unwrap();
    assert_eq!(kind(&raw), ErrorKind::NotSupported);
}
