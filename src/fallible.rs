//! Vectors that an image, an option or a request can make large: where there is no
//! memory for them, an error rather than the end of the process. What is small, or a
//! list that grows one by one, aborts as everywhere in Rust.

use crate::error::{Error, ErrorKind, Result};

/// An empty vector with room for exactly `count` items, or `OutOfMemory`.
pub fn room_for<T>(count: usize) -> Result<Vec<T>> {
    let mut items = Vec::new();
    items.try_reserve_exact(count).map_err(|_| {
        let text = format!("no memory for {count} items of {} bytes", size_of::<T>());
        Error::new(ErrorKind::OutOfMemory, text)
    })?;
    Ok(items)
}

/// The first `count` items, or `OutOfMemory`.
pub fn collect<T>(count: usize, items: impl IntoIterator<Item = T>) -> Result<Vec<T>> {
    let mut all = room_for(count)?;
    all.extend(items.into_iter().take(count));
    Ok(all)
}

/// `count` times the same, or `OutOfMemory`.
pub fn filled<T: Clone>(count: usize, item: T) -> Result<Vec<T>> {
    let mut all = room_for(count)?;
    all.resize(count, item);
    Ok(all)
}

/// A copy, or `OutOfMemory`.
pub fn copy(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut all = room_for(bytes.len())?;
    all.extend_from_slice(bytes);
    Ok(all)
}
