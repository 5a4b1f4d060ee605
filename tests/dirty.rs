//! Lazy refcounts and the dirty bit, side by side with QEMU: who sets it, when, and
//! what whoever opens a dirty image makes of it.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use qcow2rs::{CheckResult, ErrorKind, Image, OpenOptions, Policy, Source, WriteFlags, ZeroFlags};
use support::dissect::{COPIED, Dissected, OFFSET, field};
use support::{
    Rng, Scratch, assert_same, describe, for_seeds, open, open_rw, qemu, qemu_create,
    qemu_img_check, qemu_img_compare, qemu_io, qemu_ok, read, text,
};

const CLUSTER: u64 = 4096;
const SIZE: u64 = 1 << 20;
const LAZY: &str = "cluster_size=4k,lazy_refcounts=on";

fn is_dirty(path: &Path) -> bool {
    Dissected::load(path).incompatible() & 1 != 0
}

fn make_dirty(path: &Path) {
    Dissected::patch(path, |image| image.put64(field::INCOMPATIBLE, image.incompatible() | 1));
}

fn new(scratch: &Scratch, options: &str) -> PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, SIZE);
    path
}

fn try_open(path: &Path, set: &[(&str, &str)]) -> qcow2rs::Result<Image> {
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    for (name, value) in set {
        options.set(name, value).unwrap();
    }
    Image::open(Source::path(path), &options)
}

fn write(image: &Image, cluster: u64, value: u8) {
    let data = vec![value; CLUSTER as usize];
    image.write_at(&data, cluster * CLUSTER, WriteFlags::default()).unwrap();
}

