//! Headers and pieces of them that the tests of this module start from.

use super::extensions::{Extensions, FeatureName};
use super::header::{BackingRef, Header};
use crate::error::ErrorKind;
use crate::geometry::Geometry;

/// A fresh image of 1 MiB as QEMU makes it.
pub(super) fn header(cluster_bits: u32) -> Header {
    let cluster = 1u64 << cluster_bits;
    let geometry = Geometry { cluster_bits, extended_l2: false };
    Header {
        version: 3,
        geometry,
        size: 1 << 20,
        crypt_method: 0,
        backing: None,
        l1_offset: 3 * cluster,
        l1_size: (1u64 << 20).div_ceil(geometry.l2_coverage()) as u32,
        reftable_offset: cluster,
        reftable_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        compression: 0,
        unknown_fields: Vec::new(),
        header_length: 112,
        extensions: Extensions::default(),
    }
}

pub(super) fn backing(name: &[u8], format: Option<&[u8]>) -> Option<BackingRef> {
    Some(BackingRef { name: name.to_vec(), format: format.map(<[u8]>::to_vec) })
}

/// The bytes of a header, with some of them replaced.
pub(super) fn patched(header: &Header, patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = header.to_bytes().unwrap();
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    bytes
}

/// What parsing a 64 KiB cluster header with patches says.
pub(super) fn parse_patched(patches: &[(usize, &[u8])]) -> Result<Header, ErrorKind> {
    Header::parse(&patched(&header(16), patches)).map_err(|error| error.kind())
}

/// A 512-byte cluster whose extension area holds `area`, up to a backing name
/// or, without one, to the end.
pub(super) fn with_area(area: &[u8], name: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = header(9).to_bytes().unwrap();
    bytes[112..112 + area.len()].copy_from_slice(area);
    if let Some(name) = name {
        let at = 112 + area.len();
        bytes[8..16].copy_from_slice(&(at as u64).to_be_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        bytes[at..at + name.len()].copy_from_slice(name);
    }
    bytes
}

pub(super) fn extension(magic: u32, data: &[u8]) -> Vec<u8> {
    let mut out = [magic.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

pub(super) fn kind<T>(result: crate::error::Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const CRYPTO: u32 = 0x0537_be77;
pub(super) const BITMAPS: u32 = 0x2385_2875;
pub(super) const DATA_FILE: u32 = 0x4441_5441;

/// QEMU's own table, which a rewritten header has above 4 KiB clusters.
pub(super) fn with_names(mut header: Header) -> Header {
    let names = super::features::KNOWN_NAMES.map(|(kind, bit, name)| FeatureName {
        kind,
        bit,
        name: name.as_bytes().to_vec(),
    });
    let written = header.version == 3 && header.geometry.cluster_bits > 12;
    header.extensions.feature_names = written.then(|| names.to_vec());
    header
}
