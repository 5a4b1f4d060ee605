//! A request on its way through a queue: what is asked for, who carries it out, and
//! how it ended.

use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use crate::error::{Error, Result};
use crate::image::disk::Disk;
use crate::image::handle::{WriteFlags, ZeroFlags};
use crate::io::engine::{Engine, Piece, Target};
use crate::io::turns::Transfer;
use crate::sys::buffer::Buffer;
use crate::sys::memory::{GuestMut, GuestRef};

/// Memory of a request that reads.
pub enum Into {
    /// The caller's, who keeps it until the completion.
    Guest(GuestMut<'static>),
    /// Ours, until the completion hands it back.
    Owned(Buffer),
}

/// Memory of a request that writes.
pub enum From {
    /// The caller's, who keeps it until the completion.
    Guest(GuestRef<'static>),
    /// Ours, until the completion hands it back.
    Owned(Buffer),
}

/// What is asked for.
pub enum Work {
    /// Read from an offset on.
    Read(Into, u64),
    /// Write at an offset.
    Write(From, u64, WriteFlags),
    /// Make a range read as zero: offset, length.
    Zeroes(u64, u64, ZeroFlags),
    /// Give a range up: offset, length.
    Discard(u64, u64),
    /// Make durable what completed.
    Flush,
    /// Fail: what is asked for cannot be done.
    Fail(Error),
}

/// A request, and the disk as it was when it came; an error if there is none.
pub struct Request {
    pub work: Work,
    pub disk: Result<Arc<Disk>>,
}

/// How a request ended; the buffer that it owned.
pub struct Outcome {
    pub result: Result<()>,
    pub buffer: Option<Buffer>,
}

impl Request {
    /// What it asks for, and where on which disk, if that is nothing but a transfer of
    /// memory that stays where it is until the request is over.
    #[inline]
    pub fn transfer(&self) -> Option<(&Disk, Transfer, u64)> {
        let disk = self.disk.as_deref().ok()?;
        match &self.work {
            Work::Read(to, offset) => {
                let to = match to {
                    Into::Guest(to) => Target::Guest(*to),
                    Into::Owned(to) => Target::Block(to.block()?),
                };
                Some((disk, Transfer::Read(to), *offset))
            }
            Work::Write(from, offset, flags) if flags.are_plain() => {
                let from = match from {
                    From::Guest(from) => Piece::Guest(*from),
                    From::Owned(from) => Piece::Block(from.block()?),
                };
                Some((disk, Transfer::Write(from), *offset))
            }
            _ => None,
        }
    }

    /// The common case, without a future: what is a copy of memory, or anything by an
    /// engine that does everything at once. `None`: nothing was done.
    #[inline]
    pub fn run_now<E: Engine>(&self, engine: &E) -> Option<Result<()>> {
        let (disk, transfer, offset) = self.transfer()?;
        match transfer {
            Transfer::Read(to) => disk.read_now(engine, &to, offset),
            Transfer::Write(from) => disk.write_now(engine, &from, offset),
        }
    }

    async fn run<E: Engine>(self, engine: &E) -> Outcome {
        let disk = match self.disk {
            Ok(disk) => disk,
            Err(error) => return Outcome { result: Err(error), buffer: self.work.into_buffer() },
        };
        let mut buffer = None;
        let result = match self.work {
            Work::Read(Into::Guest(to), offset) => {
                disk.read(engine, Target::Guest(to), offset).await
            }
            Work::Read(Into::Owned(mut bytes), offset) => {
                let to = Target::Guest(GuestMut::from_slice(&mut bytes));
                let result = disk.read(engine, to, offset).await;
                buffer = Some(bytes);
                result
            }
            Work::Write(From::Guest(from), offset, flags) => {
                disk.write_with(engine, Piece::Guest(from), offset, flags).await
            }
            Work::Write(From::Owned(bytes), offset, flags) => {
                let from = Piece::Guest(GuestRef::from_slice(&bytes));
                let result = disk.write_with(engine, from, offset, flags).await;
                buffer = Some(bytes);
                result
            }
            Work::Zeroes(offset, length, flags) => {
                disk.write_zeroes(engine, offset, length, flags).await
            }
            Work::Discard(offset, length) => disk.discard(engine, offset, length).await,
            Work::Fail(error) => Err(error),
            Work::Flush if mutant!(QueuedFlushNotAwaited) => Ok(()),
            Work::Flush => disk.flush(engine).await,
        };
        Outcome { result, buffer }
    }
}

impl Work {
    /// The buffer that comes with it.
    pub fn into_buffer(self) -> Option<Buffer> {
        match self {
            Work::Read(Into::Owned(bytes), _) | Work::Write(From::Owned(bytes), _, _) => {
                Some(bytes)
            }
            _ => None,
        }
    }
}

/// Where a slot's future finds its next request and leaves what came of it.
#[derive(Default)]
pub struct Exchange(Mutex<Content>);

#[derive(Default)]
enum Content {
    #[default]
    Nothing,
    Request(Request),
    Outcome(Outcome),
}

impl Exchange {
    fn content(&self) -> MutexGuard<'_, Content> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a request.
    pub fn put(&self, request: Request) {
        *self.content() = Content::Request(request);
    }

    /// The outcome, if there is one.
    pub fn take_outcome(&self) -> Option<Outcome> {
        let mut content = self.content();
        match std::mem::take(&mut *content) {
            Content::Outcome(outcome) => Some(outcome),
            other => {
                *content = other;
                None
            }
        }
    }

    /// The request, if there is one.
    pub fn take_request(&self) -> Option<Request> {
        let mut content = self.content();
        match std::mem::take(&mut *content) {
            Content::Request(request) => Some(request),
            other => {
                *content = other;
                None
            }
        }
    }
}

/// Carries out one request after the other: made once, for all that a slot serves.
pub async fn serve<E: Engine>(exchange: Arc<Exchange>, engine: Arc<E>) -> Infallible {
    loop {
        let request = poll_fn(|_| match exchange.take_request() {
            Some(request) => Poll::Ready(request),
            // Polled again when there is one.
            None => Poll::Pending,
        });
        let outcome = request.await.run(&*engine).await;
        *exchange.content() = Content::Outcome(outcome);
    }
}
