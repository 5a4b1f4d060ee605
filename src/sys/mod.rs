//! System calls and raw memory: one of the two rooms where `unsafe` is allowed.
//! It knows nothing of images; only `io` uses its system calls.
#![allow(unsafe_code)]

pub mod buffer;
pub mod event;
pub mod file;
pub mod lock;
pub mod memory;
pub mod pages;
pub mod random;
pub mod uring;
