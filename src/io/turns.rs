//! When a transfer may go to a storage just as it is: whole and aligned, with nobody
//! in its way. For engines that are told of the end rather than wait for it.

use super::blocking::{reading, writing};
use super::engine::{Piece, Target};
use super::file::Alignment;
use super::range_lock::Turn;
use super::ring::is_interrupted;
use super::storage::Storage;
use crate::error::Result;
use crate::sys::file::MAX_TRANSFER;

/// A transfer that goes to a storage as it is. Its memory stays until it is over.
pub enum Transfer {
    /// Reads into memory.
    Read(Target<'static>),
    /// Writes what memory holds.
    Write(Piece<'static>),
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
        mutant!(ShortFlightTakenForWhole => if result >= 0 { return Some(Ok(())) });
        let errno = result.checked_neg().filter(|errno| *errno > 0)?;
        // EAGAIN: somebody's descriptor with O_NONBLOCK, which the ring heeds.
        let again = is_interrupted(errno) || errno == libc::EAGAIN;
        if again && !mutant!(FlightNotTriedAgain) {
            return None;
        }
        mutant!(FlightFailureForgotten => return Some(Ok(())));
        let what = match self {
            Transfer::Read(to) => reading(to.len(), offset),
            Transfer::Write(from) => writing(std::slice::from_ref(from), offset),
        };
        Some(Err(storage.failed(errno, what)))
    }
}

impl Storage {
    /// The turn of a transfer that goes to the storage as it is; `None`: it cannot, or
    /// not now. To be ended.
    #[inline]
    pub(super) fn turn(&self, transfer: &Transfer, offset: u64) -> Option<Turn> {
        let len = transfer.len();
        let alignment = self.alignment();
        let is_aligned = || match transfer {
            Transfer::Read(to) => alignment.takes(to),
            Transfer::Write(from) => alignment.takes_piece(from),
        };
        let request = alignment.request;
        let fits = (0 < len && len <= MAX_TRANSFER)
            && (request == 1 || (offset % u64::from(request) == 0 && is_aligned()));
        if !fits {
            return None;
        }
        match transfer {
            Transfer::Read(_) => {
                self.tally().read(len);
                Some(Turn::ANYTIME)
            }
            Transfer::Write(_) => {
                if !self.access().writable {
                    return None;
                }
                let turn = match alignment {
                    Alignment::NONE => Turn::ANYTIME,
                    _ if mutant!(FlightTakesNoTurn) => Turn::ANYTIME,
                    _ => self.ranges().try_turn(offset..offset.checked_add(len as u64)?)?,
                };
                self.tally().write(len);
                Some(turn)
            }
        }
    }

    /// Ends the turn of a transfer that is over.
    #[inline]
    pub(crate) fn end_turn(&self, turn: Turn, transfer: &Transfer, offset: u64) {
        // It did not overflow when the turn was taken.
        self.ranges().end_turn(turn, offset..offset.saturating_add(transfer.len() as u64));
    }
}
