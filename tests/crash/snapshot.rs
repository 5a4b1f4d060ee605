//! What an internal snapshot shows must never change, whatever is done to the
//! disk: it is remembered, and compared with other code than the driver's.

use qcow2rs::io::sim::{FileOptions, SimDisk};

use super::layout::{Header, ReadAt, read_guest};
use super::oracle::{Word, fill};
use super::support::builder::Kind;

/// Remembers it, in a file of the disk, if the image has one: all that is there at
/// first.
pub fn keep_snapshot(disk: &SimDisk, kind: &Kind, words: &[Word]) {
    if kind.snapshot {
        let read_only = FileOptions { read_only: true, ..FileOptions::default() };
        disk.create_with("snapshot", read_only, &fill(words.iter().copied()));
    }
}

/// Whether the snapshot of a sound image shows what it has always shown.
pub fn check_snapshot(disk: &SimDisk) -> Result<(), String> {
    let (Some(kept), Some(file)) = (disk.file("snapshot"), disk.file("image")) else {
        return Ok(());
    };
    let header = Header::read(&*file)?;
    let base = disk.file("base");
    let base = base.as_deref().map(|base| base as &dyn ReadAt);
    let (tables, _) = header.read_snapshots(&*file);
    let l1 = tables.first().copied().ok_or("the snapshot is gone")?;
    let (kept, length) = (kept.bytes(), kept.length());
    match read_guest(&*file, &Header { l1, size: length, ..header }, base) == kept {
        true => Ok(()),
        false => Err("I9: the snapshot has changed".to_owned()),
    }
}
