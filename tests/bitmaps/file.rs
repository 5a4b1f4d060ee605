//! What is in the file: which bits take clusters, where the header has the directory, and
//! what is malformed there.

use qcow2rs::format::header::Header;
use qcow2rs::{ErrorKind, Image, OpenOptions, Source};

use super::support::dissect::Dissected;
use super::support::{
    Scratch, open, open_rw, qemu, qemu_create, qemu_img_check, qemu_io, qemu_ok, text,
};
use super::{CLUSTER, dirty, dirty_by_qemu, listed_by_qemu, qemu_bitmap, write};

/// What the file knows already is not written again, and what is all alike takes no bits.
#[test]
fn only_what_is_not_in_the_file_is_written() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=512", 8 << 20);
    let image = open_rw(&path);
    image.bitmap_add(b"none", 512, true).unwrap();
    image.bitmap_add(b"all", 512, true).unwrap();
    image.bitmap_set_enabled(b"none", false).unwrap();
    image.write_zeroes(0, 8 << 20, Default::default()).unwrap();
    image.bitmap_add(b"some", 512, true).unwrap();
    write(&image, 1 << 20, 512);
    image.bitmap_set_enabled(b"some", false).unwrap();
    image.close().unwrap();
    let tables = |path: &std::path::Path| {
        let file = Dissected::load(path);
        let header = Header::parse(&file.bytes).unwrap();
        let place = header.extensions.bitmaps.unwrap();
        let from = place.directory_offset as usize;
        let bytes = &file.bytes[from..from + place.directory_size as usize];
        let entries = qcow2rs::format::bitmap::parse_directory(bytes, place.count).unwrap();
        let table = |offset: u64, count: u32| -> Vec<u64> {
            (0..u64::from(count)).map(|index| file.u64((offset + index * 8) as usize)).collect()
        };
        entries
            .into_iter()
            .map(|entry| (entry.table_offset, table(entry.table_offset, entry.table_entries)))
            .collect::<Vec<_>>()
    };
    let before = tables(&path);
    assert_eq!(before[0].1, [0; 4]);
    assert_eq!(before[1].1, [1; 4]);
    let stored: Vec<_> = before[2].1.iter().map(|entry| *entry > 1).collect();
    assert_eq!(stored, [true, false, false, false]);
    assert_eq!(dirty_by_qemu(&path, "all"), [0..8 << 20]);
    let bytes = std::fs::read(&path).unwrap();
    // Nothing that is read changes anything.
    let image = open(&path);
    assert_eq!(dirty(&image, "some"), [1 << 20..(1 << 20) + 512]);
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);
    // Open for writing: its mark comes and goes, the tables stay.
    let image = open_rw(&path);
    image.close().unwrap();
    assert_eq!(tables(&path), before);
    qemu_img_check(&path);
}

/// The header says where the directory is by the write of its first sector, whatever else
/// is in there; where that does not suffice, the old place is changed with care, or an
/// error says so.
#[test]
fn headers_of_every_length_hold_the_extension_or_say_that_they_cannot() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    std::fs::write(scratch.path("base"), vec![5; 1 << 20]).unwrap();
    let long = |length: usize, name: &str| format!("{}{name}", "./".repeat(length / 2));
    for (cluster_size, length) in [(512, 20), (512, 200), (4096, 1000), (65536, 300), (65536, 1000)]
    {
        let name = long(length, "base");
        let options = format!("cluster_size={cluster_size},backing_file={name},backing_fmt=raw");
        qemu_create(&path, &options, 1 << 20);
        for round in 0..4u64 {
            let image = open_rw(&path);
            match round {
                0 => image.bitmap_add(b"ours", 512, true).unwrap(),
                2 => image.bitmap_remove(b"ours").unwrap(),
                _ => {}
            }
            write(&image, round * 512, 512);
            image.close().unwrap();
            if round == 0 {
                qemu_bitmap(&path, &["--add", "-g", "512", "theirs"]);
            }
            qemu_img_check(&path);
            let image = open(&path);
            assert_eq!(super::support::read(&image, 1 << 19, 512), [5; 512]);
            image.close().unwrap();
        }
        assert_eq!(dirty_by_qemu(&path, "theirs"), [512..2048], "{cluster_size} {length}");
    }
    // The name of a data file is an extension, too, and has to be in front.
    let mut create = vec!["create", "-q", "-f", "qcow2", "-o"];
    let name = long(450, "data");
    let options = format!("data_file={}/{name}", scratch.path("").display());
    create.extend([&options[..], text(&path), "1M"]);
    qemu_ok("qemu-img", &create);
    let image = open_rw(&path);
    image.bitmap_add(b"ours", 512, true).unwrap();
    write(&image, 0, 512);
    assert_eq!(image.close().unwrap_err().kind(), ErrorKind::NotSupported);
    assert_eq!(listed_by_qemu(&path), []);
    qemu_img_check(&path);
    qemu_bitmap(&path, &["--add", "-g", "512", "theirs"]);
    for round in 0..3u64 {
        let image = open_rw(&path);
        write(&image, round * 512, 512);
        image.close().unwrap();
        assert_eq!(dirty_by_qemu(&path, "theirs"), [0..(round + 1) * 512]);
        qemu_img_check(&path);
    }
    let image = open_rw(&path);
    image.bitmap_remove(b"theirs").unwrap();
    image.close().unwrap();
    assert_eq!(listed_by_qemu(&path), []);
    qemu_img_check(&path);
}

