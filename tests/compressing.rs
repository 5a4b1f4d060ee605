//! Compressed clusters that we write: QEMU reads them, packs between them, finds
//! nothing to complain of, and would not have made them smaller.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test compressing`
//! replays it.

mod support;

use std::path::{Path, PathBuf};

use qcow2rs::{
    Compression, CreateOptions, ErrorKind, Format, Image, OpenOptions, Policy, WriteFlags,
    ZeroFlags,
};
use support::dissect::{COMPRESSED, Dissected};
use support::operations::{Backing, Case, Op};
use support::refcounts::assert_exact;
use support::{
    Rng, Scratch, assert_content, describe, for_seeds, open, open_rw, open_somehow, qemu_create,
    qemu_img_check, qemu_img_compare, qemu_io, qemu_ok, text,
};

const CLUSTER: u64 = 64 << 10;
const PLAIN: WriteFlags = WriteFlags { fua: false, compressed: false, unchanged: false };
const COMPRESS: WriteFlags = WriteFlags { compressed: true, ..PLAIN };

/// Bytes of which some clusters compress well, some badly, some not at all.
fn mixed(rng: &mut Rng, size: u64, cluster: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    rng.fill(&mut bytes);
    for piece in bytes.chunks_mut(cluster as usize) {
        let mask = [0u8, 0x01, 0x07, 0x3f, 0xff][rng.below(5) as usize];
        piece.iter_mut().for_each(|byte| *byte &= mask);
    }
    bytes
}

fn created(path: &Path, case: &Case, compression: Compression) -> Image {
    let mut options = CreateOptions::default();
    options.size = Some(case.size);
    options.version = case.version;
    options.cluster_size = case.cluster_size;
    options.extended_l2 = case.extended_l2;
    options.refcount_bits = case.refcount_bits;
    options.compression = compression;
    qcow2rs::create_path_open(path, true, &options, &OpenOptions::new()).unwrap()
}

/// The image is sound for us and for QEMU, and reads as `bytes` for both.
fn assert_sound(path: &Path, bytes: &[u8]) {
    qemu_img_check(path);
    assert_exact(path);
    assert_content(&open(path), bytes);
    let flat = path.with_file_name("flat");
    std::fs::write(&flat, bytes).unwrap();
    qemu_img_compare(path, "qcow2", &flat, "raw");
}

fn compressed_clusters(path: &Path) -> u64 {
    let image = Dissected::load(path);
    (0..image.guest_clusters()).filter(|n| image.entry(*n).0 & COMPRESSED != 0).count() as u64
}

fn for_cases(test: impl Fn(Case, Compression, &mut Rng)) {
    let layouts = [
        (2, 512, false, 16),
        (2, 65536, false, 16),
        (3, 512, false, 8),
        (3, 4096, false, 1),
        (3, 65536, false, 2),
        (3, 65536, false, 64),
        (3, 2 << 20, false, 16),
        (3, 16384, true, 16),
        (3, 65536, true, 1),
    ];
    for_seeds("compressing", 1, |seed| {
        for (number, layout) in layouts.into_iter().enumerate() {
            let (version, cluster_size, extended_l2, refcount_bits) = layout;
            let backing = Backing::None;
            // The last cluster is cut off by the end of the disk.
            let size = (cluster_size * 40).clamp(100_352, 8 << 20) + cluster_size / 2 / 512 * 512;
            let case = Case { version, cluster_size, extended_l2, refcount_bits, size, backing };
            for method in [Compression::Zlib, Compression::Zstd] {
                if version == 2 && method == Compression::Zstd {
                    continue;
                }
                let mut rng = Rng::new(seed.wrapping_mul(1000) + number as u64);
                describe(format!("{case:?} {method:?}"), || test(case, method, &mut rng));
            }
        }
    });
}

