//! What is left of a simulated disk after a crash.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::SimDisk;
use super::content::{Content, OpId, SECTOR, Seq, Version};
use super::file::Counters;
use super::rng::Rng;
use super::world::{FileState, World};

/// What kind of crash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The process dies: what readers saw is left, and each operation in flight
    /// may or may not still be carried out. What no sync had made durable may still
    /// be lost when power is, until somebody syncs.
    Process,
    /// Power is lost: of what no sync had made durable, each unit of `unit`
    /// bytes holds its old content or any later one. 512 and 4096 are what
    /// devices and page caches do; 8 is hostile, and shows what is relied on.
    Power {
        /// Bytes that change together or not at all; a power of two.
        unit: u64,
    },
    /// As `Power`, but a unit that was being changed may hold neither: garbage.
    /// Hostile; shows what rests on units that change at once.
    Garbage {
        /// As there.
        unit: u64,
    },
}

impl SimDisk {
    /// A disk as a crash at this moment may leave it; `seed` says which. This
    /// disk stays as it is. Files keep their order, names and options.
    pub fn crash(&self, crash: Crash, seed: u64) -> SimDisk {
        let mut rng = Rng::new(seed);
        let world = self.world();
        let mut contents: Vec<Content> = world.files.iter().map(|f| f.content.clone()).collect();
        let mut in_flight: Vec<OpId> = world.ops.keys().copied().collect();
        rng.shuffle(&mut in_flight);
        let share = *rng.pick(&[0, 1, 2, 4]);
        for id in in_flight {
            let op = &world.ops[&id];
            if world.may_still_happen(op) && rng.chance(share, 4) {
                let upto = op.stop(&mut rng);
                op.change(id, &mut contents[op.file], upto);
            }
        }
        let mut ops: Vec<OpId> = contents.iter().flat_map(Content::unsynced).collect();
        ops.sort_unstable();
        let fates = Fates::draw(&ops, &mut rng);
        let mut after = World::new(rng.next_u64());
        after.go_on_from(&world);
        let after = SimDisk(Arc::new(Mutex::new(after)));
        for (file, mut content) in world.files.iter().zip(contents) {
            let firsts = std::mem::take(&mut content.firsts);
            let mut content = match crash {
                Crash::Process => content.left_by_process(),
                Crash::Power { unit } => power_loss(content, unit, false, &fates, &mut rng),
                Crash::Garbage { unit } => power_loss(content, unit, true, &fates, &mut rng),
            };
            content.firsts = firsts;
            let (name, options) = (file.name.clone(), file.options.clone());
            let counters = Counters::default();
            let (owed, retired) = (None, false);
            let file = FileState { name, options, content, counters, owed, retired };
            after.world().files.push(file);
        }
        after
    }
}

/// Which operations a power loss spares.
///
/// Drawn from several families, as independent coins would almost never drop
/// one operation alone or all but one.
pub(super) struct Fates {
    data: BTreeMap<OpId, Fate>,
    length: BTreeMap<OpId, bool>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Kept,
    Dropped,
    /// Some units persist, others do not.
    Torn,
}

impl Fates {
    /// Draws for these operations, which are in order of issue.
    pub(super) fn draw(ops: &[OpId], rng: &mut Rng) -> Fates {
        let family = rng.below(8);
        let chosen = ops.get(rng.below(ops.len() as u64) as usize).copied().unwrap_or(0);
        let keep = *rng.pick(&[0, 1, 4, 7, 8]);
        let mut data = BTreeMap::new();
        let mut length = BTreeMap::new();
        for &op in ops {
            let fate = match family {
                0 if op == chosen => Fate::Dropped,
                1 if op == chosen => Fate::Kept,
                2 if op == chosen => Fate::Torn,
                0 | 2 => Fate::Kept,
                1 => Fate::Dropped,
                3 if op <= chosen => Fate::Kept,
                3 => Fate::Dropped,
                4 => Fate::Torn,
                5 => Fate::Dropped,
                _ if rng.chance(1, 8) => Fate::Torn,
                _ if rng.chance(keep, 8) => Fate::Kept,
                _ => Fate::Dropped,
            };
            data.insert(op, fate);
            // The end of the file moves on its own, yet mostly with the data.
            let with_data = fate != Fate::Dropped;
            length.insert(op, if rng.chance(1, 4) { rng.chance(1, 2) } else { with_data });
        }
        Fates { data, length }
    }

    fn keeps(&self, op: OpId, rng: &mut Rng) -> bool {
        match self.data.get(&op) {
            Some(Fate::Kept) => true,
            Some(Fate::Torn) => rng.chance(1, 2),
            Some(Fate::Dropped) | None => false,
        }
    }
}

/// The content of a file after power was lost; with `garbage`, a unit whose change
/// is among those torn may hold anything.
fn power_loss(
    mut file: Content,
    unit: u64,
    garbage: bool,
    fates: &Fates,
    rng: &mut Rng,
) -> Content {
    let kept = |v: &&Version<u64>| fates.length.get(&v.op).copied().unwrap_or(false);
    if let Some(seq) = file.lengths.iter().rfind(kept).map(|v| v.seq) {
        file.persist_length(seq);
    }
    let per_unit = unit.div_ceil(SECTOR);
    let mut units: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for &sector in file.sectors.keys() {
        units.entry(sector / per_unit).or_default().push(sector);
    }
    for sectors in units.into_values() {
        if unit < SECTOR {
            for sector in sectors {
                mix_words(&mut file, sector, unit, fates, rng);
            }
            continue;
        }
        let versions = sectors.iter().flat_map(|sector| &file.sectors[sector]);
        let mut changes: BTreeMap<Seq, OpId> = BTreeMap::new();
        changes.extend(versions.map(|v| (v.seq, v.op)));
        let torn = || changes.values().any(|op| fates.data.get(op) == Some(&Fate::Torn));
        if garbage && torn() && rng.chance(1, 4) {
            for sector in sectors {
                let bytes: Vec<u8> = (0..SECTOR).map(|_| rng.next_u64() as u8).collect();
                file.durable.write(sector * SECTOR, &bytes);
            }
            continue;
        }
        let kept = changes.into_iter().filter(|(_, op)| fates.keeps(*op, rng));
        if let Some((seq, _)) = kept.last() {
            for sector in sectors {
                file.persist_sector(sector, seq);
            }
        }
    }
    let (mut durable, length) = (file.durable, file.durable_length);
    durable.cut(length);
    Content::settled(durable, length)
}

/// Each unit within the sector holds the content of a moment of its own.
fn mix_words(file: &mut Content, sector: u64, unit: u64, fates: &Fates, rng: &mut Rng) {
    let versions = file.sectors.get(&sector).cloned().unwrap_or_default();
    for word in 0..SECTOR / unit {
        let Some(last) = versions.iter().rfind(|v| fates.keeps(v.op, rng)) else { continue };
        let range = (word * unit) as usize..((word + 1) * unit) as usize;
        let bytes = last.value.as_ref().map_or(&[0; SECTOR as usize], |bytes| &**bytes);
        file.durable.write(sector * SECTOR + word * unit, &bytes[range]);
    }
}
