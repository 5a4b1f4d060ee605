//! Reading tables from an image file as they are there, past the caches.

use crate::error::Result;
use crate::fallible;
use crate::io::engine::{Engine, Target};
use crate::io::storage::Storage;
use crate::sys::memory::Block;

/// Reads a table of 8-byte entries, in pieces, so that hardly more memory is taken
/// than it needs in the end.
pub async fn read_table<E: Engine>(
    engine: &E,
    storage: &Storage,
    offset: u64,
    entries: usize,
) -> Result<Vec<u64>> {
    const PIECE: usize = 128 << 10;
    let mut table = fallible::room_for(entries)?;
    while table.len() < entries {
        let count = PIECE.min(entries - table.len());
        let at = offset + table.len() as u64 * 8;
        table.extend(words_of(&read(engine, storage, at, count * 8).await?));
    }
    Ok(table)
}

/// Reads metadata; what lies past the end of the file is zero.
pub async fn read<E: Engine>(
    engine: &E,
    storage: &Storage,
    offset: u64,
    bytes: usize,
) -> Result<Vec<u8>> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let block = Block::zeroed(bytes)?;
    let all = block.slice(0, bytes);
    storage.read(engine, Target::Block(all.clone()), offset).await?;
    all.to_vec()
}

/// The words of a table as it is stored.
pub fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|chunk| chunk.iter().fold(0, |word, b| word << 8 | u64::from(*b)))
}
