//! Compressed clusters, all of them made by QEMU: we read them as it does, and
//! whatever is done to them leaves their neighbours and the refcounts right.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test compressed`
//! replays it.

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qcow2rs::{ErrorKind, Extent, Image, WriteFlags, ZeroFlags};
use support::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, ZERO, field};
use support::operations::{Backing, Case, Op};
use support::refcounts::assert_exact;
use support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, open, open_rw, open_somehow,
    qemu, qemu_create, qemu_img_check, qemu_img_compare, qemu_io, qemu_ok, read, text,
};

const CLUSTER: u64 = 64 << 10;

/// Bytes that compress well, badly, or not at all, from one piece to the next.
fn mixed(rng: &mut Rng, size: u64, piece: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    rng.fill(&mut bytes);
    for piece in bytes.chunks_mut(piece as usize) {
        let mask = [0u8, 0x01, 0x0f, 0x7f, 0xff][rng.below(5) as usize];
        let base = if mask == 0xff { 0 } else { rng.below(2) as u8 * 0x80 };
        piece.iter_mut().for_each(|byte| *byte = *byte & mask | base);
    }
    bytes
}

/// Lets QEMU make a compressed image of these bytes.
fn compress(image: &Path, options: &str, bytes: &[u8]) {
    let raw = image.with_file_name("plain.raw");
    std::fs::write(&raw, bytes).unwrap();
    let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, text(&raw)];
    qemu_ok("qemu-img", &[&args[..], &[text(image)]].concat());
}

fn is_compressed(image: &Dissected, cluster: u64) -> bool {
    image.entry(cluster).0 & COMPRESSED != 0
}

/// Guest clusters that are compressed.
fn compressed_clusters(image: &Dissected) -> Vec<u64> {
    (0..image.guest_clusters()).filter(|cluster| is_compressed(image, *cluster)).collect()
}

/// First and last host cluster of a compressed guest cluster.
fn touched(image: &Dissected, cluster: u64) -> (u64, u64) {
    let (offset, length) = image.compressed(image.entry(cluster).0);
    (offset >> image.cluster_bits(), (offset + length - 1) >> image.cluster_bits())
}

fn layouts() -> Vec<(u32, u64, bool, u32)> {
    vec![
        (2, 512, false, 16),
        (2, 65536, false, 16),
        (3, 512, false, 8),
        (3, 4096, false, 1),
        (3, 4096, false, 16),
        (3, 65536, false, 4),
        (3, 65536, false, 64),
        (3, 2 << 20, false, 16),
        (3, 16384, true, 16),
        (3, 65536, true, 1),
        (3, 131072, true, 8),
    ]
}

/// What is added to the options for each method of compression.
const METHODS: [&str; 2] = ["", ",compression_type=zstd"];

/// Calls `test` with cases and the options that make them.
fn for_cases(test: impl Fn(Case, &str, &mut Rng)) {
    for_seeds("compressed", 1, |seed| {
        let cases =
            METHODS.iter().flat_map(|method| layouts().into_iter().map(move |l| (l, method)));
        for (number, (layout, method)) in cases.enumerate() {
            let (version, cluster_size, extended_l2, refcount_bits) = layout;
            if version < 3 && !method.is_empty() {
                continue;
            }
            // The last cluster is cut off by the end of the disk.
            let size =
                (cluster_size * 40).clamp(100_352, 8 << 20) + cluster_size / 2 / 512 * 512 + 1536;
            let backing = Backing::None;
            let case = Case { version, cluster_size, extended_l2, refcount_bits, size, backing };
            let mut rng = Rng::new(seed.wrapping_mul(1000) + number as u64);
            let options = case.options() + method;
            describe(format!("{case:?}{method}"), || test(case, &options, &mut rng));
        }
    });
}

#[test]
fn reads_agree_with_what_was_compressed() {
    for_cases(|case, options, rng| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let bytes = mixed(rng, case.size, case.cluster_size);
        compress(&path, options, &bytes);
        let image = open(&path);
        assert_content(&image, &bytes);
        for _ in 0..50 {
            let (at, len) = case.range(rng);
            assert_same(&read(&image, at, len), &bytes[at as usize..(at + len) as usize]);
        }
        let mut found = BTreeSet::new();
        let mut note = |extent: Extent| {
            if extent.compressed {
                assert!(extent.data && extent.allocated && extent.host_offset.is_none());
                let end = (extent.offset + extent.length).div_ceil(case.cluster_size);
                found.extend(extent.offset / case.cluster_size..end);
            }
        };
        image.block_status(0, case.size, false, usize::MAX, &mut note).unwrap();
        let expected = compressed_clusters(&Dissected::load(&path));
        assert!(!expected.is_empty());
        assert_eq!(Vec::from_iter(found), expected);
    });
}

