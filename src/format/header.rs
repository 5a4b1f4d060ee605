//! The header: the first cluster of an image, from bytes and to bytes.
//!
//! It refuses what no program could make sense of, with QEMU's limits. What
//! this build cannot do with a sound image is [`Header::unsupported`]'s answer;
//! whether tables overlap or lie inside the file is not known here.

use super::bytes::{Reader, c_string};
use super::extensions::{Extensions, Fields};
use super::features::describe_incompatible;
pub use super::features::{autoclear, compatible, incompatible};
use super::limits::{
    MAX_BACKING_FORMAT, MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MAX_L1_BYTES,
    MAX_REFCOUNT_ORDER, MAX_REFTABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS, MIN_SUBCLUSTER_SIZE,
};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;

/// The first four bytes of every qcow2 image.
pub const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");

/// Bytes of a version 2 header.
const V2_LENGTH: u32 = 72;
/// Bytes of the shortest version 3 header.
const V3_MIN_LENGTH: u32 = 104;
/// Bytes of the fields that we know, which are those that we write.
const KNOWN_LENGTH: usize = 112;
/// QEMU writes feature names only into clusters larger than this.
const NAMES_ABOVE: u64 = 4096;

/// A header whose fields are valid one by one and with each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size and kind of L2 entries.
    pub geometry: Geometry,
    /// Size of the virtual disk in bytes, as stored; see [`Header::virtual_size`].
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// The backing file, if there is one.
    pub backing: Option<BackingRef>,
    /// Where the active L1 table begins.
    pub l1_offset: u64,
    /// Number of entries of the active L1 table.
    pub l1_size: u32,
    /// Where the refcount table begins.
    pub reftable_offset: u64,
    /// Number of clusters of the refcount table.
    pub reftable_clusters: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table begins.
    pub snapshots_offset: u64,
    /// Bits of [`incompatible`].
    pub incompatible: u64,
    /// Bits of [`compatible`].
    pub compatible: u64,
    /// Bits of [`autoclear`].
    pub autoclear: u64,
    /// log2 of the number of bits of a refcount, 0 to 6.
    pub refcount_order: u32,
    /// Compression type: 0 deflate, 1 zstd.
    pub compression: u8,
    /// The fields behind those that we know, byte 112 to `header_length`.
    pub unknown_fields: Vec<u8>,
    /// Length of the fields as stored. Not written back: a rewritten header is
    /// as long as its fields.
    pub header_length: u32,
    /// The header extensions.
    pub extensions: Extensions,
}

/// What an image says of its backing file. Both are plain bytes that a hostile
/// image may choose freely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// The file's name; never empty, without NUL.
    pub name: Vec<u8>,
    /// The file's format; `None` if the image does not tell.
    pub format: Option<Vec<u8>>,
}

fn bad(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadHeader, context)
}

