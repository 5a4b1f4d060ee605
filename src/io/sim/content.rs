//! What a simulated file holds: the bytes that readers see, the bytes that
//! would survive a power loss, and each change in between.
//!
//! The durable state is kept by sector of 512 bytes. A sector that was changed
//! since it was last made durable has its later versions listed, oldest first;
//! after a power loss it holds any one of them, or the durable one. So an older
//! version never covers a newer durable one, and changes of different sectors,
//! of one operation too, reach the medium in any order. The length is treated
//! in the same way, on its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::pages::{PAGE, Pages};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// Names an operation; unique in a disk and rising with the time of issue.
pub(super) type OpId = u64;
/// Orders changes as readers see them.
pub(super) type Seq = u64;

/// A sector's content; `None` is zero.
pub(super) type Sector = Option<Arc<[u8; SECTOR as usize]>>;

/// What a sector or the length was changed to, when, and by whom.
#[derive(Clone, Debug)]
pub(super) struct Version<T> {
    pub(super) seq: Seq,
    pub(super) op: OpId,
    pub(super) value: T,
}

/// An operation whose changes are not (all) durable.
#[derive(Clone, Default, Debug)]
pub(super) struct Unsynced {
    /// When it completed, counted in completions; `None` while in flight.
    completed: Option<u64>,
    /// A failed sync forgot it: no later sync will make it durable.
    lost: bool,
    sectors: Vec<u64>,
}

#[derive(Clone, Default, Debug)]
pub(super) struct Content {
    pub(super) visible: Pages,
    pub(super) length: u64,
    pub(super) durable: Pages,
    pub(super) durable_length: u64,
    pub(super) sectors: BTreeMap<u64, Vec<Version<Sector>>>,
    pub(super) lengths: Vec<Version<u64>>,
    unsynced: BTreeMap<OpId, Unsynced>,
    seq: Seq,
    /// All that the first sector was seen to hold, oldest first: in most formats
    /// the header, which no crash may turn into something that never was.
    pub(super) firsts: Vec<Sector>,
}

impl Content {
    /// Bytes that are visible and durable, as a file that lay there for long.
    pub(super) fn settled(bytes: Pages, length: u64) -> Content {
        Content {
            firsts: vec![sector_of(&bytes, 0)],
            visible: bytes.clone(),
            length,
            durable: bytes,
            durable_length: length,
            ..Content::default()
        }
    }

    /// The same after whoever made the changes was killed: readers see what they
    /// saw, and what no sync has covered is still to be made durable, by the next
    /// sync of anybody. All of it has completed before anything that comes now. (What
    /// a failed sync forgot counts among it: nobody could make it durable or tell
    /// that it is not, so it would only hide what can be.)
    pub(super) fn left_by_process(mut self) -> Content {
        for unsynced in self.unsynced.values_mut() {
            unsynced.completed = Some(0);
            unsynced.lost = false;
        }
        self
    }

    /// A write, or a part of one, takes effect.
    pub(super) fn write(&mut self, op: OpId, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = offset + data.len() as u64;
        self.visible.write(offset, data);
        self.record(op, offset / SECTOR..end.div_ceil(SECTOR));
        // Whoever makes this write durable makes the length durable too, also
        // where it was another write, still in flight, that moved the end.
        if end > self.length || !self.lengths.is_empty() {
            self.set_length(op, end.max(self.length));
        }
    }

    /// A range reads as zero from now on; the end does not move.
    pub(super) fn zero(&mut self, op: OpId, offset: u64, len: u64, keep_space: bool) {
        let end = offset.saturating_add(len).min(self.length);
        if offset >= end {
            return;
        }
        if keep_space {
            self.visible.write(offset, &vec![0; (end - offset) as usize]);
        } else {
            self.visible.punch(offset, end - offset);
        }
        self.record_zero(op, offset, end);
    }

    /// The length changes.
    pub(super) fn truncate(&mut self, op: OpId, length: u64) {
        if length < self.length {
            self.visible.punch(length, self.length - length);
            self.record_zero(op, length, self.length);
        } else {
            self.record(op, []);
        }
        self.set_length(op, length);
    }

    fn set_length(&mut self, op: OpId, length: u64) {
        self.length = length;
        self.lengths.push(Version { seq: self.seq, op, value: length });
    }

    /// Notes new versions of those sectors in a range that are not zero both
    /// here and on the medium.
    fn record_zero(&mut self, op: OpId, start: u64, end: u64) {
        let range = start / SECTOR..end.div_ceil(SECTOR);
        let pages = self.durable.range(start, end - start);
        let durable = pages.flat_map(|at| at / SECTOR..(at + PAGE) / SECTOR);
        let durable = durable.filter(|sector| range.contains(sector));
        let pending = self.sectors.range(range.clone()).map(|(sector, _)| *sector);
        let sectors: BTreeSet<u64> = durable.chain(pending).collect();
        self.record(op, sectors);
    }