#[test]
fn whole_images_are_read_by_qemu_and_no_larger_than_its_own() {
    for_cases(|case, method, rng| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let bytes = mixed(rng, case.size, case.cluster_size);
        let image = created(&path, &case, method);
        let mut at = 0;
        while at < case.size {
            let len = (case.cluster_size * (1 + rng.below(3))).min(case.size - at);
            image.write_at(&bytes[at as usize..(at + len) as usize], at, COMPRESS).unwrap();
            at += len;
        }
        assert_content(&image, &bytes);
        image.close().unwrap();
        assert_sound(&path, &bytes);
        assert!(compressed_clusters(&path) > 0);

        let theirs = scratch.path("theirs");
        let flat = scratch.path("flat");
        let mut options = case.options();
        if method == Compression::Zstd {
            options += ",compression_type=zstd";
        }
        let args = ["convert", "-c", "-S", "0", "-f", "raw", "-O", "qcow2", "-o", &options];
        qemu_ok("qemu-img", &[&args[..], &[text(&flat), text(&theirs)]].concat());
        assert!(compressed_clusters(&path) >= compressed_clusters(&theirs));
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        let (ours, theirs) = (size(&path), size(&theirs));
        let allowed = theirs + theirs / 50 + 4 * case.cluster_size;
        assert!(ours <= allowed, "{ours} bytes, where QEMU takes {theirs}");
    });
}

#[test]
fn programs_get_as_small_as_with_qemu() {
    let scratch = Scratch::new();
    let flat = scratch.path("flat");
    let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    bytes.truncate(4 << 20);
    bytes.truncate(bytes.len() / CLUSTER as usize * CLUSTER as usize);
    std::fs::write(&flat, &bytes).unwrap();
    for name in ["zlib", "zstd"] {
        let (path, theirs) = (scratch.path(name), scratch.path("theirs"));
        let mut options = CreateOptions::default();
        options.size = Some(bytes.len() as u64);
        options.set("compression_type", name).unwrap();
        let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new()).unwrap();
        image.write_at(&bytes, 0, COMPRESS).unwrap();
        image.close().unwrap();
        let choice = format!("compression_type={name}");
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &choice];
        qemu_ok("qemu-img", &[&args[..], &[text(&flat), text(&theirs)]].concat());
        let total = |path: &Path| -> u64 {
            let image = Dissected::load(path);
            let clusters = (0..image.guest_clusters()).map(|n| image.entry(n).0);
            let sizes = clusters.map(|entry| match entry & COMPRESSED {
                0 => CLUSTER,
                _ => image.compressed(entry).1,
            });
            sizes.sum()
        };
        let (ours, theirs) = (total(&path), total(&theirs));
        assert!(ours <= theirs + theirs / 50, "{name}: {ours} bytes, {theirs} in QEMU");
    }
}

#[test]
fn qemu_and_we_take_turns() {
    for_cases(|case, method, rng| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        created(&path, &case, method).close().unwrap();
        let mut model = vec![0; case.size as usize];
        for _ in 0..2 {
            let image = open_somehow(&path, rng);
            for _ in 0..16 {
                if rng.below(2) == 0 {
                    compress_range(&image, &case, rng, &mut model);
                } else {
                    let op = case.op(rng, false);
                    op.apply(&image);
                    op.follow(&case, &image, &mut model);
                }
            }
            assert_content(&image, &model);
            image.close().unwrap();
            assert_sound(&path, &model);
            // In two runs: QEMU packs on into what it has freed.
            let (at, len) = whole_clusters(&case, rng);
            let byte = rng.below(255) as u8;
            qemu_io(&path, &[format!("discard {at} {len}")]);
            qemu_io(&path, &[format!("write -c -P {byte} {at} {len}")]);
            model[at as usize..(at + len) as usize].fill(byte);
            let ops: Vec<Op> = (0..4).map(|_| case.op(rng, true)).collect();
            qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
            ops.iter().for_each(|op| op.model(&case, &mut model));
        }
        assert_sound(&path, &model);
    });
}

