//! Carrying a row out: files for each run, how many requests, all sides in turns.

use std::fs::File;
use std::path::PathBuf;

use crate::common::disk;
use crate::common::files::Files;
use crate::common::pattern::{Pattern, REQUEST};
use crate::common::qemu::{self, Aio, Bench};
use crate::common::{Layout, Operation};
use crate::row::{Job, Row, Who};
use crate::{ours, raw};

/// What a side is to take in each round, in seconds: it gets as many requests.
const TIME: f64 = 0.6;
/// Trials are that long, at least.
const TRIAL: f64 = 0.12;

/// What came of a run.
#[derive(Clone, Copy, Default)]
pub struct Outcome {
    pub seconds: f64,
    /// Of the heap, by us.
    pub allocations: u64,
    /// fdatasyncs, by us.
    pub syncs: u64,
}

/// What a side reached.
pub struct Side {
    pub name: String,
    pub job: Job,
    /// Requests in each round.
    pub count: u64,
    /// Requests per second in each round.
    pub rates: Vec<f64>,
    /// The last round's.
    pub last: Outcome,
    pattern: Pattern,
    aio: Aio,
}

/// A row, and what its sides reached.
pub struct Measured {
    pub row: Row,
    pub sides: Vec<Side>,
}

/// All rounds of a row. The sides take turns, and another one begins in each round.
pub fn measure(row: Row, files: &Files, rounds: usize) -> Measured {
    let Job { direct, fresh, .. } = row.sides[0].1;
    if direct {
        files.chill();
    } else if !fresh {
        files.warm();
    }
    let mut sides: Vec<_> = row.sides.iter().map(|(name, job)| plan(name, *job, files)).collect();
    for round in 0..rounds {
        for turn in 0..sides.len() {
            let index = (round + turn) % sides.len();
            let side = &mut sides[index];
            let outcome = run(side, files, side.count);
            side.last = outcome.unwrap_or_else(|error| panic!("{error}"));
            side.rates.push(side.count as f64 / side.last.seconds);
        }
    }
    Measured { row, sides }
}

/// Tries how many requests a side manages, and QEMU, which way of I/O is its best.
fn plan(name: &str, job: Job, files: &Files) -> Side {
    let size = job.size();
    let most = match (job.fresh, job.operation, job.direct) {
        // No cluster is met twice where each write is to allocate.
        (true, ..) => size / job.cluster,
        // They must be written out after each round.
        (false, Operation::Write, false) => size / REQUEST / 2,
        _ => size / REQUEST * 4,
    };
    let step = Pattern::scattered(size, job.cluster, most.min(size / REQUEST)).step;
    let pattern = Pattern { size, step, count: most };
    let aios = if job.who == Who::Qemu { Aio::all(job.direct) } else { &[Aio::IoUring] };
    let mut best: Option<(Aio, f64)> = None;
    for aio in aios {
        let (name, aio, last) = (name.to_owned(), *aio, Outcome::default());
        let side = Side { name, job, count: most, rates: Vec::new(), last, pattern, aio };
        let mut count = 64.min(most);
        let rate = loop {
            match run(&side, files, count) {
                Ok(outcome) if outcome.seconds < TRIAL && count < most => {
                    count = (count * 8).min(most);
                }
                Ok(outcome) => break Ok(count as f64 / outcome.seconds),
                Err(error) => break Err(error),
            }
        };
        match rate {
            Ok(rate) if best.is_none_or(|(_, best)| rate > best) => best = Some((aio, rate)),
            Ok(_) => {}
            Err(error) => eprintln!("  {name}, {}: {error}", aio.name(), name = side.name),
        }
    }
    let (aio, rate) = best.expect("there is a way of I/O");
    let count = ((rate * TIME) as u64).clamp(64.min(most), most);
    let name = match job.who {
        Who::Qemu => format!("{name}, {}", aio.name()),
        _ => name.to_owned(),
    };
    Side { name, job, count, rates: Vec::new(), last: Outcome::default(), pattern, aio }
}

/// The file for a run.
fn prepare(job: &Job, files: &Files) -> PathBuf {
    if !job.fresh {
        return files.full.clone();
    }
    let path = files.directory.join("queues-fresh");
    let layout = Layout { size: job.size(), cluster: job.cluster, extended: job.extended };
    match job.who {
        Who::Ours => disk::create(&path, &files.base, c"raw", layout),
        Who::Qemu => qemu::create(&path, &files.base, layout),
        Who::Raw | Who::Calls | Who::Copies => {
            let file = File::create(&path).expect("creates a file");
            file.set_len(layout.size).expect("sets the size");
        }
    }
    File::open(&path).and_then(|file| file.sync_all()).expect("syncs");
    path
}

/// One run of so many requests. Nothing of it is left to be written out, so that no run
/// pays for another one: what was fresh goes before it reaches the disk.
fn run(side: &Side, files: &Files, count: u64) -> Result<Outcome, String> {
    let pattern = &Pattern { count, ..side.pattern };
    let job = &side.job;
    let path = &prepare(job, files);
    let took = |seconds| Ok(Outcome { seconds, ..Outcome::default() });
    // The same bytes of the same file: how the kernel has it on disk and in memory counts.
    let first = if job.fresh { 0 } else { files.full_data };
    let outcome = match job.who {
        Who::Ours => Ok(ours::run(job, path, pattern)),
        Who::Raw => took(raw::ring(job, path, first, pattern)),
        Who::Copies => took(raw::copies(job, &files.base, path, pattern)),
        Who::Calls => took(raw::calls(job, path, first, pattern)),
        Who::Qemu => {
            let Job { operation, direct, depth, flush, l2_cache, .. } = *job;
            let bench = Bench { aio: side.aio, operation, direct, pattern, depth, flush, l2_cache };
            bench.run(path).map(|seconds| Outcome { seconds, ..Outcome::default() })
        }
    };
    if job.fresh {
        std::fs::remove_file(path).expect("it is there");
    } else if job.operation == Operation::Write {
        File::open(path).and_then(|file| file.sync_all()).expect("syncs");
    }
    outcome
}
