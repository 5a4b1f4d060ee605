//! What can be told about an open image: its header, its geometry, its size on
//! disk, and counters.

use crate::image::options::Format;

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
    /// Feature bits as stored.
    pub incompatible: u64,
    /// Feature bits as stored.
    pub compatible: u64,
    /// Feature bits as stored.
    pub autoclear: u64,
    /// Encryption method as stored: 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// The backing file as the header names it.
    pub backing: Option<StoredReference>,
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
