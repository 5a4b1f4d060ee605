//! What has gone wrong for good with an image that is open for writing.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::error::{Error, ErrorKind, Result};

/// Sticky failures; only opening the image again clears them.
#[derive(Default)]
pub struct Health {
    corrupt: AtomicBool,
    sync_failed: AtomicBool,
}

impl Health {
    /// Whether writing is still allowed.
    #[inline]
    pub fn check(&self) -> Result<()> {
        self.check_syncs()?;
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
    pub fn check_syncs(&self) -> Result<()> {
        if self.sync_failed.load(SeqCst) {
            return Err(Error::new(
                ErrorKind::FlushFailed,
                "an earlier sync failed, so what is durable is unknown: open the image again",
            ));
        }
        Ok(())
    }

    /// Remembers that a sync failed, and makes the error say so.
    pub fn sync_failed(&self, error: Error) -> Error {
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
