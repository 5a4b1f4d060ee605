//! What can be told about an open image: its header, its geometry, its size on
//! disk, and counters.

use std::sync::atomic::Ordering::Relaxed;

use super::bitmaps::load::read_directory;
use super::bitmaps::{Bitmap, Bitmaps};
use super::disk::{Disk, Layer};
use super::options::Format;
use super::qcow2::Qcow2;
use crate::crypto::hash::Hash;
use crate::crypto::luks;
use crate::error::{Error, Result};
use crate::format::bitmap::{AUTO, BitmapEntry, IN_USE};
use crate::io::engine::Engine;
use crate::io::storage::Storage;

/// What an open image is. Sizes are in bytes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Info {
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// Length of the image file.
    pub file_length: u64,
    /// Bytes that the host file system has in use for it.
    pub allocated_size: u64,
    /// Its format.
    pub format: Format,
    /// Whether it is open for writing.
    pub writable: bool,
    /// Name of its storage, for a person.
    pub file_name: String,
    /// What only qcow2 images have.
    pub qcow2: Option<Qcow2Info>,
    /// Images below this one.
    pub chain_depth: u32,
    /// Alignment of memory and offsets that saves a copy; 1 unless O_DIRECT.
    pub buffer_alignment: u32,
    /// Best length and offset of a request: that of a subcluster.
    pub optimal_io_size: u32,
    /// Smallest aligned range that a discard gives back.
    pub discard_alignment: u32,
}

/// What a qcow2 header says.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// Header version, 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u32,
    /// Bytes in a subcluster; the cluster size without extended L2 entries.
    pub subcluster_size: u32,
    /// Whether L2 entries are extended.
    pub extended_l2: bool,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// 0 zlib, 1 zstd.
    pub compression_type: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Number of persistent bitmaps.
    pub bitmap_count: u32,
    /// What is known of them without reading their bits; empty if the image is open
    /// read-only, but in [`info_json`](super::handle::Image::info_json).
    pub bitmaps: Vec<StoredBitmap>,
    /// Feature bits as stored.
    pub incompatible: u64,
    /// Feature bits as stored.
    pub compatible: u64,
    /// Feature bits as stored.
    pub autoclear: u64,
    /// Encryption method as stored: 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// What the LUKS header says, if there is one (and it can be understood).
    pub luks: Option<LuksInfo>,
    /// The backing file as the header names it.
    pub backing: Option<StoredReference>,
    /// The name of the external data file as the header has it.
    pub data_file: Option<Vec<u8>>,
}

/// A persistent bitmap as an image has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBitmap {
    /// The name.
    pub name: Vec<u8>,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u32,
    /// It is out of date.
    pub in_use: bool,
    /// It records changes.
    pub auto: bool,
}

/// What a LUKS header says; names are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)]
pub struct LuksInfo {
    pub uuid: String,
    pub cipher_alg: &'static str,
    pub cipher_mode: &'static str,
    pub ivgen_alg: &'static str,
    /// Only where the IV generator has a use for it.
    pub ivgen_hash_alg: Option<&'static str>,
    pub hash_alg: &'static str,
    /// Bytes of header and key material.
    pub payload_offset: u64,
    pub master_key_iters: u32,
    pub slots: Vec<KeySlotInfo>,
}

/// What is known of a key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct KeySlotInfo {
    pub active: bool,
    /// Where its material is, from the beginning of the LUKS header.
    pub key_offset: u64,
    pub iters: u32,
    pub stripes: u32,
}

impl LuksInfo {
    fn of(header: &luks::Header) -> LuksInfo {
        let suite = &header.suite;
        LuksInfo {
            uuid: header.uuid.clone(),
            cipher_alg: suite.cipher.name(),
            cipher_mode: suite.mode.name(),
            ivgen_alg: suite.ivs.name(),
            ivgen_hash_alg: suite.ivs.hash().map(Hash::name),
            hash_alg: suite.hash.name(),
            payload_offset: header.payload_offset,
            master_key_iters: header.iterations,
            slots: header
                .slots
                .iter()
                .map(|slot| KeySlotInfo {
                    active: slot.active,
                    key_offset: slot.offset,
                    iters: slot.iterations,
                    stripes: slot.stripes,
                })
                .collect(),
        }
    }
}

/// A reference exactly as the header stores it.
#[derive(Clone, Debug)]
pub struct StoredReference {
    /// The name.
    pub name: Vec<u8>,
    /// The format, if one is stored.
    pub format: Option<Vec<u8>>,
}

/// Counters since open; this layer only.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
#[allow(missing_docs)]
pub struct Stats {
    pub guest_reads: u64,
    pub guest_read_bytes: u64,
    pub guest_writes: u64,
    pub guest_write_bytes: u64,
    pub storage_reads: u64,
    pub storage_read_bytes: u64,
    pub storage_writes: u64,
    pub storage_write_bytes: u64,
    pub storage_syncs: u64,
    pub cow_bytes: u64,
    pub l2_cache_hits: u64,
    pub l2_cache_misses: u64,
    pub l2_cache_evictions: u64,
    pub metadata_bytes: u64,
    pub clusters_allocated: u64,
    pub clusters_freed: u64,
}

