//! Requests whose place is known: all of the range is stored in one piece, as the guest
//! has it (not encrypted), and the tables that say so are in memory. These are nearly all requests of a disk in use,
//! and they are spared futures: an engine completes them at once, or a ring is given
//! them as they are and says later how they ended. Whatever is not as simple is left
//! to `read` and `write`, which find errors again and deal with them.

use super::disk::{Disk, Layer};
use crate::alloc::epoch::Stay;
use crate::error::Result;
use crate::format::subcluster::Subcluster;
use crate::geometry::GuestOffset;
use crate::io::engine::{Engine, Piece, Target};
use crate::io::storage::Storage;

/// Where a range is stored in one piece.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// In the storage of this layer's data.
    pub layer: usize,
    /// From there on.
    pub at: u64,
}

/// A request that has been inside since before its place was looked up, and stays
/// until it is over; see [`Disk::begin`].
#[must_use]
pub struct Begun(Option<Stay>);

impl Disk {
    /// Reads, if that is done at once. `None`: nothing was done.
    #[inline]
    pub fn read_now<E: Engine>(
        &self,
        engine: &E,
        to: &Target<'_>,
        offset: u64,
    ) -> Option<Result<()>> {
        let _inside = self.inside();
        let place = self.place_to_read(offset, to.len() as u64)?;
        let result = self.storage(place)?.read_now(engine, to, place.at)?;
        if self.requests.read(to.len() as u64) {
            self.clean_if_due(engine);
        }
        Some(result)
    }

    /// Writes, if that is done at once. `None`: nothing was done.
    #[inline]
    pub fn write_now<E: Engine>(
        &self,
        engine: &E,
        data: &Piece<'_>,
        offset: u64,
    ) -> Option<Result<()>> {
        let _inside = self.inside();
        let len = data.len() as u64;
        let place = self.place_to_write(offset, len)?;
        self.record_unless(mutant!(BitmapMissesWriteNow), offset..offset + len);
        let data = std::slice::from_ref(data);
        let result = self.storage(place)?.write_now(engine, data, place.at)?;
        if self.note_written(len) {
            self.clean_if_due(engine);
        }
        Some(result)
    }

    /// Begins a request whose place is about to be looked up: that place is its own
    /// until [`end`](Disk::end), which any thread may call.
    #[inline]
    pub fn begin(&self) -> Begun {
        let writing = self.top().and_then(|image| image.writing.as_ref());
        let writing = writing.filter(|_| !mutant!(FlightOutsideEpoch));
        Begun(writing.map(|writing| writing.allocator.epochs.stay()))
    }

    /// Ends it.
    #[inline]
    pub fn end(&self, Begun(stay): Begun) {
        let writing = self.top().and_then(|image| image.writing.as_ref());
        if let (Some(writing), Some(stay)) = (writing, stay) {
            writing.allocator.epochs.leave(stay);
        }
    }

    /// The storage that a place is in.
    #[inline]
    pub fn storage(&self, place: Place) -> Option<&Storage> {
        self.layers.get(place.layer).map(Layer::data)
    }

    /// Where a range is stored, for a request that is inside.
    #[inline]
    pub fn place_to_read(&self, offset: u64, len: u64) -> Option<Place> {
        if len == 0 || offset.checked_add(len)? > self.size() {
            return None;
        }
        if let Some(Layer::Qcow2(image)) = self.layers.first() {
            if let Some((host, _)) = image.stored(GuestOffset(offset), len) {
                return Some(Place { layer: 0, at: host.get() });
            }
        }
        let part = self.try_locate(0, GuestOffset(offset), len).ok()?.ok()?;
        if part.run.kind != Subcluster::Normal || part.run.len != len {
            return None;
        }
        if self.layers.get(part.layer)?.is_encrypted() {
            return None;
        }
        Some(Place { layer: part.layer, at: part.run.host?.get() })
    }

    /// Where a range is stored that may be written in place, for a request that is
    /// inside.
    #[inline]
    pub fn place_to_write(&self, offset: u64, len: u64) -> Option<Place> {
        let image = self.top()?;
        let writing = image.writing.as_ref()?;
        if len == 0 || offset.checked_add(len)? > self.size() || self.options.writethrough {
            return None;
        }
        writing.allocator.health.check().ok()?;
        let (host, true) = image.stored(GuestOffset(offset), len)? else { return None };
        image.check_data(writing, host, len).ok()?;
        Some(Place { layer: 0, at: host.get() })
    }

    /// Notes that a range was written in place, before anybody is told. Returns what
    /// `Requests::write` does.
    #[inline]
    pub fn note_written(&self, len: u64) -> bool {
        let now_and_then = self.requests.write(len);
        if let Some(writing) = self.top().and_then(|image| image.writing.as_ref()) {
            writing.mark_unsynced();
        }
        now_and_then
    }
}
