//! Queues of this library side by side with `qemu-img bench` and with bare io_uring
//! on a raw file: the same offsets, in turns, in one run. See docs/performance.md;
//! scripts/bench.sh runs it.

mod chains;
mod charts;
#[path = "../common/mod.rs"]
#[allow(dead_code)] // This program uses a part of it.
mod common;
mod ours;
mod raw;
mod report;
mod row;
mod run;
mod svg;

use std::path::{Path, PathBuf};

use common::counting::Counting;
use common::files::Files;
use common::{machine, qemu};

#[global_allocator]
static HEAP: Counting = Counting::new();

const CHAINS: &str = "chains of overlays";

const USAGE: &str = "\
usage: scripts/bench.sh queues [--dir DIRECTORY] [--rounds N] [--filter TEXT]
                               [--json FILE] [--svg DIRECTORY]
  --dir     where the files go: some 8 GiB (default: target/bench)
  --rounds  how often everything is measured (default: 5)
  --filter  rows whose name contains this (\"chains\" for the chains of overlays)
  --json    all figures go there
  --svg     charts go there";

struct Options {
    directory: PathBuf,
    rounds: usize,
    filter: String,
    json: Option<PathBuf>,
    svg: Option<PathBuf>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Option<Options> {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/bench");
        let filter = String::new();
        let mut options = Options { directory, rounds: 5, filter, json: None, svg: None };
        while let Some(name) = args.next() {
            if name == "--bench" {
                continue; // cargo says so
            }
            let value = args.next()?;
            match name.as_str() {
                "--dir" => options.directory = PathBuf::from(value),
                "--rounds" => options.rounds = value.parse().ok().filter(|n| *n > 0)?,
                "--filter" => options.filter = value,
                "--json" => options.json = Some(PathBuf::from(value)),
                "--svg" => options.svg = Some(PathBuf::from(value)),
                _ => return None,
            }
        }
        Some(options)
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    if let (Some("--memory-of"), Some(path)) = (args.next().as_deref(), args.next()) {
        return chains::tell_memory(Path::new(&path));
    }
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    // Before minutes are spent on what then cannot be written.
    let directory_of_json = options.json.as_ref().and_then(|path| path.parent());
    for directory in directory_of_json.into_iter().chain(options.svg.as_deref()) {
        std::fs::create_dir_all(directory)
            .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    }
    let rounds = options.rounds;
    let files = Files::make(&options.directory);
    let mut all = Vec::new();
    for row in row::rows().into_iter().filter(|row| row.name.contains(&options.filter)) {
        eprintln!("{} ...", row.name);
        all.push(run::measure(row, &files, rounds));
    }
    let mut chains = Vec::new();
    if CHAINS.contains(&options.filter) {
        eprintln!("{CHAINS} ...");
        chains = chains::measure(&files, rounds);
    }
    println!("{}; {rounds} rounds; {}\n", machine::machine(), qemu::version());
    println!("{}", report::ratios(&all));
    println!("{}", report::rates(&all));
    println!("{}", report::chains(&chains));
    if let Some(path) = options.json {
        let text = format!("{:#}\n", report::json(&all, &chains, rounds));
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    if let Some(directory) = options.svg {
        let written = charts::write(&all, &directory);
        written.unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    }
}

/// Allocations of the heap so far.
fn allocations() -> u64 {
    HEAP.count()
}
