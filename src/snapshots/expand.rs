//! Snapshots without zero clusters: what version 2 of the format can say.
//!
//! No table of a snapshot is changed in place. Those that have zero clusters get copies
//! without: zeroes are written to new clusters, or, where nothing is below, there is
//! nothing. Then one write of the header names another snapshot table with the new L1
//! tables. The image is of version 3 before and after that, and every snapshot reads the
//! same.

use std::collections::BTreeMap;
use std::ops::Range;

use super::delete::{l1_of, write_l1};
use super::list::encode;
use super::operation::{Changed, Operation};
use super::tables::{count_entries, entries, l1_bytes, set_flags};
use crate::alloc::overlap::Metadata;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::l2::{COPIED, Cluster};
use crate::format::limits::OFFSET_MASK;
use crate::format::snapshot::Snapshot;
use crate::geometry::HostOffset;
use crate::image::disk::Disk;
use crate::image::expand::is_zero;
use crate::image::handle::Replacement;
use crate::io::engine::{Engine, Piece};
use crate::metadata::tables::read;

/// What one table takes in the list of all, about.
const EACH_TABLE: u64 = 64;

/// An L2 table that only snapshots need to have replaced.
struct Table {
    /// How many L1 entries of snapshots name it.
    times: u32,
    /// Its place in those L1 tables.
    index: u64,
    /// The copy, once there is one; 0: none is needed.
    copy: u64,
}

impl Disk {
    /// Replaces every zero cluster of the snapshots of an image without subclusters;
    /// while nobody else does anything with the disk. `progress`: tables done, of how
    /// many; `false` ends it with `Cancelled`. `Busy` where `is_open` says that somebody
    /// has one of the snapshots open.
    pub(crate) async fn expand_snapshots<E: Engine>(
        &self,
        engine: &E,
        is_open: impl Fn(&Snapshot) -> bool + Send,
        progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
    ) -> Changed<()> {
        match Operation::begin(engine, self).await {
            Ok(mut operation) => {
                let result = expand(&mut operation, is_open, progress).await;
                operation.finish(result).await
            }
            Err(error) => Changed { result: Err(error), disk: Replacement::None },
        }
    }
}

async fn expand<E: Engine>(
    operation: &mut Operation<'_, E>,
    is_open: impl Fn(&Snapshot) -> bool,
    progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
) -> Result<()> {
    let (engine, image) = (operation.engine, operation.image);
    let snapshots = &operation.table.list;
    if snapshots.iter().any(is_open) {
        return Err(Error::new(ErrorKind::Busy, "a snapshot is open: close it first"));
    }
    let mut tables: BTreeMap<u64, Table> = BTreeMap::new();
    let most = operation.disk.options.max_metadata_size / EACH_TABLE;
    for snapshot in snapshots {
        for (index, entry) in (0..).zip(l1_of(engine, image, snapshot).await?) {
            let Some(table) = image.table_of(entry)? else { continue };
            if tables.len() as u64 >= most {
                let text = "the tables of all snapshots take more than \"max-metadata-size\"";
                return Err(Error::new(ErrorKind::Limit, text));
            }
            let found = tables.entry(table.get());
            let new = Table { times: 0, index, copy: 0 };
            let times = &mut found.or_insert(new).times;
            *times = times.checked_add(1).ok_or_else(|| {
                Error::corrupt(format!("the L2 table at {table} is named 2^32 times"))
            })?;
        }
    }
    let total = tables.len() as u64;
    let mut fresh = Vec::new();
    for (done, (offset, table)) in (0..).zip(&mut tables) {
        if !progress(done, total) {
            let text = "the change of the image was cancelled";
            return Err(Error::new(ErrorKind::Cancelled, text));
        }
        table.copy = copy_without(operation, *offset, table, &mut fresh).await?;
    }
    tables.retain(|_, table| table.copy != 0);
    if tables.is_empty() {
        return Ok(());
    }

    // What old and new tables have in common stays counted as it is.
    let (mut gained, mut lost) = (operation.changes()?, operation.changes()?);
    let (bits, size) = (image.geometry().cluster_bits, image.geometry().cluster_size() as usize);
    for (offset, table) in &tables {
        for (at, changes) in [(*offset, &mut lost), (table.copy, &mut gained)] {
            let bytes = read(engine, &image.storage, at, size).await?;
            changes.add(at >> bits, table.times)?;
            count_entries(image, (at, table.times), &bytes, changes)?;
        }
    }
    for cluster in fresh.into_iter().flatten() {
        // It has its first reference.
        lost.add(cluster, 1)?;
    }
    gained.cancel(&mut lost);

    let mut list = fallible::room_for(snapshots.len())?;
    let mut replaced = Vec::new();
    for snapshot in snapshots {
        let mut new = snapshot.clone();
        let mut l1 = l1_of(engine, image, snapshot).await?;
        let mut changed = false;
        for entry in &mut l1 {
            if let Some(table) = tables.get(&(*entry & OFFSET_MASK)) {
                *entry = table.copy;
                changed = true;
            }
        }
        if changed {
            replaced.push((snapshot.l1_offset, l1.len() as u64 * 8));
            new.l1_offset = operation.place(&l1_bytes(&l1)?).await?;
        }
        list.push(new);
    }
    let table = encode(&list, operation.header.virtual_size())?;
    operation.header.snapshots_offset = operation.place(&table).await?;

    let refcounts = &operation.writing.allocator.refcounts;
    operation.publish().await?;
    refcounts.check_raise(engine, &image.storage, &mut gained).await?;
    refcounts.check_lower(engine, &image.storage, &mut lost, None).await?;
    operation.share(&[], &mut gained).await?;
    for (offset, bytes) in replaced {
        operation.free(offset, bytes, Metadata::InactiveL1).await?;
    }
    operation.free_old_table().await?;
    refcounts.write_back(engine, &image.storage).await?;
    let lowered = refcounts.lower_all(engine, &image.storage, lost).await?;
    let mut active = fallible::collect(image.l1.len(), image.l1.iter())?;
    if set_flags(engine, image, &mut active, &lowered).await? {
        write_l1(operation, &active).await?;
    }
    operation.punch(&lowered).await;
    Ok(())
}

