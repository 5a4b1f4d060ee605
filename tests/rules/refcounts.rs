//! Refcounts: where they are, what is missing, what is free, how tables grow.

use qcow2rs::{Image, OpenOptions, Source, WriteFlags};

use super::support::dissect::{Dissected, field};
use super::support::operations::Op;
use super::support::refcounts::assert_exact;
use super::support::{
    Scratch, assert_content, assert_same, describe, open, open_rw, qemu_create, qemu_img_check,
    qemu_io, qemu_ok, read, text,
};
use super::{CLUSTER, CONDEMNED, DONE, KIB, agreed, ours};

const WRITE: Op = Op::Write { at: 6 * CLUSTER, len: 4 * KIB, byte: 9 };

fn image(scratch: &Scratch) -> std::path::PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, "", 8 * CLUSTER);
    qemu_io(&path, &["write -P 1 0 256k".into()]);
    path
}

#[test]
fn the_cluster_of_the_header_is_never_given_out() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    Dissected::patch(&path, |image| image.set_refcount(0, 0));
    let before = Dissected::load(&path);
    let (outcome, after) = agreed(&path, WRITE);
    assert_eq!(outcome, CONDEMNED);
    assert!(before.bytes[..field::INCOMPATIBLE] == after.bytes[..field::INCOMPATIBLE]);
    assert!(before.bytes[field::COMPATIBLE..4096] == after.bytes[field::COMPATIBLE..4096]);
}

#[test]
fn a_refcount_block_that_is_missing_counts_zero() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    Dissected::patch(&path, |image| {
        let at = image.u64(field::REFTABLE_OFFSET) as usize;
        image.put64(at, 0);
    });
    // Nothing is wrong with reading, but everything seems to be free.
    assert_eq!(agreed(&path, Op::Read { at: 0, len: 512 }).0, DONE);
    assert_eq!(agreed(&path, WRITE).0, CONDEMNED);
}

#[test]
fn a_refcount_block_lies_at_the_start_of_a_cluster() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    Dissected::patch(&path, |image| {
        let at = image.u64(field::REFTABLE_OFFSET) as usize;
        let block = image.u64(at);
        image.put64(at, block | 512);
    });
    assert_eq!(agreed(&path, Op::Read { at: 0, len: 512 }).0, DONE);
    assert_eq!(agreed(&path, WRITE).0, CONDEMNED);
}

#[test]
fn reserved_bits_in_the_refcount_table_are_ignored() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    Dissected::patch(&path, |image| {
        let at = image.u64(field::REFTABLE_OFFSET) as usize;
        let block = image.u64(at);
        image.put64(at, block | 0x1ff);
    });
    let (outcome, after) = agreed(&path, WRITE);
    assert_eq!(outcome, DONE);
    let block = after.reftable()[0] & !0x1ff;
    assert_eq!(after.count_in(block, after.host(6) / CLUSTER), 1);
}

/// What is given up although nothing counts it: no other count may suffer.
#[test]
fn a_count_is_not_lowered_below_zero() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    let before = Dissected::patch(&path, |image| {
        let host = image.host(1);
        image.set_refcount(host / CLUSTER, 0);
        image.clone()
    });
    let (outcome, after) = ours(&path, Op::Discard { at: CLUSTER, len: CLUSTER });
    assert_eq!(outcome, CONDEMNED);
    for cluster in 0..16 {
        assert_eq!(after.refcount(cluster), before.refcount(cluster), "cluster {cluster}");
    }
}

#[test]
fn the_lowest_free_cluster_is_used_first_after_opening_again() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    let before = Dissected::load(&path);
    let image = open_rw(&path);
    image.discard(CLUSTER, CLUSTER).unwrap();
    image.discard(3 * CLUSTER, CLUSTER).unwrap();
    image.close().unwrap();
    let (outcome, after) = agreed(&path, WRITE);
    assert_eq!(outcome, DONE);
    assert_eq!(after.host(6), before.host(1));
    let qemus = Dissected::load(&scratch.path("qemus"));
    assert_eq!(qemus.host(6), before.host(1));
}

