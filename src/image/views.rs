//! Snapshots of an image that are open beside it: as long as one is, it must not be
//! deleted. What such a snapshot is, and how it is opened, is not known here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::{Error, ErrorKind, Result};
use crate::format::snapshot::Snapshot;

/// One that is open; its disk holds it.
#[derive(Debug)]
pub struct View {
    /// What no two snapshots have in common.
    l1_offset: u64,
    id: Vec<u8>,
}

/// Those that are open, of one image.
#[derive(Default)]
pub struct Views(Mutex<Vec<Weak<View>>>);

impl Views {
    fn list(&self) -> MutexGuard<'_, Vec<Weak<View>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A snapshot is open until what is returned has been dropped.
    pub fn add(&self, snapshot: &Snapshot) -> Arc<View> {
        let view = Arc::new(View { l1_offset: snapshot.l1_offset, id: snapshot.id.clone() });
        let mut list = self.list();
        list.retain(|view| view.strong_count() > 0);
        list.push(Arc::downgrade(&view));
        view
    }

    /// Whether somebody has a snapshot open.
    pub fn has(&self, snapshot: &Snapshot) -> bool {
        let same = |view: Arc<View>| view.l1_offset == snapshot.l1_offset && view.id == snapshot.id;
        self.list().iter().filter_map(Weak::upgrade).any(same)
    }
}

/// What a snapshot that is open is asked for in vain.
pub fn not_for_snapshots(what: &str) -> Error {
    let text = format!("{what}: this is a snapshot, opened beside its image");
    Error::new(ErrorKind::NotSupported, text)
}

/// `NotSupported` where a disk is a snapshot.
pub fn refuse(view: &Option<Arc<View>>, what: &str) -> Result<()> {
    match view {
        None => Ok(()),
        Some(_) => Err(not_for_snapshots(what)),
    }
}
