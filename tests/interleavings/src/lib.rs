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
