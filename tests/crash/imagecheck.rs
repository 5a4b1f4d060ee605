//! A strict checker of images, for tests: all that `qemu-img check` complains
//! about, and what it lets pass though no driver in its senses would write it.
//! Each finding begins with the invariant that is broken (docs/crash-simulation.md).

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::layout::*;

#[derive(Default, Debug)]
pub struct Report {
    /// One line for each thing that is wrong.
    pub corruptions: Vec<String>,
    /// What is wrong only to a strict eye: `qemu-img check` lets it pass.
    pub strict: Vec<String>,
    /// Clusters with a refcount above the number of their references.
    pub leaks: Vec<u64>,
    /// Those among them that `qemu-img check` sees: inside the file.
    pub leaks_inside: usize,
    /// Refcounts may lag behind.
    pub dirty: bool,
}

impl Report {
    /// Everything that is wrong, but for leaks.
    pub fn faults(&self) -> Vec<String> {
        self.corruptions.iter().chain(&self.strict).cloned().collect()
    }
}

/// Who refers to a cluster.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Owner {
    /// A structure that nothing else may share.
    Structure(Rc<str>),
    /// An L2 table, by the part of the disk it maps.
    L2(u64),
    /// A cluster of the guest's.
    Data(u64),
    /// A part of it holds a compressed cluster of the guest's.
    Compressed(u64),
}

struct Check<'a> {
    file: &'a dyn ReadAt,
    header: Header,
    refcounts: Refcounts,
    owners: BTreeMap<u64, Vec<Owner>>,
    report: Report,
}

/// Checks an image.
pub fn check(file: &dyn ReadAt) -> Report {
    let header = match Header::read(file) {
        Ok(header) => header,
        Err(what) => {
            return Report { corruptions: vec![format!("I1: {what}")], ..Report::default() };
        }
    };
    let mut report = Report { dirty: header.incompatible & DIRTY != 0, ..Report::default() };
    if header.incompatible & CORRUPT != 0 {
        report.strict.push("I8: the corrupt bit is set".to_owned());
    }
    let refcounts = header.read_refcounts(file);
    let mut check = Check { file, header, refcounts, owners: BTreeMap::new(), report };
    check.structures();
    check.tree("active", check.header.l1, true);
    let (snapshots, _) = check.header.read_snapshots(file);
    for (index, l1) in snapshots.into_iter().enumerate() {
        check.tree(&format!("snapshot {index}"), l1, false);
    }
    check.bitmaps();
    check.compare();
    check.sharing();
    check.report
}

