//! The handle that programs hold: blocking calls, and the operations that need
//! the image for themselves (close, invalidate, reopen).

use std::sync::Arc;

use super::info::{Info, Stats, StoredReference};
use super::options::{OpenOptions, ReferenceKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::storage::Source;
use crate::sys::memory::{GuestMut, GuestRef};

/// An open image. All methods may be called from any thread at any time, unless
/// they say otherwise.
pub struct Image {}

/// Flags of a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Durable on completion.
    pub fua: bool,
    /// The guest-visible data does not change.
    pub unchanged: bool,
}

/// Flags of a zero write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Durable on completion.
    pub fua: bool,
    /// May deallocate.
    pub may_unmap: bool,
    /// `NotSupported` rather than writing zero bytes.
    pub no_fallback: bool,
}

/// A range of the virtual disk and where its content comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Guest offset.
    pub offset: u64,
    /// Bytes, > 0.
    pub length: u64,
    /// Where the bytes are in the storage of the layer `depth`.
    pub host_offset: Option<u64>,
    /// Reads come from stored data.
    pub data: bool,
    /// Reads as zero.
    pub zero: bool,
    /// Defined in layer `depth`.
    pub allocated: bool,
    /// Stored compressed.
    pub compressed: bool,
    /// Ends at the virtual size.
    pub eof: bool,
    /// 0: this image, 1: its backing image, ...
    pub depth: u32,
}

fn unfinished<T>() -> Result<T> {
    Err(Error::new(ErrorKind::NotSupported, "under construction"))
}

impl Image {
    /// Opens an image. Blocks.
    pub fn open(source: Arc<Source>, options: &OpenOptions) -> Result<Image> {
        let _ = (source, options);
        unfinished()
    }

    /// Flushes and releases. `Busy` if another thread is inside a call: the
    /// image stays as it was. After any other result the image is closed, and
    /// all calls but drop are errors.
    pub fn close(&self) -> Result<()> {
        unfinished()
    }

    /// Releases without writing anything. `Busy` as for close.
    pub fn abandon(&self) -> Result<()> {
        unfinished()
    }

    /// Drops all caches and reads the chain's metadata again. `InvalidArgument`
    /// on an image open for writing; `Busy`.
    pub fn invalidate(&self) -> Result<()> {
        unfinished()
    }

    /// Changes between read-only and read-write, with or without locks.
    pub fn reopen(&self, writable: bool, lock: bool) -> Result<()> {
        let _ = (writable, lock);
        unfinished()
    }

    /// Size of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        0
    }

    /// What this image is.
    pub fn info(&self) -> Result<Info> {
        unfinished()
    }

    /// The same as JSON, in the members of `qemu-img info --output=json`.
    pub fn info_json(&self) -> Result<String> {
        unfinished()
    }

    /// Counters since open.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }

    /// A reference as the header stores it; `None` if there is none.
    pub fn reference(&self, kind: ReferenceKind) -> Option<StoredReference> {
        let _ = kind;
        None
    }

    /// Reads into a buffer. `InvalidArgument` past the end of the disk.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_guest(GuestMut::from_slice(buf), offset)
    }

    /// Writes a buffer.
    pub fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.write_guest(GuestRef::from_slice(buf), offset, flags)
    }

    /// As `read_at`, into the caller's memory by handle.
    pub(crate) fn read_guest(&self, to: GuestMut<'_>, offset: u64) -> Result<()> {
        let _ = (to, offset);
        unfinished()
    }

    /// As `write_at`, from the caller's memory by handle.
    pub(crate) fn write_guest(
        &self,
        from: GuestRef<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> Result<()> {
        let _ = (from, offset, flags);
        unfinished()
    }

    /// Makes a range read as zero.
    pub fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Result<()> {
        let _ = (offset, length, flags);
        unfinished()
    }

    /// Gives a range up: a hint.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let _ = (offset, length);
        unfinished()
    }

    /// Makes durable everything that completed before this call.
    pub fn flush(&self) -> Result<()> {
        unfinished()
    }

    /// Appends up to `max` extents that cover the range from its start on.
    /// `this_layer`: do not descend into the backing chain.
    pub fn block_status(
        &self,
        offset: u64,
        length: u64,
        this_layer: bool,
        max: usize,
        out: &mut dyn FnMut(Extent),
    ) -> Result<()> {
        let _ = (offset, length, this_layer, max, out);
        unfinished()
    }
}
