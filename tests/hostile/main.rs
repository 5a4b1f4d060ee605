//! Images that somebody made to do harm: each is refused, or its use is, with an
//! error that says what is wrong, in bounded memory and work, without a panic,
//! and without a byte of guest data in the wrong place.

#[path = "../support/memory.rs"]
mod memory;
#[path = "../support/mod.rs"]
mod support;

mod below;
mod changing;
mod compressed;
mod headers;
mod images;
mod matrix;
mod mutate;
mod names;
mod past_the_end;
mod snapshots;
mod tables;
