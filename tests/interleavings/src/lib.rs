//! The library's parts that do without locks, on the model checker's atomics. What
//! is claimed of them is in `tests/`.

#[macro_use]
#[path = "../../../src/mutants.rs"]
mod mutants;

pub mod sync {
    pub use loom::sync::{Mutex, MutexGuard, atomic};
    pub use loom::{hint, thread, thread_local};

    /// Few enough that some thread has none of its own.
    pub const OWNERS: usize = 1;

    /// See the library's.
    pub fn in_this_order() {
        atomic::fence(atomic::Ordering::SeqCst);
    }
}

pub mod here {
    use crate::owner::Here;

    /// All threads share: what keeps things thread by thread must be right then, too.
    pub fn here() -> Here {
        Here::SHARED
    }
}

#[path = "../../../src/error.rs"]
pub mod error;
#[path = "../../../src/fallible.rs"]
pub mod fallible;
#[path = "../../../src/geometry.rs"]
pub mod geometry;
#[path = "../../../src/owner.rs"]
pub mod owner;
#[path = "../../../src/shard.rs"]
pub mod shard;

pub mod sys {
    /// In the place of `sys/pages.rs`: memory that a model checker watches.
    pub mod pages {
        use std::ops::Range;

        use crate::error::Result;
        use crate::sync::atomic::{AtomicU64, Ordering};

        pub struct Pages(Vec<AtomicU64>);

        impl Pages {
            pub fn new(count: usize) -> Result<Pages> {
                Ok(Pages((0..count).map(|_| AtomicU64::new(0)).collect()))
            }

            pub fn words(&self) -> &[AtomicU64] {
                &self.0
            }

            /// Word by word, as whoever reads meanwhile may see it.
            pub fn give_back(&self, words: Range<usize>) -> Range<usize> {
                self.0[words.clone()].iter().for_each(|word| word.store(0, Ordering::Relaxed));
                words
            }
        }
    }
}

#[path = "../../../src/io"]
pub mod io {
    pub mod wait;
}

#[path = "../../../src/metadata"]
pub mod metadata {
    pub mod cache;
}

#[path = "../../../src/alloc"]
pub mod alloc {
    pub mod epoch;
}

#[path = "../../../src/capi"]
pub mod capi {
    pub mod users;
}

#[path = "../../../src/queue"]
pub mod queue {
    pub mod ready;
}
