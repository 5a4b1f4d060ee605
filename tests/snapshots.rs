//! Images with internal snapshots, made by QEMU: whatever we do to the active
//! disk, each snapshot stays what it was, and all refcounts and flags come out
//! right.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test snapshots`
//! replays it.

mod support;

use std::path::{Path, PathBuf};

use qcow2rs::{Image, WriteFlags, ZeroFlags};
use support::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, ZERO, field};
use support::operations::{Case, Op};
use support::refcounts::assert_exact;
use support::snapshots::{Layout, cases, content_of, snapshot};
use support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, open, open_rw, open_somehow,
    qemu, qemu_create, qemu_img_check, qemu_io, qemu_ok, text,
};

/// An image and what it and its snapshots must read as.
struct Run {
    case: Case,
    _scratch: Scratch,
    path: PathBuf,
    active: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Run {
    fn new(case: Case, rng: &mut Rng) -> Run {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let mut active = case.create_backing(&path, rng);
        case.create(&path);
        // Before anything else, for QEMU compresses into empty clusters only. A
        // narrow refcount has no room for many neighbours in one host cluster.
        let last = case.size / case.cluster_size;
        let count = match case.refcount_bits {
            2 => 0,
            4 => 3,
            _ => last.min(8),
        };
        let mut commands = Vec::new();
        for n in 0..count {
            let at = (last * n / count) * case.cluster_size;
            commands.push(format!("write -c -P {} {at} {}", n + 1, case.cluster_size));
            active[at as usize..][..case.cluster_size as usize].fill(n as u8 + 1);
        }
        qemu_io(&path, &commands);
        Run { case, _scratch: scratch, path, active, snapshots: Vec::new() }
    }

    fn qemu(&mut self, rng: &mut Rng, count: usize) {
        let ops: Vec<Op> = (0..count).map(|_| self.case.op(rng, true)).collect();
        qemu_io(&self.path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
        ops.iter().for_each(|op| op.model(&self.case, &mut self.active));
    }

    fn ours(&mut self, rng: &mut Rng, count: usize) {
        let image = open_somehow(&self.path, rng);
        assert_content(&image, &self.active);
        for _ in 0..count {
            let op = self.case.op(rng, false);
            op.apply(&image);
            op.follow(&self.case, &image, &mut self.active);
        }
        assert_content(&image, &self.active);
        image.close().unwrap();
    }

    fn snapshot(&mut self) {
        let name = format!("s{}", self.snapshots.len());
        snapshot(&self.path, &["-c", &name]);
        self.snapshots.push((name, self.active.clone()));
    }

    fn verify(&self) {
        qemu_img_check(&self.path);
        assert_exact(&self.path);
        assert_content(&open(&self.path), &self.active);
        for (name, content) in &self.snapshots {
            describe(format!("snapshot {name}"), || {
                assert_same(&content_of(&self.path, name), content);
            });
        }
    }

    /// Makes a snapshot the active disk, in a copy, and goes on from there.
    fn go_back(&self, rng: &mut Rng) {
        for (name, content) in &self.snapshots {
            let path = self.path.with_file_name("copy");
            std::fs::copy(&self.path, &path).unwrap();
            snapshot(&path, &["-a", name]);
            assert_content(&open(&path), content);
            let image = open_rw(&path);
            let mut active = content.clone();
            for _ in 0..10 {
                let op = self.case.op(rng, false);
                op.apply(&image);
                op.follow(&self.case, &image, &mut active);
            }
            image.close().unwrap();
            qemu_img_check(&path);
            assert_exact(&path);
            assert_content(&open(&path), &active);
            assert_same(&content_of(&path, name), content);
        }
    }
}

const LAYOUTS: &[Layout] = &[
    (2, 512, false, 16),
    (2, 65536, false, 16),
    (3, 512, false, 2),
    (3, 512, false, 64),
    (3, 4096, false, 4),
    (3, 65536, false, 8),
    (3, 65536, false, 16),
    (3, 2 << 20, false, 32),
    (3, 16384, true, 16),
    (3, 16384, true, 2),
    (3, 65536, true, 4),
    (3, 131072, true, 64),
];

#[test]
fn snapshots_stay_what_they_were() {
    for_seeds("snapshots", 1, |seed| {
        for (number, case) in cases(seed, LAYOUTS).into_iter().enumerate() {
            let mut rng = Rng::new(seed.wrapping_mul(1000) + number as u64);
            describe(format!("{case:?}"), || {
                let mut run = Run::new(case, &mut rng);
                for _ in 0..2 {
                    run.qemu(&mut rng, 15);
                    run.snapshot();
                    run.ours(&mut rng, 25);
                    run.verify();
                }
                // For a moment QEMU counts the snapshot once more.
                if case.refcount_bits > 2 {
                    run.go_back(&mut rng);
                }
                // What a snapshot had is the active disk's alone when it goes.
                let (name, _) = run.snapshots.remove(0);
                snapshot(&run.path, &["-d", &name]);
                run.ours(&mut rng, 25);
                run.verify();
            });
        }
    });
}

const KIB: u64 = 1024;
const CLUSTER: u64 = 64 * KIB;

/// An image of 16 clusters: 0 to 7 hold their number plus one, the last of them
/// compressed; taken as a snapshot named `s`.
fn small(scratch: &Scratch, options: &str) -> PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, 16 * CLUSTER);
    let mut commands = vec![format!("write -c -P 8 {} 64k", 7 * CLUSTER)];
    commands.extend((0..7).map(|n| format!("write -P {} {} 64k", n + 1, n * CLUSTER)));
    qemu_io(&path, &commands);
    snapshot(&path, &["-c", "s"]);
    path
}

