//! `qemu-img`, as a subprocess. Its own measure counts: the time from the first
//! request to the last completion, without start, open, flush and close.

use std::path::Path;
use std::process::{Command, Stdio};

use super::pattern::{Pattern, REQUEST};
use super::{FILL, Layout, Operation};

/// How QEMU hands requests to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Aio {
    Threads,
    Native,
    IoUring,
}

impl Aio {
    pub fn name(self) -> &'static str {
        match self {
            Aio::Threads => "threads",
            Aio::Native => "native",
            Aio::IoUring => "io_uring",
        }
    }

    /// Those that can be asked for: native wants O_DIRECT.
    pub fn all(direct: bool) -> &'static [Aio] {
        if direct {
            &[Aio::Threads, Aio::Native, Aio::IoUring]
        } else {
            &[Aio::Threads, Aio::IoUring]
        }
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}: {stderr}{text}", output.status))
}

/// First line of `qemu-img --version`.
pub fn version() -> String {
    let text = run(Command::new("qemu-img").arg("--version")).unwrap_or_else(|error| {
        panic!("{error} (scripts/setup.sh installs it)");
    });
    text.lines().next().unwrap_or_default().to_owned()
}

/// Creates an overlay on a raw base.
pub fn create(path: &Path, base: &Path, layout: Layout) {
    let extended = if layout.extended { "on" } else { "off" };
    let options = format!("cluster_size={},extended_l2={extended}", layout.cluster);
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(base)
        .args(["-o", &options])
        .arg(path)
        .arg(layout.size.to_string()))
    .unwrap_or_else(|error| panic!("{error}"));
}

/// What `qemu-img bench` is to do.
pub struct Bench<'a> {
    pub aio: Aio,
    pub operation: Operation,
    pub direct: bool,
    pub pattern: &'a Pattern,
    pub depth: usize,
    /// A flush follows each write.
    pub flush: bool,
    /// Bytes for L2 tables, in pieces as large as ours; `None`: the default.
    pub l2_cache: Option<u64>,
}

impl Bench<'_> {
    /// Carries the pattern out; returns seconds, or why this way of I/O cannot be had.
    pub fn run(&self, path: &Path) -> Result<f64, String> {
        // A request that completes at once starts the next one from its own callback:
        // with io_uring the stack of some hundred thousand is deeper than the usual 8 MiB.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -s unlimited && exec qemu-img \"$@\"", "qemu-img", "bench"]);
        command.args(["-d", &self.depth.to_string(), "-i", self.aio.name()]);
        command.args(["-t", if self.direct { "none" } else { "writeback" }]);
        command.args(["-c", &self.pattern.count.to_string(), "-s", &REQUEST.to_string()]);
        command.args(["-S", &self.pattern.step.to_string()]);
        if self.operation == Operation::Write {
            command.args(["-w", &format!("--pattern={FILL}")]);
        }
        if self.flush {
            command.arg("--flush-interval=1");
        }
        if let Some(bytes) = self.l2_cache {
            let path = path.to_str().expect("paths are UTF-8").replace(',', ",,");
            command.arg("--image-opts").arg(format!(
                "driver=qcow2,l2-cache-size={bytes},l2-cache-entry-size=4096,\
                 file.driver=file,file.filename={path}"
            ));
        } else {
            command.args(["-f", "qcow2"]).arg(path);
        }
        let text = run(&mut command)?;
        let seconds = text
            .split_once("Run completed in ")
            .and_then(|(_, rest)| rest.split_once(' ')?.0.parse().ok());
        seconds.ok_or_else(|| format!("{command:?} says {text:?}"))
    }
}

/// The guest sees the same in both; the second is sound.
pub fn verify(theirs: &Path, ours: &Path) {
    let compared = run(Command::new("qemu-img")
        .args(["compare", "-q", "-f", "qcow2", "-F", "qcow2"])
        .args([theirs, ours]));
    let checked = run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(ours));
    compared.and(checked).unwrap_or_else(|error| panic!("{error}"));
}

/// Where the data of a disk of `size` bytes begins in its image file: all of it lies in
/// one piece.
pub fn only_extent(path: &Path, size: u64) -> u64 {
    let text =
        run(Command::new("qemu-img").args(["map", "--output=json", "-f", "qcow2"]).arg(path))
            .unwrap_or_else(|error| panic!("{error}"));
    let map: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(map[0]["length"], size, "the data lies in several pieces");
    map[0]["offset"].as_u64().expect("it is stored")
}
