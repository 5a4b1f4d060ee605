//! Waiting for descriptors, and eventfds: counters to wait for.
//!
//! Descriptors are numbers here: who waits holds on to what they belong to.

use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::file::{SysResult, errno};

/// Waits until one of the descriptors can be read; `false`: the time is over.
/// `EINTR`: a signal came.
pub fn wait_readable(fds: &[RawFd], timeout: Option<Duration>) -> SysResult<bool> {
    let entry = |fd: &RawFd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 };
    let mut list: Vec<libc::pollfd> = fds.iter().map(entry).collect();
    let time = timeout.map(|time| libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: time.subsec_nanos().into(),
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the list and the time live until the call returns; no signal mask.
    let ready = unsafe {
        libc::ppoll(list.as_mut_ptr(), list.len() as libc::nfds_t, time, std::ptr::null())
    };
    if ready < 0 { Err(errno()) } else { Ok(ready > 0) }
}

/// An eventfd with count 0, close-on-exec.
pub fn eventfd(blocking: bool) -> SysResult<OwnedFd> {
    let mut flags = EventfdFlags::CLOEXEC;
    flags.set(EventfdFlags::NONBLOCK, !blocking);
    rustix::event::eventfd(0, flags).map_err(|error| error.raw_os_error())
}

/// Adds 1.
pub fn signal(fd: &OwnedFd) {
    // Only a count of 2^64 - 2 is in the way, and then it is signalled already.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Sets it back to 0, if it does not block.
pub fn clear(fd: &OwnedFd) {
    // It is 0 already, otherwise.
    let _ = rustix::io::read(fd, &mut [0; 8]);
}
