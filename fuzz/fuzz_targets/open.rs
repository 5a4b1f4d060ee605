//! Any bytes as an image, opened in all ways and used a little. The last byte says
//! how; all before it is the file, so that every image is an input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2rs::{Image, WriteFlags, ZeroFlags};
use qcow2rs_fuzz::bounds::{REQUEST, bounded, expect, open, options};
use qcow2rs_fuzz::support::damage::assert_no_data_in_metadata;
use qcow2rs_fuzz::support::dissect::Dissected;
use qcow2rs_fuzz::support::memory_disk::MemoryDisk;

/// The guest's bytes.
const GUEST: u8 = 0xc3;

/// Places of the disk to look at: both ends, and some in between.
fn places(size: u64) -> impl Iterator<Item = u64> {
    let last = size.saturating_sub(REQUEST);
    [0, size / 3, size / 2 | 1, last].into_iter().map(move |at| at.min(last))
}

fn look(disk: &MemoryDisk, image: &Image) {
    let size = image.size();
    bounded(disk, || image.info().unwrap());
    bounded(disk, || image.info_json().unwrap());
    let mut buffers = [vec![1; REQUEST as usize], vec![2; REQUEST as usize]];
    let length = REQUEST.min(size) as usize;
    for at in places(size) {
        let done = buffers
            .each_mut()
            .map(|buffer| expect(bounded(disk, || image.read_at(&mut buffer[..length], at))));
        assert_eq!(done[0], done[1]);
        if done[0] {
            assert!(buffers[0][..length] == buffers[1][..length], "two answers at {at:#x}");
        }
        expect(bounded(disk, || image.block_status(at, size - at, false, 16, &mut |_| {})));
    }
}

/// As `expect`, where an image may also have no such bitmap, or cannot have it.
fn possible(done: qcow2rs::Result<()>) {
    use qcow2rs::ErrorKind::{Exists, InvalidArgument, NotFound, NotSupported};
    match done {
        Err(error) if [Exists, InvalidArgument, NotFound, NotSupported].contains(&error.kind()) => {
        }
        done => _ = expect(done),
    }
}

/// Bitmaps are listed, and each of them is looked at; names.
fn look_at_bitmaps(disk: &MemoryDisk, image: &Image) -> Vec<Vec<u8>> {
    let (mut infos, size) = (Vec::new(), image.size());
    possible(bounded(disk, || image.bitmaps()).map(|found| infos = found));
    for info in infos.iter().take(8) {
        let status = bounded(disk, || image.bitmap_status(&info.name, 0, size, 16, &mut |_| {}));
        possible(status);
    }
    infos.into_iter().map(|info| info.name).take(8).collect()
}

/// Everything that can be done to bitmaps.
fn change_bitmaps(disk: &MemoryDisk, image: &Image) {
    let names = look_at_bitmaps(disk, image);
    possible(bounded(disk, || image.bitmap_add(b"fuzz", 1 << 16, true)));
    for (turn, name) in names.iter().enumerate() {
        possible(bounded(disk, || image.bitmap_merge(b"fuzz", name)));
        possible(bounded(disk, || image.bitmap_set_enabled(name, turn % 2 == 0)));
        possible(match turn % 3 {
            0 => bounded(disk, || image.bitmap_merge(name, b"fuzz")),
            1 => bounded(disk, || image.bitmap_clear(name)),
            _ => bounded(disk, || image.bitmap_remove(name)),
        });
    }
}

fn change(disk: &MemoryDisk, image: &Image) {
    let size = image.size();
    let data = vec![GUEST; REQUEST.min(size) as usize];
    for (turn, at) in places(size).enumerate() {
        let some = &data[..data.len() / (turn + 1)];
        let length = some.len() as u64;
        let zero = |may_unmap| ZeroFlags { may_unmap, ..ZeroFlags::default() };
        expect(bounded(disk, || image.write_at(some, at, WriteFlags::default())));
        expect(bounded(disk, || image.write_zeroes(at, length / 2, zero(turn % 2 == 0))));
        expect(bounded(disk, || image.discard(at, length / 3)));
        expect(bounded(disk, || image.flush()));
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, file)) = data.split_last() else { return };
    let disk = || {
        let disk = MemoryDisk::new(file);
        if how & 2 != 0 { disk.with_length(1 << 45) } else { disk }
    };
    let (small, reader) = (how & 1 != 0, disk());
    if let Some(image) = open(&reader, &options(false, small)) {
        look(&reader, &image);
        look_at_bitmaps(&reader, &image);
        assert_eq!(reader.writes(), 0, "a reader has written");
    }
    let writer = disk();
    if let Some(image) = open(&writer, &options(true, small)) {
        look(&writer, &image);
        change(&writer, &image);
        change_bitmaps(&writer, &image);
        change(&writer, &image);
        expect(bounded(&writer, || image.close()));
        let before = Dissected::of(file.to_vec());
        assert_no_data_in_metadata(&before, &Dissected::of(writer.bytes()), GUEST);
    }
});
