//! Images that somebody made to do harm: each is refused, or its use is, with an
//! error that says what is wrong, in bounded memory and work, without a panic,
//! and without a byte of guest data in the wrong place.

#[path = "../support/mod.rs"]
mod support;

mod below;
mod compressed;
mod headers;
mod images;
mod memory;
mod mutate;
mod names;
mod past_the_end;
mod snapshots;
mod tables;
