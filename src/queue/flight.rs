//! Requests in the hands of the kernel just as they are, without a future: all of the
//! range lies in one place that was known when they started.

use super::engine::QueueEngine;
use super::request::{Outcome, Request};
use crate::image::known::{Begun, Place};
use crate::io::range_lock::Turn;
use crate::io::turns::Transfer;
use crate::sys::buffer::Buffer;

/// A request on its way.
pub struct Flight {
    request: Request,
    begun: Begun,
    place: Place,
    turn: Turn,
}

/// How a flight ended.
pub enum Landing {
    /// The request is over.
    Done(Outcome),
    /// It is to be carried out by a future: what came back was less than all, or says
    /// that it is to be tried again.
    Again(Request),
}

impl Flight {
    /// Sends a request off with the number of its slot; gives it back if it cannot go
    /// this way.
    #[inline]
    pub fn start<E: QueueEngine>(
        request: Request,
        engine: &E,
        slot: usize,
    ) -> std::result::Result<Flight, Request> {
        let Some((disk, transfer, offset)) = request.transfer() else { return Err(request) };
        let begun = disk.begin();
        let len = transfer.len() as u64;
        let place = match transfer {
            Transfer::Read(_) => disk.place_to_read(offset, len),
            Transfer::Write(_) => disk.place_to_write(offset, len),
        };
        let launched = place.and_then(|place| {
            let turn = engine.launch(disk.storage(place)?, &transfer, place.at, slot)?;
            Some((place, turn))
        });
        match launched {
            Some((place, turn)) => Ok(Flight { request, begun, place, turn }),
            None => {
                disk.end(begun);
                Err(request)
            }
        }
    }

    /// Ends it. `result`: bytes, or the negative errno.
    #[inline]
    pub fn land(self, result: i32) -> Landing {
        let Flight { request, begun, place, turn } = self;
        let Some((disk, transfer, _)) = request.transfer() else { return Landing::Again(request) };
        let ended = disk.storage(place).map(|storage| {
            if !mutant!(TurnNotEnded) {
                storage.end_turn(turn);
            }
            transfer.ended(storage, place.at, result)
        });
        if matches!(ended, Some(Some(Ok(())))) {
            match transfer {
                Transfer::Read(to) => disk.requests.read(to.len() as u64),
                Transfer::Write(_) if mutant!(FlightNotNoted) => {}
                Transfer::Write(from) => disk.note_written(from.len() as u64),
            }
        }
        if !mutant!(FlightStaysInEpoch) {
            disk.end(begun);
        }
        match ended.flatten() {
            Some(result) => Landing::Done(Outcome { result, buffer: request.work.into_buffer() }),
            None => Landing::Again(request),
        }
    }

    /// Ends it when the engine has seen it landed: how it ended is no news any more.
    /// The buffer that it has.
    pub fn give_up(self) -> Option<Buffer> {
        match self.land(-libc::ECANCELED) {
            Landing::Done(outcome) => outcome.buffer,
            Landing::Again(request) => request.work.into_buffer(),
        }
    }
}
