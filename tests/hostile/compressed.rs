//! Compressed clusters: descriptors that lead astray, data that is none.

use qcow2rs::format::compressed::deflate;
use qcow2rs::{Compression, ErrorKind, WriteFlags};

use crate::images::{Kind, MEMORY, image, open, options};
use crate::memory::peak;
use crate::support::dissect::{COMPRESSED, Dissected, field};
use crate::support::memory_disk::MemoryDisk;

/// Guest cluster 0 is compressed, at these bytes of the file.
fn aimed(image: &mut Dissected, offset: u64, sectors: u64) {
    let width = 62 - (image.cluster_bits() - 8);
    assert!(offset < 1 << width);
    image.set_entry(0, (COMPRESSED | ((sectors - 1) << width) | offset, 0));
}

/// Puts deflate data at the end of the file, as guest cluster 0.
fn stored(image: &mut Dissected, data: &[u8]) {
    let at = image.bytes.len().next_multiple_of(image.cluster_size() as usize);
    image.put(at, data);
    aimed(image, at as u64, (data.len() as u64).div_ceil(512));
}

fn read(spoiled: &Dissected) -> Result<Vec<u8>, ErrorKind> {
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(false)).unwrap();
    let mut data = vec![0xee; spoiled.cluster_size() as usize];
    let (done, bytes) = peak(|| image.read_at(&mut data, 0));
    assert!(bytes < MEMORY / 4, "{bytes}");
    done.map(|()| data).map_err(|error| error.kind())
}

/// What data that cannot be inflated is to its reader: lost, in a sound image.
const LOST: ErrorKind = ErrorKind::DataLost;

/// Reading fails, and so does writing a part. Nothing else changes, but for the
/// corrupt bit, where it is the entry that is wrong.
fn refused(spoiled: &Dissected, kind: ErrorKind) {
    assert_eq!(read(spoiled), Err(kind));
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(true)).unwrap();
    let error = image.write_at(&[1; 100], 5, WriteFlags::default()).unwrap_err();
    assert_eq!(error.kind(), kind);
    let _ = image.close();
    let after = Dissected::of(disk.bytes());
    assert_eq!(after.is_marked_corrupt(), kind == ErrorKind::Corrupt);
    assert_eq!(after.entry(0), spoiled.entry(0));
}

#[test]
fn descriptors_that_lead_to_the_header_or_past_the_end() {
    for kind in [Kind::Compressed, Kind::Extended] {
        let (cluster, end) = (image(kind).cluster_size(), image(kind).bytes.len() as u64);
        let header = [0, 5, cluster - 1].map(|offset| (offset, ErrorKind::Corrupt));
        let past_the_end = [end, 1 << 40, (1 << 54) - 1].map(|offset| (offset, LOST));
        for (offset, error) in header.into_iter().chain(past_the_end) {
            let mut spoiled = image(kind);
            let sectors = 1 << (spoiled.cluster_bits() - 8);
            aimed(&mut spoiled, offset, sectors);
            refused(&spoiled, error);
        }
    }
}

#[test]
fn data_that_is_no_deflate_stream() {
    for data in [&[0xff; 512][..], &[0; 512], &[7; 4096], b"\x78\x9c zlib has a header"] {
        let mut spoiled = image(Kind::Compressed);
        stored(&mut spoiled, data);
        refused(&spoiled, LOST);
    }
}

#[test]
fn data_for_less_than_a_cluster_is_no_cluster() {
    let mut packed = [0; 512];
    let length = deflate(&[9; 4095], &mut packed).unwrap();
    let mut spoiled = image(Kind::Compressed);
    stored(&mut spoiled, &packed[..length]);
    refused(&spoiled, LOST);
}

#[test]
fn a_bomb_fills_one_cluster() {
    // 32 MiB of zeroes in 32 KiB of deflate: as much as a descriptor may name.
    let mut packed = vec![0; 64 << 10];
    let length = deflate(&vec![0; 32 << 20], &mut packed).unwrap();
    for (kind, room) in [(Kind::Compressed, 4096), (Kind::Extended, 32 << 10)] {
        let mut spoiled = image(kind);
        stored(&mut spoiled, &packed[..length.min(room)]);
        assert!(read(&spoiled).unwrap().iter().all(|byte| *byte == 0));
    }
}

