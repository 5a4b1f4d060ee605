//! A disk in memory behind callbacks. It counts what is asked of it, and a hook may
//! hold requests up, make them fail, or change what they read.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use qcow2rs::io::callbacks::{Abilities, Callbacks, UserIo, UserResult};
use qcow2rs::io::sim::{GuestMut, GuestRef};
use qcow2rs::{Format, Reference, Resolver, Source};

const ENOSPC: i32 = 28;
/// Few tests need more, and a write behind it is a mistake.
const MAX_LENGTH: usize = 64 << 20;

/// A request, as its hook sees it.
pub enum Request<'a> {
    /// What lies here is about to be read.
    Reading(u64),
    /// What is about to be returned, and from where.
    Read(&'a mut [u8], u64),
    /// What is about to be written, and where.
    Write(&'a [u8], u64),
    Flush,
    /// What the length is to be, and is now.
    Truncate(u64, u64),
    /// A range that is to read as zero: offset and length.
    Zero(u64, u64),
}

/// Called for each request, on the thread that made it, with no lock held. An error
/// is an errno value.
pub type Hook = Box<dyn Fn(Request<'_>) -> UserResult<()> + Send + Sync>;

/// The disk; clones are the same one.
#[derive(Clone)]
pub struct MemoryDisk(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    hook: Option<Hook>,
    reads: AtomicU64,
    bytes_read: AtomicU64,
    writes: AtomicU64,
}

struct State {
    /// With room for all that it may become: growing takes no memory.
    bytes: Vec<u8>,
    /// What it says of its length, which may be more than it stores.
    length: u64,
    /// Whether its length can be set.
    truncate: bool,
}

impl MemoryDisk {
    pub fn new(bytes: &[u8]) -> MemoryDisk {
        MemoryDisk::build(bytes, None)
    }

    /// A disk with a hook.
    pub fn with_hook(
        bytes: &[u8],
        hook: impl Fn(Request<'_>) -> UserResult<()> + Send + Sync + 'static,
    ) -> MemoryDisk {
        MemoryDisk::build(bytes, Some(Box::new(hook)))
    }

    fn build(bytes: &[u8], hook: Option<Hook>) -> MemoryDisk {
        let mut room = Vec::with_capacity(MAX_LENGTH.max(bytes.len()));
        room.extend_from_slice(bytes);
        let state = Mutex::new(State { bytes: room, length: bytes.len() as u64, truncate: true });
        let (reads, bytes_read, writes) = Default::default();
        MemoryDisk(Arc::new(Inner { state, hook, reads, bytes_read, writes }))
    }

    /// Makes it look longer: the rest reads as zero.
    pub fn with_length(self, length: u64) -> MemoryDisk {
        self.state().length = length;
        self
    }

    /// Makes it one that only writes change the length of.
    pub fn without_truncate(self) -> MemoryDisk {
        self.state().truncate = false;
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn source(&self) -> Arc<Source> {
        Source::callbacks(Callbacks::new(Box::new(self.clone()), false))
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    pub fn length(&self) -> u64 {
        self.state().length
    }

    /// Calls, and bytes, so far.
    pub fn reads(&self) -> (u64, u64) {
        (self.0.reads.load(Relaxed), self.0.bytes_read.load(Relaxed))
    }

    pub fn writes(&self) -> u64 {
        self.0.writes.load(Relaxed)
    }
}

/// It is what every name stands for, as a raw image.
impl Resolver for MemoryDisk {
    fn resolve(
        &self,
        _: &Reference,
        _: Option<Format>,
    ) -> qcow2rs::Result<(Arc<Source>, Option<Format>)> {
        Ok((self.source(), Some(Format::Raw)))
    }
}

impl UserIo for MemoryDisk {
    fn abilities(&self) -> Abilities {
        let truncate = self.state().truncate;
        Abilities { write: true, truncate, discard: false, write_zeroes: true }
    }

    fn read(&self, to: GuestMut<'_>, offset: u64) -> UserResult<()> {
        self.0.reads.fetch_add(1, Relaxed);
        self.0.bytes_read.fetch_add(to.len() as u64, Relaxed);
        if let Some(hook) = &self.0.hook {
            hook(Request::Reading(offset))?;
        }
        let state = self.state();
        to.fill_zero();
        let there = state.bytes.len() as u64;
        let start = offset.min(there) as usize;
        let end = offset.saturating_add(to.len() as u64).min(there) as usize;
        let Some(hook) = &self.0.hook else {
            to.copy_from(0, &state.bytes[start..end]);
            return Ok(());
        };
        let mut answer = vec![0; to.len()];
        answer[..end - start].copy_from_slice(&state.bytes[start..end]);
        drop(state);
        hook(Request::Read(&mut answer, offset))?;
        to.copy_from(0, &answer);
        Ok(())
    }

    fn write(&self, from: GuestRef<'_>, offset: u64) -> UserResult<()> {
        self.0.writes.fetch_add(1, Relaxed);
        let end = offset.checked_add(from.len() as u64).filter(|end| *end <= MAX_LENGTH as u64);
        let (start, end) = (offset as usize, end.ok_or(ENOSPC)? as usize);
        if let Some(hook) = &self.0.hook {
            let mut data = vec![0; from.len()];
            from.copy_to(0, &mut data);
            hook(Request::Write(&data, offset))?;
        }
        let mut state = self.state();
        let length = state.bytes.len().max(end);
        state.bytes.resize(length, 0);
        state.length = state.length.max(end as u64);
        from.copy_to(0, &mut state.bytes[start..end]);
        Ok(())
    }

    fn length(&self) -> UserResult<u64> {
        Ok(self.state().length)
    }

    fn flush(&self) -> UserResult<()> {
        self.0.hook.as_ref().map_or(Ok(()), |hook| hook(Request::Flush))
    }

    fn truncate(&self, length: u64) -> UserResult<()> {
        if let Some(hook) = &self.0.hook {
            let now = self.length();
            hook(Request::Truncate(length, now))?;
        }
        let mut state = self.state();
        if length > MAX_LENGTH as u64 {
            return Err(ENOSPC);
        }
        state.bytes.resize(length as usize, 0);
        state.length = length;
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> UserResult<()> {
        unreachable!("there is no such ability")
    }

    fn write_zeroes(&self, offset: u64, length: u64, _: bool) -> UserResult<()> {
        if let Some(hook) = &self.0.hook {
            hook(Request::Zero(offset, length))?;
        }
        let mut state = self.state();
        let there = state.bytes.len() as u64;
        let end = offset.saturating_add(length).min(there);
        state.bytes[offset.min(there) as usize..end as usize].fill(0);
        Ok(())
    }
}

/// Where a hook holds one request up, until the test says so: those that come while
/// it is held pass. What never comes, or never goes on, ends the test after a while.
#[derive(Clone)]
pub struct Gate(Arc<(Mutex<Held>, Condvar)>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Held {
    Open,
    /// For the next request.
    Closed,
    One,
}

impl Gate {
    /// An open gate.
    pub fn new() -> Gate {
        Gate(Arc::new((Mutex::new(Held::Open), Condvar::new())))
    }

    fn set(&self, state: Held) {
        *self.0.0.lock().unwrap() = state;
        self.0.1.notify_all();
    }

    fn wait_while(&self, state: Held) {
        let patience = Duration::from_secs(60);
        let held = self.0.0.lock().unwrap();
        let (_held, waited) =
            self.0.1.wait_timeout_while(held, patience, |now| *now == state).unwrap();
        assert!(!waited.timed_out(), "still {state:?}");
    }

    /// Holds up the next request.
    pub fn close(&self) {
        self.set(Held::Closed);
    }

    /// Lets the request go on.
    pub fn open(&self) {
        self.set(Held::Open);
    }

    /// Waits until a request is held up.
    pub fn wait_for_one(&self) {
        self.wait_while(Held::Closed);
    }

    /// For the hook: waits here if the gate is closed.
    pub fn pass(&self) {
        {
            let mut held = self.0.0.lock().unwrap();
            if *held != Held::Closed {
                return;
            }
            *held = Held::One;
        }
        self.0.1.notify_all();
        self.wait_while(Held::One);
    }
}
