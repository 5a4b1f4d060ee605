//! What the order on disk costs: this program and another one, built with
//! `--cfg qcow2rs_unordered`, do the same work in turns. scripts/bench-ordering.sh
//! builds both and runs this one. See docs/performance.md.
//!
//! The other build writes the pointers of a flush without a sync before them: a
//! power loss can corrupt what it writes. It is for comparison only.

#[path = "../common/mod.rs"]
#[allow(dead_code)] // This program uses a part of it.
mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use common::numbers::{by_round, median, range};
use common::pattern::{Pattern, REQUEST};
use qcow2rs::{CreateOptions, Format, Image, OpenOptions, Policy, Source, WriteFlags};

const CLUSTER: u64 = 128 << 10;
/// The disk: so many clusters that each write meets one that is not allocated.
const SIZE: u64 = 1 << 30;

const USAGE: &str = "\
usage: scripts/bench-ordering.sh [--dir DIRECTORY] [--rounds N]
  --dir     where the files go: some 2 GiB, for a while (default: target/bench)
  --rounds  how often everything is measured (default: 7)";

/// Scattered writes that allocate; the time includes the flushes.
struct Row {
    name: &'static str,
    writes: u64,
    /// A flush after so many writes.
    flush_every: u64,
    /// Over a full backing file: else zeroes are what is below, where the order
    /// costs nothing.
    backing: bool,
    l2_cache: Option<u64>,
}

const ROWS: [Row; 5] = [
    Row { name: "flush after each", writes: 256, flush_every: 1, backing: true, l2_cache: None },
    Row { name: "flush after 32", writes: 2048, flush_every: 32, backing: true, l2_cache: None },
    Row {
        name: "flush at the end",
        writes: 8192,
        flush_every: 8192,
        backing: true,
        l2_cache: None,
    },
    Row {
        name: "flush at the end, cache of two slices",
        writes: 8192,
        flush_every: 8192,
        backing: true,
        l2_cache: Some(8192),
    },
    Row {
        name: "no backing file, flush after 32",
        writes: 2048,
        flush_every: 32,
        backing: false,
        l2_cache: None,
    },
];

impl Row {
    /// One run on a new image; writes per second.
    fn run(&self, directory: &Path) -> f64 {
        let path = directory.join("ordering.qcow2");
        let base = directory.join("ordering.base");
        let mut create = CreateOptions::default();
        (create.size, create.cluster_size, create.extended_l2) = (Some(SIZE), CLUSTER, true);
        if self.backing {
            let name = base.to_str().expect("paths are UTF-8").as_bytes().to_vec();
            create.backing = Some((name, Format::Raw));
        }
        let _ = fs::remove_file(&path);
        let mut open = OpenOptions::new().writable(true).policy(Policy::Paths);
        open.l2_cache_size = self.l2_cache;
        qcow2rs::create_path(&path, false, &create, &open).expect("creates an image");
        File::open(&path).and_then(|file| file.sync_all()).expect("syncs");
        let image = Image::open(Source::path(&path), &open).expect("opens");
        let page = vec![0x5a; REQUEST as usize];
        let begun = Instant::now();
        for (done, offset) in (1..).zip(Pattern::scattered(SIZE, CLUSTER, self.writes).offsets()) {
            image.write_at(&page, offset, WriteFlags::default()).expect("writes");
            if done % self.flush_every == 0 {
                image.flush().expect("flushes");
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        image.close().expect("closes");
        fs::remove_file(&path).expect("removes");
        self.writes as f64 / seconds
    }
}

/// A run by another process: by this program or the other one.
fn run_by(program: &Path, row: usize, directory: &Path) -> f64 {
    let mut command = Command::new(program);
    let output = command.arg("--run").arg(row.to_string()).arg(directory).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    said.trim().parse().expect("a rate")
}

fn compare(unordered: &Path, directory: &Path, rounds: usize) {
    fs::create_dir_all(directory).expect("creates a directory");
    let base = File::create(directory.join("ordering.base")).expect("creates a file");
    let chunk = vec![0xb5; 1 << 20];
    (0..SIZE >> 20).for_each(|n| base.write_all_at(&chunk, n << 20).expect("writes"));
    base.sync_all().expect("syncs");
    let ordered = std::env::current_exe().expect("this program");
    println!("| allocating 4 KiB writes per second | ordered | without | ratio | from, to |");
    println!("|---|---:|---:|---:|---:|");
    for (index, row) in ROWS.iter().enumerate() {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let mut turn = |first: bool| match first {
                true => with.push(run_by(&ordered, index, directory)),
                false => without.push(run_by(unordered, index, directory)),
            };
            // Each begins as often as the other.
            turn(round % 2 == 0);
            turn(round % 2 != 0);
        }
        let ratios = by_round(&with, &without);
        let (least, most) = range(&ratios);
        let (a, b, ratio) = (median(&with), median(&without), median(&ratios));
        println!("| {} | {a:.0} | {b:.0} | **{ratio:.2}** | {least:.2}, {most:.2} |", row.name);
    }
    fs::remove_file(directory.join("ordering.base")).expect("removes");
}

fn usage() -> ! {
    eprintln!("{USAGE}");
    std::process::exit(2);
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let ["--run", row, directory] = args[..] {
        let row = row.parse().ok().and_then(|row: usize| ROWS.get(row));
        return println!("{}", row.unwrap_or_else(|| usage()).run(Path::new(directory)));
    }
    let mut directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    let (mut rounds, mut unordered) = (7, None);
    for pair in args.chunks(2) {
        match *pair {
            ["--dir", value] => directory = value.into(),
            ["--rounds", value] => rounds = value.parse().unwrap_or_else(|_| usage()),
            ["--unordered", value] => unordered = Some(PathBuf::from(value)),
            _ => usage(),
        }
    }
    match unordered {
        Some(unordered) if rounds > 0 && !cfg!(qcow2rs_unordered) => {
            compare(&unordered, &directory, rounds);
        }
        _ => usage(),
    }
}
