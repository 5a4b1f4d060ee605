//! Walking L1 and L2 tables: what they refer to, and whether their entries make
//! sense. How often a table is named does not matter for how often it is read.

use std::collections::BTreeMap;

use super::Check;
use super::counts::Blocks;
use crate::error::Result;
use crate::fallible;
use crate::format::compressed;
use crate::format::l2::{COMPRESSED, COPIED, ZERO};
use crate::format::limits::OFFSET_MASK;
use crate::io::engine::Engine;
use crate::metadata::tables::words_of;

/// Bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of an L2 entry that must be zero, unless it is compressed. The lowest bit
/// means nothing in extended entries, and nobody minds it there.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Memory for a table that was seen, in bytes.
const EACH: u64 = 64;

/// How often each L2 table, by its offset in the file, is named.
#[derive(Default)]
pub struct L2Uses {
    pub tables: BTreeMap<u64, Uses>,
}

/// How often something is named.
#[derive(Clone, Copy, Default)]
pub struct Uses {
    /// By the active L1 table.
    pub active: u64,
    /// By all L1 tables.
    pub all: u64,
}

/// What an L2 entry is to a check.
enum Kind {
    Compressed,
    /// It has a host cluster, of data or of zeroes.
    Standard,
    None,
}

/// One L2 entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    descriptor: u64,
    bitmap: u64,
    extended: bool,
    external: bool,
}

impl Entry {
    pub(super) fn offset(self) -> u64 {
        self.descriptor & OFFSET_MASK
    }

    /// Whether its host cluster is in the external data file.
    pub(super) fn is_external(self) -> bool {
        self.external
    }

    pub(super) fn descriptor(self) -> u64 {
        self.descriptor
    }

    pub(super) fn with_descriptor(self, descriptor: u64) -> Entry {
        Entry { descriptor, ..self }
    }

    /// As it lies in the table.
    pub(super) fn bytes(self) -> impl Iterator<Item = u8> {
        let second = self.extended.then(|| self.bitmap.to_be_bytes());
        self.descriptor.to_be_bytes().into_iter().chain(second.into_iter().flatten())
    }

    /// Whether it has a host cluster that is not compressed.
    pub(super) fn is_standard(self) -> bool {
        matches!(self.kind(), Kind::Standard)
    }

    fn kind(self) -> Kind {
        let zero = self.descriptor & ZERO != 0 && !self.extended;
        if self.descriptor & COMPRESSED != 0 {
            Kind::Compressed
        } else if self.offset() != 0 || self.external && self.copied() && !zero {
            Kind::Standard
        } else {
            Kind::None
        }
    }

    fn copied(self) -> bool {
        self.descriptor & COPIED != 0
    }

    fn allocated(self) -> u64 {
        self.bitmap & u64::from(u32::MAX)
    }
}

