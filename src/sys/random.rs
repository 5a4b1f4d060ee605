//! Random numbers of the operating system.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Error, Result};

/// Fills a buffer with bytes that nobody can guess.
pub fn fill(mut bytes: &mut [u8]) -> Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => bytes = bytes.get_mut(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::os(error.raw_os_error(), "getting random numbers")),
        }
    }
    Ok(())
}