/// QEMU's verdict on an image as it is.
fn verdict(path: &Path) -> CheckResult {
    let output = qemu("qemu-img", &["check", "-f", "qcow2", "--output=json", text(path)]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |name: &str| json.get(name).and_then(|value| value.as_u64()).unwrap_or(0);
    CheckResult {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        ..CheckResult::default()
    }
}

/// Lets QEMU write to an image, and dies in the middle of it.
fn qemu_io_dies(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2", "-d", "unmap", "--cache", "writeback"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.extend(["-c", "flush", "-c", "abort", text(path)]);
    let output = qemu("qemu-io", &args);
    assert!(output.status.code().is_none(), "it was to be killed: {output:?}");
}

/// Lets QEMU repair an image as it opens it.
fn qemu_repairs(path: &Path) {
    qemu_ok("qemu-io", &["-f", "qcow2", "-c", "read 0 512", text(path)]);
}

#[test]
fn the_bit_is_set_by_the_first_allocation_that_is_flushed() {
    let scratch = Scratch::new();
    let path = new(&scratch, LAZY);
    let before = fs::read(&path).unwrap();
    open_rw(&path).close().unwrap();
    assert!(fs::read(&path).unwrap() == before, "nothing was written, nothing changes");

    let image = open_rw(&path);
    write(&image, 3, 1);
    assert!(!is_dirty(&path), "no pointer is on disk yet");
    image.flush().unwrap();
    assert!(is_dirty(&path));
    assert_eq!(image.info().unwrap().qcow2.unwrap().incompatible & 1, 1);
    image.close().unwrap();
    assert!(!is_dirty(&path));
    qemu_img_check(&path);

    // In place: there is nothing to count.
    let image = open_rw(&path);
    write(&image, 3, 2);
    image.flush().unwrap();
    assert!(!is_dirty(&path));
    // A check, or becoming read-only, is the end of a life as well.
    write(&image, 4, 2);
    image.flush().unwrap();
    assert!(is_dirty(&path));
    image.check(&mut ()).1.unwrap();
    assert!(!is_dirty(&path));
    assert_eq!(image.info().unwrap().qcow2.unwrap().incompatible & 1, 0);
    write(&image, 5, 2);
    image.flush().unwrap();
    assert!(is_dirty(&path), "and set again");
    image.reopen(false, true).unwrap();
    assert!(!is_dirty(&path));
    qemu_img_check(&path);
    image.close().unwrap();
}

#[test]
fn refcounts_are_written_at_close_and_syncs_are_no_more_than_without() {
    let syncs = |options: &str| {
        let scratch = Scratch::new();
        let path = new(&scratch, options);
        let image = try_open(&path, &[]).unwrap();
        let syncs = [3, 4].map(|cluster| {
            let before = image.stats().storage_syncs;
            write(&image, cluster, 1);
            image.flush().unwrap();
            image.stats().storage_syncs - before
        });
        let refcounts = Dissected::load(&path).refcount(6);
        image.abandon().unwrap();
        (syncs, refcounts)
    };
    // The header's first clusters are counted, the run of the allocator is not.
    assert_eq!(syncs(LAZY), ([2, 1], 0));
    assert_eq!(syncs("cluster_size=4k"), ([2, 1], 1));
}

#[test]
fn the_open_option_overrides_the_image() {
    let scratch = Scratch::new();
    for (options, lazy, dirty) in
        [(LAZY, "off", false), (LAZY, "on", true), ("cluster_size=4k", "on", true)]
    {
        let path = new(&scratch, options);
        let image = try_open(&path, &[("lazy-refcounts", lazy)]).unwrap();
        write(&image, 9, 1);
        image.flush().unwrap();
        assert_eq!(is_dirty(&path), dirty, "{options}, {lazy}");
        image.close().unwrap();
        assert!(!is_dirty(&path));
        qemu_img_check(&path);
    }
    let path = new(&scratch, "compat=0.10");
    let error = try_open(&path, &[("lazy-refcounts", "on")]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let json = format!("driver=qcow2,file.filename={},lazy-refcounts=on", text(&path));
    assert!(!qemu("qemu-io", &["--image-opts", "-c", "read 0 512", &json]).status.success());
    try_open(&path, &[("lazy-refcounts", "off")]).unwrap().close().unwrap();
}

#[test]
fn repair_may_be_turned_off() {
    let scratch = Scratch::new();
    let path = new(&scratch, LAZY);
    qemu_io(&path, &["write -P 1 0 64k".into()]);
    make_dirty(&path);
    let before = fs::read(&path).unwrap();
    let error = try_open(&path, &[("repair-dirty", "off")]).err().unwrap();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Dirty, libc::EUCLEAN));
    assert!(error.message().contains("repair-dirty"), "{error}");

    // Reading needs no refcounts; as a backing file, too.
    let image = open(&path);
    assert_same(&read(&image, 0, 512), &[1; 512]);
    assert_eq!(image.info().unwrap().qcow2.unwrap().incompatible, 1);
    image.close().unwrap();
    let over = scratch.path("over");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&path), text(&over)];
    qemu_ok("qemu-img", &create);
    let image = try_open(&over, &[("repair-dirty", "off")]).unwrap();
    assert_same(&read(&image, 0, 512), &[1; 512]);
    image.close().unwrap();
    assert!(fs::read(&path).unwrap() == before, "it is as it was");

    // Becoming writable is opening for writing.
    let image = open(&path);
    image.reopen(true, true).unwrap();
    assert!(!is_dirty(&path));
    image.close().unwrap();
    qemu_img_check(&path);
}

#[test]
fn a_repair_writes_nothing_where_all_is_right_but_the_bit() {
    let scratch = Scratch::new();
    let path = new(&scratch, LAZY);
    qemu_io(&path, &["write -P 1 0 200k".into(), "write -z -u 8k 8k".into()]);
    let clean = fs::read(&path).unwrap();
    make_dirty(&path);
    let image = try_open(&path, &[]).unwrap();
    // The bit.
    assert_eq!(image.stats().storage_writes, 1);
    image.close().unwrap();
    assert!(fs::read(&path).unwrap() == clean);
}

#[test]
fn an_image_that_is_refused_for_its_chain_is_not_repaired() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    fs::write(&base, [1; 4096]).unwrap();
    let path = new(&scratch, &format!("{LAZY},backing_file={},backing_fmt=raw", text(&base)));
    make_dirty(&path);
    fs::remove_file(&base).unwrap();
    let before = fs::read(&path).unwrap();
    let error = try_open(&path, &[]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Backing(libc::ENOENT));
    assert!(fs::read(&path).unwrap() == before, "it is as it was");
}

