//! Taking a snapshot, and giving one another name.

use super::Meta;
use super::list::{check_name, encode, find, next_id};
use super::operation::{Changed, Operation};
use super::tables::{count, l1_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::l2::COPIED;
use crate::format::limits::MAX_SNAPSHOTS;
use crate::format::snapshot::Snapshot;
use crate::image::disk::Disk;
use crate::image::handle::Replacement;
use crate::io::engine::Engine;

impl Disk {
    /// See `Image::snapshot_create`; while nobody else does anything with the disk.
    pub async fn snapshot_create<E: Engine>(
        &self,
        engine: &E,
        name: &[u8],
        meta: &Meta,
        check_id: impl Fn(&[u8]) -> Result<()> + Send,
    ) -> Changed<Vec<u8>> {
        match Operation::begin(engine, self).await {
            Ok(mut operation) => {
                let result = create(&mut operation, name, meta, check_id).await;
                operation.finish(result).await
            }
            Err(error) => Changed { result: Err(error), disk: Replacement::None },
        }
    }

    /// See `Image::snapshot_rename`; while nobody else does anything with the disk.
    pub async fn snapshot_rename<E: Engine>(
        &self,
        engine: &E,
        id_or_name: &[u8],
        name: &[u8],
    ) -> Changed<()> {
        match Operation::begin(engine, self).await {
            Ok(mut operation) => {
                let result = rename(&mut operation, id_or_name, name).await;
                operation.finish(result).await
            }
            Err(error) => Changed { result: Err(error), disk: Replacement::None },
        }
    }
}

/// The snapshot gets the L1 table as it is, the active state a copy of it: one write
/// of the header names both.
async fn create<E: Engine>(
    operation: &mut Operation<'_, E>,
    name: &[u8],
    meta: &Meta,
    check_id: impl Fn(&[u8]) -> Result<()>,
) -> Result<Vec<u8>> {
    operation.image.refuse_data_file("internal snapshots")?;
    let list = &operation.table.list;
    if list.len() >= MAX_SNAPSHOTS as usize {
        let text = format!("the image has {MAX_SNAPSHOTS} snapshots, and cannot have more");
        return Err(Error::new(ErrorKind::Os(libc::EFBIG), text));
    }
    check_name(list, name, None)?;
    let (engine, image) = (operation.engine, operation.image);
    let header = &image.header;
    let snapshot = Snapshot {
        l1_offset: image.l1.offset(),
        l1_size: image.l1.len() as u32,
        id: next_id(list),
        name: name.to_vec(),
        disk_size: Some(header.virtual_size()),
        ..meta.snapshot()
    };
    let id = snapshot.id.clone();
    check_id(&id)?;
    let mut all = fallible::room_for(list.len() + 1)?;
    all.extend(list.iter().cloned());
    all.push(snapshot);
    let table = encode(&all, header.virtual_size())?;

    let mut l1 = fallible::collect(image.l1.len(), image.l1.iter())?;
    if meta.vm_state_size > 0 {
        // It is the snapshot's alone: what is written there next is another's.
        l1.truncate(usize::try_from(header.l1_entries_needed()).unwrap_or(usize::MAX));
    }
    let mut gained = operation.changes()?;
    let flagged = count(engine, image, &l1, &mut gained).await?;
    let refcounts = &operation.writing.allocator.refcounts;
    refcounts.check_raise(engine, &image.storage, &mut gained).await?;
    l1.iter_mut().for_each(|entry| *entry &= !COPIED);
    if l1.is_empty() {
        l1.push(0);
    }
    operation.header.l1_size = l1.len() as u32;
    operation.header.l1_offset = operation.place(&l1_bytes(&l1)?).await?;
    operation.header.snapshot_count = all.len() as u32;
    operation.header.snapshots_offset = operation.place(&table).await?;

    operation.share(&flagged, &mut gained).await?;
    operation.free_old_table().await?;
    Ok(id)
}

async fn rename<E: Engine>(
    operation: &mut Operation<'_, E>,
    id_or_name: &[u8],
    name: &[u8],
) -> Result<()> {
    let list = &operation.table.list;
    let index = find(list, id_or_name)?;
    check_name(list, name, Some(index))?;
    let mut all = fallible::room_for(list.len())?;
    all.extend(list.iter().cloned());
    if let Some(snapshot) = all.get_mut(index) {
        snapshot.name = name.to_vec();
    }
    let table = encode(&all, operation.header.virtual_size())?;
    operation.header.snapshots_offset = operation.place(&table).await?;
    operation.publish().await?;
    operation.switch().await?;
    operation.free_old_table().await
}
