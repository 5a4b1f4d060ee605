//! The steps from an image that is open to one that may be written: repaired if it
//! was not closed cleanly, its metadata known, its refcounts at hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::bitmaps::{Bitmaps, load::load};
use super::feature_bits::{FeatureBits, write_incompatible, write_word};
use super::open::{Budget, refcount_cache, reftable_bytes};
use super::options::OpenOptions;
use super::qcow2::{L1Table, Qcow2, Writing};
use crate::alloc::allocator::Allocator;
use crate::alloc::health::Health;
use crate::alloc::overlap::{Metadata, OverlapIndex};
use crate::alloc::overlap_check::OverlapCheck;
use crate::alloc::refcounts::{Refcounts, Table};
use crate::check::repair;
use crate::error::{Error, Result};
use crate::fallible;
use crate::format::header::{Header, incompatible};
use crate::format::limits::OFFSET_MASK;
use crate::format::refcount::RefcountWidth;
use crate::io::engine::Engine;
use crate::io::wait::AsyncMutex;
use crate::log;
use crate::metadata::snapshot_table::read_snapshots;
use crate::metadata::tables::read_table;

/// Makes an image that is open ready for writing. Whatever can be refused is refused
/// before anything is written. `bitmaps`: those that it goes on with, `None`: those that
/// are stored.
pub(super) async fn begin_writing<E: Engine>(
    engine: &E,
    image: &mut Qcow2,
    options: &OpenOptions,
    budget: &mut Budget,
    bitmaps: Option<Bitmaps>,
) -> Result<Bitmaps> {
    let mut bitmaps = match bitmaps {
        Some(bitmaps) => {
            budget.take(bitmaps.bytes(), "persistent bitmaps", image.storage.name())?;
            bitmaps
        }
        None => load(engine, image, budget).await?,
    };
    if image.header.dirty() {
        repair_dirty(engine, image, budget).await?;
    }
    image.writing = Some(open_for_writing(engine, image, options, budget).await?);
    mutant!(AutoclearNotSynced => {
        image.storage.sync(engine).await?;
        clear_unknown_autoclear(engine, image).await?;
        return Ok(bitmaps);
    });
    clear_unknown_autoclear(engine, image).await?;
    // Durable with the sync that follows, before anything that they record.
    if !mutant!(BitmapMarkNotSynced) {
        bitmaps.mark(engine, image, |_, bitmap| bitmap.enabled).await?;
    }
    // Whoever wrote before may have been killed before it could sync: what can be read
    // is there, but not durable. Autoclear bits that it has cleared must not be back
    // beside a change of ours, and what our guest has read a flush must make durable.
    mutant!(OpenedTakenForDurable => return Ok(bitmaps));
    if let Some(data) = &image.data_file {
        data.sync(engine).await?;
    }
    image.storage.sync(engine).await?;
    mutant!(BitmapMarkNotSynced => {
        bitmaps.mark(engine, image, |_, bitmap| bitmap.enabled).await?;
    });
    Ok(bitmaps)
}

/// Rebuilds the refcounts of an image that was not closed cleanly. The dirty bit goes
/// last: a crash before that leaves an image that is repaired again.
async fn repair_dirty<E: Engine>(engine: &E, image: &mut Qcow2, budget: &Budget) -> Result<()> {
    let Qcow2 { storage, header, .. } = image;
    let name = storage.name();
    log::emit(log::WARN, "image", || {
        format!("{name}: it was not closed cleanly, its refcounts are being rebuilt")
    });
    repair(engine, storage, header, budget.0).await?;
    header.incompatible &= !incompatible::DIRTY;
    write_incompatible(engine, storage, header.incompatible).await?;
    storage.sync(engine).await?;
    // Flags in there may have changed.
    let table = read_table(engine, storage, header.l1_offset, header.l1_size as usize).await?;
    image.l1 = L1Table::new(header.l1_offset, table.into_iter());
    Ok(())
}

async fn open_for_writing<E: Engine>(
    engine: &E,
    image: &Qcow2,
    options: &OpenOptions,
    budget: &mut Budget,
) -> Result<Writing> {
    let Qcow2 { storage, header, .. } = image;
    let geometry = header.geometry;
    let length = storage.length()?;
    let offset = header.reftable_offset;
    let entries = read_table(engine, storage, offset, reftable_bytes(header) as usize / 8).await?;
    let table = Table { entries, offset };
    let overlap =
        Arc::new(index_metadata(engine, image, &table, options.overlap_check, budget).await?);
    let health = Arc::new(Health::default());
    let width = RefcountWidth::new(header.refcount_order)?;
    let refcounts =
        Refcounts::new(geometry, width, table, refcount_cache(options), overlap.clone())?;
    let mut allocator = Allocator::new(geometry, refcounts, overlap, health, storage, length);
    allocator.late_holes = image.is_encrypted() && options.discard;
    Ok(Writing {
        allocator,
        claims: Default::default(),
        flushing: crate::io::wait::AsyncMutex::new(()),
        filling: AsyncMutex::new(None),
        flushes_begun: AtomicU64::new(0),
        flushes_done: AtomicU64::new(0),
        needs_sync: AtomicBool::new(false),
        features: FeatureBits::new(header.incompatible),
        lazy: options.lazy_refcounts.unwrap_or(header.version >= 3 && header.lazy_refcounts()),
        punch: options.discard,
        punch_snapshots: options.discard_snapshots.unwrap_or(options.discard),
        discard_keeps: options.discard_no_unref,
        cow_bytes: AtomicU64::new(0),
    })
}

