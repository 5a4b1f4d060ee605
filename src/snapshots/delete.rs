//! Deleting a snapshot.

use super::list::{encode, find};
use super::operation::{Changed, Operation};
use super::tables::{count, l1_bytes, set_flags};
use crate::alloc::overlap::Metadata;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::snapshot::Snapshot;
use crate::image::disk::Disk;
use crate::image::handle::Replacement;
use crate::image::qcow2::Qcow2;
use crate::io::engine::{Engine, Piece};
use crate::metadata::tables::read_table;
use crate::sys::memory::Block;

impl Disk {
    /// See `Image::snapshot_delete`; while nobody else does anything with the disk.
    /// `is_open`: whether somebody has the snapshot open.
    pub async fn snapshot_delete<E: Engine>(
        &self,
        engine: &E,
        id_or_name: &[u8],
        is_open: impl Fn(&Snapshot) -> bool + Send,
    ) -> Changed<()> {
        match Operation::begin(engine, self).await {
            Ok(mut operation) => {
                let result = delete(&mut operation, id_or_name, is_open).await;
                operation.finish(result).await
            }
            Err(error) => Changed { result: Err(error), disk: Replacement::None },
        }
    }
}

/// The L1 table of a snapshot. `Corrupt`; `OutOfMemory`.
pub(crate) async fn l1_of<E: Engine>(
    engine: &E,
    image: &Qcow2,
    snapshot: &Snapshot,
) -> Result<Vec<u64>> {
    snapshot.check_l1(image.geometry())?;
    read_table(engine, &image.storage, snapshot.l1_offset, snapshot.l1_size as usize).await
}

async fn delete<E: Engine>(
    operation: &mut Operation<'_, E>,
    id_or_name: &[u8],
    is_open: impl Fn(&Snapshot) -> bool,
) -> Result<()> {
    let (engine, image) = (operation.engine, operation.image);
    image.refuse_data_file("internal snapshots")?;
    let list = &operation.table.list;
    let index = find(list, id_or_name)?;
    let snapshot = &list[index];
    if is_open(snapshot) {
        return Err(Error::new(ErrorKind::Busy, "the snapshot is open: close it first"));
    }
    let mut rest = fallible::room_for(list.len())?;
    rest.extend(list.iter().enumerate().filter(|(n, _)| *n != index).map(|(_, s)| s.clone()));
    let table = encode(&rest, operation.header.virtual_size())?;

    let mut lost = operation.changes()?;
    let l1 = l1_of(engine, image, snapshot).await?;
    count(engine, image, &l1, &mut lost).await?;
    let allocator = &operation.writing.allocator;
    allocator.refcounts.check_lower(engine, &image.storage, &mut lost, None).await?;
    operation.header.snapshot_count = rest.len() as u32;
    operation.header.snapshots_offset = 0;
    if !rest.is_empty() {
        operation.header.snapshots_offset = operation.place(&table).await?;
    }

    operation.commit().await?;
    operation.switch().await?;
    operation.free(snapshot.l1_offset, l1.len() as u64 * 8, Metadata::InactiveL1).await?;
    operation.free_old_table().await?;
    // What follows goes past the cache.
    allocator.refcounts.write_back(engine, &image.storage).await?;
    let lowered = allocator.refcounts.lower_all(engine, &image.storage, lost).await?;
    let mut active = fallible::collect(image.l1.len(), image.l1.iter())?;
    if set_flags(engine, image, &mut active, &lowered).await? {
        write_l1(operation, &active).await?;
    }
    operation.punch(&lowered).await;
    Ok(())
}

/// Writes the active L1 table, in which nothing but flags has changed.
pub(super) async fn write_l1<E: Engine>(operation: &Operation<'_, E>, l1: &[u64]) -> Result<()> {
    let bytes = l1_bytes(l1)?;
    let offset = operation.image.l1.offset();
    let overlap = &operation.writing.allocator.overlap;
    overlap.check_table(offset, bytes.len() as u64, Metadata::L1)?;
    let block = Block::from_bytes(&bytes)?;
    let piece = [Piece::Block(block.slice(0, bytes.len()))];
    operation.image.storage.write(operation.engine, &piece, offset).await
}
