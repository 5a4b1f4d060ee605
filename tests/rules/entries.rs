//! L1 and L2 entries: what they mean, what makes them invalid, what is ignored.

use qcow2rs::{ErrorKind, WriteFlags};

use super::support::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, ZERO};
use super::support::operations::Op;
use super::support::refcounts::assert_exact;
use super::support::{
    Scratch, assert_content, assert_same, open, open_rw, qemu_create, qemu_img_check, qemu_io,
    qemu_ok, read, text,
};
use super::{CLUSTER, CONDEMNED, DONE, KIB, Outcome, agreed};

const EXTENDED: &str = "extended_l2=on";
const SUB: u64 = CLUSTER / 32;

const fn read_of(cluster: u64) -> Op {
    Op::Read { at: cluster * CLUSTER, len: 512 }
}

const fn write_to(cluster: u64) -> Op {
    Op::Write { at: cluster * CLUSTER, len: 512, byte: 9 }
}

/// An image of 8 clusters, the first four of which hold their number plus one.
fn image(scratch: &Scratch, options: &str) -> std::path::PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, 8 * CLUSTER);
    let write = |n| format!("write -P {} {} 64k", n + 1, n * CLUSTER);
    qemu_io(&path, &(0..4).map(write).collect::<Vec<_>>());
    path
}

fn content() -> Vec<u8> {
    let cluster = |n: u8| vec![if n < 4 { n + 1 } else { 0 }; CLUSTER as usize];
    (0..8).flat_map(cluster).collect()
}

#[test]
fn a_subcluster_both_allocated_and_zero_spoils_its_cluster() {
    for subcluster in [0, 31] {
        let scratch = Scratch::new();
        let path = image(&scratch, EXTENDED);
        Dissected::patch(&path, |image| {
            let (descriptor, bitmap) = image.entry(1);
            image.set_entry(1, (descriptor, bitmap | 1 << (32 + subcluster)));
        });
        // Also where nothing is wrong with the subcluster itself.
        for at in [0, 15 * SUB, 31 * SUB] {
            let read = Op::Read { at: CLUSTER + at, len: 512 };
            assert_eq!(agreed(&path, read).0, CONDEMNED);
            let write = Op::Write { at: CLUSTER + at, len: 512, byte: 9 };
            assert_eq!(agreed(&path, write).0, CONDEMNED);
        }
        assert_eq!(agreed(&path, read_of(2)).0, DONE);
        // Read-only, it fails and nothing is marked.
        let image = open(&path);
        let error = image.read_at(&mut [0; 512], CLUSTER).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Corrupt, libc::EIO));
        assert!(!Dissected::load(&path).is_marked_corrupt());
    }
}

#[test]
fn an_allocated_subcluster_without_a_host_cluster_is_invalid() {
    let scratch = Scratch::new();
    let path = image(&scratch, EXTENDED);
    Dissected::patch(&path, |image| image.set_entry(5, (0, 1 << 7)));
    for op in [read_of(5), write_to(5)] {
        assert_eq!(agreed(&path, op).0, CONDEMNED, "{op:?}");
    }
    assert_eq!(agreed(&path, read_of(4)).0, DONE);
}

#[test]
fn the_standard_zero_flag_means_nothing_in_an_extended_entry() {
    let scratch = Scratch::new();
    let path = image(&scratch, EXTENDED);
    Dissected::patch(&path, |image| {
        let (descriptor, bitmap) = image.entry(1);
        image.set_entry(1, (descriptor | ZERO, bitmap));
    });
    qemu_io(&path, &["read -P 2 64k 64k".into()]);
    assert_content(&open(&path), &content());
    let image = open_rw(&path);
    image.write_at(&[9; 512], CLUSTER, WriteFlags::default()).unwrap();
    image.close().unwrap();
    let mut expected = content();
    expected[CLUSTER as usize..][..512].fill(9);
    assert_content(&open(&path), &expected);
    qemu_img_check(&path);
}

#[test]
fn flags_on_a_compressed_entry_are_ignored_and_go_with_it() {
    for (options, copied, bitmap) in [("", COPIED, 0), (EXTENDED, COPIED, 0), (EXTENDED, 0, 0xff)] {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        qemu_create(&path, options, 4 * CLUSTER);
        qemu_io(&path, &["write -c -P 7 64k 64k".into()]);
        Dissected::patch(&path, |image| {
            let (descriptor, _) = image.entry(1);
            assert_ne!(descriptor & COMPRESSED, 0);
            image.set_entry(1, (descriptor | copied, bitmap));
        });
        qemu_io(&path, &["read -P 7 64k 64k".into()]);
        assert_same(&read(&open(&path), CLUSTER, CLUSTER), &[7; CLUSTER as usize]);
        let image = open_rw(&path);
        image.write_at(&[9; 512], CLUSTER + 512, WriteFlags::default()).unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
        qemu_io(&path, &["read -P 9 66048 512".into(), "read -P 7 66560 63k".into()]);
    }
}

