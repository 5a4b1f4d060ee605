//! Checking: everything in an image that refers to a cluster is counted, and compared
//! with the image's refcounts. Works on a storage and its header, with no image open.
//!
//! Findings and their numbers are those of `qemu-img check`, also where an image is
//! so broken that other numbers would do as well. Unlike there, a table that is
//! referred to often (by snapshots, or by somebody who wants to keep us busy) is
//! not read for each of them, and memory is bounded by the image's "max-metadata-size".
//!
//! This file knows the order of the check and what is counted besides clusters of
//! data; `tables` knows L1 and L2 tables, `counts` compares with the refcounts,
//! `repair` makes them what they should be.

mod counts;
mod references;
mod repair;
mod tables;

use std::collections::BTreeMap;

use self::counts::Blocks;
use self::references::References;
pub use self::repair::repair;
use self::tables::L2Uses;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::bitmap::{self, BitmapCluster};
use crate::format::header::Header;
use crate::format::limits::MAX_L1_BYTES;
use crate::format::refcount::RefcountWidth;
use crate::format::snapshot::Snapshot;
use crate::geometry::Geometry;
use crate::io::engine::Engine;
use crate::io::storage::Storage;
use crate::metadata::snapshot_table::read_snapshots;
use crate::metadata::tables::{read, words_of};

/// What a check has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// What contradicts itself, or is used without being counted.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Where the last cluster in use ends: bytes in the image file.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those of them that have a place in the image file.
    pub allocated_clusters: u64,
    /// Those of them that do not follow their neighbour, or are compressed.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Space is wasted, no more.
    Leak,
    /// The image is damaged.
    Corruption,
    /// Something could not be looked at.
    Unchecked,
}

/// One thing that a check has found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where in the image file, in bytes.
    pub host_offset: u64,
    /// What it is, for people.
    pub message: String,
}

/// Who wants to know how a check goes. Called on the checking thread.
pub trait Observer: Send {
    /// Something was found.
    fn finding(&mut self, _finding: &Finding) {}

    /// `done` of `total` tables and blocks have been looked at; `total` may change.
    /// False: stop, with the error `Cancelled`.
    fn progress(&mut self, _done: u64, _total: u64) -> bool {
        true
    }
}

impl Observer for () {}

/// Checks the image on a storage, while nobody writes to it. `memory`: how many
/// bytes may be taken. `result` is right also if the check could not be completed.
pub async fn check<E: Engine>(
    engine: &E,
    storage: &Storage,
    header: &Header,
    memory: u64,
    observer: &mut dyn Observer,
    result: &mut CheckResult,
) -> Result<()> {
    let mut check = Check::new(engine, storage, header, memory, observer)?;
    let outcome = check.run().await;
    *result = check.result;
    outcome.map_err(|error| error.context(format!("checking {}", storage.name())))
}

/// A check under way.
struct Check<'a, E> {
    engine: &'a E,
    storage: &'a Storage,
    header: &'a Header,
    geometry: Geometry,
    width: RefcountWidth,
    /// Bytes of the image file, in whole sectors.
    length: u64,
    references: References,
    /// The first thing that refers to clusters and could not be counted.
    uncounted: Option<String>,
    /// Memory for everything else, in bytes.
    memory: u64,
    result: CheckResult,
    observer: &'a mut dyn Observer,
    done: u64,
    total: u64,
}

