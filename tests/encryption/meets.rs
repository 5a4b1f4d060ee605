//! Encryption where it meets other features: zeroes that are found where data is
//! encrypted have to be so by their entries, or be encrypted.

use qcow2rs::snapshots::Meta;
use qcow2rs::{AmendOptions, Format, OpenOptions, Preallocation, ResizeOptions, Source, ZeroFlags};

use crate::support::{Scratch, read, text};
use crate::{AES, LUKS, create_options, open_rw, qemu_check, qemu_content};

#[test]
fn a_data_file_that_grows_shows_zeroes() {
    let scratch = Scratch::new();
    let [path, data] = ["image", "data"].map(|name| scratch.path(name));
    let (old, new) = ((1 << 20) + 512, 2 << 20);
    for format in [LUKS, AES] {
        for layout in ["cluster_size=4k", "cluster_size=64k,extended_l2=on"] {
            for mode in ["off", "metadata", "falloc", "full"] {
                std::fs::write(&data, b"").unwrap();
                let mut options = create_options(&format!("{format},{layout}"), old);
                options.data_file = Some((text(&data).into(), Source::path(&data)));
                qcow2rs::create_path(&path, false, &options, &OpenOptions::new()).unwrap();
                let image = open_rw(&path);
                image.write_at(&[7; 512], old - 512, Default::default()).unwrap();
                let preallocation = Preallocation::from_name(mode).unwrap();
                let grow = ResizeOptions { preallocation, shrink: false };
                image.resize(new, &grow, &mut |_, _| true).unwrap();
                let mut expected = vec![0; new as usize];
                expected[old as usize - 512..old as usize].fill(7);
                assert!(read(&image, 0, new) == expected, "{format} {layout} {mode}");
                image.close().unwrap();
                // Each starts a process that derives a key.
                if mode == "metadata" {
                    assert!(qemu_content(&path) == expected, "QEMU, {format} {layout} {mode}");
                    qemu_check(&path);
                }
            }
        }
    }
}

#[test]
fn zeroes_in_snapshots_stay_zeroes_in_version_2() {
    let scratch = Scratch::new();
    let [path, base] = ["image", "base"].map(|name| scratch.path(name));
    std::fs::write(&base, vec![0xbb; 1 << 20]).unwrap();
    for format in [LUKS, AES] {
        let mut options = create_options(&format!("{format},cluster_size=4k"), 1 << 20);
        options.backing = Some((text(&base).into(), Format::Raw));
        qcow2rs::create_path(&path, false, &options, &OpenOptions::new()).unwrap();
        let image = open_rw(&path);
        image.write_zeroes(64 << 10, 64 << 10, ZeroFlags::default()).unwrap();
        image.snapshot_create(b"s", &Meta::now()).unwrap();
        image.write_at(&[5; 4096], 64 << 10, Default::default()).unwrap();
        let mut amend = AmendOptions::default();
        amend.set("compat", "0.10").unwrap();
        image.amend(&amend, &mut |_, _| true).unwrap();
        let mut expected = vec![0xbb; 1 << 20];
        expected[64 << 10..128 << 10].fill(0);
        let snapshot = image.snapshot_open(b"s").unwrap();
        assert!(read(&snapshot, 0, 1 << 20) == expected, "{format}: the snapshot");
        drop(snapshot);
        expected[64 << 10..][..4096].fill(5);
        assert!(read(&image, 0, 1 << 20) == expected, "{format}: the disk");
        image.close().unwrap();
        qemu_check(&path);
    }
}
