//! Makes images to start from, without the code that is under test.

use qcow2rs::format::compressed::deflate;

use super::aes;

/// What kind of image.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub version: u32,
    pub cluster: u64,
    pub extended_l2: bool,
    pub refcount_bits: u64,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Over a raw backing file called "base".
    pub backing: bool,
    /// With an internal snapshot, which shares all there is.
    pub snapshot: bool,
    /// With so long an L1 table that hardly more clusters can be counted.
    pub crowded: bool,
    /// With lazy refcounts.
    pub lazy: bool,
    /// With an autoclear bit that no driver knows.
    pub autoclear: bool,
    /// With its data in an external data file called "data".
    pub data_file: bool,
    /// Where that is a raw image by itself.
    pub raw: bool,
    /// With its data encrypted in the old way (AES) by `aes::PASSPHRASE`.
    pub encrypted: bool,
}

/// A cluster of the virtual disk.
#[derive(Clone, Debug)]
pub enum Cluster {
    Nothing,
    /// Subclusters that are stored and that are zero; bit 0 stands for the whole
    /// cluster where there are no subclusters.
    Data {
        bytes: Vec<u8>,
        alloc: u32,
        zero: u32,
    },
    /// Zero, with a host cluster to write to.
    Reserved,
    Compressed(Vec<u8>),
}

impl Kind {
    /// To derive others from: version 3, clusters of a sector, and nothing special.
    pub const PLAIN: Kind = Kind {
        version: 3,
        cluster: 512,
        extended_l2: false,
        refcount_bits: 16,
        size: 64 << 10,
        backing: false,
        snapshot: false,
        crowded: false,
        lazy: false,
        autoclear: false,
        data_file: false,
        raw: false,
        encrypted: false,
    };

    pub fn l2_entry(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster)
    }

    pub fn subclusters(&self) -> u64 {
        if self.extended_l2 { 32 } else { 1 }
    }

    /// How many have what is mapped: the disk, and a snapshot.
    fn owners(&self) -> u64 {
        1 + u64::from(self.snapshot)
    }

    fn l1_entries(&self) -> u64 {
        self.clusters().div_ceil(self.cluster / self.l2_entry())
    }
}

struct Builder {
    kind: Kind,
    bytes: Vec<u8>,
    /// The data file.
    data: Vec<u8>,
    /// By cluster.
    refcounts: Vec<u64>,
}

