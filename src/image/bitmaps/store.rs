//! Writing bitmaps back when an image is closed, and the directory when one is removed.
//!
//! ```text
//! settle: everything that the guest has written is durable
//!     -> tables and bits, the directory, their refcounts: to free clusters
//!     -> sync -> the header names the directory -> sync
//!     -> the old directory and what it named are free
//! ```
//!
//! The directory that the header names before says IN_USE of everything that is stored,
//! the one it names afterwards is right: there is no third.

use std::ops::Range;
use std::sync::Arc;

use super::bits::Bits;
use super::{Bitmap, Bitmaps};
use crate::alloc::overlap::Metadata;
use crate::error::{Error, Result};
use crate::fallible;
use crate::format::bitmap::{BitmapCluster, BitmapEntry, encode_directory};
use crate::format::extensions::BitmapsExt;
use crate::format::header::Header;
use crate::geometry::HostOffset;
use crate::image::disk::Disk;
use crate::image::qcow2::{Qcow2, Writing};
use crate::io::engine::{Engine, Piece};
use crate::log;
use crate::metadata::tables::{read, read_table};
use crate::sys::memory::Block;

/// Bitmaps on their way into the file.
struct Store<'a, E> {
    engine: &'a E,
    image: &'a Qcow2,
    writing: &'a Writing,
    /// Clusters taken, while nothing refers to them.
    fresh: Vec<Range<u64>>,
}

impl Disk {
    /// Settles, and stores the bitmaps: what there is to do before an image is left.
    /// Bitmaps that cannot be stored stay marked as out of date in the file. `stored`:
    /// the bitmaps as they are there now, if they were stored; this disk must not be
    /// written to then.
    pub async fn put_away<E: Engine>(
        &self,
        engine: &E,
        stored: &mut Option<Bitmaps>,
    ) -> Result<()> {
        self.settle(engine).await?;
        let owed = self.bitmaps_now().filter(|bitmaps| bitmaps.owe());
        let (Some(image), Some(bitmaps)) = (self.top(), owed) else { return Ok(()) };
        let written = match Store::new(engine, image) {
            Ok(mut store) => store.store(bitmaps).await,
            Err(error) => Err(error),
        };
        let settled = self.settle(engine).await;
        *stored = Some(written.map_err(|error| {
            let name = image.storage.name();
            error.context(format!(
                "{name}: the persistent bitmaps could not be stored, and are out of date"
            ))
        })?);
        settled
    }

    /// Takes a bitmap out of the directory, durably, and frees what it has there; returns
    /// those that are left. On a settled disk; whatever comes of it, the image has to be
    /// read again.
    pub async fn drop_bitmap<E: Engine>(&self, engine: &E, index: usize) -> Result<Bitmaps> {
        let mut bitmaps = self.bitmaps(engine).await?.clone();
        let Some(image) = self.top() else { return Ok(bitmaps) };
        let entry = bitmaps.list.remove(index).entry;
        let Some(entry) = entry else { return Ok(bitmaps) };
        let mut store = Store::new(engine, image)?;
        let place = store.publish(&bitmaps.directory(), bitmaps.place).await;
        bitmaps.place = store.end(place).await?;
        store.free_table(&entry).await;
        Ok(bitmaps)
    }
}

impl<'a, E: Engine> Store<'a, E> {
    fn new(engine: &'a E, image: &'a Qcow2) -> Result<Self> {
        let writing = image.writing()?;
        writing.allocator.health.check()?;
        Ok(Store { engine, image, writing, fresh: Vec::new() })
    }

    async fn store(&mut self, bitmaps: &Bitmaps) -> Result<Bitmaps> {
        let mut old = Vec::new();
        let mut now = bitmaps.clone();
        let stored = async {
            for bitmap in &mut now.list {
                bitmap.entry = Some(self.store_one(bitmap, &mut old).await?);
            }
            mutant!(BitmapFreedEarly => for entry in &old {
                self.free_table(entry).await;
            });
            self.publish(&now.directory(), bitmaps.place).await
        }
        .await;
        now.place = self.end(stored).await?;
        mutant!(BitmapFreedEarly => return Ok(now));
        for entry in &old {
            self.free_table(entry).await;
        }
        Ok(now)
    }

    /// Writes a bitmap, if it has to be; returns its entry.
    async fn store_one(
        &mut self,
        bitmap: &Bitmap,
        old: &mut Vec<BitmapEntry>,
    ) -> Result<BitmapEntry> {
        match (&bitmap.bits, &bitmap.entry) {
            (Some(bits), Some(entry)) if bitmap.is_owed() && bits.changed() => {
                old.push(entry.clone());
                self.write_table(bitmap, bits).await
            }
            (Some(bits), None) => self.write_table(bitmap, bits).await,
            // What is in the file is what was loaded.
            (Some(_), Some(entry)) => Ok(BitmapEntry { flags: bitmap.flags(), ..entry.clone() }),
            (None, Some(entry)) => Ok(entry.clone()),
            (None, None) => Err(Error::invalid("a bitmap without bits")),
        }
    }