fn small_content() -> Vec<u8> {
    let cluster = |n: u8| vec![if n < 8 { n + 1 } else { 0 }; CLUSTER as usize];
    (0..16).flat_map(cluster).collect()
}

/// Carries out `change` and returns the image before and after.
fn around(path: &Path, change: impl FnOnce(&Image)) -> (Dissected, Dissected) {
    let before = Dissected::load(path);
    let image = open_rw(path);
    change(&image);
    image.close().unwrap();
    qemu_img_check(path);
    assert_exact(path);
    assert_same(&content_of(path, "s"), &small_content());
    (before, Dissected::load(path))
}

fn cluster_at(image: &Dissected, offset: u64) -> &[u8] {
    &image.bytes[offset as usize..][..CLUSTER as usize]
}

#[test]
fn a_shared_l2_table_is_copied_before_anything_in_it_changes() {
    type Change = fn(&Image);
    let changes: [(&str, Change); 5] = [
        ("write", |image| image.write_at(&[9; 512], 0, WriteFlags::default()).unwrap()),
        ("write where nothing is", |image| {
            image.write_at(&[9; 512], 12 * CLUSTER, WriteFlags::default()).unwrap();
        }),
        ("zeroes", |image| image.write_zeroes(0, CLUSTER, ZeroFlags::default()).unwrap()),
        ("discard", |image| image.discard(CLUSTER, CLUSTER).unwrap()),
        ("discard of compressed data", |image| image.discard(7 * CLUSTER, CLUSTER).unwrap()),
    ];
    for options in ["compat=0.10", "", "extended_l2=on"] {
        for (what, change) in &changes {
            describe(format!("{options}: {what}"), || {
                let scratch = Scratch::new();
                let path = small(&scratch, options);
                let (before, after) = around(&path, change);
                assert_eq!(before.l1(0) & COPIED, 0);
                assert_ne!(after.l1(0) & COPIED, 0);
                let (old, new) = (before.l1(0) & OFFSET, after.l1(0) & OFFSET);
                assert_ne!(old, new);
                assert!(
                    cluster_at(&before, old) == cluster_at(&after, old),
                    "the snapshot's table"
                );
                assert_eq!(before.refcount(old / CLUSTER), 2);
                assert_eq!(after.refcount(old / CLUSTER), 1);
                assert_eq!(after.refcount(new / CLUSTER), 1);
                // Its neighbours are still shared.
                assert_eq!(after.entry(5), before.entry(5));
                assert_eq!(after.entry(5).0 & COPIED, 0);
            });
        }
    }
}

#[test]
fn a_shared_cluster_is_copied_once() {
    let scratch = Scratch::new();
    let path = small(&scratch, "");
    let (before, middle) = around(&path, |image| {
        image.write_at(&[9; 512], 2 * CLUSTER + 512, WriteFlags::default()).unwrap();
    });
    let (old, new) = (before.host(2), middle.host(2));
    assert_ne!(old, new);
    assert_ne!(middle.entry(2).0 & COPIED, 0);
    assert_eq!((middle.refcount(old / CLUSTER), middle.refcount(new / CLUSTER)), (1, 1));
    assert!(cluster_at(&before, old) == cluster_at(&middle, old), "the snapshot's data");
    let (_, after) = around(&path, |image| {
        image.write_at(&[10; 512], 2 * CLUSTER, WriteFlags::default()).unwrap();
    });
    assert_eq!((after.l1(0), after.entry(2)), (middle.l1(0), middle.entry(2)));
    let mut expected = vec![3; CLUSTER as usize];
    expected[..512].fill(10);
    expected[512..1024].fill(9);
    assert_same(cluster_at(&after, new), &expected);
}

