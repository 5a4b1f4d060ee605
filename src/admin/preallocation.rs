//! Host clusters for guest clusters that nobody has written yet: in new images, and
//! where a disk grows. What the L2 entries say of them, and what is done to their bytes;
//! not where they are.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::l2::{Cluster, L2Format};
use crate::format::subcluster;
use crate::geometry::DataOffset;
use crate::io::engine::{Engine, Piece, ZeroMode};
use crate::io::storage::Storage;

/// How much of the space for data is taken ahead; the modes of `qemu-img create` and
/// `qemu-img resize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All tables, with a place in the file for each cluster; the file is as long as that
    /// takes, but has holes.
    Metadata,
    /// Also, the file system has reserved the space: where it can do that no other way,
    /// zeroes are written.
    Falloc,
    /// Also, zeroes are written.
    Full,
}

/// Told how far a long operation is: bytes (or clusters) done, and all; false cancels it.
pub type Progress<'a> = &'a mut (dyn FnMut(u64, u64) -> bool + Send);

/// Zeroes are written in pieces of so many bytes.
const PIECE: u64 = 8 << 20;

impl Preallocation {
    /// The mode with this name.
    pub fn from_name(name: &str) -> Option<Preallocation> {
        match name {
            "off" => Some(Preallocation::Off),
            "metadata" => Some(Preallocation::Metadata),
            "falloc" => Some(Preallocation::Falloc),
            "full" => Some(Preallocation::Full),
            _ => None,
        }
    }

    /// Whether the space for data counts as taken.
    pub fn takes_space(self) -> bool {
        matches!(self, Preallocation::Falloc | Preallocation::Full)
    }

    /// Sees to it that these bytes of a file, which belong to nobody yet, read as zero,
    /// and take space where this mode says so. From `fresh` on they are known to be
    /// zero, if the file reaches so far. Does not sync.
    pub async fn prepare<E: Engine>(
        self,
        engine: &E,
        storage: &Storage,
        bytes: Range<u64>,
        fresh: u64,
        progress: Progress<'_>,
    ) -> Result<()> {
        let total = bytes.end - bytes.start;
        report(progress, 0, total)?;
        let (used, mode) = match self {
            Preallocation::Off => return Ok(()),
            Preallocation::Metadata => {
                (bytes.start..bytes.end.min(fresh.max(bytes.start)), Some(ZeroMode::Punch))
            }
            Preallocation::Falloc => (bytes.clone(), Some(ZeroMode::Keep)),
            Preallocation::Full => (bytes.clone(), None),
        };
        if let (Some(mode), false) = (mode, used.is_empty()) {
            match storage.zero(engine, used.start, used.end - used.start, mode).await {
                Err(error) if error.kind() == ErrorKind::NotSupported => {
                    write_zeroes(engine, storage, used, total, progress).await?;
                }
                done => done?,
            }
        } else {
            write_zeroes(engine, storage, used, total, progress).await?;
        }
        // Where the length cannot be set, it grows by being written.
        if storage.length()? < bytes.end {
            let last = bytes.end.saturating_sub(512).max(bytes.start);
            let piece = [Piece::Zeroes((bytes.end - last) as usize)];
            storage.write(engine, &piece, last).await?;
        }
        report(progress, total, total)
    }
}

/// `Cancelled` if the program says so.
pub fn report(progress: Progress<'_>, done: u64, total: u64) -> Result<()> {
    match progress(done, total) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Cancelled, "cancelled by its caller")),
    }
}

async fn write_zeroes<E: Engine>(
    engine: &E,
    storage: &Storage,
    bytes: Range<u64>,
    total: u64,
    progress: Progress<'_>,
) -> Result<()> {
    let mut at = bytes.start;
    while at < bytes.end {
        report(progress, at - bytes.start, total)?;
        let length = (bytes.end - at).min(PIECE);
        storage.write(engine, &[Piece::Zeroes(length as usize)], at).await?;
        at += length;
    }
    Ok(())
}

/// What an L2 table says of the guest clusters that it gets new.
#[derive(Clone, Copy, Debug)]
pub struct Filling {
    /// How entries are written.
    pub format: L2Format,
    /// Where the first guest cluster's data is; the others' follows it.
    pub data: Option<DataOffset>,
    /// There is something below that must not show.
    pub hide: bool,
    /// They lead to a data file that is a raw image by itself.
    pub raw: bool,
}

impl Filling {
    /// Whether there is anything to be said.
    pub fn is_empty(&self) -> bool {
        self.data.is_none() && !self.hide
    }

    /// The entries of `count` guest clusters from the `first` of the new ones on. With
    /// extended entries no subcluster is allocated, as QEMU leaves them; but in a raw data
    /// file all are, as what is there is to be seen.
    pub fn entries(&self, first: u64, count: u64) -> Result<Vec<u8>> {
        let geometry = self.format.geometry;
        let all = subcluster::all(geometry.subclusters());
        let zero = if self.hide { all } else { 0 };
        let stored = !self.hide && (self.raw || !geometry.extended_l2);
        let size = (count * geometry.l2_entry_size()) as usize;
        let mut bytes = fallible::room_for(size)?;
        for index in first..first + count {
            let far = || Error::invalid("a host cluster past the largest offset");
            let host = match self.data {
                None => None,
                Some(data) => {
                    Some(data.checked_add(index << geometry.cluster_bits).ok_or_else(far)?)
                }
            };
            let cluster = match host {
                None => Cluster::None { zero },
                Some(host) => {
                    let alloc = if stored { all } else { 0 };
                    Cluster::Standard { host, copied: true, alloc, zero }
                }
            };
            let entry = self.format.encode(cluster);
            bytes.extend(entry.descriptor.to_be_bytes());
            if geometry.extended_l2 {
                bytes.extend(entry.bitmap.to_be_bytes());
            }
        }
        Ok(bytes)
    }
}
