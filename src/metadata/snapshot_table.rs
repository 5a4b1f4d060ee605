//! Reading the snapshot table from an image file, piece by piece: how long it is
//! shows only as it is read.

use super::tables::read;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::format::limits::{MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES};
use crate::format::snapshot::Snapshot;
use crate::io::engine::Engine;
use crate::io::storage::Storage;

/// Hands on all entries, in order; returns the bytes of the table. `Corrupt` where
/// an entry is malformed; whether the L1 tables can be is for the caller to see.
pub async fn read_snapshots<E: Engine>(
    engine: &E,
    storage: &Storage,
    header: &Header,
    mut each: impl FnMut(Snapshot) -> Result<()> + Send,
) -> Result<u64> {
    /// With the padding before it and all that may vary.
    const LONGEST_ENTRY: usize = 8 + 40 + MAX_SNAPSHOT_EXTRA as usize + 2 * 65535;
    const PIECE: u64 = 256 << 10;
    let length = storage.length()?.saturating_sub(header.snapshots_offset);
    // A piece, where it begins in the table, and how far it is used.
    let (mut piece, mut start, mut used) = (Vec::new(), 0, 0);
    for number in 0..header.snapshot_count {
        let at = (start + used as u64).next_multiple_of(8);
        let unread = length.saturating_sub(start + piece.len() as u64);
        if unread > 0 && piece.len() - used < LONGEST_ENTRY {
            let bytes = PIECE.min(length.saturating_sub(at)) as usize;
            piece = read(engine, storage, header.snapshots_offset + at, bytes).await?;
            (start, used) = (at, 0);
        }
        let found = Snapshot::parse_next(&piece, used)
            .map_err(|error| error.context(format!("entry {number} of the snapshot table")))?;
        let end = found.as_ref().map_or(0, |(_, end)| start + *end as u64);
        let (Some((snapshot, next)), ..=MAX_SNAPSHOT_TABLE_BYTES) = (found, end) else {
            let text = format!("the snapshot table ends, or is too large, at entry {number}");
            return Err(Error::corrupt(text));
        };
        used = next;
        each(snapshot)?;
    }
    Ok(start + used as u64)
}