#[test]
fn a_shared_cluster_that_is_given_up_is_not_punched() {
    for (options, unmap) in [("", false), ("", true), ("extended_l2=on", true)] {
        let scratch = Scratch::new();
        let path = small(&scratch, options);
        let (before, after) = around(&path, |image| {
            let flags = ZeroFlags { may_unmap: unmap, ..Default::default() };
            image.write_zeroes(0, CLUSTER, flags).unwrap();
            // Where subclusters can go one by one, some stay.
            image.write_zeroes(CLUSTER, CLUSTER / 2, flags).unwrap();
            image.discard(2 * CLUSTER, CLUSTER).unwrap();
            image.discard(3 * CLUSTER, CLUSTER / 2).unwrap();
        });
        for cluster in 0..4 {
            let host = before.host(cluster);
            assert!(cluster_at(&before, host) == cluster_at(&after, host), "cluster {cluster}");
        }
        assert_eq!(after.entry(2).0, if options.is_empty() { ZERO } else { 0 });
        assert_eq!(after.refcount(before.host(2) / CLUSTER), 1);
        // Kept by a zero write that may not unmap: still shared, so not COPIED.
        let kept = after.entry(0).0 & OFFSET != 0;
        assert_eq!(kept, !unmap);
        assert_eq!(after.entry(0).0 & COPIED, 0);
    }
}

#[test]
fn holes_of_a_shared_extended_cluster_stay_holes() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    std::fs::write(scratch.path("base"), vec![7; 64 << 10]).unwrap();
    qemu_create(&path, "extended_l2=on,backing_file=base,backing_fmt=raw", CLUSTER);
    qemu_io(
        &path,
        &["write -P 1 0 2k".into(), "write -P 2 48k 2k".into(), "write -z 10k 2k".into()],
    );
    snapshot(&path, &["-c", "s"]);
    assert_eq!(Dissected::load(&path).entry(0).1, 0x0000_0020_0100_0001);
    let image = open_rw(&path);
    image.write_at(&[9; 2048], 16 << 10, WriteFlags::default()).unwrap();
    let mut expected = vec![7; 64 << 10];
    expected[..2048].fill(1);
    expected[10 << 10..12 << 10].fill(0);
    expected[48 << 10..50 << 10].fill(2);
    let old = expected.clone();
    expected[16 << 10..18 << 10].fill(9);
    assert_content(&image, &expected);
    image.close().unwrap();
    assert_eq!(Dissected::load(&path).entry(0).1, 0x0000_0020_0100_0101);
    qemu_img_check(&path);
    assert_exact(&path);
    assert_same(&content_of(&path, "s"), &old);
    assert_content(&open(&path), &expected);
}

#[test]
fn compressed_clusters_that_a_snapshot_shares_keep_their_count() {
    for options in ["compat=0.10", "", "extended_l2=on", "refcount_bits=8"] {
        let scratch = Scratch::new();
        let path = small(&scratch, options);
        let (before, after) = around(&path, |image| {
            image.write_at(&[9; 512], 7 * CLUSTER + 512, WriteFlags::default()).unwrap();
        });
        let (descriptor, _) = before.entry(7);
        assert_ne!(descriptor & COMPRESSED, 0);
        let (offset, _) = before.compressed(descriptor);
        assert_eq!(before.refcount(offset / CLUSTER), 2);
        assert_eq!(after.refcount(offset / CLUSTER), 1);
        assert_ne!(after.entry(7).0 & COPIED, 0);
        let mut expected = small_content();
        expected[7 * CLUSTER as usize + 512..][..512].fill(9);
        assert_content(&open(&path), &expected);
    }
}