#[test]
fn a_reserved_host_cluster_lets_the_backing_file_through_until_it_is_written() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    std::fs::write(scratch.path("base"), vec![7; 4 * CLUSTER as usize]).unwrap();
    let backing = "backing_file=base,backing_fmt=raw";
    for preallocation in ["metadata", "falloc", "full"] {
        let options = format!("extended_l2=on,preallocation={preallocation},{backing}");
        qemu_create(&path, &options, 4 * CLUSTER);
        let before = Dissected::load(&path);
        assert_eq!((before.entry(1).0 & COPIED, before.entry(1).1), (COPIED, 0));
        let mut expected = vec![7; 4 * CLUSTER as usize];
        let image = open_rw(&path);
        assert_content(&image, &expected);
        let mut found = Vec::new();
        image.block_status(CLUSTER, SUB, true, 1, &mut |extent| found.push(extent)).unwrap();
        assert_eq!((found[0].allocated, found[0].data, found[0].zero), (false, false, false));
        assert_eq!(found[0].host_offset, Some(before.host(1)));
        // Half of a subcluster: its other half comes from below.
        image.write_at(&vec![9; SUB as usize / 2], CLUSTER + SUB, WriteFlags::default()).unwrap();
        expected[(CLUSTER + SUB) as usize..][..SUB as usize / 2].fill(9);
        assert_content(&image, &expected);
        image.close().unwrap();
        let after = Dissected::load(&path);
        assert_eq!(after.entry(1), (before.entry(1).0, 0b10), "written in place");
        qemu_img_check(&path);
        qemu_io(&path, &["read -P 9 66k 1k".into(), "read -P 7 67k 100k".into()]);
    }
}

#[test]
fn a_zero_cluster_with_a_host_cluster_is_written_in_place() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    qemu_io(&path, &["write -z 64k 64k".into()]);
    let before = Dissected::load(&path);
    assert_eq!(before.entry(1).0 & !OFFSET, COPIED | ZERO);
    let (outcome, after) = agreed(&path, write_to(1));
    assert_eq!(outcome, DONE);
    assert_eq!(after.entry(1).0, before.entry(1).0 & !ZERO);
    // What lay there before does not come back.
    let host = after.host(1) as usize;
    assert_same(&after.bytes[host..host + 512], &[9; 512]);
    assert_same(&after.bytes[host + 512..host + CLUSTER as usize], &[0; CLUSTER as usize - 512]);
}

#[test]
fn a_zero_flag_in_version_2_is_corruption() {
    let scratch = Scratch::new();
    let path = image(&scratch, "compat=0.10");
    Dissected::patch(&path, |image| {
        let (descriptor, _) = image.entry(1);
        image.set_entry(1, (descriptor | ZERO, 0));
    });
    // There is no bit in this version to say so.
    let failed = Outcome { done: false, marked_corrupt: false };
    for op in [read_of(1), write_to(1)] {
        assert_eq!(agreed(&path, op).0, failed, "{op:?}");
    }
    // After it was seen, nothing is written any more.
    let image = open_rw(&path);
    assert!(image.read_at(&mut [0; 512], CLUSTER).is_err());
    let refused = image.write_at(&[9; 512], 0, WriteFlags::default()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Shutdown);
    assert_same(&read(&image, 0, 512), &[1; 512]);
}

#[test]
fn reserved_bits_in_entries_are_ignored() {
    for (options, l2_reserved) in [("", 0x3f00_0000_0000_01fe), (EXTENDED, 0x3f00_0000_0000_01ff)] {
        let scratch = Scratch::new();
        let path = image(&scratch, options);
        Dissected::patch(&path, |image| {
            let l1 = image.l1(0);
            image.put64(image.l1_at(0), l1 | 0x7f00_0000_0000_01ff);
            for cluster in 0..2 {
                let (descriptor, bitmap) = image.entry(cluster);
                image.set_entry(cluster, (descriptor | l2_reserved, bitmap));
            }
        });
        assert_content(&open(&path), &content());
        for op in [read_of(1), write_to(1), write_to(5), Op::Discard { at: 0, len: CLUSTER }] {
            assert_eq!(agreed(&path, op).0, DONE, "{op:?}");
        }
        let (_, after) = agreed(&path, write_to(1));
        assert_same(&after.bytes[after.host(1) as usize..][..512], &[9; 512]);
    }
}

