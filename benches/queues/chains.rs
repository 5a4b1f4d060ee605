//! Chains of overlays, read down to their base: what a link costs in time and memory.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::disk::{self, Disk};
use crate::common::files::{CLUSTER, FULL_SIZE, Files};
use crate::common::pattern::{Pattern, REQUEST};
use crate::common::qemu::{Aio, Bench};
use crate::common::{FILL, Layout, Operation, Page};
use crate::ours;
use crate::row::{Job, Who};

/// How many overlays are one above the other.
pub const LENGTHS: [usize; 2] = [8, 64];
const READS: u64 = 40_000;

/// What was found out about a chain.
pub struct Chain {
    pub links: usize,
    pub who: String,
    /// Nanoseconds for each read, by round.
    pub latencies: Vec<f64>,
    /// Bytes that the process holds after it has read everywhere.
    pub resident: u64,
    /// Bytes of metadata, as our statistics say.
    pub metadata: Option<u64>,
}

/// Measures chains of all lengths, ours and QEMU's turn by turn.
pub fn measure(files: &Files, rounds: usize) -> Vec<Chain> {
    files.warm();
    LENGTHS.into_iter().flat_map(|links| chain(links, files, rounds)).collect()
}

fn chain(links: usize, files: &Files, rounds: usize) -> [Chain; 2] {
    let paths = create(links, files);
    let top = paths.last().expect("there are links");
    let pattern = Pattern::scattered(FULL_SIZE, CLUSTER, READS);
    let job = Job {
        who: Who::Ours,
        operation: Operation::Read,
        direct: false,
        depth: 1,
        cluster: CLUSTER,
        extended: true,
        fresh: false,
        flush: false,
        l2_cache: None,
        queues: 1,
    };
    let theirs = |aio: Aio| {
        let (operation, direct, pattern) = (Operation::Read, false, &pattern);
        let bench =
            Bench { aio, operation, direct, pattern, depth: 1, flush: false, l2_cache: None };
        bench.run(top).unwrap_or(f64::INFINITY)
    };
    let aios = Aio::all(false).iter().map(|aio| (*aio, theirs(*aio)));
    let (aio, _) = aios.min_by(|a, b| a.1.total_cmp(&b.1)).expect("there are ways of I/O");
    let (mut ours, mut qemu) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(ours::run(&job, top, &pattern).seconds / READS as f64 * 1e9);
        qemu.push(theirs(aio) / READS as f64 * 1e9);
    }
    let (resident, metadata) = memory_of_ours(top);
    let result = [
        Chain { links, who: "qcow2rs".into(), latencies: ours, resident, metadata: Some(metadata) },
        Chain {
            links,
            who: format!("QEMU, {}", aio.name()),
            latencies: qemu,
            resident: memory_of_qemu(top),
            metadata: None,
        },
    ];
    paths.iter().for_each(|path| std::fs::remove_file(path).expect("it is there"));
    result
}

/// Each link has something, so that its L2 table must be asked.
fn create(links: usize, files: &Files) -> Vec<PathBuf> {
    let layout = Layout { size: FULL_SIZE, cluster: CLUSTER, extended: true };
    let mut below = (files.base.clone(), c"raw");
    let mut paths = Vec::new();
    for link in 0..links {
        let path = files.directory.join(format!("queues-link-{link}"));
        disk::create(&path, &below.0, below.1, layout);
        let image = Disk::open(&path, false, &[]);
        image.write(&[FILL; REQUEST as usize], link as u64 * CLUSTER);
        image.close();
        File::open(&path).and_then(|file| file.sync_all()).expect("syncs");
        below = (path.clone(), c"qcow2");
        paths.push(path);
    }
    paths
}

/// One in each slice of an L2 table.
fn everywhere() -> impl Iterator<Item = u64> {
    (0..FULL_SIZE).step_by(16 << 20)
}

fn resident(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("is running");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

/// Of a process of its own, so that nothing else is counted.
fn memory_of_ours(path: &Path) -> (u64, u64) {
    let program = std::env::current_exe().expect("this program has a path");
    let output = Command::new(program).arg("--memory-of").arg(path).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers = text.trim().split_once(' ');
    let numbers = numbers.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    numbers.unwrap_or_else(|| panic!("{output:?}"))
}

/// That process.
pub fn tell_memory(path: &Path) {
    let disk = Disk::open(path, false, &[]);
    let mut page = Page([0; REQUEST as usize]);
    everywhere().for_each(|offset| disk.read(&mut page, offset));
    println!("{} {}", resident("self"), disk.stats().metadata_bytes);
    disk.close();
}

fn memory_of_qemu(path: &Path) -> u64 {
    // Into a pipe, it would keep its answers to itself until it ends.
    let mut command = Command::new("stdbuf");
    command.args(["-oL", "qemu-io", "-r", "-f", "qcow2", "-t", "writeback"]);
    for offset in everywhere() {
        command.args(["-c", &format!("read -q {offset} {REQUEST}")]);
    }
    // Its answer comes when all before it is done; after that it stays, for a while.
    command.args(["-c", "length", "-c", "sleep 600000"]).arg(path);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("qemu-io runs");
    let answers = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let told = answers.map(|line| line.expect("text")).any(|line| line.contains("GiB"));
    let bytes = told.then(|| resident(&child.id().to_string()));
    child.kill().expect("it is there");
    child.wait().expect("it ends");
    bytes.expect("qemu-io tells the length")
}
