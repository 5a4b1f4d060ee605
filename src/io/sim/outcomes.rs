//! Every state in which a power loss at this moment may leave one file: for tests
//! that try all of them where [`SimDisk::crash`](super::SimDisk::crash) draws one.
//!
//! States are told apart by a sum of hashes over the sectors, so that whoever
//! tries many of them pays only for the sectors that differ, and can skip a state
//! that was seen before without building it.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use super::SimDisk;
use super::content::{Content, OpId, SECTOR, Sector, put};
use super::file::Counters;
use super::journal::OpKind;
use super::rng::Rng;
use super::world::{FileState, Op, State, World};

/// The changes of a file that a power loss may undo, as they are at one moment.
pub struct AtStake {
    disk: SimDisk,
    file: usize,
    content: Content,
    /// Sectors with more than one possible content.
    sectors: Vec<Uncertain>,
    /// How many sectors each change touches, in order of issue.
    changes: Vec<usize>,
    /// The lengths that the file may have, beginning with the durable one.
    lengths: Vec<u64>,
    /// Of what is durable.
    sum: u64,
}

/// A sector that may hold what is durable or any of its versions.
struct Uncertain {
    sector: u64,
    /// Oldest first.
    versions: Vec<Version>,
}

struct Version {
    /// By index of the change, and of the sector in it.
    change: (usize, usize),
    value: Sector,
    /// What it adds to the sum in place of what is durable.
    delta: u64,
}

/// One of the states.
pub struct Remains {
    /// The same for two states that hold the same bytes.
    pub fingerprint: u64,
    sectors: Vec<(u64, Sector)>,
    length: u64,
}

