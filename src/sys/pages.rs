//! Memory of words that the system gives page by page, when a page is first written, and
//! gets back page by page. Knows nothing of what is in there.

use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::slice;
use std::sync::atomic::AtomicU64;

use crate::error::{Error, ErrorKind, Result};

/// Bytes in a word.
const WORD: usize = 8;

/// Words that are zero at first.
pub struct Pages {
    words: NonNull<AtomicU64>,
    count: usize,
    page: usize,
}

// SAFETY: atomics, and a mapping that goes with this value and is nobody else's.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// So many words (at least one). Takes addresses, and no memory yet. `OutOfMemory`.
    pub fn new(count: usize) -> Result<Pages> {
        let no_memory =
            || Error::new(ErrorKind::OutOfMemory, format!("no memory for {count} words"));
        let bytes = count.max(1).checked_mul(WORD).ok_or_else(no_memory)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever there is room, touches nothing that exists.
        let start = unsafe { libc::mmap(null_mut(), bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(no_memory());
        }
        let words = NonNull::new(start.cast::<AtomicU64>()).ok_or_else(no_memory)?;
        // SAFETY: asks about the system, and no more.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).ok().filter(|page| page.is_power_of_two());
        // Large pages would be taken whole for the first word that is used. (It is
        // advice: where there are none, there is nothing to be done.)
        // SAFETY: the mapping made above; what is in there does not change.
        unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
        Ok(Pages { words, count, page: page.unwrap_or(usize::MAX) })
    }

    /// All words.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped, aligned to a page, for as long as `self`
        // lives; zero bytes are an atomic; whoever else changes them does so atomically.
        unsafe { slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }

    /// Gives the memory of whole pages among these words back: they are zero from then
    /// on, which whoever reads them meanwhile may see word by word. Returns which words
    /// that was.
    pub fn give_back(&self, words: Range<usize>) -> Range<usize> {
        let none = words.start..words.start;
        let (first, end) = (words.start.saturating_mul(WORD), words.end.min(self.count) * WORD);
        let Some(first) = first.checked_next_multiple_of(self.page) else { return none };
        let end = end & !(self.page - 1);
        if first >= end {
            return none;
        }
        // SAFETY: whole pages of the mapping, see `new`; that anonymous memory reads as
        // zero afterwards is like a store of zero to each of its atomics.
        let given = unsafe {
            let start = self.words.as_ptr().cast::<u8>().add(first);
            libc::madvise(start.cast(), end - first, libc::MADV_DONTNEED)
        };
        if given == 0 { first / WORD..end / WORD } else { none }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, which nobody refers to any more.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.count.max(1) * WORD) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn whole_pages_are_given_back_and_read_as_zero() {
        let pages = Pages::new(4 * 512 + 100).unwrap();
        let (words, page) = (pages.words(), pages.page / WORD);
        assert!(words.iter().all(|word| word.load(Relaxed) == 0));
        words.iter().for_each(|word| word.store(7, Relaxed));
        let given = pages.give_back(1..words.len());
        assert_eq!(given.start % page + given.end % page, 0);
        if page == 512 {
            assert_eq!(given, 512..4 * 512);
        }
        for (index, word) in words.iter().enumerate() {
            assert_eq!(word.load(Relaxed), if given.contains(&index) { 0 } else { 7 }, "{index}");
        }
        words[given.start].store(5, Relaxed);
        assert_eq!(words[given.start].load(Relaxed), 5);
        assert!(pages.give_back(3..4).is_empty());
        assert!(pages.give_back(usize::MAX - 1..usize::MAX).is_empty());
    }

    #[test]
    fn too_much_is_an_error() {
        for count in [usize::MAX, usize::MAX / WORD] {
            let error = Pages::new(count).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        }
    }
}
