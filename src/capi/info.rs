//! Image info

use std::ffi::{c_char, c_int};
use std::mem::size_of;
use std::ptr;

use super::open::qcow2rs_image;
use super::open_opts::{QCOW2RS_REF_KIND_BACKING, QCOW2RS_REF_KIND_DATA};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{autoclear, compatible, incompatible};
use crate::image::attached::poisoned;
use crate::image::handle::Image;
use crate::image::info::{Info, Stats};
use crate::image::options::ReferenceKind;

/// Header version 2.
pub const QCOW2RS_COMPAT_0_10: u32 = 2;
/// Header version 3.
pub const QCOW2RS_COMPAT_1_1: u32 = 3;
/// Compressed clusters are deflate.
pub const QCOW2RS_COMPRESSION_ZLIB: u32 = 0;
/// Compressed clusters are zstd.
pub const QCOW2RS_COMPRESSION_ZSTD: u32 = 1;
/// Open for writing.
pub const QCOW2RS_INFO_RDWR: u32 = 1;
/// The dirty bit is set.
pub const QCOW2RS_INFO_DIRTY: u32 = 2;
/// The corrupt bit is set.
pub const QCOW2RS_INFO_CORRUPT: u32 = 4;
/// L2 entries are extended.
pub const QCOW2RS_INFO_EXTENDED_L2: u32 = 8;
/// The bit for lazy refcounts is set.
pub const QCOW2RS_INFO_LAZY_REFCOUNTS: u32 = 16;
/// The header names a backing file.
pub const QCOW2RS_INFO_HAS_BACKING: u32 = 32;
/// Guest data is in another file.
pub const QCOW2RS_INFO_DATA_FILE: u32 = 64;
/// That file is a raw image by itself.
pub const QCOW2RS_INFO_DATA_FILE_RAW: u32 = 128;
/// Guest data is encrypted.
pub const QCOW2RS_INFO_ENCRYPTED: u32 = 256;

/// What an image is.  Grows at the end.  RAW images: what only a qcow2 image
/// has is 0.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct qcow2rs_info {
    /// Bytes.
    pub virtual_size: u64,
    /// Bytes of the image file.
    pub file_length: u64,
    /// Bytes.
    pub cluster_size: u32,
    /// == cluster_size without extended L2.
    pub subcluster_size: u32,
    /// QCOW2RS_COMPAT_*
    pub compat: u32,
    /// QCOW2RS_INFO_*
    pub flags: u32,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// QCOW2RS_COMPRESSION_*
    pub compression_type: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Persistent bitmaps.
    pub bitmap_count: u32,
    /// As stored.
    pub incompatible_features: u64,
    /// As stored.
    pub compatible_features: u64,
    /// As stored.
    pub autoclear_features: u64,
    /// Request geometry, as in a block device, from here on.  1: any offset and
    /// length is accepted.
    pub request_alignment: u32,
    /// 1, or that of O_DIRECT to avoid copies.
    pub buffer_alignment: u32,
    /// 0: no preference.
    pub optimal_io_size: u32,
    /// Bytes.
    pub discard_alignment: u32,
    /// Advice: more is split; 0: no limit.
    pub max_transfer: u64,
    /// Advice.
    pub max_iov: u32,
    /// Images below this one.
    pub chain_depth: u32,
    /// 0.
    pub reserved: u32,
    /// Bytes of the host file system in use.
    pub allocated_size: u64,
}

/// Ranges that one system call takes.
const MAX_IOV: u32 = 1024;

impl qcow2rs_info {
    fn new(info: &Info) -> qcow2rs_info {
        let mut flags = if info.writable { QCOW2RS_INFO_RDWR } else { 0 };
        let general = qcow2rs_info {
            virtual_size: info.virtual_size,
            file_length: info.file_length,
            request_alignment: 1,
            buffer_alignment: info.buffer_alignment,
            optimal_io_size: info.optimal_io_size,
            discard_alignment: info.discard_alignment,
            max_iov: MAX_IOV,
            chain_depth: info.chain_depth,
            allocated_size: info.allocated_size,
            flags,
            ..qcow2rs_info::default()
        };
        let Some(qcow2) = &info.qcow2 else { return general };
        for (is_set, flag) in [
            (qcow2.incompatible & incompatible::DIRTY != 0, QCOW2RS_INFO_DIRTY),
            (qcow2.incompatible & incompatible::CORRUPT != 0, QCOW2RS_INFO_CORRUPT),
            (qcow2.extended_l2, QCOW2RS_INFO_EXTENDED_L2),
            (qcow2.compatible & compatible::LAZY_REFCOUNTS != 0, QCOW2RS_INFO_LAZY_REFCOUNTS),
            (qcow2.backing.is_some(), QCOW2RS_INFO_HAS_BACKING),
            (qcow2.incompatible & incompatible::EXTERNAL_DATA != 0, QCOW2RS_INFO_DATA_FILE),
            (qcow2.autoclear & autoclear::RAW_EXTERNAL_DATA != 0, QCOW2RS_INFO_DATA_FILE_RAW),
            (qcow2.crypt_method != 0, QCOW2RS_INFO_ENCRYPTED),
        ] {
            flags |= if is_set { flag } else { 0 };
        }
        qcow2rs_info {
            cluster_size: qcow2.cluster_size,
            subcluster_size: qcow2.subcluster_size,
            compat: qcow2.version,
            refcount_bits: qcow2.refcount_bits,
            compression_type: qcow2.compression_type,
            snapshot_count: qcow2.snapshot_count,
            bitmap_count: qcow2.bitmap_count,
            incompatible_features: qcow2.incompatible,
            compatible_features: qcow2.compatible,
            autoclear_features: qcow2.autoclear,
            flags,
            ..general
        }
    }
}