impl Check<'_> {
    fn corrupt(&mut self, what: String) {
        self.report.corruptions.push(what);
    }

    fn strict(&mut self, what: String) {
        self.report.strict.push(what);
    }

    /// Notes references to the clusters of a range of bytes. As QEMU has it, a
    /// range may reach past the end of the file by less than a cluster.
    fn own(&mut self, owner: Owner, bytes: Range<u64>) {
        let cluster = self.header.cluster;
        if bytes.is_empty() {
            return;
        }
        if bytes.end > self.file.length() && bytes.end - self.file.length() >= cluster {
            self.corrupt(format!(
                "I2: {owner:?} at {:#x} is past the end of the file",
                bytes.start
            ));
            return;
        }
        for index in bytes.start / cluster..bytes.end.div_ceil(cluster) {
            self.owners.entry(index).or_default().push(owner.clone());
        }
    }

    fn structure(&mut self, name: impl Into<String>, offset: u64, len: u64) {
        let name = name.into();
        if offset % self.header.cluster != 0 || (offset == 0 && len > 0) {
            self.corrupt(format!("I2: {name} is at {offset:#x}"));
        } else {
            self.own(Owner::Structure(name.into()), offset..offset + len);
        }
    }

    /// Header, tables of fixed place, refcount blocks.
    fn structures(&mut self) {
        let header = self.header.clone();
        let cluster = header.cluster;
        self.own(Owner::Structure("header".into()), 0..cluster);
        self.structure("active L1 table", header.l1.offset, header.l1.entries * 8);
        self.structure("refcount table", header.reftable.offset, header.reftable.entries * 8);
        let (snapshots, bytes) = header.read_snapshots(self.file);
        self.structure("snapshot table", header.snapshots.offset, bytes);
        for (index, l1) in snapshots.into_iter().enumerate() {
            self.structure(format!("L1 table of snapshot {index}"), l1.offset, l1.entries * 8);
        }
        for (index, entry) in header.read_table(self.file, header.reftable).into_iter().enumerate()
        {
            let offset = bits(entry, 9..64);
            if bits(entry, 0..9) != 0 {
                self.corrupt(format!("I2: refcount table entry {index} is {entry:#x}"));
            } else if offset != 0 {
                self.structure(format!("refcount block {index}"), offset, cluster);
            }
        }
        if let Some(luks) = header.extension(LUKS) {
            self.structure("LUKS header", be64(luks, 0), be64(luks, 8));
        }
    }

    /// An L1 table and all that hangs on it.
    fn tree(&mut self, name: &str, l1: Table, active: bool) {
        let cluster = self.header.cluster;
        let covers = self.header.l2_entries() * cluster;
        for (index, entry) in self.header.read_table(self.file, l1).into_iter().enumerate() {
            let guest = index as u64 * covers;
            let offset = bits(entry, 9..56);
            let copied = entry >> 63 == 1;
            if entry == 0 {
                continue;
            }
            let at = || format!("{name} L1 entry {index} is {entry:#x}");
            if bits(entry, 0..9) | bits(entry, 56..63) != 0 {
                self.corrupt(format!("I2: {}: reserved bits", at()));
            }
            if offset == 0 {
                if copied {
                    self.strict(format!("I5: {}: COPIED without a table", at()));
                }
                continue;
            }
            if offset % cluster != 0 {
                self.corrupt(format!("I2: {}: unaligned", at()));
                continue;
            }
            self.own(Owner::L2(guest), offset..offset + cluster);
            if active && copied != (self.refcounts.get(offset / cluster) == 1) {
                self.copied(format!("{}: refcount {}", at(), self.refcounts.get(offset / cluster)));
            }
            let table = self.file.bytes(offset, cluster);
            for index in 0..self.header.l2_entries() {
                let entry = self.header.l2_entry(&table, index);
                let guest = guest + index * cluster;
                self.entry(name, entry, guest, active);
            }
        }
    }

    /// The COPIED flag is wrong. While refcounts lag, it says nothing.
    fn copied(&mut self, what: String) {
        if !self.report.dirty {
            self.corrupt(format!("I5: {what}: COPIED is wrong"));
        }
    }

    fn entry(&mut self, name: &str, entry: Entry, guest: u64, active: bool) {
        let cluster = self.header.cluster;
        let bitmap = entry.bitmap.unwrap_or(0);
        if entry.word | bitmap == 0 {
            return;
        }
        let at = || format!("{name} L2 entry of {guest:#x}, {:#x} {bitmap:#x}", entry.word);
        if entry.reserved != 0 {
            self.corrupt(format!("I2: {}: reserved bits", at()));
        }
        if entry.bitmap.is_some() && !matches!(entry.kind, Kind::Compressed(_)) {
            if entry.word & 1 == 1 {
                self.strict(format!("I6: {}: the zero flag is not for extended entries", at()));
            }
            if entry.allocated() & entry.zero() != 0 {
                self.corrupt(format!("I6: {}: subclusters both allocated and zero", at()));
            }
        }
        match entry.kind.clone() {
            Kind::Unallocated => {
                if entry.copied {
                    self.strict(format!("I5: {}: COPIED without a cluster", at()));
                }
                if entry.allocated() != 0 {
                    self.corrupt(format!("I6: {}: subclusters of no cluster are allocated", at()));
                }
            }
            Kind::Normal(offset) if self.header.data_file() => {
                if offset != guest || !entry.copied {
                    self.strict(format!("I2: {}: not the mapping of a data file", at()));
                }
            }
            Kind::Normal(offset) => {
                if offset % cluster != 0 {
                    self.corrupt(format!("I2: {}: unaligned", at()));
                }
                self.own(Owner::Data(guest), offset..offset + cluster);
                let refcount = self.refcounts.get(offset / cluster);
                if active && entry.copied != (refcount == 1) {
                    self.copied(format!("{}: refcount {refcount}", at()));
                }
            }
            Kind::Compressed(bytes) => {
                if entry.copied {
                    self.corrupt(format!("I5: {}: COPIED and compressed", at()));
                }
                if entry.bitmap.is_some_and(|bitmap| bitmap != 0) {
                    self.corrupt(format!("I6: {}: compressed with a bitmap", at()));
                    return;
                }
                if self.header.data_file() {
                    self.corrupt(format!("I2: {}: compressed in a data file", at()));
                    return;
                }
                self.own(Owner::Compressed(guest), bytes);
            }
        }
    }

    fn bitmaps(&mut self) {
        let Some(extension) = self.header.extension(BITMAPS) else { return };
        if self.header.autoclear & 1 == 0 {
            return;
        }
        let cluster = self.header.cluster;
        let (count, len, offset) = (be32(extension, 0), be64(extension, 8), be64(extension, 16));
        self.structure("bitmap directory", offset, len);
        let directory = self.file.bytes(offset, len);
        let mut at = 0;
        for index in 0..count {
            let entry = &directory[at..];
            let table = Table { offset: be64(entry, 0), entries: be32(entry, 8) };
            self.structure(format!("table of bitmap {index}"), table.offset, table.entries * 8);
            for (part, word) in self.header.read_table(self.file, table).into_iter().enumerate() {
                let offset = bits(word, 9..56);
                if word & !(1 | offset) != 0 || (word & 1 == 1 && offset != 0) {
                    self.corrupt(format!("I2: part {part} of bitmap {index} is {word:#x}"));
                } else if offset != 0 {
                    self.structure(format!("part {part} of bitmap {index}"), offset, cluster);
                }
            }
            at += (24 + be16(entry, 18) + be32(entry, 20)).next_multiple_of(8) as usize;
        }
    }

    /// Refcounts against references.
    fn compare(&mut self) {
        let inside = self.file.length().div_ceil(self.header.cluster);
        let owners = std::mem::take(&mut self.owners);
        for (cluster, owners) in &owners {
            let (refcount, references) = (self.refcounts.get(*cluster), owners.len() as u64);
            if refcount < references && !self.report.dirty {
                self.corrupt(format!("I4: cluster {cluster:#x}: refcount {refcount}, {owners:?}"));
            }
        }
        for (cluster, refcount) in self.refcounts.in_use() {
            if refcount > owners.get(&cluster).map_or(0, |owners| owners.len() as u64) {
                self.report.leaks.push(cluster);
                self.report.leaks_inside += usize::from(cluster < inside);
            }
        }
        self.owners = owners;
    }

    /// A cluster may have several owners only where snapshots see the same
    /// thing, or where compressed clusters lie side by side.
    fn sharing(&mut self) {
        for (cluster, mut owners) in std::mem::take(&mut self.owners) {
            owners.sort();
            owners.dedup();
            let compressed = owners.iter().all(|owner| matches!(owner, Owner::Compressed(_)));
            if owners.len() > 1 && !compressed {
                self.strict(format!("I3: cluster {cluster:#x} belongs to {owners:?}"));
            }
        }
    }
}