    async fn write_table(&mut self, bitmap: &Bitmap, bits: &Arc<Bits>) -> Result<BitmapEntry> {
        let geometry = self.image.geometry();
        let size = geometry.cluster_size();
        let entries = geometry.clusters_for(bits.stored_bytes());
        let alike = |index: u64| bits.are_alike(index * size, size);
        let stored = (0..entries).filter(|index| alike(*index) == (false, false)).count() as u64;
        let table_clusters = geometry.clusters_for(entries * 8);
        let place = self.take(table_clusters + stored).await?;
        let mut next = place.start + table_clusters;
        let mut table = fallible::room_for(entries as usize * 8)?;
        for index in 0..entries {
            let entry = match alike(index) {
                (true, _) => BitmapCluster::Zeros,
                (_, true) => BitmapCluster::Ones,
                _ => {
                    let offset = next << geometry.cluster_bits;
                    next += 1;
                    self.write(&bits.store(index * size, size)?, offset).await?;
                    let none = || Error::corrupt("a bitmap would be stored in the header");
                    BitmapCluster::Stored(HostOffset::new(offset).ok_or_else(none)?)
                }
            };
            table.extend(entry.encode().to_be_bytes());
        }
        let table_offset = place.start << geometry.cluster_bits;
        self.write(&table, table_offset).await?;
        Ok(BitmapEntry {
            table_offset,
            table_entries: entries as u32,
            flags: bitmap.flags(),
            granularity_bits: bitmap.granularity_bits,
            name: bitmap.name.clone(),
        })
    }

    async fn take(&mut self, count: u64) -> Result<Range<u64>> {
        let (allocator, storage) = (&self.writing.allocator, &self.image.storage);
        let clusters = allocator.allocate_together(self.engine, storage, count).await?;
        self.fresh.push(clusters.clone());
        Ok(clusters)
    }

    async fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let block = Block::from_bytes(bytes)?;
        let piece = [Piece::Block(block.slice(0, bytes.len()))];
        self.image.storage.write(self.engine, &piece, offset).await
    }

    /// Has the header name a directory of these entries, and frees the old one, `old`.
    async fn publish(
        &mut self,
        entries: &[BitmapEntry],
        old: Option<BitmapsExt>,
    ) -> Result<Option<BitmapsExt>> {
        let (engine, storage) = (self.engine, &self.image.storage);
        let allocator = &self.writing.allocator;
        let geometry = self.image.geometry();
        let mut place = None;
        if !entries.is_empty() {
            let bytes = encode_directory(entries)?;
            let clusters = self.take(geometry.clusters_for(bytes.len() as u64)).await?;
            let directory_offset = clusters.start << geometry.cluster_bits;
            self.write(&bytes, directory_offset).await?;
            let (count, directory_size) = (entries.len() as u32, bytes.len() as u64);
            place = Some(BitmapsExt { count, directory_size, directory_offset });
        }
        let first = read(engine, storage, 0, Header::READ_FIRST).await?;
        let header = read(engine, storage, 0, Header::bytes_wanted(&first)?).await?;
        let steps = Header::place_bitmaps(&header, place)?;
        allocator.write_refcounts(engine, storage).await?;
        if !mutant!(BitmapNamedEarly) {
            allocator.barrier(engine, storage).await?;
        }
        let fresh = std::mem::take(&mut self.fresh);
        if let Err(error) = self.name(steps).await {
            // Which one is named now? Unless the storage tells, nothing is given back.
            allocator.health.check()?;
            let header = read(engine, storage, 0, header.len()).await?;
            if Header::parse(&header)?.extensions.bitmaps != place {
                self.fresh = fresh;
                return Err(error);
            }
            allocator.barrier(engine, storage).await?;
        }
        let kind = Metadata::BitmapDirectory;
        if let Some(old) = old {
            allocator.overlap.remove(old.directory_offset, old.directory_size, kind);
            let clusters = allocator.clusters_of(old.directory_offset, old.directory_size);
            self.free(clusters).await;
        }
        if let Some(new) = place {
            allocator.overlap.add(new.directory_offset, new.directory_size, kind);
        }
        Ok(place)
    }

    async fn name(&self, steps: Vec<(u64, Vec<u8>)>) -> Result<()> {
        for (offset, bytes) in steps {
            self.write(&bytes, offset).await?;
            self.writing.allocator.barrier(self.engine, &self.image.storage).await?;
        }
        Ok(())
    }

    /// Gives back what was taken where it came to nothing.
    async fn end<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            for clusters in std::mem::take(&mut self.fresh) {
                self.free(clusters).await;
            }
        }
        result
    }

    /// Frees a table that nothing names any more, and the bits that it names.
    async fn free_table(&self, entry: &BitmapEntry) {
        let (geometry, storage) = (self.image.geometry(), &self.image.storage);
        let entries = entry.table_entries as usize;
        match read_table(self.engine, storage, entry.table_offset, entries).await {
            Ok(table) => {
                let mut run: Range<u64> = 0..0;
                for word in table {
                    // What is no entry is none that could be freed.
                    let Ok(BitmapCluster::Stored(host)) = BitmapCluster::decode(word, geometry)
                    else {
                        continue;
                    };
                    let cluster = host.get() >> geometry.cluster_bits;
                    if cluster == run.end {
                        run.end += 1;
                    } else {
                        self.free(std::mem::replace(&mut run, cluster..cluster + 1)).await;
                    }
                }
                self.free(run).await;
            }
            Err(error) => self.leak(&error),
        }
        let bytes = u64::from(entry.table_entries) * 8;
        self.free(self.writing.allocator.clusters_of(entry.table_offset, bytes)).await;
    }

    /// Frees clusters, as far as they are somebody's to free.
    async fn free(&self, clusters: Range<u64>) {
        let (allocator, storage) = (&self.writing.allocator, &self.image.storage);
        if let Err(error) = allocator.free_together(self.engine, storage, clusters).await {
            self.leak(&error);
        }
    }

    /// Something stays in use that nothing refers to.
    fn leak(&self, error: &Error) {
        let name = self.image.storage.name();
        log::emit(log::WARN, "bitmaps", || {
            format!("{name}: clusters of an old bitmap are not freed: {error}")
        });
    }
}
