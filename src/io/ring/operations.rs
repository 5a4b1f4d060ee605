//! The operations of the ring's engine, as futures: each puts one transfer after the
//! other into the ring, until all is done, and waits for it to come back.

use std::future::poll_fn;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};
use std::time::Instant;

use super::{RingEngine, Slot, is_interrupted};
use crate::error::Result;
use crate::io::blocking::{self, Blocking};
use crate::io::engine::{Engine, Piece, Target, ZeroMode};
use crate::io::file::File;
use crate::io::storage::{Backend, Storage};
use crate::sys::file::SysResult;
use crate::sys::uring::Call;

/// The memory of an operation, without the first bytes, which were done before.
pub(super) enum Memory<'a> {
    None,
    Fill(&'a Target<'a>, usize),
    Take(&'a [Piece<'a>], usize),
}

impl Slot {
    /// Describes the memory for the kernel, and keeps buffers of ours.
    #[inline]
    pub(super) fn take(&mut self, memory: &Memory<'_>) {
        let Slot { vectors, kept, .. } = self;
        match *memory {
            Memory::None => {}
            Memory::Fill(Target::Guest(guest), done) => {
                vectors.fill(guest.sub(done, guest.len() - done));
            }
            Memory::Fill(Target::Block(block), done) => {
                vectors.fill(block.guest_mut().sub(done, block.len() - done));
                kept.push(block.clone());
            }
            Memory::Take(pieces, done) => {
                vectors.take(pieces.iter().map(Piece::bytes), done);
                kept.extend(pieces.iter().filter_map(|piece| match piece {
                    Piece::Block(block) => Some(block.clone()),
                    Piece::Guest(_) | Piece::Zeroes(_) => None,
                }));
            }
        }
    }
}

/// An operation under way: in a slot until it has completed.
struct Flight<'a> {
    engine: &'a RingEngine,
    slot: Option<usize>,
}

impl RingEngine {
    /// Carries out one operation of the kernel; its result is that of the kernel.
    async fn fly(&self, fd: BorrowedFd<'_>, call: Call, memory: Memory<'_>) -> SysResult<i32> {
        let mut flight = Flight { engine: self, slot: None };
        flight.begin(fd, call, &memory)?;
        poll_fn(|context| flight.poll(context)).await
    }
}