/// Malformed where QEMU looks at it: an open for writing fails there and here; reading
/// goes on, but for what is asked of bitmaps.
#[test]
fn what_qemu_does_not_open_is_not_written() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 * CLUSTER);
    qemu_bitmap(&path, &["--add", "-g", "512", "a"]);
    qemu_bitmap(&path, &["--add", "-g", "512", "b"]);
    qemu_io(&path, &["write 0 4k".into()]);
    let good = std::fs::read(&path).unwrap();
    let header = Header::parse(&good).unwrap();
    let place = header.extensions.bitmaps.unwrap();
    let directory = place.directory_offset as usize;
    let second = directory + 32;
    let table = u64::from_be_bytes(good[directory..directory + 8].try_into().unwrap()) as usize;
    let extension = good.windows(4).position(|it| it == 0x2385_2875u32.to_be_bytes()).unwrap() + 8;
    // Where, what; whether QEMU opens it for writing.
    let damages: &[(usize, &[u8], bool)] = &[
        (extension, &[0, 0, 0, 0], false),
        (extension, &[0, 0, 0, 1], false),
        (extension, &[0, 0, 0, 3], false),
        (extension + 4, &[1], false),
        (extension + 8, &[0, 0, 0, 0, 0, 0, 0, 0], false),
        (extension + 15, &[63], false),
        (extension + 15, &[72], false),
        (extension + 8, &[0xff], false),
        (extension + 22, &[1], false),
        (directory + 6, &[1], false),
        (directory, &[0, 0, 0, 0, 0, 0, 0, 0], false),
        (directory + 8, &[0, 0, 0, 0], false),
        (directory + 8, &[0, 0, 0, 2], false),
        (directory + 8, &[0xff, 0, 0, 0], false),
        (directory + 12, &[1], false),
        (directory + 15, &[4], false),
        // Out of date: what its table says does not matter.
        (directory + 8, &[0, 0, 0, 2, 0, 0, 0, 3], true),
        (directory + 16, &[0], false),
        (directory + 16, &[2], false),
        (directory + 17, &[8], false),
        (directory + 17, &[32], false),
        (directory + 17, &[20], true),
        (directory + 18, &[4], false),
        (directory + 19, &[0xff], false),
        (directory + 20, &[0, 0, 0, 8], false),
        (directory + 20, &[0xff], false),
        // The same name twice; and where one of them is out of date.
        (second + 24, b"a", false),
        (table, &[0xff], false),
        (table + 7, &[2], false),
        (table + 6, &[2], false),
        // Far behind the end of the file: nothing is set there.
        (table, &[0, 0x70], true),
    ];
    for (at, bytes, opens) in damages {
        let mut image = good.clone();
        image[*at..*at + bytes.len()].copy_from_slice(bytes);
        let what = format!("{bytes:x?} at {at:#x}");
        std::fs::write(&path, &image).unwrap();
        let ours = Image::open(Source::path(&path), &OpenOptions::new().writable(true));
        if !opens {
            assert!(ours.is_err(), "{what}");
            assert!(std::fs::read(&path).unwrap() == image, "{what}: nothing is written");
        } else {
            let ours = ours.unwrap_or_else(|error| panic!("{what}: {error}"));
            ours.abandon().unwrap();
        }
        std::fs::write(&path, &image).unwrap();
        let theirs = qemu("qemu-io", &["-f", "qcow2", "-c", "flush", text(&path)]);
        assert_eq!(theirs.status.success(), *opens, "QEMU: {what}");
    }
}