fn whole_clusters(case: &Case, rng: &mut Rng) -> (u64, u64) {
    let size = case.cluster_size;
    let at = rng.below(case.size.div_ceil(size)) * size;
    (at, (size * (1 + rng.below(3))).min(case.size - at))
}

/// What is stored is given up first: compressed data does not replace it.
fn compress_range(image: &Image, case: &Case, rng: &mut Rng, model: &mut [u8]) {
    let (at, len) = whole_clusters(case, rng);
    let range = at as usize..(at + len) as usize;
    image.discard(at, len).unwrap();
    let bytes = mixed(rng, len, case.cluster_size);
    let flags = WriteFlags { fua: rng.below(8) == 0, ..COMPRESS };
    image.write_at(&bytes, at, flags).unwrap();
    model[range].copy_from_slice(&bytes);
}

fn plain_image(scratch: &Scratch) -> (PathBuf, Image) {
    let path = scratch.path("image");
    qemu_create(&path, "", 16 * CLUSTER);
    let image = open_rw(&path);
    (path, image)
}

/// A cluster of bytes that compress.
fn fill(byte: u8) -> Vec<u8> {
    vec![byte; CLUSTER as usize]
}

#[test]
fn what_is_there_decides_as_in_qemu() {
    let scratch = Scratch::new();
    let (path, image) = plain_image(&scratch);
    let mut content = vec![0; 16 * CLUSTER as usize];
    let mut noise = fill(0);
    Rng::new(1).fill(&mut noise);
    image.write_at(&fill(1), 0, PLAIN).unwrap();
    image.write_zeroes(CLUSTER, CLUSTER, ZeroFlags::default()).unwrap();
    image.write_at(&fill(2), 2 * CLUSTER, COMPRESS).unwrap();
    image.write_at(&fill(3), 3 * CLUSTER, PLAIN).unwrap();
    // Zero, with its host cluster kept.
    image.write_zeroes(3 * CLUSTER, CLUSTER, ZeroFlags::default()).unwrap();
    for stored in [0, 3] {
        let error = image.write_at(&fill(9), stored * CLUSTER, COMPRESS).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{error}");
        assert!(error.message().contains("discard it first"), "{}", error.message());
    }
    for replaced in [1, 2] {
        image.write_at(&fill(10 + replaced), u64::from(replaced) * CLUSTER, COMPRESS).unwrap();
    }
    // What does not get smaller is written as without the flag.
    for at in [0, 4] {
        image.write_at(&noise, at * CLUSTER, COMPRESS).unwrap();
        content[(at * CLUSTER) as usize..][..CLUSTER as usize].copy_from_slice(&noise);
    }
    for (at, byte) in [(1, 11), (2, 12)] {
        content[(at * CLUSTER) as usize..][..CLUSTER as usize].fill(byte);
    }
    assert_content(&image, &content);
    image.close().unwrap();
    assert_sound(&path, &content);
    assert_eq!(compressed_clusters(&path), 2);
    let refused = ["-f", "qcow2", "-c", "write -c -P 9 192k 64k", text(&path)];
    assert!(!support::qemu("qemu-io", &refused).status.success());
}

#[test]
fn a_snapshot_keeps_what_a_compressed_write_replaces() {
    for options in ["", "extended_l2=on"] {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        qemu_create(&path, options, 16 * CLUSTER);
        qemu_io(&path, &["write -P 1 0 64k".into(), "write -c -P 2 64k 64k".into()]);
        qemu_ok("qemu-img", &["snapshot", "-c", "kept", text(&path)]);
        let image = open_rw(&path);
        image.write_at(&[fill(7), fill(8)].concat(), 0, COMPRESS).unwrap();
        image.close().unwrap();
        let content = [fill(7), fill(8), vec![0; 14 * CLUSTER as usize]].concat();
        assert_sound(&path, &content);
        qemu_ok("qemu-img", &["snapshot", "-a", "kept", text(&path)]);
        qemu_io(&path, &["read -P 1 0 64k".into(), "read -P 2 64k 64k".into()]);
        qemu_ok("qemu-img", &["snapshot", "-d", "kept", text(&path)]);
        qemu_img_check(&path);
    }
}

