//! Memory of caches that nobody uses any more goes back to the system: when
//! ("cache-clean-interval"), and by whom. There is no thread that would see to it; so
//! whoever comes by looks at the clock once in a while, where that costs nothing that
//! counts, and does it if it is time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::disk::{Disk, Layer};
use super::handle::Image;
use crate::error::Result;
use crate::io::engine::Engine;

/// When it is time again.
#[derive(Debug)]
pub struct Cleaning {
    /// 0: never.
    interval: u64,
    opened: Instant,
    /// In seconds from then.
    next: AtomicU64,
}

impl Cleaning {
    /// Every so many seconds from now on; 0: never.
    pub fn every(seconds: u32) -> Cleaning {
        let interval = u64::from(seconds);
        Cleaning { interval, opened: Instant::now(), next: AtomicU64::new(interval) }
    }

    /// Whether it is time: only one of those who ask is told so.
    fn is_due(&self, now: Instant) -> bool {
        let now = now.saturating_duration_since(self.opened).as_secs();
        let next = self.next.load(Ordering::Relaxed);
        let then = now.saturating_add(self.interval);
        self.interval > 0
            && now >= next
            && self.next.compare_exchange(next, then, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl Disk {
    /// Trims the caches if it is time for that. Without a clock (in simulations, which
    /// are to be repeated) it never is.
    #[cold]
    pub(crate) fn clean_if_due<E: Engine>(&self, engine: &E) {
        if engine.now().is_some_and(|now| self.cleaning.is_due(now)) {
            self.trim();
        }
    }

    /// Gives back the memory of what the caches of the whole chain hold that is clean and
    /// was not used since the last time. Returns how many bytes.
    pub fn trim(&self) -> u64 {
        let mut bytes = 0;
        for layer in &self.layers {
            let Layer::Qcow2(image) = layer else { continue };
            bytes += image.l2.trim();
            if let Some(writing) = &image.writing {
                bytes += writing.allocator.refcounts.trim();
            }
        }
        bytes
    }
}

impl Image {
    /// Gives memory of the metadata caches, those of the images below included, back to
    /// the system: of what is clean, and was not used since the last time that this was
    /// done, by this call or because "cache-clean-interval" seconds had passed. The
    /// latter needs requests, flushes or calls of queues to come by; a program that
    /// leaves an image idle calls this, twice for all there is. Returns the number of
    /// bytes; what goes will be read again when it is needed. Any thread, at any time.
    pub fn trim(&self) -> Result<u64> {
        self.inside(|disk| Ok(disk.trim()))
    }

    /// As `Disk::clean_if_due`, for who is not inside; nothing where others need the image
    /// alone, who may be waiting for the caller.
    pub(crate) fn clean_if_due<E: Engine>(&self, engine: &E) {
        self.inside_now(|disk| disk.clean_if_due(engine));
    }
}

/// Unless the options say otherwise.
pub const DEFAULT_INTERVAL: u32 = Duration::from_secs(600).as_secs() as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_told_once_in_each_interval() {
        let cleaning = Cleaning::every(10);
        let after = |seconds| cleaning.opened + Duration::from_secs(seconds);
        assert!(!cleaning.is_due(after(0)) && !cleaning.is_due(after(9)));
        assert!(cleaning.is_due(after(10)));
        assert!(!cleaning.is_due(after(10)) && !cleaning.is_due(after(19)));
        assert!(cleaning.is_due(after(1000)));
        assert!(!cleaning.is_due(after(1009)) && cleaning.is_due(after(1010)));
        // A clock that lags behind is no reason to panic.
        assert!(!Cleaning::every(10).is_due(cleaning.opened));
        let never = Cleaning::every(0);
        assert!(!never.is_due(never.opened + Duration::from_secs(1 << 30)));
    }
}
