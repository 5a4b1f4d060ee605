//! Storage that the user of this library brings along, behind a trait. What the
//! user answers is believed as far as success and failure go, and no further.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::engine::{Piece, Target, ZeroMode};
use crate::sys::file::Gathered;
use crate::sys::memory::{GuestMut, GuestRef};

/// The result of a callback: the error is a positive errno.
pub type UserResult<T> = std::result::Result<T, i32>;

/// Which of the optional operations there are.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Abilities {
    /// [`UserIo::write`]; without it the storage is read-only.
    pub write: bool,
    /// [`UserIo::truncate`].
    pub truncate: bool,
    /// [`UserIo::discard`].
    pub discard: bool,
    /// [`UserIo::write_zeroes`].
    pub write_zeroes: bool,
}

/// Storage of the user. Called from any thread, concurrently unless
/// [`Callbacks::new`] is told otherwise; dropped once, after the last call.
/// Optional operations are called only where [`UserIo::abilities`] names them.
pub trait UserIo: Send + Sync {
    /// Which optional operations there are; does not change.
    fn abilities(&self) -> Abilities;
    /// Fills `to` from `offset` on; bytes past the end are zero.
    fn read(&self, to: GuestMut<'_>, offset: u64) -> UserResult<()>;
    /// Writes all of `from` at `offset`, extending the storage.
    fn write(&self, from: GuestRef<'_>, offset: u64) -> UserResult<()>;
    /// Length in bytes.
    fn length(&self) -> UserResult<u64>;
    /// Makes durable what completed before.
    fn flush(&self) -> UserResult<()>;
    /// Sets the length.
    fn truncate(&self, length: u64) -> UserResult<()>;
    /// A hint that the range is of no use any more; it reads as anything after.
    fn discard(&self, offset: u64, length: u64) -> UserResult<()>;
    /// Makes the range read as zero; the space may be given back if `may_unmap`.
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> UserResult<()>;
}

/// Shared ownership of a [`UserIo`].
#[derive(Clone)]
pub struct Callbacks(Arc<Inner>);

struct Inner {
    io: Box<dyn UserIo>,
    /// Held during each call, where one call at a time is asked for.
    serial: Option<Mutex<()>>,
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Callbacks")
    }
}

impl Callbacks {
    /// Wraps the user's storage; `serialized`: never two calls at a time.
    pub fn new(io: Box<dyn UserIo>, serialized: bool) -> Callbacks {
        Callbacks(Arc::new(Inner { io, serial: serialized.then(|| Mutex::new(())) }))
    }

    /// Which optional operations there are.
    pub fn abilities(&self) -> Abilities {
        self.0.io.abilities()
    }

    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        // The mutex guards nothing of ours that a panic could have left torn.
        let serial = self.0.serial.as_ref()?;
        Some(serial.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `f` with the user's storage, in turn.
    fn call<T>(&self, f: impl FnOnce(&dyn UserIo) -> UserResult<T>) -> UserResult<T> {
        let _turn = self.turn();
        // What is no errno is taken as an error all the same.
        f(&*self.0.io).map_err(|errno| if (1..4096).contains(&errno) { errno } else { libc::EIO })
    }

    pub(super) fn read(&self, to: &Target<'_>, offset: u64) -> UserResult<()> {
        self.call(|io| match to {
            Target::Guest(memory) => io.read(*memory, offset),
            Target::Block(memory) => io.read(memory.guest_mut(), offset),
        })
    }

    pub(super) fn write(&self, pieces: &[Piece<'_>], offset: u64) -> UserResult<()> {
        match pieces {
            [Piece::Guest(memory)] => self.call(|io| io.write(*memory, offset)),
            [Piece::Block(memory)] => self.call(|io| io.write(memory.guest_ref(), offset)),
            pieces => {
                let gathered = Gathered::new(pieces.iter().map(Piece::bytes));
                let from = gathered.guest().ok_or(libc::EINVAL)?;
                self.call(|io| io.write(from, offset))
            }
        }
    }

    pub(super) fn sync(&self) -> UserResult<()> {
        self.call(|io| io.flush())
    }

    pub(super) fn length(&self) -> UserResult<u64> {
        self.call(|io| io.length())
    }

    /// `ENOTSUP` where there is no such callback; so for the next two.
    pub(super) fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> UserResult<()> {
        if !self.abilities().write_zeroes {
            return Err(libc::ENOTSUP);
        }
        self.call(|io| io.write_zeroes(offset, length, mode == ZeroMode::Punch))
    }

    pub(super) fn discard(&self, offset: u64, length: u64) -> UserResult<()> {
        if !self.abilities().discard {
            return Err(libc::ENOTSUP);
        }
        self.call(|io| io.discard(offset, length))
    }

    pub(super) fn truncate(&self, length: u64) -> UserResult<()> {
        if !self.abilities().truncate {
            return Err(libc::ENOTSUP);
        }
        self.call(|io| io.truncate(length))
    }
}
