//! Sharp cases of reading and writing, by name.

use std::sync::Arc;

use qcow2rs::{
    ErrorKind, Image, OpenOptions, Queue, QueueOptions, Source, WriteFlags, ZeroFlags, snapshots,
};

use crate::support::{Scratch, read};
use crate::{
    AES, LUKS, assert_no_plain_text, create_options, make, open, open_rw, options, pattern,
    qemu_check, qemu_content, qemu_io, qemu_make,
};

#[test]
fn what_copy_on_write_moves_is_encrypted_anew() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for format in [LUKS, AES] {
        for layout in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
            make(&path, &format!("{format},{layout}"), 1 << 20);
            let image = open_rw(&path);
            let mut expected = vec![0; 1 << 20];
            expected[..200_000].copy_from_slice(&pattern(200_000));
            image.write_at(&pattern(200_000), 0, Default::default()).unwrap();
            image.snapshot_create(b"s", &snapshots::Meta::now()).unwrap();
            // In the middle of clusters, of subclusters, of sectors.
            for (at, len) in [(70_000, 10), (131_072, 512), (150_001, 30_000)] {
                image.write_at(&vec![9; len], at as u64, Default::default()).unwrap();
                expected[at..at + len].fill(9);
            }
            assert!(read(&image, 0, 1 << 20) == expected);
            let snapshot = image.snapshot_open(b"s").unwrap();
            assert_eq!(read(&snapshot, 0, 200_000), pattern(200_000));
            snapshot.close().unwrap();
            image.close().unwrap();
            assert!(qemu_content(&path) == expected, "{format} {layout}");
            assert_no_plain_text(&path);
            qemu_check(&path);
            let image = open_rw(&path);
            image.snapshot_apply(b"s").unwrap();
            assert_eq!(read(&image, 0, 200_000), pattern(200_000));
            image.close().unwrap();
        }
    }
}

#[test]
fn zeroes_beside_the_data_are_encrypted_too() {
    // A new cluster reads as zero in the file; decrypted it would not.
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, &format!("{LUKS},cluster_size=64k"), 1 << 20);
    let image = open_rw(&path);
    image.write_at(&[7; 1], 100_000, Default::default()).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[100_000] = 7;
    assert!(read(&image, 0, 1 << 20) == expected);
    image.write_zeroes(100_000, 1, ZeroFlags::default()).unwrap();
    image.write_zeroes(200_001, 3, ZeroFlags::default()).unwrap();
    image.close().unwrap();
    expected[100_000] = 0;
    assert!(qemu_content(&path) == expected);
}

#[test]
fn compressed_clusters_are_read_and_not_written() {
    // QEMU writes them, if told by `qemu-io`, and not encrypted.
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_make(&path, AES, 1 << 20);
    qemu_io(&path, &["write -c -P 65 64k 64k".into()]);
    let image = open_rw(&path);
    assert_eq!(read(&image, 64 << 10, 64 << 10), vec![65; 64 << 10]);
    let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
    let error = image.write_at(&[1; 65536], 0, flags).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    // Copy-on-write encrypts it.
    image.write_at(&pattern(20), 70_000, Default::default()).unwrap();
    image.close().unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[64 << 10..128 << 10].fill(65);
    expected[70_000..70_020].copy_from_slice(&pattern(20));
    assert!(qemu_content(&path) == expected);
    assert_no_plain_text(&path);
}

#[test]
fn data_files_are_encrypted_and_are_no_raw_images() {
    let scratch = Scratch::new();
    let (path, data) = (scratch.path("image"), scratch.path("data"));
    for format in [LUKS, AES] {
        for raw in ["off", "on"] {
            std::fs::write(&data, b"").unwrap();
            let mut make = create_options(&format!("{format},data_file_raw={raw}"), 1 << 20);
            let name = crate::support::text(&data).as_bytes().to_vec();
            make.data_file = Some((name, Source::path(&data)));
            qcow2rs::create_path(&path, false, &make, &OpenOptions::new()).unwrap();
            let image = open_rw(&path);
            assert!(read(&image, 0, 1 << 20).iter().all(|byte| *byte == 0), "{format} {raw}");
            image.write_at(&pattern(100_000), 12_345, Default::default()).unwrap();
            image.write_zeroes(70_000, 600, ZeroFlags::default()).unwrap();
            image.discard(0, 64 << 10).unwrap();
            let mut expected = vec![0; 1 << 20];
            expected[12_345..112_345].copy_from_slice(&pattern(100_000));
            expected[70_000..70_600].fill(0);
            expected[..64 << 10].fill(0);
            assert!(read(&image, 0, 1 << 20) == expected, "{format} {raw}");
            image.close().unwrap();
            assert_no_plain_text(&data);
            assert!(qemu_content(&path) == expected, "QEMU: {format} {raw}");
        }
    }
}

#[test]
fn vm_state_is_encrypted_as_the_disk_is() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for format in [LUKS, AES] {
        make(&path, format, 1 << 20);
        let image = open_rw(&path);
        image.write_vm_state(&pattern(5000), 1).unwrap();
        let mut state = vec![0; 5000];
        image.read_vm_state(&mut state, 1).unwrap();
        assert_eq!(state, pattern(5000));
        image.close().unwrap();
        assert_no_plain_text(&path);
        open(&path).read_vm_state(&mut state, 1).unwrap();
        assert_eq!(state, pattern(5000));
    }
}

