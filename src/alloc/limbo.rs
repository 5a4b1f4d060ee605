//! Clusters between two lives. A freed cluster may be given out again when the
//! change that freed it is durable and every request that entered before has
//! left; until then it waits here, its refcount untouched.
//!
//! It knows nothing of refcounts: it hands back what may be lowered.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::epoch::Epochs;

/// Host clusters that each lost one reference.
pub type Freed = Range<u64>;

/// The waiting room.
#[derive(Default)]
pub struct Limbo(Mutex<State>);

#[derive(Default)]
struct State {
    /// Freed in memory; the change is not durable yet.
    announced: Vec<Freed>,
    /// The change is durable; stamped with the epoch of that moment.
    quiescing: VecDeque<(u64, Freed)>,
    clusters: u64,
}

impl Limbo {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called after the pointer was dropped in memory, and after whatever
    /// was done to the clusters' bytes (a punched hole) is complete.
    pub fn announce(&self, freed: Freed) {
        let mut state = self.lock();
        state.clusters += freed.end - freed.start;
        state.announced.push(freed);
    }

    /// What was announced so far. To be called *before* the metadata that a
    /// flush writes is copied, so that the copies contain these drops.
    pub fn take_announced(&self) -> Vec<Freed> {
        std::mem::take(&mut self.lock().announced)
    }

    /// The flush failed: back to where they were.
    pub fn put_back(&self, freed: Vec<Freed>) {
        self.lock().announced.extend(freed);
    }

    /// The drops are durable.
    pub fn dropped(&self, freed: Vec<Freed>, epochs: &Epochs) {
        let stamp = epochs.now();
        self.lock().quiescing.extend(freed.into_iter().map(|freed| (stamp, freed)));
    }

    /// What nobody can be using any more: its refcounts may be lowered.
    pub fn take_ready(&self, epochs: &Epochs) -> Ready<'_> {
        epochs.advance();
        let mut state = self.lock();
        let passed = |(stamp, _): &(u64, Freed)| epochs.has_passed(*stamp);
        let count = state.quiescing.iter().take_while(|waiting| passed(waiting)).count();
        Ready { limbo: self, waiting: state.quiescing.drain(..count).collect() }
    }

    /// Number of ranges that wait.
    pub fn ranges(&self) -> usize {
        let state = self.lock();
        state.announced.len() + state.quiescing.len()
    }

    /// Number of clusters that wait.
    pub fn clusters(&self) -> u64 {
        self.lock().clusters
    }
}

/// Clusters on their way out. Those that are not gone when this is dropped (an
/// error, a request given up) go back to where they were.
pub struct Ready<'a> {
    limbo: &'a Limbo,
    waiting: VecDeque<(u64, Freed)>,
}

impl Ready<'_> {
    /// The next whose refcounts are to be lowered.
    pub fn next(&self) -> Option<Freed> {
        self.waiting.front().map(|(_, freed)| freed.clone())
    }

    /// The first `count` clusters of what `next` returned are free.
    pub fn done(&mut self, count: u64) {
        self.limbo.lock().clusters -= count;
        if let Some((_, freed)) = self.waiting.front_mut() {
            freed.start += count;
            if freed.is_empty() {
                self.waiting.pop_front();
            }
        }
    }
}

impl Drop for Ready<'_> {
    fn drop(&mut self) {
        mutant!(FailedReleaseForgets => return);
        let mut state = self.limbo.lock();
        while let Some(freed) = self.waiting.pop_back() {
            state.quiescing.push_front(freed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes out all that is ready.
    fn take(limbo: &Limbo, epochs: &Epochs) -> Vec<Freed> {
        let mut ready = limbo.take_ready(epochs);
        std::iter::from_fn(|| {
            let next = ready.next()?;
            ready.done(next.end - next.start);
            Some(next)
        })
        .collect()
    }

    #[test]
    fn reuse_waits_for_the_drop_and_for_the_readers() {
        let (limbo, epochs) = (Limbo::default(), Epochs::default());
        let reader = epochs.enter();
        limbo.announce(5..7);
        assert!(take(&limbo, &epochs).is_empty());
        let flushed = limbo.take_announced();
        limbo.announce(9..10);
        limbo.dropped(flushed, &epochs);
        assert!(take(&limbo, &epochs).is_empty(), "a reader is inside");
        drop(reader);
        assert_eq!(take(&limbo, &epochs), vec![5..7]);
        assert_eq!(limbo.clusters(), 1, "announced after the flush began");
    }

    #[test]
    fn a_failed_flush_loses_nothing() {
        let (limbo, epochs) = (Limbo::default(), Epochs::default());
        limbo.announce(5..7);
        let flushed = limbo.take_announced();
        limbo.put_back(flushed);
        let flushed = limbo.take_announced();
        limbo.dropped(flushed, &epochs);
        assert_eq!(take(&limbo, &epochs), vec![5..7]);
    }

    #[test]
    fn what_is_not_done_stays_ready() {
        let (limbo, epochs) = (Limbo::default(), Epochs::default());
        limbo.announce(5..9);
        limbo.announce(20..21);
        limbo.dropped(limbo.take_announced(), &epochs);
        let mut ready = limbo.take_ready(&epochs);
        assert_eq!(ready.next(), Some(5..9));
        ready.done(3);
        assert_eq!(limbo.clusters(), 2);
        drop(ready);
        assert_eq!(take(&limbo, &epochs), [8..9, 20..21]);
        assert_eq!(limbo.clusters(), 0);
    }
}
