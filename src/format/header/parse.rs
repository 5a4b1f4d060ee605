//! Reading a header: QEMU's checks, in QEMU's order where it shows.

use super::super::bytes::{Reader, c_string};
use super::super::extensions::{CRYPT_LUKS, Extensions, Fields};
use super::super::features::describe_incompatible;
use super::super::limits::{
    MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFCOUNT_ORDER,
    MAX_REFTABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS, MIN_SUBCLUSTER_SIZE,
};
use super::{BackingRef, Header, KNOWN_LENGTH, MAGIC, autoclear, bad, incompatible, unsupported};
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::geometry::Geometry;

/// Bytes of a version 2 header.
const V2_LENGTH: u32 = 72;
/// Bytes of the shortest version 3 header.
const V3_MIN_LENGTH: u32 = 104;

/// The fields as they lie in the file.
struct Raw {
    backing_offset: u64,
    backing_length: u32,
    size: u64,
    crypt_method: u32,
    l1_size: u32,
    l1_offset: u64,
    reftable_offset: u64,
    reftable_clusters: u32,
    snapshot_count: u32,
    snapshots_offset: u64,
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u32,
    compression: u8,
}

impl Raw {
    fn read(bytes: &[u8], version: u32) -> Option<Raw> {
        let mut fields = Reader::new(bytes);
        fields.take(8)?; // magic and version
        let backing_offset = fields.u64()?;
        let backing_length = fields.u32()?;
        fields.take(4)?; // cluster_bits
        let mut raw = Raw {
            backing_offset,
            backing_length,
            size: fields.u64()?,
            crypt_method: fields.u32()?,
            l1_size: fields.u32()?,
            l1_offset: fields.u64()?,
            reftable_offset: fields.u64()?,
            reftable_clusters: fields.u32()?,
            snapshot_count: fields.u32()?,
            snapshots_offset: fields.u64()?,
            // What version 2 implies.
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: V2_LENGTH,
            compression: 0,
        };
        if version >= 3 {
            raw.incompatible = fields.u64()?;
            raw.compatible = fields.u64()?;
            raw.autoclear = fields.u64()?;
            raw.refcount_order = fields.u32()?;
            raw.header_length = fields.u32()?;
            if raw.header_length > V3_MIN_LENGTH {
                raw.compression = fields.u8()?;
            }
        }
        Some(raw)
    }
}

/// Version and cluster_bits, after the checks that must come first.
fn version_and_cluster_bits(first: &[u8]) -> Result<(u32, u32)> {
    let mut fields = Reader::new(first);
    if fields.u32() != Some(MAGIC) {
        return Err(Error::new(
            ErrorKind::NotQcow2,
            "the file does not start with the qcow2 magic",
        ));
    }
    let read = (|| Some((fields.u32()?, fields.take(12)?, fields.u32()?)))();
    let Some((version, _, cluster_bits)) = read else {
        return Err(bad(format!("the file ends inside its header, after {} bytes", first.len())));
    };
    match version {
        2 | 3 => {}
        1 => {
            return Err(Error::new(
                ErrorKind::UnsupportedVersion,
                "qcow version 1 is not supported: convert the image with \
                 `qemu-img convert -f qcow -O qcow2`",
            ));
        }
        _ => {
            return Err(Error::new(
                ErrorKind::UnsupportedVersion,
                format!("qcow2 version {version} is not supported, only 2 and 3"),
            ));
        }
    }
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(bad(format!(
            "the cluster size is 2^{cluster_bits} bytes; \
             2^{MIN_CLUSTER_BITS} to 2^{MAX_CLUSTER_BITS} are possible"
        )));
    }
    Ok((version, cluster_bits))
}

/// A table that the header names must have a sane size, be aligned to a cluster
/// and end before the highest offset.
fn check_table(
    what: &str,
    geometry: Geometry,
    offset: u64,
    entries: u64,
    entry_size: u64,
    max_bytes: u64,
) -> Result<()> {
    if entries > max_bytes / entry_size {
        return Err(bad(format!(
            "the {what} is too large: {entries} entries of {entry_size} bytes, \
             at most {max_bytes} bytes are possible"
        )));
    }
    let end = offset.checked_add(entries * entry_size);
    if geometry.in_cluster(offset) != 0 || end.is_none_or(|end| end > MAX_HOST_OFFSET + 1) {
        return Err(bad(format!("the {what}'s offset {offset:#x} is invalid")));
    }
    Ok(())
}

