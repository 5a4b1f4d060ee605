//! Chosen schedules: races, crashes and failures that have broken drivers of
//! this format before, each played on purpose rather than met by chance.
//!
//! A scene plays each schedule with several seeds: what the schedule leaves open
//! (which other operation goes first, what a crash spares) the seed decides.

pub mod scene;

mod amend;
mod bitmaps;
mod cancel;
mod compressing;
mod data_files;
mod durability;
mod encryption;
mod exhaustion;
mod flights;
mod growth;
mod handles;
mod lazy;
mod races;
mod resize;
mod reuse;
mod snapshots;
mod syncs;
mod tables;
mod zeroes;

use super::images_taken::ImagesTaken;
use super::random::{SMALL, config};
use super::scenario::Config;
use super::support::builder::Kind;
use super::support::for_seeds;

/// Plays a schedule with so many seeds.
fn play_some(seeds: u64, test: impl Fn(u64)) {
    let _images = ImagesTaken;
    for_seeds("crash", seeds, test);
}

/// Plays a schedule with several seeds.
fn play(test: impl Fn(u64)) {
    play_some(10, test);
}

/// Clusters of one sector, few refcounts in a block: the allocator's current run
/// is short, so what is freed is soon looked for.
fn tiny() -> Config {
    config(Kind { refcount_bits: 64, ..SMALL })
}

/// Subclusters of one sector.
fn extended() -> Config {
    config(Kind { extended_l2: true, cluster: 16384, size: 2 << 20, refcount_bits: 64, ..SMALL })
}

/// All kinds of entries over a backing file.
fn over_backing() -> Vec<Config> {
    let extended = Kind { extended_l2: true, cluster: 16384, size: 512 << 10, ..SMALL };
    [SMALL, Kind { cluster: 4096, size: 512 << 10, ..SMALL }, extended]
        .map(|kind| config(Kind { backing: true, ..kind }))
        .into()
}
