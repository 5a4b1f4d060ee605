//! An open image: mapping, reading, writing, flushing.

pub mod handle;
pub mod info;
pub mod options;
