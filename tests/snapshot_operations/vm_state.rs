//! VM state, here and in QEMU: the same bytes in the same place.

use qcow2rs::snapshots::Meta;
use qcow2rs::{ErrorKind, Image, WriteFlags};

use super::support::refcounts::assert_exact;
use super::support::{
    Scratch, assert_content, describe, open, open_rw, qemu_create, qemu_img_check, qemu_io,
};

/// The VM state of an image, or of a snapshot that is open.
fn vm_state(image: &Image, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length];
    image.read_vm_state(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn vm_state_is_where_qemu_has_it() {
    for options in ["cluster_size=4k", "compat=0.10,cluster_size=512", "extended_l2=on", ""] {
        describe(options.to_owned(), || {
            let scratch = Scratch::new();
            let path = scratch.path("image");
            qemu_create(&path, options, 300 << 10);
            qemu_io(&path, &["write -P 1 0 300k".into(), "write -b -P 2 0 100k".into()]);
            let image = open_rw(&path);
            assert_eq!(vm_state(&image, 100 << 10), vec![2; 100 << 10]);
            // Past the end of the L1 table.
            let mut expected = vec![2; 100 << 10];
            expected.resize(5 << 20, 0);
            assert_eq!(vm_state(&image, 5 << 20), expected);
            image.write_vm_state(&vec![3; 4 << 20], 50 << 10).unwrap();
            expected[50 << 10..][..4 << 20].fill(3);
            assert_eq!(vm_state(&image, 5 << 20), expected);
            let meta = Meta { vm_state_size: 5 << 20, ..Meta::now() };
            image.snapshot_create(b"s", &meta).unwrap();
            // It is the snapshot's now.
            assert_eq!(vm_state(&image, 5 << 20), vec![0; 5 << 20]);
            image.write_vm_state(&[4; 1024], 0).unwrap();
            let snapshot = image.snapshot_open(b"s").unwrap();
            assert_eq!(vm_state(&snapshot, 5 << 20), expected);
            let readonly = snapshot.write_vm_state(&[1], 0).unwrap_err();
            assert_eq!(readonly.kind(), ErrorKind::ReadOnly);
            drop(snapshot);
            assert_content(&image, &vec![1; 300 << 10]);
            assert_eq!(image.size(), 300 << 10);
            let huge = image.write_vm_state(&[1], 1 << 62).unwrap_err();
            assert_eq!(huge.errno(), libc::EFBIG);
            image.close().unwrap();
            qemu_img_check(&path);
            assert_exact(&path);
            qemu_io(&path, &["read -b -P 4 0 1024".into(), "read -P 1 0 300k".into()]);
            super::snapshot(&path, &["-a", "s"]);
            let reads =
                ["read -b -P 2 0 50k", "read -b -P 3 50k 4M", "read -P 1 0 300k"].map(String::from);
            qemu_io(&path, &reads);
            let image = open_rw(&path);
            assert_eq!(vm_state(&image, 5 << 20), expected);
            image.snapshot_delete(b"s").unwrap();
            assert_eq!(vm_state(&image, 5 << 20), expected, "the active state has it, too");
            image.close().unwrap();
            qemu_img_check(&path);
            assert_exact(&path);
        });
    }
}

/// The L1 table moves while others write.
#[test]
fn vm_state_may_be_written_beside_other_requests() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=512", 1 << 20);
    let image = open_rw(&path);
    std::thread::scope(|scope| {
        for thread in 0..2u8 {
            let image = &image;
            scope.spawn(move || {
                for n in (0..1024).filter(|n| n % 2 == u64::from(thread)) {
                    let bytes = [thread + 1; 1024];
                    image.write_at(&bytes, n * 1024, WriteFlags::default()).unwrap();
                    if n % 64 < 2 {
                        image.flush().unwrap();
                    }
                }
            });
        }
        for n in 0..64u64 {
            image.write_vm_state(&[9; 4096], n * 65536).unwrap();
        }
    });
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
    let expected: Vec<u8> = (0..1024).flat_map(|n| [n as u8 % 2 + 1; 1024]).collect();
    let image = open(&path);
    assert_content(&image, &expected);
    for n in 0..64u64 {
        let mut bytes = [0; 4096];
        image.read_vm_state(&mut bytes, n * 65536).unwrap();
        assert!(bytes == [9; 4096]);
    }
}
