//! How many crash images a test took before it failed.

use std::cell::Cell;

use qcow2rs::io::sim::{Crash, SimDisk};

thread_local! {
    static CRASH_IMAGES: Cell<u64> = const { Cell::new(0) };
}

/// A crash image of the disk as it is now; counted.
pub fn crash_image(disk: &SimDisk, crash: Crash, seed: u64) -> SimDisk {
    CRASH_IMAGES.set(CRASH_IMAGES.get() + 1);
    disk.crash(crash, seed)
}

/// Says, if the test that holds it fails, how many crash images it took.
pub struct ImagesTaken;

impl Drop for ImagesTaken {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("crash images: {}", CRASH_IMAGES.get());
        }
    }
}
