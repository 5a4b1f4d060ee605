//! A file on a simulated disk: what a storage names, and what tests look at.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use super::SimDisk;
use super::content::Content;
use super::journal::OpKind;
use super::pages::{PAGE, Pages};
use super::world::FileState;

/// What a simulated file can do and may be asked.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// Offsets and lengths of reads and writes must be multiples of this, as
    /// in direct I/O.
    pub alignment: u64,
    /// The file is a device: its length is this, for ever; beyond is no space.
    pub device: Option<u64>,
    /// Bytes that the file may occupy, counted in pages of 4096.
    pub space: Option<u64>,
    /// Any operation that changes the file is a violation.
    pub read_only: bool,
    /// Whether holes can be punched.
    pub punch: bool,
    /// Whether ranges can be made zero without giving up their space.
    pub zero: bool,
}

impl Default for FileOptions {
    fn default() -> FileOptions {
        FileOptions {
            alignment: 1,
            device: None,
            space: None,
            read_only: false,
            punch: true,
            zero: true,
        }
    }
}

/// How many operations were issued on a file.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub zeroes: u64,
    pub truncates: u64,
    pub syncs: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// Operations that failed because they were made to.
    pub failed: u64,
    /// Syncs whose failure was heard of.
    pub failed_syncs: u64,
}

impl Counters {
    pub(super) fn count(&mut self, kind: OpKind, len: u64) {
        match kind {
            OpKind::Read => {
                self.reads += 1;
                self.bytes_read += len;
            }
            OpKind::Write => {
                self.writes += 1;
                self.bytes_written += len;
            }
            OpKind::Punch | OpKind::Zero => self.zeroes += 1,
            OpKind::Truncate => self.truncates += 1,
            OpKind::Sync => self.syncs += 1,
        }
    }
}

/// A file of a [`SimDisk`].
#[derive(Clone)]
pub struct SimFile {
    pub(super) disk: SimDisk,
    pub(super) index: usize,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFile({:?})", self.name())
    }
}

impl SimDisk {
    /// Puts an empty file on the disk (zeroes, if it is a device).
    pub fn create(&self, name: &str, options: FileOptions) -> Arc<SimFile> {
        let length = options.device.unwrap_or(0);
        self.put(name, options, Content::settled(Pages::default(), length))
    }

    /// Puts a file with these bytes on the disk; they are durable.
    pub fn create_with(&self, name: &str, options: FileOptions, bytes: &[u8]) -> Arc<SimFile> {
        let mut pages = Pages::default();
        pages.write_data(0, bytes);
        let length = options.device.unwrap_or(bytes.len() as u64);
        self.put(name, options, Content::settled(pages, length))
    }

    /// Puts a copy of a real file on the disk; it is durable.
    pub fn load(
        &self,
        name: &str,
        options: FileOptions,
        path: &Path,
    ) -> std::io::Result<Arc<SimFile>> {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        Ok(self.create_with(name, options, &bytes))
    }

    fn put(&self, name: &str, options: FileOptions, content: Content) -> Arc<SimFile> {
        let mut world = self.world();
        let name = name.to_owned();
        let counters = Counters::default();
        world.files.push(FileState {
            name,
            options,
            content,
            counters,
            owed: None,
            retired: false,
        });
        Arc::new(SimFile { disk: self.clone(), index: world.files.len() - 1 })
    }

    /// The file of this name.
    pub fn file(&self, name: &str) -> Option<Arc<SimFile>> {
        let index = self.world().files.iter().position(|file| file.name == name)?;
        Some(Arc::new(SimFile { disk: self.clone(), index }))
    }
}

impl SimFile {
    fn with<T>(&self, f: impl FnOnce(&mut FileState) -> T) -> T {
        f(&mut self.disk.world().files[self.index])
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.with(|file| file.name.clone())
    }

    /// Its length in bytes, as readers see it.
    pub fn length(&self) -> u64 {
        self.with(|file| file.content.length)
    }

    /// Bytes that it occupies, in pages of 4096.
    pub fn occupied(&self) -> u64 {
        self.with(|file| file.content.visible.count() * PAGE)
    }

    /// What it can do.
    pub fn options(&self) -> FileOptions {
        self.with(|file| file.options.clone())
    }

    /// What its storage must align requests to.
    pub(in crate::io) fn alignment(&self) -> u32 {
        self.with(|file| file.options.alignment as u32)
    }

    /// What its storage must align ranges to that are made zero: devices take
    /// whole blocks only.
    pub(in crate::io) fn zero_alignment(&self) -> u64 {
        self.with(|file| file.options.device.map_or(1, |_| file.options.alignment.max(512)))
    }

    /// Device and inode, so to speak.
    pub(in crate::io) fn identity(&self) -> (u64, u64) {
        (u64::MAX, self.index as u64)
    }

    /// Changes what it can do from now on.
    pub fn set_options(&self, change: impl FnOnce(&mut FileOptions)) {
        self.with(|file| change(&mut file.options));
    }

    /// What has been asked of it.
    pub fn counters(&self) -> Counters {
        self.with(|file| file.counters)
    }

    /// All that its first sector was seen to hold, oldest first, also before the
    /// crash that this disk came from.
    pub fn first_sectors(&self) -> Vec<[u8; 512]> {
        let zeroes = [0; 512];
        let seen = |file: &mut FileState| {
            let firsts = file.content.firsts.iter();
            firsts.map(|first| first.as_ref().map_or(zeroes, |bytes| **bytes)).collect()
        };
        self.with(seen)
    }

    /// It was closed: any operation from now on is a violation.
    pub fn retire(&self) {
        self.with(|file| file.retired = true);
    }

    /// Copies the bytes that readers see, without an operation; zeroes past
    /// the end.
    pub fn peek(&self, offset: u64, out: &mut [u8]) {
        self.with(|file| file.content.visible.read(offset, out));
    }

    /// All the bytes that readers see.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length() as usize];
        self.peek(0, &mut bytes);
        bytes
    }

    /// Whether readers of both see the same bytes.
    pub fn same_bytes(&self, other: &SimFile) -> bool {
        let other = other.with(|file| file.content.clone());
        self.with(|file| file.content.same_bytes(&other))
    }

    /// Writes what readers see to a real file, sparsely.
    pub fn dump(&self, path: &Path) -> std::io::Result<()> {
        let content = self.with(|file| file.content.clone());
        let mut file = File::create(path)?;
        for (offset, bytes) in content.visible.iter() {
            let len = content.length.saturating_sub(offset).min(PAGE);
            file.seek(SeekFrom::Start(offset))?;
            file.write_all(&bytes[..len as usize])?;
        }
        file.set_len(content.length)
    }
}
