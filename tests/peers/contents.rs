//! What a disk reads as, and what is left of an image.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use qcow2rs::{
    CreateOptions, ErrorKind, Image, OpenOptions, Policy, Source, WriteFlags, ZeroFlags,
};

use crate::support::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, field};
use crate::support::memory_disk::{MemoryDisk, Request};
use crate::support::{
    Rng, Scratch, assert_content, assert_same, open, open_rw, qemu_create, qemu_img_check, qemu_io,
    qemu_ok, read, refcounts, text,
};

fn write(image: &Image, at: u64, data: &[u8]) {
    image.write_at(data, at, WriteFlags::default()).unwrap();
}

/// An image made by QEMU, with the data that these commands write.
fn made(scratch: &Scratch, options: &str, size: u64, commands: &[&str]) -> std::path::PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, size);
    qemu_io(&path, &commands.iter().map(ToString::to_string).collect::<Vec<_>>());
    path
}

/// All of it, and QEMU's opinion.
fn check(path: &Path, expected: &[u8]) {
    assert_content(&open(path), expected);
    qemu_img_check(path);
    refcounts::assert_exact(path);
}

#[test]
fn the_rest_of_a_shared_cluster_survives_a_write_to_a_part_of_it() {
    // Once a snapshot shared the cluster, another driver kept the new bytes only,
    // and changed the L2 table that the snapshot uses.
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        let scratch = Scratch::new();
        let path = made(&scratch, options, 1 << 20, &["write -P 1 0 256k"]);
        qemu_ok("qemu-img", &["snapshot", "-c", "s", text(&path)]);
        let image = open_rw(&path);
        write(&image, 70_000, &[2; 100]);
        image.close().unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[..256 << 10].fill(1);
        let raw = scratch.path("raw");
        qemu_ok("qemu-img", &["convert", "-l", "s", "-O", "raw", text(&path), text(&raw)]);
        assert_same(&std::fs::read(&raw).unwrap(), &expected);
        expected[70_000..70_100].fill(2);
        check(&path, &expected);
    }
}

#[test]
fn what_lies_behind_a_shorter_backing_file_is_zero() {
    // Others failed there, or returned whatever was in the buffer, and copied it
    // into the image.
    for backing in ["raw", "qcow2"] {
        let scratch = Scratch::new();
        let base = scratch.path("base");
        match backing {
            "raw" => std::fs::write(&base, vec![5; 70_000]).unwrap(),
            _ => {
                qemu_create(&base, "", 70_144);
                qemu_io(&base, &["write -P 5 0 70000".into()]);
            }
        }
        let options = format!("backing_file=base,backing_fmt={backing}");
        let path = made(&scratch, &options, 256 << 10, &[]);
        let image = open_rw(&path);
        let mut expected = vec![0; 256 << 10];
        expected[..70_000].fill(5);
        assert_content(&image, &expected);
        for at in [69_000, 71_000, 140_000] {
            write(&image, at, &[6; 10]);
            expected[at as usize..][..10].fill(6);
        }
        assert_content(&image, &expected);
        image.close().unwrap();
        check(&path, &expected);
    }
}

#[test]
fn a_discard_never_shows_the_backing_file() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![5; 256 << 10]).unwrap();
    for extended in ["", ",extended_l2=on"] {
        let options = format!("backing_file=base,backing_fmt=raw{extended}");
        let path = made(&scratch, &options, 256 << 10, &["write -P 6 0 128k"]);
        let image = open_rw(&path);
        image.discard(0, 192 << 10).unwrap();
        let mut expected = vec![0; 256 << 10];
        expected[192 << 10..].fill(5);
        assert_content(&image, &expected);
        image.close().unwrap();
        check(&path, &expected);
    }
}

#[test]
fn zero_clusters_are_zero_whatever_is_below_or_in_their_host_cluster() {
    // One driver stripped the zero flag and returned old data, another returned the
    // backing file's.
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![5; 512 << 10]).unwrap();
    for extended in ["", ",extended_l2=on"] {
        let options = format!("backing_file=base,backing_fmt=raw{extended}");
        let commands = ["write -P 6 0 64k", "write -z 0 64k", "write -z -u 64k 64k"];
        let path = made(&scratch, &options, 512 << 10, &commands);
        let before = Dissected::load(&path);
        let mut expected = vec![0; 512 << 10];
        expected[128 << 10..].fill(5);
        assert_content(&open(&path), &expected);
        // The host cluster that is there is used, and not leaked.
        let image = open_rw(&path);
        write(&image, 1000, &[7; 100]);
        expected[1000..1100].fill(7);
        image.close().unwrap();
        check(&path, &expected);
        assert_eq!(Dissected::load(&path).host(0), before.host(0));
    }
}

