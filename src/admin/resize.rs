//! A disk of another size.
//!
//! ```text
//! longer: the rest of the last cluster is zeroed; settle
//!     -> new L1 and L2 tables, preallocated data, their refcounts: to free clusters
//!     -> sync -> one write of the header: size, L1 table
//!     -> sync -> lowered refcounts of the old tables
//! shorter: settle -> one write of the header: size
//!     -> sync -> entries behind the end are cleared
//!     -> sync -> lowered refcounts of what they led to; the file becomes shorter
//! ```
//!
//! What the active tables have behind the end of the disk does not outlive a change of
//! the size: neither what a shorter disk has cut off nor VM state becomes content of a
//! longer one. Snapshots keep what they share.
//!
//! An external data file becomes longer before the header is written, and shorter after
//! that.
//!
//! At every moment the image has the old size or the new one, with all that belongs to
//! it, and wastes space at worst.

use std::ops::Range;
use std::sync::Arc;

use super::data_length;
use super::preallocation::{Filling, Preallocation, Progress, report};
use crate::alloc::changes::Changes;
use crate::alloc::health::Health;
use crate::alloc::overlap::Metadata;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::header::Header;
use crate::format::l2::COPIED;
use crate::format::limits::{OFFSET_MASK, max_virtual_size};
use crate::geometry::{DataOffset, GuestCluster, HostOffset};
use crate::image::bitmaps::Bitmaps;
use crate::image::disk::{Disk, Layer, Raw};
use crate::image::handle::{Image, Replacement};
use crate::image::qcow2::Qcow2;
use crate::image::views;
use crate::image::zero::ZeroFlags;
use crate::io::blocking::Blocking;
use crate::io::engine::{Engine, Piece};
use crate::io::wait::block_on;
use crate::log;
use crate::metadata::tables::read;
use crate::snapshots::Changed;
use crate::snapshots::operation::Operation;
use crate::snapshots::tables::{count, count_entries, l1_bytes};

/// How the size is changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// The disk may become shorter: what lies behind its new end is lost.
    pub shrink: bool,
    /// What is taken ahead for the new part of a disk that becomes longer.
    pub preallocation: Preallocation,
}

impl Image {
    /// Gives the disk another size, in bytes. A new part reads as zero, whatever is
    /// below. Durable on return; the file becomes shorter if its end is not used any
    /// more. `progress` is told how far preallocation has come, and may cancel.
    ///
    /// Needs the image alone: `Busy` if another call is in progress, or a request of a
    /// queue in flight. Counters of the image (`stats`) start again.
    ///
    /// Errors: `InvalidArgument` for a size that is no multiple of 512, for a shorter
    /// disk without `shrink`, and for preallocation of one; `Os(EFBIG)` where no image
    /// of this geometry is that large; `Limit` past "max-virtual-size" and
    /// "max-metadata-size"; `NoSpace`; `ReadOnly`; `Cancelled`; `NotSupported` for
    /// version 2 images that have snapshots, or a backing file that is longer than the
    /// disk was; for images with a bitmap that is out of date; for raw images, modes and
    /// storages that cannot do it. After any of these the image is as it was.
    pub fn resize(&self, size: u64, options: &ResizeOptions, progress: Progress<'_>) -> Result<()> {
        self.alter(|disk| block_on(disk.resize(&Blocking, size, options, progress)).into())
    }
}

fn unsupported<T>(text: &str) -> Result<T> {
    Err(Error::new(ErrorKind::NotSupported, text))
}

/// The header of a disk of another size.
fn with_size(header: &Header, size: u64) -> Header {
    let mut header = Header { size, ..header.clone() };
    header.l1_size = (header.l1_entries_needed() as u32).max(1);
    header
}

