//! What has gone wrong for good with an image that is open for writing; and syncs,
//! whose failures are of that kind.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::error::{Error, ErrorKind, Result};
use crate::io::engine::Engine;
use crate::io::storage::Storage;
use crate::io::wait::AsyncMutex;

/// Sticky failures; only opening the image again clears them.
pub struct Health {
    corrupt: AtomicBool,
    sync_failed: AtomicBool,
    /// Held during a sync.
    syncing: AsyncMutex<()>,
}

impl Default for Health {
    fn default() -> Health {
        Health {
            corrupt: AtomicBool::new(false),
            sync_failed: AtomicBool::new(false),
            syncing: AsyncMutex::new(()),
        }
    }
}

impl Health {
    /// Syncs; a failure is for good. One at a time: the system tells of a failure
    /// once, and a sync beside or after that one would succeed though what it should
    /// have made durable is lost.
    pub async fn sync<E: Engine>(&self, engine: &E, storage: &Storage) -> Result<()> {
        let _one_at_a_time = self.syncing.lock().await;
        mutant!(SyncsSideBySide => drop(_one_at_a_time));
        self.check_syncs()?;
        storage.sync(engine).await.map_err(|error| self.sync_failed(error))
    }

    /// Whether writing is still allowed.
    #[inline]
    pub fn check(&self) -> Result<()> {
        if !mutant!(WritesAfterFailedSync) {
            self.check_syncs()?;
        }
        if self.corrupt.load(SeqCst) {
            return Err(Error::new(
                ErrorKind::Shutdown,
                "the image was found to be corrupt: writes are refused until it is repaired \
                 (qemu-img check -r all)",
            ));
        }
        Ok(())
    }

    /// Whether it is known what is durable.
    fn check_syncs(&self) -> Result<()> {
        if self.sync_failed.load(SeqCst) {
            return Err(Error::new(
                ErrorKind::FlushFailed,
                "an earlier sync failed, so what is durable is unknown: open the image again",
            ));
        }
        Ok(())
    }

    /// Remembers that a sync failed, and makes the error say so.
    fn sync_failed(&self, error: Error) -> Error {
        self.sync_failed.store(!mutant!(SyncFailureForgotten), SeqCst);
        error.wrap_as(ErrorKind::FlushFailed, "sync failed, no more writes until reopened")
    }

    /// Remembers that the image is corrupt; true for the first to say so.
    pub fn set_corrupt(&self) -> bool {
        !self.corrupt.swap(true, SeqCst)
    }

    /// Whether the image was found to be corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.corrupt.load(SeqCst)
    }
}
