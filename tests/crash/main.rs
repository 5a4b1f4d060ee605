//! What is left after a crash: random and chosen operations on simulated disks,
//! crashes at any moment, and a strict look at what is found afterwards.

mod bitmaps;
mod exhaustive;
mod farm;
mod faults;
mod guest;
mod handover;
mod imagecheck;
mod imagecheck_tests;
mod images_taken;
mod inspect;
mod layout;
mod life;
mod oracle;
mod qemu;
mod queue_runs;
mod queue_user;
mod queues;
mod random;
mod report;
mod scenario;
mod schedules;
mod snapshot;
#[path = "../support/mod.rs"]
mod support;
mod whole;
