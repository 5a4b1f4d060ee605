//! Address arithmetic: guest and host offsets, clusters, subclusters.
//!
//! Each address space has its own type, so that one cannot be used for the
//! other. It knows sizes only: no entries, no tables, no I/O.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::Range;

/// A byte offset on the virtual disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GuestOffset(pub u64);

/// The index of a cluster of the virtual disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GuestCluster(pub u64);

/// A byte offset in the image file that may hold a table or data. Never 0:
/// there lies the header, and an offset of 0 in a table means "none".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostOffset(NonZeroU64);

/// Where guest data is. In the image file never 0, as any `HostOffset`; in an external
/// data file, where nothing else is, 0 is as good as any.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DataOffset(u64);

/// The index of a cluster of the image file. Cluster 0 is the header's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostCluster(pub u64);

impl HostOffset {
    /// `None` for 0, which is never the address of anything.
    pub fn new(offset: u64) -> Option<HostOffset> {
        NonZeroU64::new(offset).map(HostOffset)
    }

    /// The plain number.
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// This offset moved up; `None` on overflow.
    pub fn checked_add(self, bytes: u64) -> Option<HostOffset> {
        self.0.checked_add(bytes).map(HostOffset)
    }
}

impl DataOffset {
    /// An offset in a file that holds guest data and nothing else.
    pub fn in_data_file(offset: u64) -> DataOffset {
        DataOffset(offset)
    }

    /// The plain number.
    pub fn get(self) -> u64 {
        self.0
    }

    /// This offset moved up; `None` on overflow.
    pub fn checked_add(self, bytes: u64) -> Option<DataOffset> {
        self.0.checked_add(bytes).map(DataOffset)
    }
}

impl From<HostOffset> for DataOffset {
    fn from(offset: HostOffset) -> DataOffset {
        DataOffset(offset.get())
    }
}

impl fmt::Display for DataOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.get())
    }
}

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Number of subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// The sizes that an image's header fixes, and what follows from them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Whether L2 entries are 16 bytes long and carry a subcluster bitmap.
    pub extended_l2: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Subclusters in a cluster: 32, or 1 where entries are not extended.
    pub fn subclusters(self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// log2 of the subcluster size.
    pub fn subcluster_bits(self) -> u32 {
        if self.extended_l2 { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// Bytes in a subcluster (the cluster size where entries are not extended).
    pub fn subcluster_size(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Bytes of an L2 entry.
    pub fn l2_entry_size(self) -> u64 {
        1 << self.l2_entry_bits()
    }

    /// log2 of that.
    pub fn l2_entry_bits(self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// log2 of the number of entries of an L2 table, which fills one cluster.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// Bytes of the virtual disk that one L2 table maps.
    pub fn l2_coverage(self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// The cluster that a guest offset lies in.
    pub fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// Where a guest cluster begins.
    pub fn guest_start(self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The position inside its cluster.
    pub fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The index into the L1 table for a guest cluster.
    pub fn l1_index(self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.l2_bits()
    }

    /// The index into its L2 table for a guest cluster.
    pub fn l2_index(self, cluster: GuestCluster) -> u64 {
        cluster.0 & ((1 << self.l2_bits()) - 1)
    }

    /// The cluster of the image file that a host offset lies in.
    pub fn host_cluster(self, offset: DataOffset) -> HostCluster {
        HostCluster(offset.get() >> self.cluster_bits)
    }

    /// Where a host cluster begins; `None` for the header's.
    pub fn host_start(self, cluster: HostCluster) -> Option<HostOffset> {
        HostOffset::new(cluster.0.checked_shl(self.cluster_bits)?)
    }

    /// The subclusters that a byte range inside a cluster touches.
    pub fn subcluster_range(self, bytes: Range<u64>) -> Range<u32> {
        let bits = self.subcluster_bits();
        let end = bytes.end.div_ceil(1 << bits);
        (bytes.start >> bits) as u32..end as u32
    }

    /// Number of clusters that hold `bytes` bytes.
    pub fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
}
