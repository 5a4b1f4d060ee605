//! Each large allocation of memory fails once: what an image, or a caller's options,
//! can make large never ends the process. (Small ones do, as everywhere in Rust.)

use qcow2rs::{Error, ErrorKind, Image, OpenOptions, WriteFlags, ZeroFlags};

use crate::memory::refuse;
use crate::support::builder::{Cluster, Kind, build};
use crate::support::describe;
use crate::support::memory_disk::MemoryDisk;

/// From here on an allocation is large.
const LARGE: usize = 64 << 10;
const CLUSTER: u64 = 512 << 10;

/// An image with large clusters and tables: L1 tables of 2 MiB, also of a snapshot.
fn image(extended_l2: bool) -> Vec<u8> {
    let kind = Kind { cluster: CLUSTER, extended_l2, size: 4 << 20, snapshot: true, ..Kind::PLAIN };
    build(kind, |index| match index % 3 {
        0 => Cluster::Data { bytes: vec![1; CLUSTER as usize], alloc: 0x55, zero: 0 },
        1 => Cluster::Compressed(vec![2; CLUSTER as usize]),
        _ => Cluster::Nothing,
    })
}

fn options(how: &str) -> OpenOptions {
    let mut options = OpenOptions::new().writable(how != "check");
    options.check_only = how == "check";
    options.set("l2-cache-size", "16M").unwrap();
    options.set("l2-cache-entry-size", "512k").unwrap();
    options.set("refcount-cache-size", "16M").unwrap();
    options
}

/// Does everything that takes memory; stops at the first error.
fn use_it(disk: &MemoryDisk, how: &str, buf: &mut [u8]) -> qcow2rs::Result<()> {
    let image = Image::open(disk.source(), &options(how))?;
    if how == "check" {
        let (result, done) = image.check(&mut ());
        // A table that there was no memory for was not checked, as if it could not be
        // read; the check goes on.
        return match result.check_errors {
            0 => done,
            _ => Err(Error::new(ErrorKind::OutOfMemory, "not all was checked")),
        };
    }
    let write = |data: &[u8], at| image.write_at(data, at, WriteFlags::default());
    image.read_at(buf, CLUSTER - 100)?;
    // Into a shared cluster, a compressed one, and none.
    write(&buf[..5000], 1000)?;
    write(&buf[..5000], CLUSTER + 1000)?;
    write(&buf[..5000], 2 * CLUSTER + 1000)?;
    image.write_zeroes(3 * CLUSTER + 7, CLUSTER, ZeroFlags::default())?;
    image.discard(0, CLUSTER)?;
    image.flush()?;
    image.info_json()?;
    image.reopen(false, true)?;
    image.invalidate()?;
    image.close()
}

#[test]
fn each_large_allocation_fails_once() {
    for (extended, how) in [(false, "use"), (true, "use"), (false, "check"), (true, "check")] {
        let bytes = image(extended);
        let mut buf = vec![0; 700 << 10];
        let mut index = 0;
        loop {
            let disk = MemoryDisk::new(&bytes);
            let (done, met) = refuse(LARGE, index, || use_it(&disk, how, &mut buf));
            describe(format!("extended: {extended}, {how}, allocation {index}"), || match done {
                Err(error) => assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}"),
                Ok(()) => assert!(!met, "nobody was told"),
            });
            // Nothing else is lost: there is enough again.
            use_it(&disk, how, &mut buf).unwrap();
            use_it(&disk, "check", &mut buf).unwrap();
            if !met {
                break;
            }
            index += 1;
        }
        assert!(index > 3, "only {index} large allocations");
    }
}
