//! Reading: straight from where the mapping says into the caller's memory.

use std::sync::{Arc, PoisonError};

use super::disk::{Disk, Inflated, Layer, Located};
use crate::alloc::epoch::Inside;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::compressed::{self, Compressed};
use crate::format::subcluster::Subcluster;
use crate::geometry::GuestOffset;
use crate::io::engine::{Engine, Target};
use crate::sys::memory::Block;

impl Disk {
    /// Reads from the virtual disk. `InvalidArgument` past its end.
    pub async fn read<E: Engine>(&self, engine: &E, to: Target<'_>, offset: u64) -> Result<()> {
        self.check_range(offset, to.len() as u64)?;
        self.requests.read(to.len() as u64);
        match self.read_from(engine, 0, to, GuestOffset(offset)).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.note_corruption(engine, error).await),
        }
    }

    /// As `read`, in the common case: one piece, of which everything is known, and
    /// an engine that completes at once. `None`: nothing was done, use `read`.
    #[inline]
    pub fn read_now<E: Engine>(
        &self,
        engine: &E,
        to: &Target<'_>,
        offset: u64,
    ) -> Option<Result<()>> {
        let len = to.len() as u64;
        if len == 0 || offset.checked_add(len)? > self.size() {
            return None;
        }
        let _inside = self.inside();
        if let Some(Layer::Qcow2(image)) = self.layers.first() {
            if let Some((host, _)) = image.stored(GuestOffset(offset), len) {
                let result = image.storage.read_now(engine, to, host.get())?;
                self.requests.read(len);
                return Some(result);
            }
        }
        // Errors are found again, and dealt with, by `read`.
        let part = self.try_locate(0, GuestOffset(offset), len).ok()?.ok()?;
        if part.run.kind != Subcluster::Normal || part.run.len != len {
            return None;
        }
        let (storage, at) = match self.layers.get(part.layer)? {
            Layer::Qcow2(image) => (&*image.storage, part.run.host?.get()),
            Layer::Raw(raw) => (&raw.storage, offset),
        };
        let result = storage.read_now(engine, to, at)?;
        self.requests.read(len);
        Some(result)
    }

    /// What the mapping says stays true, as far as reuse goes, while this lives.
    #[inline]
    fn inside(&self) -> Option<Inside<'_>> {
        mutant!(ReadOutsideEpoch => return None);
        let writing = self.top()?.writing.as_ref()?;
        Some(writing.allocator.epochs.enter())
    }

    /// Reads what layer `from` and those below it hold. The range lies on the
    /// disk; what lies past the end of a shorter layer is zero.
    pub(super) async fn read_from<E: Engine>(
        &self,
        engine: &E,
        from: usize,
        to: Target<'_>,
        offset: GuestOffset,
    ) -> Result<()> {
        let _inside = self.inside();
        let len = to.len();
        let mut done = 0;
        while done < len {
            let at = GuestOffset(offset.0 + done as u64);
            let part = self.locate(engine, from, at, (len - done) as u64).await?;
            let count = part.run.len as usize;
            // The common case keeps the target as it is: nothing is copied.
            if done == 0 && count == len {
                return self.read_part(engine, &part, to, at).await;
            }
            self.read_part(engine, &part, to.sub(done, count), at).await?;
            done += count;
        }
        Ok(())
    }

    #[inline]
    async fn read_part<E: Engine>(
        &self,
        engine: &E,
        part: &Located,
        to: Target<'_>,
        at: GuestOffset,
    ) -> Result<()> {
        let Some(layer) = self.layers.get(part.layer) else { return Ok(()) };
        match (part.run.kind, layer) {
            (Subcluster::Normal, Layer::Qcow2(image)) => match part.run.host {
                Some(host) => image.storage.read(engine, to, host.get()).await,
                None => Err(Error::corrupt("allocated data without a host offset")),
            },
            (Subcluster::Normal, Layer::Raw(raw)) => raw.storage.read(engine, to, at.0).await,
            (Subcluster::Compressed, Layer::Qcow2(image)) => {
                let Some(data) = part.run.compressed else { return Ok(()) };
                let in_cluster = image.geometry().in_cluster(at.0) as usize;
                let bytes = self.inflate(engine, part.layer, data).await?;
                if let Some(bytes) = bytes.get(in_cluster..in_cluster + to.len()) {
                    to.copy_from(bytes);
                }
                Ok(())
            }
            (
                Subcluster::Compressed
                | Subcluster::Unallocated
                | Subcluster::Reserved
                | Subcluster::Zero
                | Subcluster::ZeroReserved,
                _,
            ) => {
                to.fill_zero();
                Ok(())
            }
        }
    }

    /// The bytes of a compressed cluster.
    async fn inflate<E: Engine>(
        &self,
        engine: &E,
        layer: usize,
        data: Compressed,
    ) -> Result<Arc<Vec<u8>>> {
        let remembered = || self.inflated.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = &*remembered() {
            if last.layer == layer && last.data == data {
                return Ok(last.bytes.clone());
            }
        }
        let Some(Layer::Qcow2(image)) = self.layers.get(layer) else {
            return Err(Error::corrupt("compressed data in a raw image"));
        };
        let size = image.geometry().cluster_size() as usize;
        let block = Block::zeroed(data.length as usize)?;
        let input = block.slice(0, data.length as usize);
        image.storage.read(engine, Target::Block(input.clone()), data.offset).await?;
        let mut output = fallible::filled(size, 0)?;
        compressed::inflate(&input.to_vec()?, &mut output).map_err(|error| {
            let name = image.storage.name();
            let end = match image.storage.length() {
                Ok(length) if length < data.offset => ", past the end of the file",
                _ => "",
            };
            let context = format!("{name}: compressed cluster at {:#x}{end}", data.offset);
            error.wrap_as(ErrorKind::DataLost, context)
        })?;
        let bytes = Arc::new(output);
        *remembered() = Some(Inflated { layer, data, bytes: bytes.clone() });
        Ok(bytes)
    }

    /// Marks this image as corrupt if the error says that it is; see `Qcow2`.
    #[cold]
    pub(crate) async fn note_corruption<E: Engine>(&self, engine: &E, error: Error) -> Error {
        match self.top() {
            Some(image) if !error.is_from_below() => image.note_corruption(engine, error).await,
            _ => error,
        }
    }
}
