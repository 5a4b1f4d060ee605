//! Tests of storages on real files, and what they have in common.

mod access;
mod callbacks;
mod direct;
mod locks;
mod ring;
mod transfer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::blocking::Blocking;
use super::engine::{Engine, Piece, Target, ZeroMode};
use super::storage::{Access, Source, Storage};
use super::wait::block_on;
use crate::error::Result;
use crate::sys::memory::{GuestMut, GuestRef};

/// Everything but direct and locked.
const PLAIN: Access = Access {
    writable: true,
    direct: false,
    lock: false,
    no_flush: false,
    fixed_length: false,
    shares_writes: false,
};

/// An empty directory on a file system with direct I/O.
fn direct_dir() -> TempDir {
    let places = [std::env::temp_dir(), PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target")];
    for place in &places {
        let Ok(dir) = tempfile::tempdir_in(place) else { continue };
        let file = dir.path().join("probe");
        std::fs::write(&file, b"").unwrap();
        let access = Access { direct: true, ..PLAIN };
        if Storage::open(Source::path(&file), access).is_ok() {
            std::fs::remove_file(&file).unwrap();
            return dir;
        }
    }
    panic!("no file system with direct I/O at {places:?}: set TMPDIR to one");
}

fn open(path: &Path, access: Access) -> Storage {
    Storage::open(Source::path(path), access).unwrap()
}

fn read(storage: &Storage, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    let to = Target::Guest(GuestMut::from_slice(&mut bytes));
    block_on(storage.read(&Strict, to, offset)).unwrap();
    bytes
}

fn try_write(storage: &Storage, offset: u64, bytes: &[u8]) -> Result<()> {
    let pieces = [Piece::Guest(GuestRef::from_slice(bytes))];
    block_on(storage.write(&Strict, &pieces, offset))
}

fn write(storage: &Storage, offset: u64, bytes: &[u8]) {
    try_write(storage, offset, bytes).unwrap();
}

/// `Blocking`, but makes sure that it is asked for aligned operations only:
/// many file systems take more than they should.
struct Strict;

impl Strict {
    fn check(storage: &Storage, offset: u64, len: usize) {
        let block = u64::from(storage.request_alignment());
        assert_eq!((offset % block, len as u64 % block), (0, 0), "offset {offset} length {len}");
    }

    fn check_memory(storage: &Storage, addresses_fit: impl Fn(usize, usize) -> bool) {
        let memory = storage.buffer_alignment() as usize;
        let request = storage.request_alignment() as usize;
        assert!(addresses_fit(memory, request), "memory is not aligned");
    }
}

impl Engine for Strict {
    async fn read<'a>(&'a self, storage: &'a Storage, to: Target<'a>, offset: u64) -> Result<()> {
        Strict::check(storage, offset, to.len());
        Strict::check_memory(storage, |memory, request| match &to {
            Target::Guest(guest) => guest.is_aligned_for(memory, request),
            Target::Block(block) => block.guest_mut().is_aligned_for(memory, request),
        });
        let result = Blocking.read(storage, to, offset).await;
        // Between reading a block and writing it back: others may come in.
        std::thread::yield_now();
        result
    }

    async fn write<'a>(
        &'a self,
        storage: &'a Storage,
        pieces: &'a [Piece<'a>],
        offset: u64,
    ) -> Result<()> {
        Strict::check(storage, offset, pieces.iter().map(Piece::len).sum());
        for piece in pieces {
            Strict::check_memory(storage, |memory, request| match piece {
                Piece::Guest(guest) => guest.is_aligned_for(memory, request),
                Piece::Block(block) => block.guest_ref().is_aligned_for(memory, request),
                Piece::Zeroes(len) => len % request == 0,
            });
        }
        Blocking.write(storage, pieces, offset).await
    }

    async fn sync<'a>(&'a self, storage: &'a Storage) -> Result<()> {
        Blocking.sync(storage).await
    }

    async fn zero<'a>(
        &'a self,
        storage: &'a Storage,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        Blocking.zero(storage, offset, length, mode).await
    }

    async fn truncate<'a>(&'a self, storage: &'a Storage, length: u64) -> Result<()> {
        Blocking.truncate(storage, length).await
    }
}

/// A small generator of numbers: the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // Xorshift with multiplication, by Vigna.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        // Never zero, so that data and holes differ.
        (0..len).map(|_| (self.next() % 255) as u8 + 1).collect()
    }
}
