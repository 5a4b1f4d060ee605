//! Where an image's metadata lives, so that no write ever lands on it, whatever
//! a corrupt image says (QEMU: "overlap check"). Against what writes are checked is the
//! caller's choice; nothing of it is ever freed, or made a hole, whatever that is.
//!
//! Kept up to date by whoever adds or drops a table; asked before every write.
//! The question is answered without a lock unless the answer may be yes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use super::overlap_check::OverlapCheck;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;

/// A kind of metadata; several may (in a corrupt image) share a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Metadata {
    /// The first cluster.
    Header = 1,
    /// The active L1 table.
    L1 = 2,
    /// An L2 table that the active L1 names.
    L2 = 4,
    /// The refcount table.
    RefcountTable = 8,
    /// A refcount block.
    RefcountBlock = 16,
    /// The snapshot table.
    SnapshotTable = 32,
    /// A snapshot's L1 table.
    InactiveL1 = 64,
    /// The directory of persistent bitmaps.
    BitmapDirectory = 128,
    /// An L2 table that a snapshot's L1 names; known only where it is asked for.
    InactiveL2 = 256,
    /// The LUKS header, with the keys.
    EncryptionHeader = 512,
}

/// What must never be freed as if it were data. (L2 tables that snapshots share are
/// given up by the active state as well.)
const GUARDED: u16 = !(Metadata::InactiveL2 as u16);

impl Metadata {
    /// All kinds, in the order in which one is named that is hit.
    pub(super) const ALL: [Metadata; 10] = [
        Metadata::Header,
        Metadata::L1,
        Metadata::L2,
        Metadata::RefcountTable,
        Metadata::RefcountBlock,
        Metadata::SnapshotTable,
        Metadata::InactiveL1,
        Metadata::BitmapDirectory,
        Metadata::InactiveL2,
        Metadata::EncryptionHeader,
    ];

    /// Its name in "overlap-check.NAME", if it has one.
    pub(super) fn option_name(self) -> Option<&'static str> {
        Some(match self {
            Metadata::Header => "main-header",
            Metadata::L1 => "active-l1",
            Metadata::L2 => "active-l2",
            Metadata::RefcountTable => "refcount-table",
            Metadata::RefcountBlock => "refcount-block",
            Metadata::SnapshotTable => "snapshot-table",
            Metadata::InactiveL1 => "inactive-l1",
            Metadata::InactiveL2 => "inactive-l2",
            Metadata::BitmapDirectory => "bitmap-directory",
            // QEMU does not check for it.
            Metadata::EncryptionHeader => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Metadata::Header => "the header",
            Metadata::L1 => "the active L1 table",
            Metadata::L2 => "an active L2 table",
            Metadata::RefcountTable => "the refcount table",
            Metadata::RefcountBlock => "a refcount block",
            Metadata::SnapshotTable => "the snapshot table",
            Metadata::InactiveL1 => "the L1 table of a snapshot",
            Metadata::BitmapDirectory => "the bitmap directory",
            Metadata::InactiveL2 => "an L2 table of a snapshot",
            Metadata::EncryptionHeader => "the encryption header",
        }
    }
}

/// The set of clusters that hold metadata.
pub struct OverlapIndex {
    cluster_bits: u32,
    /// Kinds that writes are checked against.
    checked: u16,
    /// One bit for each hash of a cluster that was ever in the set.
    filter: Box<[AtomicU64]>,
    clusters: RwLock<HashMap<u64, Held>>,
}

/// What a cluster holds.
#[derive(Clone, Copy, Default)]
struct Held {
    /// Bits of [`Metadata`].
    kinds: u16,
    /// How many L1 entries name it as an L2 table: more than one, in a corrupt
    /// image, and it stays one until the last of them is gone.
    l2_tables: u32,
}

impl OverlapIndex {
    /// An index that holds the header, with room for `expected` clusters.
    /// `OutOfMemory`.
    pub fn new(cluster_bits: u32, expected: usize, check: OverlapCheck) -> Result<OverlapIndex> {
        let words = (expected / 2).next_power_of_two().clamp(512, 1 << 16);
        let mut clusters = HashMap::new();
        clusters.try_reserve(expected).map_err(|_| {
            let text = format!("no memory to remember {expected} tables");
            Error::new(ErrorKind::OutOfMemory, text)
        })?;
        let index = OverlapIndex {
            cluster_bits,
            checked: check.kinds(),
            filter: fallible::collect(words, (0..words).map(|_| AtomicU64::new(0)))?.into(),
            clusters: RwLock::new(clusters),
        };
        index.add(0, 1, Metadata::Header);
        Ok(index)
    }