#[test]
fn queues_carry_encrypted_data() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for direct in [false, true] {
        make(&path, LUKS, 4 << 20);
        let mut options = options(crate::PASSPHRASE, true);
        options.direct = direct;
        let image = Arc::new(Image::open(Source::path(&path), &options).unwrap());
        let queue = Queue::new(&image, &QueueOptions::default()).unwrap();
        // The second time in place.
        for round in 0..2u64 {
            for n in 0..16u64 {
                let mut data = qcow2rs::Buffer::aligned(65536).unwrap();
                data.copy_from_slice(&pattern(65536));
                data[0] = (n + round) as u8;
                queue.write(data, n << 18, WriteFlags::default(), n).unwrap();
            }
            assert_eq!(drain(&queue, 16).len(), 16);
        }
        for n in 0..16u64 {
            queue.read(qcow2rs::Buffer::aligned(4096).unwrap(), n << 18, n).unwrap();
        }
        for (n, data) in drain(&queue, 16) {
            assert_eq!((data[0], &data[1..]), (n as u8 + 1, &pattern(4096)[1..]));
        }
        drop(queue);
        Arc::into_inner(image).unwrap().close().unwrap();
        assert_no_plain_text(&path);
        let disk = qemu_content(&path);
        assert!(disk[1..65536] == pattern(65536)[1..]);
    }
}

fn drain(queue: &Queue, count: usize) -> Vec<(u64, Vec<u8>)> {
    let mut done = Vec::new();
    while done.len() < count {
        let take = |completion: qcow2rs::Completion| {
            completion.result.unwrap();
            done.push((completion.user_data, completion.buffer.map(Vec::from).unwrap_or_default()));
        };
        queue.wait(1, count, None, take).unwrap();
    }
    done
}

#[test]
fn block_status_names_no_place_in_the_file() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, AES, 1 << 20);
    let image = open_rw(&path);
    image.write_at(&[7; 65536], 0, Default::default()).unwrap();
    let mut extents = Vec::new();
    image.block_status(0, 1 << 20, false, 10, &mut |extent| extents.push(extent)).unwrap();
    assert!(extents[0].data && extents.iter().all(|extent| extent.host_offset.is_none()));
}

#[test]
fn amending_and_resizing_keep_the_keys() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, &format!("{LUKS},cluster_size=4k"), 1 << 20);
    let image = open_rw(&path);
    image.write_at(&pattern(100_000), 5, Default::default()).unwrap();
    image.write_zeroes(200_000, 4096, ZeroFlags::default()).unwrap();
    for (name, value) in [("refcount_bits", "64"), ("refcount_bits", "16"), ("compat", "0.10")] {
        let mut amend = qcow2rs::AmendOptions::default();
        amend.set(name, value).unwrap();
        image.amend(&amend, &mut |_, _| true).unwrap();
    }
    let shrink = qcow2rs::ResizeOptions { shrink: true, ..Default::default() };
    image.resize(3 << 20, &Default::default(), &mut |_, _| true).unwrap();
    image.resize(101_376, &shrink, &mut |_, _| true).unwrap();
    image.resize(2 << 20, &Default::default(), &mut |_, _| true).unwrap();
    let mut expected = vec![0; 2 << 20];
    expected[5..100_005].copy_from_slice(&pattern(100_000));
    assert!(read(&image, 0, 2 << 20) == expected);
    image.close().unwrap();
    qemu_check(&path);
    assert!(qemu_content(&path) == expected);
    assert_no_plain_text(&path);
}

#[test]
fn snapshots_of_qemu_are_read_and_those_of_ours_by_qemu() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for format in [LUKS, AES] {
        make(&path, format, 1 << 20);
        let image = open_rw(&path);
        image.write_at(&pattern(100_000), 777, Default::default()).unwrap();
        image.close().unwrap();
        assert!(crate::qemu_img(&["snapshot", "-c", "theirs"], &path).status.success());
        qemu_io(&path, &["write -P 3 30k 50k".into()]);
        let image = open_rw(&path);
        let snapshot = image.snapshot_open(b"theirs").unwrap();
        assert_eq!(read(&snapshot, 777, 100_000), pattern(100_000));
        snapshot.close().unwrap();
        image.snapshot_create(b"ours", &snapshots::Meta::now()).unwrap();
        image.write_at(&[9; 200_000], 0, Default::default()).unwrap();
        image.close().unwrap();
        assert!(crate::qemu_img(&["snapshot", "-a", "ours"], &path).status.success());
        let mut expected = vec![0; 1 << 20];
        expected[777..100_777].copy_from_slice(&pattern(100_000));
        expected[30 << 10..80 << 10].fill(3);
        assert!(qemu_content(&path) == expected, "{format}");
        qemu_check(&path);
    }
}

#[test]
fn an_image_that_was_not_closed_is_repaired_and_keeps_its_keys() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, &format!("{LUKS},lazy_refcounts=on,cluster_size=4k"), 1 << 20);
    let image = open_rw(&path);
    image.write_at(&pattern(300_000), 5, Default::default()).unwrap();
    image.flush().unwrap();
    image.abandon().unwrap();
    let mut wrong = options("wrong", true);
    wrong.repair_dirty = true;
    let before = std::fs::read(&path).unwrap();
    assert!(before[79] & 1 == 1, "it is dirty");
    let error = Image::open(Source::path(&path), &wrong).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Encrypted);
    assert!(std::fs::read(&path).unwrap() == before, "who has no key changes nothing");
    let image = open_rw(&path);
    assert_eq!(read(&image, 5, 300_000), pattern(300_000));
    image.close().unwrap();
    qemu_check(&path);
    assert_eq!(qemu_content(&path)[5..300_005], pattern(300_000));
}
