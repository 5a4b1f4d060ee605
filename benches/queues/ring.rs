//! The least that can be done: io_uring on a raw file.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};

use crate::row::Operation;
use crate::{FILL, Page, REQUEST, Row};

/// Carries the row's requests out; returns seconds.
pub fn run(row: &Row, path: &Path) -> f64 {
    let flags = if row.direct { libc::O_DIRECT } else { 0 };
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(flags).open(path).expect("opens");
    let fd = types::Fd(file.as_raw_fd());
    let mut ring = IoUring::new((row.depth as u32).next_power_of_two()).expect("io_uring");
    let mut pages = vec![Page([FILL; REQUEST as usize]); row.depth];
    let mut free: Vec<usize> = (0..row.depth).collect();
    let mut offsets = row.pattern.offsets();
    let mut in_flight = 0;
    let start = Instant::now();
    loop {
        while let Some(index) = free.pop() {
            let Some(offset) = offsets.next() else { break };
            let page = pages[index].0.as_mut_ptr();
            let entry = match row.operation {
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
        ring.submit_and_wait(1).expect("submits");
        for completion in ring.completion() {
            assert_eq!(completion.result(), REQUEST as i32);
            free.push(completion.user_data() as usize);
            in_flight -= 1;
        }
    }
}