impl Header {
    /// How many bytes at the start of the file tell [`Header::bytes_wanted`]
    /// how many [`Header::parse`] needs.
    pub const READ_FIRST: usize = KNOWN_LENGTH;

    /// How many bytes of the file [`Header::parse`] wants: the first cluster.
    /// `first` is the start of the file, [`Header::READ_FIRST`] bytes or all
    /// there are.
    ///
    /// Errors: `NotQcow2`, `UnsupportedVersion`, and `BadHeader` for a file that
    /// ends before its cluster size, or an impossible cluster size.
    pub fn bytes_wanted(first: &[u8]) -> Result<usize> {
        let (_, cluster_bits) = version_and_cluster_bits(first)?;
        Ok(1 << cluster_bits)
    }

    /// Reads and checks a header. `bytes` is the first cluster, padded with
    /// zeros if the file is shorter.
    ///
    /// Errors: those of [`Header::bytes_wanted`]; `UnsupportedFeature` naming
    /// incompatible features that nobody has defined yet; `BadHeader` for
    /// everything else.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        Header::parse_as(bytes, false)
    }

    /// Like [`Header::parse`], but accepts what a check can still work with, as
    /// QEMU does: no refcount table, or an impossible snapshot table.
    pub fn parse_for_check(bytes: &[u8]) -> Result<Header> {
        Header::parse_as(bytes, true)
    }

    /// What [`Header::parse_for_check`] has let pass of the snapshot table.
    ///
    /// Errors: `BadHeader`.
    pub fn check_snapshot_table(&self) -> Result<()> {
        check_snapshot_table(self.geometry, self.snapshots_offset, self.snapshot_count)
    }

    fn parse_as(bytes: &[u8], check: bool) -> Result<Header> {
        let (version, cluster_bits) = version_and_cluster_bits(bytes)?;
        let cluster_size = 1usize << cluster_bits;
        let cut = || bad(format!("{} bytes are not the whole first cluster", bytes.len()));
        let cluster = bytes.get(..cluster_size).ok_or_else(cut)?;
        let raw = Raw::read(cluster, version).ok_or_else(cut)?;
        if version >= 3 && raw.header_length < V3_MIN_LENGTH {
            return Err(bad(format!(
                "the header's length is {}, at least {V3_MIN_LENGTH} are needed",
                raw.header_length
            )));
        }
        let header_length = raw.header_length as usize;
        if header_length > cluster_size {
            return Err(bad(format!("the header's length {header_length} exceeds a cluster")));
        }
        let backing_offset = usize::try_from(raw.backing_offset)
            .ok()
            .filter(|offset| *offset <= cluster_size)
            .ok_or_else(|| {
                bad(format!(
                    "the backing file's name begins at {:#x}, outside the first cluster",
                    raw.backing_offset
                ))
            })?;
        let extensions_end = if backing_offset == 0 { cluster_size } else { backing_offset };
        let area = cluster.get(header_length..extensions_end).unwrap_or_default();
        check_features(&raw, area)?;

        let geometry = Geometry {
            cluster_bits,
            extended_l2: raw.incompatible & incompatible::EXTENDED_L2 != 0,
        };
        check_tables(&raw, geometry, check)?;

        let fields = Fields {
            geometry,
            crypt_method: raw.crypt_method,
            bitmaps_valid: raw.autoclear & autoclear::BITMAPS != 0,
        };
        let (extensions, backing_format) = Extensions::parse(area, fields)?;
        if raw.crypt_method == CRYPT_LUKS && extensions.crypto.is_none() {
            return Err(bad("the image is LUKS encrypted, but has no encryption header"));
        }
        let name = backing_name(cluster, backing_offset, raw.backing_length)?;
        Ok(Header {
            version,
            geometry,
            size: raw.size,
            crypt_method: raw.crypt_method,
            backing: name.map(|name| BackingRef { name, format: backing_format }),
            l1_offset: raw.l1_offset,
            l1_size: raw.l1_size,
            reftable_offset: raw.reftable_offset,
            reftable_clusters: raw.reftable_clusters,
            snapshot_count: raw.snapshot_count,
            snapshots_offset: raw.snapshots_offset,
            incompatible: raw.incompatible,
            compatible: raw.compatible,
            autoclear: raw.autoclear,
            refcount_order: raw.refcount_order,
            compression: raw.compression,
            unknown_fields: fallible::copy(
                cluster.get(KNOWN_LENGTH..header_length).unwrap_or_default(),
            )?,
            header_length: raw.header_length,
            extensions,
        })
    }
}