fn unsupported(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::UnsupportedFeature, context)
}

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
            unknown_fields: cluster.get(KNOWN_LENGTH..header_length).unwrap_or_default().to_vec(),
            header_length: raw.header_length,
            extensions,
        })
    }

    /// The first cluster, laid out as QEMU does: fields, unknown fields,
    /// extensions, backing file name, zeros.
    ///
    /// Errors: `InvalidArgument` if the fields contradict each other or do not
    /// fit into a cluster.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.check_writable()?;
        let cluster_size = self.geometry.cluster_size();
        let mut out = Vec::new();
        out.extend(MAGIC.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        out.extend([0; 12]); // the backing file name's place, known below
        out.extend(self.geometry.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_patch());
        out.extend(self.reftable_patch());
        out.extend(self.snapshots_patch());
        if self.version >= 3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            let length = KNOWN_LENGTH.saturating_add(self.unknown_fields.len());
            out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
            out.extend([self.compression, 0, 0, 0, 0, 0, 0, 0]);
            out.extend(&self.unknown_fields);
        }
        let format = self.backing.as_ref().and_then(|backing| backing.format.as_deref());
        let names = self.version >= 3 && cluster_size > NAMES_ABOVE;
        self.extensions.append_to(&mut out, format, self.external_data_file(), names);
        if let Some(backing) = &self.backing {
            let mut place = (out.len() as u64).to_be_bytes().to_vec();
            place.extend((backing.name.len() as u32).to_be_bytes());
            out.splice(8..20, place);
            out.extend(&backing.name);
        }
        if out.len() as u64 > cluster_size {
            return Err(Error::invalid(format!(
                "the header needs {} bytes but a cluster has {cluster_size}: shorten the backing \
                 file's name or use larger clusters",
                out.len()
            )));
        }
        out.resize(1 << self.geometry.cluster_bits, 0);
        Ok(out)
    }

    /// What [`Header::to_bytes`] could not express.
    fn check_writable(&self) -> Result<()> {
        let v3_only = self.incompatible != 0
            || self.compatible != 0
            || self.autoclear != 0
            || self.refcount_order != 4
            || self.compression != 0
            || !self.unknown_fields.is_empty();
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&self.geometry.cluster_bits) {
            return Err(Error::invalid("the cluster size is out of range"));
        }
        if self.version != 3 && (self.version != 2 || v3_only) {
            return Err(Error::invalid("the header's fields need version 3"));
        }
        if self.geometry.extended_l2 != (self.incompatible & incompatible::EXTENDED_L2 != 0) {
            return Err(Error::invalid("geometry and feature bit disagree on extended L2 entries"));
        }
        if (self.compression != 0) != (self.incompatible & incompatible::COMPRESSION != 0) {
            return Err(Error::invalid("compression type and feature bit disagree"));
        }
        let Some(backing) = &self.backing else { return Ok(()) };
        if backing.name.is_empty()
            || backing.name.len() > MAX_BACKING_NAME
            || backing.name.contains(&0)
        {
            return Err(Error::invalid(format!(
                "the backing file's name must have 1 to {MAX_BACKING_NAME} bytes and no NUL"
            )));
        }
        if backing.format.as_ref().is_some_and(|format| format.len() > MAX_BACKING_FORMAT) {
            return Err(Error::invalid(format!(
                "the backing format's name must have at most {MAX_BACKING_FORMAT} bytes"
            )));
        }
        Ok(())
    }

    /// Refuses, by name, what this build cannot do with an image whose header
    /// is sound.
    ///
    /// Errors: `UnsupportedFeature`; for writing also `MarkedCorrupt`, and
    /// `Corrupt` if a table lies in the header's cluster, where its first
    /// update would destroy the header.
    pub fn unsupported(&self, writable: bool) -> Result<()> {
        match self.crypt_method {
            0 => {}
            1 => return Err(unsupported("the image is encrypted (legacy AES)")),
            2 => return Err(unsupported("the image is encrypted (LUKS)")),
            method => return Err(bad(format!("encryption method {method} does not exist"))),
        }
        if self.external_data_file() {
            return Err(unsupported("the image keeps its data in an external data file"));
        }
        match self.compression {
            0 => {}
            1 => return Err(unsupported("the image uses zstd compression")),
            other => return Err(bad(format!("compression type {other} does not exist"))),
        }
        if !writable {
            return Ok(());
        }
        if self.corrupt() {
            return Err(Error::new(
                ErrorKind::MarkedCorrupt,
                "the image is marked corrupt: repair it with `qemu-img check -r all` or open it \
                 read-only",
            ));
        }
        if self.dirty() {
            return Err(unsupported(
                "the image was not closed cleanly: repair it with `qemu-img check -r all`",
            ));
        }
        let tables = [
            ("L1 table", self.l1_offset, self.l1_size),
            ("refcount table", self.reftable_offset, self.reftable_clusters),
            ("snapshot table", self.snapshots_offset, self.snapshot_count),
        ];
        for (what, offset, entries) in tables {
            if offset == 0 && entries > 0 {
                return Err(Error::corrupt(format!("the {what} lies in the header, at offset 0")));
            }
        }
        Ok(())
    }

    /// Size of the virtual disk in bytes: whole sectors of 512 bytes.
    pub fn virtual_size(&self) -> u64 {
        self.size & !511
    }

    /// Number of L1 entries that map the virtual disk. VM state of snapshots
    /// lies behind them.
    pub fn l1_entries_needed(&self) -> u64 {
        self.size.div_ceil(self.geometry.l2_coverage())
    }

    /// Number of bits of a refcount, 1 to 64.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order.min(MAX_REFCOUNT_ORDER)
    }

    /// Whether refcounts may be stale.
    pub fn dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether the image is marked corrupt.
    pub fn corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether guest data lies in another file.
    pub fn external_data_file(&self) -> bool {
        self.incompatible & incompatible::EXTERNAL_DATA != 0
    }

    /// Whether the external data file is a raw image by itself.
    pub fn raw_external_data(&self) -> bool {
        self.autoclear & autoclear::RAW_EXTERNAL_DATA != 0
    }

    /// Whether refcounts may be written late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }

    /// Whether L2 entries carry a subcluster bitmap.
    pub fn extended_l2(&self) -> bool {
        self.geometry.extended_l2
    }

    /// Autoclear bits that a program that does not know them, like this one,
    /// must clear before it writes to the image.
    pub fn unknown_autoclear(&self) -> u64 {
        self.autoclear & !autoclear::KNOWN
    }

    /// Where the virtual size (8 bytes) stands in the header.
    pub const SIZE_AT: u64 = 24;
    /// Where [`Header::l1_patch`] stands in the header.
    pub const L1_AT: u64 = 36;
    /// Where [`Header::reftable_patch`] stands in the header.
    pub const REFTABLE_AT: u64 = 48;
    /// Where [`Header::snapshots_patch`] stands in the header.
    pub const SNAPSHOTS_AT: u64 = 60;
    /// Where the incompatible feature bits (8 bytes) stand in a version 3 header.
    pub const INCOMPATIBLE_AT: u64 = 72;

    /// Size and offset of the L1 table, to be replaced in place by one write.
    pub fn l1_patch(&self) -> [u8; 12] {
        patch((u128::from(self.l1_size) << 64) | u128::from(self.l1_offset))
    }

    /// Offset and size of the refcount table, to be replaced by one write.
    pub fn reftable_patch(&self) -> [u8; 12] {
        patch((u128::from(self.reftable_offset) << 32) | u128::from(self.reftable_clusters))
    }

    /// Count and offset of the snapshots, to be replaced by one write.
    pub fn snapshots_patch(&self) -> [u8; 12] {
        patch((u128::from(self.snapshot_count) << 64) | u128::from(self.snapshots_offset))
    }
}

/// The low 12 bytes of a number, big endian.
fn patch(fields: u128) -> [u8; 12] {
    let bytes = fields.to_be_bytes();
    std::array::from_fn(|i| bytes[i + 4])
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
        // The bytes of the fixed part of each entry; the rest is seen later.
        const ENTRY: u64 = 40;
        check_table(
            "snapshot table",
            geometry,
            raw.snapshots_offset,
            raw.snapshot_count.into(),
            ENTRY,
            ENTRY * u64::from(MAX_SNAPSHOTS),
        )?;
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
