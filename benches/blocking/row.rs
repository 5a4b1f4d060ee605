//! What is measured: operations, who carries them out, and one run of one of
//! them. Only the operations themselves are timed: create, open, flush and close
//! are not, for none of the contenders.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::Instant;

use crate::common::disk::{self, Disk};
use crate::common::files::{CLUSTER, Files};
use crate::common::pattern::{Pattern, REQUEST};
use crate::common::qemu::{self, Aio, Bench};
use crate::common::{FILL, Layout, Operation, Page};

/// Who carries a row's operations out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// This library, called by so many threads on one handle.
    Ours(u64),
    /// The same, while a dirty bitmap records.
    Recording,
    /// pread and pwrite on a raw file, called by so many threads.
    Raw(u64),
    Qemu(Aio),
}

impl Contender {
    pub fn name(self) -> String {
        match self {
            Contender::Ours(1) => "qcow2rs".to_owned(),
            Contender::Ours(threads) => format!("qcow2rs, {threads} threads"),
            Contender::Recording => "qcow2rs, with a bitmap".to_owned(),
            Contender::Raw(1) => "raw file".to_owned(),
            Contender::Raw(threads) => format!("raw file, {threads} threads"),
            Contender::Qemu(aio) => format!("QEMU, {}", aio.name()),
        }
    }

    /// The name of the file that it uses.
    fn file(self) -> &'static str {
        match self {
            Contender::Ours(_) => "qcow2rs.qcow2",
            Contender::Recording => "bitmap.qcow2",
            Contender::Qemu(_) => "qemu.qcow2",
            Contender::Raw(_) => "sparse.raw",
        }
    }
}

/// One line of the result.
pub struct Row {
    pub name: &'static str,
    pub operation: Operation,
    /// O_DIRECT rather than the page cache.
    pub direct: bool,
    /// Each run gets a new overlay (the raw file: a new sparse file), where every
    /// write allocates. Otherwise all use files that are full.
    pub allocating: bool,
    pub pattern: Pattern,
}

impl Row {
    /// One run; returns requests per second. Leaves everything on the disk, so
    /// that no run pays for what another one wrote.
    pub fn run(&self, contender: Contender, files: &Files, round: usize) -> Result<f64, String> {
        let path = self.prepare(contender, files, round);
        let seconds = match contender {
            Contender::Ours(threads) => self.run_ours(threads, &path, false),
            Contender::Recording => self.run_ours(1, &path, true),
            Contender::Raw(threads) => self.run_raw(threads, &path),
            Contender::Qemu(aio) => {
                let (operation, direct, pattern) = (self.operation, self.direct, &self.pattern);
                let (depth, flush, l2_cache) = (1, false, None);
                Bench { aio, operation, direct, pattern, depth, flush, l2_cache }.run(&path)?
            }
        };
        if self.operation == Operation::Write {
            File::open(&path).and_then(|file| file.sync_all()).expect("syncs");
        }
        Ok(self.pattern.count as f64 / seconds)
    }

    /// The file for a run. Files of allocating runs stay until `tidy`: to remove
    /// one is work for the kernel, which the next run would feel.
    fn prepare(&self, contender: Contender, files: &Files, round: usize) -> PathBuf {
        if !self.allocating {
            return match contender {
                Contender::Raw(_) => files.raw.clone(),
                Contender::Ours(_) | Contender::Recording | Contender::Qemu(_) => {
                    files.full.clone()
                }
            };
        }
        let path = self.fresh(contender, files, round);
        let size = self.pattern.size;
        let layout = Layout { size, cluster: CLUSTER, extended: true };
        match contender {
            Contender::Ours(_) | Contender::Recording => {
                disk::create(&path, &files.base, c"raw", layout)
            }
            Contender::Qemu(_) => {
                // Tried before in another way.
                let _ = std::fs::remove_file(&path);
                qemu::create(&path, &files.base, layout);
            }
            Contender::Raw(_) => {
                let file = File::create(&path).expect("creates a file");
                file.set_len(size).expect("sets the size");
            }
        }
        File::open(&path).and_then(|file| file.sync_all()).expect("syncs");
        path
    }

    fn fresh(&self, contender: Contender, files: &Files, round: usize) -> PathBuf {
        files.directory.join(format!("round-{round}-{}", contender.file()))
    }

    /// What QEMU and we wrote in a round reads the same.
    pub fn verify(&self, files: &Files, round: usize) {
        let theirs = self.fresh(Contender::Qemu(Aio::Threads), files, round);
        qemu::verify(&theirs, &self.fresh(Contender::Ours(1), files, round));
    }

    /// Removes the files of allocating runs.
    pub fn tidy(&self, files: &Files, rounds: usize) {
        for round in 0..rounds {
            for who in [
                Contender::Ours(1),
                Contender::Recording,
                Contender::Qemu(Aio::Threads),
                Contender::Raw(1),
            ] {
                // Not all have been there.
                let _ = std::fs::remove_file(self.fresh(who, files, round));
            }
        }
    }

    fn run_ours(&self, threads: u64, path: &Path, recording: bool) -> f64 {
        let disk = Disk::open(path, self.direct, &[]);
        if recording {
            disk.record(true);
        }
        let seconds = match self.operation {
            Operation::Read => self.timed(threads, |page, offset| disk.read(page, offset)),
            Operation::Write => self.timed(threads, |page, offset| disk.write(&page.0, offset)),
        };
        if recording {
            // The file is to be the same for who comes next.
            disk.record(false);
        }
        disk.close();
        seconds
    }

    fn run_raw(&self, threads: u64, path: &Path) -> f64 {
        let flags = if self.direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(flags).open(path).expect("opens");
        match self.operation {
            Operation::Read => self.timed(threads, |page, offset| {
                file.read_exact_at(&mut page.0, offset).expect("reads");
            }),
            Operation::Write => self.timed(threads, |page, offset| {
                file.write_all_at(&page.0, offset).expect("writes");
            }),
        }
    }

    /// Seconds from when all threads are ready until the last one is done.
    fn timed(&self, threads: u64, request: impl Fn(&mut Page, u64) + Sync) -> f64 {
        let ready = Barrier::new(threads as usize);
        let work = |index| {
            let mut page = Page([FILL; REQUEST as usize]);
            ready.wait();
            let start = Instant::now();
            self.pattern.share(index, threads).for_each(|offset| request(&mut page, offset));
            (start, Instant::now())
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|i| scope.spawn(move || work(i))).collect();
            let (mut start, mut end) = work(0);
            for other in others {
                let (from, to) = other.join().expect("no thread fails");
                (start, end) = (start.min(from), end.max(to));
            }
            (end - start).as_secs_f64()
        })
    }
}