fn hash(sector: u64, bytes: &[u8]) -> u64 {
    if bytes.iter().all(|byte| *byte == 0) {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    (sector, bytes).hash(&mut hasher);
    hasher.finish()
}

fn sum_of(content: &Content) -> u64 {
    let pages = content.durable.iter();
    let sectors = pages
        .flat_map(|(offset, page)| (offset / SECTOR..).zip(page.chunks_exact(SECTOR as usize)));
    sectors.fold(0, |sum, (sector, bytes)| sum.wrapping_add(hash(sector, bytes)))
}

/// The sectors that are not certain, and how many each operation has touched.
fn uncertain(content: &Content) -> (Vec<Uncertain>, Vec<usize>) {
    let versions = content.sectors.values().flatten();
    let ops: BTreeSet<OpId> = versions.map(|version| version.op).collect();
    let index: BTreeMap<OpId, usize> = ops.into_iter().zip(0..).collect();
    let mut changes = vec![0; index.len()];
    let mut sectors = Vec::new();
    for (&sector, found) in &content.sectors {
        let mut old = [0; SECTOR as usize];
        content.durable.read(sector * SECTOR, &mut old);
        let old = hash(sector, &old);
        let mut versions: Vec<Version> = Vec::new();
        for version in found {
            let change = index[&version.op];
            let known = versions.iter().find(|other| other.change.0 == change);
            let at = known.map_or(changes[change], |other| other.change.1);
            changes[change] = changes[change].max(at + 1);
            let new = version.value.as_ref().map_or(0, |bytes| hash(sector, &bytes[..]));
            let (value, delta) = (version.value.clone(), new.wrapping_sub(old));
            versions.push(Version { change: (change, at), value, delta });
        }
        sectors.push(Uncertain { sector, versions });
    }
    (sectors, changes)
}

impl SimDisk {
    /// What is at stake for a file if power is lost now. `None` if there is no
    /// such file.
    pub fn at_stake(&self, name: &str) -> Option<AtStake> {
        let world = self.world();
        let file = world.files.iter().position(|file| file.name == name)?;
        let mut content = world.files[file].content.clone();
        for (id, op) in world.ops.iter().filter(|(_, op)| op.file == file) {
            if world.may_still_happen(op) {
                op.change(*id, &mut content, op.len);
            }
        }
        let (sectors, changes) = uncertain(&content);
        let later = content.lengths.iter().map(|version| version.value);
        let mut lengths: Vec<u64> = [content.durable_length].into_iter().chain(later).collect();
        lengths.dedup();
        let sum = sum_of(&content);
        drop(world);
        Some(AtStake { disk: self.clone(), file, content, sectors, changes, lengths, sum })
    }

    /// Whether a sync of this file was asked for that has not taken effect: what
    /// is at stake now is about to become durable. The number of the sync.
    pub fn sync_due(&self, name: &str) -> Option<u64> {
        let world = self.world();
        let file = world.files.iter().position(|file| file.name == name)?;
        let due = |op: &Op| op.file == file && op.kind == OpKind::Sync && op.state == State::Issued;
        world.ops.iter().find(|(_, op)| due(op)).map(|(id, _)| *id)
    }
}

impl AtStake {
    /// Number of changes that may be undone, each on its own.
    pub fn changes(&self) -> usize {
        self.changes.len()
    }

    /// Number of sectors that a change touches.
    pub fn sectors(&self, change: usize) -> usize {
        self.changes[change]
    }

    /// Number of lengths that the file may have.
    pub fn lengths(&self) -> usize {
        self.lengths.len()
    }

    /// The state in which those sectors (by index, of changes by index) persist
    /// that `kept` says so of, and one of the lengths.
    ///
    /// The last one kept of several versions of a sector is what it holds. Where a
    /// length cuts something off, it is gone, whatever was kept.
    pub fn remains(&self, length: usize, kept: impl Fn(usize, usize) -> bool) -> Remains {
        let length = self.lengths[length];
        let (mut fingerprint, mut sectors) = (self.sum, Vec::new());
        // What lies behind the end makes no difference.
        let inside = |sector: &&Uncertain| sector.sector * SECTOR < length;
        for Uncertain { sector, versions } in self.sectors.iter().filter(inside) {
            let last = versions.iter().rfind(|v| kept(v.change.0, v.change.1));
            if let Some(last) = last {
                fingerprint = fingerprint.wrapping_add(last.delta);
                sectors.push((*sector, last.value.clone()));
            }
        }
        let mut hasher = DefaultHasher::new();
        (fingerprint, length).hash(&mut hasher);
        Remains { fingerprint: hasher.finish(), sectors, length }
    }

    /// A disk on which the file is in this state, and the others as they are.
    pub fn disk(&self, remains: &Remains) -> SimDisk {
        let world = self.disk.world();
        let mut after = World::new(world.rng.clone().next_u64());
        for (index, file) in world.files.iter().enumerate() {
            let mut content = if index == self.file {
                let mut pages = self.content.durable.clone();
                for (sector, value) in &remains.sectors {
                    put(&mut pages, *sector, value);
                }
                pages.cut(remains.length);
                Content::settled(pages, remains.length)
            } else {
                Content::settled(file.content.visible.clone(), file.content.length)
            };
            content.firsts.clone_from(&file.content.firsts);
            let (name, options) = (file.name.clone(), file.options.clone());
            let counters = Counters::default();
            let (owed, retired) = (None, false);
            let file = FileState { name, options, content, counters, owed, retired };
            after.files.push(file);
        }
        SimDisk(Arc::new(Mutex::new(after)))
    }

    /// States worth a try, each as what `remains` takes. All of them, sector tears
    /// apart, while that is no more than `most`; else those in which one change
    /// alone is kept or lost, or in which all up to one are kept, and a seeded
    /// sample. Then some in which one change is torn.
    pub fn tries(&self, most: usize, seed: u64) -> Vec<Remains> {
        let (changes, mut rng) = (self.changes.len(), Rng::new(seed));
        let mut sets: BTreeSet<u64> = BTreeSet::new();
        let all = u64::MAX.checked_shr(64 - changes.min(64) as u32).unwrap_or(0);
        if changes < 16 && (1 << changes) * self.lengths.len() <= most {
            sets.extend(0..=all);
        } else {
            sets.extend([0, all]);
            for bit in (0..changes.min(64)).map(|index| 1 << index) {
                sets.extend([bit, all & !bit, all & (bit - 1)]);
            }
            while sets.len() < most {
                let (a, b) = (rng.next_u64(), rng.next_u64());
                sets.insert(*rng.pick(&[a, a & b, a | b]) & all);
                if changes < 8 && sets.len() == 1 << changes {
                    break;
                }
            }
        }
        let lengths = 0..self.lengths.len();
        let has = |set: u64, index: usize| set >> index.min(63) & 1 == 1;
        let mut tries: Vec<Remains> = Vec::new();
        for set in sets {
            let states = lengths.clone().map(|l| self.remains(l, |index, _| has(set, index)));
            tries.extend(states);
        }
        let last_length = self.lengths.len() - 1;
        for torn in (0..changes).filter(|torn| self.sectors(*torn) > 1) {
            let count = self.sectors(torn);
            let cut = rng.between(1, count as u64 - 1) as usize;
            let alone = rng.below(count as u64) as usize;
            for others in [0, all] {
                for way in 0..3 {
                    let kept = |index: usize, at: usize| match way {
                        _ if index != torn => has(others, index),
                        0 => at < cut,
                        1 => at >= cut,
                        _ => (at == alone) != (others == 0),
                    };
                    tries.push(self.remains(last_length, kept));
                }
            }
        }
        tries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::engine::Piece;
    use crate::io::sim::engine::Operation;
    use crate::io::sim::{FileOptions, SimFile};
    use crate::sys::memory::GuestRef;

    fn write(disk: &SimDisk, file: &SimFile, offset: u64, byte: u8, sectors: usize) {
        let data = vec![byte; sectors * SECTOR as usize];
        let pieces = [Piece::Guest(GuestRef::from_slice(&data))];
        disk.block_on(Operation::write(file, &pieces, offset)).unwrap();
    }

    #[test]
    fn all_states_are_tried_told_apart_and_built_as_told() {
        let disk = SimDisk::new(1);
        let file = disk.create_with("f", FileOptions::default(), &[1; 2048]);
        write(&disk, &file, 0, 2, 1);
        write(&disk, &file, 0, 3, 2);
        write(&disk, &file, 2048, 4, 1);
        let stake = disk.at_stake("f").unwrap();
        assert_eq!((stake.changes(), stake.lengths()), (3, 2));
        let mut seen: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        for remains in stake.tries(64, 1) {
            let bytes = stake.disk(&remains).file("f").unwrap().bytes();
            let known = *seen.entry(bytes).or_insert(remains.fingerprint);
            assert_eq!(known, remains.fingerprint, "one state, two fingerprints");
        }
        let fingerprints: BTreeSet<u64> = seen.values().copied().collect();
        assert_eq!(fingerprints.len(), seen.len(), "two states, one fingerprint");
        let found = |byte: fn(&[u8]) -> bool| seen.keys().any(|bytes| byte(bytes));
        assert!(found(|bytes| bytes[0] == 2 && bytes[512] == 1));
        assert!(found(|bytes| bytes[0] == 3 && bytes[512] == 3));
        assert!(found(|bytes| bytes[0] == 1 && bytes[512] == 3), "a tear");
        // The last write made the file longer: that may be lost alone.
        assert!(found(|bytes| bytes.len() == 2048));
        assert!(found(|bytes| bytes.len() == 2560 && bytes[2048] == 0));
        assert!(found(|bytes| bytes.len() == 2560 && bytes[2048] == 4));
        disk.block_on(Operation::sync(&file)).unwrap();
        let stake = disk.at_stake("f").unwrap();
        assert_eq!((stake.changes(), stake.lengths()), (0, 1));
        assert_eq!(stake.disk(&stake.remains(0, |_, _| false)).file("f").unwrap().bytes()[0], 3);
    }
}
