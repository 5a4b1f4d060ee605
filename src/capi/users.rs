//! Who is inside an object, and whether it may be taken away.
//!
//! Entering and leaving touch the calling thread's counter only. Knows nothing of
//! what the object is.

use crate::here::here;
use crate::shard::Sharded;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::in_this_order;

/// The calls inside an object.
#[derive(Default)]
pub struct Users {
    inside: Sharded<AtomicUsize>,
    /// Set while the object is being taken away.
    leaving: AtomicBool,
}

/// A call that is inside; leaves when dropped.
pub struct User<'a>(&'a AtomicUsize);

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Why an object cannot be taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Occupied {
    /// Somebody is taking it away.
    Leaving,
    /// A call is inside.
    InUse,
}

impl Users {
    /// Enters; `None` while the object is being taken away.
    #[inline]
    pub fn enter(&self) -> Option<User<'_>> {
        // The count first, then the look at `leaving`; `close` does the reverse.
        // One of the two sees the other.
        let inside = self.inside.at(here());
        inside.fetch_add(1, Ordering::SeqCst);
        let user = User(inside);
        in_this_order();
        if self.leaving.load(Ordering::SeqCst) { None } else { Some(user) }
    }

    /// Keeps everybody out, until `reopen`, if nobody is inside.
    pub fn close(&self) -> Result<(), Occupied> {
        if self.leaving.swap(true, Ordering::SeqCst) {
            return Err(Occupied::Leaving);
        }
        in_this_order();
        if self.inside.iter().any(|inside| inside.load(Ordering::SeqCst) != 0) {
            self.reopen();
            return Err(Occupied::InUse);
        }
        Ok(())
    }

    /// Lets calls in again.
    pub fn reopen(&self) {
        self.leaving.store(false, Ordering::SeqCst);
    }
}
