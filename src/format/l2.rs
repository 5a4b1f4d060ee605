//! L2 entries: what is known of one cluster of the virtual disk.
//!
//! Standard entries (8 bytes) and extended ones (16 bytes, with a bitmap of
//! subclusters) become the same [`Cluster`]; from here on nothing else looks at
//! raw entries. Pure; from the format's document, section "L2 table entry".

use super::compressed;
use super::limits::OFFSET_MASK;
use super::subcluster::{self, Mask, Subcluster};
use crate::error::{Error, Result};
use crate::geometry::{DataOffset, Geometry, GuestCluster, HostOffset};

/// Refcount is exactly one: the cluster may be written in place. In L1, too.
pub const COPIED: u64 = 1 << 63;
/// Compressed data.
pub const COMPRESSED: u64 = 1 << 62;
/// Reads as zero; means nothing in extended entries.
pub const ZERO: u64 = 1;

/// An entry as it is stored; `bitmap` is 0 where entries are not extended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L2Entry {
    /// First 8 bytes.
    pub descriptor: u64,
    /// Second 8 bytes: subclusters that read as zero (high half) and that are
    /// allocated (low half).
    pub bitmap: u64,
}

/// What an entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cluster {
    /// No host cluster: reads as zero in `zero`, as the backing file elsewhere.
    None {
        /// Subclusters that read as zero.
        zero: Mask,
    },
    /// A host cluster.
    Standard {
        /// Where it begins.
        host: DataOffset,
        /// Whether it may be written in place (refcount exactly one).
        copied: bool,
        /// Subclusters stored in it.
        alloc: Mask,
        /// Subclusters that read as zero; disjoint from `alloc`.
        zero: Mask,
    },
    /// Compressed data.
    Compressed(compressed::Compressed),
}

/// How the entries of an image are to be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct L2Format {
    /// Sizes.
    pub geometry: Geometry,
    /// Header version: version 2 knows no zero clusters.
    pub version: u32,
    /// Guest data lies in a file of its own, each cluster where the guest has it.
    /// There offset 0 with the COPIED flag is a place; and none is shared.
    pub data_file: bool,
}

impl L2Format {
    /// Number of 8-byte words of an entry.
    pub fn words(self) -> usize {
        if self.geometry.extended_l2 { 2 } else { 1 }
    }

