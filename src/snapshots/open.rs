//! Opening a snapshot, read-only, beside the image.
//!
//! Nothing that a snapshot refers to is ever changed in place, but for COPIED flags,
//! which readers do not look at: so it needs nothing of the image but its storage and
//! what is below, and the image goes on being written to.

use std::sync::Arc;

use super::delete::l1_of;
use super::list::find;
use crate::error::{Error, Result};
use crate::format::limits::max_virtual_size;
use crate::format::snapshot::Snapshot;
use crate::image::disk::{Disk, Layer};
use crate::image::open::{Budget, reserve};
use crate::image::options::OpenOptions;
use crate::image::qcow2::{L1Table, Qcow2};
use crate::io::engine::Engine;

impl Disk {
    /// See `Image::snapshot_open`. Also returns which snapshot it is.
    pub async fn snapshot_open<E: Engine>(
        &self,
        engine: &E,
        id_or_name: &[u8],
    ) -> Result<(Disk, &Snapshot)> {
        let list = &self.snapshot_table(engine).await?.list;
        let image = self.image_with_snapshots()?;
        let snapshot = &list[find(list, id_or_name)?];
        image.refuse_data_file("internal snapshots")?;
        let geometry = image.geometry();
        let mut header = image.header.clone();
        header.size = snapshot.disk_size.unwrap_or(image.size);
        if header.size > max_virtual_size(geometry) {
            let text = format!("a snapshot of a disk of {} bytes, which cannot be", header.size);
            return Err(Error::corrupt(text));
        }
        header.l1_offset = snapshot.l1_offset;
        header.l1_size = snapshot.l1_size;
        (header.snapshot_count, header.snapshots_offset) = (0, 0);
        header.extensions.bitmaps = None;
        let options = OpenOptions { writable: false, lazy_refcounts: None, ..self.options.clone() };
        let mut budget = Budget(options.max_metadata_size);
        let l2 = reserve(&header, &options, &mut budget, image.storage.name())?;
        let l1 = l1_of(engine, image, snapshot).await?;
        let l1 = L1Table::new(snapshot.l1_offset, l1.into_iter());
        let view = Qcow2 {
            storage: image.storage.clone(),
            data_file: None,
            size: header.virtual_size(),
            header,
            unlocked: image.unlocked.clone(),
            format: image.format,
            l1,
            l2,
            writing: None,
            misses: Default::default(),
            snapshots: Default::default(),
        };
        let mut layers = vec![Layer::Qcow2(Arc::new(view))];
        layers.extend_from_slice(self.layers.get(1..).unwrap_or_default());
        Ok((Disk::new(layers, options), snapshot))
    }
}