impl Disk {
    /// See `Image::resize`; while nobody else does anything with the disk.
    pub async fn resize<E: Engine>(
        &self,
        engine: &E,
        size: u64,
        options: &ResizeOptions,
        progress: Progress<'_>,
    ) -> Changed<()> {
        let unchanged = |result| Changed { result, disk: Replacement::None };
        if let Err(error) = self.check_resize(size, options) {
            return unchanged(Err(error));
        }
        let image = match self.layers.first() {
            _ if size == self.size() => return unchanged(Ok(())),
            Some(Layer::Raw(raw)) => {
                return match raw.resize(engine, size, options.preallocation, progress).await {
                    Err(error) => unchanged(Err(error)),
                    Ok(raw) => {
                        let layers = vec![Layer::Raw(Arc::new(raw))];
                        let disk = Box::new(Disk::new(layers, self.options.clone()));
                        Changed { result: Ok(()), disk: Replacement::Disk(disk) }
                    }
                };
            }
            Some(Layer::Qcow2(image)) => image,
            None => return unchanged(Ok(())),
        };
        let data_length = match image.data_file.as_ref().map(|file| file.length()).transpose() {
            Ok(length) => length,
            Err(error) => return unchanged(Err(error)),
        };
        if let Err(error) = self.zero_last_cluster(engine, image, size).await {
            return unchanged(Err(error));
        }
        let mut bitmaps = self.bitmaps_now().cloned().unwrap_or_default();
        let resized = match self.resize_bitmaps(engine, image, size, &mut bitmaps).await {
            Ok(resized) => resized,
            Err(error) => return Changed { result: Err(error), disk: self.with_marks(bitmaps) },
        };
        let mut operation = match Operation::begin(engine, self).await {
            Ok(operation) => operation,
            Err(error) => return Changed { result: Err(error), disk: self.with_marks(bitmaps) },
        };
        let result = match size < self.size() {
            true => shrink(&mut operation, size, progress).await,
            false => grow(&mut operation, size, options.preallocation, progress).await,
        };
        let mut changed = operation.finish(result).await;
        let as_it_was = matches!(changed.disk, Replacement::None);
        changed.disk = match changed.disk {
            Replacement::None => self.with_marks(bitmaps),
            Replacement::Disk(disk) => {
                let bitmaps = if disk.size() == size { resized } else { bitmaps };
                Replacement::Disk(Box::new(disk.with_bitmaps(bitmaps)))
            }
            Replacement::Closed => Replacement::Closed,
        };
        match (&changed.result, &changed.disk) {
            (Ok(()), Replacement::Disk(disk)) if size < self.size() => disk.cut_files(engine).await,
            (Err(_), _) if as_it_was => {
                if let (Some(file), Some(length)) = (&image.data_file, data_length) {
                    // What was to be part of the disk is not; that it goes is no news.
                    _ = data_length::cut(engine, file, length).await;
                }
            }
            _ => {}
        }
        changed
    }

