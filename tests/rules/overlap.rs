//! Nothing ever writes over metadata, whatever a corrupt image says of it.

use std::path::PathBuf;

use qcow2rs::ErrorKind;

use super::support::dissect::{COPIED, Dissected, OFFSET, field};
use super::support::operations::Op;
use super::support::{Scratch, open_rw, qemu_create, qemu_io, qemu_ok, text};
use super::{CLUSTER, CONDEMNED, DONE, KIB, agreed, ours, qemus};

/// An image that has metadata of all kinds; guest clusters 0 to 3 hold data.
fn image(scratch: &Scratch, options: &str) -> PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, 8 * CLUSTER);
    let write = |n| format!("write -P {} {} 64k", n + 1, n * CLUSTER);
    qemu_io(&path, &(0..4).map(write).collect::<Vec<_>>());
    qemu_ok("qemu-img", &["snapshot", "-c", "s", text(&path)]);
    // What the active disk has of its own: its L2 table, and cluster 1.
    qemu_io(&path, &["write -P 9 64k 64k".into()]);
    qemu_ok("qemu-img", &["bitmap", "--add", "--disable", text(&path), "b"]);
    path
}

/// Where each kind of metadata begins.
fn places(image: &Dissected) -> Vec<(&'static str, u64)> {
    let bitmaps =
        image.bytes.windows(8).position(|it| it == b"\x23\x85\x28\x75\0\0\0\x18").unwrap();
    vec![
        ("header", 0),
        ("active L1 table", image.l1_offset()),
        ("active L2 table", image.l1(0) & OFFSET),
        ("refcount table", image.u64(field::REFTABLE_OFFSET)),
        ("refcount block", image.reftable()[0]),
        ("snapshot table", image.u64(field::SNAPSHOTS_OFFSET)),
        ("snapshot's L1 table", image.snapshots().0[0].0),
        ("bitmap directory", image.u64(bitmaps + 8 + 16)),
    ]
}

fn cluster_at(image: &Dissected, offset: u64) -> Vec<u8> {
    let end = image.bytes.len().min((offset + CLUSTER) as usize);
    let mut bytes = image.bytes[offset as usize..end].to_vec();
    // The file may end in it.
    bytes.resize(CLUSTER as usize, 0);
    if offset == 0 {
        // But for the mark that the image is corrupt.
        bytes[field::INCOMPATIBLE..field::COMPATIBLE].fill(0);
    }
    bytes
}

#[test]
fn metadata_that_is_counted_as_free_is_not_given_out() {
    for options in ["", "extended_l2=on"] {
        let scratch = Scratch::new();
        let path = image(&scratch, options);
        let sound = Dissected::load(&path);
        for (kind, offset) in places(&sound) {
            let mut patched = sound.clone();
            patched.set_refcount(offset / CLUSTER, 0);
            patched.save();
            let op = Op::Write { at: 6 * CLUSTER, len: 4 * KIB, byte: 9 };
            let (outcome, after) = agreed(&path, op);
            assert_eq!(outcome, CONDEMNED, "{kind}");
            if kind != "refcount block" {
                assert!(cluster_at(&after, offset) == cluster_at(&patched, offset), "{kind}");
            }
        }
    }
}

/// Images whose cluster 1 is said to lie where metadata is: of each kind but the
/// header, for offset 0 means that there is no host cluster.
fn aliased(test: impl Fn(&str, u64, &PathBuf, &Dissected)) {
    for options in ["", "extended_l2=on"] {
        let scratch = Scratch::new();
        let path = image(&scratch, options);
        let sound = Dissected::load(&path);
        for (kind, offset) in places(&sound).into_iter().skip(1) {
            let mut patched = sound.clone();
            patched.set_entry(1, (offset | COPIED, sound.entry(1).1));
            patched.save();
            test(kind, offset, &path, &patched);
        }
    }
}

#[test]
fn data_is_not_written_where_metadata_is() {
    aliased(|kind, offset, path, patched| {
        let write = Op::Write { at: CLUSTER, len: 4 * KIB, byte: 9 };
        let (outcome, after) = agreed(path, write);
        assert_eq!(outcome, CONDEMNED, "{kind}");
        assert!(cluster_at(&after, offset) == cluster_at(patched, offset), "{kind}");
    });
}

/// Giving up such data would punch a hole into the metadata.
#[test]
fn no_hole_is_punched_where_metadata_is() {
    aliased(|kind, offset, path, patched| {
        for op in [
            Op::Discard { at: CLUSTER, len: CLUSTER },
            Op::Discard { at: CLUSTER, len: CLUSTER / 2 },
            Op::Zero { at: CLUSTER, len: CLUSTER, unmap: true },
            Op::Zero { at: CLUSTER, len: CLUSTER / 2, unmap: true },
        ] {
            let (_, after) = ours(path, op);
            // These tables change with the operation itself.
            if kind != "refcount block" && kind != "active L2 table" {
                let same = cluster_at(&after, offset) == cluster_at(patched, offset);
                assert!(same, "{kind}, {op:?}");
            } else {
                assert!(cluster_at(&after, offset).iter().any(|byte| *byte != 0), "{kind}");
            }
        }
    });
}

/// An L2 table that an L1 entry claims as its own, in the place of other metadata.
#[test]
fn an_l2_table_is_not_written_where_other_metadata_is() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    let sound = Dissected::load(&path);
    for (kind, offset) in places(&sound).into_iter().skip(3) {
        let mut patched = sound.clone();
        patched.put64(patched.l1_at(0), offset | COPIED);
        patched.save();
        // Its last entries are empty, in all of these.
        let op = Op::Write { at: 7 * CLUSTER, len: 4 * KIB, byte: 9 };
        assert_eq!(patched.entry(7), (0, 0), "{kind}");
        let (outcome, after) = ours(&path, op);
        assert_eq!(outcome, CONDEMNED, "{kind}");
        // QEMU notices when it closes the image, and does not tell; a bitmap directory
        // it may have moved away by then.
        if kind != "bitmap directory" {
            assert!(qemus(&path, op).0.marked_corrupt, "{kind}");
        }
        // New counts apart, which were raised before.
        if kind != "refcount block" {
            assert!(cluster_at(&after, offset) == cluster_at(&patched, offset), "{kind}");
        }
    }
}

/// The mark stops every later write, of ours and of QEMU's, and no read.
#[test]
fn a_condemned_image_can_still_be_read() {
    let scratch = Scratch::new();
    let path = image(&scratch, "");
    Dissected::patch(&path, |image| {
        let l1 = image.l1_offset();
        image.set_entry(2, (l1 | COPIED, 0));
    });
    let image = open_rw(&path);
    let error = image.write_at(&[9; 512], 2 * CLUSTER, Default::default()).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Corrupt, libc::EIO));
    let mut buf = [0; 512];
    image.read_at(&mut buf, CLUSTER).unwrap();
    assert_eq!(buf, [9; 512]);
    for refused in [
        image.write_at(&[1; 512], 0, Default::default()),
        image.write_zeroes(0, 512, Default::default()),
        image.discard(0, CLUSTER),
        image.flush(),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Shutdown);
    }
    assert!(image.close().is_err());
    let read = Op::Read { at: 0, len: 512 };
    assert_ne!(agreed(&path, read).0, DONE, "it is not opened for writing again");
    qemu_ok("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 9 64k 64k", text(&path)]);
}