#[test]
fn compressed_images_can_be_written_like_any_other() {
    for_cases(|case, options, rng| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let mut model = mixed(rng, case.size, case.cluster_size);
        compress(&path, options, &model);
        for _ in 0..2 {
            let image = open_somehow(&path, rng);
            for _ in 0..20 {
                let op = case.op(rng, false);
                op.apply(&image);
                op.follow(&case, &image, &mut model);
            }
            assert_content(&image, &model);
            image.close().unwrap();
            qemu_img_check(&path);
            assert_exact(&path);
            // QEMU packs more between what is left.
            let holes: Vec<u64> = {
                let image = Dissected::load(&path);
                let whole = 0..case.size / case.cluster_size;
                whole.filter(|n| image.entry(*n) == (0, 0)).take(3).collect()
            };
            let size = case.cluster_size;
            let fill = |n: &u64| format!("write -c -P {} {} {size}", n % 200 + 1, n * size);
            qemu_io(&path, &holes.iter().map(fill).collect::<Vec<_>>());
            for n in holes {
                model[(n * size) as usize..][..size as usize].fill((n % 200) as u8 + 1);
            }
            let ops: Vec<Op> = (0..5).map(|_| case.op(rng, true)).collect();
            qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
            ops.iter().for_each(|op| op.model(&case, &mut model));
            assert_content(&open(&path), &model);
            assert_exact(&path);
        }
        let flat = scratch.path("model");
        std::fs::write(&flat, &model).unwrap();
        qemu_img_compare(&path, "qcow2", &flat, "raw");
    });
}

/// Four compressed clusters that QEMU packs into one host cluster, and a copy of
/// what the disk reads as.
fn packed(scratch: &Scratch, options: &str) -> (PathBuf, Vec<u8>) {
    let path = scratch.path("image");
    qemu_create(&path, options, 8 * CLUSTER);
    let write = |n: u64| format!("write -c -P {} {} 64k", n + 1, n * CLUSTER);
    qemu_io(&path, &(0..4).map(write).collect::<Vec<_>>());
    let image = Dissected::load(&path);
    let first = touched(&image, 0).0;
    assert!((0..4).all(|n| touched(&image, n) == (first, first)));
    assert_eq!(image.refcount(first), 4);
    let mut content = vec![0; 8 * CLUSTER as usize];
    for n in 0..4 {
        content[(n * CLUSTER) as usize..][..CLUSTER as usize].fill(n as u8 + 1);
    }
    (path, content)
}

fn change(path: &Path, change: impl FnOnce(&Image)) -> Dissected {
    let image = open_rw(path);
    change(&image);
    image.close().unwrap();
    qemu_img_check(path);
    assert_exact(path);
    Dissected::load(path)
}

#[test]
fn a_host_cluster_lives_as_long_as_one_compressed_cluster_in_it() {
    for options in ["compat=0.10", "", "extended_l2=on", "refcount_bits=4"] {
        let scratch = Scratch::new();
        let (path, mut content) = packed(&scratch, options);
        let host = touched(&Dissected::load(&path), 0).0;
        let mut left = 4;
        for step in 0..4 {
            let image = change(&path, |image| match step {
                0 => image.write_at(&[9; 512], 512, WriteFlags::default()).unwrap(),
                1 => image.discard(CLUSTER, CLUSTER).unwrap(),
                2 => image.write_zeroes(2 * CLUSTER, CLUSTER, ZeroFlags::default()).unwrap(),
                _ => image.write_at(&[8; 65536], 3 * CLUSTER, WriteFlags::default()).unwrap(),
            });
            match step {
                0 => content[512..1024].fill(9),
                1 | 2 => content[step * CLUSTER as usize..][..CLUSTER as usize].fill(0),
                _ => content[3 * CLUSTER as usize..][..CLUSTER as usize].fill(8),
            }
            left -= 1;
            assert_eq!(image.refcount(host), left, "{options}, step {step}");
            assert_content(&open(&path), &content);
            if step < 3 {
                qemu_io(&path, &[format!("read -P 4 {} 64k", 3 * CLUSTER)]);
            }
        }
        // Now it is anybody's.
        let image = change(&path, |image| {
            image.write_at(&[7; 65536], 5 * CLUSTER, WriteFlags::default()).unwrap();
        });
        assert_eq!(image.host(5), host * CLUSTER);
        content[5 * CLUSTER as usize..][..CLUSTER as usize].fill(7);
        assert_content(&open(&path), &content);
    }
}

