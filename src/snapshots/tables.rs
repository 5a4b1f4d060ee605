//! Walking all that an L1 table leads to: counting its references, clearing and setting
//! COPIED flags. Tables that lie next to each other are read and written together.
//!
//! It knows nothing of the order on disk.

use crate::alloc::changes::{Changes, Lowered};
use crate::error::{Error, Result};
use crate::fallible;
use crate::format::l2::{COPIED, Cluster, L2Entry};
use crate::format::limits::OFFSET_MASK;
use crate::geometry::HostOffset;
use crate::image::expand::is_zero;
use crate::image::qcow2::Qcow2;
use crate::io::engine::{Engine, Piece};
use crate::metadata::tables::{read, words_of};
use crate::sys::memory::Block;

/// Tables that are neighbours are read at once, up to so many bytes.
const LARGEST_READ: u64 = 2 << 20;

/// The L2 tables that an L1 table names: where, and how often.
fn named(image: &Qcow2, l1: &[u64]) -> Result<Vec<(u64, u32)>> {
    let mut offsets: Vec<u64> = fallible::room_for(l1.len())?;
    for entry in l1 {
        offsets.extend(image.table_of(*entry)?.map(HostOffset::get));
    }
    offsets.sort_unstable();
    let mut tables: Vec<(u64, u32)> = fallible::room_for(offsets.len())?;
    for offset in offsets {
        match tables.last_mut() {
            Some((last, times)) if *last == offset => *times += 1,
            _ => tables.push((offset, 1)),
        }
    }
    Ok(tables)
}

/// How many tables at the start of these lie one behind the other.
fn neighbours(tables: &[(u64, u32)], size: u64) -> usize {
    let most = (LARGEST_READ / size).max(1) as usize;
    let follows = |pair: &&[(u64, u32)]| pair[0].0.checked_add(size) == Some(pair[1].0);
    1 + tables.windows(2).take(most - 1).take_while(follows).count()
}

/// Counts the references of an L1 table and of all that it names. Returns the L2
/// tables in which a COPIED flag is set.
///
/// `Corrupt` for entries that make no sense, or lead out of the file.
pub async fn count<E: Engine>(
    engine: &E,
    image: &Qcow2,
    l1: &[u64],
    changes: &mut Changes,
) -> Result<Vec<(u64, u32)>> {
    let geometry = image.geometry();
    let size = geometry.cluster_size();
    let overlap = &image.writing()?.allocator.overlap;
    let tables = named(image, l1)?;
    let mut flagged = fallible::room_for(tables.len())?;
    let mut rest = &tables[..];
    while let Some((offset, _)) = rest.first() {
        let group;
        (group, rest) = rest.split_at(neighbours(rest, size));
        let bytes = read(engine, &image.storage, *offset, group.len() * size as usize).await?;
        for (table, bytes) in group.iter().zip(bytes.chunks_exact(size as usize)) {
            changes.add(table.0 >> geometry.cluster_bits, table.1)?;
            // Its flags may be about to change.
            overlap.check_shared_tables(table.0, size)?;
            if count_entries(image, *table, bytes, changes)? {
                flagged.push(*table);
            }
        }
    }
    Ok(flagged)
}

/// Counts the references of one L2 table, or of a part of it; returns whether there is a
/// COPIED flag.
pub fn count_entries(
    image: &Qcow2,
    (table, times): (u64, u32),
    bytes: &[u8],
    changes: &mut Changes,
) -> Result<bool> {
    let geometry = image.geometry();
    let in_table = |error: Error| {
        error.context(format!("{}: the L2 table at {table:#x}", image.storage.name()))
    };
    let mut flagged = false;
    for entry in entries(image, bytes) {
        if entry.descriptor == 0 && entry.bitmap == 0 {
            continue;
        }
        match image.format.decode(entry).map_err(in_table)? {
            Cluster::Compressed(data) => {
                for cluster in data.host_clusters(geometry) {
                    changes.add(cluster, times).map_err(in_table)?;
                }
            }
            Cluster::Standard { host, copied, .. } => {
                flagged |= copied;
                // Nothing of a data file is counted.
                if !image.format.data_file {
                    changes.add(geometry.host_cluster(host).0, times).map_err(in_table)?;
                }
            }
            Cluster::None { .. } => {}
        }
    }
    Ok(flagged)
}

