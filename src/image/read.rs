//! Reading: straight from where the mapping says into the caller's memory.

use std::sync::Arc;

use super::disk::{Disk, Layer, Located};
use crate::alloc::epoch::Inside;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::compressed::Compressed;
use crate::format::compression::Compression;
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

    /// What the mapping says stays true, as far as reuse goes, while this lives.
    #[inline]
    pub(super) fn inside(&self) -> Option<Inside<'_>> {
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
                Some(host) => image.read_data(engine, to, host.get(), at.0).await,
                None => Err(Error::corrupt("allocated data without a host offset")),
            },
            (Subcluster::Normal, Layer::Raw(raw)) => raw.storage.read(engine, to, at.0).await,
            (Subcluster::Compressed, Layer::Qcow2(image)) => {
                let Some(data) = part.run.compressed else { return Ok(()) };
                let in_cluster = image.geometry().in_cluster(at.0) as usize;
                let bytes = self.inflate(engine, part.layer, data, at).await?;
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

    /// The bytes of a compressed cluster, of which `at` is one.
    async fn inflate<E: Engine>(
        &self,
        engine: &E,
        layer: usize,
        data: Compressed,
        at: GuestOffset,
    ) -> Result<Arc<Vec<u8>>> {
        if let Some(bytes) = self.inflated.get(layer, data) {
            return Ok(bytes);
        }
        let Some(Layer::Qcow2(image)) = self.layers.get(layer) else {
            return Err(Error::corrupt("compressed data in a raw image"));
        };
        let size = image.geometry().cluster_size() as usize;
        let block = Block::zeroed(data.length as usize)?;
        let input = block.slice(0, data.length as usize);
        image.storage.read(engine, Target::Block(input.clone()), data.offset).await?;
        // Requests in flight together read it together; one of them does the work.
        if let Some(bytes) = self.inflated.get(layer, data) {
            return Ok(bytes);
        }
        let mut output = fallible::filled(size, 0)?;
        let method = Compression::of(image.header.compression)?;
        let input = input.to_vec()?;
        let done =
            self.inflated.with_context(|context| method.decompress(context, &input, &mut output));
        done.map_err(|error| {
            let kind = match error.kind() {
                ErrorKind::Corrupt => ErrorKind::DataLost,
                other => other,
            };
            let name = image.storage.name();
            let end = match image.storage.length() {
                Ok(length) if length < data.offset => ", past the end of the file",
                _ => "",
            };
            let host = data.offset;
            let context =
                format!("{name}: guest offset {at}, compressed cluster at {host:#x}{end}");
            error.wrap_as(kind, context)
        })?;
        let bytes = Arc::new(output);
        self.inflated.put(layer, data, bytes.clone());
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
