//! The least that can be done: io_uring, or plain calls, on a raw file.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Barrier;
use std::time::Instant;

use io_uring::squeue::Flags;
use io_uring::{IoUring, opcode, types};
use qcow2rs::Buffer;

use crate::common::pattern::{Pattern, REQUEST};
use crate::common::{FILL, Operation};
use crate::row::{Job, subcluster};

fn open(job: &Job, path: &Path) -> File {
    let flags = if job.direct { libc::O_DIRECT } else { 0 };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags).open(path).expect("opens")
}

fn pages(count: usize) -> Buffer {
    let mut pages = Buffer::aligned(count * REQUEST as usize).expect("memory");
    pages.fill(FILL);
    pages
}

/// Carries the job out by io_uring, `first` bytes further on; returns seconds.
pub fn ring(job: &Job, path: &Path, first: u64, pattern: &Pattern) -> f64 {
    let file = open(job, path);
    let fd = types::Fd(file.as_raw_fd());
    let mut ring = IoUring::new((job.depth as u32).next_power_of_two()).expect("io_uring");
    let mut pages = pages(job.depth);
    let mut free: Vec<usize> = (0..job.depth).collect();
    let mut offsets = pattern.offsets().map(|offset| first + offset);
    let mut in_flight = 0;
    let start = Instant::now();
    loop {
        while let Some(index) = free.pop() {
            let Some(offset) = offsets.next() else { break };
            let page = pages[index * REQUEST as usize..].as_mut_ptr();
            let entry = match job.operation {
                Operation::Read => {
                    opcode::Read::new(fd, page, REQUEST as u32).offset(offset).build()
                }
                Operation::Write => {
                    opcode::Write::new(fd, page, REQUEST as u32).offset(offset).build()
                }
            };
            // SAFETY: the page and the file outlive the operation.
            unsafe { ring.submission().push(&entry.user_data(index as u64)) }.expect("room");
            in_flight += 1;
        }
        if in_flight == 0 {
            return start.elapsed().as_secs_f64();
        }
        submit(&ring);
        for completion in ring.completion() {
            assert_eq!(completion.result(), REQUEST as i32);
            free.push(completion.user_data() as usize);
            in_flight -= 1;
        }
    }
}

/// Hands over what is new and waits for a completion.
fn submit(ring: &IoUring) {
    match ring.submit_and_wait(1) {
        // Somebody has stopped this program for a while.
        Err(error) if error.kind() == ErrorKind::Interrupted => {}
        result => drop(result.expect("submits")),
    }
}

/// For each request copies a whole subcluster from the base; returns seconds.
pub fn copies(job: &Job, base: &Path, path: &Path, pattern: &Pattern) -> f64 {
    let (base, file) = (open(job, base), open(job, path));
    let (from, to) = (types::Fd(base.as_raw_fd()), types::Fd(file.as_raw_fd()));
    let size = subcluster(job.cluster);
    let mut ring = IoUring::new((2 * job.depth as u32).next_power_of_two()).expect("io_uring");
    let mut memory = Buffer::aligned(job.depth * size as usize).expect("memory");
    let mut free: Vec<usize> = (0..job.depth).collect();
    let mut offsets = pattern.offsets().map(|offset| offset / size * size);
    let mut in_flight = 0;
    let start = Instant::now();
    loop {
        while let Some(index) = free.pop() {
            let Some(offset) = offsets.next() else { break };
            let place = memory[index * size as usize..].as_mut_ptr();
            let read = opcode::Read::new(from, place, size as u32).offset(offset).build();
            let write = opcode::Write::new(to, place, size as u32).offset(offset).build();
            let both =
                [read.flags(Flags::IO_LINK).user_data(u64::MAX), write.user_data(index as u64)];
            // SAFETY: the memory and the files outlive the operations.
            unsafe { ring.submission().push_multiple(&both) }.expect("room");
            in_flight += 1;
        }
        if in_flight == 0 {
            return start.elapsed().as_secs_f64();
        }
        submit(&ring);
        for completion in ring.completion() {
            assert_eq!(completion.result(), size as i32);
            if completion.user_data() != u64::MAX {
                free.push(completion.user_data() as usize);
                in_flight -= 1;
            }
        }
    }
}

/// Carries the job out by one call after the other, by as many threads as there would be
/// queues; returns seconds.
pub fn calls(job: &Job, path: &Path, first: u64, pattern: &Pattern) -> f64 {
    let file = &open(job, path);
    let ready = &Barrier::new(job.queues);
    let work = move |index: usize| {
        let mut page = pages(1);
        ready.wait();
        let start = Instant::now();
        let share = pattern.share(index as u64, job.queues as u64);
        for offset in share.map(|offset| first + offset) {
            match job.operation {
                Operation::Read => file.read_exact_at(&mut page, offset).expect("reads"),
                Operation::Write => file.write_all_at(&page, offset).expect("writes"),
            }
        }
        (start, Instant::now())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> =
            (1..job.queues).map(|index| scope.spawn(move || work(index))).collect();
        let (mut start, mut end) = work(0);
        for other in others {
            let (from, to) = other.join().expect("no thread fails");
            (start, end) = (start.min(from), end.max(to));
        }
        (end - start).as_secs_f64()
    })
}
