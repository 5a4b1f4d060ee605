//! What an internal snapshot shows must never change, whatever is done to the
//! disk: it is remembered, and compared with other code than the driver's.

use std::rc::Rc;

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
    match read_guest(&*file, &Header { l1, ..header }, base) == kept.bytes() {
        true => Ok(()),
        false => Err("I9: the snapshot has changed".to_owned()),
    }
}

/// The snapshots that were taken on the way, and what each has to show.
#[derive(Clone, Default, Debug)]
pub struct Snapshots {
    taken: Vec<(Vec<u8>, Rc<Vec<u8>>)>,
    /// One that is being taken or deleted: it may be there, or not.
    doubtful: Option<Vec<u8>>,
}

impl Snapshots {
    pub fn len(&self) -> usize {
        self.taken.len()
    }

    /// Name and content of one of them.
    pub fn get(&self, index: usize) -> (Vec<u8>, Rc<Vec<u8>>) {
        self.taken[index].clone()
    }

    /// One is about to be taken.
    pub fn begin_taking(&mut self, name: &[u8], content: Vec<u8>) {
        self.taken.push((name.to_vec(), Rc::new(content)));
        self.doubtful = Some(name.to_vec());
    }

    /// One is about to be deleted.
    pub fn begin_deleting(&mut self, name: &[u8]) {
        self.doubtful = Some(name.to_vec());
    }

    /// What was doubtful is not so any more.
    pub fn end(&mut self, there: bool) {
        if let Some(name) = self.doubtful.take().filter(|_| !there) {
            self.taken.retain(|(taken, _)| *taken != name);
        }
    }

    /// An image was opened: what it has now, it has.
    pub fn recover(&mut self, disk: &SimDisk) -> Result<(), String> {
        let file = disk.file("image").expect("there is an image");
        let names = Header::read(&*file)?.read_snapshot_names(&*file);
        if let Some(name) = self.doubtful.clone() {
            self.end(names.contains(&name));
        }
        Ok(())
    }

    /// Whether an image has these snapshots and no other, and they show what they are to.
    pub fn check(&self, disk: &SimDisk) -> Result<(), String> {
        let file = disk.file("image").expect("there is an image");
        let header = Header::read(&*file)?;
        let base = disk.file("base");
        let base = base.as_deref().map(|base| base as &dyn ReadAt);
        let names = header.read_snapshot_names(&*file);
        let (tables, _) = header.read_snapshots(&*file);
        for (name, content) in &self.taken {
            let shown = String::from_utf8_lossy(name);
            match names.iter().position(|found| found == name) {
                None if self.doubtful.as_ref() == Some(name) => {}
                None => return Err(format!("I9: the snapshot {shown} is gone")),
                Some(index) => {
                    let header = Header { l1: tables[index], ..header.clone() };
                    if read_guest(&*file, &header, base) != **content {
                        return Err(format!("I9: the snapshot {shown} has changed"));
                    }
                }
            }
        }
        match names.iter().find(|name| !self.taken.iter().any(|(taken, _)| taken == *name)) {
            Some(name) => Err(format!("I9: snapshot {} is back", String::from_utf8_lossy(name))),
            None => Ok(()),
        }
    }
}