/// [MT] info_size is sizeof(*info); the common prefix is filled in and the rest
/// of the caller's struct is zeroed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_get_info(
    img: *mut qcow2rs_image,
    info: *mut qcow2rs_info,
    info_size: usize,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let to = call.sized_out(info, info_size, size_of::<u64>(), "info")?;
        to.set(&qcow2rs_info::new(&image.info()?));
        Ok(0)
    })
}

/// An error if a request of a queue has panicked: for calls that would find nothing
/// amiss by themselves.
fn check_whole(image: &Image) -> Result<()> {
    if image.queues().is_poisoned() { Err(poisoned()) } else { Ok(()) }
}

/// [MT] Virtual size in bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_get_size(img: *mut qcow2rs_image) -> i64 {
    entry!(|call| {
        let image = call.held(img)?;
        check_whole(&image)?;
        let size = image.size();
        i64::try_from(size).map_err(|_| Error::os(libc::EOVERFLOW, format!("{size} bytes")))
    })
}

/// [MT] As stored in the header; -ENOENT if none.  qcow2rs_free(*name).
/// kind: QCOW2RS_REF_KIND_*; *name ends with a NUL, too; format may be NULL.
/// *format becomes NULL if none is stored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_get_ref(
    img: *mut qcow2rs_image,
    kind: u32,
    name: *mut *mut c_char,
    name_length: *mut usize,
    format: *mut *mut c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let (name, name_length) =
            (call.slot(name, "name")?, call.slot(name_length, "name_length")?);
        let format = if format.is_null() { None } else { Some(call.slot(format, "format")?) };
        let (kind, file) = match kind {
            QCOW2RS_REF_KIND_BACKING => (ReferenceKind::Backing, "backing"),
            QCOW2RS_REF_KIND_DATA => (ReferenceKind::Data, "data"),
            _ => return Err(Error::invalid(format!("{kind} is no QCOW2RS_REF_KIND_*"))),
        };
        let Some(reference) = image.reference(kind) else {
            return Err(Error::new(ErrorKind::NotFound, format!("the image has no {file} file")));
        };
        // Everything that can fail comes before the first output is written.
        let name_copy = call.hand_out(&reference.name)?;
        let format_copy = match (&format, reference.format) {
            (Some(_), Some(stored)) => call.hand_out(&stored)?,
            _ => ptr::null_mut(),
        };
        name.set(name_copy);
        name_length.set(reference.name.len());
        if let Some(slot) = format {
            slot.set(format_copy);
        }
        Ok(0)
    })
}

/// [MT] The same as JSON, the members named as in `qemu-img info
/// --output=json`.  qcow2rs_free(*json).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_get_info_json(
    img: *mut qcow2rs_image,
    json: *mut *mut c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let json = call.slot(json, "json")?;
        json.set(call.hand_out(image.info_json()?.as_bytes())?);
        Ok(0)
    })
}

/// Counters since open, summed over threads and queues; this layer only.  Grows
/// at the end.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct qcow2rs_stats {
    /// Requests of the guest.
    pub guest_reads: u64,
    /// Bytes.
    pub guest_read_bytes: u64,
    /// Requests of the guest.
    pub guest_writes: u64,
    /// Bytes.
    pub guest_write_bytes: u64,
    /// Calls that the storage saw, metadata too.
    pub storage_reads: u64,
    /// Bytes.
    pub storage_read_bytes: u64,
    /// Calls that the storage saw, metadata too.
    pub storage_writes: u64,
    /// Bytes.
    pub storage_write_bytes: u64,
    /// fdatasync and the like.
    pub storage_syncs: u64,
    /// Read from below and copied.
    pub cow_bytes: u64,
    /// Slices of L2 tables that were in memory.
    pub l2_cache_hits: u64,
    /// Slices that had to be read.
    pub l2_cache_misses: u64,
    /// Slices that made room.
    pub l2_cache_evictions: u64,
    /// Memory held now.
    pub metadata_bytes: u64,
    /// Host clusters.
    pub clusters_allocated: u64,
    /// Host clusters.
    pub clusters_freed: u64,
}

impl qcow2rs_stats {
    fn new(stats: &Stats) -> qcow2rs_stats {
        qcow2rs_stats {
            guest_reads: stats.guest_reads,
            guest_read_bytes: stats.guest_read_bytes,
            guest_writes: stats.guest_writes,
            guest_write_bytes: stats.guest_write_bytes,
            storage_reads: stats.storage_reads,
            storage_read_bytes: stats.storage_read_bytes,
            storage_writes: stats.storage_writes,
            storage_write_bytes: stats.storage_write_bytes,
            storage_syncs: stats.storage_syncs,
            cow_bytes: stats.cow_bytes,
            l2_cache_hits: stats.l2_cache_hits,
            l2_cache_misses: stats.l2_cache_misses,
            l2_cache_evictions: stats.l2_cache_evictions,
            metadata_bytes: stats.metadata_bytes,
            clusters_allocated: stats.clusters_allocated,
            clusters_freed: stats.clusters_freed,
        }
    }
}

/// [MT] As qcow2rs_get_info: by size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_get_stats(
    img: *mut qcow2rs_image,
    stats: *mut qcow2rs_stats,
    stats_size: usize,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let to = call.sized_out(stats, stats_size, size_of::<u64>(), "stats")?;
        check_whole(&image)?;
        to.set(&qcow2rs_stats::new(&image.stats()));
        Ok(0)
    })
}
