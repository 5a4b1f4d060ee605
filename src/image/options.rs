//! What a caller may say when opening an image, and the gate for the files
//! that an image names. Data only: nothing here opens or reads anything.

use std::fmt;
use std::sync::Arc;

use super::cleaning::DEFAULT_INTERVAL;
use crate::alloc::overlap_check::OverlapCheck;
use crate::crypto::secret::Secret;
use crate::error::Result;
use crate::io::storage::Source;

/// The format of an image. It is never guessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Format {
    /// qcow2, version 2 or 3.
    #[default]
    Qcow2,
    /// The bytes of the storage are the disk.
    Raw,
}

impl Format {
    /// The format by the name that images store; `None` if it is not ours.
    pub fn from_name(name: &[u8]) -> Option<Format> {
        match name {
            b"qcow2" => Some(Format::Qcow2),
            b"raw" => Some(Format::Raw),
            _ => None,
        }
    }

    /// The name that images store.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }
}

/// What an image names another file for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReferenceKind {
    /// The image below.
    Backing,
    /// The external data file.
    Data,
}

/// A file that an image names: bytes from an image, not to be trusted.
#[derive(Clone, Debug)]
pub struct Reference {
    /// What for.
    pub kind: ReferenceKind,
    /// 0: named by the image being opened, 1: by the one below it, ...
    pub depth: u32,
    /// Exactly as stored.
    pub name: Vec<u8>,
    /// The backing format exactly as stored.
    pub format: Option<Vec<u8>>,
    /// The name of the referring image, for a person.
    pub referrer: String,
    /// Whether the file will be written.
    pub writable: bool,
}

/// Decides what a name in an image stands for.
pub trait Resolver: Send + Sync {
    /// The storage to use and its format, or an error to refuse.
    /// `format` is the stored one where it is known.
    fn resolve(
        &self,
        reference: &Reference,
        format: Option<Format>,
    ) -> Result<(Arc<Source>, Option<Format>)>;
}

/// What happens when an image names another file.
#[derive(Clone, Default)]
pub enum Policy {
    /// The open fails and no file is touched.
    #[default]
    Deny,
    /// Plain paths, relative to the directory of the referring image: for
    /// images that the caller trusts.
    Paths,
    /// The host decides.
    Resolve(Arc<dyn Resolver>),
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::Deny => "Deny",
            Policy::Paths => "Paths",
            Policy::Resolve(_) => "Resolve",
        })
    }
}

/// How an image is opened. The default: qcow2, read-only, locked, references
/// denied, caches that cover the disk within reason.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenOptions {
    /// The image's format.
    pub format: Format,
    /// Open for writing.
    pub writable: bool,
    /// Take the locks that QEMU takes.
    pub lock: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Every write is durable when it completes.
    pub writethrough: bool,
    /// Never sync: for tests and throw-away images.
    pub no_flush: bool,
    /// This layer only.
    pub no_backing: bool,
    /// Tolerate damage; only info and check are allowed.
    pub check_only: bool,
    /// Give the space of freed clusters back to the file system.
    pub discard: bool,
    /// The same for what a snapshot had that is deleted or gone back to; `None`: as
    /// `discard` says.
    pub discard_snapshots: Option<bool>,
    /// Discard keeps the host cluster ("discard-no-unref").
    pub discard_no_unref: bool,
    /// Open as raw, for writing, what starts with the qcow2 magic.
    pub allow_qcow2_magic: bool,
    /// The format of a backing file whose image stores none.
    pub backing_format: Option<Format>,
    /// O_DIRECT for the images below; `None`: as this one.
    pub backing_direct: Option<bool>,
    /// Bytes for both caches; `None`: not said.
    pub cache_size: Option<u64>,
    /// Bytes of L2 slices; `None`: twice what covers the disk, at most 32 MiB and an
    /// eighth of `max_metadata_size`.
    pub l2_cache_size: Option<u64>,
    /// Bytes of an L2 slice: a power of two, 512 to the cluster size; `None`:
    /// 4096, or the cluster size where that is smaller.
    pub l2_cache_entry_size: Option<u64>,
    /// Bytes of refcount blocks; `None`: 256 KiB.
    pub refcount_cache_size: Option<u64>,
    /// Seconds after which the memory of what the caches hold, and nobody has used since,
    /// is given back to the system; 0: never. See [`Image::trim`](crate::Image::trim).
    pub cache_clean_interval: u32,
    /// A chain with more images below this one is refused.
    pub max_chain_depth: u32,
    /// Bytes of metadata in memory, for the whole chain.
    pub max_metadata_size: u64,
    /// A larger virtual disk is refused.
    pub max_virtual_size: u64,
    /// Leave refcounts to the close, and to a repair after a crash; `None`: as the
    /// image says. Not with version 2.
    pub lazy_refcounts: Option<bool>,
    /// Whether a dirty image may be repaired at a read-write open.
    pub repair_dirty: bool,
    /// Which metadata writes are checked against; by default all that is in memory.
    pub overlap_check: OverlapCheck,
    /// The external data file of the image, whatever name it stores; the policy is not
    /// asked. For images that have one only.
    pub data_file: Option<Arc<Source>>,
    /// The passphrase of an encrypted image, and of those below it that are encrypted,
    /// unless `backing_secrets` has theirs.
    pub secret: Option<Secret>,
    /// Passphrases of images below: how many images are above, as in
    /// [`Reference::depth`] plus 1, and the passphrase.
    pub backing_secrets: Vec<(u32, Secret)>,
    /// Iterations of key derivation that may be spent to find out whether a passphrase
    /// opens an image, for each image: they are what makes guessing slow, and an
    /// untrusted image may ask for any number of them.
    pub max_key_iterations: u64,
    /// What to do with files that the image names.
    pub policy: Policy,
}

/// Iterations of key derivation: a minute or so, and thirty times what QEMU's default is
/// for a key slot.
const KEY_ITERATIONS: u64 = 1 << 28;

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            format: Format::Qcow2,
            writable: false,
            lock: true,
            direct: false,
            writethrough: false,
            no_flush: false,
            no_backing: false,
            check_only: false,
            discard: true,
            discard_snapshots: None,
            discard_no_unref: false,
            allow_qcow2_magic: false,
            backing_format: None,
            backing_direct: None,
            cache_size: None,
            l2_cache_size: None,
            l2_cache_entry_size: None,
            refcount_cache_size: None,
            cache_clean_interval: DEFAULT_INTERVAL,
            max_chain_depth: 200,
            max_metadata_size: 1 << 30,
            max_virtual_size: u64::MAX,
            lazy_refcounts: None,
            repair_dirty: true,
            overlap_check: OverlapCheck::default(),
            data_file: None,
            secret: None,
            backing_secrets: Vec::new(),
            max_key_iterations: KEY_ITERATIONS,
            policy: Policy::Deny,
        }
    }
}

impl OpenOptions {
    /// The defaults.
    pub fn new() -> OpenOptions {
        OpenOptions::default()
    }

    /// Open for writing.
    #[must_use]
    pub fn writable(mut self, writable: bool) -> OpenOptions {
        self.writable = writable;
        self
    }

    /// The format of the image.
    #[must_use]
    pub fn format(mut self, format: Format) -> OpenOptions {
        self.format = format;
        self
    }

    /// The passphrase of an encrypted image; see [`OpenOptions::secret`].
    #[must_use]
    pub fn secret(mut self, secret: Secret) -> OpenOptions {
        self.secret = Some(secret);
        self
    }

    /// What to do with files that the image names.
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> OpenOptions {
        self.policy = policy;
        self
    }
}
