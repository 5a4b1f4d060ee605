//! qcow2 disk images: read and written bit by bit as QEMU does, extended L2
//! entries (subclusters) included, without a hidden thread or runtime.
//!
//! ```no_run
//! use qcow2rs::{CreateOptions, Format, Image, OpenOptions, Policy, Source, WriteFlags};
//!
//! # fn main() -> qcow2rs::Result<()> {
//! let mut options = CreateOptions::default();
//! options.cluster_size = 128 << 10;
//! options.extended_l2 = true;
//! options.backing = Some((b"base.raw".to_vec(), Format::Raw));
//! let open = OpenOptions::new().policy(Policy::Paths);
//! let image = qcow2rs::create_path_open("overlay.qcow2".as_ref(), true, &options, &open)?;
//! image.write_at(&[7; 4096], 8192, WriteFlags::default())?;
//! image.flush()?;
//! image.close()
//! # }
//! ```
//!
//! The C API is in `include/qcow2rs.h`; how it all hangs together is told in
//! `docs/architecture.md`. From the ground up, each module using only those
//! before it:
//!
//! | module | subject |
//! |---|---|
//! | `error`, `geometry`, `log` | errors; address types; log messages |
//! | `sync`, `owner`, `here`, `shard` | atomics and threads; what is kept thread by thread |
//! | `fallible` | large vectors: an error where there is no memory for them |
//! | `mutants` | bugs seeded for the tests; empty in any other build |
//! | `format` | bytes to types and back, pure |
//! | `crypto` | encryption: LUKS headers, key slots, ciphers over sectors; pure |
//! | `sys` | raw memory and system calls |
//! | `io` | storages, and the engines that carry out operations on them |
//! | `metadata` | the cache of table slices, reading tables |
//! | `alloc` | host clusters: who uses them, when they may be reused |
//! | `check` | counting what refers to clusters; comparing refcounts with it, mending them |
//! | `image` | an open image and its chain: read, write, zero, discard, flush |
//! | `snapshots` | internal snapshots: list, create, apply, delete, rename, open |
//! | `bitmaps` | persistent dirty bitmaps: list, add, remove, clear, enable, merge, status |
//! | `queue` | asynchronous requests on an image, driven by their caller |
//! | `admin` | create, amend, measure, probe, check, resize |
//! | `capi` | the C API |
#![deny(unsafe_code)]

pub mod error;
mod fallible;
pub mod geometry;
mod here;
mod log;
#[macro_use]
mod mutants;
mod owner;
mod shard;
mod sync;

pub mod format;

mod crypto;

mod sys;

pub mod io;

mod metadata;

mod alloc;

mod check;

pub mod image;

pub mod snapshots;

pub mod bitmaps;

mod queue;

pub mod admin;

/// What benches/hot.rs measures and fuzz/ tries; no part of the API.
#[cfg(feature = "sim")]
#[doc(hidden)]
pub mod hot {
    pub use crate::crypto::luks::Header as LuksHeader;
    pub use crate::metadata::cache::SliceCache;
}

#[allow(unsafe_code)]
#[doc(hidden)]
pub mod capi;

pub use admin::amend::AmendOptions;
pub use admin::create::{
    CreateOptions, create, create_open, create_path, create_path_open, measure, probe,
};
pub use admin::encrypt::{EncryptionFormat, EncryptionOptions};
pub use admin::keyslots::{KeySlots, KeyState};
pub use admin::preallocation::Preallocation;
pub use admin::resize::ResizeOptions;
pub use bitmaps::{BitmapInfo, DirtyRange};
pub use check::{CheckResult, Finding, Observer, Severity};
pub use crypto::secret::Secret;
pub use error::{Error, ErrorKind, Result};
pub use format::compression::Compression;
pub use image::handle::{Image, WriteFlags};
pub use image::info::{Info, Qcow2Info, Stats, StoredReference};
pub use image::options::{Format, OpenOptions, Policy, Reference, ReferenceKind, Resolver};
pub use image::status::Extent;
pub use image::zero::ZeroFlags;
pub use io::storage::Source;
#[cfg(feature = "sim")]
pub use queue::SimQueue;
pub use queue::{Buffer, Completion, Engine, Queue, QueueOptions, Refused};
