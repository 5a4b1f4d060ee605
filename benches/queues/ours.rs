//! This library's queues, as a C program uses them.

use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::path::Path;
use std::ptr;
use std::sync::Barrier;
use std::time::Instant;

use qcow2rs::Buffer;
use qcow2rs::capi::*;

use crate::common::disk::{Disk, check};
use crate::common::pattern::{Pattern, REQUEST};
use crate::common::{FILL, Operation};
use crate::row::Job;
use crate::run::Outcome;

type Read =
    unsafe extern "C" fn(*mut qcow2rs_queue, *mut c_void, usize, u64, u32, *mut c_void) -> c_int;
type Write =
    unsafe extern "C" fn(*mut qcow2rs_queue, *const c_void, usize, u64, u32, *mut c_void) -> c_int;
type Wait =
    unsafe extern "C" fn(*mut qcow2rs_queue, *mut qcow2rs_completion, c_int, c_int, i64) -> c_int;

/// A queue, its memory, and its functions by pointers that the optimiser cannot see
/// through, as a C program has them.
struct Queue {
    queue: *mut qcow2rs_queue,
    read: Read,
    write: Write,
    wait: Wait,
    /// A page for each request, where `free` and those in flight point to.
    pages: Buffer,
    free: Vec<*mut u8>,
    done: Vec<qcow2rs_completion>,
}

impl Queue {
    fn new(disk: &Disk, depth: usize) -> Queue {
        let (mut opts, mut queue) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: places for handles, those handles, an open image and strings.
        unsafe {
            check(qcow2rs_queue_opts_new(&mut opts), "queue options");
            check(qcow2rs_queue_opts_set_depth(opts, depth as u32), "depth");
            let (engine, fd) = (c"engine".as_ptr(), c"completion-fd".as_ptr());
            check(qcow2rs_queue_opts_set(opts, engine, c"io_uring".as_ptr()), "engine");
            check(qcow2rs_queue_opts_set(opts, fd, c"off".as_ptr()), "completion-fd");
            check(qcow2rs_queue_create(disk.handle(), opts, &mut queue), "queue");
            qcow2rs_queue_opts_free(&mut opts);
        }
        let mut pages = Buffer::aligned(depth * REQUEST as usize).expect("memory");
        pages.fill(FILL);
        let free = pages.chunks_exact_mut(REQUEST as usize).map(|page| page.as_mut_ptr()).collect();
        let nothing = qcow2rs_completion {
            user_data: ptr::null_mut(),
            error_message: ptr::null(),
            ret: 0,
            error_code: 0,
            reserved: 0,
        };
        Queue {
            queue,
            read: black_box(qcow2rs_queue_pread as Read),
            write: black_box(qcow2rs_queue_pwrite as Write),
            wait: black_box(qcow2rs_queue_wait as Wait),
            pages,
            free,
            done: vec![nothing; depth],
        }
    }

    #[inline]
    fn submit(&self, operation: Operation, page: *mut u8, offset: u64) {
        let (queue, length) = (self.queue, REQUEST as usize);
        // SAFETY: a live queue, and a page that nobody else uses.
        let accepted = unsafe {
            match operation {
                Operation::Read => (self.read)(queue, page.cast(), length, offset, 0, page.cast()),
                Operation::Write => {
                    let from = page.cast_const().cast();
                    (self.write)(queue, from, length, offset, 0, page.cast())
                }
            }
        };
        check(accepted, "submitting");
    }

    /// Takes completions, at least one; returns how many.
    #[inline]
    fn complete(&mut self) -> usize {
        let (array, max) = (self.done.as_mut_ptr(), self.done.len() as c_int);
        let count = loop {
            // SAFETY: a live queue, and an array as long as said.
            match unsafe { (self.wait)(self.queue, array, 1, max, -1) } {
                // Somebody has stopped this program for a while.
                interrupted if interrupted == -libc::EINTR => {}
                count => break check(count, "wait") as usize,
            }
        };
        for completion in &self.done[..count] {
            assert_eq!(completion.ret, 0, "a request fails");
            self.free.push(completion.user_data.cast());
        }
        count
    }

    /// Keeps as many requests in flight as the queue takes.
    fn requests(&mut self, operation: Operation, mut offsets: impl Iterator<Item = u64>) {
        let mut in_flight = 0;
        loop {
            while let Some(page) = self.free.pop() {
                let Some(offset) = offsets.next() else {
                    self.free.push(page);
                    break;
                };
                self.submit(operation, page, offset);
                in_flight += 1;
            }
            if in_flight == 0 {
                return;
            }
            in_flight -= self.complete();
        }
    }

    /// One after the other, each write made durable.
    fn durable_writes(&mut self, offsets: impl Iterator<Item = u64>) {
        for offset in offsets {
            let page = self.free.pop().expect("the page of the request before");
            self.submit(Operation::Write, page, offset);
            self.complete();
            let page = self.free.pop().expect("the page of the write");
            // SAFETY: a live queue.
            check(unsafe { qcow2rs_queue_flush(self.queue, 0, page.cast()) }, "flush");
            self.complete();
        }
    }

    fn carry_out(&mut self, job: &Job, offsets: impl Iterator<Item = u64>) {
        if job.flush {
            self.durable_writes(offsets);
        } else {
            self.requests(job.operation, offsets);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: a live queue, which nobody else uses; the pages are still there.
        unsafe { qcow2rs_queue_destroy(&mut self.queue) };
        self.pages[0] = 0;
    }
}

/// Carries the job out.
pub fn run(job: &Job, path: &Path, pattern: &Pattern) -> Outcome {
    let cache = job.l2_cache.map(|bytes| bytes.to_string());
    let options: Vec<_> = cache.iter().map(|bytes| (c"l2-cache-size", bytes.as_str())).collect();
    let disk = Disk::open(path, job.direct, &options);
    let ready = Barrier::new(job.queues);
    let work = |index: usize| {
        let mut queue = Queue::new(&disk, job.depth);
        if !job.fresh {
            // Everything is known to the caches, and every slot has been used.
            let slices = (0..pattern.size).step_by(16 << 20);
            queue.requests(job.operation, slices.chain(pattern.offsets().take(job.depth * 4)));
        }
        ready.wait();
        let (syncs, allocations) = (disk.stats().storage_syncs, crate::allocations());
        let start = Instant::now();
        queue.carry_out(job, pattern.share(index as u64, job.queues as u64));
        let end = Instant::now();
        let allocations = crate::allocations() - allocations;
        (start, end, allocations, disk.stats().storage_syncs - syncs)
    };
    let outcome = std::thread::scope(|scope| {
        let others: Vec<_> = (1..job.queues).map(|i| scope.spawn(move || work(i))).collect();
        let (mut start, mut end, allocations, syncs) = work(0);
        for other in others {
            let (from, to, ..) = other.join().expect("no thread fails");
            (start, end) = (start.min(from), end.max(to));
        }
        Outcome { seconds: (end - start).as_secs_f64(), allocations, syncs }
    });
    let steady = !job.fresh && job.l2_cache.is_none();
    assert!(
        !steady || outcome.allocations < 10,
        "{} heap allocations in the steady state, for {} requests",
        outcome.allocations,
        pattern.count
    );
    disk.close();
    outcome
}
