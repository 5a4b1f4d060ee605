//! The qcow2 format: bytes to types and back. Pure: no I/O, no state, no panic
//! on any input. It knows what an image may say, not what the driver does.

// What an image says must not be able to panic; tests may.
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic)
)]

pub mod bitmap;
mod bytes;
pub mod compressed;
pub mod compression;
pub mod extensions;
pub mod features;
pub mod header;
pub mod l2;
pub mod limits;
pub mod refcount;
pub mod snapshot;
pub mod subcluster;

#[cfg(test)]
mod bitmap_tests;
#[cfg(test)]
mod compressed_tests;
#[cfg(test)]
mod extensions_tests;
#[cfg(test)]
mod header_properties;
#[cfg(test)]
mod header_samples;
#[cfg(test)]
mod header_tests;
#[cfg(test)]
mod l2_tests;
#[cfg(test)]
mod refcount_tests;
#[cfg(test)]
mod snapshot_tests;
