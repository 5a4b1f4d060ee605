//! Disks of another size, and data that is taken ahead, where data is in a file of its
//! own: how long that is, what entries say, what shows. (Crashes on the way:
//! `tests/crash/schedules/resize.rs`.)

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use qcow2rs::{ErrorKind, Image, OpenOptions, Preallocation, ResizeOptions, WriteFlags};

use crate::support::dissect::{Dissected, field};
use crate::support::operations::{Backing, Case};
use crate::support::{
    Rng, Scratch, assert_content, describe, for_seeds, open, open_rw, open_somehow, qemu,
    qemu_create, qemu_img_check, qemu_ok, text,
};
use crate::{
    Data, assert_same_entries, assert_sound, create_options, data_of, qemu_makes, we_make,
};

const MODES: [&str; 4] = ["off", "metadata", "falloc", "full"];

fn resize(image: &Image, size: u64, mode: &str) -> qcow2rs::Result<()> {
    let preallocation = Preallocation::from_name(mode).unwrap();
    image.resize(size, &ResizeOptions { shrink: true, preallocation }, &mut |_, _| true)
}

fn qemu_resizes(path: &Path, size: u64, mode: &str) {
    let option = format!("--preallocation={mode}");
    let args = ["resize", "-q", "-f", "qcow2", "--shrink", &option, text(path), &size.to_string()];
    qemu_ok("qemu-img", &args);
}

fn case(cluster_size: u64, extended_l2: bool, size: u64) -> Case {
    let backing = Backing::None;
    Case { version: 3, cluster_size, extended_l2, refcount_bits: 16, size, backing }
}

fn data_length(path: &Path) -> u64 {
    std::fs::metadata(data_of(path)).unwrap().len()
}

/// Bytes that the file system has for it.
fn data_space(path: &Path) -> u64 {
    std::fs::metadata(data_of(path)).unwrap().blocks() * 512
}

const KINDS: [(u64, bool, Data); 6] = [
    (512, false, Data::Plain),
    (512, false, Data::Raw),
    (65536, false, Data::Plain),
    (65536, false, Data::Raw),
    (16384, true, Data::Plain),
    (16384, true, Data::Raw),
];

#[test]
fn any_size_after_another_whoever_changes_it() {
    for_seeds("data_file", 3, |seed| {
        for (index, (cluster, extended, data)) in KINDS.into_iter().enumerate() {
            let mut rng = Rng::new(seed * 64 + index as u64);
            let scratch = Scratch::new();
            let path = scratch.path("image");
            let unit = cluster * 24 / 512;
            let mut model = vec![0; (1 + rng.below(unit)) as usize * 512];
            let case = case(cluster, extended, model.len() as u64);
            // In its raw files with subclusters QEMU shows nothing of what is there.
            match rng.below(2) == 0 || extended && data == Data::Raw {
                true => we_make(&path, &case, data),
                false => qemu_makes(&path, &case, data),
            }
            for step in 0..8 {
                let size = match rng.below(6) {
                    // Over the border of an L2 table.
                    1 => (cluster * cluster / 8).min(4 << 20) + rng.below(4) * 512,
                    _ => (1 + rng.below(unit)) * 512,
                };
                let longer = size > model.len() as u64;
                let mode = if longer { MODES[rng.below(4) as usize] } else { "off" };
                // QEMU's way to make a disk longer shows what a shorter one had.
                let theirs = rng.below(3) == 0 && !longer;
                let what = format!(
                    "seed {seed}, {case:?}, {data:?}, step {step}: {} to {size}, {mode}, QEMU: \
                     {theirs}",
                    model.len()
                );
                describe(what, || {
                    let image = open_somehow(&path, &mut rng);
                    for _ in 0..6 {
                        let start = rng.below(model.len() as u64);
                        let most = model.len() as u64 - start;
                        let part = start as usize..(start + 1 + rng.below(most)) as usize;
                        rng.fill(&mut model[part.clone()]);
                        image.write_at(&model[part], start, WriteFlags::default()).unwrap();
                    }
                    model.resize(size as usize, 0);
                    match theirs {
                        true => {
                            image.close().unwrap();
                            qemu_resizes(&path, size, mode);
                        }
                        false => {
                            resize(&image, size, mode).unwrap();
                            assert_content(&image, &model);
                            image.close().unwrap();
                            assert_eq!(data_length(&path), size);
                        }
                    }
                    assert_sound(&path, data, &model);
                });
            }
        }
    });
}

