//! Sparse bytes: what is not there reads as zero. Clones share their pages
//! until one of them is written, so a crash image costs little.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page; also the unit in which a file occupies space.
pub(super) const PAGE: u64 = 4096;

#[derive(Clone, Default, Debug)]
pub(super) struct Pages(BTreeMap<u64, Arc<[u8; PAGE as usize]>>);

impl Pages {
    /// Copies the bytes from `offset` on into `out`.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        let mut done = 0;
        for (page, start, len) in split(offset, out.len() as u64) {
            let part = &mut out[done..done + len];
            match self.0.get(&page) {
                Some(bytes) => part.copy_from_slice(&bytes[start..start + len]),
                None => part.fill(0),
            }
            done += len;
        }
    }

    /// Puts `data` at `offset`, occupying the pages it touches.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        for (page, start, len) in split(offset, data.len() as u64) {
            let bytes = self.0.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(bytes)[start..start + len].copy_from_slice(&data[done..done + len]);
            done += len;
        }
    }

    /// As `write`, but pages that would be all zero stay holes.
    pub(super) fn write_data(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        for (page, start, len) in split(offset, data.len() as u64) {
            let part = &data[done..done + len];
            if part.iter().any(|byte| *byte != 0) {
                self.write(page * PAGE + start as u64, part);
            }
            done += len;
        }
    }

    /// Makes a range read as zero and gives back the pages it covers wholly.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first < last {
            let mut rest = self.0.split_off(&first);
            self.0.append(&mut rest.split_off(&last));
        }
        for border in [offset / PAGE, last] {
            let Some(bytes) = self.0.get_mut(&border) else { continue };
            let start = offset.max(border * PAGE);
            let stop = end.min((border + 1) * PAGE);
            if start < stop {
                let (start, stop) = ((start - border * PAGE) as usize, stop - border * PAGE);
                Arc::make_mut(bytes)[start..stop as usize].fill(0);
            }
        }
    }

    /// Removes everything from `length` on.
    pub(super) fn cut(&mut self, length: u64) {
        drop(self.0.split_off(&length.div_ceil(PAGE)));
        if let Some(bytes) = self.0.get_mut(&(length / PAGE)) {
            Arc::make_mut(bytes)[(length % PAGE) as usize..].fill(0);
        }
    }

    /// How many pages a write to this range would newly occupy.
    pub(super) fn missing(&self, offset: u64, len: u64) -> u64 {
        if len == 0 {
            return 0;
        }
        (offset + len).div_ceil(PAGE) - offset / PAGE - self.range(offset, len).count() as u64
    }

    /// Offsets of the pages occupied in a range.
    pub(super) fn range(&self, offset: u64, len: u64) -> impl Iterator<Item = u64> {
        let range = offset / PAGE..offset.saturating_add(len).div_ceil(PAGE);
        self.0.range(range).map(|(page, _)| page * PAGE)
    }

    /// Number of pages occupied.
    pub(super) fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// The pages that are there, by offset.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8; PAGE as usize])> {
        self.0.iter().map(|(page, bytes)| (page * PAGE, &**bytes))
    }
}

/// The parts of a range that lie in one page each: page, start in it, length.
fn split(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let (mut at, end) = (offset, offset + len);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (page, start) = (at / PAGE, at % PAGE);
        let len = (PAGE - start).min(end - at);
        at += len;
        Some((page, start as usize, len as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::super::rng::Rng;
    use super::*;

    #[test]
    fn pages_behave_like_plain_bytes() {
        let mut rng = Rng::new(1);
        let mut pages = Pages::default();
        let mut plain = vec![0u8; 40_000];
        for _ in 0..500 {
            let at = rng.below(plain.len() as u64);
            let len = rng.below(plain.len() as u64 - at + 1);
            let range = at as usize..(at + len) as usize;
            match rng.below(3) {
                0 => {
                    let data: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
                    pages.write(at, &data);
                    plain[range].copy_from_slice(&data);
                }
                1 => {
                    pages.punch(at, len);
                    plain[range].fill(0);
                }
                _ => {
                    let mut out = vec![1; len as usize];
                    pages.read(at, &mut out);
                    assert_eq!(out, plain[range]);
                }
            }
        }
    }

    #[test]
    fn punching_gives_whole_pages_back() {
        let mut pages = Pages::default();
        assert_eq!(pages.missing(100, 3 * PAGE), 4);
        pages.write(0, &[7; 4 * PAGE as usize]);
        assert_eq!((pages.count(), pages.missing(100, 3 * PAGE)), (4, 0));
        pages.punch(100, 3 * PAGE);
        assert_eq!((pages.count(), pages.missing(0, 4 * PAGE)), (2, 2));
        pages.punch(0, 4 * PAGE);
        assert_eq!(pages.count(), 0);
    }
}
