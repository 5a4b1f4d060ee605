//! This library's queues, as a C program uses them.

use std::ffi::{CStr, CString, c_int, c_void};
use std::hint::black_box;
use std::path::Path;
use std::ptr;
use std::time::Instant;

use qcow2rs::capi::*;

use crate::row::Operation;
use crate::{FILL, Page, REQUEST, Row, allocations};

type Read =
    unsafe extern "C" fn(*mut qcow2rs_queue, *mut c_void, usize, u64, u32, *mut c_void) -> c_int;
type Write =
    unsafe extern "C" fn(*mut qcow2rs_queue, *const c_void, usize, u64, u32, *mut c_void) -> c_int;
type Wait =
    unsafe extern "C" fn(*mut qcow2rs_queue, *mut qcow2rs_completion, c_int, c_int, i64) -> c_int;

fn check(result: c_int) -> c_int {
    if result < 0 {
        // SAFETY: never NULL, and valid until the next call of this thread.
        panic!("{:?} ({result})", unsafe { CStr::from_ptr(qcow2rs_error_message()) });
    }
    result
}

fn c_path(path: &Path) -> CString {
    CString::new(path.to_str().expect("paths are UTF-8")).expect("no NUL")
}

/// Makes an image with extended L2 entries, full of data.
pub fn create(path: &Path, size: u64, cluster_size: u64) {
    let cluster_size = CString::new(cluster_size.to_string()).expect("no NUL");
    let (mut opts, mut image) = (ptr::null_mut(), ptr::null_mut());
    let chunk = vec![0xa5u8; 1 << 20];
    // SAFETY: places for handles, those handles, strings and memory.
    unsafe {
        check(qcow2rs_create_opts_new(&mut opts));
        check(qcow2rs_create_opts_set_size(opts, size));
        let cluster_size = cluster_size.as_ptr();
        check(qcow2rs_create_opts_set(opts, c"cluster_size".as_ptr(), cluster_size));
        check(qcow2rs_create_opts_set(opts, c"extended_l2".as_ptr(), c"on".as_ptr()));
        check(qcow2rs_create_path(c_path(path).as_ptr(), 0, opts, ptr::null(), &mut image));
        for offset in (0..size).step_by(chunk.len()) {
            check(qcow2rs_pwrite(image, chunk.as_ptr().cast(), chunk.len(), offset, 0));
        }
        check(qcow2rs_close(&mut image));
        qcow2rs_create_opts_free(&mut opts);
    }
}

/// Carries the row's requests out; returns seconds.
pub fn run(row: &Row, path: &Path, engine: &CStr) -> f64 {
    let mut flags = QCOW2RS_OPEN_RDWR;
    if row.direct {
        flags |= QCOW2RS_OPEN_DIRECT;
    }
    let (mut opts, mut image) = (ptr::null_mut(), ptr::null_mut());
    let (mut queue_opts, mut queue) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: places for handles, those handles and strings.
    unsafe {
        check(qcow2rs_open_opts_new(&mut opts));
        check(qcow2rs_open_opts_set_flags(opts, flags));
        check(qcow2rs_open_path(c_path(path).as_ptr(), opts, &mut image));
        qcow2rs_open_opts_free(&mut opts);
        check(qcow2rs_queue_opts_new(&mut queue_opts));
        check(qcow2rs_queue_opts_set_depth(queue_opts, row.depth as u32));
        check(qcow2rs_queue_opts_set(queue_opts, c"engine".as_ptr(), engine.as_ptr()));
        check(qcow2rs_queue_opts_set(queue_opts, c"completion-fd".as_ptr(), c"off".as_ptr()));
        check(qcow2rs_queue_create(image, queue_opts, &mut queue));
        qcow2rs_queue_opts_free(&mut queue_opts);
    }
    // By pointers that the optimiser cannot see through, as from a C program.
    let read = black_box(qcow2rs_queue_pread as Read);
    let write = black_box(qcow2rs_queue_pwrite as Write);
    let wait = black_box(qcow2rs_queue_wait as Wait);

    let mut pages = vec![Page([FILL; REQUEST as usize]); row.depth];
    let mut free: Vec<*mut Page> = pages.iter_mut().map(ptr::from_mut).collect();
    let empty = qcow2rs_completion {
        user_data: ptr::null_mut(),
        error_message: ptr::null(),
        ret: 0,
        error_code: 0,
        reserved: 0,
    };
    let mut done = vec![empty; row.depth];
    let mut requests = |offsets: &mut dyn Iterator<Item = u64>| {
        let mut in_flight = 0;
        loop {
            while let Some(page) = free.pop() {
                let Some(offset) = offsets.next() else {
                    free.push(page);
                    break;
                };
                let length = REQUEST as usize;
                // SAFETY: a live queue, and a page that nobody else uses.
                check(unsafe {
                    match row.operation {
                        Operation::Read => read(queue, page.cast(), length, offset, 0, page.cast()),
                        Operation::Write => {
                            write(queue, page.cast_const().cast(), length, offset, 0, page.cast())
                        }
                    }
                });
                in_flight += 1;
            }
            if in_flight == 0 {
                return;
            }
            // SAFETY: a live queue, and an array as long as said.
            let count = check(unsafe { wait(queue, done.as_mut_ptr(), 1, row.depth as c_int, -1) });
            for completion in &done[..count as usize] {
                assert_eq!(completion.ret, 0);
                free.push(completion.user_data.cast());
            }
            in_flight -= count;
        }
    };
    // Everything is known to the caches, and every slot has been used.
    requests(&mut row.pattern.offsets().take(row.depth * 4));
    let step = (row.pattern.size / 8192).max(1);
    requests(&mut (0..row.pattern.size).step_by(step as usize).map(|at| at / REQUEST * REQUEST));
    let (before, start) = (allocations(), Instant::now());
    requests(&mut row.pattern.offsets());
    let seconds = start.elapsed().as_secs_f64();
    let allocated = allocations() - before;
    assert!(allocated < 10, "{allocated} allocations for {} requests", row.pattern.count);
    // SAFETY: live handles.
    unsafe {
        qcow2rs_queue_destroy(&mut queue);
        check(qcow2rs_close(&mut image));
    }
    seconds
}
