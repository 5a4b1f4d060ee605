//! An image file taken apart, and put together again differently, with no help
//! from the library: what is tested must not judge itself.

use std::path::{Path, PathBuf};

/// Bits 9 to 55: the host offset in an L1, L2 or refcount table entry.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63 of L1 and L2 entries.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry.
pub const ZERO: u64 = 1;

/// Where header fields lie.
pub mod field {
    pub const VERSION: usize = 4;
    pub const BACKING_OFFSET: usize = 8;
    pub const BACKING_LENGTH: usize = 16;
    pub const CLUSTER_BITS: usize = 20;
    pub const SIZE: usize = 24;
    pub const CRYPT: usize = 32;
    pub const L1_SIZE: usize = 36;
    pub const L1_OFFSET: usize = 40;
    pub const REFTABLE_OFFSET: usize = 48;
    pub const REFTABLE_CLUSTERS: usize = 56;
    pub const SNAPSHOTS: usize = 60;
    pub const SNAPSHOTS_OFFSET: usize = 64;
    pub const INCOMPATIBLE: usize = 72;
    pub const COMPATIBLE: usize = 80;
    pub const AUTOCLEAR: usize = 88;
    pub const REFCOUNT_ORDER: usize = 96;
    pub const HEADER_LENGTH: usize = 100;
    pub const COMPRESSION: usize = 104;
}

/// An L2 entry: descriptor and bitmap (0 where entries are not extended).
pub type Entry = (u64, u64);

/// The bytes of an image file.
#[derive(Clone)]
pub struct Dissected {
    pub bytes: Vec<u8>,
    path: PathBuf,
}

impl Dissected {
    pub fn load(path: &Path) -> Dissected {
        Dissected { bytes: std::fs::read(path).unwrap(), path: path.to_owned() }
    }

    /// An image that is in memory only.
    pub fn of(bytes: Vec<u8>) -> Dissected {
        Dissected { bytes, path: PathBuf::new() }
    }

    pub fn save(&self) {
        std::fs::write(&self.path, &self.bytes).unwrap();
    }

    /// Loads, changes, saves.
    pub fn patch<R>(path: &Path, change: impl FnOnce(&mut Dissected) -> R) -> R {
        let mut image = Dissected::load(path);
        let result = change(&mut image);
        image.save();
        result
    }

