//! What is measured, and what it is to reach.

use crate::common::files::CLUSTER;
use crate::common::pattern::REQUEST;
use crate::common::{Operation, files};

/// Who carries requests out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    Ours,
    Qemu,
    /// Bare io_uring on a raw file; on the very bytes of the image that the others read
    /// or overwrite, where there are such.
    Raw,
    /// The same, but as many bytes as an image has to: a whole subcluster is read from
    /// the base and written to the file.
    Copies,
    /// `pread` and `pwrite` on a raw file: what a page cache is fastest with.
    Calls,
}

/// What somebody is to do.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Job {
    pub who: Who,
    pub operation: Operation,
    pub direct: bool,
    pub depth: usize,
    pub cluster: u64,
    pub extended: bool,
    /// In a new overlay (the raw file: a sparse one), where every write allocates.
    pub fresh: bool,
    /// Each write is followed by a flush.
    pub flush: bool,
    /// Bytes for L2 tables.
    pub l2_cache: Option<u64>,
    /// Queues, a thread for each.
    pub queues: usize,
}

impl Job {
    pub fn size(&self) -> u64 {
        if self.fresh { files::SPARSE_SIZE } else { files::FULL_SIZE }
    }
}

/// A ratio to be reached: by the first side of the row to the one named.
#[derive(Clone, Copy)]
pub struct Target {
    pub of: usize,
    pub to: usize,
    /// `None`: shown for comparison.
    pub least: Option<f64>,
    /// What raw files make of it.
    pub room: Option<Room>,
}

/// The same ratio between raw files (or theirs to QEMU), and the part of it that is
/// enough where it is small.
#[derive(Clone, Copy)]
pub struct Room {
    pub of: usize,
    pub to: usize,
    pub part: f64,
}

fn target(to: usize, least: Option<f64>) -> Target {
    Target { of: 0, to, least, room: None }
}

/// One line of the result.
pub struct Row {
    pub name: String,
    /// Ours is the first.
    pub sides: Vec<(String, Job)>,
    pub targets: Vec<Target>,
    /// Syncs for each request of ours, at most.
    pub most_syncs: Option<f64>,
}

const BASIC: Job = Job {
    who: Who::Ours,
    operation: Operation::Write,
    direct: true,
    depth: 32,
    cluster: CLUSTER,
    extended: true,
    fresh: true,
    flush: false,
    l2_cache: None,
    queues: 1,
};

fn sides(job: Job, all: &[Who]) -> Vec<(String, Job)> {
    let name = |who| match who {
        Who::Ours => "qcow2rs",
        Who::Qemu => "QEMU",
        Who::Raw => "raw file",
        Who::Copies => "raw file, whole subclusters copied",
        Who::Calls => "raw file, pread and pwrite",
    };
    all.iter().map(|who| (name(*who).to_owned(), Job { who: *who, ..job })).collect()
}

fn cache(direct: bool) -> &'static str {
    if direct { "O_DIRECT" } else { "page cache" }
}

/// Clusters as people write them.
pub fn size(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{}k", bytes >> 10) } else { format!("{}M", bytes >> 20) }
}

/// Bytes of a subcluster.
pub fn subcluster(cluster: u64) -> u64 {
    cluster / 32
}

/// The part of a raw file's speed that is enough for writes that allocate.
const PART: f64 = 0.85;

/// Ours against QEMU and the raw file.
fn against(name: String, job: Job, qemu: Option<f64>, raw: Option<f64>) -> Row {
    let mut all = vec![Who::Ours, Who::Qemu, Who::Raw];
    let room = raw.map(|part| Room { of: 2, to: 1, part });
    let mut targets = vec![Target { room, ..target(1, qemu) }, target(2, raw)];
    if !job.direct {
        all.push(Who::Calls);
        targets.push(target(3, None));
    }
    Row { name, sides: sides(job, &all), targets, most_syncs: None }
}

