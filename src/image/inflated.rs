//! What was decompressed last: small reads come in rows, and a cluster should be
//! decompressed once for all of them. And what is needed for that, ready for the next.
//!
//! It knows where the data came from, not what became of it: who gives a place to
//! other data has it forgotten first.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::format::compressed::Compressed;
use crate::format::compression::Context;

/// Most clusters that are kept, and most bytes, but for the last two clusters.
const MOST: usize = 16;
const MOST_BYTES: usize = 4 << 20;

/// Most contexts that are kept, some 100 KiB each: so many threads find theirs ready.
const MOST_CONTEXTS: usize = 8;

#[derive(Default)]
pub struct Inflated {
    /// Decompressed clusters, the one used last in front.
    clusters: Mutex<Vec<Entry>>,
    /// Contexts that nobody is using.
    contexts: Mutex<Vec<Context>>,
}

struct Entry {
    /// Of which layer.
    layer: usize,
    /// From where.
    data: Compressed,
    /// The bytes of the cluster.
    bytes: Arc<Vec<u8>>,
}

impl Inflated {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what decompresses, without any lock.
    pub fn with_context<R>(&self, work: impl FnOnce(&mut Context) -> R) -> R {
        let contexts = || self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut context = contexts().pop().unwrap_or_default();
        let result = work(&mut context);
        let mut contexts = contexts();
        if contexts.len() < MOST_CONTEXTS {
            contexts.push(context);
        }
        result
    }

    /// The cluster whose data lies there, if it is remembered.
    pub fn get(&self, layer: usize, data: Compressed) -> Option<Arc<Vec<u8>>> {
        let mut entries = self.lock();
        let known = entries.iter().position(|entry| entry.layer == layer && entry.data == data)?;
        entries[..=known].rotate_right(1);
        entries.first().map(|entry| entry.bytes.clone())
    }

    /// Remembers a cluster. To be called from inside the epoch in which its place was
    /// looked up.
    pub fn put(&self, layer: usize, data: Compressed, bytes: Arc<Vec<u8>>) {
        let most = (MOST_BYTES / bytes.len().max(1)).clamp(2, MOST);
        let mut entries = self.lock();
        entries.retain(|entry| entry.layer != layer || entry.data != data);
        entries.truncate(most - 1);
        entries.insert(0, Entry { layer, data, bytes });
    }

    /// The topmost image is about to put other data into these bytes of its file.
    pub fn forget(&self, bytes: Range<u64>) {
        mutant!(InflatedOutlivesPlace => return);
        self.lock().retain(|Entry { layer, data, .. }| {
            *layer != 0 || data.offset >= bytes.end || data.offset + data.length <= bytes.start
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Compressed {
        Compressed { offset, length: 512 }
    }

    fn cluster(len: usize) -> Arc<Vec<u8>> {
        Arc::new(vec![0; len])
    }

    #[test]
    fn what_was_used_last_stays() {
        let inflated = Inflated::default();
        for n in 0..MOST as u64 {
            inflated.put(0, at(n * 512), cluster(4096));
        }
        assert!(inflated.get(0, at(0)).is_some(), "all have room");
        inflated.put(0, at(1 << 20), cluster(4096));
        assert!(inflated.get(0, at(0)).is_some() && inflated.get(0, at(1 << 20)).is_some());
        assert!(inflated.get(0, at(512)).is_none(), "it was used the longest ago");
        assert!(inflated.get(1, at(0)).is_none(), "another layer's");
    }

    #[test]
    fn large_clusters_take_bounded_memory() {
        let inflated = Inflated::default();
        for n in 0..9 {
            inflated.put(0, at(n * 512), cluster(2 << 20));
        }
        assert_eq!(inflated.lock().len(), 2);
        inflated.put(0, at(0), cluster(2 << 20));
        inflated.put(0, at(0), cluster(2 << 20));
        assert_eq!(inflated.lock().len(), 2);
        assert!(inflated.get(0, at(8 * 512)).is_some(), "once is enough for each");
    }

    #[test]
    fn a_place_that_gets_other_data_is_forgotten() {
        let inflated = Inflated::default();
        for layer in 0..2 {
            for n in 0..4 {
                inflated.put(layer, at(n * 512), cluster(4096));
            }
        }
        inflated.forget(512..1025);
        let known = |layer| (0..4).filter(|n| inflated.get(layer, at(n * 512)).is_some()).count();
        assert_eq!((known(0), known(1)), (2, 4));
        assert!(inflated.get(0, at(0)).is_some() && inflated.get(0, at(3 * 512)).is_some());
    }
}