    /// Big-endian bytes at `at`; what lies past the end is zero.
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.bytes.get(at + i).copied().unwrap_or(0))
    }

    pub fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.get(at))
    }

    pub fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.get(at))
    }

    pub fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.get(at))
    }

    /// Overwrites bytes, making the file longer if need be.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[at..end].copy_from_slice(bytes);
    }

    pub fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn put64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn version(&self) -> u32 {
        self.u32(field::VERSION)
    }

    /// Whether guest data is in a file of its own.
    pub fn has_data_file(&self) -> bool {
        self.version() >= 3 && self.u64(field::INCOMPATIBLE) & 4 != 0
    }

    pub fn cluster_bits(&self) -> u32 {
        self.u32(field::CLUSTER_BITS)
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits()
    }

    pub fn size(&self) -> u64 {
        self.u64(field::SIZE)
    }

    pub fn incompatible(&self) -> u64 {
        if self.version() >= 3 { self.u64(field::INCOMPATIBLE) } else { 0 }
    }

    pub fn is_marked_corrupt(&self) -> bool {
        self.incompatible() & 2 != 0
    }

    pub fn extended_l2(&self) -> bool {
        self.incompatible() & 16 != 0
    }

    pub fn refcount_bits(&self) -> u32 {
        if self.version() >= 3 { 1 << self.u32(field::REFCOUNT_ORDER) } else { 16 }
    }

    pub fn entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.entry_size()
    }

    /// Clusters of the virtual disk.
    pub fn guest_clusters(&self) -> u64 {
        self.size().div_ceil(self.cluster_size())
    }

    pub fn l1_offset(&self) -> u64 {
        self.u64(field::L1_OFFSET)
    }

    pub fn l1_size(&self) -> u64 {
        self.u32(field::L1_SIZE).into()
    }

    /// Where an L1 entry lies in the file.
    pub fn l1_at(&self, index: u64) -> usize {
        (self.l1_offset() + index * 8) as usize
    }

    pub fn l1(&self, index: u64) -> u64 {
        self.u64(self.l1_at(index))
    }

    /// Where the L2 entry of a guest cluster lies in the file, if there is a table.
    pub fn entry_at(&self, cluster: u64) -> Option<usize> {
        let table = self.l1(cluster / self.l2_entries()) & OFFSET;
        let index = cluster % self.l2_entries();
        (table != 0).then(|| (table + index * self.entry_size()) as usize)
    }

    fn read_entry(&self, at: usize) -> Entry {
        let bitmap = if self.extended_l2() { self.u64(at + 8) } else { 0 };
        (self.u64(at), bitmap)
    }

    /// The L2 entry of a guest cluster; zeroes if there is no table.
    pub fn entry(&self, cluster: u64) -> Entry {
        self.entry_at(cluster).map_or((0, 0), |at| self.read_entry(at))
    }

    pub fn set_entry(&mut self, cluster: u64, entry: Entry) {
        let at = self.entry_at(cluster).expect("there is an L2 table");
        self.put64(at, entry.0);
        if self.extended_l2() {
            self.put64(at + 8, entry.1);
        }
    }

    /// The host offset of a guest cluster that is allocated and not compressed.
    pub fn host(&self, cluster: u64) -> u64 {
        let (descriptor, _) = self.entry(cluster);
        assert_eq!(descriptor & COMPRESSED, 0);
        assert_ne!(descriptor & OFFSET, 0, "guest cluster {cluster} has a host cluster");
        descriptor & OFFSET
    }

    /// All entries of an L2 table.
    pub fn table(&self, offset: u64) -> impl Iterator<Item = Entry> + '_ {
        let at = move |index| (offset + index * self.entry_size()) as usize;
        (0..self.l2_entries()).map(move |index| self.read_entry(at(index)))
    }

    /// The bytes of a compressed cluster: offset and length.
    pub fn compressed(&self, descriptor: u64) -> (u64, u64) {
        let bits = 62 - (self.cluster_bits() - 8);
        let offset = descriptor & ((1 << bits) - 1);
        let further = descriptor >> bits & ((1 << (self.cluster_bits() - 8)) - 1);
        (offset, (further + 1) * 512 - offset % 512)
    }

    /// Entries of the refcount table: offsets of refcount blocks.
    pub fn reftable(&self) -> Vec<u64> {
        let clusters = u64::from(self.u32(field::REFTABLE_CLUSTERS));
        let offset = self.u64(field::REFTABLE_OFFSET);
        (0..clusters * self.cluster_size() / 8)
            .map(|index| self.u64((offset + index * 8) as usize))
            .collect()
    }

    /// Clusters that a refcount block counts.
    pub fn per_block(&self) -> u64 {
        self.cluster_size() * 8 / u64::from(self.refcount_bits())
    }

    /// Count number `index` of the refcount block at `block`.
    pub fn count_in(&self, block: u64, index: u64) -> u64 {
        let bits = u64::from(self.refcount_bits());
        if bits < 8 {
            let byte = self.get::<1>((block + index * bits / 8) as usize)[0];
            return u64::from(byte) >> (index * bits % 8) & ((1 << bits) - 1);
        }
        let at = (block + index * bits / 8) as usize;
        (0..bits / 8).fold(0, |value, i| value << 8 | u64::from(self.get::<1>(at + i as usize)[0]))
    }

    /// The refcount of a host cluster.
    pub fn refcount(&self, cluster: u64) -> u64 {
        let block = self.reftable().get((cluster / self.per_block()) as usize).copied();
        match block.unwrap_or(0) & OFFSET {
            0 => 0,
            block => self.count_in(block, cluster % self.per_block()),
        }
    }

    pub fn set_refcount(&mut self, cluster: u64, value: u64) {
        let block = self.reftable()[(cluster / self.per_block()) as usize] & OFFSET;
        let (bits, index) = (u64::from(self.refcount_bits()), cluster % self.per_block());
        let at = (block + index * bits / 8) as usize;
        if bits < 8 {
            let shift = index * bits % 8;
            let mask = ((1u64 << bits) - 1) << shift;
            let byte = u64::from(self.get::<1>(at)[0]) & !mask | value << shift;
            return self.put(at, &[byte as u8]);
        }
        self.put(at, &value.to_be_bytes()[8 - (bits / 8) as usize..]);
    }

    /// Offset and number of entries of the L1 table of each internal snapshot, and
    /// where the snapshot table ends.
    pub fn snapshots(&self) -> (Vec<(u64, u64)>, u64) {
        let mut at = self.u64(field::SNAPSHOTS_OFFSET) as usize;
        let mut found = Vec::new();
        for _ in 0..self.u32(field::SNAPSHOTS) {
            at = at.next_multiple_of(8);
            found.push((self.u64(at), self.u32(at + 8).into()));
            let (id, name) = (self.u16(at + 12), self.u16(at + 14));
            let extra = self.u32(at + 36) as usize;
            at += 40 + extra + usize::from(id) + usize::from(name);
        }
        (found, at as u64)
    }
}
