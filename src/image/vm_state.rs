//! VM state: bytes behind the end of the virtual disk, mapped by the same L1 table. They
//! begin with the first L1 entry that the disk does not need, and are of this image
//! alone: nothing shows through from below.

use super::disk::{Disk, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::limits::max_virtual_size;
use crate::io::engine::{Engine, Piece, Target};

impl Disk {
    /// This image without what is below, and with all that its L1 table can map.
    fn with_vm_state(&self) -> Result<(&Disk, u64)> {
        let Some(image) = self.top() else {
            return Err(Error::new(ErrorKind::NotSupported, "raw images have no VM state"));
        };
        image.refuse_data_file("VM state")?;
        let start = image.header.l1_entries_needed().checked_mul(image.geometry().l2_coverage());
        let start = start.ok_or_else(|| Error::invalid("the disk leaves no room for VM state"))?;
        let disk = self.vm_state.get_or_init(|| {
            let top = self.layers.get(..1).unwrap_or_default().to_vec();
            let mut disk = Disk::new(top, self.options.clone());
            disk.size = disk.layers.first().map_or(0, Layer::size);
            disk.size = disk.size.max(max_virtual_size(image.geometry()));
            Box::new(disk)
        });
        Ok((disk, start))
    }

    /// Reads VM state from `offset` on; what was never written is zero.
    /// `InvalidArgument` past all that can be.
    pub async fn read_vm_state<E: Engine>(
        &self,
        engine: &E,
        to: Target<'_>,
        offset: u64,
    ) -> Result<()> {
        let (disk, start) = self.with_vm_state()?;
        disk.read(engine, to, start.saturating_add(offset)).await
    }

    /// Writes VM state from `offset` on. `Os(EFBIG)` past all that can be;
    /// otherwise as any write.
    pub async fn write_vm_state<E: Engine>(
        &self,
        engine: &E,
        data: Piece<'_>,
        offset: u64,
    ) -> Result<()> {
        let (disk, start) = self.with_vm_state()?;
        let Some(image) = self.top() else { return Ok(()) };
        image.writing()?;
        let end = start.checked_add(offset).and_then(|start| start.checked_add(data.len() as u64));
        let Some(end) = end.filter(|end| *end <= disk.size()) else {
            let text = format!("{}: no L1 table maps that much VM state", image.storage.name());
            return Err(Error::new(ErrorKind::Os(libc::EFBIG), text));
        };
        let entries = end.div_ceil(image.geometry().l2_coverage());
        match image.grow_l1(engine, entries).await {
            // What was freed may be enough, once it is durably so.
            Err(error) if error.errno() == libc::ENOSPC => {
                self.flush(engine).await?;
                image.grow_l1(engine, entries).await?;
            }
            Err(error) => return Err(self.note_corruption(engine, error).await),
            Ok(()) => {}
        }
        disk.write(engine, data, start + offset, false).await
    }
}