#[test]
fn a_version_2_image_gets_no_zero_flag() {
    let scratch = Scratch::new();
    let path = made(&scratch, "compat=0.10", 256 << 10, &["write -P 6 0 128k"]);
    let image = open_rw(&path);
    for may_unmap in [false, true] {
        image.write_zeroes(0, 64 << 10, ZeroFlags { may_unmap, ..Default::default() }).unwrap();
        image.write_zeroes(70_000, 5, ZeroFlags { may_unmap, ..Default::default() }).unwrap();
    }
    image.close().unwrap();
    let after = Dissected::load(&path);
    assert!((0..4).all(|cluster| after.entry(cluster).0 & 1 == 0));
    let mut expected = vec![0; 256 << 10];
    expected[64 << 10..128 << 10].fill(6);
    expected[70_000..70_005].fill(0);
    check(&path, &expected);
}

#[test]
fn compressed_clusters_at_odd_offsets_and_of_any_length() {
    // Bit 0 of such an entry is part of an offset, bits 54 and above are a length.
    let scratch = Scratch::new();
    let (raw, path) = (scratch.path("raw"), scratch.path("image"));
    let mut content = vec![0; 2 << 20];
    let mut rng = Rng::new(1);
    for (number, cluster) in content.chunks_mut(64 << 10).enumerate() {
        rng.fill(&mut cluster[..number * 2000]);
    }
    std::fs::write(&raw, &content).unwrap();
    qemu_ok("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", text(&raw), text(&path)]);
    let made = Dissected::load(&path);
    let entries: Vec<u64> = (1..32).map(|cluster| made.entry(cluster).0).collect();
    assert!(entries.iter().any(|entry| entry & COMPRESSED != 0 && entry & 1 == 1));
    assert!(entries.iter().any(|entry| made.compressed(*entry).1 > 40_000));
    assert_content(&open(&path), &content);
    let image = open_rw(&path);
    for cluster in [1, 13, 31] {
        write(&image, (cluster << 16) + 300, &[9; 50]);
        content[(cluster as usize) << 16..][300..350].fill(9);
    }
    image.close().unwrap();
    check(&path, &content);
}

#[test]
fn refcounts_of_every_width_are_read_as_they_are() {
    for bits in ["1", "2", "4", "8", "16", "32", "64"] {
        let scratch = Scratch::new();
        let options = format!("refcount_bits={bits},cluster_size=4k");
        let path = made(&scratch, &options, 1 << 20, &["write -P 1 0 300k"]);
        let image = open_rw(&path);
        write(&image, 500_000, &[2; 4096]);
        image.discard(8192, 4096).unwrap();
        image.close().unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[..300 << 10].fill(1);
        expected[8192..12288].fill(0);
        expected[500_000..504_096].fill(2);
        check(&path, &expected);
    }
}

#[test]
fn disks_smaller_than_a_cluster_and_larger_than_four_tebibytes() {
    let scratch = Scratch::new();
    for (name, size) in [("small", 512), ("large", 9 << 40)] {
        let path = scratch.path(name);
        let mut options = CreateOptions::default();
        options.size = Some(size);
        let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new()).unwrap();
        write(&image, size - 512, &[3; 512]);
        image.close().unwrap();
        qemu_img_check(&path);
        refcounts::assert_exact(&path);
        assert_eq!(read(&open(&path), size - 512, 512), [3; 512]);
    }
}

#[test]
fn an_l1_table_may_be_longer_than_the_disk_needs() {
    let scratch = Scratch::new();
    let path = made(&scratch, "cluster_size=512", 256 << 10, &["write -P 1 0 256k"]);
    Dissected::patch(&path, |image| {
        // As after shrinking the disk: the entries behind it are still there.
        image.put64(field::SIZE, 40 << 10);
    });
    let image = open(&path);
    assert_content(&image, &vec![1; 40 << 10]);
    assert!(image.read_at(&mut [0; 512], 40 << 10).is_err());
}

#[test]
fn the_backing_format_of_a_version_2_image_counts() {
    // Where it was not read, a raw file with a qcow2 header in it was followed.
    let scratch = Scratch::new();
    qemu_create(&scratch.path("base"), "", 1 << 20);
    let options = "compat=0.10,backing_file=base,backing_fmt=raw";
    let path = made(&scratch, options, 1 << 20, &[]);
    let image = open(&path);
    assert_eq!(read(&image, 0, 4), b"QFI\xfb");
}

