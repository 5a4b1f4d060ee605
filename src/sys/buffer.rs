//! Buffers that requests of a queue take along and hand back: any vector, or memory
//! that is aligned for O_DIRECT. Knows nothing of requests.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::slice;

use super::memory::{Block, BlockSlice};
use crate::error::Result;

/// Bytes that go along with a request of a [`Queue`](crate::Queue) and come back with
/// its completion.
///
/// Any `Vec<u8>` becomes one, without a copy. Where the image is open with O_DIRECT, an
/// [`aligned`](Buffer::aligned) one is better: the disk transfers straight into it or
/// out of it, as long as offset and length are aligned, too (to 4096 bytes, which suits
/// every disk). Anything else goes through a buffer in between.
///
/// ```
/// # fn main() -> qcow2rs::Result<()> {
/// use qcow2rs::Buffer;
///
/// let mut buffer = Buffer::aligned(65536)?;
/// buffer[..3].copy_from_slice(b"abc");
/// assert_eq!(Vec::from(buffer).len(), 65536);
/// # Ok(())
/// # }
/// ```
pub struct Buffer(Memory);

enum Memory {
    Bytes(Vec<u8>),
    /// Nobody touches a clone of the block but operations of a request that has the
    /// whole buffer.
    Aligned(Block, usize),
}

impl Buffer {
    /// `len` zero bytes at an address that O_DIRECT takes. `OutOfMemory`.
    pub fn aligned(len: usize) -> Result<Buffer> {
        Ok(Buffer(Memory::Aligned(Block::zeroed(len)?, len)))
    }

    /// The memory of an aligned one, for an operation that keeps it until it is over.
    /// Whoever starts one has the whole buffer, and hands it back only then.
    pub(crate) fn block(&self) -> Option<BlockSlice> {
        match &self.0 {
            Memory::Bytes(_) => None,
            Memory::Aligned(block, len) => Some(block.slice(0, *len)),
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Memory::Bytes(bytes) => bytes,
            // SAFETY: `len` initialised bytes, which live as long as the block; nobody
            // else has it, so they change only through `deref_mut`, or by a request
            // that has the whole buffer.
            Memory::Aligned(block, len) => unsafe {
                slice::from_raw_parts(block.all().as_ptr(), *len)
            },
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Bytes(bytes) => bytes,
            // SAFETY: as above, and `self` is borrowed for nobody else.
            Memory::Aligned(block, len) => unsafe {
                slice::from_raw_parts_mut(block.all().as_ptr(), *len)
            },
        }
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Buffer {
        Buffer(Memory::Bytes(bytes))
    }
}

impl From<Buffer> for Vec<u8> {
    /// The vector that it was made of; a copy of an aligned one.
    fn from(buffer: Buffer) -> Vec<u8> {
        match buffer.0 {
            Memory::Bytes(bytes) => bytes,
            Memory::Aligned(..) => buffer.to_vec(),
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl<T: AsRef<[u8]> + ?Sized> PartialEq<T> for Buffer {
    fn eq(&self, other: &T) -> bool {
        **self == *other.as_ref()
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::BLOCK_ALIGNMENT;

    #[test]
    fn aligned_buffers_are_zeroed_aligned_and_as_long_as_asked_for() {
        for len in [0, 1, 4096, 5000] {
            let mut buffer = Buffer::aligned(len).unwrap();
            assert_eq!(buffer, vec![0; len]);
            assert_eq!(buffer.as_ptr() as usize % BLOCK_ALIGNMENT, 0);
            buffer.fill(7);
            assert_eq!(Vec::from(buffer), vec![7; len]);
        }
        assert!(Buffer::aligned(isize::MAX as usize).is_err());
    }

    #[test]
    fn a_vector_goes_in_and_comes_out_without_a_copy() {
        let bytes = vec![3; 100];
        let address = bytes.as_ptr();
        let again = Vec::from(Buffer::from(bytes));
        assert_eq!(again.as_ptr(), address);
    }
}
