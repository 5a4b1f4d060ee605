//! The bits of one dirty bitmap in memory: which parts of the virtual disk may have
//! changed. Pure; it knows neither names nor how bits are stored.
//!
//! Bits are set without a lock by any number of requests, each *before* it changes
//! anything. So whoever sees a change, or a request that has returned, sees its bits,
//! and a request that fails or is given up half way has set them as well. Whatever
//! takes bits back is for who has the image alone: no request is under way then.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::error::Result;
use crate::fallible;

const WORD: u64 = u64::BITS as u64;

/// The bits of a bitmap.
#[derive(Debug)]
pub struct Bits {
    /// Bytes of the virtual disk.
    size: u64,
    /// log2 of the bytes that one bit stands for.
    granularity_bits: u32,
    /// Bit i stands for the i-th part of the disk; none is set behind its end.
    words: Vec<AtomicU64>,
    /// Whether any bit is other than it was when it was loaded.
    changed: AtomicBool,
}

/// Number of words for a disk.
fn words_for(size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(WORD)
}

/// The bits from `first` on, `count` of them (at least 1), all in one word.
fn mask(first: u64, count: u64) -> u64 {
    (u64::MAX >> (WORD - count)) << first
}

impl Bits {
    /// Bits for a disk of `size` bytes, none of them set. `OutOfMemory`.
    pub fn new(size: u64, granularity_bits: u8) -> Result<Bits> {
        let granularity_bits = granularity_bits.into();
        let count = words_for(size, granularity_bits) as usize;
        let words = fallible::collect(count, (0..count).map(|_| AtomicU64::new(0)))?;
        Ok(Bits { size, granularity_bits, words, changed: AtomicBool::new(false) })
    }

    /// Memory that the bits for a disk of `size` bytes take.
    pub fn bytes_for(size: u64, granularity_bits: u8) -> u64 {
        words_for(size, granularity_bits.into()) * 8
    }

