//! How much memory and how many calls of the storage any work may take, and which
//! errors a damaged image may lead to.

use std::sync::Arc;

use qcow2rs::{ErrorKind, Image, OpenOptions, Policy};

use crate::memory::peak;
use crate::support::memory_disk::MemoryDisk;

/// The caller's limit for tables, "max-metadata-size".
const METADATA: u64 = 4 << 20;
/// More bytes are never asked for in one request.
pub const REQUEST: u64 = 64 << 10;
/// What is read is there twice for a moment; so are requests; a cluster of at most 2
/// MiB may have to be decompressed, or copied with its neighbours.
const MEMORY: u64 = 2 * METADATA + 4 * REQUEST + 8 * (2 << 20);
/// Calls of the storage, for one call of the library.
const CALLS: u64 = 20_000;

/// What lies below images that name something.
pub const BELOW: u8 = 0xba;

/// Options with bounds; `small`: with the smallest caches.
pub fn options(writable: bool, small: bool) -> OpenOptions {
    let mut options = OpenOptions::new().writable(writable);
    options.policy = Policy::Resolve(Arc::new(MemoryDisk::new(&[BELOW; 70_000])));
    options.max_metadata_size = METADATA;
    if small {
        for name in ["l2-cache-size", "refcount-cache-size"] {
            options.set(name, "1k").expect("a valid option");
        }
        options.set("l2-cache-entry-size", "512").expect("a valid option");
    }
    options
}

/// Runs one call of the library on `disk`, and sees what it took.
pub fn bounded<R>(disk: &MemoryDisk, call: impl FnOnce() -> R) -> R {
    let before = disk.reads().0 + disk.writes();
    let (result, bytes) = peak(call);
    assert!(bytes < MEMORY, "{bytes} bytes of memory");
    let calls = disk.reads().0 + disk.writes() - before;
    assert!(calls < CALLS, "{calls} calls of the storage");
    result
}

/// Opens within bounds. What is refused is not written to.
pub fn open(disk: &MemoryDisk, options: &OpenOptions) -> Option<Image> {
    let before = disk.writes();
    let opened = bounded(disk, || Image::open(disk.source(), options));
    if opened.is_err() || !options.writable {
        assert_eq!(disk.writes(), before, "written to by {:?}", opened.err());
    }
    opened.ok()
}

/// Errors that requests on a damaged image of a healthy storage may have; a bad
/// argument is a mistake of the target's.
pub fn is_expected(kind: ErrorKind) -> bool {
    // The disk in memory is of limited size.
    matches!(kind, ErrorKind::Callback(28))
        || matches!(
            kind,
            ErrorKind::Corrupt | ErrorKind::Shutdown | ErrorKind::DataLost | ErrorKind::NoSpace
        )
}

/// Fails on an error that has no place here.
pub fn expect(done: qcow2rs::Result<()>) -> bool {
    match done {
        Ok(()) => true,
        Err(error) => {
            assert!(is_expected(error.kind()), "{error:?}");
            false
        }
    }
}
