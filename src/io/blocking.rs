//! The engine that blocks: every operation is complete at the first poll.

use std::fmt;
use std::time::Instant;

use super::engine::{Engine, Piece, Target, ZeroMode};
use super::storage::{Backend, Storage};
use crate::error::Result;
use crate::sys::file::SysResult;

/// Carries operations out at once, on the thread that polls.
#[derive(Clone, Copy, Default, Debug)]
pub struct Blocking;

impl Engine for Blocking {
    fn now(&self) -> Option<Instant> {
        Some(Instant::now())
    }

    #[inline]
    async fn read<'a>(&'a self, storage: &'a Storage, to: Target<'a>, offset: u64) -> Result<()> {
        read(storage, &to, offset)
    }

    #[inline]
    fn read_now(&self, storage: &Storage, to: &Target<'_>, offset: u64) -> Option<Result<()>> {
        Some(read(storage, to, offset))
    }

    #[inline]
    async fn write<'a>(
        &'a self,
        storage: &'a Storage,
        pieces: &'a [Piece<'a>],
        offset: u64,
    ) -> Result<()> {
        write(storage, pieces, offset)
    }

    #[inline]
    fn write_now(
        &self,
        storage: &Storage,
        pieces: &[Piece<'_>],
        offset: u64,
    ) -> Option<Result<()>> {
        Some(write(storage, pieces, offset))
    }

    async fn sync<'a>(&'a self, storage: &'a Storage) -> Result<()> {
        let result = match storage.backend() {
            Backend::File(file) => file.sync(),
            Backend::Callbacks(callbacks) => callbacks.sync(),
            #[cfg(feature = "sim")]
            Backend::Sim(_) => Err(libc::ENOTSUP),
        };
        done(storage, result, || "syncing")
    }

    async fn zero<'a>(
        &'a self,
        storage: &'a Storage,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        let result = match storage.backend() {
            Backend::File(file) => file.zero(offset, length, mode),
            Backend::Callbacks(callbacks) => callbacks.zero(offset, length, mode),
            #[cfg(feature = "sim")]
            Backend::Sim(_) => Err(libc::ENOTSUP),
        };
        result.map_err(|errno| storage.zero_failed(errno, offset, length, mode))
    }

    async fn truncate<'a>(&'a self, storage: &'a Storage, length: u64) -> Result<()> {
        let result = match storage.backend() {
            Backend::File(file) => file.truncate(length),
            Backend::Callbacks(callbacks) => callbacks.truncate(length),
            #[cfg(feature = "sim")]
            Backend::Sim(_) => Err(libc::ENOTSUP),
        };
        let what = format_args!("setting the length to {length}");
        result.map_err(|errno| storage.refused(errno, what))
    }
}

#[inline]
fn read(storage: &Storage, to: &Target<'_>, offset: u64) -> Result<()> {
    let result = match storage.backend() {
        Backend::File(file) => file.read(to, offset),
        Backend::Callbacks(callbacks) => callbacks.read(to, offset),
        #[cfg(feature = "sim")]
        Backend::Sim(_) => Err(libc::ENOTSUP),
    };
    done(storage, result, || reading(to.len(), offset))
}

/// What a read was doing when it failed.
#[cold]
pub(super) fn reading(len: usize, offset: u64) -> String {
    format!("reading {len} bytes at offset {offset}")
}

/// What a write was doing when it failed.
#[cold]
pub(super) fn writing(pieces: &[Piece<'_>], offset: u64) -> String {
    let len: usize = pieces.iter().map(Piece::len).sum();
    format!("writing {len} bytes at offset {offset}")
}

#[inline]
fn write(storage: &Storage, pieces: &[Piece<'_>], offset: u64) -> Result<()> {
    let result = match storage.backend() {
        Backend::File(file) => file.write(pieces, offset),
        Backend::Callbacks(callbacks) => callbacks.write(pieces, offset),
        #[cfg(feature = "sim")]
        Backend::Sim(_) => Err(libc::ENOTSUP),
    };
    done(storage, result, || writing(pieces, offset))
}

/// The error, where there is one, with what was being done.
#[inline]
pub(super) fn done<T: fmt::Display>(
    storage: &Storage,
    result: SysResult<()>,
    what: impl FnOnce() -> T,
) -> Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(errno) => Err(storage.failed(errno, what())),
    }
}