    /// Notes new versions of these sectors.
    fn record(&mut self, op: OpId, sectors: impl IntoIterator<Item = u64>) {
        self.seq += 1;
        let unsynced = self.unsynced.entry(op).or_default();
        for sector in sectors {
            let value = sector_of(&self.visible, sector);
            if sector == 0 {
                self.firsts.push(value.clone());
            }
            let version = Version { seq: self.seq, op, value };
            self.sectors.entry(sector).or_default().push(version);
            unsynced.sectors.push(sector);
        }
    }

    /// An operation's future completed, as the `stamp`th of all.
    pub(super) fn complete(&mut self, op: OpId, stamp: u64) {
        if let Some(unsynced) = self.unsynced.get_mut(&op) {
            unsynced.completed = Some(stamp);
        }
    }

    /// Makes durable what had completed by `stamp`.
    pub(super) fn sync(&mut self, stamp: u64) {
        let ops = self.claimed(stamp);
        let mut touched = Vec::new();
        for op in &ops {
            touched.extend(self.unsynced.remove(op).map(|done| done.sectors).unwrap_or_default());
        }
        for sector in touched {
            let versions = self.sectors.get(&sector).into_iter().flatten();
            let claimed = versions.filter(|v| ops.contains(&v.op));
            if let Some(seq) = claimed.map(|v| v.seq).max() {
                self.persist_sector(sector, seq);
            }
        }
        if let Some(seq) = self.lengths.iter().rfind(|v| ops.contains(&v.op)).map(|v| v.seq) {
            self.persist_length(seq);
        }
    }

    /// Makes a sector durable as it was seen at `seq`.
    pub(super) fn persist_sector(&mut self, sector: u64, seq: Seq) {
        let Some(versions) = self.sectors.get_mut(&sector) else { return };
        let count = versions.partition_point(|v| v.seq <= seq);
        if let Some(last) = versions.drain(..count).next_back() {
            put(&mut self.durable, sector, &last.value);
        }
        if versions.is_empty() {
            self.sectors.remove(&sector);
        }
    }

    /// Makes the length durable as it was seen at `seq`. What a cut removed
    /// by then is gone, and does not come back when the file grows again.
    pub(super) fn persist_length(&mut self, seq: Seq) {
        let count = self.lengths.partition_point(|v| v.seq <= seq);
        for version in self.lengths.drain(..count).collect::<Vec<_>>() {
            if version.value < self.durable_length {
                let cut = self.sectors.range(version.value / SECTOR..);
                for sector in cut.map(|(sector, _)| *sector).collect::<Vec<_>>() {
                    self.persist_sector(sector, version.seq);
                }
            }
            self.durable_length = version.value;
        }
    }

    /// A sync failed: the system forgets that these changes were to be written.
    /// They stay visible, and the next sync will say that all is well.
    pub(super) fn fail_sync(&mut self, stamp: u64) {
        for op in self.claimed(stamp) {
            if let Some(unsynced) = self.unsynced.get_mut(&op) {
                unsynced.lost = true;
            }
        }
    }

    fn claimed(&self, stamp: u64) -> BTreeSet<OpId> {
        let by_then = |unsynced: &Unsynced| unsynced.completed.is_some_and(|at| at <= stamp);
        let claimed = self.unsynced.iter().filter(|(_, u)| by_then(u) && !u.lost);
        claimed.map(|(op, _)| *op).collect()
    }

    /// The operations that a power loss may undo.
    pub(super) fn unsynced(&self) -> impl Iterator<Item = OpId> {
        self.unsynced.keys().copied()
    }

    /// Whether readers see the same bytes.
    pub(super) fn same_bytes(&self, other: &Content) -> bool {
        let contained = |a: &Content, b: &Content| {
            a.visible.iter().all(|(offset, bytes)| {
                let mut theirs = [0; PAGE as usize];
                b.visible.read(offset, &mut theirs);
                *bytes == theirs
            })
        };
        self.length == other.length && contained(self, other) && contained(other, self)
    }
}

/// A sector's content.
fn sector_of(pages: &Pages, sector: u64) -> Sector {
    let mut bytes = [0; SECTOR as usize];
    pages.read(sector * SECTOR, &mut bytes);
    (bytes != [0; SECTOR as usize]).then(|| Arc::new(bytes))
}

/// Puts a sector's content into place.
pub(super) fn put(pages: &mut Pages, sector: u64, value: &Sector) {
    match value {
        Some(bytes) => pages.write(sector * SECTOR, &bytes[..]),
        None => pages.punch(sector * SECTOR, SECTOR),
    }
}