/// Whether there is a zero cluster in what an L1 table leads to. `Corrupt`.
pub async fn has_zeroes<E: Engine>(engine: &E, image: &Qcow2, l1: &[u64]) -> Result<bool> {
    let size = image.geometry().cluster_size();
    for (table, _) in named(image, l1)? {
        let bytes = read(engine, &image.storage, table, size as usize).await?;
        for entry in entries(image, &bytes) {
            if is_zero(&image.format.decode(entry)?) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The entries of an L2 table.
pub fn entries<'a>(image: &Qcow2, bytes: &'a [u8]) -> impl Iterator<Item = L2Entry> + use<'a> {
    bytes.chunks_exact(image.format.words() * 8).map(|entry| {
        let mut words = words_of(entry);
        L2Entry { descriptor: words.next().unwrap_or(0), bitmap: words.next().unwrap_or(0) }
    })
}

/// Clears the COPIED flags in these L2 tables; does not sync.
pub async fn clear_flags<E: Engine>(
    engine: &E,
    image: &Qcow2,
    tables: &[(u64, u32)],
) -> Result<()> {
    rewrite(engine, image, tables, |entry, _| entry & !COPIED).await
}

/// Sets the COPIED flags that are due in an L1 table, in memory, and in the L2 tables
/// that it names, after references were taken; does not sync. Returns whether the L1
/// table has changed.
pub async fn set_flags<E: Engine>(
    engine: &E,
    image: &Qcow2,
    l1: &mut [u64],
    lowered: &Lowered,
) -> Result<bool> {
    let tables = named(image, l1)?;
    let set = |entry: u64, host: u64| if lowered.is_once(host) { entry | COPIED } else { entry };
    rewrite(engine, image, &tables, set).await?;
    let mut changed = false;
    for entry in l1.iter_mut().filter(|entry| **entry & OFFSET_MASK != 0) {
        let new = set(*entry, (*entry & OFFSET_MASK) >> image.geometry().cluster_bits);
        changed |= new != *entry;
        *entry = new;
    }
    Ok(changed)
}

/// Replaces the first words of all entries that have a host cluster and are not
/// compressed: `new` gets the word and the number of that cluster.
async fn rewrite<E: Engine>(
    engine: &E,
    image: &Qcow2,
    tables: &[(u64, u32)],
    new: impl Fn(u64, u64) -> u64 + Send,
) -> Result<()> {
    let geometry = image.geometry();
    let size = geometry.cluster_size();
    let overlap = &image.writing()?.allocator.overlap;
    let words = image.format.words() * 8;
    let mut rest = tables;
    while let Some((offset, _)) = rest.first() {
        let group;
        (group, rest) = rest.split_at(neighbours(rest, size));
        let length = group.len() * size as usize;
        let mut bytes = read(engine, &image.storage, *offset, length).await?;
        let mut changed = false;
        for entry in bytes.chunks_exact_mut(words) {
            let Some(first) = entry.first_chunk_mut::<8>() else { continue };
            let old = u64::from_be_bytes(*first);
            let bitmap = 0;
            let host = match image.format.decode(L2Entry { descriptor: old, bitmap }) {
                Ok(Cluster::Standard { host, .. }) => geometry.host_cluster(host).0,
                _ => continue,
            };
            let new = new(old, host);
            changed |= new != old;
            *first = new.to_be_bytes();
        }
        if changed {
            overlap.check_shared_tables(*offset, length as u64)?;
            let block = Block::from_bytes(&bytes)?;
            let piece = [Piece::Block(block.slice(0, length))];
            image.storage.write(engine, &piece, *offset).await?;
        }
    }
    Ok(())
}

/// The bytes of an L1 table.
pub fn l1_bytes(l1: &[u64]) -> Result<Vec<u8>> {
    fallible::collect(l1.len() * 8, l1.iter().flat_map(|entry| entry.to_be_bytes()))
}
