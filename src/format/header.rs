//! The header: the first cluster of an image, from bytes and to bytes.
//!
//! It refuses what no program could make sense of, with QEMU's limits. What
//! this build cannot do with a sound image is [`Header::unsupported`]'s answer;
//! whether tables overlap or lie inside the file is not known here.

mod parse;
pub mod rewrite;

use super::compression::Compression;
use super::extensions::Extensions;
pub use super::features::{autoclear, compatible, incompatible};
use super::limits::{
    MAX_BACKING_FORMAT, MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_REFCOUNT_ORDER, MIN_CLUSTER_BITS,
};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;

/// The first four bytes of every qcow2 image.
pub const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");

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
    /// Compression type, see [`Compression::number`].
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

impl Header {
    /// The first cluster, laid out as QEMU does: fields, unknown fields,
    /// extensions, backing file name, zeros.
    ///
    /// Errors: `InvalidArgument` if the fields contradict each other or do not
    /// fit into a cluster.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.check_writable()?;
        let cluster_size = self.geometry.cluster_size();
        let names = self.version >= 3 && cluster_size > NAMES_ABOVE;
        let mut out = self.head(names);
        if let Some(backing) = &self.backing {
            let at = out.len() as u64;
            place_name(&mut out, at, backing);
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

    /// The fields and the extensions; the backing file's name has no place yet.
    /// `names`: with the names of feature bits.
    fn head(&self, names: bool) -> Vec<u8> {
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
        self.extensions.append_to(&mut out, format, self.external_data_file(), names);
        out
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
        Compression::of(self.compression)?;
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

    /// Memory for what the header may have any number of, in bytes.
    pub fn extra_bytes(&self) -> u64 {
        const EACH: usize = 32;
        let Extensions { feature_names, unknown, .. } = &self.extensions;
        let names = feature_names.iter().flatten().map(|name| name.name.len());
        let lengths = names.chain(unknown.iter().map(|(_, data)| data.len()));
        (lengths.map(|length| EACH + length).sum::<usize>() + self.unknown_fields.len()) as u64
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
    /// Where the autoclear feature bits (8 bytes) stand in a version 3 header.
    pub const AUTOCLEAR_AT: u64 = 88;

    /// The virtual size and all that says where tables are, with the feature bits
    /// that a driver may not know and read on, at [`Header::SIZE_AT`]. It lies in one
    /// sector: one write replaces all of it or nothing.
    pub fn tables_patch(&self) -> Vec<u8> {
        let mut patch = self.size.to_be_bytes().to_vec();
        patch.extend(self.crypt_method.to_be_bytes());
        patch.extend(self.l1_patch());
        patch.extend(self.reftable_patch());
        patch.extend(self.snapshots_patch());
        if self.version >= 3 {
            patch.extend(self.incompatible.to_be_bytes());
        }
        patch
    }

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

/// Says in the fields where the backing file's name lies.
fn place_name(head: &mut Vec<u8>, at: u64, backing: &BackingRef) {
    let mut place = at.to_be_bytes().to_vec();
    place.extend((backing.name.len() as u32).to_be_bytes());
    head.splice(8..20, place);
}

/// The low 12 bytes of a number, big endian.
fn patch(fields: u128) -> [u8; 12] {
    let [_, _, _, _, patch @ ..] = fields.to_be_bytes();
    patch
}