#[test]
fn a_compressed_cluster_may_lie_in_two_host_clusters() {
    for options in ["compat=1.1", "extended_l2=on"] {
        for discard in [false, true] {
            let scratch = Scratch::new();
            let path = scratch.path("image");
            // Each takes more than half a host cluster.
            let mut bytes = vec![0; 8 * CLUSTER as usize];
            Rng::new(1).fill(&mut bytes);
            bytes.iter_mut().for_each(|byte| *byte &= 0x3f);
            compress(&path, options, &bytes);
            let before = Dissected::load(&path);
            let spans = |n: &u64| touched(&before, *n).0 != touched(&before, *n).1;
            let cluster = compressed_clusters(&before).into_iter().find(spans).unwrap();
            let (first, last) = touched(&before, cluster);
            let at = cluster * CLUSTER;
            let after = change(&path, |image| match discard {
                true => image.discard(at, CLUSTER).unwrap(),
                false => image.write_at(&[9; 512], at, WriteFlags::default()).unwrap(),
            });
            for host in [first, last] {
                assert_eq!(after.refcount(host), before.refcount(host) - 1);
            }
            let len = if discard { CLUSTER } else { 512 };
            bytes[at as usize..(at + len) as usize].fill(if discard { 0 } else { 9 });
            assert_content(&open(&path), &bytes);
        }
    }
}

#[test]
fn what_a_partial_change_leaves_in_the_entry() {
    type Change = fn(&Image);
    let all = 0x0000_0000_ffff_ffff;
    let write: Change = |image| image.write_at(&[9; 700], 100, WriteFlags::default()).unwrap();
    let zero: Change = |image| image.write_zeroes(2048, 4096, ZeroFlags::default()).unwrap();
    let discard: Change = |image| image.discard(2048, 8192).unwrap();
    for (options, bitmap) in [("", 0), ("extended_l2=on", all)] {
        for (what, operation) in [("write", write), ("zero", zero)] {
            let scratch = Scratch::new();
            let (path, _) = packed(&scratch, options);
            let image = change(&path, operation);
            let (descriptor, found) = image.entry(0);
            assert_eq!(descriptor & !OFFSET, COPIED, "{options}: {what}");
            assert_eq!(found, bitmap, "{options}: {what}");
        }
        // Less than a compressed cluster cannot be given up.
        let scratch = Scratch::new();
        let (path, content) = packed(&scratch, options);
        let before = Dissected::load(&path);
        let after = change(&path, discard);
        assert!(before.bytes == after.bytes, "{options}");
        assert_content(&open(&path), &content);
        // All of it can.
        let after = change(&path, |image| image.discard(0, 2 * CLUSTER).unwrap());
        let zero = if bitmap == 0 { (ZERO, 0) } else { (0, all << 32) };
        assert_eq!((after.entry(0), after.entry(1)), (zero, zero), "{options}");
    }
}

/// One write over the ends of a row of compressed, normal and empty clusters.
#[test]
fn a_write_over_clusters_of_all_kinds() {
    for options in ["compat=0.10", "", "extended_l2=on"] {
        let scratch = Scratch::new();
        let (path, mut content) = packed(&scratch, options);
        qemu_io(&path, &[format!("write -P 20 {} 64k", 5 * CLUSTER)]);
        content[5 * CLUSTER as usize..][..CLUSTER as usize].fill(20);
        let (start, end) = (CLUSTER + 1000, 7 * CLUSTER + 3000);
        let data = mixed(&mut Rng::new(3), end - start, 4096);
        let image = change(&path, |image| {
            image.write_at(&data, start, WriteFlags::default()).unwrap();
        });
        content[start as usize..end as usize].copy_from_slice(&data);
        assert_content(&open(&path), &content);
        assert_eq!(compressed_clusters(&image), [0]);
    }
}