/// Makes the image one of zstd, with this data as guest cluster 0.
fn of_zstd(data: &[u8]) -> Dissected {
    let mut spoiled = image(Kind::Compressed);
    spoiled.put(field::COMPRESSION, &[1]);
    spoiled.put(field::INCOMPATIBLE, &(1u64 << 3).to_be_bytes());
    stored(&mut spoiled, data);
    spoiled
}

fn zstd(data: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; data.len() + 1000];
    let length = Compression::Zstd.compress(data, &mut packed).unwrap().unwrap();
    packed.truncate(length);
    packed
}

/// A frame whose only block repeats a byte: a header with this window (its log less
/// ten, times eight), and no size of the content.
fn repeated(window: u8, count: u32) -> Vec<u8> {
    let block = (count << 3 | 1 << 1 | 1).to_le_bytes();
    [&[0x28, 0xb5, 0x2f, 0xfd, 0, window][..], &block[..3], &[7]].concat()
}

#[test]
fn zstd_frames_have_to_fill_the_cluster_exactly() {
    let half = zstd(&[5; 2048]);
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], b"skip"].concat();
    for (frames, byte) in [
        (zstd(&[5; 4096]), 5),
        ([&half[..], &half].concat(), 5),
        ([&skippable[..], &half, &skippable, &half, b"garbage"].concat(), 5),
        (repeated(0, 4096), 7),
        // It is never kept, whatever it is.
        (repeated(17 << 3, 4096), 7),
    ] {
        assert_eq!(read(&of_zstd(&frames)), Ok(vec![byte; 4096]));
    }
    let cut = zstd(&[5; 4096]);
    for frames in [
        half.clone(),
        zstd(&[5; 4097]),
        // 128 KiB of a block, 32 MiB of many.
        repeated(0, 128 << 10),
        zstd(&vec![0; 32 << 20]),
        [&half[..], &zstd(&[5; 4096])].concat(),
        skippable.clone(),
        [&half[..], &skippable[..9]].concat(),
        b"not a frame".to_vec(),
        vec![0; 512],
        // A dictionary that nobody has.
        [&[0x28, 0xb5, 0x2f, 0xfd, 1, 0, 9][..], &cut[6..]].concat(),
    ] {
        refused(&of_zstd(&frames), LOST);
    }
    // Cut off by the end of the file: zeroes are no frame.
    let mut spoiled = of_zstd(&zstd(&(0..4096).map(|i| (i * i / 7) as u8).collect::<Vec<_>>()));
    spoiled.bytes.truncate(spoiled.bytes.len() - 3);
    refused(&spoiled, LOST);
}

#[test]
fn errors_of_compressed_data_name_both_places() {
    let spoiled = of_zstd(b"not a frame");
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(false)).unwrap();
    let error = image.read_at(&mut [0; 10], 700).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    let message = error.message();
    assert!(message.contains("guest offset 0x2bc, compressed cluster at 0x"), "{message}");
}

#[test]
fn compressed_data_with_extended_entries_ignores_the_bitmap() {
    let mut packed = [0; 512];
    deflate(&[9; 16 << 10], &mut packed).unwrap();
    let mut spoiled = image(Kind::Extended);
    stored(&mut spoiled, &packed);
    let entry = spoiled.entry(0).0;
    for bitmap in [u64::MAX, 1, 1 << 63] {
        spoiled.set_entry(0, (entry, bitmap));
        assert!(read(&spoiled).unwrap().iter().all(|byte| *byte == 9));
    }
}

#[test]
fn compressed_clusters_that_share_metadata_do_not_free_it() {
    let mut spoiled = image(Kind::Compressed);
    let table = spoiled.l1(0) & crate::support::dissect::OFFSET;
    aimed(&mut spoiled, table + 100, 3);
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(true)).unwrap();
    image.discard(0, 4096).unwrap();
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Corrupt);
    let _ = image.close();
    assert_eq!(Dissected::of(disk.bytes()).refcount(table / 4096), 1);
}