/// Allocating writes over a cluster size: with extended L2 entries and without.
fn extended(cluster: u64, qemu: Option<f64>, raw: Option<f64>, off: Option<f64>) -> Row {
    let job = Job { cluster, ..BASIC };
    let name = format!("allocating writes, {}, O_DIRECT, depth 32", size(cluster));
    let mut row = against(name, job, qemu, raw);
    let without = Job { extended: false, ..job };
    for (name, job) in sides(without, &[Who::Ours, Who::Qemu]) {
        row.sides.push((format!("{name}, extended off"), job));
    }
    row.targets.push(target(3, off));
    row.targets.push(Target { of: 1, ..target(4, None) });
    if subcluster(cluster) > REQUEST {
        row.targets.push(target(5, Some(PART)));
        row.targets[0].room = Some(Room { of: 5, to: 1, part: PART });
        row.targets[2].room = Some(Room { of: 5, to: 3, part: PART });
        row.sides.extend(sides(job, &[Who::Copies]));
    }
    row
}

/// All rows but the chains.
pub fn rows() -> Vec<Row> {
    let (k, m) = (1 << 10, 1 << 20);
    let mut rows = vec![
        extended(64 * k, Some(3.0), Some(0.85), None),
        extended(128 * k, Some(3.0), Some(0.85), Some(6.0)),
        extended(256 * k, None, None, None),
        extended(512 * k, None, None, None),
        extended(m, Some(3.0), None, Some(17.0)),
        extended(2 * m, Some(4.0), None, Some(19.0)),
    ];
    for cluster in [64 * k, 128 * k] {
        let name = format!("allocating writes, {}, page cache, depth 32", size(cluster));
        let job = Job { direct: false, cluster, ..BASIC };
        rows.push(against(name, job, Some(2.0), Some(0.85)));
    }
    for (operation, direct, qemu, raw) in [
        (Operation::Read, true, 1.08, 0.95),
        (Operation::Read, false, 2.5, 0.9),
        (Operation::Write, true, 1.1, 0.95),
        (Operation::Write, false, 2.0, 0.9),
    ] {
        let what = if operation == Operation::Read { "reads" } else { "overwrites" };
        let name = format!("{what}, {}, depth 64", cache(direct));
        let job = Job { operation, direct, depth: 64, fresh: false, ..BASIC };
        rows.push(against(name, job, Some(qemu), Some(raw)));
    }
    let read = Job { operation: Operation::Read, direct: false, fresh: false, ..BASIC };
    let small = Job { l2_cache: Some(64 * k), ..read };
    rows.push(Row {
        name: "reads, L2 twice its cache, page cache, depth 32".to_owned(),
        sides: sides(small, &[Who::Ours, Who::Qemu]),
        targets: vec![target(1, Some(1.5))],
        most_syncs: None,
    });
    rows.push(Row {
        name: "allocating writes, a flush after each, O_DIRECT, depth 1".to_owned(),
        sides: sides(Job { flush: true, depth: 1, ..BASIC }, &[Who::Ours, Who::Qemu]),
        targets: vec![target(1, Some(1.2))],
        most_syncs: Some(2.0),
    });
    let one = Job { direct: false, ..BASIC };
    rows.push(Row {
        name: "allocating writes, two queues on two threads, page cache".to_owned(),
        sides: vec![
            ("qcow2rs, two queues".to_owned(), Job { queues: 2, ..one }),
            ("qcow2rs, one queue".to_owned(), one),
            ("raw file, two threads".to_owned(), Job { who: Who::Calls, queues: 2, ..one }),
            ("raw file, one thread".to_owned(), Job { who: Who::Calls, ..one }),
        ],
        targets: vec![
            Target { room: Some(Room { of: 2, to: 3, part: PART }), ..target(1, Some(1.3)) },
            Target { of: 2, ..target(3, None) },
        ],
        most_syncs: None,
    });
    rows
}