    /// Memory that they take.
    pub fn bytes(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// Whether any bit may be other than it was when they were loaded.
    pub fn changed(&self) -> bool {
        self.changed.load(Relaxed)
    }

    /// These bytes of the disk are dirty, as far as there are any.
    #[inline]
    pub fn set(&self, bytes: Range<u64>) {
        let end = bytes.end.min(self.size);
        if bytes.start >= end {
            return;
        }
        let (first, last) =
            (bytes.start >> self.granularity_bits, (end - 1) >> self.granularity_bits);
        if first == last {
            self.set_in_word(first / WORD, 1 << (first % WORD));
        } else {
            self.set_bits(first, last);
        }
    }

    #[inline]
    fn set_in_word(&self, index: u64, mask: u64) {
        let Some(word) = self.words.get(index as usize) else { return };
        // Nearly always they are set: then nothing is written, and no other thread's
        // cache loses the line.
        if word.load(Relaxed) & mask != mask {
            word.fetch_or(mask, Relaxed);
            self.changed.store(true, Relaxed);
        }
    }

    fn set_bits(&self, first: u64, last: u64) {
        let mut at = first;
        while at <= last {
            let count = (WORD - at % WORD).min(last - at + 1);
            self.set_in_word(at / WORD, mask(at % WORD, count));
            at += count;
        }
    }

    /// Nothing is dirty any more. For who has the image alone.
    pub fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, Relaxed));
        self.changed.store(true, Relaxed);
    }

    /// What is dirty there is dirty here, too.
    pub fn merge(&self, other: &Bits) {
        let mut at = 0;
        while at < other.size {
            let (dirty, end) = other.run(at);
            if dirty {
                self.set(at..end);
            }
            at = end;
        }
    }

    /// The same bits for a disk of another size; what is new is not dirty.
    /// `OutOfMemory`.
    pub fn resized(&self, size: u64) -> Result<Bits> {
        let bits = Bits::new(size, self.granularity_bits as u8)?;
        for (to, from) in bits.words.iter().zip(&self.words) {
            to.store(from.load(Relaxed), Relaxed);
        }
        bits.cut();
        bits.changed.store(true, Relaxed);
        Ok(bits)
    }

    /// Clears what lies behind the end of the disk, in the last word.
    fn cut(&self) {
        let used = self.size.div_ceil(1 << self.granularity_bits) % WORD;
        if let (Some(last), true) = (self.words.last(), used > 0) {
            last.fetch_and(mask(0, used), Relaxed);
        }
    }

    /// Whether the byte at an offset on the disk is dirty, and where the run of bytes
    /// that are like it ends.
    pub fn run(&self, offset: u64) -> (bool, u64) {
        let first = offset >> self.granularity_bits;
        let word = |index: u64| self.words.get(index as usize).map(|word| word.load(Relaxed));
        let mut index = first / WORD;
        let Some(found) = word(index) else { return (false, self.size) };
        let dirty = found >> (first % WORD) & 1 == 1;
        // Ones where a bit is another; those before the first one do not count.
        let others = |word: u64| if dirty { !word } else { word };
        let mut left = others(found) & (u64::MAX << (first % WORD));
        while left == 0 {
            index += 1;
            match word(index) {
                Some(next) => left = others(next),
                None => return (dirty, self.size),
            }
        }
        let next = index * WORD + u64::from(left.trailing_zeros());
        (dirty, (next << self.granularity_bits).min(self.size))
    }

    /// Bytes of the disk that are dirty.
    pub fn dirty_bytes(&self) -> u64 {
        let ones = self.words.iter().map(|word| u64::from(word.load(Relaxed).count_ones()));
        let bytes = ones.sum::<u64>() << self.granularity_bits;
        // The last bit stands for less where the disk ends within its part.
        let beyond = self.size.next_multiple_of(1 << self.granularity_bits) - self.size;
        let last_is_set = self.size > 0 && self.run(self.size - 1).0;
        bytes - if last_is_set { beyond } else { 0 }
    }

    /// Bytes that they take as they are stored.
    pub fn stored_bytes(&self) -> u64 {
        self.size.div_ceil(1 << self.granularity_bits).div_ceil(8)
    }

    /// Takes over stored bits, of a place that begins at a multiple of 8 bytes.
    pub fn load(&self, place: u64, stored: &[u8]) {
        let words = self.words.iter().skip((place / 8) as usize);
        for (word, bytes) in words.zip(stored.chunks(8)) {
            let value = bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            word.store(value, Relaxed);
        }
        self.cut();
    }

    /// As `load`, of `length` bytes in which all bits are set.
    pub fn load_ones(&self, place: u64, length: u64) {
        let words = self.words.iter().skip((place / 8) as usize);
        words.take(length.div_ceil(8) as usize).for_each(|word| word.store(u64::MAX, Relaxed));
        self.cut();
    }

    /// The words of a place among the stored bits that begins at a multiple of 8 bytes;
    /// what is behind the end is zero.
    fn words_at(&self, place: u64, length: u64) -> impl Iterator<Item = u64> + '_ {
        let words = self.words.iter().skip((place / 8) as usize);
        words.take(length.div_ceil(8) as usize).map(|word| word.load(Relaxed))
    }

    /// The bits of a place as they are stored. `OutOfMemory`.
    pub fn store(&self, place: u64, length: u64) -> Result<Vec<u8>> {
        let bytes = self.words_at(place, length).flat_map(u64::to_le_bytes);
        let mut bytes = fallible::collect(length as usize, bytes)?;
        bytes.resize(length as usize, 0);
        Ok(bytes)
    }

    /// Whether all bits of a place are zero, and whether all of them are one.
    pub fn are_alike(&self, place: u64, length: u64) -> (bool, bool) {
        let end = self.stored_bytes().min(place + length);
        let bits = self.size.div_ceil(1 << self.granularity_bits);
        let count = bits.min(end * 8).saturating_sub(place * 8);
        let ones: u64 = self.words_at(place, length).map(|word| u64::from(word.count_ones())).sum();
        (ones == 0, ones > 0 && ones == count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs(bits: &Bits) -> Vec<(bool, Range<u64>)> {
        let (mut at, mut runs) = (0, Vec::new());
        while at < bits.size {
            let (dirty, end) = bits.run(at);
            runs.push((dirty, at..end));
            at = end;
        }
        runs
    }

    #[test]
    fn a_part_that_is_touched_is_dirty_as_a_whole() {
        let bits = Bits::new(10 * 512 + 100, 9).unwrap();
        assert!(!bits.changed());
        bits.set(511..513);
        bits.set(5200..9999);
        bits.set(3000..3000);
        assert_eq!(
            runs(&bits),
            [(true, 0..1024), (false, 1024..5120), (true, 5120..5220)],
            "what is behind the end does not count, nor what is empty"
        );
        assert_eq!(bits.dirty_bytes(), 1124);
        assert!(bits.changed());
        bits.clear();
        assert_eq!(bits.dirty_bytes(), 0);
    }

    #[test]
    fn a_disk_without_bytes_has_no_bits() {
        let bits = Bits::new(0, 9).unwrap();
        bits.set(0..u64::MAX);
        assert_eq!((bits.bytes(), bits.dirty_bytes(), bits.run(0)), (0, 0, (false, 0)));
    }

    #[test]
    fn what_is_stored_and_loaded_is_the_same() {
        let bits = Bits::new(1 << 20, 9).unwrap();
        bits.set(0..512);
        bits.set(9 * 512..10 * 512);
        bits.set(128 * 512..256 * 512);
        assert_eq!(bits.store(0, 16).unwrap()[..3], [1, 2, 0]);
        assert_eq!(bits.are_alike(16, 16), (false, true));
        assert_eq!(bits.are_alike(32, 16), (true, false));
        let again = Bits::new(1 << 20, 9).unwrap();
        again.load(0, &bits.store(0, 16).unwrap());
        again.load_ones(16, 16);
        assert_eq!(runs(&again), runs(&bits));
        assert!(!again.changed());
        // What a file has behind the end of the disk is no bit.
        let short = Bits::new(3 * 512, 9).unwrap();
        short.load(0, &[0xff; 512]);
        assert_eq!(short.dirty_bytes(), 3 * 512);
        assert_eq!(short.are_alike(0, 512), (false, true));
        short.load_ones(0, 512);
        assert_eq!(short.store(0, 512).unwrap()[..2], [7, 0]);
    }

    proptest! {
        #[test]
        fn bits_are_those_of_a_model(
            size in 1u64..300,
            sets in proptest::collection::vec((0u64..320, 0u64..200), 0..8),
            coarse in 9u8..12,
            new_size in 1u64..300,
        ) {
            let size = size * 512;
            let bits = Bits::new(size, 9).unwrap();
            let mut model = vec![false; (size / 512) as usize];
            for (start, count) in sets {
                bits.set(start * 512..(start + count) * 512);
                model.iter_mut().skip(start as usize).take(count as usize).for_each(|b| *b = true);
            }
            for (index, dirty) in model.iter().enumerate() {
                let (found, end) = bits.run(index as u64 * 512);
                prop_assert_eq!(found, *dirty);
                let rest = model[index..].iter().position(|b| b != dirty);
                let expected = rest.map_or(size, |rest| (index + rest) as u64 * 512);
                prop_assert_eq!(end, expected);
            }
            let dirty = model.iter().filter(|dirty| **dirty).count() as u64 * 512;
            prop_assert_eq!(bits.dirty_bytes(), dirty);

            // Merged into coarser bits, and a disk of another size.
            let merged = Bits::new(size, coarse).unwrap();
            merged.merge(&bits);
            let resized = bits.resized(new_size * 512).unwrap();
            for at in 0..size.max(new_size * 512) / 512 {
                let per = 1u64 << (coarse - 9);
                let part = at / per * per..(at / per + 1) * per;
                let any = part.clone().any(|n| model.get(n as usize) == Some(&true));
                if at * 512 < size {
                    prop_assert_eq!(merged.run(at * 512).0, any);
                }
                if at < new_size {
                    prop_assert_eq!(resized.run(at * 512).0, model.get(at as usize) == Some(&true));
                }
            }
            let longer = resized.resized(1 << 20).unwrap();
            prop_assert_eq!(longer.dirty_bytes(), resized.dirty_bytes());
        }
    }
}