impl Qcow2 {
    fn info(&self) -> Qcow2Info {
        let header = &self.header;
        let geometry = self.geometry();
        Qcow2Info {
            version: header.version,
            cluster_size: geometry.cluster_size() as u32,
            subcluster_size: geometry.subcluster_size() as u32,
            extended_l2: geometry.extended_l2,
            refcount_bits: header.refcount_bits(),
            compression_type: u32::from(header.compression),
            snapshot_count: header.snapshot_count,
            bitmap_count: header.extensions.bitmaps.as_ref().map_or(0, |ext| ext.count),
            bitmaps: Vec::new(),
            incompatible: self.incompatible(),
            compatible: header.compatible,
            autoclear: header.autoclear,
            crypt_method: header.crypt_method,
            luks: self.unlocked.luks.as_deref().map(LuksInfo::of),
            backing: header.backing.as_ref().map(|backing| StoredReference {
                name: backing.name.clone(),
                format: backing.format.clone(),
            }),
            data_file: header.extensions.data_file.clone(),
        }
    }
}

impl StoredBitmap {
    fn of(bitmap: &Bitmap) -> StoredBitmap {
        StoredBitmap {
            name: bitmap.name.clone(),
            granularity: 1 << bitmap.granularity_bits,
            in_use: bitmap.bits.is_none(),
            auto: bitmap.enabled,
        }
    }

    fn from_entry(entry: BitmapEntry) -> StoredBitmap {
        StoredBitmap {
            name: entry.name,
            granularity: 1 << entry.granularity_bits,
            in_use: entry.flags & IN_USE != 0,
            auto: entry.flags & AUTO != 0,
        }
    }
}

impl Disk {
    /// As `info`, with bitmaps also of an image that is open read-only; without them if
    /// they are malformed.
    pub async fn info_with_bitmaps<E: Engine>(&self, engine: &E) -> Result<Info> {
        let mut info = self.info()?;
        if let (Some(to), Some(image), None) = (&mut info.qcow2, self.top(), self.bitmaps_now()) {
            let mut budget = self.budget_beside()?;
            let entries = read_directory(engine, image, &mut budget).await.unwrap_or_default();
            to.bitmaps = entries.into_iter().map(StoredBitmap::from_entry).collect();
        }
        Ok(info)
    }

    /// What this disk's own image is.
    pub fn info(&self) -> Result<Info> {
        let Some(top) = self.layers.first() else {
            return Err(Error::invalid("a disk without an image"));
        };
        let storage = top.storage();
        let (format, mut qcow2) = match top {
            Layer::Qcow2(image) => (Format::Qcow2, Some(image.info())),
            Layer::Raw(_) => (Format::Raw, None),
        };
        if let (Some(info), Some(bitmaps)) = (&mut qcow2, self.bitmaps_now()) {
            info.bitmap_count = bitmaps.list.len() as u32;
            info.bitmaps = bitmaps.list.iter().map(StoredBitmap::of).collect();
        }
        let granule = qcow2.as_ref().map_or(1, |qcow2| qcow2.subcluster_size);
        Ok(Info {
            virtual_size: top.size(),
            file_length: storage.length()?,
            allocated_size: storage.allocated()?,
            format,
            writable: self.options.writable,
            file_name: storage.name().to_owned(),
            qcow2,
            chain_depth: self.layers.len() as u32 - 1,
            buffer_alignment: storage.buffer_alignment().max(top.data().buffer_alignment()),
            optimal_io_size: if granule > 1 { granule } else { 0 },
            discard_alignment: granule,
        })
    }

    /// Counters of this disk's own image.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for counters in self.requests.iter() {
            stats.guest_reads += counters.reads.get();
            stats.guest_read_bytes += counters.read_bytes.get();
            stats.guest_writes += counters.writes.get();
            stats.guest_write_bytes += counters.write_bytes.get();
        }
        let Some(top) = self.layers.first() else { return stats };
        let storage = top.storage().counters();
        stats.storage_reads = storage.reads;
        stats.storage_read_bytes = storage.read_bytes;
        stats.storage_writes = storage.writes;
        stats.storage_write_bytes = storage.write_bytes;
        stats.storage_syncs = storage.syncs;
        if let Some(data) = top.data_file().map(Storage::counters) {
            stats.storage_reads += data.reads;
            stats.storage_read_bytes += data.read_bytes;
            stats.storage_writes += data.writes;
            stats.storage_write_bytes += data.write_bytes;
            stats.storage_syncs += data.syncs;
        }
        let Layer::Qcow2(image) = top else { return stats };
        stats.l2_cache_misses = image.misses.load(Relaxed);
        // A request looks into one slice, by far the most often.
        let requests = stats.guest_reads + stats.guest_writes;
        stats.l2_cache_hits = requests.saturating_sub(stats.l2_cache_misses);
        stats.l2_cache_evictions = image.l2.evictions();
        stats.metadata_bytes = image.l2.bytes() + image.l1.len() as u64 * 8;
        stats.metadata_bytes += self.bitmaps_now().map_or(0, Bitmaps::bytes);
        if let Some(writing) = &image.writing {
            stats.cow_bytes = writing.cow_bytes.load(Relaxed);
            let allocator = &writing.allocator;
            (stats.clusters_allocated, stats.clusters_freed) = allocator.totals();
            stats.metadata_bytes += allocator.refcounts.bytes() + allocator.overlap.bytes();
        }
        stats
    }
}
