//! Checking an open image.

use crate::check::{CheckResult, Observer, check};
use crate::error::{Error, ErrorKind, Result};
use crate::image::disk::{Disk, Layer};
use crate::image::handle::Image;
use crate::image::views;
use crate::io::blocking::Blocking;
use crate::io::engine::Engine;
use crate::io::wait::block_on;

impl Image {
    /// Checks the image file itself, not those below it; a writable image is flushed
    /// before, and what it holds ready for use is given back. Returns what was
    /// found also if the check could not be completed.
    ///
    /// Errors: `NotSupported` for raw images, `Busy` if another call is in progress,
    /// `Cancelled`, `Limit` ("max-metadata-size"), `Corrupt` where a table cannot be
    /// understood at all, and those of reading and flushing.
    pub fn check(&self, observer: &mut dyn Observer) -> (CheckResult, Result<()>) {
        let mut result = CheckResult::default();
        let outcome = self.alone(|disk| {
            block_on(async {
                disk.settle(&Blocking).await?;
                disk.check(&Blocking, observer, &mut result).await
            })
        });
        (result, outcome)
    }
}

impl Disk {
    /// As `Image::check`, while nothing else happens on a settled disk.
    pub async fn check<E: Engine>(
        &self,
        engine: &E,
        observer: &mut dyn Observer,
        result: &mut CheckResult,
    ) -> Result<()> {
        views::refuse(&self.view, "checking it")?;
        let Some(Layer::Qcow2(image)) = self.layers.first() else {
            return Err(Error::new(ErrorKind::NotSupported, "raw images have nothing to check"));
        };
        let mut header = image.header.clone();
        if let Some(writing) = &image.writing {
            // They may have moved since.
            header.l1_offset = image.l1.offset();
            header.l1_size = image.l1.len() as u32;
            let (offset, bytes) = writing.allocator.refcounts.table_place();
            header.reftable_offset = offset;
            header.reftable_clusters = header.geometry.clusters_for(bytes) as u32;
        }
        let memory = self.options.max_metadata_size;
        check(engine, &image.storage, &header, memory, observer, result).await
    }
}
