//! Requests in the hands of the kernel just as they are, without a future: all of the
//! range lies in one place that was known when they started.

use super::engine::QueueEngine;
use super::request::Request;
use crate::error::Result;
use crate::image::known::{Begun, Place};
use crate::io::range_lock::Turn;
use crate::io::turns::Transfer;

/// A request on its way; the request itself stays in its slot.
pub struct Flight {
    begun: Begun,
    place: Place,
    turn: Turn,
}

impl Flight {
    /// Sends a request off with the number of its slot; `None`: it cannot go this way.
    #[inline]
    pub fn start<E: QueueEngine>(request: &Request, engine: &E, slot: usize) -> Option<Flight> {
        let (disk, transfer, offset) = request.transfer()?;
        let begun = disk.begin();
        let len = transfer.len() as u64;
        let place = match transfer {
            Transfer::Read(_) => disk.place_to_read(offset, len),
            Transfer::Write(_) => disk.place_to_write(offset, len),
        };
        let launched = place.and_then(|place| {
            if let Transfer::Write(_) = transfer {
                disk.record_unless(mutant!(BitmapMissesFlight), offset..offset + len);
            }
            let turn = engine.launch(disk.storage(place)?, &transfer, place.at, slot)?;
            Some((place, turn))
        });
        match launched {
            Some((place, turn)) => Some(Flight { begun, place, turn }),
            None => {
                disk.end(begun);
                None
            }
        }
    }

    /// Ends it. `result`: bytes, or the negative errno. `None`: the request is to be
    /// carried out by a future, as what came back was less than all, or says that it is
    /// to be tried again.
    #[inline]
    pub fn land(self, request: &Request, result: i32) -> Option<Result<()>> {
        let Flight { begun, place, turn } = self;
        let (disk, transfer, _) = request.transfer()?;
        let storage = disk.storage(place)?;
        if !mutant!(TurnNotEnded) {
            storage.end_turn(turn, &transfer, place.at);
        }
        let ended = transfer.ended(storage, place.at, result);
        if matches!(ended, Some(Ok(()))) {
            match transfer {
                // The queue looks at the clock by itself.
                Transfer::Read(to) => _ = disk.requests.read(to.len() as u64),
                Transfer::Write(_) if mutant!(FlightNotNoted) => {}
                Transfer::Write(from) => _ = disk.note_written(from.len() as u64),
            }
        }
        if !mutant!(FlightStaysInEpoch) {
            disk.end(begun);
        }
        ended
    }
}
