//! A disk whose operations fail as the test says, and what a virtual disk may read
//! as after some of its requests failed.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use qcow2rs::{Image, OpenOptions, Policy};

use crate::support::builder::{Cluster, Kind, build};
use crate::support::memory_disk::{MemoryDisk, Request};
use crate::support::operations::Op;
use crate::support::smallest_caches;

/// What the image below consists of.
pub const BELOW: u8 = 0xba;
pub const SECTOR: u64 = 512;

/// Small images of all kinds that matter for what is allocated and freed.
pub fn kinds() -> Vec<Kind> {
    let tiny = Kind::PLAIN;
    let extended = Kind { cluster: 16 << 10, extended_l2: true, size: 512 << 10, ..tiny };
    vec![
        Kind { refcount_bits: 64, ..tiny },
        Kind { version: 2, cluster: 4096, size: 128 << 10, backing: true, ..tiny },
        Kind { cluster: 4096, size: 256 << 10, snapshot: true, ..tiny },
        Kind { backing: true, ..extended },
        Kind { snapshot: true, refcount_bits: 8, ..extended },
        Kind { crowded: true, refcount_bits: 64, size: 16 << 10, ..tiny },
    ]
}

/// Clusters of all sorts; each sector is of one byte.
fn cluster(kind: &Kind, index: u64) -> Cluster {
    let bytes = vec![1 + index as u8 % 100; kind.cluster as usize];
    match index % 4 {
        0 => Cluster::Data { bytes, alloc: 0x0f0f_0f0f & kind_mask(kind), zero: 0 },
        1 => Cluster::Compressed(bytes),
        2 => Cluster::Data { bytes, alloc: 1, zero: 0 },
        _ => Cluster::Nothing,
    }
}

fn kind_mask(kind: &Kind) -> u32 {
    if kind.extended_l2 { u32::MAX } else { 1 }
}

pub fn image(kind: &Kind) -> Vec<u8> {
    build(*kind, |index| cluster(kind, index))
}

/// Which operation fails, and whether all those after it do, too.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    pub index: u64,
    pub errno: i32,
    pub forever: bool,
}

/// What a disk is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    Read,
    Write,
    Flush,
    Grow,
    Shrink,
    Zero,
}

#[derive(Default)]
struct Trouble {
    failure: Mutex<Option<Failure>>,
    count: AtomicU64,
    met: Mutex<Vec<Asked>>,
    off: AtomicBool,
}

impl Trouble {
    fn meet(&self, request: &Request<'_>) -> Result<(), i32> {
        let asked = match request {
            Request::Reading(_) => Asked::Read,
            Request::Read(..) => return Ok(()),
            Request::Write(..) => Asked::Write,
            Request::Flush => Asked::Flush,
            Request::Truncate(to, from) if to >= from => Asked::Grow,
            Request::Truncate(..) => Asked::Shrink,
            Request::Zero(..) => Asked::Zero,
        };
        if self.off.load(SeqCst) {
            return Ok(());
        }
        let index = self.count.fetch_add(1, SeqCst);
        let failure = *self.failure.lock().unwrap();
        match failure {
            Some(failure) if index == failure.index || failure.forever && index > failure.index => {
                self.met.lock().unwrap().push(asked);
                Err(failure.errno)
            }
            _ => Ok(()),
        }
    }
}

/// A disk, what fails there, and an image below it, where nothing does.
#[derive(Clone)]
pub struct Bench {
    pub disk: MemoryDisk,
    below: MemoryDisk,
    trouble: Arc<Trouble>,
}

impl Bench {
    pub fn new(bytes: &[u8], failure: Option<Failure>) -> Bench {
        let trouble = Arc::new(Trouble { failure: Mutex::new(failure), ..Trouble::default() });
        let hook = trouble.clone();
        let disk = MemoryDisk::with_hook(bytes, move |request| hook.meet(&request));
        Bench { disk, below: MemoryDisk::new(&[BELOW; 96 << 10]), trouble }
    }

    /// Opens the image, with the smallest caches.
    pub fn open(&self) -> qcow2rs::Result<Image> {
        let mut options = OpenOptions::new().writable(true);
        options.policy = Policy::Resolve(Arc::new(self.below.clone()));
        smallest_caches(&mut options);
        Image::open(self.disk.source(), &options)
    }

    /// How many operations there were.
    pub fn count(&self) -> u64 {
        self.trouble.count.load(SeqCst)
    }

    /// What failed since it was asked last.
    pub fn met(&self) -> Vec<Asked> {
        std::mem::take(&mut self.trouble.met.lock().unwrap())
    }

    /// Nothing fails, or counts, during `work`.
    pub fn calmly(&self, work: impl FnOnce()) {
        self.trouble.off.store(true, SeqCst);
        work();
        self.trouble.off.store(false, SeqCst);
    }

    /// Nothing fails any more.
    pub fn mend(&self) {
        self.trouble.off.store(true, SeqCst);
    }
}

/// What each sector may read as: all of it is one byte.
pub struct Model {
    now: Vec<BTreeSet<u8>>,
    /// If the process ends here.
    after: Vec<BTreeSet<u8>>,
}

impl Model {
    /// What the image reads as.
    pub fn of(image: &Image) -> Model {
        let mut disk = vec![0; image.size() as usize];
        image.read_at(&mut disk, 0).unwrap();
        let now: Vec<_> = disk.chunks(SECTOR as usize).map(|s| BTreeSet::from([s[0]])).collect();
        Model { after: now.clone(), now }
    }

    /// A request came back.
    pub fn note(&mut self, op: Op, done: bool) {
        let (at, len, value) = match op {
            Op::Write { at, len, byte } | Op::Compress { at, len, byte } => (at, len, byte),
            Op::Zero { at, len, .. } | Op::Discard { at, len } => (at, len, 0),
            Op::Flush if done => return self.after = self.now.clone(),
            Op::Flush | Op::Read { .. } => return,
        };
        for sector in (at / SECTOR) as usize..((at + len) / SECTOR) as usize {
            if done && !matches!(op, Op::Discard { .. }) {
                self.now[sector].clear();
            }
            // What a version 2 image gives up shows what is below.
            let shows = if matches!(op, Op::Discard { .. }) { &[0, BELOW][..] } else { &[value] };
            self.now[sector].extend(shows);
            self.after[sector].extend(shows);
        }
    }

    /// The process ended, and what was not flushed may be lost.
    pub fn start_again(&mut self) {
        self.now = self.after.clone();
    }

    /// Fails where the image reads as anything else; what it reads as is known then.
    pub fn compare(&mut self, image: &Image) {
        let mut disk = vec![0xee; image.size() as usize];
        image.read_at(&mut disk, 0).unwrap();
        for (sector, bytes) in disk.chunks(SECTOR as usize).enumerate() {
            let known = &mut self.now[sector];
            let first = bytes[0];
            assert!(bytes.iter().all(|byte| *byte == first), "sector {sector} is torn");
            assert!(known.contains(&first), "sector {sector} is {first:#x}, not of {known:x?}");
            *known = BTreeSet::from([first]);
        }
    }
}