/// Either bit is written as one word with the other, and neither is lost by that.
#[test]
fn a_dirty_image_that_is_found_to_be_corrupt_is_both() {
    let scratch = Scratch::new();
    let path = new(&scratch, LAZY);
    qemu_io(&path, &["write -P 1 0 64k".into()]);
    Dissected::patch(&path, |image| {
        let at = image.entry_at(2).unwrap();
        image.put64(at, image.l1_offset() | COPIED);
    });
    let image = open_rw(&path);
    write(&image, 40, 2);
    image.flush().unwrap();
    let data = vec![3; 512];
    let error = image.write_at(&data, 2 * CLUSTER, WriteFlags::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(Dissected::load(&path).incompatible(), 3);
    assert_eq!(image.info().unwrap().qcow2.unwrap().incompatible, 3);
    image.close().unwrap_err();
    assert_eq!(Dissected::load(&path).incompatible(), 3, "close clears neither");
    assert_eq!(try_open(&path, &[]).err().unwrap().kind(), ErrorKind::MarkedCorrupt);
    qemu("qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", text(&path)]);
}

#[test]
fn refcounts_blocks_and_flags_are_rebuilt() {
    let scratch = Scratch::new();
    let path = new(&scratch, "cluster_size=512,refcount_bits=64,lazy_refcounts=on");
    let writes = ["write -P 1 0 300k", "write -z 9k 2k"].map(String::from);
    qemu_io(&path, &writes);
    qemu_ok("qemu-img", &["snapshot", "-c", "one", text(&path)]);
    qemu_io(&path, &["write -P 2 1k 64k".into(), "write -c -P 3 400k 512".into()]);
    let sound = Dissected::load(&path);
    let blocks = sound.reftable();
    type Damage<'a> = (&'a str, &'a dyn Fn(&mut Dissected));
    let damage: [Damage<'_>; 5] = [
        ("a count is too low", &|image| {
            let block = (image.reftable()[1] & OFFSET) as usize;
            image.put(block, &[0; 256]);
        }),
        ("counts are too high", &|image| {
            let block = (image.reftable()[1] & OFFSET) as usize;
            (0..16).for_each(|n| image.put64(block + 8 * n, 7 + n as u64));
        }),
        ("a block is not named", &|image| {
            let at = image.u64(field::REFTABLE_OFFSET) as usize + 16;
            image.put64(at, 0);
        }),
        ("no block is named", &|image| {
            let at = image.u64(field::REFTABLE_OFFSET) as usize;
            (0..blocks.len()).for_each(|n| image.put64(at + 8 * n, 0));
        }),
        ("flags are wrong", &|image| {
            let at = image.l1_offset() as usize;
            image.put64(at, image.u64(at) ^ COPIED);
            let table = (image.l1(1) & OFFSET) as usize;
            for n in 0..20 {
                let entry = image.u64(table + 8 * n);
                image.put64(table + 8 * n, entry ^ COPIED);
            }
        }),
    ];
    let flat = scratch.path("flat");
    qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&flat)]);
    for (what, spoil) in damage {
        let mut image = sound.clone();
        spoil(&mut image);
        image.save();
        make_dirty(&path);
        assert_ne!(verdict(&path), CheckResult::default(), "{what}");
        describe(what.into(), || {
            try_open(&path, &[]).unwrap().close().unwrap();
            assert!(!is_dirty(&path));
            qemu_img_check(&path);
            qemu_img_compare(&path, "qcow2", &flat, "raw");
        });
    }
    sound.save();
}

