//! The same random operations through QEMU and through the library: contents,
//! L2 entries and refcounts must come out the same. Where we differ on purpose
//! is in docs/qemu-differences.md; `rules/zeroes.rs` and `snapshots.rs` test it.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test differential`
//! replays it.

mod support;

use std::path::Path;

use support::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, ZERO};
use support::operations::{Backing, Case, Op};
use support::refcounts::assert_exact;
use support::{
    Rng, Scratch, assert_content, describe, for_seeds, open, open_rw, qemu_img_check,
    qemu_img_compare, qemu_io,
};

/// The matrix; each seed tries other backing files.
fn cases(seed: u64) -> Vec<Case> {
    let mut layouts = Vec::new();
    for cluster_size in [512u64, 4096, 65536, 2 << 20] {
        for (version, refcount_bits) in [(2, 16), (3, 1), (3, 16), (3, 64)] {
            layouts.push((version, cluster_size, false, refcount_bits));
        }
    }
    for cluster_size in [16384u64, 65536, 131072] {
        for refcount_bits in [1, 16, 64] {
            layouts.push((3, cluster_size, true, refcount_bits));
        }
    }
    let mut cases = Vec::new();
    for (n, (version, cluster_size, extended_l2, refcount_bits)) in layouts.into_iter().enumerate()
    {
        let size = (cluster_size * 40).clamp(200_704, 12 << 20) + 1536;
        let (shorter, longer) = (size / 2 / 512 * 512 + 512, size + 8192);
        let backings = [
            Backing::None,
            Backing::Raw(shorter),
            Backing::Qcow2(longer),
            Backing::Raw(longer),
            Backing::Qcow2(shorter),
        ];
        for k in [0, 2] {
            let backing = backings[(n + seed as usize + k) % backings.len()];
            cases.push(Case { version, cluster_size, extended_l2, refcount_bits, size, backing });
        }
    }
    cases
}

/// Calls `test` for each case of each seed, with random numbers of its own.
fn for_cases(seeds: u64, test: impl Fn(Case, &mut Rng)) {
    for_seeds("differential", seeds, |seed| {
        for (number, case) in cases(seed).into_iter().enumerate() {
            let mut rng = Rng::new(seed.wrapping_mul(1000) + number as u64);
            describe(format!("{case:?}"), || test(case, &mut rng));
        }
    });
}

/// What an entry says, whatever the host offset.
fn shape(image: &Dissected, cluster: u64) -> (bool, u64, u64) {
    let (descriptor, bitmap) = image.entry(cluster);
    let flags = descriptor & (COPIED | COMPRESSED | if image.extended_l2() { 0 } else { ZERO });
    (descriptor & OFFSET != 0, flags, bitmap)
}

fn assert_same_entries(ours: &Path, qemus: &Path) {
    let (ours, qemus) = (Dissected::load(ours), Dissected::load(qemus));
    assert_eq!(ours.guest_clusters(), qemus.guest_clusters());
    for cluster in 0..ours.guest_clusters() {
        let (a, b) = (shape(&ours, cluster), shape(&qemus, cluster));
        assert!(a == b, "guest cluster {cluster}: {a:x?}, in QEMU {b:x?}");
    }
}

#[test]
fn the_same_operations_leave_the_same_entries() {
    for_cases(1, |case, rng| {
        let scratch = Scratch::new();
        let (ours, qemus) = (scratch.path("ours"), scratch.path("qemus"));
        let mut model = case.create_backing(&ours, rng);
        case.create(&ours);
        std::fs::copy(&ours, &qemus).unwrap();
        let ops: Vec<Op> = (0..40).map(|_| case.op(rng, true)).collect();
        let image = open_rw(&ours);
        for op in &ops {
            op.apply(&image);
            op.model(&case, &mut model);
        }
        assert_content(&image, &model);
        image.close().unwrap();
        qemu_io(&qemus, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());

        qemu_img_compare(&ours, "qcow2", &qemus, "qcow2");
        assert_content(&open(&qemus), &model);
        assert_same_entries(&ours, &qemus);
        for path in [&ours, &qemus] {
            qemu_img_check(path);
            assert_exact(path);
        }
    });
}

#[test]
fn qemu_and_we_take_turns_on_one_image() {
    for_cases(1, |case, rng| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let mut model = case.create_backing(&path, rng);
        case.create(&path);
        for turn in 0..4 {
            let qemus_turn = turn % 2 == 0;
            let ops: Vec<Op> = (0..20).map(|_| case.op(rng, qemus_turn)).collect();
            if qemus_turn {
                qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
                ops.iter().for_each(|op| op.model(&case, &mut model));
                assert_content(&open(&path), &model);
            } else {
                let image = open_rw(&path);
                for op in &ops {
                    op.apply(&image);
                    op.follow(&case, &image, &mut model);
                }
                image.close().unwrap();
                qemu_img_check(&path);
            }
            assert_exact(&path);
        }
        let flat = scratch.path("model");
        std::fs::write(&flat, &model).unwrap();
        qemu_img_compare(&path, "qcow2", &flat, "raw");
    });
}
