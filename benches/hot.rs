//! Each step on the way of a request whose metadata is cached, by itself: `cargo bench
//! --bench hot`. A whole request is measured on a storage that does nothing, so that
//! what is left is ours: finding the way, and leaving no trace.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use criterion::Criterion;
use qcow2rs::format::header::Header;
use qcow2rs::format::l2::{COPIED, L2Entry, L2Format};
use qcow2rs::geometry::{Geometry, HostOffset};
use qcow2rs::hot::SliceCache;
use qcow2rs::io::callbacks::{Abilities, Callbacks, UserIo, UserResult};
use qcow2rs::io::sim::{GuestMut, GuestRef};
use qcow2rs::{CreateOptions, Image, OpenOptions, Source, WriteFlags};

const CLUSTER: u64 = 128 << 10;
const CLUSTERS: u64 = 1024;
const BLOCK: u64 = 4096;

/// An image in memory, until `still` is set: from then on nothing is read or written.
struct Storage {
    bytes: Vec<u8>,
    still: Arc<AtomicBool>,
}

impl UserIo for Storage {
    fn abilities(&self) -> Abilities {
        Abilities { write: true, ..Abilities::default() }
    }

    fn read(&self, to: GuestMut<'_>, offset: u64) -> UserResult<()> {
        if self.still.load(Relaxed) {
            return Ok(());
        }
        let start = self.bytes.len().min(offset as usize);
        let there = &self.bytes[start..self.bytes.len().min(start + to.len())];
        to.fill_zero();
        to.copy_from(0, there);
        Ok(())
    }

    fn write(&self, _: GuestRef<'_>, _: u64) -> UserResult<()> {
        assert!(self.still.load(Relaxed), "what is written is forgotten");
        Ok(())
    }

    fn length(&self) -> UserResult<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn flush(&self) -> UserResult<()> {
        Ok(())
    }

    fn truncate(&self, _: u64) -> UserResult<()> {
        Err(libc::ENOTSUP)
    }

    fn discard(&self, _: u64, _: u64) -> UserResult<()> {
        Err(libc::ENOTSUP)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> UserResult<()> {
        Err(libc::ENOTSUP)
    }
}

/// An image, one block of each cluster allocated, with all of its metadata cached.
fn image() -> (Image, Vec<u8>) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("image");
    let mut create = CreateOptions::default();
    create.size = Some(CLUSTERS * CLUSTER);
    (create.cluster_size, create.extended_l2) = (CLUSTER, true);
    let open = OpenOptions::new().writable(true);
    let made = qcow2rs::create_path_open(&path, true, &create, &open).expect("creates");
    for offset in offsets() {
        made.write_at(&[1; BLOCK as usize], offset, WriteFlags::default()).expect("writes");
    }
    made.close().expect("closes");
    // What is not metadata stays behind.
    let bytes = std::fs::read(&path).expect("reads");
    let still = Arc::new(AtomicBool::new(false));
    let storage = Storage { bytes: bytes.clone(), still: still.clone() };
    let source = Source::callbacks(Callbacks::new(Box::new(storage), false));
    let image = Image::open(source, &open).expect("opens");
    let mut block = [0; BLOCK as usize];
    for offset in offsets() {
        image.read_at(&mut block, offset).expect("reads");
        assert_eq!(block, [1; BLOCK as usize]);
    }
    still.store(true, Relaxed);
    (image, bytes)
}

fn offsets() -> impl Iterator<Item = u64> + Clone {
    (0..CLUSTERS).map(|cluster| cluster * 37 % CLUSTERS * CLUSTER + cluster % 32 * BLOCK)
}

/// A read and a write in place of what is known.
fn requests(criterion: &mut Criterion) {
    let (image, _) = image();
    let mut block = [0; BLOCK as usize];
    let mut at = offsets().cycle();
    criterion.bench_function("read, all but the transfer", |bencher| {
        bencher.iter(|| image.read_at(&mut block, at.next().unwrap_or(0)));
    });
    criterion.bench_function("write in place, all but the transfer", |bencher| {
        bencher.iter(|| image.write_at(&block, at.next().unwrap_or(0), WriteFlags::default()));
    });
    image.abandon().expect("nothing is under way");
}

fn entries(criterion: &mut Criterion) {
    let geometry = Geometry { cluster_bits: CLUSTER.ilog2(), extended_l2: true };
    let format = L2Format { geometry, version: 3, data_file: false };
    let descriptor = COPIED | (5 * CLUSTER);
    let entry = L2Entry { descriptor, bitmap: 0xff00_0000_00ff };
    criterion.bench_function("decode an L2 entry", |bencher| {
        bencher.iter(|| black_box(format).decode(black_box(entry)));
    });
    let cluster = format.decode(entry).expect("is sound");
    criterion.bench_function("classify subclusters", |bencher| {
        bencher.iter(|| black_box(cluster).run(black_box(3), black_box(32)));
    });
}

fn cache(criterion: &mut Criterion) {
    let cache = SliceCache::new(4096, 1 << 20).expect("memory");
    let keys = (1..=128).filter_map(|number| HostOffset::new(number * CLUSTER));
    for key in keys.clone() {
        let ticket = cache.begin_load(key);
        cache.finish_load(key, ticket, &[7; 4096]).expect("memory");
    }
    // Sets are full here and there: what was put out again is not looked for.
    let there: Vec<_> = keys.filter(|key| cache.read(*key, |_| ()).is_some()).collect();
    assert!(there.len() > 100);
    let mut keys = there.iter().cycle();
    criterion.bench_function("look a slice up", |bencher| {
        bencher.iter(|| {
            let key = keys.next().copied().unwrap_or(there[0]);
            cache.read(key, |words| words[5].load(Relaxed))
        });
    });
}

fn header(criterion: &mut Criterion) {
    let (_, bytes) = image();
    let wanted = Header::bytes_wanted(&bytes).expect("is sound");
    criterion.bench_function("parse a header", |bencher| {
        bencher.iter(|| Header::parse(black_box(&bytes[..wanted])));
    });
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    requests(&mut criterion);
    entries(&mut criterion);
    cache(&mut criterion);
    header(&mut criterion);
    criterion.final_summary();
}
