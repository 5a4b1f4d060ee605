//! Host clusters: who uses them, which are free, and when a freed one may be
//! used again. It knows nothing of the guest's disk.

pub mod allocator;
pub mod changes;
pub mod epoch;
mod grow;
pub mod health;
pub mod limbo;
pub mod overlap;
pub mod overlap_check;
pub mod packing;
pub mod refcounts;
pub mod rewidth;
mod together;
