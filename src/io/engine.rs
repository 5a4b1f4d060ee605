//! How operations on a storage are carried out: the engine.
//!
//! The core is written once, as `async fn`, and is told with each request which
//! engine to use: one that blocks (every operation is complete at the first
//! poll), one that submits to a queue, or a simulated one. An engine knows
//! storages and memory; it knows nothing of images, and nothing of alignment,
//! which [`Storage`] puts right before it asks.

use std::future::Future;

use super::storage::Storage;
use std::time::Instant;

use crate::error::Result;
use crate::sys::memory::{BlockSlice, GuestMut, GuestRef};

/// Where a read puts its bytes.
#[derive(Clone, Debug)]
pub enum Target<'a> {
    /// Memory of the caller.
    Guest(GuestMut<'a>),
    /// Memory of ours.
    Block(BlockSlice),
}

/// A part of what a write writes.
#[derive(Clone, Debug)]
pub enum Piece<'a> {
    /// Memory of the caller.
    Guest(GuestRef<'a>),
    /// Memory of ours.
    Block(BlockSlice),
    /// This many zero bytes.
    Zeroes(usize),
}

/// How a range of a storage is made to read as zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZeroMode {
    /// Give the space back (a hole).
    Punch,
    /// Keep the space.
    Keep,
}

/// Carries out operations. Each future is complete when the operation is. One that
/// is dropped earlier must see to it that the operation is over then: done, done in
/// part or not at all, but touching neither memory nor the storage afterwards (what
/// it was to write may be given to somebody else). A sync that failed unheard makes
/// the next one fail.
///
/// All-or-nothing: short transfers and EINTR are dealt with inside. Offsets,
/// lengths and addresses are aligned as the storage demands.
pub trait Engine: Send + Sync {
    /// Reads `to.len()` bytes; what lies past the end of the storage is zero.
    fn read<'a>(
        &'a self,
        storage: &'a Storage,
        to: Target<'a>,
        offset: u64,
    ) -> impl Future<Output = Result<()>> + Send + 'a;

    /// As `read`, where it is done when this returns; `None` elsewhere. Spares the
    /// common case its futures.
    #[inline]
    fn read_now(&self, _storage: &Storage, _to: &Target<'_>, _offset: u64) -> Option<Result<()>> {
        None
    }

    /// Writes the pieces one after the other from `offset` on, extending the
    /// storage where needed.
    fn write<'a>(
        &'a self,
        storage: &'a Storage,
        pieces: &'a [Piece<'a>],
        offset: u64,
    ) -> impl Future<Output = Result<()>> + Send + 'a;

    /// As `write`, as `read_now` is to `read`.
    #[inline]
    fn write_now(
        &self,
        _storage: &Storage,
        _pieces: &[Piece<'_>],
        _offset: u64,
    ) -> Option<Result<()>> {
        None
    }

    /// Makes durable what completed before (fdatasync).
    fn sync<'a>(&'a self, storage: &'a Storage) -> impl Future<Output = Result<()>> + Send + 'a;

    /// Makes a range read as zero; never moves the end of the storage.
    /// `NotSupported` where it has to be done by writing.
    fn zero<'a>(
        &'a self,
        storage: &'a Storage,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> impl Future<Output = Result<()>> + Send + 'a;

    /// The time, for what is done now and then; `None` where a run is to be repeatable.
    fn now(&self) -> Option<Instant> {
        None
    }

    /// Sets the length of the storage.
    fn truncate<'a>(
        &'a self,
        storage: &'a Storage,
        length: u64,
    ) -> impl Future<Output = Result<()>> + Send + 'a;
}

impl<'a> Target<'a> {
    /// The part of `len` bytes from `at` on; panics if it is not there.
    #[must_use]
    pub fn sub(&self, at: usize, len: usize) -> Target<'a> {
        match self {
            Target::Guest(memory) => Target::Guest(memory.sub(at, len)),
            Target::Block(memory) => Target::Block(memory.sub(at, len)),
        }
    }

    /// Fills all of it with zeroes.
    pub fn fill_zero(&self) {
        match self {
            Target::Guest(memory) => memory.fill_zero(),
            Target::Block(memory) => memory.fill_zero(),
        }
    }

    /// Fills all of it from `data`, which is as long.
    pub fn copy_from(&self, data: &[u8]) {
        match self {
            Target::Guest(memory) => memory.copy_from(0, data),
            Target::Block(memory) => memory.copy_from(0, data),
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        match self {
            Target::Guest(memory) => memory.len(),
            Target::Block(memory) => memory.len(),
        }
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> Piece<'a> {
    /// The part of `len` bytes from `at` on; panics if it is not there.
    #[must_use]
    pub fn sub(&self, at: usize, len: usize) -> Piece<'a> {
        match self {
            Piece::Guest(memory) => Piece::Guest(memory.sub(at, len)),
            Piece::Block(memory) => Piece::Block(memory.sub(at, len)),
            Piece::Zeroes(all) => {
                assert!(at <= *all && len <= *all - at, "part of zeroes out of range");
                Piece::Zeroes(len)
            }
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        match self {
            Piece::Guest(memory) => memory.len(),
            Piece::Block(memory) => memory.len(),
            Piece::Zeroes(len) => *len,
        }
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
