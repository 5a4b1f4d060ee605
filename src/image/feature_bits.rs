//! The feature bits that change while an image is open for writing: dirty and
//! corrupt. What is written here is one word of the header; what has to be durable
//! before or after it is for `writeback` to know.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::qcow2::{Qcow2, Writing};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, incompatible};
use crate::io::engine::{Engine, Piece};
use crate::io::storage::Storage;
use crate::io::wait::AsyncMutex;
use crate::log;
use crate::sys::memory::Block;

/// The incompatible feature bits of an image that is open for writing.
pub struct FeatureBits {
    word: AtomicU64,
    /// Held by whoever writes the word.
    writing: AsyncMutex<()>,
}

impl FeatureBits {
    /// As they are in the image.
    pub fn new(word: u64) -> FeatureBits {
        FeatureBits { word: AtomicU64::new(word), writing: AsyncMutex::new(()) }
    }

    /// As they are now.
    pub fn get(&self) -> u64 {
        self.word.load(SeqCst)
    }

    /// Whether the image is sure to be marked dirty, once there has been a sync.
    pub fn dirty(&self) -> bool {
        self.get() & incompatible::DIRTY != 0
    }
}

/// Writes the incompatible feature bits; does not sync.
pub async fn write_incompatible<E: Engine>(engine: &E, storage: &Storage, bits: u64) -> Result<()> {
    write_word(engine, storage, bits, Header::INCOMPATIBLE_AT).await
}

/// Writes one word of the header; does not sync.
pub async fn write_word<E: Engine>(
    engine: &E,
    storage: &Storage,
    word: u64,
    offset: u64,
) -> Result<()> {
    let block = Block::from_bytes(&word.to_be_bytes())?;
    storage.write(engine, &[Piece::Block(block.slice(0, 8))], offset).await
}

impl Qcow2 {
    /// The incompatible feature bits as they are now.
    pub fn incompatible(&self) -> u64 {
        let Some(writing) = &self.writing else { return self.header.incompatible };
        let corrupt = writing.allocator.health.is_corrupt();
        writing.features.get() | if corrupt { incompatible::CORRUPT } else { 0 }
    }

    /// Says in the image that its refcounts may be stale; durable with the next sync,
    /// which is owed if this returns true.
    pub(crate) async fn mark_dirty<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
    ) -> Result<bool> {
        let features = &writing.features;
        if features.dirty() {
            return Ok(false);
        }
        let _alone = features.writing.lock().await;
        write_incompatible(engine, &self.storage, features.get() | incompatible::DIRTY).await?;
        features.word.fetch_or(incompatible::DIRTY, SeqCst);
        Ok(true)
    }

    /// Takes that back, durably: all refcounts are right, and durable.
    pub(crate) async fn mark_clean<E: Engine>(&self, engine: &E, writing: &Writing) -> Result<()> {
        let features = &writing.features;
        let _alone = features.writing.lock().await;
        // Forgotten first: should this fail half way, it is set again when need be.
        features.word.fetch_and(!incompatible::DIRTY, SeqCst);
        write_incompatible(engine, &self.storage, features.get()).await?;
        writing.allocator.barrier(engine, &self.storage).await
    }

    /// If the error tells of corruption: no more writes, and the image says so on
    /// disk (where its version can), so that nobody else writes to it either.
    pub async fn note_corruption<E: Engine>(&self, engine: &E, error: Error) -> Error {
        let Some(writing) = &self.writing else { return error };
        if error.kind() != ErrorKind::Corrupt || !writing.allocator.health.set_corrupt() {
            return error;
        }
        log::emit(log::ERROR, "image", || {
            format!("{}: marked as corrupt: {error}", self.storage.name())
        });
        if self.format.version >= 3 && !mutant!(CorruptBitNotSet) {
            let features = &writing.features;
            let _alone = features.writing.lock().await;
            let bits = features.word.fetch_or(incompatible::CORRUPT, SeqCst);
            // The error that led here matters more than one from writing it down.
            if write_incompatible(engine, &self.storage, bits | incompatible::CORRUPT).await.is_ok()
            {
                let _ = writing.allocator.barrier(engine, &self.storage).await;
            }
        }
        error
    }
}
