//! Refcounts of 1 to 64 bits inside a refcount block.
//!
//! Widths below a byte are packed from the lowest bit of each byte; wider ones
//! are big endian. It knows entries only, not which cluster one counts.

use super::limits::MAX_REFCOUNT_ORDER;
use crate::error::{Error, ErrorKind, Result};

/// How wide the refcounts of an image are: 2^order bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountWidth(u32);

impl RefcountWidth {
    /// The width for a header's `refcount_order`; `BadHeader` above 6.
    pub fn new(order: u32) -> Result<RefcountWidth> {
        if order > MAX_REFCOUNT_ORDER {
            return Err(Error::new(
                ErrorKind::BadHeader,
                format!("refcounts have 2^{order} bits; at most 64 are possible"),
            ));
        }
        Ok(RefcountWidth(order))
    }

    /// log2 of the number of bits.
    pub fn order(self) -> u32 {
        self.0
    }

    /// Number of bits of a refcount.
    pub fn bits(self) -> u32 {
        1 << self.0
    }

    /// The highest refcount.
    pub fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Number of refcounts in a word of 8 bytes.
    pub fn per_word(self) -> u64 {
        64 >> self.0
    }

    /// Number of whole refcounts in `bytes` bytes.
    pub fn entries_per(self, bytes: u64) -> u64 {
        match self.0 {
            order @ 0..=3 => bytes.saturating_mul(8 >> order),
            order => bytes >> (order - 3),
        }
    }

    /// Where an entry's lowest bit lies in a word that was made from 8 bytes of
    /// the file by `u64::from_be_bytes`. The index counts modulo the entries of
    /// a word.
    fn shift(self, index: u64) -> u32 {
        let first_bit = (index % self.per_word()) as u32 * self.bits();
        if self.0 < 3 {
            // The byte that holds it, from the top; inside it from the bottom.
            56 - first_bit / 8 * 8 + first_bit % 8
        } else {
            64 - self.bits() - first_bit
        }
    }

    /// The refcount at an index in a word that was made from 8 bytes of the
    /// file by `u64::from_be_bytes`. The index counts modulo [`Self::per_word`],
    /// so that the index in the whole table serves too.
    pub fn get(self, word: u64, index_in_word: u64) -> u64 {
        (word >> self.shift(index_in_word)) & self.max()
    }

    /// The word with the refcount at an index replaced; see [`Self::get`]. The
    /// caller has checked that `value` is at most [`Self::max`]; higher bits
    /// are cut off and never reach a neighbour.
    #[must_use]
    pub fn set(self, word: u64, index_in_word: u64, value: u64) -> u64 {
        debug_assert!(value <= self.max(), "{value} does not fit into {} bits", self.bits());
        let shift = self.shift(index_in_word);
        (word & !(self.max() << shift)) | ((value & self.max()) << shift)
    }

    /// The refcount at an index of a table as it lies in the file; `None` past
    /// its last whole word.
    pub fn get_in(self, table: &[u8], index: u64) -> Option<u64> {
        let at = usize::try_from(index / self.per_word()).ok()?;
        let word = table.get(at.checked_mul(8)?..)?.first_chunk::<8>()?;
        Some(self.get(u64::from_be_bytes(*word), index))
    }

    /// Replaces the refcount at an index of a table as it lies in the file;
    /// `None`, and nothing happens, past its last whole word.
    pub fn set_in(self, table: &mut [u8], index: u64, value: u64) -> Option<()> {
        let at = usize::try_from(index / self.per_word()).ok()?;
        let word = table.get_mut(at.checked_mul(8)?..)?.first_chunk_mut::<8>()?;
        *word = self.set(u64::from_be_bytes(*word), index, value).to_be_bytes();
        Some(())
    }
}
