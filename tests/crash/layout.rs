//! A second reading of the qcow2 format, for tests: written from its definition
//! (QEMU's docs/interop/qcow2) and from nothing of this crate, so that a
//! misunderstanding would have to happen twice. Made to be plain, not fast.

use std::ops::Range;

use super::support::aes;

/// Bytes of a file; zero past its end.
pub trait ReadAt {
    fn length(&self) -> u64;
    fn read_at(&self, offset: u64, out: &mut [u8]);

    fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        self.read_at(offset, &mut out);
        out
    }
}

impl ReadAt for Vec<u8> {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) {
        let start = (offset as usize).min(self.len());
        let (inside, past) = out.split_at_mut(out.len().min(self.len() - start));
        inside.copy_from_slice(&self[start..start + inside.len()]);
        past.fill(0);
    }
}

pub fn be16(bytes: &[u8], at: usize) -> u64 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap()).into()
}

pub fn be32(bytes: &[u8], at: usize) -> u64 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()).into()
}

pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Bits `range` of `word`, in place.
pub fn bits(word: u64, range: Range<u32>) -> u64 {
    word >> range.start << range.start & u64::MAX >> (64 - range.end)
}

/// Bits that hold an offset in L1, L2 and bitmap table entries.
const OFFSET: Range<u32> = 9..56;

#[derive(Clone, Debug)]
pub struct Header {
    pub version: u64,
    pub cluster: u64,
    pub size: u64,
    pub l1: Table,
    pub reftable: Table,
    pub snapshots: Table,
    pub incompatible: u64,
    pub autoclear: u64,
    pub refcount_order: u64,
    /// In the old way.
    pub encrypted: bool,
    /// Type and data.
    pub extensions: Vec<(u64, Vec<u8>)>,
}

/// Where a table is and how many entries it has.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub offset: u64,
    pub entries: u64,
}

pub const DIRTY: u64 = 1;
pub const CORRUPT: u64 = 2;
pub const DATA_FILE: u64 = 4;
pub const EXTENDED_L2: u64 = 16;
pub const BITMAPS: u64 = 0x2385_2875;
pub const LUKS: u64 = 0x0537_be77;

