//! How often the host clusters of an image are referred to, as counted by a check,
//! and what the image's own refcounts say of them. Pure; memory is bounded.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};

/// Clusters whose counts lie together.
const CHUNK: u64 = 64;
/// What one chunk takes, with its share of the map.
const CHUNK_BYTES: u64 = 320;

struct Chunk {
    counts: [u32; CHUNK as usize],
    /// Bit i: the image says that cluster i of the chunk has refcount one.
    counted_once: u64,
}

/// The counts of all clusters; those that are not mentioned have none.
pub struct References {
    chunks: BTreeMap<u64, Chunk>,
    /// The first cluster behind all that are referred to.
    end: u64,
    /// The highest refcount that the image can express.
    max: u64,
    room: u64,
}

impl References {
    /// `max`: where counting ends; `memory`: how many bytes may be taken.
    pub fn new(max: u64, memory: u64) -> References {
        References { chunks: BTreeMap::new(), end: 0, max: max.min(u32::MAX.into()), room: memory }
    }

    /// Adds references to a cluster; returns how many of them the image's refcounts
    /// are too narrow for. `Limit` where that takes too much memory.
    pub fn add(&mut self, cluster: u64, references: u64) -> Result<u64> {
        let number = cluster / CHUNK;
        if !self.chunks.contains_key(&number) {
            self.room = self.room.checked_sub(CHUNK_BYTES).ok_or_else(|| {
                let text = "counting references takes more than \"max-metadata-size\"";
                Error::new(ErrorKind::Limit, text)
            })?;
        }
        self.end = self.end.max(cluster + 1);
        let empty = || Chunk { counts: [0; CHUNK as usize], counted_once: 0 };
        let chunk = self.chunks.entry(number).or_insert_with(empty);
        let count = &mut chunk.counts[(cluster % CHUNK) as usize];
        let fits = references.min(self.max - u64::from(*count));
        *count += fits as u32;
        Ok(references - fits)
    }

    /// The references to a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        chunk.map_or(0, |chunk| chunk.counts[(cluster % CHUNK) as usize].into())
    }

    /// The first cluster behind all that are referred to.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The next cluster in `from..to` that is referred to, with its references.
    pub fn next(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        let chunks = self.chunks.range(from / CHUNK..to.div_ceil(CHUNK));
        let clusters = chunks.flat_map(|(number, chunk)| {
            let counts = chunk.counts.iter().enumerate();
            counts.map(move |(index, count)| (number * CHUNK + index as u64, u64::from(*count)))
        });
        let mut wanted = clusters
            .skip_while(|(cluster, _)| *cluster < from)
            .take_while(|(cluster, _)| *cluster < to)
            .filter(|(_, count)| *count > 0);
        wanted.next()
    }

    /// Remembers that the image gives a cluster the refcount one.
    pub fn note_counted_once(&mut self, cluster: u64) {
        if let Some(chunk) = self.chunks.get_mut(&(cluster / CHUNK)) {
            chunk.counted_once |= 1 << (cluster % CHUNK);
        }
    }

    /// Whether the image gives a cluster the refcount one; `None` where it was not
    /// noted: nothing near it is referred to.
    pub fn is_counted_once(&self, cluster: u64) -> Option<bool> {
        let chunk = self.chunks.get(&(cluster / CHUNK))?;
        Some(chunk.counted_once >> (cluster % CHUNK) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_end_at_the_highest_refcount() {
        let mut references = References::new(1, 1 << 20);
        assert_eq!(references.add(70, 1).unwrap(), 0);
        assert_eq!(references.add(70, 2).unwrap(), 2);
        assert_eq!((references.get(70), references.get(71)), (1, 0));
        let mut wide = References::new(u64::MAX, 1 << 20);
        wide.add(0, 5).unwrap();
        assert_eq!(wide.add(0, u64::from(u32::MAX)).unwrap(), 5);
    }

    #[test]
    fn referred_clusters_are_found_in_order() {
        let mut references = References::new(9, 1 << 20);
        for cluster in [3, 64, 1 << 50] {
            references.add(cluster, 2).unwrap();
        }
        assert_eq!(references.next(0, 64), Some((3, 2)));
        assert_eq!(references.next(4, 64), None);
        assert_eq!(references.next(4, 65), Some((64, 2)));
        assert_eq!(references.next(65, u64::MAX), Some((1 << 50, 2)));
        assert_eq!(references.end(), (1 << 50) + 1);
    }

    #[test]
    fn memory_is_bounded() {
        let mut references = References::new(9, 10 * CHUNK_BYTES);
        for chunk in 0..10 {
            references.add(chunk * CHUNK, 1).unwrap();
        }
        references.add(5, 1).unwrap();
        assert_eq!(references.add(11 * CHUNK, 1).unwrap_err().kind(), ErrorKind::Limit);
    }
}
