//! An open image: mapping, reading, writing, flushing, and the chain below it.

mod claims;
mod cow;
mod discard;
pub(crate) mod disk;
mod gate;
pub mod handle;
pub mod info;
mod l2_tables;
pub(crate) mod open;
pub mod options;
mod qcow2;
mod read;
pub mod status;
mod write;
mod writeback;
pub mod zero;