    /// All that can be said against it before anything is done.
    fn check_resize(&self, size: u64, options: &ResizeOptions) -> Result<()> {
        let old = self.size();
        if size % 512 != 0 {
            return Err(Error::invalid(format!("{size} bytes are no multiple of 512")));
        }
        if size < old && !options.shrink {
            let text = format!("a disk of {size} bytes would lose data, which was not asked for");
            return Err(Error::invalid(text));
        }
        if size < old && options.preallocation != Preallocation::Off {
            return Err(Error::invalid("a disk that becomes shorter has nothing to preallocate"));
        }
        views::refuse(&self.view, "changing its size")?;
        if size > self.options.max_virtual_size {
            let text = format!("a disk of {size} bytes exceeds \"max-virtual-size\"");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        let too_large = |most: u64| {
            let text =
                format!("a disk of {size} bytes is too large for this image: {most} at most");
            Err(Error::new(ErrorKind::Os(libc::EFBIG), text))
        };
        let image = match self.layers.first() {
            Some(Layer::Qcow2(image)) => image,
            _ if size > i64::MAX as u64 => return too_large(i64::MAX as u64),
            Some(Layer::Raw(raw)) => return raw.check_writable(),
            None => return Ok(()),
        };
        image.writing()?.allocator.health.check()?;
        if size > max_virtual_size(image.geometry()) {
            return too_large(max_virtual_size(image.geometry()));
        }
        let header = &image.header;
        if header.version < 3 && header.snapshot_count > 0 {
            return unsupported("a version 2 image that has snapshots cannot change its size");
        }
        let preallocated = options.preallocation != Preallocation::Off;
        if header.version < 3 && preallocated && image.is_encrypted() {
            return unsupported(
                "encrypted clusters that nobody has written read as zero in version 3 only: \
                 there is no preallocation in this image",
            );
        }
        if header.version < 3 && size > old && self.would_show(old) {
            return unsupported(
                "the backing file is longer than the disk, and a version 2 image cannot hide \
                 what is there",
            );
        }
        self.check_reload(&with_size(header, size), None)
    }

    /// The bitmaps of a disk of another size. Those of this one, `bitmaps`, are out of date
    /// in the file from now on, durably: their tables are not those of the other size.
    async fn resize_bitmaps<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        size: u64,
        bitmaps: &mut Bitmaps,
    ) -> Result<Bitmaps> {
        let mut resized = bitmaps.resized(image.geometry(), size)?;
        self.check_reload(&with_size(&image.header, size), Some(&resized))?;
        if bitmaps.mark(engine, image, |_, _| true).await? && !mutant!(BitmapChangeNotMarked) {
            image.writing()?.allocator.barrier(engine, &image.storage).await?;
        }
        for (to, from) in resized.list.iter_mut().zip(&bitmaps.list) {
            to.entry.clone_from(&from.entry);
        }
        Ok(resized)
    }

    /// This disk with bitmaps that are marked in the file.
    fn with_marks(&self, bitmaps: Bitmaps) -> Replacement {
        match bitmaps.list.is_empty() {
            true => Replacement::None,
            false => Replacement::Disk(Box::new(self.replaced(bitmaps))),
        }
    }

    /// Whether what is below has something behind this offset.
    fn would_show(&self, offset: u64) -> bool {
        self.layers.get(1).is_some_and(|below| below.size() > offset)
    }

    /// The last cluster may have bytes behind the end of the disk, or show some from
    /// below, that a longer disk would have as content. Nobody sees them change.
    async fn zero_last_cluster<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        size: u64,
    ) -> Result<()> {
        if image.is_raw_data() {
            // There it is made new together with the rest of what is new.
            return Ok(());
        }
        let old = self.size();
        let end = old.next_multiple_of(image.geometry().cluster_size()).min(size);
        mutant!(ResizeShowsRest => return Ok(()));
        let longer = self.ending_at(end);
        if old >= end || longer.is_zero(engine, old..end).await? {
            return Ok(());
        }
        longer.write_zeroes(engine, old, end - old, ZeroFlags::default()).await
    }

    /// Cuts off what nothing uses at the end of the files. That it works is not promised.
    async fn cut_files<E: Engine>(&self, engine: &E) {
        let Some(image) = self.top() else { return };
        let Some(writing) = &image.writing else { return };
        let allocator = &writing.allocator;
        if let Some(file) = &image.data_file {
            let cut = async {
                match data_length::cut(engine, file, self.size()).await? {
                    true => allocator.barrier(engine, file).await,
                    false => Ok(()),
                }
            };
            if let Err(error) = cut.await {
                log::emit(log::WARN, "resize", || {
                    format!("{}: it stays longer than the disk: {error}", file.name())
                });
            }
        }
        let Ok(used) = allocator.clusters_used(engine, &image.storage).await else { return };
        let length = used << image.geometry().cluster_bits;
        if image.storage.length().is_ok_and(|now| length < now) {
            let _ = allocator.shrink_file(engine, &image.storage, length).await;
        }
    }
}