impl<'a, E: Engine> Check<'a, E> {
    fn new(
        engine: &'a E,
        storage: &'a Storage,
        header: &'a Header,
        memory: u64,
        observer: &'a mut dyn Observer,
    ) -> Result<Check<'a, E>> {
        let (geometry, width) = (header.geometry, RefcountWidth::new(header.refcount_order)?);
        let total_clusters = geometry.clusters_for(header.virtual_size());
        Ok(Check {
            engine,
            storage,
            header,
            geometry,
            width,
            length: storage.length()?.next_multiple_of(512),
            references: References::new(width.max(), memory / 2),
            uncounted: None,
            memory: memory / 2,
            result: CheckResult { total_clusters, ..CheckResult::default() },
            observer,
            done: 0,
            total: 0,
        })
    }

    async fn run(&mut self) -> Result<()> {
        let uses = self.count().await?;
        let mut blocks = Blocks::load(self).await?;
        self.refcount_blocks(&blocks)?;
        self.compare(&mut blocks).await?;
        self.copied_flags(&uses, &mut blocks).await
    }

    /// Counts everything but the refcount blocks.
    async fn count(&mut self) -> Result<L2Uses> {
        let (snapshots, table_bytes) = self.snapshots().await?;
        let mut uses = L2Uses::default();
        self.refer("the header", 0, self.geometry.cluster_size(), 1)?;
        self.l1_table(self.header.l1_offset, self.header.l1_size, 1, true, &mut uses).await?;
        self.snapshot_l1s(&snapshots, &mut uses).await?;
        self.refer("the snapshot table", self.header.snapshots_offset, table_bytes, 1)?;
        let reftable = u64::from(self.header.reftable_clusters) * self.geometry.cluster_size();
        self.total = uses.tables.len() as u64 * 2 + reftable / 8;
        self.l2_tables(&uses).await?;
        self.refer("the refcount table", self.header.reftable_offset, reftable, 1)?;
        if let Some(crypto) = self.header.extensions.crypto {
            self.refer("the encryption header", crypto.offset, crypto.length, 1)?;
        }
        self.bitmaps().await?;
        Ok(uses)
    }

    /// Takes memory off what may be used.
    fn reserve(&mut self, bytes: u64) -> Result<()> {
        self.memory = self.memory.checked_sub(bytes).ok_or_else(|| {
            let text = "checking takes more than \"max-metadata-size\"";
            Error::new(ErrorKind::Limit, text)
        })?;
        Ok(())
    }

    /// Reads metadata. A failure is one of the check.
    async fn read(&mut self, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let found = read(self.engine, self.storage, offset, bytes as usize).await;
        if let Err(error) = &found {
            self.unchecked(offset, error.message(), 1);
        }
        found
    }

    async fn read_words(&mut self, offset: u64, count: u64) -> Result<Vec<u64>> {
        let bytes = self.read(offset, count * 8).await?;
        fallible::collect(count as usize, words_of(&bytes))
    }

    /// One more table or block has been looked at.
    fn step(&mut self) -> Result<()> {
        self.done += 1;
        self.total = self.total.max(self.done);
        match self.observer.progress(self.done, self.total) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Cancelled, "stopped by the progress function")),
        }
    }

    fn tell(&mut self, severity: Severity, host_offset: u64, message: String, times: u64) {
        let message = match times {
            1 => message,
            _ => format!("{message} ({times} times)"),
        };
        self.observer.finding(&Finding { severity, host_offset, message });
    }

    fn corrupt(&mut self, host_offset: u64, message: String, times: u64) {
        self.result.corruptions += times;
        self.tell(Severity::Corruption, host_offset, message, times);
    }

    /// What is damaged in such a way that its references are not counted.
    fn uncounted(&mut self, host_offset: u64, message: String, times: u64) {
        self.uncounted.get_or_insert_with(|| message.clone());
        self.corrupt(host_offset, message, times);
    }

    fn unchecked(&mut self, host_offset: u64, message: String, times: u64) {
        self.result.check_errors += times;
        self.tell(Severity::Unchecked, host_offset, message, times);
    }

    fn leaked(&mut self, host_offset: u64, message: String) {
        self.result.leaks += 1;
        self.tell(Severity::Leak, host_offset, message, 1);
    }

    /// Counts references to all clusters that a range touches. It may end past the
    /// end of the file, by less than a cluster.
    fn refer(&mut self, what: &str, offset: u64, bytes: u64, times: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let end = offset.saturating_add(bytes);
        if end >= self.length.saturating_add(self.geometry.cluster_size()) {
            let text = format!("{what} ({bytes} bytes) lies past the end of the file");
            self.uncounted(offset, text, times);
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        for cluster in offset >> bits..=(end - 1) >> bits {
            let lost = self.references.add(cluster, times)?;
            if lost > 0 {
                let text = format!("cluster {cluster} has more references than a refcount counts");
                self.uncounted(cluster << bits, text, lost);
            }
        }
        Ok(())
    }

    /// The clusters that the file has, or that are referred to.
    fn clusters(&self) -> u64 {
        self.references.end().max(self.geometry.clusters_for(self.length))
    }

    /// The snapshots' L1 tables, and the bytes of the snapshot table.
    async fn snapshots(&mut self) -> Result<(Vec<Snapshot>, u64)> {
        let header = self.header;
        let place = header.check_snapshot_table();
        if let Err(error) = place {
            self.unchecked(header.snapshots_offset, error.message(), 1);
            return Err(error);
        }
        let mut snapshots = Vec::new();
        let mut room = self.memory;
        let found = read_snapshots(self.engine, self.storage, header, |snapshot| {
            let bytes = (snapshot.id.len() + snapshot.name.len() + 256) as u64;
            room = room.checked_sub(bytes).ok_or_else(|| {
                Error::new(ErrorKind::Limit, "the snapshots take more than \"max-metadata-size\"")
            })?;
            snapshots.push(Snapshot { extra: Vec::new(), ..snapshot });
            Ok(())
        });
        let bytes = match found.await {
            Ok(bytes) => bytes,
            Err(error) => {
                self.unchecked(header.snapshots_offset, error.message(), 1);
                return Err(error);
            }
        };
        self.memory = room;
        if header.version >= 3 {
            for (index, _) in snapshots.iter().enumerate().filter(|(_, s)| s.disk_size.is_none()) {
                let text = format!("entry {index} of the snapshot table is incomplete");
                self.corrupt(header.snapshots_offset, text, 1);
            }
        }
        Ok((snapshots, bytes))
    }

    /// The L1 tables of snapshots. Those that are in the same place are one.
    async fn snapshot_l1s(&mut self, snapshots: &[Snapshot], uses: &mut L2Uses) -> Result<()> {
        if self.header.external_data_file() && !snapshots.is_empty() {
            let text = "an image with an external data file has snapshots".to_owned();
            self.uncounted(self.header.snapshots_offset, text, 1);
        }
        let mut tables = BTreeMap::new();
        for snapshot in snapshots {
            let name = String::from_utf8_lossy(&snapshot.name);
            let bytes = u64::from(snapshot.l1_size) * 8;
            if self.geometry.in_cluster(snapshot.l1_offset) != 0 {
                let text = format!("the L1 table of snapshot {name:?} is not aligned to a cluster");
                self.uncounted(snapshot.l1_offset, text, 1);
            } else if bytes > MAX_L1_BYTES {
                let text = format!("the L1 table of snapshot {name:?} is too large");
                self.uncounted(snapshot.l1_offset, text, 1);
            } else {
                *tables.entry((snapshot.l1_offset, snapshot.l1_size)).or_default() += 1;
            }
        }
        for ((offset, entries), times) in tables {
            self.l1_table(offset, entries, times, false, uses).await?;
        }
        Ok(())
    }

    /// The directory of persistent bitmaps, their tables, their bits.
    async fn bitmaps(&mut self) -> Result<()> {
        let Some(extension) = self.header.extensions.bitmaps else { return Ok(()) };
        let (offset, bytes) = (extension.directory_offset, extension.directory_size);
        self.refer("the bitmap directory", offset, bytes, 1)?;
        if let Err(error) = extension.check_directory() {
            self.corrupt(offset, error.message(), 1);
            return Err(error);
        }
        self.reserve(2 * bytes)?;
        let directory = self.read(offset, bytes).await?;
        let entries = match bitmap::parse_directory(&directory, extension.count) {
            Ok(entries) => entries,
            Err(error) => {
                self.corrupt(offset, error.message(), 1);
                return Err(error);
            }
        };
        for entry in entries {
            if let Err(error) = entry.check(self.geometry, self.header.virtual_size()) {
                self.corrupt(entry.table_offset, error.message(), 1);
                return Err(error);
            }
            self.bitmap_table(entry.table_offset, entry.table_entries.into()).await?;
        }
        Ok(())
    }

    async fn bitmap_table(&mut self, offset: u64, entries: u64) -> Result<()> {
        const PIECE: u64 = 16 << 10;
        self.refer("the table of a bitmap", offset, entries * 8, 1)?;
        for first in (0..entries).step_by(PIECE as usize) {
            let at = offset + first * 8;
            for entry in self.read_words(at, PIECE.min(entries - first)).await? {
                match BitmapCluster::decode(entry, self.geometry) {
                    Ok(BitmapCluster::Stored(bits)) => {
                        let size = self.geometry.cluster_size();
                        self.refer("a cluster of a bitmap", bits.get(), size, 1)?;
                    }
                    Ok(BitmapCluster::Zeros | BitmapCluster::Ones) => {}
                    Err(error) => self.uncounted(at, error.message(), 1),
                }
            }
            self.step()?;
        }
        Ok(())
    }
}
