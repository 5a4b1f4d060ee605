//! Taking, applying and deleting a snapshot of a large disk, here and by QEMU, each on a
//! copy of the same image: extended L2 entries, and a host cluster for every cluster of
//! the disk. Prints seconds. See docs/performance.md.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use qcow2rs::snapshots::Meta;
use qcow2rs::{Image, OpenOptions, Source};

const USAGE: &str = "\
usage: cargo bench --bench snapshots -- [--dir DIRECTORY] [--gib N] [--rounds N]
  --dir     where the files go: 0.3 MiB for each GiB, twice (default: target/bench)
  --gib     size of the virtual disk (default: 1024, which has 16 million clusters)
  --rounds  how often everything is measured (default: 3)";

struct Options {
    dir: PathBuf,
    gib: u64,
    rounds: usize,
}

fn options() -> Options {
    let mut options = Options { dir: "target/bench".into(), gib: 1024, rounds: 3 };
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(name) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| usage());
        match name.as_str() {
            "--dir" => options.dir = value.into(),
            "--gib" => options.gib = value.parse().unwrap_or_else(|_| usage()),
            "--rounds" => options.rounds = value.parse().unwrap_or_else(|_| usage()),
            _ => usage(),
        }
    }
    options
}

fn usage() -> ! {
    eprintln!("{USAGE}");
    std::process::exit(2)
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    let done = status.is_ok_and(|status| status.success());
    assert!(done, "{program} {arguments:?} has failed");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is UTF-8")
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// One change, with opening and closing, as `qemu-img` does it.
fn ours(path: &Path, change: impl FnOnce(&Image)) -> Duration {
    timed(|| {
        let image = Image::open(Source::path(path), &OpenOptions::new().writable(true));
        let image = image.expect("the image can be opened");
        change(&image);
        image.close().expect("the image can be closed");
    })
}

fn qemus(path: &Path, action: &str) -> Duration {
    timed(|| run("qemu-img", &["snapshot", action, "s", text(path)]))
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

fn main() {
    let Options { dir, gib, rounds } = options();
    std::fs::create_dir_all(&dir).expect("a directory for the images");
    let paths = ["snapshots-ours.qcow2", "snapshots-qemu.qcow2"].map(|name| dir.join(name));
    let layout = "extended_l2=on,preallocation=metadata";
    let size = format!("{gib}G");
    for path in &paths {
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", layout, text(path), &size]);
    }
    let mut times: [[Vec<Duration>; 2]; 3] = Default::default();
    for _ in 0..rounds {
        let [mine, theirs] = &paths;
        times[0][0].push(ours(mine, |image| {
            image.snapshot_create(b"s", &Meta::now()).expect("it can be taken");
        }));
        times[0][1].push(qemus(theirs, "-c"));
        times[1][0].push(ours(mine, |image| {
            image.snapshot_apply(b"s").expect("it can be applied");
        }));
        times[1][1].push(qemus(theirs, "-a"));
        times[2][0].push(ours(mine, |image| {
            image.snapshot_delete(b"s").expect("it can be deleted");
        }));
        times[2][1].push(qemus(theirs, "-d"));
    }
    println!("{gib} GiB, {} clusters, medians of {rounds}, seconds", gib * 16384);
    println!("{:<10}{:>10}{:>12}{:>8}", "", "qcow2rs", "qemu-img", "ratio");
    for (name, [ours, theirs]) in ["create", "apply", "delete"].into_iter().zip(times) {
        let (ours, theirs) = (median(ours), median(theirs));
        println!("{name:<10}{ours:>10.3}{theirs:>12.3}{:>8.1}", theirs / ours);
    }
    for path in paths {
        run("qemu-img", &["check", "-q", text(&path)]);
        _ = std::fs::remove_file(path);
    }
}
