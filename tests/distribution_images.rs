//! Images as distributions ship them: a file system with real files in it, packed by
//! QEMU in the ways that are in use. Each is read here byte by byte, checked beside
//! QEMU, written to here, checked and read by QEMU, written to by QEMU, and read here
//! again. Needs qemu-img, qemu-io and mke2fs.
//!
//! `scripts/distribution-images.sh` does the same with some gigabytes:
//! `QCOW2RS_DISTRIBUTION=raw-file` names what is packed.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2rs::{Image, OpenOptions, Policy, Source, WriteFlags, ZeroFlags};
use support::{
    Rng, Scratch, assert_same, describe, for_seeds, open, qemu, qemu_img_check, qemu_img_compare,
    qemu_io, qemu_ok, read, text,
};

/// Bytes that are compared at a time.
const CHUNK: u64 = 4 << 20;
/// The file system, unless another one is named.
const SMALL: u64 = 24 << 20;

/// How an image is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Packing {
    /// By `qemu-img convert`, with these options for the new image.
    Converted(&'static str),
    /// The same, compressed.
    Compressed(&'static str),
    /// With room for two tebibytes.
    Large,
    /// With an internal snapshot, and changes since.
    Snapshot,
    /// An overlay on an overlay on a compressed image.
    Chain,
    /// With its data in a file of its own.
    DataFile(&'static str),
}

const PACKINGS: [Packing; 13] = [
    Packing::Compressed("compression_type=zlib"),
    Packing::Compressed("compression_type=zstd"),
    Packing::Compressed("compat=0.10"),
    Packing::Converted("compat=0.10"),
    Packing::Converted("cluster_size=2M"),
    Packing::Converted("preallocation=metadata"),
    Packing::Converted("lazy_refcounts=on"),
    Packing::Converted("extended_l2=on,cluster_size=128k"),
    Packing::Large,
    Packing::Snapshot,
    Packing::Chain,
    Packing::DataFile("off"),
    Packing::DataFile("on"),
];

/// Takes files of this machine until there are so many bytes of them.
fn gather(from: &Path, to: &Path, left: &mut u64) {
    let Ok(entries) = fs::read_dir(from) else { return };
    let mut entries: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    for path in entries {
        let Ok(facts) = fs::symlink_metadata(&path) else { continue };
        let copy = to.join(path.file_name().unwrap());
        if facts.is_dir() && *left > 0 {
            fs::create_dir(&copy).unwrap();
            gather(&path, &copy, left);
        } else if facts.is_file() && facts.len() <= *left && fs::copy(&path, &copy).is_ok() {
            *left -= facts.len();
        }
    }
}

/// A raw file with a file system in it.
fn content(scratch: &Scratch) -> PathBuf {
    if let Some(named) = std::env::var_os("QCOW2RS_DISTRIBUTION") {
        return named.into();
    }
    let (files, raw) = (scratch.path("files"), scratch.path("content"));
    fs::create_dir(&files).unwrap();
    let mut left = SMALL * 5 / 8;
    for from in ["/usr/bin", "/usr/lib", "/usr/share"] {
        let to = files.join(Path::new(from).file_name().unwrap());
        fs::create_dir(&to).unwrap();
        let mut some = left / 2;
        let before = some;
        gather(Path::new(from), &to, &mut some);
        left -= before - some;
    }
    let size = format!("{}k", SMALL >> 10);
    let made = Command::new("/usr/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d", text(&files), text(&raw), &size])
        .output()
        .expect("mke2fs is there (Debian package e2fsprogs)");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    raw
}

/// Makes an image of a raw file; and a raw file that reads the same, as QEMU has it.
fn pack(raw: &Path, path: &Path, packing: Packing) {
    let convert = |options: &str, more: &[&str], to: &Path| {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        args.extend(more);
        args.extend([text(raw), text(to)]);
        qemu_ok("qemu-img", &args);
    };
    let overlay = |base: &Path, over: &Path| {
        let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(base), text(over)];
        qemu_ok("qemu-img", &args);
    };
    match packing {
        Packing::Converted(options) => convert(options, &[], path),
        Packing::Compressed(options) => convert(options, &["-c"], path),
        Packing::Large => {
            convert("cluster_size=64k", &[], path);
            qemu_ok("qemu-img", &["resize", "-q", "-f", "qcow2", text(path), "2T"]);
            qemu_io(path, &["write -P 7 1T 3M".into(), "write -P 8 1500G 4k".into()]);
        }
        Packing::Snapshot => {
            convert("cluster_size=64k", &[], path);
            qemu_ok("qemu-img", &["snapshot", "-c", "shipped", text(path)]);
            qemu_io(path, &["write -P 7 1M 3M".into(), "write -z 8M 1M".into()]);
        }
        Packing::Chain => {
            let (base, middle) = (path.with_extension("base"), path.with_extension("middle"));
            convert("cluster_size=64k", &["-c"], &base);
            overlay(&base, &middle);
            qemu_io(&middle, &["write -P 7 1M 300k".into(), "write -z 8M 1M".into()]);
            overlay(&middle, path);
            qemu_io(path, &["write -P 9 1100k 5k".into(), "discard 9M 2M".into()]);
        }
        Packing::DataFile(raw_data) => {
            let data = path.with_extension("data");
            let options = format!("data_file={},data_file_raw={raw_data}", text(&data));
            convert(&options, &[], path);
        }
    }
}

