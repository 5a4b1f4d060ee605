//! Writing compressed clusters.
//!
//! Compressing is done by the caller's thread, before anything is claimed; then the
//! bytes get their place, behind those of others, and are written there before the
//! entry says so. What does not get smaller is written as it is.

use super::claims::Region;
use super::disk::{Disk, Layer};
use super::handle::WriteFlags;
use super::qcow2::{Qcow2, Writing};
use crate::alloc::packing::Packed;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::compressed::{self, Compressed};
use crate::format::compression::Compression;
use crate::format::l2::Cluster;
use crate::format::subcluster;
use crate::geometry::GuestOffset;
use crate::io::engine::{Engine, Piece};
use crate::sys::memory::Block;

impl Disk {
    /// Writes as the flags say.
    pub async fn write_with<E: Engine>(
        &self,
        engine: &E,
        data: Piece<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> Result<()> {
        match (flags.compressed, flags.unchanged) {
            (true, true) => self.compress_unrecorded(engine, data, offset, flags.fua).await,
            (true, false) => self.write_compressed(engine, data, offset, flags.fua).await,
            (false, true) => self.write_unrecorded(engine, data, offset, flags.fua).await,
            (false, false) => self.write(engine, data, offset, flags.fua).await,
        }
    }

    /// Writes whole clusters (the disk's last one may be cut off by its end) and stores
    /// them compressed.
    ///
    /// Errors: `InvalidArgument` for parts of clusters; `NotSupported` on raw images;
    /// `EIO`, as in QEMU, where a cluster of the image's own is stored (or kept for
    /// later) already and the data can be compressed: clusters before it have been
    /// written then.
    pub async fn write_compressed<E: Engine>(
        &self,
        engine: &E,
        data: Piece<'_>,
        offset: u64,
        fua: bool,
    ) -> Result<()> {
        self.check_range(offset, data.len() as u64)?;
        self.record_unless(mutant!(BitmapMissesCompressed), offset..offset + data.len() as u64);
        self.compress_unrecorded(engine, data, offset, fua).await
    }

    /// As `write_compressed`, of what the guest sees already: bitmaps do not record it.
    async fn compress_unrecorded<E: Engine>(
        &self,
        engine: &E,
        data: Piece<'_>,
        offset: u64,
        fua: bool,
    ) -> Result<()> {
        self.check_range(offset, data.len() as u64)?;
        let Some(Layer::Qcow2(image)) = self.layers.first() else {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "a raw image has no compressed clusters",
            ));
        };
        image.refuse_data_file("compressed clusters")?;
        if image.is_encrypted() {
            // QEMU would put them into the file as they are.
            let text = format!(
                "{}: compressed clusters are not encrypted, and nothing else is written to an \
                 encrypted image",
                image.storage.name()
            );
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        let (geometry, end) = (image.geometry(), offset + data.len() as u64);
        let parts = [offset, end].map(|at| geometry.in_cluster(at) != 0);
        if !data.is_empty() && (parts[0] || parts[1] && end != image.size) {
            return Err(Error::invalid(format!(
                "{}: {} bytes at {offset:#x} are not whole clusters of {} bytes, and compressed \
                 ones are written as a whole",
                image.storage.name(),
                data.len(),
                geometry.cluster_size()
            )));
        }
        self.requests.write(data.len() as u64);
        let written = async {
            let writing = image.writing()?;
            writing.allocator.health.check()?;
            let size = geometry.cluster_size() as usize;
            let mut done = 0;
            while done < data.len() {
                let len = size.min(data.len() - done);
                let at = GuestOffset(offset + done as u64);
                self.write_one(engine, image, writing, data.sub(done, len), at).await?;
                done += len;
            }
            writing.mark_unsynced();
            Ok(())
        };
        match written.await {
            Ok(()) if fua || self.options.writethrough => self.flush(engine).await,
            Ok(()) => Ok(()),
            Err(error) => Err(self.note_corruption(engine, error).await),
        }
    }

