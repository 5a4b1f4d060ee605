//! Queues: the same results as blocking calls, with many requests in flight, on many
//! queues, through io_uring and without it.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test queues` replays it.

#[path = "../support/mod.rs"]
mod support;

mod behaviour;
mod buffers;
mod flights;
mod mixed;
mod model;
mod panics;
mod sandboxed;

use std::sync::Arc;

use qcow2rs::{Completion, Engine, Image, Queue, QueueOptions};

/// A queue of a kind and depth.
fn queue(image: &Arc<Image>, engine: Engine, depth: u32) -> Queue {
    let mut options = QueueOptions::new();
    options.engine = engine;
    options.set_depth(depth).unwrap();
    let queue = Queue::new(image, &options).unwrap();
    if engine != Engine::Auto {
        assert_eq!(queue.engine(), engine);
    }
    queue
}

/// Both ways of I/O; without io_uring where the system has none.
fn engines() -> Vec<Engine> {
    match std::env::var("QCOW2RS_NO_IO_URING") {
        Ok(_) => vec![Engine::Auto, Engine::Blocking],
        Err(_) => vec![Engine::IoUring, Engine::Blocking],
    }
}

/// Waits for everything that is in flight.
fn all(queue: &Queue) -> Vec<Completion> {
    let mut out = Vec::new();
    while queue.in_flight() > 0 {
        let before = out.len();
        queue.wait(1, 64, None, |completion| out.push(completion)).unwrap();
        assert!(out.len() > before, "a wait without limit ended without a completion");
    }
    out
}

/// Waits for the one request that is in flight.
fn one(queue: &Queue) -> Completion {
    let mut all = all(queue);
    assert_eq!(all.len(), 1);
    all.remove(0)
}
