//! The engine that puts operations on a simulated disk. A future only fills or
//! reads memory while it is polled, so that one that was dropped cannot.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::SimDisk;
use super::content::OpId;
use super::file::SimFile;
use super::journal::OpKind;
use super::world::State;
use crate::error::{Error, ErrorKind, Result};
use crate::io::engine::{Engine, Piece, Target, ZeroMode};
use crate::io::storage::{Backend, Storage};

/// Carries operations out on simulated disks, and on nothing else.
#[derive(Clone, Copy, Default, Debug)]
pub struct SimEngine;

impl Engine for SimEngine {
    async fn read<'a>(&'a self, storage: &'a Storage, to: Target<'a>, offset: u64) -> Result<()> {
        Operation::read(simulated(storage)?, to, offset).await
    }

    async fn write<'a>(
        &'a self,
        storage: &'a Storage,
        pieces: &'a [Piece<'a>],
        offset: u64,
    ) -> Result<()> {
        Operation::write(simulated(storage)?, pieces, offset).await
    }

    async fn sync<'a>(&'a self, storage: &'a Storage) -> Result<()> {
        Operation::sync(simulated(storage)?).await
    }

    async fn zero<'a>(
        &'a self,
        storage: &'a Storage,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        zeroing(storage, offset, length, mode)?.await
    }

    async fn truncate<'a>(&'a self, storage: &'a Storage, length: u64) -> Result<()> {
        Operation::truncate(simulated(storage)?, length).await
    }
}

pub(super) fn simulated(storage: &Storage) -> Result<&SimFile> {
    match storage.backend() {
        Backend::Sim(file) => Ok(file),
        _ => {
            let what = format!("{} is not simulated, the engine is", storage.name());
            Err(Error::new(ErrorKind::NotSupported, what))
        }
    }
}

/// The operation that makes a range zero, where the file can do that.
pub(super) fn zeroing(
    storage: &Storage,
    offset: u64,
    length: u64,
    mode: ZeroMode,
) -> Result<Operation<'_>> {
    let file = simulated(storage)?;
    let options = file.options();
    let able = match mode {
        ZeroMode::Punch => options.punch,
        ZeroMode::Keep => options.zero,
    };
    match able {
        true => Ok(Operation::zero(file, offset, length, mode)),
        false => Err(storage.zero_failed(libc::EOPNOTSUPP, offset, length, mode)),
    }
}

/// An operation that can be issued without its future.
pub(super) struct Prepared {
    disk: SimDisk,
    file: usize,
    kind: OpKind,
    offset: u64,
    len: u64,
    bytes: Vec<u8>,
}

impl Prepared {
    /// Puts it on the disk; `waker` is woken when it has completed.
    pub(super) fn issue(self, waker: Option<Waker>) -> OpId {
        let Prepared { disk, file, kind, offset, len, bytes } = self;
        let mut world = disk.world();
        let id = world.issue(file, kind, offset, len, bytes);
        if let Some(op) = world.ops.get_mut(&id) {
            op.waker = waker;
        }
        id
    }

    /// As `issue`, unless nothing goes on any more.
    pub(super) fn issue_unless_stopped(self) -> Option<OpId> {
        let stopped = self.disk.world().stopped;
        (!stopped).then(|| self.issue(None))
    }
}

/// An operation on a simulated file: issued at the first poll.
pub(super) struct Operation<'a> {
    file: &'a SimFile,
    kind: OpKind,
    offset: u64,
    len: u64,
    data: Data<'a>,
    id: Option<OpId>,
}

enum Data<'a> {
    None,
    From(&'a [Piece<'a>]),
    To(Target<'a>),
}

impl<'a> Operation<'a> {
    pub(super) fn read(file: &'a SimFile, to: Target<'a>, offset: u64) -> Operation<'a> {
        let len = to.len() as u64;
        Operation { file, kind: OpKind::Read, offset, len, data: Data::To(to), id: None }
    }

    pub(super) fn write(file: &'a SimFile, pieces: &'a [Piece<'a>], offset: u64) -> Operation<'a> {
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        Operation { file, kind: OpKind::Write, offset, len, data: Data::From(pieces), id: None }
    }

    pub(super) fn sync(file: &'a SimFile) -> Operation<'a> {
        Operation { file, kind: OpKind::Sync, offset: 0, len: 0, data: Data::None, id: None }
    }

    pub(super) fn zero(file: &'a SimFile, offset: u64, len: u64, mode: ZeroMode) -> Operation<'a> {
        let kind = match mode {
            ZeroMode::Punch => OpKind::Punch,
            ZeroMode::Keep => OpKind::Zero,
        };
        Operation { file, kind, offset, len, data: Data::None, id: None }
    }

    pub(super) fn truncate(file: &'a SimFile, length: u64) -> Operation<'a> {
        let kind = OpKind::Truncate;
        Operation { file, kind, offset: length, len: 0, data: Data::None, id: None }
    }

    /// What is to be issued, with the bytes of a write.
    pub(super) fn prepare(&self) -> Prepared {
        let bytes = match &self.data {
            Data::None => Vec::new(),
            Data::To(_) => vec![0; self.len as usize],
            Data::From(pieces) => gather(pieces),
        };
        let (disk, file) = (self.file.disk.clone(), self.file.index);
        Prepared { disk, file, kind: self.kind, offset: self.offset, len: self.len, bytes }
    }

    /// It was issued elsewhere, as this; or it never will be.
    pub(super) fn is_issued(&mut self, id: Option<OpId>) {
        self.id = id;
    }

    /// Goes on with what was issued elsewhere.
    pub(super) fn resume(&mut self, id: OpId, context: &mut Context<'_>) -> Poll<Result<()>> {
        self.id = Some(id);
        Pin::new(self).poll(context)
    }
}

/// Copies the bytes of a write: what the memory holds later is of no account.
fn gather(pieces: &[Piece<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        let start = bytes.len();
        bytes.resize(start + piece.len(), 0);
        match piece {
            Piece::Guest(memory) => memory.copy_to(0, &mut bytes[start..]),
            Piece::Block(memory) => memory.copy_to(0, &mut bytes[start..]),
            Piece::Zeroes(_) => {}
        }
    }
    bytes
}

impl Future for Operation<'_> {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let this = self.get_mut();
        let id = match this.id {
            Some(id) => id,
            None => {
                let id = this.prepare().issue(None);
                this.id = Some(id);
                id
            }
        };
        let mut world = this.file.disk.world();
        let Some(op) = world.ops.get_mut(&id) else {
            panic!("operation {id} was polled after it had completed");
        };
        let State::Completed(result) = op.state else {
            op.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        let op = world.ops.remove(&id);
        if this.kind == OpKind::Sync && result.is_err() {
            world.files[this.file.index].counters.failed_syncs += 1;
        }
        drop(world);
        if let (Data::To(to), Some(op), Ok(())) = (&this.data, op, result) {
            match to {
                Target::Guest(memory) => memory.copy_from(0, &op.bytes),
                Target::Block(memory) => memory.copy_from(0, &op.bytes),
            }
        }
        Poll::Ready(result.map_err(|errno| {
            let (offset, len) = (this.offset, this.len);
            let what =
                format!("{:?} {} {offset:#x}+{len:#x}, simulated", this.kind, this.file.name());
            Error::os(errno, what)
        }))
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.file.disk.world().abandon(id);
        }
    }
}
