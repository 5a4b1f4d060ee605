//! What a subcluster can be, and sets of subclusters.
//!
//! An image without extended L2 entries has clusters of one subcluster: the
//! same algebra serves both. Pure; knows no tables and no I/O.

use std::ops::Range;

/// Everything that a subcluster can be. A damaged entry is an error, not a kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subcluster {
    /// Not in this image: reads as the backing file. No host cluster.
    Unallocated,
    /// Not in this image either, but a host cluster is there to write to.
    Reserved,
    /// Reads as zero. No host cluster.
    Zero,
    /// Reads as zero, and a host cluster is there to write to.
    ZeroReserved,
    /// Stored in the host cluster.
    Normal,
    /// Part of a compressed cluster.
    Compressed,
}

/// A set of subclusters of one cluster: bit x is subcluster x.
pub type Mask = u32;

/// The subclusters of a range.
pub fn mask(range: Range<u32>) -> Mask {
    let below = |n: u32| if n >= 32 { u32::MAX } else { (1 << n) - 1 };
    below(range.end) & !below(range.start)
}

/// All subclusters of a cluster that has `count` of them.
pub fn all(count: u32) -> Mask {
    mask(0..count)
}

/// How many subclusters from `from` on (below `count`) are alike in `set`: all
/// in it, or none of them.
pub fn alike(set: Mask, from: u32, count: u32) -> u32 {
    let rest = set.checked_shr(from).unwrap_or(0);
    let run = if rest & 1 == 1 { rest.trailing_ones() } else { rest.trailing_zeros() };
    run.min(count.saturating_sub(from))
}

/// The maximal runs of neighbours in a set, in order.
pub fn runs(set: Mask) -> impl Iterator<Item = Range<u32>> {
    let mut left = u64::from(set);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let start = left.trailing_zeros();
        let end = start + (left >> start).trailing_ones();
        left &= !((1u64 << end) - 1);
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_mask_holds_its_range(a in 0u32..=32, b in 0u32..=32) {
            let m = mask(a..b);
            for x in 0..32 {
                prop_assert_eq!(m >> x & 1 == 1, (a..b).contains(&x));
            }
        }

        #[test]
        fn runs_are_maximal_and_cover(set: u32) {
            let mut seen = 0;
            let mut last_end = None;
            for run in runs(set) {
                prop_assert!(!run.is_empty());
                prop_assert!(last_end.is_none_or(|end| run.start > end));
                last_end = Some(run.end);
                seen |= mask(run);
            }
            prop_assert_eq!(seen, set);
        }

        #[test]
        fn alike_agrees_with_counting(set: u32, from in 0u32..32, count in 1u32..=32) {
            let expected = (from..count).take_while(|x| set >> x & 1 == set >> from & 1).count();
            prop_assert_eq!(alike(set, from, count), expected as u32);
        }
    }
}
