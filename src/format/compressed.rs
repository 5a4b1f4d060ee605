//! Compressed clusters: the descriptor in an L2 entry, and deflate.
//!
//! It knows one cluster at a time, not who shares the host clusters it touches.

use std::ops::RangeInclusive;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::limits::MAX_HOST_OFFSET;
use crate::error::{Error, Result};
use crate::geometry::Geometry;

/// The bit of an L2 entry that marks a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Lengths are counted in sectors of this size.
const SECTOR: u64 = 512;
/// log2 of deflate's window. Programs that read qcow2 expect no larger one.
const WINDOW_BITS: u8 = 12;

/// Where the bytes of a compressed cluster lie. They need not be aligned, may
/// span two host clusters, and share them with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Byte offset in the image file.
    pub offset: u64,
    /// Bytes to read: up to the end of the last sector, so there may be garbage
    /// behind the compressed data.
    pub length: u64,
}

/// Width of the descriptor's offset field; the number of further sectors stands
/// above it, up to bit 61.
fn offset_bits(geometry: Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

/// Reads the descriptor of a compressed cluster; bits 62 and 63 are ignored.
///
/// Errors: `Corrupt` if the data would lie in the header's cluster or pass
/// [`MAX_HOST_OFFSET`].
pub fn decode(entry: u64, geometry: Geometry) -> Result<Compressed> {
    let Compressed { offset, length } = place(entry, geometry);
    if offset < geometry.cluster_size() || offset + length > MAX_HOST_OFFSET + 1 {
        return Err(Error::corrupt(format!(
            "compressed cluster at {offset:#x} with {length} bytes lies outside the image"
        )));
    }
    Ok(Compressed { offset, length })
}

/// What an entry says, possible or not.
pub fn place(entry: u64, geometry: Geometry) -> Compressed {
    let bits = offset_bits(geometry);
    let offset = entry & ((1 << bits) - 1);
    let further = (entry >> bits) & ((1 << (geometry.cluster_bits - 8)) - 1);
    // The offset has at most 61 bits, the length at most 22.
    Compressed { offset, length: (further + 1) * SECTOR - offset % SECTOR }
}

/// The L2 entry, with the compressed bit, for `length` bytes of data at a byte
/// offset; `None` if it cannot be expressed.
pub fn encode(offset: u64, length: u64, geometry: Geometry) -> Option<u64> {
    let bits = offset_bits(geometry);
    let in_sectors = (offset % SECTOR).checked_add(length)?;
    let further = in_sectors.div_ceil(SECTOR).checked_sub(1).filter(|_| length > 0)?;
    if offset >> bits != 0 || further >> (geometry.cluster_bits - 8) != 0 {
        return None;
    }
    let entry = COMPRESSED | (further << bits) | offset;
    decode(entry, geometry).is_ok().then_some(entry)
}

impl Compressed {
    /// The host clusters that the bytes touch; each of them is counted once.
    pub fn host_clusters(&self, geometry: Geometry) -> RangeInclusive<u64> {
        let last = self.offset.saturating_add(self.length.saturating_sub(1));
        self.offset >> geometry.cluster_bits..=last >> geometry.cluster_bits
    }
}

/// Decompresses raw deflate data so that it fills `output` exactly. What
/// follows the data, and what would follow the output, is ignored. Work and
/// memory are bounded by the two lengths.
///
/// Errors: `Corrupt`.
pub fn inflate(input: &[u8], output: &mut [u8]) -> Result<()> {
    let mut stream = Decompress::new(false);
    loop {
        let (done_in, done_out) = (position(stream.total_in()), position(stream.total_out()));
        let (Some(rest), Some(room)) = (input.get(done_in..), output.get_mut(done_out..)) else {
            break;
        };
        if room.is_empty() {
            return Ok(());
        }
        let status = stream.decompress(rest, room, FlushDecompress::Finish);
        let stuck =
            position(stream.total_in()) == done_in && position(stream.total_out()) == done_out;
        match status {
            Err(error) => return Err(Error::corrupt(format!("compressed data: {error}"))),
            Ok(Status::Ok | Status::BufError) if !stuck => {}
            Ok(Status::StreamEnd) if position(stream.total_out()) == output.len() => return Ok(()),
            Ok(_) => break,
        }
    }
    Err(Error::corrupt(format!(
        "compressed data ends after {} of {} bytes",
        stream.total_out(),
        output.len()
    )))
}

/// Compresses into raw deflate data. Returns how many bytes of `output` it
/// takes, or `None` if it does not fit with a byte to spare: such a cluster is
/// stored as it is.
pub fn deflate(input: &[u8], output: &mut [u8]) -> Option<usize> {
    // As small as QEMU's, and in as much time: zlib's level 6 finds what takes zlib-rs
    // level 9.
    let mut stream = Compress::new_with_window_bits(Compression::best(), false, WINDOW_BITS);
    match stream.compress(input, output, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => Some(position(stream.total_out())),
        _ => None,
    }
}

/// A stream's position as an index.
fn position(total: u64) -> usize {
    usize::try_from(total).unwrap_or(usize::MAX)
}