/// Feature bits, encryption and compression must be known and agree.
fn check_features(raw: &Raw, area: &[u8]) -> Result<()> {
    let unknown = raw.incompatible & !incompatible::KNOWN;
    if unknown != 0 {
        return Err(unsupported(format!(
            "the image needs features that are not supported: {}",
            describe_incompatible(unknown, &Extensions::names_in(area))
        )));
    }
    if raw.compression > 1 {
        return Err(bad(format!("compression type {} does not exist", raw.compression)));
    }
    if (raw.compression != 0) != (raw.incompatible & incompatible::COMPRESSION != 0) {
        return Err(bad(format!(
            "the compression type is {}, but the feature bit of compression types says otherwise",
            raw.compression
        )));
    }
    if raw.crypt_method > 2 {
        return Err(bad(format!("encryption method {} does not exist", raw.crypt_method)));
    }
    let raw_data = raw.autoclear & autoclear::RAW_EXTERNAL_DATA != 0;
    if raw_data && raw.incompatible & incompatible::EXTERNAL_DATA == 0 {
        return Err(bad("the data file is said to be raw, but there is no data file"));
    }
    Ok(())
}

/// Sizes and places of what the header points to.
fn check_tables(raw: &Raw, geometry: Geometry, check: bool) -> Result<()> {
    if geometry.subcluster_size() < MIN_SUBCLUSTER_SIZE {
        return Err(bad(format!(
            "subclusters would have {} bytes: extended L2 entries need clusters of at least {}",
            geometry.subcluster_size(),
            MIN_SUBCLUSTER_SIZE * u64::from(geometry.subclusters()),
        )));
    }
    if raw.refcount_order > MAX_REFCOUNT_ORDER {
        return Err(bad(format!(
            "refcounts have 2^{} bits; at most 64 are possible",
            raw.refcount_order
        )));
    }
    if raw.reftable_clusters == 0 && !check {
        return Err(bad("the image has no refcount table"));
    }
    check_table(
        "refcount table",
        geometry,
        raw.reftable_offset,
        raw.reftable_clusters.into(),
        geometry.cluster_size(),
        MAX_REFTABLE_BYTES,
    )?;
    if !check {
        check_snapshot_table(geometry, raw.snapshots_offset, raw.snapshot_count)?;
    }
    check_table("L1 table", geometry, raw.l1_offset, raw.l1_size.into(), 8, MAX_L1_BYTES)?;
    let needed = raw.size.div_ceil(geometry.l2_coverage());
    if needed > u64::from(raw.l1_size) {
        return Err(bad(format!(
            "the L1 table is too small: a disk of {} bytes needs {needed} entries, it has {}",
            raw.size, raw.l1_size
        )));
    }
    Ok(())
}

fn check_snapshot_table(geometry: Geometry, offset: u64, count: u32) -> Result<()> {
    // The bytes of the fixed part of each entry; the rest is seen later.
    const ENTRY: u64 = 40;
    let most = ENTRY * u64::from(MAX_SNAPSHOTS);
    check_table("snapshot table", geometry, offset, count.into(), ENTRY, most)
}

/// The backing file's name, `None` if there is none.
fn backing_name(cluster: &[u8], offset: usize, length: u32) -> Result<Option<Vec<u8>>> {
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(length)
        .ok()
        .filter(|length| *length <= MAX_BACKING_NAME)
        .and_then(|length| cluster.get(offset..)?.get(..length))
        .ok_or_else(|| {
            bad(format!("the backing file's name at {offset:#x} is too long: {length} bytes"))
        })?;
    let name = c_string(name);
    Ok((!name.is_empty()).then(|| name.to_vec()))
}
