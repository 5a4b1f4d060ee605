//! The directory of persistent dirty bitmaps, and the entries of their tables.
//!
//! It knows entries and their limits, not the bits of a bitmap.

use super::bytes::Reader;
use super::limits::{
    MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAPS, MAX_HOST_OFFSET, MIN_BITMAP_GRANULARITY_BITS,
    OFFSET_MASK,
};
use crate::error::{Error, Result};
use crate::geometry::{Geometry, HostOffset};

/// Flag: the bitmap was not saved since it was loaded; its content is stale.
pub const IN_USE: u32 = 1 << 0;
/// Flag: the bitmap records writes by itself once it is loaded.
pub const AUTO: u32 = 1 << 1;

/// The most bytes that an entry of the directory has, padding included.
pub const LONGEST_ENTRY: u64 = (24 + MAX_BITMAP_NAME as u64).next_multiple_of(8);

/// The only type of bitmap there is: dirty tracking.
const TYPE_DIRTY: u8 = 1;
/// Entries of a bitmap's table: bits that must be zero.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Entries of a bitmap's table: without an offset, all bits are one.
const ALL_ONES: u64 = 1;

/// One entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where its table begins.
    pub table_offset: u64,
    /// Number of 8-byte entries of its table.
    pub table_entries: u32,
    /// [`IN_USE`] and [`AUTO`].
    pub flags: u32,
    /// log2 of the bytes of the virtual disk that one bit stands for.
    pub granularity_bits: u8,
    /// Its name.
    pub name: Vec<u8>,
}

/// What an entry of a bitmap's table says of one cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All bits are zero; nothing is stored.
    Zeros,
    /// All bits are one; nothing is stored.
    Ones,
    /// The bits are stored here.
    Stored(HostOffset),
}

/// Reads a bitmap directory that consists of exactly `count` entries.
///
/// Errors: `Corrupt` for entries outside the limits, too few or too many.
pub fn parse_directory(bytes: &[u8], count: u32) -> Result<Vec<BitmapEntry>> {
    if count > MAX_BITMAPS || bytes.len() as u64 > MAX_BITMAP_DIRECTORY_BYTES {
        return Err(Error::corrupt(format!(
            "a bitmap directory of {count} bitmaps and {} bytes is too large",
            bytes.len()
        )));
    }
    let mut directory = Reader::new(bytes);
    let mut entries = Vec::new();
    for index in 0..count {
        let entry = RawEntry::read(&mut directory).ok_or_else(|| {
            Error::corrupt(format!("the bitmap directory ends inside entry {index} of {count}"))
        })?;
        entries.push(entry.checked(index)?);
    }
    match directory.remaining() {
        0 => Ok(entries),
        more => Err(Error::corrupt(format!(
            "{more} bytes follow the {count} bitmaps of the bitmap directory"
        ))),
    }
}

