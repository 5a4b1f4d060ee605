//! What is measured on, and when.

use std::fs;
use std::process::Command;

/// Processor, number of cores, kernel.
pub fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, {cores} cores, Linux {}", model.map_or("?", |(_, name)| name), kernel.trim())
}

/// Today, UTC.
pub fn date() -> String {
    let output = Command::new("date").args(["-u", "+%F"]).output().expect("date runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