#[test]
fn an_image_that_is_refused_is_not_changed() {
    // Another driver rewrote the header before it looked at the features.
    let scratch = Scratch::new();
    let path = made(&scratch, "", 1 << 20, &[]);
    for (incompatible, crypt) in [(1 << 40, 0), (1 << 2, 0), (1 << 2 | 1, 0), (0, 1)] {
        let before = Dissected::patch(&path, |image| {
            image.put64(field::AUTOCLEAR, 1 << 60);
            image.put64(field::INCOMPATIBLE, incompatible);
            image.put32(field::CRYPT, crypt);
            image.bytes.clone()
        });
        let options = OpenOptions::new().writable(true);
        let error = Image::open(Source::path(&path), &options).err().unwrap();
        match incompatible {
            // Its data file has no name; one more bit is no reason to change anything.
            4 | 5 => assert!(matches!(error.kind(), ErrorKind::DataFile(_)), "{error:?}"),
            0 => assert_eq!(error.kind(), ErrorKind::Encrypted),
            _ => assert_eq!(error.kind(), ErrorKind::UnsupportedFeature),
        }
        assert!(std::fs::read(&path).unwrap() == before);
    }
}

#[test]
fn what_is_freed_too_often_is_an_error() {
    let scratch = Scratch::new();
    let path = made(&scratch, "", 1 << 20, &["write -P 1 0 128k"]);
    Dissected::patch(&path, |image| {
        let host = image.host(0) / image.cluster_size();
        image.set_refcount(host, 0);
    });
    let image = open_rw(&path);
    image.discard(0, 64 << 10).unwrap();
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(image.close().is_err());
    assert!(Dissected::load(&path).is_marked_corrupt());
}

#[test]
fn a_missing_backing_file_is_an_error() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), [0; 512]).unwrap();
    let path = made(&scratch, "backing_file=base,backing_fmt=raw", 1 << 20, &[]);
    std::fs::remove_file(scratch.path("base")).unwrap();
    let options = OpenOptions::new().policy(Policy::Paths);
    let error = Image::open(Source::path(&path), &options).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Backing(libc::ENOENT));
}

#[test]
fn an_error_in_the_middle_of_a_read_is_not_a_short_read() {
    let scratch = Scratch::new();
    let path = made(&scratch, "", 1 << 20, &["write -P 1 0 1M", "discard 128k 64k"]);
    let bytes = std::fs::read(&path).unwrap();
    let last = Dissected::load(&path).host(15);
    let broken = Arc::new(AtomicBool::new(false));
    let fails = broken.clone();
    let disk = MemoryDisk::with_hook(&bytes, move |request| match request {
        Request::Read(data, at) if fails.load(SeqCst) => {
            if (at..at + data.len() as u64).contains(&last) { Err(libc::ENODEV) } else { Ok(()) }
        }
        Request::Write(..) if fails.load(SeqCst) => Err(libc::ENOLINK),
        _ => Ok(()),
    });
    let image = Image::open(disk.source(), &OpenOptions::new().writable(true)).unwrap();
    let mut data = vec![0; 1 << 20];
    image.read_at(&mut data, 0).unwrap();
    broken.store(true, SeqCst);
    let error = image.read_at(&mut data, 0).unwrap_err();
    assert_eq!(error.errno(), libc::ENODEV);
    image.read_at(&mut data[..900 << 10], 0).unwrap();
    let error = image.write_at(&data, 0, WriteFlags::default()).unwrap_err();
    assert_eq!(error.errno(), libc::ENOLINK);
}

#[test]
fn a_write_to_what_is_allocated_reads_nothing_and_copies_nothing() {
    // Another driver read a whole cluster of the backing file for each such write.
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![5; 1 << 20]).unwrap();
    for extended in ["", ",extended_l2=on"] {
        let options = format!("backing_file=base,backing_fmt=raw{extended}");
        let path = made(&scratch, &options, 1 << 20, &["write -P 1 0 128k"]);
        let disk = MemoryDisk::new(&std::fs::read(&path).unwrap());
        let below = MemoryDisk::new(&vec![5; 1 << 20]);
        let policy = Policy::Resolve(Arc::new(below.clone()));
        let options = OpenOptions::new().writable(true).policy(policy);
        let image = Image::open(disk.source(), &options).unwrap();
        write(&image, 0, &[2; 10]);
        let before = (disk.reads(), below.reads(), image.stats().cow_bytes);
        for at in [1, 5000, 65_536, 100_001] {
            write(&image, at, &[2; 4096]);
        }
        assert_eq!((disk.reads(), below.reads(), image.stats().cow_bytes), before);
        // Nor for whole clusters that are not.
        write(&image, 256 << 10, &vec![2; 64 << 10]);
        assert_eq!((below.reads(), image.stats().cow_bytes), (before.1, before.2));
    }
}

