//! Making a new image.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::handle::Image;
use crate::image::options::{Format, OpenOptions};
use crate::io::storage::Source;

/// What the new image is to be. The default: version 3, 64 KiB clusters,
/// 16-bit refcounts, no backing file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Bytes of the virtual disk, rounded up to 512; `None`: as the backing
    /// file, which is opened for that if the policy allows it.
    pub size: Option<u64>,
    /// Header version, 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Whether L2 entries are extended.
    pub extended_l2: bool,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Whether the compatible bit for lazy refcounts is set.
    pub lazy_refcounts: bool,
    /// The image below, as it is written into the header, and its format.
    pub backing: Option<(Vec<u8>, Format)>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            size: None,
            version: 3,
            cluster_size: 65536,
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            backing: None,
        }
    }
}

/// Makes an image in `source`, whatever was there before. Durable on return
/// unless `open` says `no_flush`. Blocks.
pub fn create(source: Arc<Source>, options: &CreateOptions, open: &OpenOptions) -> Result<()> {
    let _ = (source, options, open);
    Err(Error::new(ErrorKind::NotSupported, "under construction"))
}

/// As [`create`], and returns the new image open for writing.
pub fn create_open(
    source: Arc<Source>,
    options: &CreateOptions,
    open: &OpenOptions,
) -> Result<Image> {
    create(source.clone(), options, open)?;
    Image::open(source, &open.clone().writable(true))
}

/// Bytes that an image with these options needs: without data, and holding
/// `size` bytes of it (`qemu-img measure`).
pub fn measure(options: &CreateOptions) -> Result<(u64, u64)> {
    let _ = options;
    Err(Error::new(ErrorKind::NotSupported, "under construction"))
}

/// What the first bytes look like, for a person to confirm.
pub fn probe(source: &Arc<Source>) -> Result<Format> {
    let _ = source;
    Err(Error::new(ErrorKind::NotSupported, "under construction"))
}
