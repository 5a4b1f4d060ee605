//! What is told of an image: the same as `qemu-img info` and `qemu-img map` tell.

use std::path::Path;

use qcow2rs::Extent;
use serde_json::Value;

use super::support::operations::{Backing, Case, Op};
use super::support::{Rng, Scratch, describe, open, qemu_create, qemu_io, qemu_ok, text};
use super::{CLUSTER, KIB};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn info_has_the_members_of_qemus() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![7; 70_000]).unwrap();
    let backed = "backing_file=base,backing_fmt=raw";
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on,cluster_size=128k",
        "lazy_refcounts=on,refcount_bits=1",
        &format!("refcount_bits=64,{backed}"),
        &format!("compat=0.10,{backed}"),
    ] {
        let path = scratch.path("image");
        qemu_create(&path, options, 300 * KIB);
        qemu_io(&path, &["write 0 100k".into()]);
        let args = ["info", "-f", "qcow2", "--output=json", text(&path)];
        let qemus = json(&qemu_ok("qemu-img", &args));
        let ours = json(&open(&path).info_json().unwrap());
        for (name, value) in ours.as_object().unwrap() {
            assert_eq!(value, &qemus[name], "{options}: {name}");
        }
        for (name, value) in qemus.as_object().unwrap() {
            let known = ours.get(name).is_some();
            let apart = ["children", "full-backing-filename"].contains(&name.as_str());
            assert!(known || apart, "{options}: {name} is missing ({value})");
        }
    }
}

/// Fails unless each sector is told of as QEMU tells of it.
fn assert_same_map(path: &Path) {
    let args = ["map", "-f", "qcow2", "--output=json", text(path)];
    let map = json(&qemu_ok("qemu-img", &args));
    let image = open(path);
    let mut extents: Vec<Extent> = Vec::new();
    image.block_status(0, image.size(), false, usize::MAX, &mut |it| extents.push(it)).unwrap();
    let mut at = 0;
    for extent in &extents {
        assert_eq!(extent.offset, at);
        at += extent.length;
        assert_eq!(extent.eof, at == image.size());
    }
    assert_eq!(at, image.size());
    for theirs in map.as_array().unwrap() {
        let number = |name: &str| theirs[name].as_u64().unwrap();
        let (start, end) = (number("start"), number("start") + number("length"));
        let overlapping = |it: &&Extent| it.offset < end && start < it.offset + it.length;
        for ours in extents.iter().filter(overlapping) {
            let context = format!("{ours:?}, in QEMU {theirs}");
            assert_eq!(theirs["data"], ours.data, "{context}");
            // Data that QEMU knows to be zero: it has looked for holes in the file.
            let hole = theirs["data"] == true && theirs["zero"] == true;
            assert!(hole || theirs["zero"] == ours.zero, "{context}");
            assert_eq!(theirs["compressed"], ours.compressed, "{context}");
            if theirs["present"] == true {
                assert!(ours.allocated, "{context}");
                assert_eq!(number("depth"), u64::from(ours.depth), "{context}");
                let theirs = theirs["offset"].as_u64().map(|offset| offset as i64 - start as i64);
                let ours = ours.host_offset.map(|offset| offset as i64 - ours.offset as i64);
                assert_eq!(theirs, ours, "{context}");
            }
        }
    }
}

#[test]
fn block_status_is_qemus_map() {
    let mut rng = Rng::new(1);
    for (cluster_size, extended_l2) in
        [(512, false), (4096, false), (65536, false), (16384, true), (131072, true)]
    {
        for backing in [Backing::None, Backing::Raw(100 * KIB), Backing::Qcow2(500 * KIB)] {
            let (version, refcount_bits, size) = (3, 16, 450 * KIB + 512);
            let case = Case { version, cluster_size, extended_l2, refcount_bits, size, backing };
            describe(format!("{case:?}"), || {
                let scratch = Scratch::new();
                let path = scratch.path("image");
                case.create_backing(&path, &mut rng.clone());
                case.create(&path);
                let mut commands = vec![format!("write -c -P 3 0 {cluster_size}")];
                let ops = (0..12).map(|_| case.op(&mut rng, true).qemu_io());
                commands.extend(ops);
                qemu_io(&path, &commands);
                assert_same_map(&path);
            });
        }
    }
}

#[test]
fn block_status_of_one_layer_leaves_the_rest_open() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![7; 4 * CLUSTER as usize]).unwrap();
    let path = scratch.path("image");
    qemu_create(&path, "backing_file=base,backing_fmt=raw", 4 * CLUSTER);
    let ops = [
        Op::Write { at: 0, len: CLUSTER, byte: 1 },
        Op::Zero { at: CLUSTER, len: CLUSTER, unmap: true },
    ];
    qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
    let mut found = Vec::new();
    let image = open(&path);
    image.block_status(0, 4 * CLUSTER, true, 9, &mut |it| found.push(it)).unwrap();
    let kinds: Vec<_> =
        found.iter().map(|it| (it.length / CLUSTER, it.data, it.zero, it.allocated)).collect();
    let expected = [(1, true, false, true), (1, false, true, true), (2, false, false, false)];
    assert_eq!(kinds, expected);
    // No more extents than were asked for, and none past the range.
    let mut first = Vec::new();
    image.block_status(512, 2 * CLUSTER, true, 1, &mut |it| first.push(it)).unwrap();
    assert_eq!((first.len(), first[0].offset, first[0].length), (1, 512, CLUSTER - 512));
}