    #[inline]
    fn filter_bit(&self, cluster: u64) -> (&AtomicU64, u64) {
        let hash = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let word = (hash >> 38) as usize & (self.filter.len() - 1);
        (&self.filter[word], 1 << (hash >> 32 & 63))
    }

    /// Memory that so many clusters take, in bytes.
    pub fn bytes_for(clusters: u64) -> u64 {
        clusters.saturating_mul(17)
    }

    /// Memory held, in bytes.
    pub fn bytes(&self) -> u64 {
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        self.filter.len() as u64 * 8 + OverlapIndex::bytes_for(clusters.capacity() as u64)
    }

    /// `bytes` from `offset` on hold metadata now.
    pub fn add(&self, offset: u64, bytes: u64, kind: Metadata) {
        let mut clusters = self.clusters.write().unwrap_or_else(PoisonError::into_inner);
        for cluster in self.clusters_of(offset, bytes) {
            let held = clusters.entry(cluster).or_default();
            held.kinds |= kind as u16;
            held.l2_tables += u32::from(kind == Metadata::L2);
            let (word, bit) = self.filter_bit(cluster);
            word.fetch_or(bit, Ordering::Release);
        }
    }

    /// The cluster at `offset` holds metadata of this kind now; whether that is news.
    pub fn add_new(&self, offset: u64, kind: Metadata) -> bool {
        let known = self.kinds(offset >> self.cluster_bits) & kind as u16 != 0;
        if !known {
            self.add(offset, 1, kind);
        }
        !known
    }

    /// They do not any more.
    pub fn remove(&self, offset: u64, bytes: u64, kind: Metadata) {
        let mut clusters = self.clusters.write().unwrap_or_else(PoisonError::into_inner);
        for cluster in self.clusters_of(offset, bytes) {
            let Some(held) = clusters.get_mut(&cluster) else { continue };
            if kind == Metadata::L2 && held.l2_tables > 1 {
                held.l2_tables -= 1;
                continue;
            }
            held.kinds &= !(kind as u16);
            if held.kinds == 0 {
                clusters.remove(&cluster);
            }
        }
    }

    /// Where the last cluster that holds metadata ends.
    pub fn end(&self) -> u64 {
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        clusters.keys().max().map_or(0, |last| (last + 1) << self.cluster_bits)
    }

    #[inline]
    fn clusters_of(&self, offset: u64, bytes: u64) -> Range<u64> {
        let end = offset.saturating_add(bytes).saturating_sub(1);
        let first = offset >> self.cluster_bits;
        if bytes == 0 { first..first } else { first..(end >> self.cluster_bits) + 1 }
    }

    /// What metadata a cluster holds, if any.
    #[inline]
    fn kinds(&self, cluster: u64) -> u16 {
        let (word, bit) = self.filter_bit(cluster);
        if word.load(Ordering::Acquire) & bit == 0 {
            return 0;
        }
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        clusters.get(&cluster).map_or(0, |held| held.kinds)
    }

    /// `Corrupt` if a write of data there would hit metadata.
    #[inline]
    pub fn check_data(&self, offset: u64, bytes: u64) -> Result<()> {
        mutant!(MetadataNotProtected => return Ok(()));
        self.check(offset, bytes, 0)
    }

    /// `Corrupt` if one of these clusters, which are to be freed, holds metadata:
    /// an entry must have named it that had no right to.
    pub fn check_free(&self, mut clusters: Range<u64>) -> Result<()> {
        match clusters.find(|cluster| self.kinds(*cluster) & GUARDED != 0) {
            Some(cluster) => {
                Err(refusal(&format!("free host cluster {cluster}"), self.kinds(cluster)))
            }
            None => Ok(()),
        }
    }

    /// Whether no metadata is in there that must not become a hole.
    pub fn may_punch(&self, offset: u64, bytes: u64) -> bool {
        self.clusters_of(offset, bytes).all(|cluster| self.kinds(cluster) & GUARDED == 0)
    }