    async fn write_one<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        data: Piece<'_>,
        at: GuestOffset,
    ) -> Result<()> {
        match compress(image, &data)? {
            Some(bytes) => self.store(engine, image, writing, at, &bytes).await,
            None => self.write_qcow2(engine, data, at.0).await,
        }
    }

    /// Makes compressed bytes the content of a cluster.
    async fn store<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        at: GuestOffset,
        bytes: &[u8],
    ) -> Result<()> {
        image.bound_limbo(engine).await?;
        let geometry = image.geometry();
        let cluster = geometry.guest_cluster(at);
        let table = image.table_for_writing(engine, geometry.l1_index(cluster)).await?;
        let all = subcluster::all(geometry.subclusters());
        let all = if mutant!(CompressedClaimsNothing) { 0 } else { all };
        let _claim = writing.claims.acquire(Region::whole(cluster, 1, all)).await;
        let old = image.entry(engine, table, cluster).await?;
        if let Cluster::Standard { copied: true, .. } = old {
            return Err(Error::new(
                ErrorKind::Os(libc::EIO),
                format!(
                    "{}: the cluster at guest offset {at} is allocated: compressed data does not \
                     replace it (discard it first)",
                    image.storage.name()
                ),
            ));
        }
        let packed = self.pack(engine, image, writing, bytes.len() as u64).await?;
        let data = Compressed { offset: packed.offset(), length: bytes.len() as u64 };
        let stored = async {
            if compressed::encode(data.offset, data.length, geometry).is_none() {
                return Err(Error::new(
                    ErrorKind::Os(libc::EFBIG),
                    format!(
                        "{}: no entry can name compressed data at {:#x}",
                        image.storage.name(),
                        data.offset
                    ),
                ));
            }
            writing.allocator.check_data(data.offset, data.length)?;
            let block = Block::from_bytes(bytes)?;
            let piece = Piece::Block(block.slice(0, bytes.len()));
            image.storage.write(engine, &[piece], data.offset).await?;
            if !mutant!(CompressedNotOrdered) {
                writing.allocator.need_order();
            }
            image.change(engine, table, cluster, 1, |_, _| Some(Cluster::Compressed(data))).await
        };
        match stored.await {
            Ok(()) => packed.keep(),
            Err(error) => {
                packed.give_back();
                return Err(error);
            }
        }
        image.free(engine, writing, &[old]).await
    }

    /// Room for compressed bytes. One request at a time chooses its place; what it
    /// waits for, rarely, is the refcount of a host cluster, or a new one.
    async fn pack<'a, E: Engine>(
        &self,
        engine: &E,
        image: &'a Qcow2,
        writing: &'a Writing,
        len: u64,
    ) -> Result<Packed<'a>> {
        let (allocator, storage) = (&writing.allocator, &image.storage);
        let mut open = writing.filling.lock().await;
        if let Some(packed) = allocator.pack_open(engine, storage, &mut open, len).await? {
            return Ok(packed);
        }
        let allocation = image.allocate(engine, 1).await?;
        // Who read what lay here in an earlier life has left; who comes finds nothing
        // of it, whoever is the first to point here.
        let start = allocation.start()?.get();
        self.inflated.forget(start..start.saturating_add(image.geometry().cluster_size()));
        allocator.pack_new(engine, storage, &mut open, allocation, len).await
    }
}

/// Compresses the data of one cluster, which zeroes fill up; `None`: it does not get
/// smaller.
fn compress(image: &Qcow2, data: &Piece<'_>) -> Result<Option<Vec<u8>>> {
    let size = image.geometry().cluster_size() as usize;
    let mut plain = fallible::filled(size, 0u8)?;
    let (part, _) = plain.split_at_mut(data.len());
    match data {
        Piece::Guest(memory) => memory.copy_to(0, part),
        Piece::Block(memory) => memory.copy_to(0, part),
        Piece::Zeroes(_) => {}
    }
    let mut bytes = fallible::filled(size - 1, 0u8)?;
    let length = Compression::of(image.header.compression)?.compress(&plain, &mut bytes)?;
    Ok(length.map(|length| {
        bytes.truncate(length);
        bytes
    }))
}