#[test]
fn only_whole_clusters_are_compressed() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 3 * CLUSTER + 1024);
    let image = open_rw(&path);
    let refused = |at: u64, len: u64| {
        let error = image.write_at(&vec![1; len as usize], at, COMPRESS).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{at} {len}");
    };
    refused(512, CLUSTER);
    refused(0, CLUSTER - 1);
    refused(CLUSTER, CLUSTER + 512);
    refused(3 * CLUSTER, 512);
    refused(3 * CLUSTER, CLUSTER);
    refused(3 * CLUSTER + 512, 512);
    image.write_at(&[], 100, COMPRESS).unwrap();
    image.write_at(&vec![2; CLUSTER as usize + 1024], 2 * CLUSTER, COMPRESS).unwrap();
    image.close().unwrap();
    let mut content = vec![0; 2 * CLUSTER as usize];
    content.resize(3 * CLUSTER as usize + 1024, 2);
    assert_sound(&path, &content);
    assert_eq!(compressed_clusters(&path), 2);

    let image = open(&path);
    let error = image.write_at(&fill(1), 0, COMPRESS).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    let raw = scratch.path("raw");
    std::fs::write(&raw, fill(0)).unwrap();
    let mut options = OpenOptions::new().writable(true);
    options.format = Format::Raw;
    let image = Image::open(qcow2rs::Source::path(&raw), &options).unwrap();
    let error = image.write_at(&fill(1), 0, COMPRESS).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
}

/// QEMU 10.0.2 gives the new data a place in a cluster that belongs to others by then.
#[test]
fn a_freed_host_cluster_is_not_packed_into() {
    for bits in [1, 2, 16] {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        qemu_create(&path, &format!("refcount_bits={bits}"), 16 * CLUSTER);
        let image = open_rw(&path);
        image.write_at(&fill(1), 0, COMPRESS).unwrap();
        let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        image.write_zeroes(0, CLUSTER, unmap).unwrap();
        for _ in 0..3 {
            image.flush().unwrap();
        }
        // Whatever is free is used: by one of these.
        for at in 4..16 {
            image.write_at(&fill(2), at * CLUSTER, PLAIN).unwrap();
        }
        for at in 1..4 {
            image.write_at(&fill(3), at * CLUSTER, COMPRESS).unwrap();
        }
        let content = [fill(0), vec![3; 3 * CLUSTER as usize], vec![2; 12 * CLUSTER as usize]];
        assert_content(&image, &content.concat());
        image.close().unwrap();
        assert_sound(&path, &content.concat());
    }
}

/// Places that are used again, for other data of the same length, must not be
/// answered from memory.
#[test]
fn what_was_decompressed_is_forgotten_with_its_place() {
    let scratch = Scratch::new();
    let (path, image) = plain_image(&scratch);
    let mut seen = std::collections::BTreeSet::new();
    for round in 1..=40u8 {
        image.write_at(&fill(round), 0, COMPRESS).unwrap();
        let mut found = vec![0; 4096];
        image.read_at(&mut found, 8192).unwrap();
        assert!(found.iter().all(|byte| *byte == round), "round {round}: {}", found[0]);
        image.discard(0, CLUSTER).unwrap();
        // To a cluster of its own: what is open ends.
        image.reopen(true, true).unwrap();
        image.write_at(&fill(round), CLUSTER, COMPRESS).unwrap();
        image.read_at(&mut found, CLUSTER).unwrap();
        assert!(found.iter().all(|byte| *byte == round), "round {round}: {}", found[0]);
        image.flush().unwrap();
        let file = Dissected::load(&path);
        seen.insert(file.compressed(file.entry(1).0).0);
    }
    assert!(seen.len() < 40, "some place was used again");
    image.close().unwrap();
}