impl Flight<'_> {
    fn begin(&mut self, fd: BorrowedFd<'_>, call: Call, memory: &Memory<'_>) -> SysResult<()> {
        let Some(mut state) = self.engine.state() else { return Err(libc::ENOSYS) };
        let index = state.slot();
        state.slots[index].take(memory);
        match state.push(fd, call, index) {
            Ok(()) => {
                self.slot = Some(index);
                Ok(())
            }
            Err(errno) => {
                state.give_back(index);
                Err(errno)
            }
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<SysResult<i32>> {
        let (Some(index), Some(mut state)) = (self.slot, self.engine.state()) else {
            return Poll::Ready(Err(libc::EIO));
        };
        match state.slots[index].result.take() {
            Some(result) => {
                state.free.push(index);
                self.slot = None;
                Poll::Ready(if result < 0 { Err(-result) } else { Ok(result) })
            }
            None => {
                let waker = &mut state.slots[index].waker;
                match waker {
                    Some(waker) => waker.clone_from(context.waker()),
                    None => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let Some(index) = self.slot else { return };
        // The kernel may be using memory that is about to go: see it done.
        loop {
            let Some(mut state) = self.engine.state() else { return };
            if state.slots[index].result.take().is_some() {
                state.slots[index].waker = None;
                state.free.push(index);
                return;
            }
            drop(state);
            if !self.engine.complete() {
                // Not to be given up, whatever it says: the memory is in use.
                let _ = self.engine.wait_for_kernel();
            }
        }
    }
}

impl Engine for RingEngine {
    fn now(&self) -> Option<Instant> {
        Some(Instant::now())
    }

    async fn read<'a>(&'a self, storage: &'a Storage, to: Target<'a>, offset: u64) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => {
                let result = self.read_file(file, &to, offset).await;
                blocking::done(storage, result, || blocking::reading(to.len(), offset))
            }
            _ => Blocking.read(storage, to, offset).await,
        }
    }

    #[inline]
    fn read_now(&self, storage: &Storage, to: &Target<'_>, offset: u64) -> Option<Result<()>> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => file.read_cached(to, offset).then_some(Ok(())),
            _ => Blocking.read_now(storage, to, offset),
        }
    }

    async fn write<'a>(
        &'a self,
        storage: &'a Storage,
        pieces: &'a [Piece<'a>],
        offset: u64,
    ) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) if !file.writes_to_cache(pieces, offset) => {
                let result = self.write_file(file, pieces, offset).await;
                blocking::done(storage, result, || blocking::writing(pieces, offset))
            }
            _ => Blocking.write(storage, pieces, offset).await,
        }
    }

    #[inline]
    fn write_now(
        &self,
        storage: &Storage,
        pieces: &[Piece<'_>],
        offset: u64,
    ) -> Option<Result<()>> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) if !file.writes_to_cache(pieces, offset) => None,
            _ => Blocking.write_now(storage, pieces, offset),
        }
    }

    async fn sync<'a>(&'a self, storage: &'a Storage) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => {
                let result = self.simple(file, Call::Sync).await;
                blocking::done(storage, result, || "syncing")
            }
            _ => Blocking.sync(storage).await,
        }
    }

    async fn zero<'a>(
        &'a self,
        storage: &'a Storage,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        match (storage.backend(), self.has_ring()) {
            (Backend::File(file), true) => {
                let call = Call::Allocate(File::zero_flags(mode), offset, length);
                let result = self.simple(file, call).await;
                result.map_err(|errno| storage.zero_failed(errno, offset, length, mode))
            }
            _ => Blocking.zero(storage, offset, length, mode).await,
        }
    }

    async fn truncate<'a>(&'a self, storage: &'a Storage, length: u64) -> Result<()> {
        Blocking.truncate(storage, length).await
    }
}

impl RingEngine {
    /// See `sys::file::read`.
    async fn read_file(&self, file: &File, to: &Target<'_>, offset: u64) -> SysResult<()> {
        if file.read_cached(to, offset) {
            return Ok(());
        }
        let alignment = file.alignment.request as usize;
        let mut done = 0;
        while done < to.len() {
            let call = Call::Read(offset + done as u64);
            let got = match self.fly(file.fd(), call, Memory::Fill(to, done)).await {
                Ok(got) => got as usize,
                Err(errno) if is_interrupted(errno) => continue,
                // Somebody's descriptor with O_NONBLOCK: the ring heeds it.
                Err(libc::EAGAIN) => {
                    let rest = to.sub(done, to.len() - done);
                    return file.read(&rest, offset + done as u64);
                }
                Err(errno) => return Err(errno),
            };
            done += got;
            if got == 0 || got % alignment != 0 {
                to.sub(done, to.len() - done).fill_zero();
                break;
            }
        }
        Ok(())
    }

    /// See `sys::file::write`.
    async fn write_file(&self, file: &File, pieces: &[Piece<'_>], offset: u64) -> SysResult<()> {
        let total: usize = pieces.iter().map(Piece::len).sum();
        let mut done = 0;
        while done < total {
            let call = Call::Write(offset + done as u64);
            match self.fly(file.fd(), call, Memory::Take(pieces, done)).await {
                // Nothing written and no error: not to be tried forever.
                Ok(0) => return Err(libc::EIO),
                Ok(put) => done += put as usize,
                Err(errno) if is_interrupted(errno) => {}
                // All of it once more: the same bytes to the same place.
                Err(libc::EAGAIN) => return file.write(pieces, offset),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    async fn simple(&self, file: &File, call: Call) -> SysResult<()> {
        loop {
            match self.fly(file.fd(), call, Memory::None).await {
                Ok(_) => return Ok(()),
                Err(errno) if is_interrupted(errno) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}