#[test]
fn every_width_counts_up_and_down() {
    for order in 0..=6 {
        let bits = 1 << order;
        describe(format!("{bits} bits"), || {
            let scratch = Scratch::new();
            let path = scratch.path("image");
            // Several refcount blocks, and counts all over their bytes.
            let size = 3 << 20;
            qemu_create(&path, &format!("cluster_size=512,refcount_bits={bits}"), size);
            let mut expected = vec![0; size as usize];
            let image = open_rw(&path);
            for n in 0..300usize {
                let at = n * 7919 % 6000 * 512;
                let len = 512 * (n % 9 + 1);
                let end = (at + len).min(expected.len());
                image.write_at(&vec![5; end - at], at as u64, WriteFlags::default()).unwrap();
                expected[at..end].fill(5);
                if n % 3 == 0 {
                    image.discard(at as u64, (end - at) as u64 / 2).unwrap();
                    expected[at..at + (end - at) / 2 / 512 * 512].fill(0);
                }
            }
            assert_content(&image, &expected);
            image.close().unwrap();
            qemu_img_check(&path);
            assert_exact(&path);
            assert_content(&open(&path), &expected);
        });
    }
}

/// Blocks and tables that were there at the beginning are soon too small.
#[test]
fn refcount_tables_grow_and_qemu_goes_on_with_them() {
    for (options, mib) in [("cluster_size=512,refcount_bits=64", 5u64), ("cluster_size=512", 9)] {
        describe(options.into(), || {
            let scratch = Scratch::new();
            let path = scratch.path("image");
            qemu_create(&path, options, 2 * (mib << 20));
            let before = Dissected::load(&path);
            let image = open_rw(&path);
            let data: Vec<u8> = (0..mib << 20).map(|n| (n / 512 % 251) as u8).collect();
            for (n, chunk) in data.chunks(1 << 20).enumerate() {
                image.write_at(chunk, (n as u64) << 20, WriteFlags::default()).unwrap();
            }
            image.close().unwrap();
            let after = Dissected::load(&path);
            let clusters = |image: &Dissected| image.u32(field::REFTABLE_CLUSTERS);
            assert!(clusters(&after) > clusters(&before));
            qemu_img_check(&path);
            assert_exact(&path);
            qemu_io(&path, &[format!("write -P 9 {mib}M {mib}M")]);
            let mut expected = data.clone();
            expected.resize(2 * data.len(), 9);
            assert_content(&open(&path), &expected);
            // All of it goes again.
            let image = open_rw(&path);
            image.discard(0, 2 * (mib << 20)).unwrap();
            image.close().unwrap();
            qemu_img_check(&path);
            assert_exact(&path);
            expected.fill(0);
            assert_content(&open(&path), &expected);
        });
    }
}

#[test]
fn host_offsets_need_more_than_32_bits() {
    for options in ["preallocation=metadata", "preallocation=metadata,extended_l2=on"] {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        qemu_create(&path, options, 5 << 30);
        let grow = ["resize", "-q", "-f", "qcow2", text(&path), "6G"];
        qemu_ok("qemu-img", &grow);
        let image = open_rw(&path);
        let places = [(4 << 30) - 512, (5 << 30) - 100, (5 << 30) + 100_000, (6 << 30) - 1000];
        for at in places {
            image.write_at(&[9; 1000], at, WriteFlags::default()).unwrap();
        }
        image.discard((4 << 30) + CLUSTER, CLUSTER).unwrap();
        let mut last = None;
        image.block_status(places[3], 1, true, 1, &mut |it| last = it.host_offset).unwrap();
        assert!(last.unwrap() > 5 << 30);
        image.close().unwrap();
        qemu_img_check(&path);
        let reads = places.map(|at| format!("read -P 9 {at} 1000"));
        qemu_io(&path, &reads);
        let image = open(&path);
        for at in places {
            assert_same(&read(&image, at, 1000), &[9; 1000]);
        }
    }
}

#[test]
fn a_small_cache_of_refcounts_does_as_well() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=512,refcount_bits=64", 2 << 20);
    let mut options = OpenOptions::new().writable(true);
    options.set("refcount-cache-size", "1k").unwrap();
    options.set("l2-cache-size", "1k").unwrap();
    options.no_flush = true;
    let image = Image::open(Source::path(&path), &options).unwrap();
    let mut expected = vec![0; 2 << 20];
    for n in 0..500usize {
        let at = n * 7919 % 4000 * 512;
        match n % 4 {
            3 => {
                image.discard(at as u64, 2048).unwrap();
                expected[at..at + 2048].fill(0);
            }
            _ => {
                image.write_at(&[n as u8; 3000], at as u64, WriteFlags::default()).unwrap();
                expected[at..at + 3000].fill(n as u8);
            }
        }
    }
    assert_content(&image, &expected);
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
    assert_content(&open(&path), &expected);
}