#[test]
fn damage_that_no_count_can_mend_is_refused_untouched() {
    let scratch = Scratch::new();
    let path = new(&scratch, LAZY);
    qemu_io(&path, &["write -P 1 0 64k".into()]);
    let sound = Dissected::load(&path);
    let (l1, table) = (sound.l1_offset(), sound.l1(0) & OFFSET);
    let end = sound.bytes.len() as u64;
    let block = sound.reftable()[0];
    let reftable = sound.u64(field::REFTABLE_OFFSET);
    let damage: [(&str, u64, u64); 7] = [
        ("data behind the end of the file", table + 8, (end + 10 * CLUSTER) | COPIED),
        ("data where the L1 table is", table + 8, l1 | COPIED),
        ("data where an L2 table is", table + 8, table | COPIED),
        ("data where a refcount block is", table + 8, block | COPIED),
        ("a refcount block that cannot be", reftable, block + 512),
        ("a refcount block named twice", reftable + 8, block),
        ("an L2 table between clusters", l1, (table + 512) | COPIED),
    ];
    for (what, at, value) in damage {
        let mut image = sound.clone();
        image.put64(at as usize, value);
        image.save();
        make_dirty(&path);
        let before = fs::read(&path).unwrap();
        let error = try_open(&path, &[]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert!(error.message().contains("qemu-img check -r all"), "{what}: {error}");
        assert!(fs::read(&path).unwrap() == before, "{what}: it is as it was");
        open(&path).close().unwrap();
    }
    sound.save();
}

#[test]
fn a_repair_keeps_to_its_memory() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=512,lazy_refcounts=on", 4 << 20);
    qemu_io(&path, &["write -P 1 0 4M".into()]);
    make_dirty(&path);
    let before = fs::read(&path).unwrap();
    let caches = [("l2-cache-size", "1k"), ("refcount-cache-size", "1k")];
    let open = |memory| try_open(&path, &[&caches[..], &[("max-metadata-size", memory)]].concat());
    // 8192 clusters, and 5 bytes for each, twice over.
    assert_eq!(open("64k").err().unwrap().kind(), ErrorKind::Limit);
    assert!(fs::read(&path).unwrap() == before, "it is as it was");
    open("256k").unwrap().close().unwrap();
    qemu_img_check(&path);
}

/// Options, and whether there are snapshots.
const KINDS: [(&str, bool); 6] = [
    ("cluster_size=4k", true),
    ("cluster_size=512,refcount_bits=1", false),
    ("cluster_size=16k,extended_l2=on", true),
    ("cluster_size=1k,refcount_bits=2", false),
    ("cluster_size=512,refcount_bits=64", true),
    ("cluster_size=64k", true),
];

/// A lazy image with some content.
fn populated(scratch: &Scratch, seed: u64) -> PathBuf {
    let (options, snapshots) = KINDS[(seed % KINDS.len() as u64) as usize];
    let path = new(scratch, &format!("{options},lazy_refcounts=on"));
    let mut rng = Rng::new(seed);
    qemu_io(&path, &commands(&mut rng, 5));
    let cluster = Dissected::load(&path).cluster_size();
    let compressed = |n: u64| format!("write -c -P 5 {} {cluster}", SIZE - n * cluster);
    qemu_io(&path, &[format!("discard {} {}", SIZE - 2 * cluster, 2 * cluster)]);
    if !options.contains("refcount_bits=1") {
        qemu_io(&path, &[compressed(1), compressed(2)]);
    }
    if snapshots {
        qemu_ok("qemu-img", &["snapshot", "-c", "one", text(&path)]);
    }
    path
}

fn commands(rng: &mut Rng, count: u64) -> Vec<String> {
    let end = SIZE - (192 << 10);
    let command = |rng: &mut Rng| {
        let (at, bytes) = (rng.below(end / 1024) * 1024, (rng.below(64) + 1) * 1024);
        let verb = ["write -P 7", "write -P 9", "write -z", "discard"][rng.below(4) as usize];
        format!("{verb} {at} {bytes}")
    };
    (0..count).map(|_| command(rng)).collect()
}

/// Does as QEMU does with such commands, through our driver, and dies.
fn we_die(path: &Path, rng: &mut Rng) {
    let image = support::open_somehow(path, rng);
    for _ in 0..20 {
        let (at, bytes) = (rng.below(SIZE / 1024 - 64) * 1024, (rng.below(64) + 1) * 1024);
        match rng.below(5) {
            0 => image.write_zeroes(at, bytes, ZeroFlags::default()).unwrap(),
            1 => image.discard(at, bytes).unwrap(),
            2 => image.flush().unwrap(),
            _ => {
                let data = vec![rng.below(256) as u8; bytes as usize];
                image.write_at(&data, at, WriteFlags::default()).unwrap();
            }
        }
    }
    image.write_at(&[1; 512], rng.below(100) * 1024, WriteFlags::default()).unwrap();
    image.flush().unwrap();
    image.abandon().unwrap();
}

