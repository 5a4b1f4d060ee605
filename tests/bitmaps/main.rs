//! Persistent bitmaps made, recorded and stored by us and by QEMU in turn: both see the
//! same ranges, and each image is sound by QEMU's check.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test bitmaps` replays it.
#![allow(clippy::single_range_in_vec_init)] // Lists of ranges are what is compared.

#[path = "../support/mod.rs"]
mod support;

mod file;
mod rules;

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use qcow2rs::{Image, WriteFlags};
use serde_json::Value;
use support::operations::{Backing, Case, Op};
use support::{
    Rng, Scratch, describe, for_seeds, open, open_rw, qemu_create, qemu_img_check, qemu_io,
    qemu_ok, text,
};

const CLUSTER: u64 = 64 << 10;

fn write(image: &Image, offset: u64, len: usize) {
    image.write_at(&vec![3; len], offset, WriteFlags::default()).unwrap();
}

/// The dirty ranges of a bitmap, as the library tells them.
fn dirty(image: &Image, name: &str) -> Vec<Range<u64>> {
    let (mut ranges, mut at) = (Vec::new(), 0);
    while at < image.size() {
        // In small portions, to begin within ranges as well.
        let end = image.size().min(at + 300_000);
        let begin = at;
        image
            .bitmap_status(name.as_bytes(), begin, end - begin, 3, &mut |range| {
                assert_eq!(range.offset, at);
                at += range.length;
                if range.dirty {
                    ranges.push(range.offset..at);
                }
            })
            .unwrap();
        assert!(at > begin && at <= end);
    }
    joined(ranges)
}