impl Builder {
    /// The offset of new clusters for this many bytes.
    fn take(&mut self, bytes: u64) -> u64 {
        let offset = self.bytes.len() as u64;
        let clusters = bytes.div_ceil(self.kind.cluster);
        self.refcounts.extend((0..clusters).map(|_| 1));
        self.bytes.resize((offset + clusters * self.kind.cluster) as usize, 0);
        offset
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.bytes[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn put64(&mut self, offset: u64, value: u64) {
        self.put(offset, &value.to_be_bytes());
    }

    fn put32(&mut self, offset: u64, value: u64) {
        self.put(offset, &(value as u32).to_be_bytes());
    }

    /// Puts data where the guest has it.
    fn put_data(&mut self, guest: u64, bytes: &[u8]) -> u64 {
        let at = guest * self.kind.cluster;
        let end = self.data.len().min(at as usize + bytes.len());
        self.data[at as usize..end].copy_from_slice(&bytes[..end - at as usize]);
        at
    }

    /// Puts data into a cluster of its own, or packs it behind the last; the L2
    /// entry for it.
    fn entry(&mut self, guest: u64, cluster: Cluster, cursor: &mut u64) -> (u64, u64) {
        let (size, copied) = (self.kind.cluster, u64::from(!self.kind.snapshot) << 63);
        match cluster {
            Cluster::Nothing => (0, 0),
            Cluster::Data { mut bytes, alloc, zero } if alloc != 0 => {
                if self.kind.encrypted {
                    aes::encrypt(&mut bytes, guest * size);
                }
                let host = match self.kind.data_file {
                    true => self.put_data(guest, &bytes),
                    false => {
                        let host = self.take(size);
                        self.put(host, &bytes);
                        host
                    }
                };
                let flag = u64::from(!self.kind.extended_l2 && zero != 0);
                (host | copied | flag, u64::from(zero) << 32 | u64::from(alloc))
            }
            Cluster::Reserved if self.kind.data_file => match self.kind.extended_l2 {
                true => ((guest * size) | copied, u64::from(u32::MAX) << 32),
                false => ((guest * size) | copied | 1, 0),
            },
            Cluster::Reserved => match self.kind.extended_l2 {
                true => (self.take(size) | copied, u64::from(u32::MAX) << 32),
                false => (self.take(size) | copied | 1, 0),
            },
            Cluster::Data { zero, .. } => {
                (u64::from(!self.kind.extended_l2 && zero != 0), u64::from(zero) << 32)
            }
            Cluster::Compressed(bytes) => {
                let mut packed = vec![0; size as usize - 1];
                let len = deflate(&bytes, &mut packed).expect("it should be compressible") as u64;
                // Narrow refcounts cannot say that several share a cluster.
                let most = (u64::MAX >> (64 - self.kind.refcount_bits)) / self.kind.owners();
                let fits = *cursor % size != 0 && *cursor % size + len <= size;
                if !fits || self.refcounts[(*cursor / size) as usize] == most {
                    *cursor = self.take(size);
                } else {
                    self.refcounts[(*cursor / size) as usize] += 1;
                }
                self.put(*cursor, &packed[..len as usize]);
                let width = 62 - (size.trailing_zeros() - 8);
                let sectors = (*cursor + len - 1) / 512 - *cursor / 512;
                let entry = 1 << 62 | sectors << width | *cursor;
                *cursor += len;
                (entry, 0)
            }
        }
    }

    /// All L2 tables and what they map; the L1 table.
    fn map(&mut self, content: &mut impl FnMut(u64) -> Cluster) -> Vec<u64> {
        let (size, wide) = (self.kind.cluster, self.kind.l2_entry());
        let mut cursor = 0;
        let mut l1 = Vec::new();
        for first in (0..self.kind.clusters()).step_by((size / wide) as usize) {
            let last = (first + size / wide).min(self.kind.clusters());
            let clusters: Vec<Cluster> = (first..last).map(&mut *content).collect();
            if clusters.iter().all(|cluster| matches!(cluster, Cluster::Nothing)) {
                l1.push(0);
                continue;
            }
            let table = self.take(size);
            for (index, cluster) in (0..).zip(clusters) {
                let (word, bitmap) = self.entry(first + index, cluster, &mut cursor);
                self.put64(table + index * wide, word);
                if self.kind.extended_l2 {
                    self.put64(table + index * wide + 8, bitmap);
                }
            }
            l1.push(table | u64::from(!self.kind.snapshot) << 63);
        }
        l1
    }

    fn put_table(&mut self, table: &[u64]) -> u64 {
        let offset = self.take(table.len() as u64 * 8);
        for (index, entry) in (0..).zip(table) {
            self.put64(offset + index * 8, *entry);
        }
        offset
    }

    /// A snapshot of all that is mapped: the offset of the snapshot table.
    fn snapshot(&mut self, l1: &[u64]) -> u64 {
        for refcount in self.refcounts.iter_mut().skip(1) {
            *refcount *= self.kind.owners();
        }
        let l1_offset = self.put_table(l1);
        let table = self.take(40 + 24 + 2);
        self.put64(table, l1_offset);
        self.put32(table + 8, l1.len() as u64);
        self.put(table + 12, &[0, 1, 0, 1]);
        self.put32(table + 36, 24);
        self.put64(table + 48, self.kind.size);
        self.put(table + 64, b"1s");
        table
    }

    /// Refcount table and blocks: where the table is, and its clusters.
    fn put_refcounts(&mut self) -> (u64, u64) {
        let (size, bits) = (self.kind.cluster, self.kind.refcount_bits);
        let per_block = size * 8 / bits;
        let used = self.refcounts.len() as u64;
        let mut blocks = 1;
        while blocks * per_block < used + blocks + (blocks * 8).div_ceil(size) {
            blocks += 1;
        }
        let table_clusters = (blocks * 8).div_ceil(size);
        let table = self.take(table_clusters * size);
        for block in 0..blocks {
            let offset = self.take(size);
            self.put64(table + block * 8, offset);
            self.refcounts.resize(self.bytes.len() / size as usize, 1);
        }
        for (cluster, refcount) in (0..).zip(self.refcounts.clone()) {
            let block = table + (table_clusters + cluster / per_block) * size;
            let bit = cluster % per_block * bits;
            match bits {
                1 | 2 | 4 => {
                    let byte = (block + bit / 8) as usize;
                    self.bytes[byte] |= (refcount << (bit % 8)) as u8;
                }
                _ => {
                    let width = (bits / 8) as usize;
                    self.put(block + bit / 8, &refcount.to_be_bytes()[8 - width..]);
                }
            }
        }
        (table, table_clusters)
    }
}

/// Builds an image with these clusters of the virtual disk.
pub fn build(kind: Kind, content: impl FnMut(u64) -> Cluster) -> Vec<u8> {
    build_both(kind, content).0
}

/// As `build`; and its data file. Where nothing points to, that holds what nobody is to
/// see, unless it is a raw image.
pub fn build_both(kind: Kind, mut content: impl FnMut(u64) -> Cluster) -> (Vec<u8>, Vec<u8>) {
    let length = if kind.data_file { kind.size as usize } else { 0 };
    let data = vec![if kind.raw { 0 } else { 0xdd }; length];
    let mut image = Builder { kind, bytes: Vec::new(), data, refcounts: Vec::new() };
    image.take(kind.cluster);
    let mut l1 = image.map(&mut content);
    l1.resize(kind.l1_entries() as usize, 0);
    if kind.crowded {
        let blocks = kind.cluster / 8;
        let counted = blocks * kind.cluster * 8 / kind.refcount_bits;
        let used = image.refcounts.len() as u64 + blocks + 1;
        l1.resize(((counted - used - 20) * kind.cluster / 8) as usize, 0);
    }
    let snapshots = if kind.snapshot { image.snapshot(&l1) } else { 0 };
    let l1_offset = image.put_table(&l1);
    let (reftable, reftable_clusters) = image.put_refcounts();
    image.put(0, b"QFI\xfb");
    image.put32(4, kind.version.into());
    image.put32(20, kind.cluster.trailing_zeros().into());
    image.put64(24, kind.size);
    image.put32(32, kind.encrypted.into());
    image.put32(36, l1.len() as u64);
    image.put64(40, l1_offset);
    image.put64(48, reftable);
    image.put32(56, reftable_clusters);
    image.put32(60, kind.snapshot.into());
    image.put64(64, snapshots);
    let mut end = 72;
    if kind.version > 2 {
        image.put64(72, u64::from(kind.extended_l2) << 4 | u64::from(kind.data_file) << 2);
        image.put64(80, kind.lazy.into());
        image.put64(88, u64::from(kind.autoclear) << 40 | u64::from(kind.raw) << 1);
        image.put32(96, kind.refcount_bits.trailing_zeros().into());
        image.put32(100, 104);
        end = 104;
    }
    if kind.data_file {
        image.put32(end, 0x4441_5441);
        image.put32(end + 4, 4);
        image.put(end + 8, b"data");
        end += 16;
    }
    if kind.backing {
        // The format of the backing file; the end of extensions; its name.
        image.put32(end, 0xe279_2aca);
        image.put32(end + 4, 3);
        image.put(end + 8, b"raw");
        image.put64(8, end + 24);
        image.put32(16, 4);
        image.put(end + 24, b"base");
    }
    (image.bytes, image.data)
}
