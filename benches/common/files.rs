//! The files that stay from run to run: a raw base that is full of data, an image
//! above it and a raw file, both full as well; and what of them is in the page cache.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::Layout;
use super::disk::{self, Disk};
use super::qemu;

/// The disk of runs that allocate.
pub const SPARSE_SIZE: u64 = 4 << 30;
/// The disk of the other runs: everything stays in the page cache.
pub const FULL_SIZE: u64 = 1 << 30;
/// Cluster size of the full image: subclusters are as large as a request.
pub const CLUSTER: u64 = 128 << 10;

/// In one directory.
pub struct Files {
    pub directory: PathBuf,
    /// Full of data; below all overlays.
    pub base: PathBuf,
    /// An overlay that is full of data, used by us and by QEMU.
    pub full: PathBuf,
    /// Where in its file the overlay has the data of its disk, all in one piece.
    pub full_data: u64,
    /// A raw file that is full of data.
    pub raw: PathBuf,
}

impl Files {
    /// Makes them; those that are there from before serve again.
    pub fn make(directory: &Path) -> Files {
        fs::create_dir_all(directory).unwrap_or_else(|error| panic!("{directory:?}: {error}"));
        let directory = fs::canonicalize(directory).expect("it exists");
        let mut files = Files {
            base: directory.join("base.raw"),
            full: directory.join("full.qcow2"),
            full_data: 0,
            raw: directory.join("full.raw"),
            directory,
        };
        for (path, size) in [(&files.base, SPARSE_SIZE), (&files.raw, FULL_SIZE)] {
            if fs::metadata(path).is_ok_and(|found| found.len() == size) {
                continue;
            }
            eprintln!("writing {} ...", path.display());
            let partial = path.with_extension("partial");
            let mut file = File::create(&partial).expect("creates a file");
            chunks(size).for_each(|(_, chunk)| file.write_all(&chunk).expect("writes"));
            file.sync_all().expect("syncs");
            fs::rename(&partial, path).expect("renames");
        }
        // The overlay is always new: as this very library writes it.
        let layout = Layout { size: FULL_SIZE, cluster: CLUSTER, extended: true };
        disk::create(&files.full, &files.base, c"raw", layout);
        let full = Disk::open(&files.full, false, &[]);
        chunks(FULL_SIZE).for_each(|(offset, chunk)| full.write(&chunk, offset));
        full.close();
        files.full_data = qemu::only_extent(&files.full, FULL_SIZE);
        files
    }

    /// Brings the full files into the page cache, all in the same way: the kernel
    /// caches a file in larger or smaller pieces, depending on who brought it, and
    /// takes longer to write to a larger one. Page by page is what a guest's requests
    /// bring.
    pub fn warm(&self) {
        for path in [&self.full, &self.raw] {
            let mut file = drop_cached(path);
            advise(&file, libc::POSIX_FADV_RANDOM);
            let mut chunk = vec![0; 1 << 20];
            while file.read(&mut chunk).expect("reads") > 0 {}
        }
    }

    /// Out of the page cache with them: a direct write would have to do that.
    pub fn chill(&self) {
        [&self.base, &self.full, &self.raw].into_iter().for_each(|path| drop(drop_cached(path)));
    }
}

fn drop_cached(path: &Path) -> File {
    let file = File::open(path).expect("opens");
    file.sync_all().expect("syncs");
    advise(&file, libc::POSIX_FADV_DONTNEED);
    file
}

fn advise(file: &File, advice: i32) {
    // SAFETY: an open descriptor; the rest are numbers.
    let failed = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
    assert_eq!(failed, 0, "the kernel takes advice");
}

/// Bytes that no two blocks share, none of them zero throughout.
fn chunks(size: u64) -> impl Iterator<Item = (u64, Vec<u8>)> {
    const CHUNK: u64 = 1 << 20;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..size / CHUNK).map(move |index| {
        let mut chunk = Vec::with_capacity(CHUNK as usize);
        for _ in 0..CHUNK / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.extend_from_slice(&state.to_le_bytes());
        }
        (index * CHUNK, chunk)
    })
}
