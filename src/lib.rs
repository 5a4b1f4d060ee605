//! qcow2 disk images: read and written bit by bit as QEMU does, extended L2
//! entries (subclusters) included, without a hidden thread or runtime.
#![deny(unsafe_code)]

// From the ground up: a module may use those above it, never those below.
pub mod error;
pub mod geometry;
mod log;
mod shard;

pub mod format;

mod sys;

pub mod io;

mod metadata;

mod alloc;

pub mod image;

pub mod admin;

#[allow(unsafe_code)]
#[doc(hidden)]
pub mod capi;