#[test]
fn threads_compress_side_by_side() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 128 * CLUSTER);
    let image = open_rw(&path);
    let bytes = mixed(&mut Rng::new(9), 128 * CLUSTER, CLUSTER);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (image, bytes) = (&image, &bytes);
            scope.spawn(move || {
                for n in (thread..128).step_by(4) {
                    let at = (n * CLUSTER) as usize;
                    let data = &bytes[at..at + CLUSTER as usize];
                    image.write_at(data, at as u64, COMPRESS).unwrap();
                    let mut found = vec![0; 4096];
                    for part in (0..CLUSTER as usize).step_by(4096) {
                        image.read_at(&mut found, (at + part) as u64).unwrap();
                        assert!(found == data[part..part + 4096]);
                    }
                }
            });
        }
    });
    image.close().unwrap();
    assert_sound(&path, &bytes);
}

#[test]
fn compressed_writes_over_a_backing_file() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    std::fs::write(&base, vec![5; 4 * CLUSTER as usize]).unwrap();
    let path = scratch.path("image");
    qemu_create(&path, "backing_file=base,backing_fmt=raw", 4 * CLUSTER);
    let options = OpenOptions::new().writable(true).policy(Policy::Paths);
    let image = Image::open(qcow2rs::Source::path(&path), &options).unwrap();
    image.write_at(&fill(1), CLUSTER, COMPRESS).unwrap();
    // Now it is a normal one.
    image.write_at(&[9; 512], CLUSTER + 512, PLAIN).unwrap();
    image.write_at(&fill(2), 2 * CLUSTER, COMPRESS).unwrap();
    image.close().unwrap();
    let mut content = [fill(5), fill(1), fill(2), fill(5)].concat();
    content[CLUSTER as usize + 512..][..512].fill(9);
    qemu_img_check(&path);
    let flat = scratch.path("flat");
    std::fs::write(&flat, &content).unwrap();
    qemu_img_compare(&path, "qcow2", &flat, "raw");
}

#[test]
fn the_method_is_chosen_when_an_image_is_made() {
    let scratch = Scratch::new();
    for (method, name) in [(Compression::Zlib, "zlib"), (Compression::Zstd, "zstd")] {
        let path = scratch.path(name);
        let mut options = CreateOptions::default();
        options.set("size", "1M").unwrap();
        options.set("compression_type", name).unwrap();
        assert_eq!(options.compression, method);
        let measured = qcow2rs::measure(&options).unwrap();
        let mut plain = CreateOptions::default();
        plain.size = Some(1 << 20);
        assert_eq!(measured, qcow2rs::measure(&plain).unwrap());
        qcow2rs::create_path(&path, true, &options, &OpenOptions::new()).unwrap();
        let theirs = qemu_ok("qemu-img", &["info", "--output=json", text(&path)]);
        let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
        let ours: serde_json::Value =
            serde_json::from_str(&open(&path).info_json().unwrap()).unwrap();
        for info in [&theirs, &ours] {
            assert_eq!(info["format-specific"]["data"]["compression-type"], name);
        }
        assert_eq!(
            open(&path).info().unwrap().qcow2.unwrap().compression_type,
            u32::from(method.number())
        );
        qemu_img_check(&path);
        options.set("compat", "0.10").unwrap();
        let old = qcow2rs::create_path(&scratch.path("old"), true, &options, &OpenOptions::new());
        let args = ["create", "-q", "-f", "qcow2", "-o"];
        let choice = format!("compat=0.10,compression_type={name}");
        let other = scratch.path("other");
        let qemu = support::qemu("qemu-img", &[&args[..], &[&choice, text(&other), "1M"]].concat());
        assert_eq!(old.is_ok(), qemu.status.success(), "{name}");
        assert_eq!(old.is_ok(), method == Compression::Zlib);
        let _ = std::fs::remove_file(scratch.path("old"));
    }
}