/// Writes a copy of an L2 table without zero clusters, and what it leads to that is new;
/// adds all these clusters to `fresh`. 0: there are no zero clusters.
async fn copy_without<E: Engine>(
    operation: &mut Operation<'_, E>,
    offset: u64,
    table: &Table,
    fresh: &mut Vec<Range<u64>>,
) -> Result<u64> {
    let image = operation.image;
    let geometry = image.geometry();
    let (bits, size) = (geometry.cluster_bits, geometry.cluster_size());
    let mut bytes = read(operation.engine, &image.storage, offset, size as usize).await?;
    let first = table.index * (geometry.l2_coverage() >> bits);
    // Snapshots that version 2 can have are as large as the disk.
    let end = geometry.clusters_for(image.size);
    let mut zeroes = Vec::new();
    let mut to_store = 0;
    for (index, entry) in (0..).zip(entries(image, &bytes)) {
        if is_zero(&image.format.decode(entry)?) {
            let stored = image.has_backing() && first + index < end;
            to_store += u64::from(stored);
            zeroes.push((index as usize, stored));
        }
    }
    if zeroes.is_empty() {
        return Ok(0);
    }
    let mut places = 0..0;
    if to_store > 0 {
        places = operation.take(to_store).await?;
        let stored = zeroes.iter().filter(|(_, stored)| *stored);
        for (host, (index, _)) in places.clone().zip(stored) {
            let (host, guest) = (host << bits, (first + *index as u64) << bits);
            let piece = [Piece::Zeroes(size as usize)];
            image.write_data(operation.engine, &piece, host, guest).await?;
        }
        fresh.push(places.clone());
    }
    for (index, stored) in zeroes {
        let place = if stored { places.next() } else { None };
        let cluster = match place.and_then(|cluster| HostOffset::new(cluster << bits)) {
            Some(host) => Cluster::Standard { host: host.into(), copied: false, alloc: 1, zero: 0 },
            None => Cluster::None { zero: 0 },
        };
        let entry = image.format.encode(cluster).descriptor;
        if let Some(to) = bytes.get_mut(index * 8..index * 8 + 8) {
            to.copy_from_slice(&entry.to_be_bytes());
        }
    }
    // COPIED is for active tables: this is none.
    for entry in bytes.chunks_exact_mut(8) {
        let [first, ..] = entry else { continue };
        let word = u64::from(*first) << 56;
        *first = ((word & !COPIED) >> 56) as u8;
    }
    let copy = operation.place(&bytes).await?;
    fresh.push(copy >> bits..(copy >> bits) + 1);
    Ok(copy)
}