fn joined(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

/// The same as QEMU exports it.
fn dirty_by_qemu(path: &Path, name: &str) -> Vec<Range<u64>> {
    let socket = path.with_extension("sock");
    let _ = std::fs::remove_file(&socket);
    // It ends with its first client.
    let args = ["-r", "-f", "qcow2", "-B", name, "-k", text(&socket), text(path)];
    let mut server = Command::new("qemu-nbd").args(args).spawn().unwrap();
    while !socket.exists() {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd {args:?}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let place = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        text(&socket)
    );
    let map = qemu_ok("qemu-img", &["map", "--output=json", "--image-opts", &place]);
    assert!(server.wait().unwrap().success());
    let map: Value = serde_json::from_str(&map).unwrap();
    let number = |entry: &Value, member: &str| entry[member].as_u64().unwrap();
    // Through this option what is dirty appears as what holds no data.
    let dirty = map.as_array().unwrap().iter().filter(|entry| entry["data"] == false);
    joined(
        dirty
            .map(|entry| {
                let start = number(entry, "start");
                start..start + number(entry, "length")
            })
            .collect(),
    )
}

/// Name, granularity, flags, as QEMU lists them.
fn listed_by_qemu(path: &Path) -> Vec<(String, u64, Vec<String>)> {
    let info = qemu_ok("qemu-img", &["info", "-U", "-f", "qcow2", "--output=json", text(path)]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    list.iter()
        .map(|entry| {
            let flags = entry["flags"].as_array().unwrap().iter().map(text).collect();
            (text(&entry["name"]), entry["granularity"].as_u64().unwrap(), flags)
        })
        .collect()
}

fn qemu_bitmap(path: &Path, args: &[&str]) {
    let mut all = vec!["bitmap"];
    all.extend(args);
    // The image comes before the name.
    let name = all.pop().unwrap();
    all.extend(["-f", "qcow2", text(path), name]);
    qemu_ok("qemu-img", &all);
}

/// Which parts of a disk are dirty.
#[derive(Clone)]
struct Model {
    name: String,
    granularity: u64,
    size: u64,
    enabled: bool,
    bits: Vec<bool>,
}

impl Model {
    fn record(&mut self, range: Range<u64>) {
        if self.enabled && !range.is_empty() {
            let parts = range.start / self.granularity..range.end.div_ceil(self.granularity);
            parts.for_each(|part| self.bits[part as usize] = true);
        }
    }

    fn ranges(&self) -> Vec<Range<u64>> {
        let dirty = self.bits.iter().enumerate().filter(|(_, dirty)| **dirty);
        let part = |index: usize| index as u64 * self.granularity;
        joined(dirty.map(|(index, _)| part(index)..part(index + 1).min(self.size)).collect())
    }
}

/// What an operation changes.
fn touched(op: &Op) -> Range<u64> {
    match *op {
        Op::Write { at, len, .. }
        | Op::Zero { at, len, .. }
        | Op::Discard { at, len }
        | Op::Compress { at, len, .. } => at..at + len,
        Op::Read { .. } | Op::Flush => 0..0,
    }
}

/// Changes the bitmaps, by the library if the image is open; the models follow.
fn change(rng: &mut Rng, path: &Path, image: Option<&Image>, models: &mut Vec<Model>, size: u64) {
    let index = rng.below(models.len().max(1) as u64) as usize;
    let name = models.get(index).map(|model| model.name.clone()).unwrap_or_default();
    let bytes = name.as_bytes();
    match rng.below(8) {
        0 | 1 if models.len() < 4 => {
            let (name, enabled) = (format!("b{}", rng.below(1 << 40)), rng.below(3) > 0);
            let granularity = 512 << rng.below(9);
            match image {
                Some(image) => {
                    image.bitmap_add(name.as_bytes(), granularity as u32, enabled).unwrap();
                }
                None => {
                    let granularity = granularity.to_string();
                    let enable = if enabled { "--enable" } else { "--disable" };
                    qemu_bitmap(path, &["--add", enable, "-g", &granularity, &name]);
                }
            }
            let bits = vec![false; size.div_ceil(granularity) as usize];
            models.push(Model { name, granularity, size, enabled, bits });
        }
        _ if models.is_empty() => {}
        0..=2 => {
            match image {
                Some(image) => image.bitmap_remove(bytes).unwrap(),
                None => qemu_bitmap(path, &["--remove", &name]),
            }
            models.remove(index);
        }
        3 => {
            match image {
                Some(image) => image.bitmap_clear(bytes).unwrap(),
                None => qemu_bitmap(path, &["--clear", &name]),
            }
            models[index].bits.fill(false);
        }
        4 | 5 => {
            let enabled = !models[index].enabled;
            match image {
                Some(image) => image.bitmap_set_enabled(bytes, enabled).unwrap(),
                None if enabled => qemu_bitmap(path, &["--enable", &name]),
                None => qemu_bitmap(path, &["--disable", &name]),
            }
            models[index].enabled = enabled;
        }
        _ => {
            let from = models[rng.below(models.len() as u64) as usize].clone();
            match image {
                Some(image) => image.bitmap_merge(bytes, from.name.as_bytes()).unwrap(),
                None => qemu_bitmap(path, &["--merge", &from.name, &name]),
            }
            let model = &mut models[index];
            let enabled = std::mem::replace(&mut model.enabled, true);
            from.ranges().into_iter().for_each(|range| model.record(range));
            model.enabled = enabled;
        }
    }
}

#[test]
fn whoever_records_and_stores_both_see_the_same() {
    for_seeds("bitmaps", 6, |seed| {
        let mut rng = Rng::new(seed);
        let cases = [(64 << 10, false), (4096, false), (512, false), (16 << 10, true)];
        let (cluster_size, extended_l2) = cases[(seed % 4) as usize];
        let size = (1 << 20) + rng.below(3) * 512;
        let backing = Backing::None;
        let case = Case { version: 3, cluster_size, extended_l2, refcount_bits: 16, size, backing };
        let scratch = Scratch::new();
        let path = scratch.path("image");
        case.create(&path);
        let mut models: Vec<Model> = Vec::new();
        for round in 0..6 {
            let ours = round % 2 == 0;
            let image = ours.then(|| open_rw(&path));
            for _ in 0..4 {
                change(&mut rng, &path, image.as_ref(), &mut models, size);
                let ops: Vec<Op> = (0..4).map(|_| case.op(&mut rng, !ours)).collect();
                match &image {
                    Some(image) => ops.iter().for_each(|op| op.apply(image)),
                    None => qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>()),
                }
                for model in &mut models {
                    ops.iter().for_each(|op| model.record(touched(op)));
                }
                if let Some(image) = &image {
                    for model in &models {
                        assert_eq!(dirty(image, &model.name), model.ranges(), "{}", model.name);
                    }
                }
            }
            if let Some(image) = image {
                image.close().unwrap();
            }
            qemu_img_check(&path);
            let read = open(&path);
            assert_eq!(read.bitmap_count().unwrap() as usize, models.len());
            for model in &models {
                describe(format!("{} after round {round}", model.name), || {
                    assert_eq!(dirty(&read, &model.name), model.ranges());
                    assert_eq!(dirty_by_qemu(&path, &model.name), model.ranges());
                    let listed = listed_by_qemu(&path);
                    let auto = if model.enabled { vec!["auto".to_owned()] } else { vec![] };
                    let found = listed.iter().find(|(name, ..)| *name == model.name).unwrap();
                    assert_eq!((found.1, &found.2), (model.granularity, &auto));
                    let infos = read.bitmaps().unwrap();
                    let info =
                        infos.iter().find(|info| info.name == model.name.as_bytes()).unwrap();
                    let bytes = model.ranges().iter().map(|range| range.end - range.start).sum();
                    assert_eq!(
                        (info.dirty_bytes, info.enabled, info.in_use),
                        (bytes, model.enabled, false)
                    );
                });
            }
            read.close().unwrap();
        }
    });
}

/// What was compressed, or said not to change anything; and what failed.
#[test]
fn each_kind_of_request_is_recorded_and_no_other() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 * CLUSTER);
    let image = open_rw(&path);
    image.bitmap_add(b"b", 512, true).unwrap();
    let flags = |compressed, unchanged| WriteFlags { compressed, unchanged, ..Default::default() };
    let cluster = vec![7; CLUSTER as usize];
    let took = |range: Range<u64>| {
        assert_eq!(dirty(&image, "b"), if range.is_empty() { vec![] } else { vec![range] });
        image.bitmap_clear(b"b").unwrap();
    };
    image.write_at(&cluster, 0, flags(true, false)).unwrap();
    took(0..CLUSTER);
    image.write_at(&cluster, CLUSTER, flags(false, false)).unwrap();
    took(CLUSTER..2 * CLUSTER);
    // In place: the way without a future.
    image.write_at(&[1; 100], CLUSTER + 511, flags(false, false)).unwrap();
    took(CLUSTER..CLUSTER + 1024);
    image.write_at(&[1; 100], CLUSTER + 511, flags(false, true)).unwrap();
    image.write_at(&cluster, 5 * CLUSTER, flags(true, true)).unwrap();
    image.write_at(&[], 512, flags(false, false)).unwrap();
    image.discard(512, 0).unwrap();
    image.write_zeroes(512, 0, Default::default()).unwrap();
    took(0..0);
    // Compressed data does not replace it: whether anything has changed nobody can know.
    image.write_at(&cluster, CLUSTER, flags(true, false)).unwrap_err();
    took(CLUSTER..2 * CLUSTER);
    image.write_zeroes(3 * CLUSTER + 1, 1, Default::default()).unwrap();
    took(3 * CLUSTER..3 * CLUSTER + 512);
    image.discard(9 * CLUSTER + 700, 1000).unwrap();
    took(9 * CLUSTER + 512..9 * CLUSTER + 2048);
    image.write_at(&[1], 64 * CLUSTER, flags(false, false)).unwrap_err();
    image.write_zeroes(u64::MAX - 3, 8, Default::default()).unwrap_err();
    image.write_vm_state(&[1; 4096], 0).unwrap();
    took(0..0);
    image.close().unwrap();
}