/// Where a disk is cut, or made longer: at this guest cluster.
struct Cut {
    /// L1 entries before it; the last of them may name a table that it goes through.
    kept: u64,
    /// That L1 entry; 0: there is no table.
    entry: u64,
    /// The entries of the table before the cut, and behind it.
    head: Vec<u8>,
    behind: Vec<u8>,
}

impl Cut {
    async fn at<E: Engine>(operation: &Operation<'_, E>, cluster: u64) -> Result<Cut> {
        let image = operation.image;
        let geometry = image.geometry();
        let per_table = geometry.l2_coverage() >> geometry.cluster_bits;
        let within = (cluster % per_table * geometry.l2_entry_size()) as usize;
        let kept = cluster.div_ceil(per_table);
        let none = Vec::new();
        let mut cut = Cut { kept, entry: 0, head: fallible::filled(within, 0)?, behind: none };
        if within == 0 {
            return Ok(cut);
        }
        cut.entry = image.l1.get(cluster / per_table);
        if let Some(table) = image.table_of(cut.entry)? {
            let size = geometry.cluster_size() as usize;
            cut.head = read(operation.engine, &image.storage, table.get(), size).await?;
            cut.behind = cut.head.split_off(within);
        }
        Ok(cut)
    }

    /// Whether the table says anything of what is behind.
    fn has_behind(&self) -> bool {
        self.behind.iter().any(|byte| *byte != 0)
    }

    fn table(&self) -> u64 {
        self.entry & OFFSET_MASK
    }

    /// Counts what the L1 entries behind the cut lead to.
    async fn count_dropped<E: Engine>(
        &self,
        operation: &Operation<'_, E>,
        lost: &mut Changes,
    ) -> Result<()> {
        let (l1, kept) = (&operation.image.l1, self.kept as usize);
        let dropped = fallible::collect(l1.len().saturating_sub(kept), l1.iter().skip(kept))?;
        count(operation.engine, operation.image, &dropped, lost).await.map(drop)
    }

    /// Counts what is behind the cut in the table that it goes through.
    fn count_behind<E: Engine>(
        &self,
        operation: &Operation<'_, E>,
        lost: &mut Changes,
    ) -> Result<()> {
        count_entries(operation.image, (self.table(), 1), &self.behind, lost).map(drop)
    }
}

/// Takes the references to what nothing refers to any more, durably so.
async fn release<E: Engine>(operation: &Operation<'_, E>, lost: Changes) -> Result<()> {
    let refcounts = &operation.writing.allocator.refcounts;
    let (engine, storage) = (operation.engine, &operation.image.storage);
    refcounts.write_back(engine, storage).await?;
    let lowered = refcounts.lower_all(engine, storage, lost).await?;
    operation.punch(&lowered).await;
    Ok(())
}

async fn check_release<E: Engine>(operation: &Operation<'_, E>, lost: &mut Changes) -> Result<()> {
    let refcounts = &operation.writing.allocator.refcounts;
    let (engine, storage) = (operation.engine, &operation.image.storage);
    refcounts.check_lower(engine, storage, lost, Some(Metadata::L2)).await
}

