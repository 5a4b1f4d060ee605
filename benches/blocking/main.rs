//! Blocking calls of this library side by side with `qemu-img bench` and with a
//! raw file: the same offsets, in turns, in one run. See docs/performance.md;
//! scripts/bench.sh runs it.

#[path = "../common/mod.rs"]
#[allow(dead_code)] // This program uses a part of it.
mod common;
mod report;
mod row;

use std::path::PathBuf;

use common::counting::Counting;
use common::disk::Disk;
use common::files::{CLUSTER, FULL_SIZE, Files, SPARSE_SIZE};
use common::machine::machine;
use common::pattern::{Pattern, REQUEST};
use common::qemu::{self, Aio};
use common::{FILL, Operation, Page};
use report::{Is, Table, Target};
use row::{Contender, Row};

#[global_allocator]
static HEAP: Counting = Counting::new();

/// Requests of a trial that is to find QEMU's best way of I/O.
const TRIAL: u64 = 8192;

const ALLOCATE: &str = "allocating writes, page cache";
const ALLOCATE_DIRECT: &str = "allocating writes, O_DIRECT";
const READ: &str = "reads, page cache";
const OVERWRITE: &str = "overwrites, page cache";
const READ_BY_TWO: &str = "reads by two threads, page cache";

const USAGE: &str = "\
usage: scripts/bench.sh blocking [--dir DIRECTORY] [--rounds N] [--filter TEXT] [--by TEXT]
  --dir     where the files go: some 12 GiB, for a while (default: target/bench)
  --rounds  how often everything is measured (default: 7)
  --filter  rows whose name contains this
  --by      contenders whose name contains this";

struct Options {
    directory: PathBuf,
    rounds: usize,
    filter: String,
    by: String,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/bench");
        let mut options =
            Options { directory, rounds: 7, filter: String::new(), by: String::new() };
        while let Some(name) = args.next() {
            if name == "--bench" {
                continue; // cargo says so
            }
            let value = args.next().ok_or(USAGE)?;
            match name.as_str() {
                "--dir" => options.directory = PathBuf::from(value),
                "--rounds" => {
                    options.rounds = value.parse().ok().filter(|n| *n > 0).ok_or(USAGE)?;
                }
                "--filter" => options.filter = value,
                "--by" => options.by = value,
                _ => return Err(USAGE.to_owned()),
            }
        }
        Ok(options)
    }
}

fn rows() -> Vec<Row> {
    let allocating = |name, direct, count| Row {
        name,
        operation: Operation::Write,
        direct,
        allocating: true,
        pattern: Pattern::scattered(SPARSE_SIZE, CLUSTER, count),
    };
    let full = |name, operation, count| Row {
        name,
        operation,
        direct: false,
        allocating: false,
        pattern: Pattern::scattered(FULL_SIZE, CLUSTER, count),
    };
    let blocks = FULL_SIZE / REQUEST;
    vec![
        allocating(ALLOCATE, false, SPARSE_SIZE / CLUSTER),
        allocating(ALLOCATE_DIRECT, true, SPARSE_SIZE / CLUSTER / 4),
        full(READ, Operation::Read, blocks),
        full(OVERWRITE, Operation::Write, blocks / 4),
        full(READ_BY_TWO, Operation::Read, blocks),
    ]
}

fn targets() -> Vec<Target> {
    let is_ours = |who| who == Contender::Ours(1);
    let is_raw = |who| who == Contender::Raw(1);
    let is_qemu = |who| matches!(who, Contender::Qemu(_));
    let mut targets = Vec::new();
    for (row, qemu, raw) in [
        (ALLOCATE, 3.5, 0.85),
        (ALLOCATE_DIRECT, 1.7, 0.85),
        (READ, 4.0, 0.9),
        (OVERWRITE, 4.0, 0.9),
    ] {
        let enough = Some((is_raw as Is, raw));
        targets.push(Target { row, of: is_ours, to: is_qemu, least: Some(qemu), enough });
        targets.push(Target { row, of: is_ours, to: is_raw, least: Some(raw), enough: None });
    }
    let recording = |who| who == Contender::Recording;
    for row in [ALLOCATE, ALLOCATE_DIRECT, OVERWRITE] {
        let (of, to): (Is, Is) = (recording, is_ours);
        targets.push(Target { row, of, to, least: Some(0.97), enough: None });
    }
    let row = READ_BY_TWO;
    let ours_by_two = |who| who == Contender::Ours(2);
    let raw_by_two = |who| who == Contender::Raw(2);
    let by_two = |of, to, least, enough| Target { row, of, to, least, enough };
    targets.push(by_two(ours_by_two, is_ours, Some(1.8), Some((raw_by_two, 0.9))));
    targets.push(by_two(raw_by_two, is_raw, None, None));
    targets.push(by_two(ours_by_two, raw_by_two, None, None));
    targets
}

