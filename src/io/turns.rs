//! When a transfer may go to a storage just as it is: whole and aligned, with nobody
//! in its way. For engines that are told of the end rather than wait for it.

use super::blocking::{reading, writing};
use super::engine::Piece;
use super::file::Alignment;
use super::range_lock::Turn;
use super::ring::is_interrupted;
use super::storage::Storage;
use crate::error::Result;
use crate::sys::file::MAX_TRANSFER;
use crate::sys::memory::{GuestMut, GuestRef};

/// A transfer that goes to a storage as it is.
#[derive(Clone, Copy)]
pub enum Transfer {
    /// Reads into memory that stays until it is over.
    Read(GuestMut<'static>),
    /// Writes memory that stays until it is over.
    Write(GuestRef<'static>),
}

impl Transfer {
    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        match self {
            Transfer::Read(to) => to.len(),
            Transfer::Write(from) => from.len(),
        }
    }

    /// How it ended: `result` is the number of bytes, or the negative errno. `None`:
    /// it is to be carried out again, with more patience.
    #[inline]
    pub fn ended(&self, storage: &Storage, offset: u64, result: i32) -> Option<Result<()>> {
        if usize::try_from(result) == Ok(self.len()) {
            return Some(Ok(()));
        }
        self.failed(storage, offset, result)
    }

    #[cold]
    fn failed(&self, storage: &Storage, offset: u64, result: i32) -> Option<Result<()>> {
        let errno = result.checked_neg().filter(|errno| *errno > 0)?;
        // EAGAIN: somebody's descriptor with O_NONBLOCK, which the ring heeds.
        if is_interrupted(errno) || errno == libc::EAGAIN {
            return None;
        }
        let what = match self {
            Transfer::Read(to) => reading(to.len(), offset),
            Transfer::Write(from) => writing(&[Piece::Guest(*from)], offset),
        };
        Some(Err(storage.failed(errno, what)))
    }
}

impl Storage {
    /// The turn of a read that goes to the storage as it is; `None`: it cannot.
    #[inline]
    pub(super) fn turn_to_read(&self, to: &GuestMut<'_>, offset: u64) -> Option<Turn> {
        self.is_fit(offset, to.len(), |memory, request| to.is_aligned_for(memory, request))?;
        self.tally().read(to.len());
        Some(Turn::ANYTIME)
    }

    /// The turn of a write that goes to the storage as it is; `None`: it cannot, or
    /// not now. To be ended.
    #[inline]
    pub(super) fn turn_to_write(&self, from: &GuestRef<'_>, offset: u64) -> Option<Turn> {
        let len = from.len();
        self.is_fit(offset, len, |memory, request| from.is_aligned_for(memory, request))?;
        if !self.access().writable {
            return None;
        }
        let turn = match self.alignment() {
            Alignment::NONE => Turn::ANYTIME,
            _ => self.ranges().try_turn(offset..offset.checked_add(len as u64)?)?,
        };
        self.tally().write(len);
        Some(turn)
    }

    /// Ends the turn of a transfer that is over.
    #[inline]
    pub(crate) fn end_turn(&self, turn: Turn, transfer: &Transfer, offset: u64) {
        // It did not overflow when the turn was taken.
        self.ranges().end_turn(turn, offset..offset.saturating_add(transfer.len() as u64));
    }

    fn is_fit(
        &self,
        offset: u64,
        len: usize,
        is_aligned: impl FnOnce(usize, usize) -> bool,
    ) -> Option<()> {
        let Alignment { memory, request } = self.alignment();
        let fits = (0 < len && len <= MAX_TRANSFER)
            && (request == 1
                || (offset % u64::from(request) == 0
                    && is_aligned(memory as usize, request as usize)));
        fits.then_some(())
    }
}