    /// As `check_free`, where tables of this kind are to be freed as well.
    pub fn check_free_but(&self, cluster: u64, own: Option<Metadata>) -> Result<()> {
        match self.kinds(cluster) & GUARDED & !own.map_or(0, |own| own as u16) {
            0 => Ok(()),
            kinds => Err(refusal(&format!("free host cluster {cluster}"), kinds)),
        }
    }

    /// `Corrupt` if a write of a table of this kind would hit metadata of another.
    pub fn check_table(&self, offset: u64, bytes: u64, own: Metadata) -> Result<()> {
        self.check(offset, bytes, own as u16)
    }

    /// The same for L2 tables in which the flags of shared clusters change: they may be
    /// tables of snapshots, too.
    pub fn check_shared_tables(&self, offset: u64, bytes: u64) -> Result<()> {
        self.check(offset, bytes, Metadata::L2 as u16 | Metadata::InactiveL2 as u16)
    }

    #[inline]
    fn check(&self, offset: u64, bytes: u64, own: u16) -> Result<()> {
        for cluster in self.clusters_of(offset, bytes) {
            let kinds = self.kinds(cluster) & self.checked & !own;
            if kinds != 0 {
                return Err(refusal(&format!("write {bytes} bytes at {offset:#x}"), kinds));
            }
        }
        Ok(())
    }
}

#[cold]
fn refusal(what: &str, kinds: u16) -> Error {
    let hit = Metadata::ALL.iter().find(|kind| kinds & **kind as u16 != 0);
    let name = hit.map_or("metadata", |kind| kind.name());
    Error::corrupt(format!(
        "refused to {what}: {name} is there (the image is corrupt: qemu-img check)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_protected_until_removed() {
        let index = OverlapIndex::new(16, 0, OverlapCheck::default()).unwrap();
        assert!(index.check_data(0xffff, 1).is_err(), "the header's whole cluster");
        index.add(0x30000, 8, Metadata::L1);
        index.add(0x30000, 8, Metadata::L2);
        assert!(index.check_data(0x2ffff, 2).is_err());
        assert!(index.check_data(0x20000, 0x10000).is_ok());
        assert!(index.check_table(0x30000, 8, Metadata::L1).is_err());
        index.remove(0x30000, 8, Metadata::L2);
        assert!(index.check_table(0x30000, 8, Metadata::L1).is_ok());
        index.remove(0x30000, 8, Metadata::L1);
        assert!(index.check_data(0x30000, 8).is_ok());
    }

    #[test]
    fn a_table_that_was_added_twice_must_be_removed_twice() {
        let index = OverlapIndex::new(16, 0, OverlapCheck::default()).unwrap();
        for _ in 0..2 {
            index.add(0x30000, 0x10000, Metadata::L2);
        }
        index.remove(0x30000, 0x10000, Metadata::L2);
        assert!(index.check_data(0x30000, 8).is_err() && index.check_free(2..4).is_err());
        index.remove(0x30000, 0x10000, Metadata::L2);
        assert!(index.check_data(0x30000, 8).is_ok() && index.check_free(2..4).is_ok());
    }

    #[test]
    fn what_is_not_checked_may_be_written_but_not_freed() {
        let mut check = OverlapCheck::default();
        check.set("", "none").unwrap().unwrap();
        check.set(".active-l1", "on").unwrap().unwrap();
        let index = OverlapIndex::new(16, 0, check).unwrap();
        index.add(0x30000, 8, Metadata::L1);
        assert!(index.check_data(0, 8).is_ok() && index.check_data(0x30000, 8).is_err());
        assert!(index.check_free(0..1).is_err() && !index.may_punch(0, 8));
        index.add(0x40000, 8, Metadata::InactiveL2);
        assert!(index.check_free(4..5).is_ok() && index.may_punch(0x40000, 8));
    }

    #[test]
    fn absurd_offsets_do_not_overflow() {
        let index = OverlapIndex::new(9, 0, OverlapCheck::default()).unwrap();
        assert!(index.check_data(u64::MAX - 100, 1 << 9).is_ok());
        assert!(index.check_data(u64::MAX, 0).is_ok());
    }
}
