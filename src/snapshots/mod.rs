//! Internal snapshots of an image: listing, taking, applying, deleting, renaming them,
//! and opening one beside the image.
//!
//! `operation` knows the order on disk that all changes share; `create`, `delete` and
//! `apply` (and `expand`, for amending) each know what is to change; `tables` walks L1 and L2 tables, `list` knows
//! names and IDs. Not known here: how refcounts are stored, who is inside an image.

mod apply;
mod create;
pub(crate) mod delete;
mod expand;
pub(crate) mod list;
mod open;
pub(crate) mod operation;
pub(crate) mod tables;

use std::time::{SystemTime, UNIX_EPOCH};

pub use self::operation::Changed;
use crate::error::{Error, ErrorKind, Result};
use crate::format::snapshot::Snapshot;
use crate::image::handle::Image;
use crate::io::blocking::Blocking;
use crate::io::engine::{Piece, Target};
use crate::io::wait::block_on;
use crate::sys::memory::{GuestMut, GuestRef};

/// What is known of an internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its ID, usually a decimal number.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// Size of its virtual disk in bytes.
    pub virtual_size: u64,
    /// What the program that took it has recorded.
    pub meta: Meta,
}

/// What the program that takes a snapshot records of its moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Bytes of VM state; 0: none.
    pub vm_state_size: u64,
    /// Seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds of that second.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The guest's instruction count, if it was recorded.
    pub icount: Option<u64>,
}

impl Meta {
    /// Now, no VM state.
    pub fn now() -> Meta {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Meta {
            // Where 32 bits end, in 2106, the format does.
            date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_nsec: now.subsec_nanos(),
            ..Meta::default()
        }
    }

    fn of(snapshot: &Snapshot) -> Meta {
        Meta {
            vm_state_size: snapshot.vm_state_size,
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
            vm_clock_nsec: snapshot.vm_clock_nsec,
            icount: snapshot.icount,
        }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            vm_state_size: self.vm_state_size,
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: self.icount,
            ..Snapshot::default()
        }
    }
}

/// Those that change something need the image alone: `Busy` if another call is in
/// progress, or a request of a queue in flight; `ReadOnly`; `NotSupported` for raw
/// images. Counters of the image (`stats`) start again with them. After an error other
/// than one named there, the list tells whether the change took place; should the image
/// not be readable then, it is closed.
impl Image {
    /// Number of internal snapshots; 0 for a snapshot that is open itself.
    /// `NotSupported` for raw images.
    pub fn snapshot_count(&self) -> Result<u32> {
        let raw = || Error::new(ErrorKind::NotSupported, "raw images have no internal snapshots");
        Ok(self.info()?.qcow2.ok_or_else(raw)?.snapshot_count)
    }

    /// One of the internal snapshots, in the order of the table. `NotFound` where there
    /// are not that many; `NotSupported` for raw images; `Corrupt` where the table is malformed; `Limit`.
    pub fn snapshot(&self, index: u32) -> Result<SnapshotInfo> {
        self.inside(|disk| {
            let none = || Error::new(ErrorKind::NotFound, format!("there is no snapshot {index}"));
            if disk.view.is_some() {
                return Err(none());
            }
            let table = block_on(disk.snapshot_table(&Blocking))?;
            let snapshot = table.list.get(index as usize).ok_or_else(none)?;
            Ok(SnapshotInfo {
                id: snapshot.id.clone(),
                name: snapshot.name.clone(),
                virtual_size: snapshot.disk_size.unwrap_or(disk.size()),
                meta: Meta::of(snapshot),
            })
        })
    }

    /// Takes a snapshot; returns its ID, which is one more than the highest there is.
    /// Durable on return. VM state, if `meta` tells of some, is the snapshot's from now
    /// on.
    ///
    /// Errors: `Exists`; `InvalidArgument` for a name that is empty, longer than 255
    /// bytes or has a zero byte, and where the refcounts of the image have no room for
    /// one more reference; `Os(EFBIG)` past the limits of 65,536 snapshots and 64 MiB of
    /// their table; `Limit` where "max-metadata-size" does not suffice to count the
    /// image; `NoSpace`. After any of these the image is as it was.
    pub fn snapshot_create(&self, name: &[u8], meta: &Meta) -> Result<Vec<u8>> {
        self.snapshot_create_if(name, meta, |_| Ok(()))
    }

