//! Small sound images to spoil, made by QEMU, and what is done to each of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use qcow2rs::{
    ErrorKind, Format, Image, OpenOptions, Policy, Reference, Resolver, Source, WriteFlags,
    ZeroFlags,
};

use crate::memory::peak;
use crate::support::dissect::Dissected;
use crate::support::memory_disk::MemoryDisk;
use crate::support::{Scratch, qemu_create, qemu_io, qemu_ok, text};

/// More memory than this is never needed to find out that an image is bad.
pub const MEMORY: u64 = 64 << 20;

/// What an image to begin with is like.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// Clusters of 512 bytes, so that there are many tables.
    Standard,
    Version2,
    /// Extended L2 entries, clusters of 16 KiB.
    Extended,
    /// Two internal snapshots.
    Snapshots,
    /// Every other cluster is compressed.
    Compressed,
    /// Over a raw image of half the size.
    Backing,
    /// Refcounts of 64 bits.
    WideRefcounts,
    /// A persistent bitmap, which is disabled.
    Bitmap,
}

pub const ALL: [Kind; 8] = [
    Kind::Standard,
    Kind::Version2,
    Kind::Extended,
    Kind::Snapshots,
    Kind::Compressed,
    Kind::Backing,
    Kind::WideRefcounts,
    Kind::Bitmap,
];

/// A sound image of this kind. It has data in the first half of the disk.
pub fn image(kind: Kind) -> Dissected {
    static MADE: OnceLock<Mutex<HashMap<Kind, Vec<u8>>>> = OnceLock::new();
    let mut made = MADE.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
    Dissected::of(made.entry(kind).or_insert_with(|| make(kind)).clone())
}

fn make(kind: Kind) -> Vec<u8> {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let (options, size) = match kind {
        Kind::Standard | Kind::Snapshots => ("cluster_size=512", 256 << 10),
        Kind::Version2 => ("cluster_size=512,compat=0.10", 256 << 10),
        Kind::Extended => ("cluster_size=16k,extended_l2=on", 512 << 10),
        Kind::Compressed => ("cluster_size=4k", 256 << 10),
        Kind::Backing => ("cluster_size=512,backing_file=base,backing_fmt=raw", 256 << 10),
        Kind::WideRefcounts => ("cluster_size=4k,refcount_bits=64", 256 << 10),
        Kind::Bitmap => ("cluster_size=4k", 256 << 10),
    };
    std::fs::write(scratch.path("base"), base()).unwrap();
    qemu_create(&path, options, size);
    let half = size / 2;
    let mut commands = vec![format!("write -P 17 0 {half}"), format!("write -z {} 4k", half / 2)];
    if kind == Kind::Compressed {
        commands = (0..16)
            .flat_map(|i| {
                let at = i * 8192;
                [format!("write -c -P {} {at} 4k", i + 1), format!("write -P 99 {} 4k", at + 4096)]
            })
            .collect();
    }
    if kind == Kind::Extended {
        commands.push("write -P 18 300k 2k".into());
        commands.push("write -z 304k 1k".into());
    }
    qemu_io(&path, &commands);
    match kind {
        Kind::Snapshots => {
            qemu_ok("qemu-img", &["snapshot", "-c", "one", text(&path)]);
            qemu_io(&path, &["write -P 33 1k 40k".into()]);
            qemu_ok("qemu-img", &["snapshot", "-c", "two", text(&path)]);
            qemu_io(&path, &["write -P 34 20k 2k".into()]);
        }
        Kind::Bitmap => {
            qemu_ok("qemu-img", &["bitmap", "--add", "--disable", text(&path), "b"]);
        }
        _ => {}
    }
    std::fs::read(&path).unwrap()
}

/// The bytes of the image below [`Kind::Backing`].
pub fn base() -> Vec<u8> {
    vec![0xba; 128 << 10]
}

/// Gives the same disk for every name, and remembers what it was asked.
pub struct Broker {
    disk: MemoryDisk,
    format: Format,
    pub asked: Mutex<Vec<Reference>>,
}

impl Broker {
    pub fn new() -> Arc<Broker> {
        Broker::giving(MemoryDisk::new(&base()), Format::Raw)
    }

    pub fn giving(disk: MemoryDisk, format: Format) -> Arc<Broker> {
        Arc::new(Broker { disk, format, asked: Mutex::default() })
    }
}

impl Resolver for Broker {
    fn resolve(
        &self,
        reference: &Reference,
        _: Option<Format>,
    ) -> qcow2rs::Result<(Arc<Source>, Option<Format>)> {
        self.asked.lock().unwrap().push(reference.clone());
        Ok((self.disk.source(), Some(self.format)))
    }
}

/// Files that the image names come from the [`Broker`]. Half of [`MEMORY`] may be
/// taken: what is read is there twice for a moment.
pub fn options(writable: bool) -> OpenOptions {
    let mut options = OpenOptions::new().writable(writable);
    options.policy = Policy::Resolve(Broker::new());
    options.max_metadata_size = MEMORY / 2;
    options
}

/// Opens the image in memory that is bounded, with work that is.
pub fn open(disk: &MemoryDisk, options: &OpenOptions) -> qcow2rs::Result<Image> {
    let (opened, bytes) = peak(|| Image::open(disk.source(), options));
    assert!(bytes < MEMORY, "opening took {bytes} bytes of memory: {:?}", opened.err());
    let (reads, read) = disk.reads();
    assert!(reads < 100 && read < MEMORY, "opening took {reads} reads of {read} bytes");
    opened
}

/// What opening a spoiled image says: without, and with writing in mind.
pub fn verdicts(image: &Dissected) -> [Option<ErrorKind>; 2] {
    [false, true].map(|writable| {
        let disk = MemoryDisk::new(&image.bytes);
        let opened = open(&disk, &options(writable));
        if opened.is_err() {
            assert_eq!(disk.writes(), 0, "what is refused is not written to");
        }
        opened.err().map(|error| error.kind())
    })
}

/// The byte that all guest data consists of that tests write.
pub const GUEST: u8 = 0xc3;

/// Every kind of change, at one place.
pub const CHANGES: [&str; 5] = ["write", "write a part", "zero", "zero and unmap", "discard"];

pub fn change(image: &Image, what: &str, at: u64, len: u64) -> qcow2rs::Result<()> {
    let part = [GUEST; 100];
    match what {
        "write" => image.write_at(&vec![GUEST; len as usize], at, WriteFlags::default()),
        "write a part" => {
            let bytes = (len - 1).min(100);
            image.write_at(&part[..bytes as usize], at + 1, WriteFlags::default())
        }
        "zero" => image.write_zeroes(at, len, ZeroFlags::default()),
        "zero and unmap" => {
            image.write_zeroes(at, len, ZeroFlags { may_unmap: true, ..Default::default() })
        }
        "discard" => image.discard(at, len),
        _ => unreachable!("{what}"),
    }
}
