//! What the fuzz targets share: images to begin with, bounds on what the library may
//! take, and the same disk in memory that the tests use.

pub mod bounds;
pub mod images;
#[path = "../../tests/support/memory.rs"]
pub mod memory;
pub mod support;
