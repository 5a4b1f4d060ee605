//! A refcount checker of its own: counts what the tables refer to and compares
//! it with what the refcount blocks say, also past the end of the file, where
//! `qemu-img check` does not look.

use std::collections::BTreeMap;
use std::path::Path;

use super::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, field};

/// References found, by host cluster.
#[derive(Default)]
struct References {
    counts: BTreeMap<u64, u64>,
    cluster_bits: u32,
}

impl References {
    fn add(&mut self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        for cluster in offset >> self.cluster_bits..=(offset + bytes - 1) >> self.cluster_bits {
            *self.counts.entry(cluster).or_default() += 1;
        }
    }
}

/// Everything that an L1 table leads to.
fn walk(image: &Dissected, l1: (u64, u64), references: &mut References) {
    let (offset, entries) = l1;
    references.add(offset, entries * 8);
    for index in 0..entries {
        let table = image.u64((offset + index * 8) as usize) & OFFSET;
        if table == 0 {
            continue;
        }
        references.add(table, image.cluster_size());
        for (descriptor, _) in image.table(table) {
            if descriptor & COMPRESSED != 0 {
                let (offset, bytes) = image.compressed(descriptor);
                references.add(offset, bytes);
            } else if descriptor & OFFSET != 0 && !image.has_data_file() {
                references.add(descriptor & OFFSET, image.cluster_size());
            }
        }
    }
}

/// By host cluster: what the refcount blocks say, and what the tables refer to.
fn counts_and_references(image: &Dissected) -> (BTreeMap<u64, u64>, BTreeMap<u64, u64>) {
    let size = image.cluster_size();
    let mut references = References { cluster_bits: image.cluster_bits(), ..Default::default() };
    references.add(0, size);
    walk(image, (image.l1_offset(), image.l1_size()), &mut references);
    let (snapshots, end) = image.snapshots();
    for l1 in &snapshots {
        walk(image, *l1, &mut references);
    }
    if !snapshots.is_empty() {
        let start = image.u64(field::SNAPSHOTS_OFFSET);
        references.add(start, end - start);
    }
    let table = image.reftable();
    references.add(image.u64(field::REFTABLE_OFFSET), table.len() as u64 * 8);
    for block in table.iter().filter(|block| **block != 0) {
        references.add(*block, size);
    }

    let per_block = image.per_block();
    let mut counts = BTreeMap::new();
    for (index, block) in table.iter().enumerate().filter(|(_, block)| **block != 0) {
        for i in 0..per_block {
            let count = image.count_in(*block, i);
            if count != 0 {
                counts.insert(index as u64 * per_block + i, count);
            }
        }
    }
    (counts, references.counts)
}

/// Clusters that something leads to more often than they are counted: the next who
/// needs a cluster may take them. Leaks, the contrary, do no harm.
pub fn counted_too_low(image: &Dissected) -> Vec<u64> {
    let (counts, references) = counts_and_references(image);
    let low = |(cluster, found): &(&u64, &u64)| counts.get(*cluster).unwrap_or(&0) < *found;
    references.iter().filter(low).map(|(cluster, _)| *cluster).collect()
}

/// What is wrong with an image's refcounts and COPIED flags; empty if nothing is.
pub fn faults(image: &Dissected) -> Vec<String> {
    let size = image.cluster_size();
    let (counts, references) = counts_and_references(image);
    let mut faults = Vec::new();
    for (cluster, count) in &counts {
        let found = references.get(cluster).copied().unwrap_or(0);
        if found != *count {
            faults.push(format!("cluster {cluster}: refcount {count}, {found} references"));
        }
    }
    for (cluster, found) in &references {
        if !counts.contains_key(cluster) {
            faults.push(format!("cluster {cluster}: refcount 0, {found} references"));
        }
    }
    // COPIED, in the active tables only: those of snapshots are never written.
    let alone = |offset: u64| counts.get(&(offset / size)) == Some(&1);
    for index in 0..image.l1_size() {
        let entry = image.l1(index);
        let table = entry & OFFSET;
        if table == 0 {
            continue;
        }
        if (entry & COPIED != 0) != alone(table) {
            faults.push(format!("L1 entry {index}: {entry:#x} has COPIED wrong"));
        }
        for (i, (descriptor, bitmap)) in image.table(table).enumerate() {
            let wrong = match descriptor & COMPRESSED != 0 {
                true => descriptor & COPIED != 0 || bitmap != 0,
                // Nobody shares a data file, where offset 0 is a place like any other.
                false if image.has_data_file() => {
                    descriptor & OFFSET != 0 && descriptor & COPIED == 0
                }
                false if descriptor & OFFSET == 0 => descriptor & COPIED != 0,
                false => (descriptor & COPIED != 0) != alone(descriptor & OFFSET),
            };
            if wrong {
                faults.push(format!(
                    "L2 entry {i} of L1 entry {index}: {descriptor:#x} has COPIED (or bits) wrong"
                ));
            }
        }
    }
    faults
}

/// Fails unless all refcounts are exact and all COPIED flags right.
pub fn assert_exact(path: &Path) {
    let faults = faults(&Dissected::load(path));
    assert!(faults.is_empty(), "{}:\n{}", path.display(), faults.join("\n"));
}
