//! What the parts that do without locks are made of: the standard library's atomics,
//! locks and threads.
//!
//! Those parts name them through this module, so that a model checker can put its
//! own in their place and try every interleaving (`tests/interleavings`).

pub use std::sync::{Mutex, MutexGuard, atomic};
pub use std::{hint, thread, thread_local};

/// How many threads get copies of their own of what is kept thread by thread.
pub const OWNERS: usize = 15;

/// Between a `SeqCst` operation and another one on another variable, whose order
/// matters. That they are `SeqCst` is enough, and this does nothing; but the model
/// checker takes them for acquire and release only, and has to be told.
#[inline]
pub fn in_this_order() {}
