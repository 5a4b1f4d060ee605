//! Feature bits of the header and their names.
//!
//! It knows which bits exist, not what the driver does about them.

use super::extensions::FeatureName;

/// Bits that a reader must understand, or leave the image alone.
pub mod incompatible {
    /// Refcounts may be stale: the image was not closed cleanly.
    pub const DIRTY: u64 = 1 << 0;
    /// Metadata is known to be wrong: not to be written before a repair.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lies in another file.
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    /// Compressed clusters are not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 16 bytes long and carry a subcluster bitmap.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All bits that have a meaning today.
    pub const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;
}

/// Bits that a program may ignore, and must keep.
pub mod compatible {
    /// Refcounts are written late; see the dirty bit.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits that a program that does not know them clears before it writes.
pub mod autoclear {
    /// The bitmaps extension is consistent with the image.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a valid raw image by itself.
    pub const RAW_EXTERNAL_DATA: u64 = 1 << 1;
    /// All bits that have a meaning today.
    pub const KNOWN: u64 = BITMAPS | RAW_EXTERNAL_DATA;
}

/// The kind of a feature name: an incompatible feature.
pub const KIND_INCOMPATIBLE: u8 = 0;
/// The kind of a feature name: a compatible feature.
pub const KIND_COMPATIBLE: u8 = 1;
/// The kind of a feature name: an autoclear feature.
pub const KIND_AUTOCLEAR: u8 = 2;

/// The names that QEMU gives to the features, in the order of its table:
/// kind, bit, name.
pub const KNOWN_NAMES: [(u8, u8, &str); 8] = [
    (KIND_INCOMPATIBLE, 0, "dirty bit"),
    (KIND_INCOMPATIBLE, 1, "corrupt bit"),
    (KIND_INCOMPATIBLE, 2, "external data file"),
    (KIND_INCOMPATIBLE, 3, "compression type"),
    (KIND_INCOMPATIBLE, 4, "extended L2 entries"),
    (KIND_COMPATIBLE, 0, "lazy refcounts"),
    (KIND_AUTOCLEAR, 0, "bitmaps"),
    (KIND_AUTOCLEAR, 1, "raw external data"),
];

/// Names incompatible features for a person: by the image's own table, else by
/// ours, else by the bit.
pub(super) fn describe_incompatible(mask: u64, table: &[FeatureName]) -> String {
    let names: Vec<String> = (0..64u8)
        .filter(|bit| mask & (1 << bit) != 0)
        .map(|bit| {
            let own = table
                .iter()
                .find(|name| name.kind == KIND_INCOMPATIBLE && name.bit == bit)
                .map(|name| String::from_utf8_lossy(&name.name).into_owned());
            let known = || {
                KNOWN_NAMES
                    .iter()
                    .find(|(kind, known, _)| *kind == KIND_INCOMPATIBLE && *known == bit)
                    .map(|(_, _, name)| (*name).to_string())
            };
            own.or_else(known).unwrap_or_else(|| format!("bit {bit} ({:#x})", 1u64 << bit))
        })
        .collect();
    names.join(", ")
}
