//! Queues of this library side by side with `qemu-img bench` and with bare io_uring
//! on a raw file: the same offsets, in turns, in one run, at several depths.
//! `cargo bench --bench queues` runs it.

#[path = "../blocking/counting.rs"]
mod counting;
#[path = "../blocking/pattern.rs"]
mod pattern;
#[path = "../blocking/qemu.rs"]
#[allow(dead_code)] // This program uses a part of it.
mod qemu;
mod queue;
mod ring;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use counting::Counting;
use pattern::{Pattern, REQUEST};
use qemu::Aio;
use row::Operation;

#[global_allocator]
static HEAP: Counting = Counting::new();

/// What `qemu` wants to know.
mod row {
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub enum Operation {
        Read,
        Write,
    }
}

const SIZE: u64 = 1 << 30;
const CLUSTER: u64 = 128 << 10;
const FILL: u8 = 0x5a;

/// A page, aligned for O_DIRECT.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; REQUEST as usize]);

/// One line of the result.
#[derive(Clone, Copy)]
struct Row {
    operation: Operation,
    direct: bool,
    depth: usize,
    pattern: Pattern,
}

impl Row {
    fn name(&self) -> String {
        let operation = match self.operation {
            Operation::Read => "reads",
            Operation::Write => "overwrites",
        };
        let cache = if self.direct { "O_DIRECT" } else { "page cache" };
        format!("{operation}, {cache}, depth {}", self.depth)
    }
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for direct in [false, true] {
        for operation in [Operation::Read, Operation::Write] {
            for depth in [1, 32, 64] {
                let count = if direct { SIZE / REQUEST / 8 } else { SIZE / REQUEST };
                let pattern = Pattern::scattered(SIZE, CLUSTER, count);
                rows.push(Row { operation, direct, depth, pattern });
            }
        }
    }
    rows
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let (mut rounds, mut only) = (5, String::new());
    while let (Some(name), value) = (args.next(), args.next()) {
        match (name.as_str(), value) {
            ("--rounds", Some(value)) => rounds = value.parse().expect("a number of rounds"),
            ("--only", Some(value)) => only = value,
            _ => panic!("usage: cargo bench --bench queues -- [--rounds N] [--only TEXT]"),
        }
    }
    let (image, raw) = files();
    println!("| requests of 4 KiB | by | thousand/s: median | of all rounds |\n|---|---|---:|---|");
    for row in rows().into_iter().filter(|row| row.name().contains(&only)) {
        measure(&row, &image, &raw, rounds);
    }
}

fn measure(row: &Row, image: &Path, raw: &Path, rounds: usize) {
    type Run<'a> = Box<dyn Fn() -> f64 + 'a>;
    let qemu = |aio: Aio| -> Run<'_> {
        Box::new(move || {
            let row = *row;
            let (operation, direct) = (row.operation, row.direct);
            let seconds = qemu::bench(image, aio, operation, direct, FILL, &row.pattern, row.depth);
            seconds.unwrap_or_else(|error| panic!("{error}"))
        })
    };
    let mut contenders: Vec<(String, Run<'_>)> = vec![
        ("qcow2rs, io_uring".into(), Box::new(|| queue::run(row, image, c"io_uring"))),
        ("qcow2rs, blocking".into(), Box::new(|| queue::run(row, image, c"blocking"))),
        ("bare io_uring, raw file".into(), Box::new(|| ring::run(row, raw))),
    ];
    for aio in Aio::all(row.direct) {
        contenders.push((format!("QEMU, {}", aio.name()), qemu(*aio)));
    }
    [image, raw].into_iter().for_each(|path| prepare(path, row.direct));
    let mut rates = vec![Vec::new(); contenders.len()];
    for round in 0..rounds {
        for turn in 0..contenders.len() {
            let index = (round + turn) % contenders.len();
            rates[index].push(row.pattern.count as f64 / contenders[index].1() / 1e3);
        }
    }
    for ((name, _), mut rates) in contenders.into_iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let all: Vec<_> = rates.iter().map(|rate| format!("{rate:.1}")).collect();
        let median = rates[rates.len() / 2];
        println!("| {} | {name} | {median:.1} | {} |", row.name(), all.join(" "));
    }
}

/// Brings a file into the page cache, or out of it: a direct write would have to do
/// the latter.
fn prepare(path: &Path, direct: bool) {
    let mut file = File::open(path).expect("opens");
    file.sync_all().expect("syncs");
    // SAFETY: an open descriptor; the rest are numbers.
    let dropped = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(dropped, 0, "drops the cached pages of {}", path.display());
    if !direct {
        std::io::copy(&mut file, &mut std::io::sink()).expect("reads");
    }
}

/// Allocations so far.
fn allocations() -> u64 {
    HEAP.count()
}

/// An image and a raw file, both full of data.
fn files() -> (PathBuf, PathBuf) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    fs::create_dir_all(&directory).expect("makes the directory");
    let (image, raw) = (directory.join("queues.qcow2"), directory.join("queues.raw"));
    if fs::metadata(&raw).is_ok_and(|found| found.len() == SIZE) {
        queue::create(&image, SIZE, CLUSTER);
        return (image, raw);
    }
    let mut file = File::create(&raw).expect("creates a file");
    let chunk = vec![0xa5; 1 << 20];
    (0..SIZE >> 20).for_each(|_| file.write_all(&chunk).expect("writes"));
    file.sync_all().expect("syncs");
    queue::create(&image, SIZE, CLUSTER);
    (image, raw)
}
