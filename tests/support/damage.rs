//! Damage to images, where it hurts: fields of the header and entries of tables; and
//! what must not happen to such an image: that the guest's data lands on metadata.

use std::collections::BTreeSet;
use std::ops::Range;

use super::dissect::{COPIED, Dissected, OFFSET, field};

/// Where decisions come from: random numbers, or a fuzzer's bytes.
pub trait Choices {
    /// A number below `limit`, or 0.
    fn below(&mut self, limit: u64) -> u64;
}

/// Clusters that hold metadata, by what the tables say: those that are never freed
/// while the image is open, and those that the tables name now.
struct Map {
    constant: BTreeSet<u64>,
    tables: BTreeSet<u64>,
}

impl Map {
    fn of(image: &Dissected) -> Map {
        let length = image.bytes.len() as u64;
        let clusters = |range: Range<u64>| {
            let end = range.end.min(length);
            let bits = image.cluster_bits();
            range.start >> bits..end.div_ceil(1 << bits).max(range.start >> bits)
        };
        let l1 = image.l1_offset()..image.l1_offset() + image.l1_size() * 8;
        let mut constant: BTreeSet<u64> = clusters(0..1).chain(clusters(l1)).collect();
        if image.u32(field::SNAPSHOTS) > 0 {
            let (snapshots, end) = image.snapshots();
            constant.extend(clusters(image.u64(field::SNAPSHOTS_OFFSET)..end));
            for (l1, entries) in snapshots {
                constant.extend(clusters(l1..l1 + entries * 8));
            }
        }
        let entries = image.l1_size().min(length / 8);
        let aligned = |offset: &u64| *offset != 0 && offset % image.cluster_size() == 0;
        // A shared table is given up as soon as it is copied, before the L1 table in
        // the file says so.
        let tables = (0..entries)
            .map(|index| image.l1(index))
            .filter(|entry| entry & COPIED != 0)
            .map(|entry| entry & OFFSET)
            .chain(image.reftable().into_iter().map(|entry| entry & OFFSET))
            .filter(aligned)
            .map(|offset| offset >> image.cluster_bits())
            .collect();
        Map { constant, tables }
    }
}

/// Fails where data of the guest's came to lie where metadata is, or was before.
pub fn assert_no_data_in_metadata(before: &Dissected, after: &Dissected, guest: u8) {
    let (then, now) = (Map::of(before), Map::of(after));
    let hit =
        |cluster: &&u64| is_guests(after, **cluster, guest) && !is_guests(before, **cluster, guest);
    if let Some(cluster) = then.constant.iter().chain(&now.tables).find(hit) {
        panic!("guest data in cluster {cluster}, which holds metadata");
    }
}

/// Whether a cluster holds data of the guest's, which all consists of this byte.
fn is_guests(image: &Dissected, cluster: u64, guest: u8) -> bool {
    let size = image.cluster_size();
    let start = (cluster * size).min(image.bytes.len() as u64) as usize;
    let end = (start + size as usize).min(image.bytes.len());
    image.bytes[start..end].windows(48).any(|bytes| bytes == [guest; 48])
}

/// Places in the file that are worth damaging: fields, and entries of tables.
pub fn targets(image: &Dissected) -> Vec<Range<u64>> {
    let size = image.cluster_size();
    let table = image.u64(field::REFTABLE_OFFSET);
    let mut found = vec![
        4..112,
        4..112,
        112..600,
        image.l1_offset()..image.l1_offset() + image.l1_size() * 8,
        table..table + 32,
        image.reftable()[0]..image.reftable()[0] + size.min(256),
    ];
    for index in 0..image.l1_size() {
        let l2 = image.l1(index) & OFFSET;
        if l2 != 0 {
            found.push(l2..l2 + size.min(512));
        }
    }
    let (snapshots, end) = image.snapshots();
    for (l1, entries) in snapshots {
        found.push(l1..l1 + entries * 8);
        found.push(image.u64(field::SNAPSHOTS_OFFSET)..end);
    }
    found
}

/// Changes a few bytes, bits, or whole entries, some to what is likely to hurt.
/// `targets` are those of the image before any damage.
pub fn damage(image: &mut Dissected, targets: &[Range<u64>], rng: &mut impl Choices) {
    // The size of clusters may be damaged already.
    let size = 1u64 << image.cluster_bits().clamp(9, 21);
    let length = image.bytes.len() as u64;
    for _ in 0..rng.below(4) + 1 {
        let range = &targets[rng.below(targets.len() as u64) as usize];
        let at = (range.start + rng.below(range.end - range.start)) as usize;
        let entry = at & !7;
        let cluster = rng.below(length / size + 4) * size;
        match rng.below(8) {
            0 => image.put(at, &[rng.below(256) as u8]),
            1 => {
                let byte = image.bytes[at] ^ 1 << rng.below(8);
                image.put(at, &[byte]);
            }
            2 => image.put64(entry, cluster | 1 << 63),
            3 => image.put64(entry, cluster),
            4 => {
                let other = &targets[rng.below(targets.len() as u64) as usize];
                image.put64(entry, other.start & !(size - 1) | rng.below(2) << 63);
            }
            5 => {
                let extremes = [0, u64::MAX, 1 << 63, 1 << 62, (1 << 56) - size, 1 << 32];
                image.put64(entry, extremes[rng.below(6) as usize]);
            }
            6 => image.put32(at & !3, [0, 1, u32::MAX, 1 << 31][rng.below(4) as usize]),
            _ => {
                let bytes: [u8; 16] = std::array::from_fn(|_| rng.below(256) as u8);
                image.put(at, &bytes);
            }
        }
    }
}
