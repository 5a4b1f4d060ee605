//! What the programs share that measure this library side by side with QEMU and with
//! raw files: where requests go, the files, `qemu-img`, and images by the C API. Knows
//! nothing of what is measured, nor how it is told.

pub mod counting;
pub mod disk;
pub mod files;
pub mod machine;
pub mod numbers;
pub mod pattern;
pub mod qemu;

use pattern::REQUEST;

/// What guests are made to write.
pub const FILL: u8 = 0x5a;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    Read,
    Write,
}

/// A page, aligned for O_DIRECT.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; REQUEST as usize]);

/// How an image is laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    pub size: u64,
    pub cluster: u64,
    /// Extended L2 entries.
    pub extended: bool,
}
