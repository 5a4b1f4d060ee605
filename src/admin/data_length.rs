//! How long an external data file is: that of a new image, and where a disk gets another
//! size. What is taken ahead in it, too.
//!
//! Nothing of it is part of the image before the header says so; what entries say of its
//! places is not known here.

use std::ops::Range;

use super::preallocation::{Preallocation, Progress};
use crate::error::{ErrorKind, Result};
use crate::io::engine::{Engine, Piece, ZeroMode};
use crate::io::storage::Storage;

/// Zeroes are written in pieces of so many bytes.
const PIECE: u64 = 1 << 20;

/// Makes the part `bytes` of a data file new, and the file's end that of the part, where
/// a length can be set: whatever lies there, or behind, is nobody's. `shown`: entries are
/// going to lead there before anybody writes, so that it has to be zero. Does not sync.
pub async fn renew<E: Engine>(
    engine: &E,
    file: &Storage,
    bytes: Range<u64>,
    shown: bool,
    preallocation: Preallocation,
    progress: Progress<'_>,
) -> Result<()> {
    let mut cut = file.capacity().is_none();
    for length in [bytes.start, bytes.end] {
        match file.truncate(engine, length).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => cut = false,
            other => other?,
        }
    }
    if shown && !cut {
        // What keeps its length keeps what it holds.
        let left = bytes.start..file.length()?.min(bytes.end);
        zero(engine, file, left).await?;
    }
    preallocation.prepare(engine, file, bytes.clone(), bytes.start, progress).await
}

async fn zero<E: Engine>(engine: &E, file: &Storage, range: Range<u64>) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    match file.zero(engine, range.start, range.end - range.start, ZeroMode::Keep).await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            let mut at = range.start;
            while at < range.end {
                let length = (range.end - at).min(PIECE);
                file.write(engine, &[Piece::Zeroes(length as usize)], at).await?;
                at += length;
            }
            Ok(())
        }
        zeroed => zeroed,
    }
}

/// Cuts off what lies behind the disk, or, after a change that failed, what was to be
/// part of it. `false`: the file has the length that it has.
pub async fn cut<E: Engine>(engine: &E, file: &Storage, length: u64) -> Result<bool> {
    match file.truncate(engine, length).await {
        Err(error) if error.kind() == ErrorKind::NotSupported => Ok(false),
        other => other.map(|()| file.capacity().is_none()),
    }
}
