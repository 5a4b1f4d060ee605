//! Blocking calls of this library side by side with `qemu-img bench` and with a
//! raw file: the same offsets, in turns, in one run. See docs/performance.md;
//! scripts/bench.sh runs it.

mod counting;
mod disk;
mod pattern;
mod qemu;
mod report;
mod row;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use counting::Counting;
use disk::{Disk, Page};
use pattern::{Pattern, REQUEST};
use qemu::Aio;
use report::{Is, Table, Target};
use row::{CLUSTER, Contender, FILL, Files, Operation, Row};

#[global_allocator]
static HEAP: Counting = Counting::new();

/// The disk of allocating runs: one cluster for each write.
const SPARSE_SIZE: u64 = 4 << 30;
/// The disk of the other runs: everything stays in the page cache.
const FULL_SIZE: u64 = 1 << 30;
/// Requests of a trial that is to find QEMU's best way of I/O.
const TRIAL: u64 = 8192;

const ALLOCATE: &str = "allocating writes, page cache";
const ALLOCATE_DIRECT: &str = "allocating writes, O_DIRECT";
const READ: &str = "reads, page cache";
const OVERWRITE: &str = "overwrites, page cache";
const READ_BY_TWO: &str = "reads by two threads, page cache";

const USAGE: &str = "\
usage: scripts/bench.sh [--dir DIRECTORY] [--rounds N] [--only TEXT] [--by TEXT]
  --dir     where the files go: some 12 GiB, for a while (default: target/bench)
  --rounds  how often everything is measured (default: 7)
  --only    rows whose name contains this
  --by      contenders whose name contains this";

struct Options {
    directory: PathBuf,
    rounds: usize,
    only: String,
    by: String,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/bench");
        let mut options = Options { directory, rounds: 7, only: String::new(), by: String::new() };
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
                "--only" => options.only = value,
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
    let rows: Vec<_> = rows().into_iter().filter(|row| row.name.contains(&options.only)).collect();
    let files = files(&options.directory);
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
        _ => vec![Contender::Ours(1), Contender::Raw(1)],
    };
    if !row.allocating {
        warm(files);
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

/// Makes the files that all rows use; those that are there from before serve again.
fn files(directory: &Path) -> Files {
    fs::create_dir_all(directory).unwrap_or_else(|error| panic!("{directory:?}: {error}"));
    let directory = fs::canonicalize(directory).expect("it exists");
    let files = Files {
        base: directory.join("base.raw"),
        full: directory.join("full.qcow2"),
        raw: directory.join("full.raw"),
        directory,
    };
    for (path, size) in [(&files.base, SPARSE_SIZE), (&files.raw, FULL_SIZE)] {
        if fs::metadata(path).is_ok_and(|found| found.len() == size) {
            continue;
        }
        eprintln!("writing {} ...", path.display());
        let partial = path.with_extension("partial");
        let mut file = File::create(&partial).expect("creates a file");
        chunks(size).for_each(|(_, chunk)| file.write_all(&chunk).expect("writes"));
        file.sync_all().expect("syncs");
        fs::rename(&partial, path).expect("renames");
    }
    // The overlay is always new: as this very library writes it.
    disk::create(&files.full, &files.base, FULL_SIZE, CLUSTER);
    let full = Disk::open(&files.full, false, &[]);
    chunks(FULL_SIZE).for_each(|(offset, chunk)| full.write(&chunk, offset));
    full.close();
    files
}

/// Brings the full files into the page cache, all in the same way: the kernel caches
/// a file in larger or smaller pieces, depending on who brought it, and takes longer
/// to write to a larger one. Page by page is what a guest's requests bring.
fn warm(files: &Files) {
    for path in [&files.full, &files.raw] {
        let mut file = File::open(path).expect("opens");
        file.sync_all().expect("syncs");
        for advice in [libc::POSIX_FADV_DONTNEED, libc::POSIX_FADV_RANDOM] {
            // SAFETY: an open descriptor; the rest are numbers.
            let failed = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
            assert_eq!(failed, 0, "advises about {}", path.display());
        }
        let mut chunk = vec![0; 1 << 20];
        while file.read(&mut chunk).expect("reads") > 0 {}
    }
}

/// Bytes that no two blocks share, none of them zero throughout.
fn chunks(size: u64) -> impl Iterator<Item = (u64, Vec<u8>)> {
    const CHUNK: u64 = 1 << 20;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..size / CHUNK).map(move |index| {
        let mut chunk = Vec::with_capacity(CHUNK as usize);
        for _ in 0..CHUNK / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.extend_from_slice(&state.to_le_bytes());
        }
        (index * CHUNK, chunk)
    })
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

/// Processor, number of cores, kernel.
fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, {cores} cores, Linux {}", model.map_or("?", |(_, name)| name), kernel.trim())
}
