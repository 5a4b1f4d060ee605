//! The checker against `qemu-img check`, on sound images and on damaged ones.

use std::fs;
use std::path::Path;

use super::imagecheck::{Report, check};
use super::layout::{Header, be64};
use super::qemu::{self, Verdict, run};

/// Checks the image both ways; the verdicts must agree.
fn agree(path: &Path, what: &str) -> Report {
    let report = check(&fs::read(path).unwrap());
    let (verdict, said) = qemu::check(path);
    let ours =
        Verdict { corruptions: report.corruptions.len(), leaks: report.leaks_inside, errors: 0 };
    assert_eq!(ours, verdict, "{what}: {report:#?}\n{said}");
    report
}

fn sound(path: &Path, what: &str) {
    let report = agree(path, what);
    assert!(report.faults().is_empty(), "{what}: {:#?}", report.faults());
    assert!(report.leaks.is_empty(), "{what}: leaks {:#x?}", report.leaks);
}

/// Options of `qemu-img create`, one line for each kind of image.
const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=512,compat=0.10",
    "cluster_size=4096",
    "cluster_size=4096,refcount_bits=2",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=16384,extended_l2=on,refcount_bits=64",
    "cluster_size=65536",
    "cluster_size=65536,refcount_bits=4",
    "cluster_size=65536,refcount_bits=32,lazy_refcounts=on",
    "cluster_size=65536,extended_l2=on,compression_type=zstd",
    "cluster_size=2097152,compat=0.10",
];

const SOME_WRITES: &[&str] = &[
    "write -P 1 0 300k",
    "write -P 2 1M 4k",
    "write -P 3 1500k 512",
    "write -z 100k 64k",
    "write -z -u 200k 64k",
    "discard 0 64k",
    "write -P 4 30k 3k",
];

#[test]
fn sound_images_are_sound() {
    if !qemu::available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    for kind in KINDS {
        run(dir.path(), &format!("qemu-img create -q -f qcow2 -o {kind} i 8M"));
        sound(&path, kind);
        qemu::io(dir.path(), "i", SOME_WRITES);
        sound(&path, kind);
        // Narrow refcounts have no room for both compressed clusters, of which
        // many share a host cluster, and snapshots.
        let narrow = ["=2", "=4", "=8"].iter().any(|bits| kind.ends_with(bits));
        if !narrow {
            qemu::io(dir.path(), "i", &["write -c -P 5 2M 2M", "write -c -P 6 6M 2M"]);
            sound(&path, kind);
        }
        if !kind.ends_with("refcount_bits=1") {
            run(dir.path(), "qemu-img snapshot -c one i");
            sound(&path, kind);
            qemu::io(dir.path(), "i", &["write -P 7 20k 70k", "write -P 8 1M 100k"]);
            sound(&path, kind);
            run(dir.path(), "qemu-img snapshot -c two i");
            run(dir.path(), "qemu-img snapshot -d one i");
            sound(&path, kind);
        }
    }
}

#[test]
fn bitmaps_and_other_files_are_sound() {
    if !qemu::available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    run(dir.path(), "qemu-img create -q -f qcow2 base 3M");
    qemu::io(dir.path(), "base", &["write -P 1 0 3M"]);
    run(dir.path(), "qemu-img create -q -f qcow2 -b base -F qcow2 i 2M");
    qemu::io(dir.path(), "i", &["write -P 2 10k 4k"]);
    sound(&path, "overlay");
    for bitmap in ["a", "b"] {
        run(dir.path(), &format!("qemu-img bitmap --add -g 512 i {bitmap}"));
    }
    qemu::io(dir.path(), "i", &["write -P 2 100k 4k", "write 1M 4k"]);
    sound(&path, "bitmaps");
    let data = dir.path().join("d");
    let options = format!("data_file={},data_file_raw=on", data.display());
    run(dir.path(), &format!("qemu-img create -q -f qcow2 -o {options} i 2M"));
    qemu::io(dir.path(), "i", &["write -P 2 10k 400k"]);
    sound(&path, "data file");
}

/// Changes one image in many ways, each of which must be seen alike.
#[test]
fn damage_is_seen_as_qemu_sees_it() {
    if !qemu::available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    for kind in ["cluster_size=65536", "cluster_size=16384,extended_l2=on"] {
        run(dir.path(), &format!("qemu-img create -q -f qcow2 -o {kind} i 2M"));
        qemu::io(dir.path(), "i", &["write -P 1 0 128k", "write -c -P 1 1M 64k", "write 1900k 4k"]);
        let good = fs::read(&path).unwrap();
        let header = Header::read(&good).unwrap();
        let cluster = header.cluster as usize;
        let l1 = header.l1.offset as usize;
        let reftable = header.reftable.offset as usize;
        let offset = |at: usize| (be64(&good, at) & 0x00ff_ffff_ffff_fe00) as usize;
        let l2 = offset(l1);
        let (data, block) = (offset(l2), offset(reftable));
        let wide = if header.extended_l2() { 16 } else { 8 };
        let compressed = l2 + (1 << 20) / cluster * wide;
        // Each damage: where, and the bits to be flipped there; what it does.
        let mut damages: Vec<(&str, usize, u64, bool)> = vec![
            ("COPIED of an L1 entry", l1, 1 << 63, true),
            ("reserved bits of an L1 entry", l1, 1, true),
            ("COPIED of an L2 entry", l2, 1 << 63, true),
            ("reserved bits of an L2 entry", l2, 1 << 60, true),
            ("unaligned data", l2, 512, true),
            ("data beyond the end", l2, 1 << 40, true),
            ("COPIED and compressed", compressed, 1 << 63, true),
            ("a refcount of 0", block + data / cluster * 2, 1 << 48, true),
            ("a refcount of 3", block + data / cluster * 2, 2 << 48, true),
            ("a leak", block + 100, 1 << 48, false),
            ("two owners", l2, (data ^ offset(l2 + wide)) as u64, true),
        ];
        if header.extended_l2() {
            damages.push(("both bits", l2 + 8, 1 << 33, true));
            damages.push(("a bitmap of nothing", l2 + 16 * 20 + 8, 1, true));
            damages.push(("a bitmap of something compressed", compressed + 8, 1 << 40, true));
            damages.push(("the zero flag", l2, 1, true));
        }
        for (what, at, flip, bad) in damages {
            let mut image = good.clone();
            let word = (be64(&image, at) ^ flip).to_be_bytes();
            image[at..at + 8].copy_from_slice(&word);
            fs::write(&path, &image).unwrap();
            let report = agree(&path, &format!("{kind}: {what}"));
            assert_eq!(!report.faults().is_empty(), bad, "{kind}: {what}: {report:#?}");
            assert!(bad || !report.leaks.is_empty(), "{kind}: {what}: {report:#?}");
        }
    }
}

#[test]
fn a_leak_past_the_end_is_seen() {
    if !qemu::available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    run(dir.path(), "qemu-img create -q -f qcow2 i 2M");
    let mut image = fs::read(&path).unwrap();
    let block = be64(&image, Header::read(&image).unwrap().reftable.offset as usize) as usize;
    image[block + 201] = 1;
    fs::write(&path, &image).unwrap();
    let report = agree(&path, "past the end");
    assert_eq!((report.leaks, report.leaks_inside), (vec![100], 0));
}
