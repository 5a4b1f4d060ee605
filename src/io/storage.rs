//! Where the bytes of an image live.

/// A file, callbacks, or a simulated disk.
pub struct Storage;

/// What a storage is opened from.
pub struct Source;