#[test]
fn what_is_taken_ahead_is_what_qemu_takes() {
    for (cluster, extended, data) in KINDS {
        for mode in MODES {
            describe(format!("{cluster} {extended} {data:?} {mode}"), || {
                let scratch = Scratch::new();
                let (ours, qemus) = (scratch.path("ours"), scratch.path("qemus"));
                let (size, grown) = (cluster * 10 + 512, cluster * 100 + 1024);
                let case = case(cluster, extended, size);
                let mut options = create_options(&ours, &case, data);
                options.set("preallocation", mode).unwrap();
                qcow2rs::create_path(&ours, true, &options, &OpenOptions::new()).unwrap();
                let mut theirs = format!(
                    "{},data_file={},preallocation={mode}",
                    case.options(),
                    text(&data_of(&qemus))
                );
                if data == Data::Raw {
                    theirs += ",data_file_raw=on";
                }
                qemu_create(&qemus, &theirs, size);
                // See docs/qemu-differences.md.
                let same = !(extended && data == Data::Raw);
                if same {
                    assert_same_entries(&ours, &qemus);
                }
                assert_eq!(data_length(&ours), size);
                if Preallocation::from_name(mode).unwrap().takes_space() {
                    assert!(data_space(&ours) >= size, "{}", data_space(&ours));
                } else {
                    assert!(data_space(&ours) <= 4096, "{}", data_space(&ours));
                }
                assert_sound(&ours, data, &vec![0; size as usize]);
                let image = open_rw(&ours);
                resize(&image, grown, mode).unwrap();
                image.close().unwrap();
                qemu_resizes(&qemus, grown, mode);
                if same {
                    assert_same_entries(&ours, &qemus);
                }
                assert_eq!(data_length(&ours), grown);
                if Preallocation::from_name(mode).unwrap().takes_space() {
                    assert!(data_space(&ours) >= grown, "{}", data_space(&ours));
                }
                assert_sound(&ours, data, &vec![0; grown as usize]);
            });
        }
    }
}

#[test]
fn what_is_taken_ahead_over_a_backing_file_lets_it_show() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let size = 40 * 16384;
    let case = Case { backing: Backing::Raw(size), ..case(16384, true, size) };
    let mut rng = Rng::new(1);
    let mut model = case.create_backing(&path, &mut rng);
    let mut options = create_options(&path, &case, Data::Plain);
    options.set("preallocation", "metadata").unwrap();
    qcow2rs::create_path(&path, true, &options, &OpenOptions::new()).unwrap();
    assert_sound(&path, Data::Plain, &model);
    let image = open_rw(&path);
    image.write_at(&[7; 1000], 5000, WriteFlags::default()).unwrap();
    model[5000..6000].fill(7);
    resize(&image, 2 * size, "full").unwrap();
    model.resize(2 * size as usize, 0);
    image.close().unwrap();
    assert_sound(&path, Data::Plain, &model);
}