#[test]
fn counts_at_their_widths_limit_are_lowered() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "refcount_bits=2", 4 * CLUSTER);
    qemu_io(&path, &["write -P 1 0 256k".into()]);
    snapshot(&path, &["-c", "a"]);
    snapshot(&path, &["-c", "b"]);
    let before = Dissected::load(&path);
    assert_eq!(before.refcount(before.host(1) / CLUSTER), 3);
    let image = open_rw(&path);
    image.write_at(&[2; 512], CLUSTER, WriteFlags::default()).unwrap();
    image.discard(2 * CLUSTER, CLUSTER).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
    let after = Dissected::load(&path);
    for cluster in [1, 2] {
        assert_eq!(after.refcount(before.host(cluster) / CLUSTER), 2);
    }
    assert_eq!(after.refcount(before.host(0) / CLUSTER), 3);
    for name in ["a", "b"] {
        assert_same(&content_of(&path, name), &vec![1; 4 * CLUSTER as usize]);
    }
}

/// QEMU fails to take the snapshot half way; what it leaves is at most a leak,
/// and so it stays.
#[test]
fn an_image_whose_counts_have_no_room_for_snapshots_stays_usable() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "refcount_bits=1", 4 * CLUSTER);
    qemu_io(&path, &["write -P 1 0 128k".into()]);
    assert!(!qemu("qemu-img", &["snapshot", "-c", "a", text(&path)]).status.success());
    let image = open_rw(&path);
    image.write_at(&[2; 512], 0, WriteFlags::default()).unwrap();
    image.write_at(&[3; 512], 3 * CLUSTER, WriteFlags::default()).unwrap();
    image.discard(CLUSTER, CLUSTER).unwrap();
    image.close().unwrap();
    let code = qemu("qemu-img", &["check", "-f", "qcow2", text(&path)]).status.code();
    assert!(code == Some(0) || code == Some(3), "{code:?}");
    qemu_ok("qemu-img", &["check", "-q", "-r", "leaks", "-f", "qcow2", text(&path)]);
    let mut expected = vec![0; 4 * CLUSTER as usize];
    expected[..CLUSTER as usize].fill(1);
    expected[..512].fill(2);
    expected[3 * CLUSTER as usize..][..512].fill(3);
    assert_content(&open(&path), &expected);
    assert_exact(&path);
}

#[test]
fn snapshots_of_another_size_stay_what_they_were() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    // One L2 table maps 2 MiB: the L1 tables differ in length.
    qemu_create(&path, "cluster_size=4k", 1 << 20);
    qemu_io(&path, &["write -P 1 0 1M".into()]);
    snapshot(&path, &["-c", "small"]);
    qemu_ok("qemu-img", &["resize", "-q", "-f", "qcow2", text(&path), "5M"]);
    qemu_io(&path, &["write -P 2 3M 2M".into()]);
    snapshot(&path, &["-c", "large"]);
    qemu_ok("qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", text(&path), "2M"]);
    let image = open_rw(&path);
    image.write_at(&vec![3; 600_000], 700_000, WriteFlags::default()).unwrap();
    image.discard(0, 256 << 10).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
    let small = vec![1; 1 << 20];
    let mut large = small.clone();
    large.resize(3 << 20, 0);
    large.resize(5 << 20, 2);
    let mut active = large[..2 << 20].to_vec();
    active[..256 << 10].fill(0);
    active[700_000..1_300_000].fill(3);
    assert_content(&open(&path), &active);
    for (name, content) in [("small", small), ("large", large)] {
        snapshot(&path, &["-a", name]);
        assert_content(&open(&path), &content);
    }
}

/// The VM state lies behind the disk, mapped by the same L1 table.
#[test]
fn vm_state_behind_the_disk_is_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=4k", 300 << 10);
    qemu_io(&path, &["write -P 1 0 300k".into(), "write -b -P 2 0 200k".into()]);
    snapshot(&path, &["-c", "s"]);
    qemu_io(&path, &["write -b -P 3 0 100k".into()]);
    let image = open_rw(&path);
    assert_eq!(image.size(), 300 << 10);
    image.write_at(&vec![4; 300 << 10], 0, WriteFlags::default()).unwrap();
    image.discard(0, 300 << 10).unwrap();
    image.write_zeroes(100, 290 << 10, ZeroFlags::default()).unwrap();
    assert!(image.write_at(&[5; 512], 300 << 10, WriteFlags::default()).is_err());
    image.close().unwrap();
    assert!(Dissected::load(&path).u32(field::L1_SIZE) > 1);
    qemu_img_check(&path);
    assert_exact(&path);
    qemu_io(&path, &["read -b -P 3 0 100k".into()]);
    snapshot(&path, &["-a", "s"]);
    qemu_io(&path, &["read -b -P 2 0 200k".into(), "read -P 1 0 300k".into()]);
}
