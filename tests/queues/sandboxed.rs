//! The same tests where the system refuses io_uring, or runs out of descriptors: in
//! a process of their own.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use qcow2rs::{CreateOptions, Engine, OpenOptions, Queue, QueueOptions, WriteFlags};

use crate::support::Scratch;

/// Set in the process that has few descriptors.
const FEW: &str = "QCOW2RS_FEW_DESCRIPTORS";

/// Runs tests of this file's program after `prepare` in the new process.
pub fn run(tests: &[&str], env: &[(&str, &str)], prepare: fn() -> io::Result<()>) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(tests).args(["--test-threads", "2"]).envs(env.iter().copied());
    // SAFETY: `prepare` only makes system calls.
    unsafe { command.pre_exec(prepare) };
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(!text.contains("running 0 tests"), "{text}");
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// io_uring_setup(2) fails with EPERM from now on.
fn forbid_io_uring() -> io::Result<()> {
    let step =
        |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let errno = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut filter = [
        // The number of the system call is the first word of what the filter sees.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, errno),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: numbers, and a program that lives until the call returns.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        let mode = libc::SECCOMP_MODE_FILTER;
        check(libc::prctl(libc::PR_SET_SECCOMP, mode, std::ptr::from_ref(&program)).into())
    }
}

#[test]
fn without_io_uring_everything_works_all_the_same() {
    if std::env::var("QCOW2RS_NO_IO_URING").is_ok() {
        return;
    }
    run(
        &["behaviour", "flights", "mixed", "model"],
        &[("QCOW2RS_NO_IO_URING", "1")],
        forbid_io_uring,
    );
}

/// Set in the process that may not lock memory.
const NO_LOCKED_MEMORY: &str = "QCOW2RS_NO_LOCKED_MEMORY";

/// Old kernels count rings as locked memory, whose limit is 0 here; nor does being
/// root help any more.
fn no_locked_memory() -> io::Result<()> {
    const CAP_IPC_LOCK: libc::c_ulong = 14;
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit lives until the call returns; the rest are numbers.
    unsafe {
        check(libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit).into())?;
        // Root only may do so, and needs to.
        if libc::geteuid() == 0 {
            check(libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK).into())?;
        }
    }
    Ok(())
}

#[test]
fn without_locked_memory_queues_work_with_a_ring_or_without() {
    if std::env::var(NO_LOCKED_MEMORY).is_err() {
        let name = "sandboxed::without_locked_memory_queues_work_with_a_ring_or_without";
        return run(&[name, "--exact"], &[(NO_LOCKED_MEMORY, "1")], no_locked_memory);
    }
    let scratch = Scratch::new();
    let mut options = CreateOptions::default();
    options.size = Some(1 << 20);
    let path = scratch.path("image");
    let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new());
    let image = image.map(Arc::new).unwrap();
    let mut queues = Vec::new();
    for number in 0..8_u64 {
        let mut options = QueueOptions::new();
        options.set_depth(1024).unwrap();
        let queue = Queue::new(&image, &options).unwrap();
        let bytes = vec![number as u8 + 1; 4096];
        queue.write(bytes, number * 4096, WriteFlags::default(), number).unwrap();
        queues.push(queue);
    }
    for (queue, number) in queues.iter().zip(0_u64..) {
        crate::one(queue).result.unwrap();
        queue.read(vec![0; 4096], number * 4096, number).unwrap();
        assert_eq!(crate::one(queue).buffer.unwrap(), [number as u8 + 1; 4096]);
    }
    drop(queues);
    image.close().unwrap();
}

fn few_descriptors() -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: 40, rlim_max: 40 };
    // SAFETY: the limit lives until the call returns.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }.into())
}

/// Makes queues until there are no descriptors left, then does so again.
fn make_queues_until_it_fails() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut options = CreateOptions::default();
    options.size = Some(1 << 20);
    let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new())
        .map(Arc::new)
        .unwrap();
    let mut made = Vec::new();
    for engine in [Engine::Auto, Engine::Blocking, Engine::Auto] {
        let mut options = QueueOptions::new();
        options.engine = engine;
        let mut queues = Vec::new();
        let error = loop {
            match Queue::new(&image, &options) {
                Ok(queue) => queues.push(queue),
                Err(error) => break error,
            }
        };
        assert_eq!(error.errno(), libc::EMFILE, "{error}");
        for queue in &queues {
            queue.read(vec![1; 512], 0, 7).unwrap();
            assert_eq!(crate::one(queue).buffer.unwrap(), [0; 512]);
        }
        made.push(queues.len());
    }
    assert!(made[0] > 2 && made[0] == made[2], "{made:?}");
    image.close().unwrap();
}

#[test]
fn without_descriptors_making_a_queue_fails_and_leaks_none() {
    match std::env::var(FEW) {
        Ok(_) => make_queues_until_it_fails(),
        Err(_) => {
            let name = "sandboxed::without_descriptors_making_a_queue_fails_and_leaks_none";
            run(&[name, "--exact"], &[(FEW, "1")], few_descriptors);
        }
    }
}