impl Header {
    pub fn read(file: &dyn ReadAt) -> Result<Header, String> {
        let raw = file.bytes(0, 112);
        if raw[..4] != *b"QFI\xfb" {
            return Err(format!("magic is {:02x?}", &raw[..4]));
        }
        let version = be32(&raw, 4);
        let v3 = match version {
            2 => false,
            3 => true,
            _ => return Err(format!("version is {version}")),
        };
        let if_v3 = |value| if v3 { value } else { 0 };
        let cluster_bits = be32(&raw, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!("cluster_bits is {cluster_bits}"));
        }
        let cluster = 1 << cluster_bits;
        let length = if v3 { be32(&raw, 100) } else { 72 };
        let name = be64(&raw, 8);
        let mut header = Header {
            version,
            cluster,
            size: be64(&raw, 24),
            l1: Table { offset: be64(&raw, 40), entries: be32(&raw, 36) },
            reftable: Table { offset: be64(&raw, 48), entries: be32(&raw, 56) * cluster / 8 },
            snapshots: Table { offset: be64(&raw, 64), entries: be32(&raw, 60) },
            incompatible: if_v3(be64(&raw, 72)),
            autoclear: if_v3(be64(&raw, 88)),
            encrypted: be32(&raw, 32) == 1,
            refcount_order: if v3 { be32(&raw, 96) } else { 4 },
            extensions: Vec::new(),
        };
        if header.refcount_order > 6 {
            return Err(format!("refcount_order is {}", header.refcount_order));
        }
        let end = if name != 0 { name } else { cluster };
        let raw = file.bytes(0, end.min(cluster));
        let mut at = length as usize;
        while at + 8 <= raw.len() {
            let (kind, len) = (be32(&raw, at), be32(&raw, at + 4) as usize);
            at += 8;
            if kind == 0 {
                break;
            }
            let data = raw.get(at..at + len);
            let data = data.ok_or(format!("extension {kind:#x} at {at} is too long"))?;
            header.extensions.push((kind, data.to_vec()));
            at += len.next_multiple_of(8);
        }
        Ok(header)
    }

    pub fn extension(&self, kind: u64) -> Option<&[u8]> {
        self.extensions.iter().find(|(k, _)| *k == kind).map(|(_, data)| &data[..])
    }

    pub fn extended_l2(&self) -> bool {
        self.incompatible & EXTENDED_L2 != 0
    }

    pub fn data_file(&self) -> bool {
        self.incompatible & DATA_FILE != 0
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster / if self.extended_l2() { 16 } else { 8 }
    }

    pub fn refcount_bits(&self) -> u64 {
        1 << self.refcount_order
    }

    pub fn refblock_entries(&self) -> u64 {
        self.cluster * 8 / self.refcount_bits()
    }

    /// What an L2 entry says.
    pub fn l2_entry(&self, table: &[u8], index: u64) -> Entry {
        let (word, bitmap) = match self.extended_l2() {
            true => {
                let at = index as usize * 16;
                (be64(table, at), Some(be64(table, at + 8)))
            }
            false => (be64(table, index as usize * 8), None),
        };
        let copied = word >> 63 == 1;
        if word >> 62 & 1 == 1 {
            let cluster_bits = self.cluster.trailing_zeros();
            let width = 62 - (cluster_bits - 8);
            let offset = bits(word, 0..width);
            let sectors = bits(word, width..62) >> width;
            let end = offset / 512 * 512 + (sectors + 1) * 512;
            return Entry { copied, bitmap, ..Entry::new(word, Kind::Compressed(offset..end)) };
        }
        let offset = bits(word, OFFSET);
        let reserved = match bitmap {
            Some(_) => bits(word, 1..9) | bits(word, 56..62),
            None if self.version < 3 => bits(word, 0..9) | bits(word, 56..62),
            None => bits(word, 1..9) | bits(word, 56..62),
        };
        let kind = match offset {
            0 if !(self.data_file() && copied) => Kind::Unallocated,
            offset => Kind::Normal(offset),
        };
        Entry { copied, bitmap, reserved, ..Entry::new(word, kind) }
    }

    /// Snapshots: where their L1 tables are; and the bytes of the table itself.
    pub fn read_snapshots(&self, file: &dyn ReadAt) -> (Vec<Table>, u64) {
        let mut at = self.snapshots.offset;
        let mut tables = Vec::new();
        let mut end = at;
        for _ in 0..self.snapshots.entries {
            at = at.next_multiple_of(8);
            let raw = file.bytes(at, 40);
            tables.push(Table { offset: be64(&raw, 0), entries: be32(&raw, 8) });
            at += 40 + be32(&raw, 36) + be16(&raw, 12) + be16(&raw, 14);
            end = at;
        }
        (tables, end - self.snapshots.offset)
    }

    /// The snapshots' names, in the same order.
    pub fn read_snapshot_names(&self, file: &dyn ReadAt) -> Vec<Vec<u8>> {
        let mut at = self.snapshots.offset;
        let mut names = Vec::new();
        for _ in 0..self.snapshots.entries {
            at = at.next_multiple_of(8);
            let raw = file.bytes(at, 40);
            let before = 40 + be32(&raw, 36) + be16(&raw, 12);
            names.push(file.bytes(at + before, be16(&raw, 14)));
            at += before + be16(&raw, 14);
        }
        names
    }

    /// Entries of a table, as far as they are inside the file.
    pub fn read_table(&self, file: &dyn ReadAt, table: Table) -> Vec<u64> {
        // A length that is garbage shall not cost memory.
        let inside = file.length().saturating_sub(table.offset).div_ceil(8);
        let entries = table.entries.min(inside);
        let raw = file.bytes(table.offset, entries * 8);
        (0..entries as usize).map(|index| be64(&raw, index * 8)).collect()
    }

    /// The refcount of each cluster below `clusters`. Entries that lead nowhere
    /// count as 0.
    pub fn read_refcounts(&self, file: &dyn ReadAt) -> Refcounts {
        let mut blocks = Vec::new();
        for entry in self.read_table(file, self.reftable) {
            let offset = bits(entry, 9..64);
            let usable = offset != 0 && offset % self.cluster == 0 && offset < file.length();
            blocks.push(usable.then(|| file.bytes(offset, self.cluster)));
        }
        Refcounts { blocks, bits: self.refcount_bits(), per_block: self.refblock_entries() }
    }
}

/// An L2 entry.
#[derive(Clone, Debug)]
pub struct Entry {
    pub word: u64,
    pub kind: Kind,
    pub copied: bool,
    /// Extended entries only.
    pub bitmap: Option<u64>,
    /// Reserved bits that are set.
    pub reserved: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    Unallocated,
    Normal(u64),
    /// Up to the end of its last sector.
    Compressed(Range<u64>),
}

impl Entry {
    fn new(word: u64, kind: Kind) -> Entry {
        Entry { word, kind, copied: false, bitmap: None, reserved: 0 }
    }

    /// Bits of the subclusters that have data here.
    pub fn allocated(&self) -> u32 {
        self.bitmap.unwrap_or(0) as u32
    }