    /// As `snapshot_create`, if `check_id` likes the ID.
    pub(crate) fn snapshot_create_if(
        &self,
        name: &[u8],
        meta: &Meta,
        check_id: impl Fn(&[u8]) -> Result<()> + Send,
    ) -> Result<Vec<u8>> {
        self.alter(|disk| block_on(disk.snapshot_create(&Blocking, name, meta, check_id)).into())
    }

    /// Replaces the active state, its size included, by that of a snapshot, which stays.
    /// `id_or_name`: the ID is tried first. Durable on return.
    ///
    /// Errors: `NotFound`; `NotSupported` for a snapshot of another size in a version 2
    /// image or beside bitmaps, and where a bitmap records changes; `InvalidArgument`, `Limit` and `NoSpace` as for
    /// `snapshot_create`. After any of these the image is as it was.
    pub fn snapshot_apply(&self, id_or_name: &[u8]) -> Result<()> {
        self.alter(|disk| block_on(disk.snapshot_apply(&Blocking, id_or_name)).into())
    }

    /// Deletes a snapshot; what it alone had is free, and punched out unless the image
    /// was opened without that (`discard_snapshots`). Durable on return.
    ///
    /// Errors: `NotFound`; `Busy` if it is open; `Limit` and `NoSpace` as for
    /// `snapshot_create`. After any of these the image is as it was.
    pub fn snapshot_delete(&self, id_or_name: &[u8]) -> Result<()> {
        self.alter(|disk| {
            let is_open = |snapshot: &Snapshot| self.views().has(snapshot);
            block_on(disk.snapshot_delete(&Blocking, id_or_name, is_open)).into()
        })
    }

    /// Opens a snapshot read-only, as an image of its own, beside this one: it keeps
    /// the storage and what is below alive, this image can be written to, or be closed,
    /// and only deleting the snapshot is refused until it is closed. It cannot be
    /// reopened or checked.
    ///
    /// Errors: `NotFound`; `Corrupt`, `Limit`.
    pub fn snapshot_open(&self, id_or_name: &[u8]) -> Result<Image> {
        self.inside(|disk| {
            let (mut opened, snapshot) = block_on(disk.snapshot_open(&Blocking, id_or_name))?;
            opened.view = Some(self.views().add(snapshot));
            Ok(Image::from_disk(opened))
        })
    }

    /// Reads VM state, of the active image or of a snapshot that is open: bytes of their
    /// own, apart from the disk. What was never written is zero. `NotSupported` for raw
    /// images; `InvalidArgument` past all that can be.
    pub fn read_vm_state(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_vm_state_guest(GuestMut::from_slice(buf), offset)
    }

    /// As `read_vm_state`, into the caller's memory by handle.
    pub(crate) fn read_vm_state_guest(&self, to: GuestMut<'_>, offset: u64) -> Result<()> {
        let to = Target::Guest(to);
        self.inside(|disk| self.block(disk.read_vm_state(&Blocking, to, offset)))
    }

    /// Writes VM state of the active image; durable with the next flush. The next
    /// `snapshot_create` whose `meta` tells of VM state takes it. `ReadOnly`,
    /// `NotSupported`; `Os(EFBIG)` past all that can be.
    pub fn write_vm_state(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_vm_state_guest(GuestRef::from_slice(buf), offset)
    }

    /// As `write_vm_state`, from the caller's memory by handle.
    pub(crate) fn write_vm_state_guest(&self, from: GuestRef<'_>, offset: u64) -> Result<()> {
        let from = Piece::Guest(from);
        self.inside(|disk| self.block(disk.write_vm_state(&Blocking, from, offset)))
    }

    /// Gives a snapshot another name. Durable on return. `NotFound`; `Exists`,
    /// `InvalidArgument`, `Os(EFBIG)` and `NoSpace` as for `snapshot_create`.
    pub fn snapshot_rename(&self, id_or_name: &[u8], new_name: &[u8]) -> Result<()> {
        self.alter(|disk| block_on(disk.snapshot_rename(&Blocking, id_or_name, new_name)).into())
    }
}
