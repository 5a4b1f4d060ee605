//! The tests' own tools, from where they are.
#![allow(dead_code)] // The targets use their part.

#[path = "../../tests/support/aes.rs"]
pub mod aes;
#[path = "../../tests/support/builder.rs"]
pub mod builder;
#[path = "../../tests/support/damage.rs"]
pub mod damage;
#[path = "../../tests/support/dissect.rs"]
pub mod dissect;
#[path = "../../tests/support/memory_disk.rs"]
pub mod memory_disk;

use libfuzzer_sys::arbitrary::Unstructured;

/// Decisions that the fuzzer's bytes make; 0 when they are used up.
pub struct Bytes<'a>(pub Unstructured<'a>);

impl damage::Choices for Bytes<'_> {
    fn below(&mut self, limit: u64) -> u64 {
        self.0.int_in_range(0..=limit.saturating_sub(1)).unwrap_or(0)
    }
}
