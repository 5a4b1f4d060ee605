//! Where the content of each part of the disk comes from.

use super::disk::{Disk, Located};
use crate::error::Result;
use crate::format::subcluster::Subcluster;
use crate::geometry::GuestOffset;
use crate::io::engine::Engine;

/// A range of the virtual disk and where its content comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Guest offset.
    pub offset: u64,
    /// Bytes, > 0.
    pub length: u64,
    /// Where the bytes are in the storage of the layer `depth`; never for bytes that are
    /// not there as the guest has them: compressed or encrypted ones.
    pub host_offset: Option<u64>,
    /// Reads come from stored data.
    pub data: bool,
    /// Reads as zero.
    pub zero: bool,
    /// Defined in layer `depth`.
    pub allocated: bool,
    /// Stored compressed.
    pub compressed: bool,
    /// Ends at the virtual size.
    pub eof: bool,
    /// 0: this image, 1: its backing image, ...
    pub depth: u32,
}

impl Extent {
    /// Joins what follows if it is of the same kind; else returns it.
    fn join(&mut self, next: Extent) -> Option<Extent> {
        let contiguous = match (self.host_offset, next.host_offset) {
            (None, None) => true,
            (Some(here), Some(there)) if !self.compressed => here + self.length == there,
            _ => false,
        };
        let same = self.data == next.data
            && self.zero == next.zero
            && self.allocated == next.allocated
            && self.compressed == next.compressed
            && self.depth == next.depth;
        if !contiguous || !same {
            return Some(next);
        }
        self.length += next.length;
        self.eof = next.eof;
        None
    }
}

impl Disk {
    /// Calls `report` with up to `max` extents that cover a range from its start
    /// on, neighbours differing. `this_layer`: what is not in this image is not
    /// looked for below.
    pub async fn block_status<E: Engine>(
        &self,
        engine: &E,
        offset: u64,
        length: u64,
        this_layer: bool,
        max: usize,
        report: &mut (dyn FnMut(Extent) + Send),
    ) -> Result<()> {
        self.check_range(offset, length)?;
        let end = offset + length;
        let (mut at, mut reported) = (offset, 0);
        let mut current: Option<Extent> = None;
        while at < end && reported < max {
            let next = self.extent_at(engine, at, end - at, this_layer).await?;
            at += next.length;
            let done = match &mut current {
                None => {
                    current = Some(next);
                    None
                }
                Some(extent) => extent.join(next).and_then(|next| current.replace(next)),
            };
            if let Some(done) = done {
                report(done);
                reported += 1;
            }
        }
        if let (Some(last), true) = (current, reported < max) {
            report(last);
        }
        Ok(())
    }

    async fn extent_at<E: Engine>(
        &self,
        engine: &E,
        at: u64,
        max: u64,
        this_layer: bool,
    ) -> Result<Extent> {
        // Without a lower layer to ask, the layers below do not exist.
        let part = match (this_layer, self.top()) {
            (true, Some(image)) => {
                let run = image.find(engine, GuestOffset(at), max).await?;
                Located { layer: 0, run, past_end: false }
            }
            _ => self.locate(engine, 0, GuestOffset(at), max).await?,
        };
        let encrypted = self.layers.get(part.layer).is_some_and(|layer| layer.is_encrypted());
        let more_below = this_layer && self.layers.len() > 1;
        let mut extent = Extent {
            offset: at,
            length: part.run.len,
            host_offset: part.run.host.map(|host| host.get()).filter(|_| !encrypted),
            data: false,
            zero: false,
            allocated: true,
            compressed: false,
            eof: at + part.run.len == self.size(),
            depth: part.layer as u32,
        };
        match part.run.kind {
            Subcluster::Normal => extent.data = true,
            Subcluster::Compressed => {
                extent.data = true;
                extent.compressed = true;
                extent.host_offset = None;
            }
            Subcluster::Zero | Subcluster::ZeroReserved => extent.zero = true,
            Subcluster::Unallocated | Subcluster::Reserved => {
                // A layer that ends early defines what follows: zeroes.
                extent.allocated = part.past_end;
                extent.zero = !more_below;
            }
        }
        Ok(extent)
    }
}
