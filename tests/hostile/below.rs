//! Bad images below a good one: it suffers no more than it must.

use qcow2rs::{ErrorKind, Format, Image, Policy, WriteFlags};

use crate::images::{Broker, Kind, image, options};
use crate::support::dissect::{Dissected, field};
use crate::support::memory_disk::MemoryDisk;

/// A sound image over this one.
fn over(below: &Dissected, top: &MemoryDisk) -> qcow2rs::Result<Image> {
    let below = MemoryDisk::new(&below.bytes);
    let policy = Policy::Resolve(Broker::giving(below, Format::Qcow2));
    let options = options(true).policy(policy);
    Image::open(top.source(), &options)
}

#[test]
fn damage_below_does_not_mark_the_image_above() {
    let mut below = image(Kind::WideRefcounts);
    // Of the first two clusters, which the image above does not have.
    for cluster in [0, 1] {
        below.set_entry(cluster, (0x10200, 0));
    }
    let mut sound = image(Kind::Backing);
    for cluster in 0..16 {
        sound.set_entry(cluster, (0, 0));
    }
    let top = MemoryDisk::new(&sound.bytes);
    let image = over(&below, &top).unwrap();
    assert_eq!(image.read_at(&mut [0; 512], 0).unwrap_err().kind(), ErrorKind::Corrupt);
    // To keep the rest of a cluster, it has to be read.
    let error = image.write_at(&[1; 5], 5000, WriteFlags::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    // Whatever needs nothing from there goes on.
    image.write_at(&[1; 512], 0, WriteFlags::default()).unwrap();
    image.write_at(&[1; 5], 100 << 10, WriteFlags::default()).unwrap();
    image.flush().unwrap();
    let mut found = [0; 512];
    image.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [1; 512]);
    image.close().unwrap();
    assert!(!Dissected::of(top.bytes()).is_marked_corrupt());
}

#[test]
fn what_is_wrong_with_a_header_below_is_said_of_it() {
    let top = MemoryDisk::new(&image(Kind::Backing).bytes);
    let mut cases = vec![(image(Kind::Standard), libc::EINVAL); 3];
    cases[0].0.put32(0, 0);
    cases[1].0.put32(field::CLUSTER_BITS, 63);
    cases[2].0.put64(field::INCOMPATIBLE, 1 << 40);
    cases[2].1 = libc::ENOTSUP;
    for (below, errno) in cases {
        let error = over(&below, &top).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Backing(errno));
        assert!(error.message().contains("depth 1"), "{error}");
    }
    assert_eq!(top.writes(), 0);
}

#[test]
fn memory_is_shared_by_the_whole_chain() {
    let mut greedy = image(Kind::Standard);
    greedy.put32(field::L1_SIZE, 4 << 20);
    let top = MemoryDisk::new(&image(Kind::Backing).bytes);
    let error = over(&greedy, &top).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Limit);
}

#[test]
fn the_size_of_a_cache_slice_is_the_topmost_images_affair() {
    let below = MemoryDisk::new(&image(Kind::Standard).bytes);
    let mut top = image(Kind::Compressed);
    let fields = top.u32(field::HEADER_LENGTH) as usize;
    top.put(fields, &[0; 8]);
    top.put(1024, b"below");
    top.put64(field::BACKING_OFFSET, 1024);
    top.put32(field::BACKING_LENGTH, 5);
    let top = MemoryDisk::new(&top.bytes);
    let mut options = options(false);
    options.policy = Policy::Resolve(Broker::giving(below, Format::Qcow2));
    options.set("l2-cache-entry-size", "4k").unwrap();
    // The image below has clusters of 512 bytes.
    let image = Image::open(top.source(), &options).unwrap();
    image.read_at(&mut [0; 4096], 200 << 10).unwrap();
}