/// The size first, so that a crash never takes content from the old one. Entries behind
/// the end that it leaves go the next time. Tables stay where they are, so that the file
/// can become shorter.
async fn shrink<E: Engine>(
    operation: &mut Operation<'_, E>,
    size: u64,
    progress: Progress<'_>,
) -> Result<()> {
    let (engine, image) = (operation.engine, operation.image);
    let total = image.size - size;
    report(progress, 0, total)?;
    let mut lost = operation.changes()?;
    let cut = Cut::at(operation, image.geometry().clusters_for(size)).await?;
    cut.count_dropped(operation, &mut lost).await?;
    // A table that a snapshot shares says what it says.
    let clear = cut.entry & COPIED != 0 && cut.has_behind();
    if clear {
        cut.count_behind(operation, &mut lost)?;
    }
    check_release(operation, &mut lost).await?;
    operation.header.size = size;
    mutant!(ResizeFreedEarly => {
        release(operation, std::mem::replace(&mut lost, operation.changes()?)).await?;
    });
    mutant!(ResizeCutEarly => clear_behind(operation, &cut, clear).await?);
    operation.switch().await?;
    clear_behind(operation, &cut, clear).await?;
    if !mutant!(ResizeCutNotSynced) {
        operation.writing.allocator.barrier(engine, &image.storage).await?;
    }
    release(operation, lost).await?;
    // It is done: too late to cancel.
    progress(total, total);
    Ok(())
}

/// Clears the entries behind a cut, of the L1 table and (`table`) of the L2 table that
/// it goes through.
async fn clear_behind<E: Engine>(
    operation: &Operation<'_, E>,
    cut: &Cut,
    table: bool,
) -> Result<()> {
    let (image, overlap) = (operation.image, &operation.writing.allocator.overlap);
    let (at, end) = (cut.kept * 8, image.l1.len() as u64 * 8);
    let mut parts = vec![(image.l1.offset() + at, end.saturating_sub(at), Metadata::L1)];
    if table {
        parts.push((cut.table() + cut.head.len() as u64, cut.behind.len() as u64, Metadata::L2));
    }
    for (offset, bytes, kind) in parts.into_iter().filter(|(_, bytes, _)| *bytes > 0) {
        overlap.check_table(offset, bytes, kind)?;
        let piece = [Piece::Zeroes(bytes as usize)];
        image.storage.write(operation.engine, &piece, offset).await?;
    }
    Ok(())
}

/// Everything new goes to free clusters, and becomes part of the image by one write.
async fn grow<E: Engine>(
    operation: &mut Operation<'_, E>,
    size: u64,
    mode: Preallocation,
    progress: Progress<'_>,
) -> Result<()> {
    let (engine, image) = (operation.engine, operation.image);
    let (geometry, storage) = (image.geometry(), &image.storage);
    report(progress, 0, size - image.size)?;
    // Counted before the file gets longer.
    let mut lost = operation.changes()?;
    let clusters = geometry.clusters_for(image.size)..geometry.clusters_for(size);
    let hide = operation.disk.would_show(image.size);
    let fresh = match storage.capacity() {
        None => storage.length()?.next_multiple_of(geometry.cluster_size()),
        Some(_) => u64::MAX,
    };
    let raw = image.is_raw_data();
    let mut filling = Filling { format: image.format, data: None, hide, raw };
    if let Some(file) = &image.data_file {
        if (raw || mode != Preallocation::Off) && !clusters.is_empty() {
            filling.data = image.data_file_place(GuestCluster(clusters.start));
        }
        let shown = raw || !filling.is_empty();
        // The rest of the last cluster has been made zero; encrypted zeroes are no hole.
        let start = match image.is_encrypted() {
            true => (clusters.start << geometry.cluster_bits).min(size),
            false => image.size,
        };
        data_length::renew(engine, file, start..size, shown, mode, progress).await?;
        // Before anything leads there.
        operation.writing.allocator.barrier(engine, file).await?;
    } else if mode != Preallocation::Off && !clusters.is_empty() {
        let data = operation.take(clusters.end - clusters.start).await?;
        let bits = geometry.cluster_bits;
        let bytes = data.start << bits..data.end << bits;
        filling.data = HostOffset::new(bytes.start).map(DataOffset::from);
        mode.prepare(engine, storage, bytes, fresh, progress).await?;
    }
    // What lies there is no zeroes once it is decrypted.
    filling.hide |= filling.data.is_some() && image.is_encrypted() && !geometry.extended_l2;

    let per_table = geometry.l2_coverage() >> geometry.cluster_bits;
    let mut cut = Cut::at(operation, clusters.start).await?;
    cut.count_dropped(operation, &mut lost).await?;
    let old = fallible::collect(image.l1.len(), image.l1.iter())?;
    let entries = clusters.end.div_ceil(per_table).max(cut.kept).max(1) as usize;
    let mut l1 = fallible::room_for(entries)?;
    l1.extend(old.iter().take(cut.kept as usize));
    l1.resize(entries, 0);

    let first = clusters.start / per_table;
    let mut new = first..first;
    if !filling.is_empty() {
        new.end = clusters.end.div_ceil(per_table).max(first);
    }
    if cut.has_behind() {
        new.end = new.end.max(first + 1);
    }
    if !new.is_empty() && cut.table() != 0 {
        cut.count_behind(operation, &mut lost)?;
        lost.add(cut.table() >> geometry.cluster_bits, 1)?;
    }
    write_tables(operation, &mut l1, new, std::mem::take(&mut cut.head), clusters, &filling)
        .await?;
    check_release(operation, &mut lost).await?;
    operation.header.size = size;
    let same = |index: usize| l1.get(index).unwrap_or(&0) == &old[index];
    let replaced = l1.len() > old.len() || !(0..old.len()).all(same);
    if replaced {
        operation.header.l1_size = l1.len() as u32;
        operation.header.l1_offset = operation.place(&l1_bytes(&l1)?).await?;
    }
    if !mutant!(ResizeCountedLate) {
        operation.publish().await?;
    }
    operation.switch().await?;
    if replaced {
        operation.free(image.l1.offset(), old.len() as u64 * 8, Metadata::L1).await?;
    }
    release(operation, lost).await
}