    /// Reads an entry. `Corrupt` where the format or QEMU's driver calls it so;
    /// reserved bits are ignored, as QEMU does.
    pub fn decode(self, entry: L2Entry) -> Result<Cluster> {
        let L2Entry { descriptor, bitmap } = entry;
        if descriptor & COMPRESSED != 0 {
            // QEMU reads on whatever the bitmap says: only check complains.
            return compressed::decode(descriptor, self.geometry).map(Cluster::Compressed);
        }
        let (alloc, zero) = if self.geometry.extended_l2 {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else if descriptor & ZERO == 0 {
            (self.place(descriptor).is_some() as u32, 0)
        } else if self.version < 3 {
            return Err(Error::corrupt("a version 2 image has an L2 entry with the zero flag"));
        } else {
            (0, 1)
        };
        let Some(host) = self.place(descriptor) else {
            return match alloc {
                0 => Ok(Cluster::None { zero }),
                _ => Err(Error::corrupt(format!(
                    "an L2 entry has no host cluster but allocated subclusters ({bitmap:#018x})"
                ))),
            };
        };
        if self.geometry.in_cluster(host.get()) != 0 {
            return Err(Error::corrupt(format!(
                "an L2 entry points to {host}, which is not the start of a cluster"
            )));
        }
        if alloc & zero != 0 {
            return Err(Error::corrupt(format!(
                "an L2 entry has subclusters both allocated and zero ({bitmap:#018x})"
            )));
        }
        let copied = descriptor & COPIED != 0 || self.data_file;
        Ok(Cluster::Standard { host, copied, alloc, zero })
    }

    /// As `decode`, for the entry of `cluster`: in a data file it has one place only, and
    /// nothing is compressed.
    #[inline]
    pub fn decode_at(self, entry: L2Entry, cluster: GuestCluster) -> Result<Cluster> {
        let decoded = self.decode(entry)?;
        if self.data_file && !mutant!(DataFilePlaceBelieved) {
            self.check_data_file(&decoded, cluster)?;
        }
        Ok(decoded)
    }

    fn check_data_file(self, decoded: &Cluster, cluster: GuestCluster) -> Result<()> {
        let place = self.geometry.guest_start(cluster);
        match *decoded {
            Cluster::Standard { host, .. } if host.get() != place.0 => {
                Err(Error::corrupt(format!(
                    "an L2 entry points to {host} in the external data file, where {place} is the \
                     only place"
                )))
            }
            Cluster::Compressed(_) => {
                let text = "an L2 entry is compressed, in an image with an external data file";
                Err(Error::corrupt(text))
            }
            Cluster::Standard { .. } | Cluster::None { .. } => Ok(()),
        }
    }

    /// The place that an entry that is not compressed names.
    #[inline]
    fn place(self, descriptor: u64) -> Option<DataOffset> {
        if let Some(host) = HostOffset::new(descriptor & OFFSET_MASK) {
            return Some(host.into());
        }
        // With the zero flag QEMU takes it for none.
        let plain_zero = !self.geometry.extended_l2 && descriptor & ZERO != 0;
        let is_place = self.data_file && descriptor & COPIED != 0 && !plain_zero;
        is_place.then_some(DataOffset::in_data_file(0))
    }

    /// The common case of `decode`: `len` bytes (at least 1) of the cluster, from
    /// the position `from` on, are all stored in its host cluster: where, and may they
    /// be written in place? `None`: anything else; ask `decode`.
    #[inline]
    pub fn stored(self, entry: L2Entry, from: u64, len: u64) -> Option<(DataOffset, bool)> {
        let L2Entry { descriptor, bitmap } = entry;
        let host = self.place(descriptor)?;
        let (flags, wanted) = if self.geometry.extended_l2 {
            let bits = self.geometry.subcluster_bits();
            let last = from.checked_add(len)?.checked_sub(1)? >> bits;
            let up_to_last = u32::MAX.checked_shr(31u32.checked_sub(last as u32)?)?;
            (COMPRESSED, up_to_last & u32::MAX.checked_shl((from >> bits) as u32)?)
        } else {
            (COMPRESSED | ZERO, 0)
        };
        let (alloc, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        let plain = descriptor & flags == 0
            && alloc & wanted == wanted
            && alloc & zero == 0
            && self.geometry.in_cluster(host.get()) == 0;
        let copied = descriptor & COPIED != 0 || self.data_file;
        if plain { Some((host.checked_add(from)?, copied)) } else { None }
    }

    /// The entry for what is to be said. Compressed data has to be
    /// where `compressed::encode` can say it.
    pub fn encode(self, cluster: Cluster) -> L2Entry {
        let (offset, copied, alloc, zero) = match cluster {
            Cluster::None { zero } => (0, false, 0, zero),
            Cluster::Standard { host, copied, alloc, zero } => {
                (host.get(), copied || mutant!(SharedMarkedCopied), alloc, zero)
            }
            Cluster::Compressed(data) => {
                let descriptor = compressed::encode(data.offset, data.length, self.geometry);
                return L2Entry {
                    descriptor: descriptor.map_or(0, |entry| entry | COMPRESSED),
                    bitmap: 0,
                };
            }
        };
        let flags = if copied { COPIED } else { 0 };
        if self.geometry.extended_l2 {
            let bitmap = u64::from(zero) << 32 | u64::from(alloc);
            L2Entry { descriptor: offset | flags, bitmap }
        } else {
            L2Entry { descriptor: offset | flags | u64::from(zero & 1), bitmap: 0 }
        }
    }
}

impl Cluster {
    /// What subcluster `index` is.
    pub fn subcluster(&self, index: u32) -> Subcluster {
        let has = |set: Mask| set >> index & 1 == 1;
        match *self {
            Cluster::None { zero } if has(zero) => Subcluster::Zero,
            Cluster::None { .. } => Subcluster::Unallocated,
            Cluster::Standard { alloc, .. } if has(alloc) => Subcluster::Normal,
            Cluster::Standard { zero, .. } if has(zero) => Subcluster::ZeroReserved,
            Cluster::Standard { .. } => Subcluster::Reserved,
            Cluster::Compressed(_) => Subcluster::Compressed,
        }
    }

    /// What subcluster `from` is, and how many from there on are the same.
    pub fn run(&self, from: u32, count: u32) -> (Subcluster, u32) {
        let len = match *self {
            Cluster::None { zero } => subcluster::alike(zero, from, count),
            Cluster::Standard { alloc, zero, .. } => {
                subcluster::alike(alloc, from, count).min(subcluster::alike(zero, from, count))
            }
            Cluster::Compressed(_) => count.saturating_sub(from),
        };
        (self.subcluster(from), len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn format(extended_l2: bool) -> L2Format {
        L2Format {
            geometry: Geometry { cluster_bits: 16, extended_l2 },
            version: 3,
            data_file: false,
        }
    }

    #[test]
    fn alloc_and_zero_anywhere_spoil_the_whole_entry() {
        let entry = L2Entry { descriptor: COPIED | 0x50000, bitmap: 1 << 63 | 1 << 31 };
        assert!(format(true).decode(entry).is_err());
    }

    #[test]
    fn alloc_without_host_cluster_is_corrupt() {
        let entry = L2Entry { descriptor: 0, bitmap: 1 };
        assert!(format(true).decode(entry).is_err());
    }

    #[test]
    fn extended_entries_ignore_the_standard_zero_flag() {
        let entry = L2Entry { descriptor: COPIED | 0x50000 | ZERO, bitmap: 1 };
        let cluster = format(true).decode(entry).unwrap();
        assert_eq!(cluster.subcluster(0), Subcluster::Normal);
    }

    #[test]
    fn zero_flag_in_version_2_is_corrupt() {
        let v2 = L2Format { version: 2, ..format(false) };
        assert!(v2.decode(L2Entry { descriptor: ZERO, bitmap: 0 }).is_err());
    }

    #[test]
    fn unaligned_host_offset_is_corrupt() {
        assert!(format(false).decode(L2Entry { descriptor: 0x50200, bitmap: 0 }).is_err());
    }

    #[test]
    fn reserved_bits_do_not_stop_reads() {
        let entry = L2Entry { descriptor: COPIED | 0x3f00_0000_0000_01fe | 0x50000, bitmap: 0 };
        let cluster = format(false).decode(entry).unwrap();
        assert_eq!(cluster.subcluster(0), Subcluster::Normal);
    }

    #[test]
    fn each_kind_of_extended_subcluster_is_told_apart() {
        let host = HostOffset::new(0x50000).unwrap().into();
        let cluster = Cluster::Standard { host, copied: true, alloc: 0b001, zero: 0b010 };
        assert_eq!(cluster.run(0, 32), (Subcluster::Normal, 1));
        assert_eq!(cluster.run(1, 32), (Subcluster::ZeroReserved, 1));
        assert_eq!(cluster.run(2, 32), (Subcluster::Reserved, 30));
        let none = Cluster::None { zero: 0b10 };
        assert_eq!(none.run(0, 32), (Subcluster::Unallocated, 1));
        assert_eq!(none.run(1, 32), (Subcluster::Zero, 1));
    }

    proptest! {
        #[test]
        fn entries_survive_a_round_trip(
            extended: bool, host in 1u64..1 << 40, copied: bool, a: u32, z: u32,
        ) {
            let format = format(extended);
            let count = format.geometry.subclusters();
            let (alloc, zero) = (a & !z & subcluster::all(count), z & subcluster::all(count));
            let none = Cluster::None { zero };
            prop_assert_eq!(format.decode(format.encode(none)).unwrap(), none);
            // A standard entry with a host cluster is either normal or zero.
            let alloc = if extended { alloc } else { !zero & 1 };
            let host = HostOffset::new(host << 16).unwrap().into();
            let standard = Cluster::Standard { host, copied, alloc, zero };
            prop_assert_eq!(format.decode(format.encode(standard)).unwrap(), standard);
        }

        #[test]
        fn runs_agree_with_single_subclusters(a: u32, z: u32, from in 0u32..32) {
            let host = HostOffset::new(0x50000).unwrap().into();
            let cluster = Cluster::Standard { host, copied: true, alloc: a & !z, zero: z };
            let (kind, len) = cluster.run(from, 32);
            prop_assert!(len >= 1 && from + len <= 32);
            for x in from..from + len {
                prop_assert_eq!(cluster.subcluster(x), kind);
            }
            if from + len < 32 {
                prop_assert_ne!(cluster.subcluster(from + len), kind);
            }
        }

        #[test]
        fn the_common_case_agrees_with_the_rest(
            flags: u64, host in 0u64..4, a: u32, z: u32, disjoint: bool, full: bool,
            extended: bool, version in 2u32..4, from in 0u64..65536, len in 1u64..=65536,
        ) {
            let format = L2Format { version, ..format(extended) };
            let rare = flags & (COPIED | COMPRESSED & flags << 1 & flags << 2 | ZERO);
            let descriptor = rare | host << 16 | u64::from(flags >> 20 & 15 == 0) << 9;
            let alloc = if full { u32::MAX } else { a };
            let zero = if disjoint { z & !alloc } else { z };
            let bitmap = if extended { u64::from(zero) << 32 | u64::from(alloc) } else { 0 };
            let entry = L2Entry { descriptor, bitmap };
            let len = len.min(65536 - from);
            let expected = match format.decode(entry) {
                Ok(cluster @ Cluster::Standard { host, copied, .. }) => {
                    let all = format.geometry.subcluster_range(from..from + len).all(|index| {
                        cluster.subcluster(index) == Subcluster::Normal
                    });
                    all.then(|| (host.checked_add(from).unwrap(), copied))
                }
                _ => None,
            };
            prop_assert_eq!(format.stored(entry, from, len), expected);
        }

        #[test]
        fn no_entry_makes_it_panic(descriptor: u64, bitmap: u64, extended: bool, version in 2u32..4) {
            let format = L2Format { version, ..format(extended) };
            if let Ok(cluster) = format.decode(L2Entry { descriptor, bitmap }) {
                let _ = cluster.run(0, format.geometry.subclusters());
            }
        }
    }
}