#[test]
fn what_lies_behind_the_disk_does_not_become_its_content() {
    for (cluster, extended, data) in KINDS {
        for mode in ["off", "metadata", "full"] {
            describe(format!("{cluster} {extended} {data:?} {mode}"), || {
                let scratch = Scratch::new();
                let path = scratch.path("image");
                let (size, grown) = (cluster * 3 + 512, cluster * 9);
                we_make(&path, &case(cluster, extended, size), data);
                let mut model = vec![3; size as usize];
                let image = open_rw(&path);
                image.write_at(&model, 0, WriteFlags::default()).unwrap();
                image.close().unwrap();
                let mut bytes = std::fs::read(data_of(&path)).unwrap();
                bytes.resize(2 * grown as usize, 0xee);
                std::fs::write(data_of(&path), &bytes).unwrap();
                let image = open_rw(&path);
                resize(&image, grown, mode).unwrap();
                model.resize(grown as usize, 0);
                assert_content(&image, &model);
                image.close().unwrap();
                assert_sound(&path, data, &model);
            });
        }
    }
}

#[test]
fn a_change_that_is_cancelled_leaves_the_data_file_as_it_was() {
    for data in [Data::Plain, Data::Raw] {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        we_make(&path, &case(65536, false, 1 << 20), data);
        let image = open_rw(&path);
        image.write_at(&[1; 4096], 0, WriteFlags::default()).unwrap();
        let options = ResizeOptions { shrink: false, preallocation: Preallocation::Full };
        let mut calls = 0;
        let error = image.resize(40 << 20, &options, &mut |_, _| {
            calls += 1;
            calls < 4
        });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(data_length(&path), 1 << 20);
        assert!(data_space(&path) < 1 << 20);
        image.close().unwrap();
        let mut model = vec![0; 1 << 20];
        model[..4096].fill(1);
        assert_sound(&path, data, &model);
    }
}

/// Says in an image without backing file that its data is in this file.
fn name_data_file(image: &mut Dissected, name: &str) {
    let at = image.u32(field::HEADER_LENGTH) as usize;
    // In the place of what else the header has.
    image.put(at, &[0; 1024]);
    image.put(at, b"DATA");
    image.put32(at + 4, name.len() as u32);
    image.put(at + 8, name.as_bytes());
    image.put64(field::INCOMPATIBLE, image.incompatible() | 4);
}

#[test]
fn there_are_no_snapshots() {
    // Of what is in a file that is written in place.
    let scratch = Scratch::new();
    let path = scratch.path("image");
    we_make(&path, &case(65536, false, 1 << 20), Data::Plain);
    let image = open_rw(&path);
    let meta = qcow2rs::snapshots::Meta::now();
    let no = |result: qcow2rs::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NotSupported)
    };
    no(image.snapshot_create(b"a", &meta).map(drop));
    no(image.write_vm_state(&[1; 512], 0));
    image.close().unwrap();
    assert!(!qemu("qemu-img", &["snapshot", "-c", "a", text(&path)]).status.success());

    // An image that somebody has given one all the same: it can be read and written as
    // with QEMU, and both checks say that it should not be.
    let with = scratch.path("with");
    qemu_create(&with, "cluster_size=64k", 1 << 20);
    qemu_ok("qemu-img", &["snapshot", "-c", "a", text(&with)]);
    Dissected::patch(&with, |image| name_data_file(image, text(&data_of(&with))));
    std::fs::write(data_of(&with), vec![0; 1 << 20]).unwrap();
    let image = open_rw(&with);
    image.write_at(&[5; 512], 0, WriteFlags::default()).unwrap();
    no(image.snapshot_apply(b"a"));
    no(image.snapshot_delete(b"a"));
    no(image.snapshot_open(b"a").map(drop));
    image.close().unwrap();
    qemu_ok("qemu-io", &["-f", "qcow2", "-c", "read -P 5 0 512", text(&with)]);
    for verb in ["-a", "-d"] {
        let done = qemu("qemu-img", &["snapshot", verb, "a", text(&with)]);
        assert!(!done.status.success(), "{verb}");
    }
    let checked = qemu("qemu-img", &["check", "-f", "qcow2", text(&with)]);
    assert_eq!(checked.status.code(), Some(2));
    let image = open(&with);
    assert!(image.check(&mut ()).0.corruptions > 0);
    image.close().unwrap();
    qemu_img_check(&path);
}
