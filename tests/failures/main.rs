//! What fails while an image is in use: each operation of its storage, and each
//! large allocation of memory, one after the other. The caller is told, nothing else
//! breaks, and when the cause is gone everything goes on.

#[path = "../support/memory.rs"]
mod memory;
#[path = "../support/mod.rs"]
mod support;

mod allocations;
mod bench;
mod operations;