/// Where the image's metadata is. `Corrupt` where a refcount block counts twice:
/// no driver can keep such counts right.
async fn index_metadata<E: Engine>(
    engine: &E,
    image: &Qcow2,
    table: &Table,
    check: OverlapCheck,
    budget: &mut Budget,
) -> Result<OverlapIndex> {
    let Qcow2 { storage, header, l1, .. } = image;
    let size = header.geometry.cluster_size();
    let tables = l1.iter().filter(|entry| entry & OFFSET_MASK != 0).count();
    let offsets = table.entries.iter().map(|entry| entry & OFFSET_MASK);
    let blocks = fallible::collect(table.entries.len(), offsets.filter(|offset| *offset != 0))?;
    let room = image.l1.len() + blocks.len();
    budget.take(OverlapIndex::bytes_for(room as u64), "the index of tables", storage.name())?;
    let index = OverlapIndex::new(header.geometry.cluster_bits, tables + blocks.len(), check)?;
    index.add(header.l1_offset, u64::from(header.l1_size) * 8, Metadata::L1);
    index.add(table.offset, table.entries.len() as u64 * 8, Metadata::RefcountTable);
    for entry in l1.iter().filter(|entry| entry & OFFSET_MASK != 0) {
        index.add(entry & OFFSET_MASK, size, Metadata::L2);
    }
    let mut sorted = blocks;
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::corrupt(format!(
            "{}: the refcount table names the block at {:#x} twice (repair: qemu-img check -r all)",
            storage.name(),
            twice[0]
        )));
    }
    for offset in sorted {
        index.add(offset, size, Metadata::RefcountBlock);
    }
    if let Some(bitmaps) = &header.extensions.bitmaps {
        index.add(bitmaps.directory_offset, bitmaps.directory_size, Metadata::BitmapDirectory);
    }
    if let Some(crypto) = &header.extensions.crypto {
        let room = OverlapIndex::bytes_for(header.geometry.clusters_for(crypto.length));
        budget.take(room, "the index of the encryption header", storage.name())?;
        index.add(crypto.offset, crypto.length, Metadata::EncryptionHeader);
    }
    index_snapshots(engine, image, &index, check, budget)
        .await
        .map_err(|error| error.context(storage.name().to_owned()))?;
    Ok(index)
}

/// The snapshot table, and the L1 tables that it names; and, where writes are checked
/// against them, the L2 tables that those name.
async fn index_snapshots<E: Engine>(
    engine: &E,
    image: &Qcow2,
    index: &OverlapIndex,
    check: OverlapCheck,
    budget: &mut Budget,
) -> Result<()> {
    let Qcow2 { storage, header, .. } = image;
    let mut tables = Vec::new();
    let bytes = read_snapshots(engine, storage, header, |snapshot| {
        snapshot.check_l1_limits()?;
        let bytes = u64::from(snapshot.l1_size) * 8;
        let clusters = header.geometry.clusters_for(bytes) + 1;
        let room = OverlapIndex::bytes_for(clusters);
        budget.take(room, "the index of the snapshots' L1 tables", storage.name())?;
        index.add(snapshot.l1_offset, bytes, Metadata::InactiveL1);
        if check.needs_inactive_l2() {
            tables.push((snapshot.l1_offset, snapshot.l1_size as usize));
        }
        Ok(())
    });
    index.add(header.snapshots_offset, bytes.await?, Metadata::SnapshotTable);
    for (offset, entries) in tables {
        // It is in memory while it is looked through.
        budget.check(entries as u64 * 8, "the L1 table of a snapshot", storage.name())?;
        for entry in read_table(engine, storage, offset, entries).await? {
            let table = entry & OFFSET_MASK;
            if table != 0 && index.add_new(table, Metadata::InactiveL2) {
                budget.take(OverlapIndex::bytes_for(1), "the index of tables", storage.name())?;
            }
        }
    }
    Ok(())
}

/// Autoclear bits say that something is still true that a writer who does not know
/// them may break: on an image open for writing they go before all else is written.
/// Does not sync.
async fn clear_unknown_autoclear<E: Engine>(engine: &E, image: &mut Qcow2) -> Result<()> {
    let unknown = image.header.unknown_autoclear();
    if unknown == 0 || image.format.version < 3 {
        return Ok(());
    }
    image.header.autoclear &= !unknown;
    write_word(engine, &image.storage, image.header.autoclear, Header::AUTOCLEAR_AT).await
}