#[test]
fn offsets_that_are_not_those_of_a_cluster_are_corruption() {
    for options in ["", EXTENDED] {
        let scratch = Scratch::new();
        let path = image(&scratch, options);
        let sound = Dissected::load(&path);
        // An L2 table, data, and a host cluster behind zeroes.
        let mut patched = sound.clone();
        patched.put64(patched.l1_at(0), sound.l1(0) | 512);
        patched.save();
        for op in [read_of(1), write_to(1), write_to(6), Op::Discard { at: 0, len: CLUSTER }] {
            assert_eq!(agreed(&path, op).0, CONDEMNED, "L2 table, {op:?}");
        }
        let (descriptor, _) = sound.entry(1);
        let zero = if options.is_empty() { (ZERO, 0) } else { (0, u64::MAX << 32) };
        for (flag, bitmap) in [(0, sound.entry(1).1), zero] {
            let mut patched = sound.clone();
            patched.set_entry(1, (descriptor | 0x200 | flag, bitmap));
            patched.save();
            assert_eq!(agreed(&path, write_to(1)).0, CONDEMNED, "data, {flag}");
            assert_eq!(agreed(&path, read_of(2)).0, DONE);
            // Data itself cannot be read, either.
            if flag == 0 && bitmap == sound.entry(1).1 {
                assert_eq!(agreed(&path, read_of(1)).0, CONDEMNED);
            }
        }
    }
}

#[test]
fn without_the_copied_flag_a_write_allocates_and_the_image_heals() {
    for options in ["", EXTENDED] {
        let scratch = Scratch::new();
        let path = image(&scratch, options);
        let before = Dissected::patch(&path, |image| {
            let (descriptor, bitmap) = image.entry(1);
            image.set_entry(1, (descriptor & !COPIED, bitmap));
            let l1 = image.l1(0);
            image.put64(image.l1_at(0), l1 & !COPIED);
            image.clone()
        });
        let (outcome, _) = agreed(&path, write_to(1));
        assert_eq!(outcome, DONE);
        let image = open_rw(&path);
        image.write_at(&[9; 512], CLUSTER, WriteFlags::default()).unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
        let after = Dissected::load(&path);
        assert_ne!(after.l1(0) & OFFSET, before.l1(0) & OFFSET);
        assert_ne!(after.host(1), before.host(1));
        assert_eq!(after.refcount(before.host(1) / CLUSTER), 0);
        let mut expected = content();
        expected[CLUSTER as usize..][..512].fill(9);
        assert_content(&open(&path), &expected);
    }
}

/// An extended entry takes twice the room: a table maps half as much.
#[test]
fn a_table_of_extended_entries_maps_half_as_much() {
    let scratch = Scratch::new();
    for (options, tables) in [("", 4), (EXTENDED, 8)] {
        let options = [options, "cluster_size=16k"].join(if options.is_empty() { "" } else { "," });
        let path = scratch.path("image");
        qemu_create(&path, &options, 128 << 20);
        assert_eq!(Dissected::load(&path).l1_size(), tables);
        let image = open_rw(&path);
        let coverage = (128 << 20) / tables;
        // Over the border of two tables, and the last byte of the disk.
        image.write_at(&[9; 4096], coverage - 2048, WriteFlags::default()).unwrap();
        image.write_at(&[8], (128 << 20) - 1, WriteFlags::default()).unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
        let image = Dissected::load(&path);
        let used: Vec<u64> = (0..tables).filter(|n| image.l1(*n) != 0).collect();
        assert_eq!(used, [0, 1, tables - 1]);
        qemu_io(
            &path,
            &[
                format!("read -P 9 {} 4k", coverage - 2048),
                format!("read -P 0 {} 10k", coverage + 2048),
                format!("read -P 8 {} 1", (128 << 20) - 1),
            ],
        );
    }
}

/// The file may end anywhere: what is not there is zero.
#[test]
fn past_the_end_of_the_file_there_are_zeroes() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    let whole = Dissected::load(&path);
    let table = (whole.l1(0) & OFFSET) as usize;
    for length in [
        whole.host(3) + CLUSTER - 1000,
        whole.host(3) + 700,
        whole.host(2),
        // In the middle of the L2 table, behind the fourth entry; before it.
        table as u64 + 4 * 8,
        table as u64 + 2 * 8,
        table as u64,
    ] {
        std::fs::write(&path, &whole.bytes[..length as usize]).unwrap();
        let flat = scratch.path("flat");
        let args = ["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&flat)];
        qemu_ok("qemu-img", &args);
        assert_content(&open(&path), &std::fs::read(&flat).unwrap());
    }
    // The file ends before the end of its last cluster: it is written like any other.
    let short = whole.host(3) + KIB;
    std::fs::write(&path, &whole.bytes[..short as usize]).unwrap();
    let mut expected = content();
    expected[(3 * CLUSTER + KIB) as usize..4 * CLUSTER as usize].fill(0);
    let image = open_rw(&path);
    image.write_at(&[9; 512], 3 * CLUSTER + 8 * KIB, WriteFlags::default()).unwrap();
    image.write_at(&[9; 512], 6 * CLUSTER, WriteFlags::default()).unwrap();
    image.close().unwrap();
    expected[(3 * CLUSTER + 8 * KIB) as usize..][..512].fill(9);
    expected[6 * CLUSTER as usize..][..512].fill(9);
    assert_content(&open(&path), &expected);
    qemu_img_check(&path);
    assert_exact(&path);
}
