//! Who is changing which subclusters: claims of requests in flight.
//!
//! A request that changes what an L2 entry says of some subclusters claims them
//! first, and keeps the claim until its I/O is over. Requests that claim
//! disjoint subclusters do not wait for each other; reads, and writes to what is
//! allocated already, claim nothing. A claim is taken as a whole or not at all,
//! and nobody waits for one while holding another, so no circle can form.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::format::subcluster::Mask;
use crate::geometry::GuestCluster;

/// The claims of an image.
#[derive(Default)]
pub struct Claims(Mutex<State>);

#[derive(Default)]
struct State {
    held: HashMap<u64, Mask>,
    waiting: Vec<Waker>,
}

/// What is claimed: neighbouring clusters, all subclusters of those in the
/// middle, some of the first and of the last.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First cluster.
    pub first: GuestCluster,
    /// Number of clusters, at least 1.
    pub count: u64,
    /// All subclusters of a cluster of this image.
    pub all: Mask,
    /// Subclusters of the first cluster.
    pub head: Mask,
    /// Subclusters of the last cluster; where `count` is 1, those in both count.
    pub tail: Mask,
}

impl Region {
    /// All of `count` clusters.
    pub fn whole(first: GuestCluster, count: u64, all: Mask) -> Region {
        Region { first, count, all, head: all, tail: all }
    }

    /// The subclusters claimed of the cluster number `index`.
    pub fn mask(&self, index: u64) -> Mask {
        let mut mask = self.all;
        if index == 0 {
            mask &= self.head;
        }
        if index + 1 == self.count {
            mask &= self.tail;
        }
        mask
    }
}

/// L2 tables are claimed by their L1 index, in a number space of their own.
const L1_SPACE: u64 = 1 << 63;

/// A claim that is held; given up when dropped.
pub struct Claim<'a> {
    claims: &'a Claims,
    region: Region,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else holds any of it, then takes all of it.
    pub async fn acquire(&self, region: Region) -> Claim<'_> {
        poll_fn(|context| {
            let mut state = self.lock();
            let number = |index| region.first.0 + index;
            let taken = (0..region.count).any(|index| {
                state.held.get(&number(index)).is_some_and(|held| held & region.mask(index) != 0)
            });
            if taken {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            for index in 0..region.count {
                *state.held.entry(number(index)).or_default() |= region.mask(index);
            }
            Poll::Ready(Claim { claims: self, region })
        })
        .await
    }

    /// Claims the making of the L2 table of an L1 entry.
    pub async fn acquire_table(&self, l1_index: u64) -> Claim<'_> {
        let all = if mutant!(TableClaimsNothing) { 0 } else { 1 };
        self.acquire(Region::whole(GuestCluster(L1_SPACE | l1_index), 1, all)).await
    }
}

impl Claim<'_> {
    /// Gives up all but the first `count` clusters; those are kept as claimed.
    pub fn shrink(&mut self, count: u64) {
        if count >= self.region.count {
            return;
        }
        let region = self.region;
        self.release(count..region.count);
        self.region = Region { count, tail: region.all, ..region };
    }

    fn release(&self, indices: std::ops::Range<u64>) {
        let mut state = self.claims.lock();
        for index in indices {
            let number = self.region.first.0 + index;
            if let Some(held) = state.held.get_mut(&number) {
                *held &= !self.region.mask(index);
                if *held == 0 {
                    state.held.remove(&number);
                }
            }
        }
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.release(0..self.region.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Context;

    fn try_acquire(claims: &Claims, region: Region) -> Option<Claim<'_>> {
        let mut context = Context::from_waker(Waker::noop());
        match pin!(claims.acquire(region)).poll(&mut context) {
            Poll::Ready(claim) => Some(claim),
            Poll::Pending => None,
        }
    }

    fn part(first: u64, mask: Mask) -> Region {
        Region { first: GuestCluster(first), count: 1, all: u32::MAX, head: mask, tail: mask }
    }

    #[test]
    fn disjoint_subclusters_do_not_wait() {
        let claims = Claims::default();
        let a = try_acquire(&claims, part(7, 0b0011)).unwrap();
        let b = try_acquire(&claims, part(7, 0b1100)).unwrap();
        assert!(try_acquire(&claims, part(7, 0b0110)).is_none());
        drop(a);
        assert!(try_acquire(&claims, part(7, 0b0110)).is_none());
        drop(b);
        assert!(try_acquire(&claims, part(7, 0b0110)).is_some());
    }

    #[test]
    fn shrinking_releases_the_rest_only() {
        let claims = Claims::default();
        let region = Region { tail: 0b1, ..Region::whole(GuestCluster(10), 4, u32::MAX) };
        let mut claim = try_acquire(&claims, region).unwrap();
        assert!(try_acquire(&claims, part(13, 0b10)).is_some());
        assert!(try_acquire(&claims, part(13, 0b01)).is_none());
        claim.shrink(2);
        assert!(try_acquire(&claims, part(12, 1)).is_some());
        assert!(try_acquire(&claims, part(13, 1)).is_some());
        assert!(try_acquire(&claims, part(11, 1)).is_none());
        drop(claim);
        assert!(claims.lock().held.is_empty());
    }
}
