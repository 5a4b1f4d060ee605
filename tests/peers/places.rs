//! What is larger than others expected, or elsewhere.

use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;

use qcow2rs::{CreateOptions, Image, OpenOptions, Source, WriteFlags, ZeroFlags};

use crate::support::dissect::{Dissected, field};
use crate::support::{Scratch, open_rw, qemu_create, qemu_img_check, qemu_io, read, refcounts};

fn write(image: &Image, at: u64, data: &[u8]) {
    image.write_at(data, at, WriteFlags::default()).unwrap();
}

#[test]
fn the_position_of_a_descriptor_is_nobodys_business() {
    // Copies of a descriptor share one position: others lost a table to whoever had
    // moved it between their seek and their write.
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=4k", 1 << 20);
    let mut file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let options = OpenOptions::new().writable(true);
    let image = Image::open(Source::fd(file.as_fd()).unwrap(), &options).unwrap();
    for step in 0..20 {
        file.seek(SeekFrom::Start(step * 77)).unwrap();
        write(&image, step * 40_000, &[step as u8 + 1; 5000]);
        image.flush().unwrap();
        assert_eq!(file.stream_position().unwrap(), step * 77);
    }
    for step in 0..20 {
        assert_eq!(read(&image, step * 40_000, 5000), [step as u8 + 1; 5000]);
    }
    image.close().unwrap();
    qemu_img_check(&path);
}

#[test]
fn a_refcount_table_may_be_larger_than_the_file_needs() {
    // Images of a distribution, made that way, were refused elsewhere.
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=4k", 1 << 20);
    qemu_io(&path, &["write -P 1 0 64k".into()]);
    Dissected::patch(&path, |image| {
        // A new table of five clusters at the end, where its clusters count.
        let end = image.bytes.len() as u64 / 4096;
        let old = image.u64(field::REFTABLE_OFFSET) as usize;
        let table = image.bytes[old..old + 4096].to_vec();
        image.put(end as usize * 4096, &table);
        image.put((end as usize + 5) * 4096 - 1, &[0]);
        (end..end + 5).for_each(|cluster| image.set_refcount(cluster, 1));
        image.set_refcount(old as u64 / 4096, 0);
        image.put64(field::REFTABLE_OFFSET, end * 4096);
        image.put32(field::REFTABLE_CLUSTERS, 5);
    });
    qemu_img_check(&path);
    let image = open_rw(&path);
    assert_eq!(read(&image, 0, 64 << 10), vec![1; 64 << 10]);
    write(&image, 100_000, &[2; 300_000]);
    image.close().unwrap();
    qemu_img_check(&path);
    refcounts::assert_exact(&path);
}

#[test]
fn requests_may_be_of_more_than_two_gibibytes() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut options = CreateOptions::default();
    options.size = Some(7 << 30);
    let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new()).unwrap();
    let places = [5, (1 << 31) - 3, (1 << 32) + 5, (5 << 30) - 9];
    places.iter().for_each(|at| write(&image, *at, &[3; 100]));
    for unmap in [false, true] {
        let flags = ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() };
        image.write_zeroes(1 << 30, (4 << 30) - 5, flags).unwrap();
        let mut covered = 0;
        image
            .block_status(0, 7 << 30, false, 10_000, &mut |extent| covered += extent.length)
            .unwrap();
        assert_eq!(covered, 7 << 30);
        assert_eq!(read(&image, 5, 100), [3; 100]);
        assert_eq!(read(&image, (1 << 31) - 3, 100), [0; 100]);
        // Four bytes of the last one were behind the zeroes' end.
        assert_eq!(read(&image, (5 << 30) - 9, 100)[..4], [0; 4]);
        assert_eq!(read(&image, (5 << 30) - 9, 100)[4..], [3; 96]);
        places.iter().for_each(|at| write(&image, *at, &[3; 100]));
    }
    image.discard(0, 7 << 30).unwrap();
    places.iter().for_each(|at| assert_eq!(read(&image, *at, 100), [0; 100]));
    image.close().unwrap();
    qemu_img_check(&path);
}

#[test]
fn the_cache_covers_a_disk_that_ends_in_the_middle_of_a_table() {
    // One table too few made such disks thirty times as slow.
    const MIB: u64 = 1 << 20;
    let scratch = Scratch::new();
    let mut options = CreateOptions::default();
    options.size = Some(1280 * MIB + (64 << 10));
    let path = scratch.path("image");
    let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new()).unwrap();
    let places: Vec<u64> = (0..=1280).step_by(32).map(|mib| mib * MIB).collect();
    places.iter().for_each(|at| write(&image, *at, &[1; 512]));
    image.close().unwrap();
    let image = Image::open(Source::path(&path), &OpenOptions::new()).unwrap();
    let round = || places.iter().for_each(|at| assert_eq!(read(&image, *at, 512), [1; 512]));
    round();
    let once = image.stats().l2_cache_misses;
    assert!(once >= 41, "{once}");
    round();
    assert_eq!(image.stats().l2_cache_misses, once);
}