fn main() {
    let options = Options::parse(std::env::args().skip(1)).unwrap_or_else(|usage| {
        eprintln!("{usage}");
        std::process::exit(2);
    });
    let rows: Vec<_> =
        rows().into_iter().filter(|row| row.name.contains(&options.filter)).collect();
    let files = Files::make(&options.directory);
    println!("{}; {} rounds; {}\n", machine(), options.rounds, qemu::version());
    let mut tables = Vec::new();
    for row in &rows {
        eprintln!("{} ...", row.name);
        tables.push(measure(row, &files, &options));
    }
    println!("{}", report::ratios(&tables, &targets()));
    println!("{}", report::rates(&tables));
    println!("{}", heap_and_memory(&files));
}

/// All rounds of a row. The contenders take turns, and begin in another order in
/// each round.
fn measure(row: &Row, files: &Files, options: &Options) -> Table {
    let mut contenders = match row.name {
        READ_BY_TWO => {
            vec![Contender::Ours(1), Contender::Ours(2), Contender::Raw(1), Contender::Raw(2)]
        }
        READ => vec![Contender::Ours(1), Contender::Raw(1)],
        _ => vec![Contender::Ours(1), Contender::Recording, Contender::Raw(1)],
    };
    if !row.allocating {
        files.warm();
    }
    if row.name != READ_BY_TWO && "QEMU".contains(&options.by) {
        contenders.push(Contender::Qemu(best_aio(row, files)));
    }
    contenders.retain(|who| who.name().contains(&options.by));
    let mut results: Vec<_> = contenders
        .iter()
        .map(|who| report::Result { contender: *who, rates: Vec::new() })
        .collect();
    for round in 0..options.rounds {
        for turn in 0..results.len() {
            let index = (round + turn) % results.len();
            let result = &mut results[index];
            let rate = row.run(result.contender, files, round);
            result.rates.push(rate.unwrap_or_else(|error| panic!("{error}")));
        }
        if row.allocating && options.by.is_empty() {
            row.verify(files, round);
        }
    }
    row.tidy(files, options.rounds);
    Table { name: row.name, results }
}

/// The way of I/O that is fastest for QEMU: the best of two short trials each.
fn best_aio(row: &Row, files: &Files) -> Aio {
    let trial =
        Row { pattern: Pattern { count: TRIAL.min(row.pattern.count), ..row.pattern }, ..*row };
    let mut best: Option<(Aio, f64)> = None;
    for aio in Aio::all(row.direct) {
        for _ in 0..2 {
            match trial.run(Contender::Qemu(*aio), files, 0) {
                Ok(rate) => {
                    eprintln!("  trial: QEMU, {}: {:.1} thousand/s", aio.name(), rate / 1e3);
                    if best.is_none_or(|(_, best)| rate > best) {
                        best = Some((*aio, rate));
                    }
                }
                Err(error) => eprintln!("  QEMU, {}: {error}", aio.name()),
            }
        }
    }
    best.expect("QEMU can do I/O somehow").0
}

/// Allocations on the hot paths, and memory for metadata, by count.
fn heap_and_memory(files: &Files) -> String {
    let mut out = String::from("| heap allocations in 10 000 calls | |\n|---|---:|\n");
    let mut page = Page([FILL; REQUEST as usize]);
    let pattern = Pattern::scattered(FULL_SIZE, CLUSTER, 10_000);
    let mut row = |name: &str, disk: &Disk, call: &mut dyn FnMut(&Disk, u64)| {
        pattern.offsets().for_each(|offset| call(disk, offset));
        let before = HEAP.count();
        pattern.offsets().for_each(|offset| call(disk, offset));
        let count = HEAP.count() - before;
        out.push_str(&format!("| {name} | {count} |\n"));
    };
    let disk = Disk::open(&files.full, false, &[]);
    row("reads, metadata cached", &disk, &mut |disk, offset| disk.read(&mut page, offset));
    let other = Page([FILL; REQUEST as usize]);
    row("overwrites, metadata cached", &disk, &mut |disk, offset| disk.write(&other.0, offset));
    let by_default = disk.stats().metadata_bytes;
    disk.close();

    let small = Disk::open(&files.full, false, &[(c"l2-cache-size", "64K")]);
    let everywhere = Pattern::scattered(FULL_SIZE, CLUSTER, FULL_SIZE / REQUEST);
    everywhere.offsets().for_each(|offset| small.read(&mut page, offset));
    let stats = small.stats();
    small.close();
    let tables = FULL_SIZE / CLUSTER * 16;
    out.push_str(&format!(
        "\n| metadata in memory, after reading all of a full disk of {} MiB | KiB |\n\
         |---|---:|\n\
         | L2 tables, as stored | {} |\n\
         | held with default options | {} |\n\
         | held with l2-cache-size=64K ({} slices loaded) | {} |\n",
        FULL_SIZE >> 20,
        tables >> 10,
        by_default >> 10,
        stats.l2_cache_misses,
        stats.metadata_bytes >> 10
    ));
    out
}
