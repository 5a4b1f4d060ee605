//! The smallest and the largest disks that the format can have.

use std::path::Path;

use qcow2rs::{CreateOptions, ErrorKind, OpenOptions, WriteFlags};

use super::KIB;
use super::support::dissect::Dissected;
use super::support::refcounts::assert_exact;
use super::support::{
    Scratch, assert_same, describe, open, open_rw, qemu, qemu_create, qemu_img_check, qemu_io,
    read, text,
};

/// What an L1 table of 32 MiB maps.
const LARGEST: [(&str, u64); 3] = [
    ("cluster_size=512", 128 << 30),
    ("extended_l2=on,cluster_size=64k", 1 << 50),
    ("extended_l2=on,cluster_size=2M", 1 << 60),
];

/// Makes an image; QEMU is slow at this where clusters are small.
fn create(path: &Path, list: &str, size: u64) -> qcow2rs::Result<()> {
    let mut options = CreateOptions::default();
    for (name, value) in list.split(',').map(|option| option.split_once('=').unwrap()) {
        options.set(name, value).unwrap();
    }
    options.size = Some(size);
    let mut open = OpenOptions::new();
    open.no_flush = true;
    qcow2rs::create_path(path, true, &options, &open)
}

#[test]
fn the_largest_disks_are_used_to_their_last_byte() {
    for (options, size) in LARGEST {
        describe(options.into(), || {
            let scratch = Scratch::new();
            let path = scratch.path("image");
            create(&path, options, size).unwrap();
            qemu_img_check(&path);
            let image = open_rw(&path);
            assert_eq!(image.size(), size);
            image.write_at(&[9; 1000], size - 1000, WriteFlags::default()).unwrap();
            image.write_at(&[8; 1000], size / 2 - 500, WriteFlags::default()).unwrap();
            assert_same(&read(&image, size - 2000, 2000), &[[0; 1000], [9; 1000]].concat());
            let past = image.write_at(&[7; 2], size - 1, WriteFlags::default());
            assert_eq!(past.unwrap_err().kind(), ErrorKind::InvalidArgument);
            assert!(image.read_at(&mut [0; 2], u64::MAX).is_err());
            let mut extents = Vec::new();
            image.block_status(0, size, false, 9, &mut |it| extents.push(it)).unwrap();
            assert_eq!(extents.iter().map(|it| it.length).sum::<u64>(), size);
            let data: u64 = extents.iter().filter(|it| it.data).map(|it| it.length).sum();
            assert!((2000..16 << 20).contains(&data), "{data}");
            image.close().unwrap();
            qemu_img_check(&path);
            qemu_io(
                &path,
                &[
                    format!("read -P 9 {} 1000", size - 1000),
                    format!("read -P 8 {} 1000", size / 2 - 500),
                ],
            );
            let image = open_rw(&path);
            image.discard(0, size).unwrap();
            image.close().unwrap();
            qemu_img_check(&path);
            assert_same(&read(&open(&path), size - 2000, 2000), &[0; 2000]);
        });
    }
}

#[test]
fn a_larger_disk_is_not_made() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for (options, size) in LARGEST {
        let refused = create(&path, options, size + 512).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidArgument, "{options}");
        assert!(!path.exists());
        let too_large = (size + 512).to_string();
        let args = ["create", "-q", "-f", "qcow2", "-o", options, text(&path), &too_large];
        assert!(!qemu("qemu-img", &args).status.success());
        let _ = std::fs::remove_file(&path);
    }
}

#[test]
fn a_disk_of_no_bytes_is_a_disk() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for options in ["compat=0.10", "cluster_size=512", "extended_l2=on"] {
        qemu_create(&path, options, 0);
        let before = Dissected::load(&path);
        let image = open_rw(&path);
        assert_eq!(image.size(), 0);
        image.read_at(&mut [], 0).unwrap();
        image.write_at(&[], 0, WriteFlags::default()).unwrap();
        image.discard(0, 0).unwrap();
        image.write_zeroes(0, 0, Default::default()).unwrap();
        assert!(image.write_at(&[1], 0, WriteFlags::default()).is_err());
        image.close().unwrap();
        assert!(Dissected::load(&path).bytes == before.bytes, "{options}");
    }
}

#[test]
fn a_disk_may_be_smaller_than_anything_in_it() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for options in ["cluster_size=2M", "extended_l2=on,cluster_size=2M", "compat=0.10"] {
        qemu_create(&path, options, 512);
        let image = open_rw(&path);
        image.write_at(&[9; 100], 100, WriteFlags::default()).unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
        let expected = [vec![0; 100], vec![9; 100], vec![0; 312]].concat();
        assert_same(&read(&open(&path), 0, 512), &expected);
        qemu_io(&path, &["read -P 9 100 100".into(), "read -P 0 200 312".into()]);
        let image = open_rw(&path);
        image.discard(0, 512).unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
        assert!(std::fs::metadata(&path).unwrap().len() < 16 * 1024 * KIB);
    }
}