/// Fails where the disk of an image is not what a raw file is, which may end earlier:
/// behind it there are zeroes, some of which are not looked at one by one.
fn assert_reads_as(image: &Image, raw: &Path) {
    let file = File::open(raw).unwrap();
    let (length, size) = (file.metadata().unwrap().len(), image.size());
    let (mut ours, mut theirs) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut extents = Vec::new();
    image.block_status(0, size, false, usize::MAX, &mut |extent| extents.push(extent)).unwrap();
    for extent in extents {
        let (end, mut at) = (extent.offset + extent.length, extent.offset);
        // Most of a large disk is nothing at all, which the map says.
        if extent.zero && extent.length > 1 << 30 {
            at = end;
        }
        while at < end {
            let some = (end - at).min(CHUNK) as usize;
            image.read_at(&mut ours[..some], at).unwrap();
            theirs.fill(0);
            let there = some.min(length.saturating_sub(at) as usize);
            file.read_exact_at(&mut theirs[..there], at).unwrap();
            assert_same(&ours[..some], &theirs[..some]);
            at += some as u64;
        }
    }
}

/// What both checks say.
fn assert_checks_agree(path: &Path) {
    let printed = qemu("qemu-img", &["check", "-f", "qcow2", "--output=json", text(path)]);
    let theirs: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    let their = |name: &str| theirs[name].as_u64().unwrap_or(0);
    let image = open(path);
    let ours = image.check(&mut ()).0;
    image.close().unwrap();
    for (name, ours) in [
        ("corruptions", ours.corruptions),
        ("leaks", ours.leaks),
        ("check-errors", ours.check_errors),
        ("image-end-offset", ours.image_end_offset),
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
    ] {
        assert_eq!(ours, their(name), "{name}");
    }
}

/// Changes the image and the raw file here and there.
fn change(path: &Path, raw: &Path, rng: &mut Rng) {
    let options = OpenOptions::new().policy(Policy::Paths).writable(true);
    let image = Image::open(Source::path(path), &options).unwrap();
    let file = File::options().write(true).open(raw).unwrap();
    let size = file.metadata().unwrap().len();
    for _ in 0..40 {
        let start = rng.below(size / 512) * 512;
        let length = (512 + rng.below(600) * 512).min(size - start);
        let mut bytes = vec![0; length as usize];
        match rng.below(4) {
            0 => {
                let flags = ZeroFlags { may_unmap: rng.below(2) == 0, ..ZeroFlags::default() };
                image.write_zeroes(start, length, flags).unwrap();
            }
            1 => {
                image.discard(start, length).unwrap();
                // Which bytes that takes is the driver's affair.
                image.read_at(&mut bytes, start).unwrap();
            }
            _ => {
                rng.fill(&mut bytes);
                image.write_at(&bytes, start, WriteFlags::default()).unwrap();
            }
        }
        file.write_all_at(&bytes, start).unwrap();
    }
    image.close().unwrap();
}

/// The same by QEMU.
fn qemu_changes(path: &Path, raw: &Path, rng: &mut Rng) {
    let file = File::options().write(true).open(raw).unwrap();
    let size = file.metadata().unwrap().len();
    let mut commands = Vec::new();
    for _ in 0..20 {
        let start = rng.below(size / 512) * 512;
        let length = (512 + rng.below(600) * 512).min(size - start);
        let value = (1 + rng.below(200)) as u8;
        commands.push(format!("write -P {value} {start} {length}"));
        file.write_all_at(&vec![value; length as usize], start).unwrap();
    }
    qemu_io(path, &commands);
}

fn there_and_back(content: &Path, packing: Packing, rng: &mut Rng) {
    let scratch = Scratch::new();
    let (path, raw) = (scratch.path("image.qcow2"), scratch.path("image.raw"));
    pack(content, &path, packing);
    // What QEMU says is in there; of a very large disk, sparsely.
    qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&raw)]);
    assert_reads_as(&open(&path), &raw);
    assert_checks_agree(&path);
    let snapshot =
        |name: &str| assert_reads_as(&open(&path).snapshot_open(name.as_bytes()).unwrap(), content);
    if packing == Packing::Snapshot {
        snapshot("shipped");
    }
    if packing == Packing::Large {
        // The rest of it is not changed, nor copied about.
        let length = fs::metadata(content).unwrap().len();
        File::options().write(true).open(&raw).unwrap().set_len(length).unwrap();
    }
    let compare = |what: &str| {
        describe(what.to_owned(), || {
            qemu_img_check(&path);
            assert_checks_agree(&path);
            if packing != Packing::Large {
                assert_reads_as(&open(&path), &raw);
                qemu_img_compare(&path, "qcow2", &raw, "raw");
                return;
            }
            let (image, bytes) = (open(&path), fs::read(&raw).unwrap());
            assert_same(&read(&image, 0, bytes.len() as u64), &bytes);
        });
    };
    change(&path, &raw, rng);
    compare("written here");
    qemu_changes(&path, &raw, rng);
    compare("written by QEMU");
    change(&path, &raw, rng);
    compare("written here again");
    match packing {
        Packing::Snapshot => snapshot("shipped"),
        Packing::Large => {
            qemu_io(&path, &["read -P 7 1T 3M".into(), "read -P 8 1500G 4k".into()]);
        }
        Packing::DataFile("on") => {
            qemu_img_compare(&path.with_extension("data"), "raw", &raw, "raw");
        }
        _ => {}
    }
}

#[test]
fn images_that_are_shipped_go_there_and_back() {
    let scratch = Scratch::new();
    let content = content(&scratch);
    for_seeds("distribution_images", 1, |seed| {
        for (index, packing) in PACKINGS.into_iter().enumerate() {
            let mut rng = Rng::new(seed * 64 + index as u64);
            describe(format!("seed {seed}, {packing:?}"), || {
                there_and_back(&content, packing, &mut rng);
            });
        }
    });
}