/// The bytes of a bitmap directory.
///
/// Errors: `InvalidArgument` for what [`parse_directory`] would refuse.
pub fn encode_directory(entries: &[BitmapEntry]) -> Result<Vec<u8>> {
    if entries.len() > MAX_BITMAPS as usize {
        return Err(Error::invalid(format!("an image can have {MAX_BITMAPS} bitmaps")));
    }
    let mut out = Vec::new();
    for entry in entries {
        if let Some(problem) = entry.problem() {
            return Err(Error::invalid(format!("the bitmap's {problem}")));
        }
        out.extend(entry.table_offset.to_be_bytes());
        out.extend(entry.table_entries.to_be_bytes());
        out.extend(entry.flags.to_be_bytes());
        out.extend([TYPE_DIRTY, entry.granularity_bits]);
        // At most 1023, as checked.
        out.extend((entry.name.len() as u16).to_be_bytes());
        out.extend([0; 4]); // no extra data
        out.extend(&entry.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    if out.len() as u64 > MAX_BITMAP_DIRECTORY_BYTES {
        return Err(Error::invalid("the bitmap directory would be too large"));
    }
    Ok(out)
}

/// An entry as it lies in the file.
struct RawEntry<'a> {
    entry: BitmapEntry,
    kind: u8,
    extra: &'a [u8],
}

impl<'a> RawEntry<'a> {
    fn read(directory: &mut Reader<'a>) -> Option<RawEntry<'a>> {
        let before = directory.remaining();
        let (table_offset, table_entries) = (directory.u64()?, directory.u32()?);
        let flags = directory.u32()?;
        let (kind, granularity_bits) = (directory.u8()?, directory.u8()?);
        let (name, extra) = (directory.u16()?, directory.u32()?);
        let extra = directory.take(usize::try_from(extra).ok()?)?;
        let name = directory.take(name.into())?.to_vec();
        let used = before - directory.remaining();
        directory.take(used.next_multiple_of(8) - used)?;
        let entry = BitmapEntry { table_offset, table_entries, flags, granularity_bits, name };
        Some(RawEntry { entry, kind, extra })
    }

    fn checked(self, index: u32) -> Result<BitmapEntry> {
        let name = String::from_utf8_lossy(&self.entry.name);
        let problem = if self.kind != TYPE_DIRTY {
            Some(format!("type is {}, not {TYPE_DIRTY}", self.kind))
        } else if !self.extra.is_empty() {
            Some("extra data is not supported".to_string())
        } else {
            self.entry.problem()
        };
        match problem {
            None => Ok(self.entry),
            Some(problem) => Err(Error::corrupt(format!("bitmap {index} '{name}': its {problem}"))),
        }
    }
}

impl BitmapEntry {
    /// What is wrong with the entry by itself.
    fn problem(&self) -> Option<String> {
        let end = self.table_offset.checked_add(u64::from(self.table_entries) * 8);
        if self.table_entries == 0 || self.table_entries > MAX_BITMAP_TABLE_ENTRIES {
            return Some(format!("table has {} entries", self.table_entries));
        }
        if self.table_offset == 0 || end.is_none_or(|end| end > MAX_HOST_OFFSET + 1) {
            return Some(format!("table offset {:#x} is invalid", self.table_offset));
        }
        if self.flags & !(IN_USE | AUTO) != 0 {
            return Some(format!("flags {:#x} are unknown", self.flags));
        }
        if !(MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS)
            .contains(&self.granularity_bits)
        {
            return Some(format!("granularity is 2^{} bytes", self.granularity_bits));
        }
        if self.name.len() > MAX_BITMAP_NAME {
            return Some(format!("name has {} bytes", self.name.len()));
        }
        None
    }

    /// Checks the entry against the image: the table must be aligned, within
    /// the limits, and large enough for the virtual disk unless the bitmap is
    /// stale anyhow. `Corrupt` if not.
    pub fn check(&self, geometry: Geometry, virtual_size: u64) -> Result<()> {
        let problem = if let Some(problem) = self.problem() {
            Some(problem)
        } else {
            let bytes = u64::from(self.table_entries).saturating_mul(geometry.cluster_size());
            // At most 2^29 bytes, 2^32 bits of 2^31 bytes each.
            let covered = bytes.saturating_mul(8).saturating_mul(1 << self.granularity_bits);
            if geometry.in_cluster(self.table_offset) != 0 {
                Some(format!("table offset {:#x} is unaligned", self.table_offset))
            } else if bytes > MAX_BITMAP_BYTES {
                Some(format!("table describes {bytes} bytes, more than {MAX_BITMAP_BYTES}"))
            } else if self.flags & IN_USE == 0 && covered < virtual_size {
                Some(format!("table is too small for a disk of {virtual_size} bytes"))
            } else {
                None
            }
        };
        match problem {
            None => Ok(()),
            Some(problem) => Err(Error::corrupt(format!(
                "bitmap '{}': its {problem}",
                String::from_utf8_lossy(&self.name)
            ))),
        }
    }
}

impl BitmapCluster {
    /// Reads an entry of a bitmap's table. `Corrupt` if reserved bits are set
    /// or the offset is unaligned.
    pub fn decode(entry: u64, geometry: Geometry) -> Result<BitmapCluster> {
        let offset = HostOffset::new(entry & OFFSET_MASK);
        let sound = entry & TABLE_RESERVED == 0
            && geometry.in_cluster(entry & OFFSET_MASK) == 0
            && (offset.is_none() || entry & ALL_ONES == 0);
        match offset {
            _ if !sound => {
                Err(Error::corrupt(format!("bitmap table entry {entry:#018x} is invalid")))
            }
            Some(offset) => Ok(BitmapCluster::Stored(offset)),
            None if entry & ALL_ONES != 0 => Ok(BitmapCluster::Ones),
            None => Ok(BitmapCluster::Zeros),
        }
    }

    /// The entry of a bitmap's table.
    pub fn encode(self) -> u64 {
        match self {
            BitmapCluster::Zeros => 0,
            BitmapCluster::Ones => ALL_ONES,
            BitmapCluster::Stored(offset) => offset.get(),
        }
    }
}
