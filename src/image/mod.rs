//! An open image: mapping, reading, writing, flushing, and the chain below it.

pub(crate) mod attached;
pub(crate) mod bitmaps;
mod claims;
mod cleaning;
mod compress;
mod cow;
pub(crate) mod data_file;
mod discard;
pub(crate) mod disk;
pub(crate) mod encryption;
pub(crate) mod expand;
pub(crate) mod feature_bits;
mod gate;
pub mod handle;
mod inflated;
pub mod info;
mod info_json;
pub(crate) mod known;
mod l1_table;
mod l2_tables;
#[cfg(qcow2rs_mutants)]
mod mutants;
pub(crate) mod open;
mod open_writable;
mod option_names;
pub(crate) mod option_values;
pub mod options;
pub(crate) mod qcow2;
mod read;
pub mod status;
pub(crate) mod views;
mod vm_state;
mod write;
pub(crate) mod writeback;
pub mod zero;

/// For tests on simulated disks, which need the engine to be theirs.
#[cfg(feature = "sim")]
pub use disk::Disk;
