//! Direct I/O of any size on storages that demand whole, aligned blocks.
//!
//! What is aligned goes straight through. The rest goes through a buffer of
//! ours; a write that covers a block in part reads the block first and writes
//! it back, while nobody else writes it (see `range_lock`).

use std::ops::Range;

use super::engine::{Engine, Piece, Target};
use super::file::Alignment;
use super::range_lock::RangeGuard;
use super::storage::Storage;
use crate::error::{Error, Result};
use crate::sys::memory::{Block, BlockSlice};

/// Largest buffer; longer requests go through it part by part. A multiple of
/// whatever is demanded of requests.
pub(super) const BUFFER: u64 = 1 << 20;

impl Alignment {
    /// `range` widened to whole blocks; an error if that overflows.
    fn widen(self, range: &Range<u64>) -> Result<Range<u64>> {
        let block = u64::from(self.request);
        let start = range.start / block * block;
        let end = range.end.checked_next_multiple_of(block);
        let end = end.ok_or_else(|| Error::invalid("a request ends past the largest offset"))?;
        Ok(start..end)
    }

    /// Whether a read may go straight into this memory.
    #[inline]
    pub(super) fn takes(self, target: &Target<'_>) -> bool {
        let (memory, request) = (self.memory as usize, self.request as usize);
        match target {
            Target::Guest(guest) => guest.is_aligned_for(memory, request),
            Target::Block(block) => block.guest_mut().is_aligned_for(memory, request),
        }
    }

    /// Whether a write may take this as it is.
    #[inline]
    pub(super) fn takes_piece(self, piece: &Piece<'_>) -> bool {
        let (memory, request) = (self.memory as usize, self.request as usize);
        match piece {
            Piece::Guest(guest) => guest.is_aligned_for(memory, request),
            Piece::Block(block) => block.guest_ref().is_aligned_for(memory, request),
            Piece::Zeroes(len) => len % request == 0,
        }
    }
}

/// `Storage::read` where alignment matters.
pub(super) async fn read<E: Engine>(
    storage: &Storage,
    engine: &E,
    to: Target<'_>,
    offset: u64,
) -> Result<()> {
    let alignment = storage.alignment();
    let range = range(offset, to.len() as u64)?;
    let blocks = alignment.widen(&range)?;
    if blocks == range && alignment.takes(&to) {
        return storage.pass_read(engine, to, offset).await;
    }
    let buffer = Block::zeroed(BUFFER.min(blocks.end - blocks.start) as usize)?;
    for part in parts(blocks) {
        let bytes = buffer.slice(0, (part.end - part.start) as usize);
        storage.pass_read(engine, Target::Block(bytes.clone()), part.start).await?;
        let wanted = part.start.max(range.start)..part.end.min(range.end);
        let len = (wanted.end - wanted.start) as usize;
        let from = bytes.sub((wanted.start - part.start) as usize, len);
        let at = (wanted.start - range.start) as usize;
        match &to {
            Target::Guest(guest) => guest.sub(at, len).copy_guest(from.guest_ref()),
            Target::Block(block) => block.sub(at, len).guest_mut().copy_guest(from.guest_ref()),
        }
    }
    Ok(())
}

/// `Storage::write` where alignment matters; `length` is that of the pieces.
pub(super) async fn write<E: Engine>(
    storage: &Storage,
    engine: &E,
    pieces: &[Piece<'_>],
    offset: u64,
    length: u64,
) -> Result<()> {
    let alignment = storage.alignment();
    let range = range(offset, length)?;
    let blocks = alignment.widen(&range)?;
    let whole = blocks == range;
    let _turn = storage.ranges().lock(blocks.clone(), !whole).await;
    if whole && pieces.iter().all(|piece| alignment.takes_piece(piece)) {
        return storage.pass_write(engine, pieces, offset).await;
    }
    // Where the last block reaches past an end that must stay.
    let end = match storage.access().fixed_length && blocks.end > range.end {
        true => Some(storage.length()?).filter(|end| *end < blocks.end),
        false => None,
    };
    if end.is_some_and(|end| range.end > end) {
        return Err(Error::invalid(format!(
            "writing {length} bytes at offset {offset} past the end of {}",
            storage.name()
        )));
    }
    let buffer = Block::zeroed(BUFFER.min(blocks.end - blocks.start) as usize)?;
    for part in parts(blocks) {
        let bytes = buffer.slice(0, (part.end - part.start) as usize);
        fill_edges(storage, engine, &bytes, &part, &range).await?;
        let wanted = part.start.max(range.start)..part.end.min(range.end);
        let len = (wanted.end - wanted.start) as usize;
        let to = bytes.sub((wanted.start - part.start) as usize, len);
        copy_pieces(pieces, (wanted.start - range.start) as usize, &to);
        storage.pass_write(engine, &[Piece::Block(bytes)], part.start).await?;
    }
    match end {
        Some(end) => engine.truncate(storage, end).await,
        None => Ok(()),
    }
}

/// Locks `range`, widened to whole blocks, for an operation other than a write.
pub(super) async fn lock(storage: &Storage, range: Range<u64>) -> Result<RangeGuard<'_>> {
    let blocks = storage.alignment().widen(&range)?;
    let whole = blocks == range;
    Ok(storage.ranges().lock(blocks, !whole).await)
}

/// Reads those blocks of `part` that `range` covers in part only into `bytes`.
async fn fill_edges<E: Engine>(
    storage: &Storage,
    engine: &E,
    bytes: &BlockSlice,
    part: &Range<u64>,
    range: &Range<u64>,
) -> Result<()> {
    let block = u64::from(storage.alignment().request);
    let last = part.end - block;
    let head = part.start < range.start;
    if head {
        let first = bytes.sub(0, block as usize);
        storage.pass_read(engine, Target::Block(first), part.start).await?;
    }
    if part.end > range.end && !(head && last == part.start) {
        let tail = bytes.sub((last - part.start) as usize, block as usize);
        storage.pass_read(engine, Target::Block(tail), last).await?;
    }
    Ok(())
}

/// Copies what the pieces hold from `skip` on into `to`, as much as it takes.
pub(crate) fn copy_pieces(pieces: &[Piece<'_>], mut skip: usize, to: &BlockSlice) {
    let mut done = 0;
    for piece in pieces {
        if done == to.len() {
            break;
        }
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        let len = (piece.len() - skip).min(to.len() - done);
        let to = to.sub(done, len);
        match piece {
            Piece::Guest(guest) => to.guest_mut().copy_guest(guest.sub(skip, len)),
            Piece::Block(block) => to.guest_mut().copy_guest(block.sub(skip, len).guest_ref()),
            Piece::Zeroes(_) => to.fill_zero(),
        }
        done += len;
        skip = 0;
    }
}

fn range(offset: u64, length: u64) -> Result<Range<u64>> {
    let end = offset.checked_add(length);
    let end = end.ok_or_else(|| Error::invalid("a request ends past the largest offset"))?;
    Ok(offset..end)
}

/// Cuts a range of whole blocks into what fits the buffer.
fn parts(blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut start = blocks.start;
    std::iter::from_fn(move || {
        let part = start..blocks.end.min(start + BUFFER);
        start = part.end;
        (!part.is_empty()).then_some(part)
    })
}
