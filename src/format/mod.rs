//! The qcow2 format: bytes to types and back. Pure: no I/O, no state, no panic
//! on any input. It knows what an image may say, not what the driver does.

pub mod bitmap;
mod bytes;
pub mod compressed;
pub mod extensions;
pub mod features;
pub mod header;
pub mod limits;
pub mod refcount;
pub mod snapshot;