/// Whoever was killed, and whoever repairs: the same disk, and no complaint.
#[test]
fn whoever_dies_and_whoever_repairs() {
    for_seeds("dirty", 24, |seed| {
        let scratch = Scratch::new();
        let path = populated(&scratch, seed);
        let mut rng = Rng::new(seed ^ 0xd1);
        if seed % 4 < 2 {
            qemu_io_dies(&path, &commands(&mut rng, 12));
            // Without an allocation it would not be.
            assert!(is_dirty(&path));
        } else {
            we_die(&path, &mut rng);
        }
        let theirs = scratch.path("theirs");
        fs::copy(&path, &theirs).unwrap();
        let before = scratch.path("before");
        qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&before)]);
        let was_dirty = is_dirty(&path);
        try_open(&path, &[]).unwrap().close().unwrap();
        qemu_repairs(&theirs);
        for repaired in [&path, &theirs] {
            assert!(!is_dirty(repaired));
            if was_dirty {
                qemu_img_check(repaired);
            }
            qemu_img_compare(repaired, "qcow2", &before, "raw");
        }
        // And it can be used.
        let image = open_rw(&path);
        (0..40).for_each(|n| {
            image.write_at(&[n; 512], u64::from(n) * 20_000, WriteFlags::default()).unwrap()
        });
        image.close().unwrap();
        if was_dirty {
            qemu_img_check(&path);
        }
    });
}

/// Dirty images from strangers: refused untouched, or with refcounts that are right.
#[test]
fn spoiled_dirty_images_are_mended_or_refused() {
    for_seeds("dirty", 40, |seed| {
        let scratch = Scratch::new();
        let path = populated(&scratch, seed);
        let sound = Dissected::load(&path);
        let mut rng = Rng::new(seed ^ 0x5b);
        for round in 0..6 {
            let mut image = sound.clone();
            let done: Vec<_> = (0..=rng.below(2)).map(|_| spoil(&mut image, &mut rng)).collect();
            image.save();
            make_dirty(&path);
            describe(format!("round {round}: {done:x?}"), || mended_or_refused(&scratch, &path));
        }
    });
}

fn spoil(image: &mut Dissected, rng: &mut Rng) -> (usize, u64, u64) {
    let cluster = image.cluster_size();
    let table = image.l1(rng.below(image.l1_size())) & OFFSET;
    let at = match rng.below(8) {
        0 => image.l1_offset() + rng.below(image.l1_size()) * 8,
        1..=3 => table + rng.below(cluster / 8) * 8,
        4 => image.u64(field::REFTABLE_OFFSET) + rng.below(3) * 8,
        5 | 6 => (image.reftable()[0] & OFFSET) + rng.below(cluster / 8) * 8,
        _ => rng.below(image.bytes.len() as u64 / 8) * 8,
    };
    // Of the header other tests tell.
    let at = at.clamp(cluster, image.bytes.len() as u64 - 8) as usize / 8 * 8;
    let old = image.u64(at);
    let clusters = image.bytes.len() as u64 / cluster;
    let new = match rng.below(6) {
        0 => 0,
        1 => old ^ COPIED,
        2 => old ^ 1 << rng.below(64),
        3 => (rng.below(clusters + 2) * cluster) | COPIED,
        4 => rng.next(),
        _ => old + 512,
    };
    image.put64(at, new);
    (at, old, new)
}

fn mended_or_refused(scratch: &Scratch, path: &Path) {
    let before = fs::read(path).unwrap();
    let error = match try_open(path, &[]) {
        Ok(image) => {
            assert!(!is_dirty(path));
            let (result, outcome) = image.check(&mut ());
            outcome.unwrap();
            assert_eq!((result.leaks, result.check_errors), (0, 0));
            image.abandon().unwrap();
            let after = verdict(path);
            assert_eq!((after.leaks, after.check_errors), (0, 0));
            // QEMU's repair leaves as much.
            let theirs = scratch.path("theirs");
            fs::write(&theirs, &before).unwrap();
            qemu("qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", text(&theirs)]);
            assert!(after.corruptions <= verdict(&theirs).corruptions, "{after:?}");
            return;
        }
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(fs::read(path).unwrap() == before, "refused, so it is as it was");
}
