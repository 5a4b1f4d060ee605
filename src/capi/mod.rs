//! The C API: what include/qcow2rs.h declares, which is generated from here.
//!
//! Thin: an entry point turns C values into Rust ones, makes one call into the
//! crate, and turns the result back. Each goes through [`entry`], so that no
//! panic crosses into C and every failure leaves a record. The order of the
//! modules below is the order of the header's sections, and the first line of
//! each module is its section's title.
//!
//! Hidden from Rust users, who have the crate itself; public for the tests that
//! compare it with the header.
#![allow(non_camel_case_types)]
// The documentation of these items becomes the header, whose conventions say
// what the caller promises.
#![allow(clippy::missing_safety_doc)]
// Its [MT] and [CB] are no links.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::private_intra_doc_links)]

/// What the header calls `struct iovec`.
pub use libc::iovec;

// The entry points that use the rest of it (secrets, snapshots) are yet to come.
#[macro_use]
#[allow(dead_code)]
pub(crate) mod entry;
#[macro_use]
pub(crate) mod handle;
pub(crate) mod users;

mod version;
pub use version::*;

mod error;
pub use error::*;

mod log;
pub use log::*;

mod callbacks;
pub use callbacks::*;

mod storage;
pub use storage::*;

mod open_opts;
pub use open_opts::*;

mod open;
pub use open::*;

mod info;
pub use info::*;

mod caches;
pub use caches::*;

mod io;
pub use io::*;

mod status;
pub use status::*;

mod create;
pub use create::*;

mod check;
pub use check::*;

mod resize;
pub use resize::*;

mod amend;
pub use amend::*;

mod snapshots;
pub use snapshots::*;

mod bitmaps;
pub use bitmaps::*;

mod queue;
pub use queue::*;

#[cfg(test)]
pub(crate) mod panic_tests;
