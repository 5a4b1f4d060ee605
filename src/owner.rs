//! Who owns which copy of what is kept thread by thread.
//!
//! The first that ask own a copy each, until they give it back; all others share
//! one. This file does not know what there are copies of, nor that those who ask are
//! threads (`here` does).

use std::marker::PhantomData;

pub use crate::sync::OWNERS;
use crate::sync::atomic::{AtomicU32, Ordering};

/// The copy that all those share who own none.
const SHARED: usize = OWNERS;

/// The index of the calling thread's copy. Stays on its thread.
#[derive(Clone, Copy)]
pub struct Here {
    index: usize,
    thread: PhantomData<*const ()>,
}

impl Here {
    /// The copy that is shared.
    pub const SHARED: Here = Here { index: SHARED, thread: PhantomData };

    /// The index, up to and including [`OWNERS`].
    #[inline]
    pub fn index(self) -> usize {
        self.index
    }

    /// Whether no other thread uses that copy.
    #[inline]
    pub fn owned(self) -> bool {
        self.index != SHARED
    }
}

/// Bit by bit, the copies that somebody owns.
pub struct Owners(pub AtomicU32);

impl Owners {
    /// A copy that nobody owned, or the shared one.
    pub fn take(&self) -> Here {
        let mut owned = self.0.load(Ordering::Relaxed);
        loop {
            let free = owned.trailing_ones() as usize;
            if free >= SHARED {
                return Here::SHARED;
            }
            let taken = owned | 1 << free;
            match self.0.compare_exchange(owned, taken, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Here { index: free, thread: PhantomData },
                Err(now) => owned = now,
            }
        }
    }

    /// Gives a copy back: its next owner goes on from what this one has written.
    pub fn give_back(&self, here: Here) {
        if here.owned() {
            self.0.fetch_and(!(1 << here.index), Ordering::Release);
        }
    }
}