#[test]
fn what_surrounds_a_small_write_is_read_at_once_and_counted_without_it() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![5; 1 << 20]).unwrap();
    let path = made(&scratch, "backing_file=base,backing_fmt=raw", 1 << 20, &[]);
    let disk = MemoryDisk::new(&std::fs::read(&path).unwrap());
    let below = MemoryDisk::new(&vec![5; 1 << 20]);
    let options =
        OpenOptions::new().writable(true).policy(Policy::Resolve(Arc::new(below.clone())));
    let image = Image::open(disk.source(), &options).unwrap();
    // A short one, and one that would have much read in vain.
    for (at, len, reads) in [(20_000, 4096, 1), (65_536 + 1000, 50_000, 2)] {
        let before = (below.reads().0, image.stats().cow_bytes);
        write(&image, at, &vec![2; len]);
        let copied = 65_536 - len as u64;
        assert_eq!(
            (below.reads().0 - before.0, image.stats().cow_bytes - before.1),
            (reads, copied)
        );
        let mut bytes = vec![0; 65_536];
        image.read_at(&mut bytes, at / 65_536 * 65_536).unwrap();
        let start = (at % 65_536) as usize;
        assert!(bytes[start..start + len].iter().all(|byte| *byte == 2));
        assert_eq!(bytes.iter().filter(|byte| **byte == 5).count() as u64, copied);
    }
}

#[test]
fn small_reads_of_a_compressed_cluster_read_it_once() {
    let scratch = Scratch::new();
    let path = made(&scratch, "", 128 << 10, &["write -c -P 1 0 64k", "write -c -P 2 64k 64k"]);
    let disk = MemoryDisk::new(&std::fs::read(&path).unwrap());
    let image = Image::open(disk.source(), &OpenOptions::new()).unwrap();
    image.read_at(&mut [0; 1], 0).unwrap();
    let before = disk.reads();
    for at in (0..64 << 10).step_by(4096) {
        assert_eq!(read(&image, at, 4096), [1; 4096]);
    }
    assert_eq!(disk.reads(), before);
    assert_eq!(read(&image, 65_000, 1000)[536..], [2; 464]);
}

#[test]
fn opening_reads_headers_and_tables_and_not_the_image() {
    // Another driver looked at every host cluster, of each backing file, too.
    let scratch = Scratch::new();
    let path = made(&scratch, "cluster_size=4k", 16 << 20, &["write -P 1 0 16M"]);
    for writable in [false, true] {
        let disk = MemoryDisk::new(&std::fs::read(&path).unwrap());
        let image = Image::open(disk.source(), &OpenOptions::new().writable(writable)).unwrap();
        assert!(disk.reads().1 < 32 << 10, "{:?}", disk.reads());
        assert_eq!(disk.writes(), 0);
        image.close().unwrap();
        assert_eq!(disk.writes(), 0);
    }
}

#[test]
fn a_cluster_that_was_given_up_is_not_used_again_before_a_flush() {
    // Else its hole is punched into somebody else's data, or an old pointer leads
    // there after a crash.
    let scratch = Scratch::new();
    let path = made(&scratch, "", 1 << 20, &["write -P 1 0 64k"]);
    let old = Dissected::load(&path).host(0);
    let disk = MemoryDisk::new(&std::fs::read(&path).unwrap());
    let image = Image::open(disk.source(), &OpenOptions::new().writable(true)).unwrap();
    image.discard(0, 64 << 10).unwrap();
    write(&image, 128 << 10, &vec![2; 64 << 10]);
    image.flush().unwrap();
    let now = Dissected::of(disk.bytes());
    assert_ne!(now.host(2), old);
    assert_eq!(now.entry(0).0 & (OFFSET | COPIED), 0);
    write(&image, 192 << 10, &vec![3; 64 << 10]);
    image.close().unwrap();
    assert_eq!(read(&open_memory(&disk), 128 << 10, 128 << 10)[..64 << 10], vec![2; 64 << 10]);
    assert!(refcounts::faults(&Dissected::of(disk.bytes())).is_empty());
}

fn open_memory(disk: &MemoryDisk) -> Image {
    Image::open(disk.source(), &OpenOptions::new()).unwrap()
}

#[test]
fn nothing_at_all_can_be_read_and_written() {
    let scratch = Scratch::new();
    let path = made(&scratch, "", 1 << 20, &[]);
    let image = open_rw(&path);
    for at in [0, 1, 65_536, 1 << 20] {
        image.read_at(&mut [], at).unwrap();
        write(&image, at, &[]);
        image.write_zeroes(at, 0, ZeroFlags::default()).unwrap();
        image.discard(at, 0).unwrap();
    }
    image.close().unwrap();
    check(&path, &vec![0; 1 << 20]);
}
