//! Going back to a snapshot: the active state is replaced by it.

use super::delete::l1_of;
use super::list::find;
use super::operation::{Changed, Operation};
use super::tables::{count, l1_bytes};
use crate::alloc::overlap::Metadata;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::l2::COPIED;
use crate::format::limits::MAX_L1_BYTES;
use crate::image::disk::Disk;
use crate::image::handle::Replacement;
use crate::io::engine::Engine;

impl Disk {
    /// See `Image::snapshot_apply`; while nobody else does anything with the disk.
    pub async fn snapshot_apply<E: Engine>(&self, engine: &E, id_or_name: &[u8]) -> Changed<()> {
        match Operation::begin(engine, self).await {
            Ok(mut operation) => {
                let result = apply(&mut operation, id_or_name).await;
                operation.finish(result).await
            }
            Err(error) => Changed { result: Err(error), disk: Replacement::None },
        }
    }
}

async fn apply<E: Engine>(operation: &mut Operation<'_, E>, id_or_name: &[u8]) -> Result<()> {
    operation.image.refuse_data_file("internal snapshots")?;
    let (engine, image) = (operation.engine, operation.image);
    let list = &operation.table.list;
    let snapshot = &list[find(list, id_or_name)?];
    if operation.bitmaps().any(|bitmap| bitmap.enabled && bitmap.bits.is_some()) {
        let text = "a bitmap records changes, and would miss this one: disable it first";
        return Err(Error::new(ErrorKind::NotSupported, text));
    }
    let size = snapshot.disk_size.unwrap_or(image.header.virtual_size());
    if size != image.header.virtual_size() {
        check_resize(operation, size)?;
        operation.header.size = size;
    }
    let needed = operation.header.l1_entries_needed();
    if needed > MAX_L1_BYTES / 8 {
        let text = format!("a snapshot of a disk of {size} bytes, which no L1 table maps");
        return Err(Error::corrupt(text));
    }

    let mut l1 = l1_of(engine, image, snapshot).await?;
    let (mut gained, mut lost) = (operation.changes()?, operation.changes()?);
    let flagged = count(engine, image, &l1, &mut gained).await?;
    let active = fallible::collect(image.l1.len(), image.l1.iter())?;
    count(engine, image, &active, &mut lost).await?;
    // What both have stays as it is: its refcounts may have no room for more.
    gained.cancel(&mut lost);
    let allocator = &operation.writing.allocator;
    let refcounts = &allocator.refcounts;
    refcounts.check_raise(engine, &image.storage, &mut gained).await?;
    let own = Some(Metadata::L2);
    refcounts.check_lower(engine, &image.storage, &mut lost, own).await?;
    // In both, in the active state and in the snapshot, everything is shared.
    l1.iter_mut().for_each(|entry| *entry &= !COPIED);
    let entries = l1.len().max(needed as usize).max(1);
    l1.try_reserve_exact(entries - l1.len())
        .map_err(|_| Error::new(ErrorKind::OutOfMemory, "no memory for the L1 table"))?;
    l1.resize(entries, 0);
    operation.header.l1_size = entries as u32;
    operation.header.l1_offset = operation.place(&l1_bytes(&l1)?).await?;

    operation.share(&flagged, &mut gained).await?;
    let old_bytes = image.l1.len() as u64 * 8;
    operation.free(image.l1.offset(), old_bytes, Metadata::L1).await?;
    refcounts.write_back(engine, &image.storage).await?;
    let lowered = refcounts.lower_all(engine, &image.storage, lost).await?;
    operation.punch(&lowered).await;
    Ok(())
}

/// Whether the disk can get the snapshot's size. `NotSupported`, as in QEMU, for
/// version 2, and where bitmaps would have to follow.
fn check_resize<E: Engine>(operation: &Operation<'_, E>, size: u64) -> Result<()> {
    let unsupported = |text: &str| Err(Error::new(ErrorKind::NotSupported, text));
    if operation.header.version < 3 {
        return unsupported("the snapshot is of a disk of another size, which needs version 3");
    }
    if operation.bitmaps().next().is_some() {
        return unsupported("the snapshot is of a disk of another size, and there are bitmaps");
    }
    if size > operation.disk.options.max_virtual_size {
        let text = format!("the snapshot's disk of {size} bytes exceeds \"max-virtual-size\"");
        return Err(Error::new(ErrorKind::Limit, text));
    }
    match size % 512 {
        0 => Ok(()),
        _ => Err(Error::corrupt("the snapshot's disk is not a multiple of 512 bytes")),
    }
}
