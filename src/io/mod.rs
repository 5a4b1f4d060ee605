//! Storages (where bytes live) and engines (how operations on them are carried
//! out). It knows nothing of qcow2.

pub mod blocking;
pub mod callbacks;
pub mod counters;
mod direct;
pub mod engine;
mod file;
pub(crate) mod range_lock;
mod registry;
pub(crate) mod ring;
#[cfg(feature = "sim")]
pub mod sim;
mod source;
pub mod storage;
pub(crate) mod turns;
pub mod wait;

pub(crate) use direct::copy_pieces;

#[cfg(test)]
mod tests;