/// Offsets of the clusters of an image that QEMU can read, and the bytes of all
/// (zeroes where it cannot).
fn qemus_reading(path: &Path) -> (BTreeSet<u64>, Vec<u8>) {
    let size = Dissected::load(path).size();
    let mut args: Vec<String> = ["-r", "-f", "qcow2"].map(String::from).into();
    for at in (0..size).step_by(CLUSTER as usize) {
        args.extend(["-c".into(), format!("read {at} {CLUSTER}")]);
    }
    args.push(text(path).into());
    let output = qemu("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let offsets = printed.lines().filter_map(|line| line.split_once("bytes at offset "));
    let readable = offsets.map(|(_, at)| at.trim().parse().unwrap()).collect();
    let raw = path.with_file_name("salvaged.raw");
    let args = ["convert", "--salvage", "-q", "-f", "qcow2", "-O", "raw", text(path), text(&raw)];
    qemu_ok("qemu-img", &args);
    (readable, std::fs::read(raw).unwrap())
}

/// We read exactly those clusters that QEMU reads, and the same bytes.
fn assert_reads_as_qemu(path: &Path) -> usize {
    let (readable, bytes) = qemus_reading(path);
    let image = open(path);
    let zstd = Dissected::load(path).bytes[field::COMPRESSION] == 1;
    let mut failed = 0;
    for at in (0..image.size()).step_by(CLUSTER as usize) {
        let mut buf = vec![0xee; CLUSTER as usize];
        match image.read_at(&mut buf, at) {
            Ok(()) => {
                assert!(readable.contains(&at), "{at:#x} can be read, but not by QEMU");
                // What a damaged zstd frame without a checksum holds is up to the
                // version of the library; deflate knows one answer.
                if !zstd {
                    assert_same(&buf, &bytes[at as usize..][..CLUSTER as usize]);
                }
            }
            Err(error) => {
                assert_eq!(error.errno(), libc::EIO, "{error}");
                assert!(!readable.contains(&at), "{at:#x}: {error}, but not in QEMU");
                failed += 1;
            }
        }
    }
    failed
}

/// An image whose clusters all hold other compressed data of a few KiB.
fn damageable(path: &Path, method: &str, clusters: u64) {
    let mut bytes = vec![0; (clusters * CLUSTER) as usize];
    Rng::new(5).fill(&mut bytes);
    for (n, cluster) in bytes.chunks_mut(CLUSTER as usize).enumerate() {
        // Long runs, repeats, and literals.
        cluster[..8192].iter_mut().for_each(|byte| *byte &= 0x1f);
        cluster[8192..].fill(n as u8);
        cluster.copy_within(..4096, 20_000);
    }
    compress(path, &format!("compat=1.1{method}"), &bytes);
    assert_eq!(compressed_clusters(&Dissected::load(path)).len() as u64, clusters);
}

#[test]
fn damaged_streams_fail_where_they_fail_in_qemu() {
    METHODS.iter().for_each(|method| damaged_streams(method));
}

fn damaged_streams(method: &str) {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    damageable(&path, method, 64);
    let mut rng = Rng::new(7);
    Dissected::patch(&path, |image| {
        for cluster in 0..64 {
            let (descriptor, _) = image.entry(cluster);
            let (offset, length) = image.compressed(descriptor);
            // The header of the stream, somewhere in it, or its last sector.
            let at = match cluster % 4 {
                0 => offset + cluster / 4,
                1 => offset + length - 512 + rng.below(512),
                _ => offset + rng.below(length),
            };
            let at = (at as usize).min(image.bytes.len() - 1);
            image.bytes[at] ^= 1 << rng.below(8);
        }
    });
    let failed = assert_reads_as_qemu(&path);
    assert!(failed > 5 && failed < 64, "{failed} of 64 failed");
}

#[test]
fn a_stream_that_is_cut_short_fails_where_it_fails_in_qemu() {
    METHODS.iter().for_each(|method| streams_cut_short(method));
}

fn streams_cut_short(method: &str) {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    damageable(&path, method, 32);
    Dissected::patch(&path, |image| {
        for cluster in 0..32u64 {
            let (descriptor, _) = image.entry(cluster);
            let shift = 62 - (image.cluster_bits() - 8);
            let further = descriptor >> shift & 0xff;
            let offset = descriptor & ((1 << shift) - 1);
            let (further, offset) = match cluster % 5 {
                // Too few sectors, too many, none of its own; elsewhere.
                0 => (further.saturating_sub(cluster / 5 + 1), offset),
                1 => ((further + cluster).min(0xff), offset),
                2 => (0, offset),
                3 => (further, offset + cluster),
                // Past the end of the file.
                _ => (further, offset + (1 << 40)),
            };
            image.set_entry(cluster, (COMPRESSED | further << shift | offset, 0));
        }
    });
    let failed = assert_reads_as_qemu(&path);
    assert!(failed > 5 && failed < 32, "{failed} of 32 failed");
}

#[test]
fn the_last_compressed_cluster_may_end_where_the_file_does() {
    let scratch = Scratch::new();
    let whole = scratch.path("whole");
    qemu_create(&whole, "", 4 * CLUSTER);
    qemu_io(&whole, &["write -c -P 1 0 64k".into(), "write -c -P 2 64k 64k".into()]);
    let image = Dissected::load(&whole);
    let (offset, length) = image.compressed(image.entry(1).0);
    // QEMU writes what there is: the last sector is not whole.
    assert!((image.bytes.len() as u64) < offset + length);
    let mut expected = vec![1; CLUSTER as usize];
    expected.resize(2 * CLUSTER as usize, 2);
    expected.resize(4 * CLUSTER as usize, 0);
    assert_content(&open(&whole), &expected);
    let path = scratch.path("image");
    let mut failed = 0;
    for cut in (1..=image.bytes.len() - offset as usize).step_by(2) {
        std::fs::write(&path, &image.bytes[..image.bytes.len() - cut]).unwrap();
        failed += assert_reads_as_qemu(&path);
    }
    assert!(failed > 5, "{failed}");
    // What we write behind it does not destroy it.
    change(&whole, |image| image.write_at(&[3; 512], 3 * CLUSTER, WriteFlags::default()).unwrap());
    expected[3 * CLUSTER as usize..][..512].fill(3);
    assert_content(&open(&whole), &expected);
    qemu_io(&whole, &["read -P 2 64k 64k".into()]);
}

/// Damaged data is not damaged metadata: the rest of the disk stays in use, and
/// what replaces all of the cluster needs nothing of it.
#[test]
fn damaged_data_does_not_condemn_the_image() {
    for options in ["", "extended_l2=on"] {
        let scratch = Scratch::new();
        let (path, mut content) = packed(&scratch, options);
        Dissected::patch(&path, |image| {
            for cluster in 0..3 {
                let (offset, _) = image.compressed(image.entry(cluster).0);
                // A block type that does not exist.
                image.put(offset as usize, &[0x07]);
            }
        });
        let before = Dissected::load(&path);
        let image = open_rw(&path);
        let mut buf = vec![0; 512];
        for at in [0, CLUSTER, 2 * CLUSTER] {
            assert_eq!(image.read_at(&mut buf, at).unwrap_err().errno(), libc::EIO);
            let refused = image.write_at(&[9; 512], at, WriteFlags::default()).unwrap_err();
            assert_eq!(refused.errno(), libc::EIO);
        }
        image.write_at(&[9; 512], 4 * CLUSTER, WriteFlags::default()).unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
        let after = Dissected::load(&path);
        assert!(!after.is_marked_corrupt());
        assert!((0..4).all(|cluster| after.entry(cluster) == before.entry(cluster)));
        change(&path, |image| {
            image.write_at(&[8; 65536], 0, WriteFlags::default()).unwrap();
            image.write_zeroes(CLUSTER, CLUSTER, ZeroFlags::default()).unwrap();
            image.discard(2 * CLUSTER, CLUSTER).unwrap();
        });
        content[..CLUSTER as usize].fill(8);
        content[CLUSTER as usize..3 * CLUSTER as usize].fill(0);
        content[4 * CLUSTER as usize..][..512].fill(9);
        assert_content(&open(&path), &content);
    }
}

#[test]
fn compressed_data_in_the_headers_cluster_is_corruption() {
    let scratch = Scratch::new();
    let (path, _) = packed(&scratch, "");
    Dissected::patch(&path, |image| image.set_entry(0, (COMPRESSED | 200, 0)));
    let image = open(&path);
    let error = image.read_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_same(&read(&image, CLUSTER, 512), &[2; 512]);
}