/// Writes the L2 tables `new` (by their L1 indices) to free clusters, and enters them;
/// `head` is what the first of them begins with, before the first of the new `clusters`.
async fn write_tables<E: Engine>(
    operation: &mut Operation<'_, E>,
    l1: &mut [u64],
    new: Range<u64>,
    mut head: Vec<u8>,
    clusters: Range<u64>,
    filling: &Filling,
) -> Result<()> {
    if new.is_empty() {
        return Ok(());
    }
    let geometry = operation.image.geometry();
    let per_table = geometry.l2_coverage() >> geometry.cluster_bits;
    let places = operation.take(new.end - new.start).await?;
    for (index, place) in new.zip(places) {
        let mut bytes = std::mem::take(&mut head);
        let first = clusters.start.max(index * per_table);
        let end = clusters.end.min((index + 1) * per_table);
        if !filling.is_empty() && end > first {
            bytes.extend(filling.entries(first - clusters.start, end - first)?);
        }
        bytes.resize(geometry.cluster_size() as usize, 0);
        let offset = place << geometry.cluster_bits;
        operation.write(&bytes, offset).await?;
        if let Some(entry) = l1.get_mut(index as usize) {
            *entry = offset | COPIED;
        }
    }
    Ok(())
}

impl Raw {
    /// The same bytes with another end.
    async fn resize<E: Engine>(
        &self,
        engine: &E,
        size: u64,
        preallocation: Preallocation,
        progress: Progress<'_>,
    ) -> Result<Raw> {
        let (storage, old) = (&self.storage, self.size);
        self.health.check()?;
        if storage.capacity().is_some() {
            return unsupported("a device has the size that it has");
        }
        if preallocation == Preallocation::Metadata {
            return unsupported("a raw image has no metadata to preallocate");
        }
        storage.truncate(engine, size).await?;
        let prepared = async {
            preallocation.prepare(engine, storage, old.min(size)..size, old, progress).await?;
            self.health.sync(engine, storage).await
        }
        .await;
        if let Err(error) = prepared {
            if size > old {
                storage.truncate(engine, old).await?;
            }
            return Err(error);
        }
        Ok(Raw { storage: storage.clone(), size, health: Health::default() })
    }
}