    /// Bits of the subclusters that read as zero.
    pub fn zero(&self) -> u32 {
        (self.bitmap.unwrap_or(0) >> 32) as u32
    }

    /// The zero flag of a standard entry.
    pub fn zero_flag(&self) -> bool {
        self.word & 1 == 1 && self.bitmap.is_none() && !matches!(self.kind, Kind::Compressed(_))
    }
}

pub struct Refcounts {
    blocks: Vec<Option<Vec<u8>>>,
    bits: u64,
    per_block: u64,
}

impl Refcounts {
    pub fn get(&self, cluster: u64) -> u64 {
        let block = self.blocks.get((cluster / self.per_block) as usize);
        let Some(Some(block)) = block else { return 0 };
        let index = cluster % self.per_block;
        if self.bits < 8 {
            let per_byte = 8 / self.bits;
            let byte = u64::from(block[(index / per_byte) as usize]);
            return byte >> (index % per_byte * self.bits) & ((1 << self.bits) - 1);
        }
        let width = (self.bits / 8) as usize;
        let at = index as usize * width;
        block[at..at + width].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// All clusters with a refcount other than 0.
    pub fn in_use(&self) -> impl Iterator<Item = (u64, u64)> {
        // Most of a block is zero: look at many counts at once.
        const PART: usize = 64;
        let parts = (0u64..).zip(&self.blocks).flat_map(|(n, block)| {
            let parts = block.iter().flat_map(|block| block.chunks(PART));
            let first = n * self.per_block;
            (0u64..).zip(parts).map(move |(index, part)| (first, index, part))
        });
        let counts = PART as u64 * 8 / self.bits;
        let used = parts.filter(|(_, _, part)| part.iter().any(|byte| *byte != 0));
        let clusters = used.flat_map(move |(first, index, _)| {
            first + index * counts..first + (index + 1) * counts
        });
        clusters.map(|cluster| (cluster, self.get(cluster))).filter(|(_, count)| *count > 0)
    }
}

/// All of the virtual disk, over a raw backing file or none.
pub fn read_guest(file: &dyn ReadAt, header: &Header, base: Option<&dyn ReadAt>) -> Vec<u8> {
    read_guest_data(file, file, header, base)
}

/// The same of an image whose data is in another file.
pub fn read_guest_data(
    file: &dyn ReadAt,
    data: &dyn ReadAt,
    header: &Header,
    base: Option<&dyn ReadAt>,
) -> Vec<u8> {
    let cluster = header.cluster as usize;
    let mut disk = vec![0; header.size as usize];
    if let Some(base) = base {
        base.read_at(0, &mut disk);
    }
    let l1 = header.read_table(file, header.l1);
    let covers = header.l2_entries() as usize * cluster;
    for ((part, l1_entry), first) in disk.chunks_mut(covers).zip(l1).zip((0..).step_by(covers)) {
        let table = bits(l1_entry, OFFSET);
        if table == 0 {
            continue;
        }
        let table = file.bytes(table, header.cluster);
        for (index, out) in (0..).zip(part.chunks_mut(cluster)) {
            let guest = first + index * header.cluster;
            read_cluster(data, header, header.l2_entry(&table, index), guest, out);
        }
    }
    disk
}

fn read_cluster(file: &dyn ReadAt, header: &Header, entry: Entry, guest: u64, out: &mut [u8]) {
    let place = match &entry.kind {
        Kind::Compressed(range) => {
            let packed = file.bytes(range.start, range.end - range.start);
            let mut whole = vec![0; header.cluster as usize];
            let mut inflate = flate2::Decompress::new(false);
            let done = inflate.decompress(&packed, &mut whole, flate2::FlushDecompress::Finish);
            if done.is_err() || inflate.total_out() != header.cluster {
                // No guest has written this.
                whole.fill(0xee);
            }
            out.copy_from_slice(&whole[..out.len()]);
            return;
        }
        Kind::Normal(host) => Some(*host),
        Kind::Unallocated => None,
    };
    let (alloc, zero) = match entry.bitmap {
        Some(_) => (entry.allocated(), entry.zero()),
        None if entry.zero_flag() => (0, u32::MAX),
        None => (if place.is_none() { 0 } else { u32::MAX }, 0),
    };
    let host = place.unwrap_or(0);
    let mut stored = file.bytes(host, header.cluster);
    if header.encrypted {
        aes::decrypt(&mut stored, guest);
    }
    let size = header.cluster as usize / 32;
    for (index, part) in out.chunks_mut(size).enumerate() {
        if alloc >> index & 1 == 1 {
            part.copy_from_slice(&stored[index * size..][..part.len()]);
        } else if zero >> index & 1 == 1 {
            part.fill(0);
        }
    }
}