impl<E: Engine> Check<'_, E> {
    /// Counts an L1 table that is named so many times, and the L2 tables it names.
    pub(super) async fn l1_table(
        &mut self,
        offset: u64,
        entries: u32,
        times: u64,
        active: bool,
        uses: &mut L2Uses,
    ) -> Result<()> {
        let entries = u64::from(entries);
        self.refer("an L1 table", offset, entries * 8, times)?;
        self.reserve(entries * 8)?;
        for entry in self.read_words(offset, entries).await? {
            if entry == 0 {
                continue;
            }
            let table = entry & OFFSET_MASK;
            if entry & L1_RESERVED != 0 {
                let text = format!("L1 entry {entry:#018x} has reserved bits set");
                self.corrupt(offset, text, times);
            }
            if self.geometry.in_cluster(table) != 0 {
                let text = format!("L2 table at {table:#x} is not aligned to a cluster");
                self.corrupt(table, text, times);
            }
            self.refer("an L2 table", table, self.geometry.cluster_size(), times)?;
            if !uses.tables.contains_key(&table) {
                self.reserve(EACH)?;
            }
            let uses = uses.tables.entry(table).or_default();
            uses.all += times;
            uses.active += if active { times } else { 0 };
        }
        Ok(())
    }

    /// Counts what the L2 tables refer to.
    pub(super) async fn l2_tables(&mut self, uses: &L2Uses) -> Result<()> {
        for (table, uses) in &uses.tables {
            let entries = self.l2_entries(*table).await?;
            let mut expected = None;
            for entry in entries {
                self.l2_entry(*table, entry, *uses, &mut expected)?;
            }
            self.step()?;
        }
        Ok(())
    }

    pub(super) async fn l2_entries(&mut self, table: u64) -> Result<Vec<Entry>> {
        let geometry = self.geometry;
        let external = self.header.external_data_file();
        let bytes = self.read(table, geometry.cluster_size()).await?;
        let entries = bytes.chunks_exact(geometry.l2_entry_size() as usize).map(|entry| {
            let mut words = words_of(entry);
            Entry {
                descriptor: words.next().unwrap_or(0),
                bitmap: words.next().unwrap_or(0),
                extended: geometry.extended_l2,
                external,
            }
        });
        fallible::collect(entries.len(), entries)
    }

    /// `expected`: where the cluster behind the last one would be its neighbour.
    fn l2_entry(
        &mut self,
        table: u64,
        entry: Entry,
        uses: Uses,
        expected: &mut Option<u64>,
    ) -> Result<()> {
        let Entry { descriptor, bitmap, external, .. } = entry;
        let wrong = |what: &str| format!("L2 entry {descriptor:#018x} {what}");
        let size = self.geometry.cluster_size();
        if !matches!(entry.kind(), Kind::Compressed) && descriptor & L2_RESERVED != 0 {
            self.corrupt(table, wrong("has reserved bits set"), uses.all);
        }
        match entry.kind() {
            Kind::Compressed => {
                if entry.copied() {
                    let text = wrong("is compressed and has the COPIED flag");
                    self.corrupt(table, text, uses.all);
                }
                if external {
                    let text = wrong("is compressed, in an image with an external data file");
                    self.uncounted(table, text, uses.all);
                } else if bitmap != 0 {
                    let text = wrong("is compressed and has a subcluster bitmap");
                    self.uncounted(table, text, uses.all);
                } else {
                    let data = compressed::place(descriptor, self.geometry);
                    self.result.allocated_clusters += uses.active;
                    self.result.compressed_clusters += uses.active;
                    self.result.fragmented_clusters += uses.active;
                    self.refer("a compressed cluster", data.offset, data.length, uses.all)?;
                }
            }
            Kind::Standard => {
                let host = entry.offset();
                if bitmap >> 32 & bitmap != 0 {
                    let text = wrong("has subclusters both allocated and zero");
                    self.corrupt(table, text, uses.all);
                }
                if self.geometry.in_cluster(host) != 0 {
                    let text = wrong("points into a cluster");
                    self.corrupt(table, text, uses.all);
                }
                self.result.allocated_clusters += uses.active;
                if expected.is_some_and(|expected| expected != host) {
                    self.result.fragmented_clusters += uses.active;
                }
                *expected = Some(host + size);
                if !external {
                    self.refer("a cluster of data", host, size, uses.all)?;
                }
            }
            Kind::None if entry.allocated() != 0 => {
                let text = wrong("has allocated subclusters but no host cluster");
                self.corrupt(table, text, uses.all);
            }
            Kind::None => {}
        }
        Ok(())
    }

    /// The COPIED flag means that the refcount is one, in both directions, in what
    /// the active L1 table leads to.
    pub(super) async fn copied_flags(&mut self, uses: &L2Uses, blocks: &mut Blocks) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (offset, entries) = (self.header.l1_offset, u64::from(self.header.l1_size));
        for entry in self.read_words(offset, entries).await? {
            let table = entry & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            let counted_once = self.is_counted_once(table >> bits, blocks).await?;
            if counted_once.is_some_and(|once| once != (entry & COPIED != 0)) {
                let text = format!("the COPIED flag of L1 entry {entry:#018x} is wrong");
                self.corrupt(offset, text, 1);
            }
        }
        for (table, uses) in &uses.tables {
            let named = uses.active > 0 && *table != 0;
            if named && self.is_counted_once(table >> bits, blocks).await?.is_some() {
                self.copied_flags_of(*table, uses.active, blocks).await?;
            }
            self.step()?;
        }
        Ok(())
    }

    async fn copied_flags_of(&mut self, table: u64, times: u64, blocks: &mut Blocks) -> Result<()> {
        for entry in self.l2_entries(table).await? {
            if !entry.is_standard() {
                continue;
            }
            let cluster = entry.offset() >> self.geometry.cluster_bits;
            let counted_once = match entry.external {
                true => Some(true),
                false => self.is_counted_once(cluster, blocks).await?,
            };
            if counted_once.is_some_and(|once| once != entry.copied()) {
                let descriptor = entry.descriptor;
                let text = format!("the COPIED flag of L2 entry {descriptor:#018x} is wrong");
                self.corrupt(table, text, times);
            }
        }
        Ok(())
    }
}
