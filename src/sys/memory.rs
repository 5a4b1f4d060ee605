//! Memory that I/O reads from and writes to: the caller's, and our own.
//!
//! The caller's memory may be a guest's, which changes it while we look: it
//! never becomes a `&[u8]`, it is only copied and handed to the kernel. Our own
//! buffers are shared with whoever carries out an operation on them, so that
//! dropping a request frees nothing that is still in use. This file knows
//! nothing of storages or images.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ptr::{NonNull, copy_nonoverlapping, write_bytes};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::fallible;

/// Marks memory that a read fills.
#[derive(Clone, Copy, Debug)]
pub enum Fill {}
/// Marks memory that a write takes its data from.
#[derive(Clone, Copy, Debug)]
pub enum Take {}

/// Memory of the caller that a read fills.
pub type GuestMut<'a> = Guest<'a, Fill>;
/// Memory of the caller that a write takes its data from.
pub type GuestRef<'a> = Guest<'a, Take>;

/// A handle on the caller's memory: one range or a list of them (an iovec
/// array), and the part of it that is meant. Copying it copies no data.
#[derive(Debug)]
pub struct Guest<'a, D> {
    base: Base,
    skip: usize,
    len: usize,
    _memory: PhantomData<&'a D>,
}

#[derive(Clone, Copy, Debug)]
enum Base {
    One(*mut u8),
    List(*const libc::iovec, usize),
}

impl<D> Clone for Guest<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D> Copy for Guest<'_, D> {}

// SAFETY: the handle is an address; who may touch the memory, and for how long,
// is promised by whoever made it (a borrow, or the contract of `from_raw`).
unsafe impl<D> Send for Guest<'_, D> {}
// SAFETY: as above; no method needs exclusive access to the handle.
unsafe impl<D> Sync for Guest<'_, D> {}

impl<'a> GuestMut<'a> {
    /// Borrows a Rust buffer.
    pub fn from_slice(buf: &'a mut [u8]) -> GuestMut<'a> {
        Guest { base: Base::One(buf.as_mut_ptr()), skip: 0, len: buf.len(), _memory: PhantomData }
    }

    /// Copies `data` to position `at`.
    pub fn copy_from(self, at: usize, data: &[u8]) {
        let mut done = 0;
        self.sub(at, data.len()).for_each(|ptr, len| {
            // SAFETY: ptr..ptr+len is the caller's writable memory; `done + len`
            // never exceeds data.len(), the length of the part.
            unsafe { copy_nonoverlapping(data.as_ptr().add(done), ptr, len) };
            done += len;
        });
    }

    /// Copies all of `from` to the start of this, which must be as long.
    pub fn copy_guest(self, from: GuestRef<'_>) {
        let mut done = 0;
        self.sub(0, from.len()).for_each(|to, len| {
            let mut at = 0;
            from.sub(done, len).for_each(|ptr, len| {
                // SAFETY: both are the callers' memory, which may overlap; `at
                // + len` never exceeds the range that `to` begins.
                unsafe { std::ptr::copy(ptr, to.add(at), len) };
                at += len;
            });
            done += len;
        });
    }

    /// Fills all of it with zeroes.
    pub fn fill_zero(self) {
        // SAFETY: ptr..ptr+len is the caller's writable memory.
        self.for_each(|ptr, len| unsafe { write_bytes(ptr, 0, len) });
    }
}

impl<'a> GuestRef<'a> {
    /// Borrows a Rust buffer.
    pub fn from_slice(buf: &'a [u8]) -> GuestRef<'a> {
        // The pointer is only read through: no method of GuestRef writes.
        let ptr = buf.as_ptr().cast_mut();
        Guest { base: Base::One(ptr), skip: 0, len: buf.len(), _memory: PhantomData }
    }

    /// Copies from position `at` into `data`.
    pub fn copy_to(self, at: usize, data: &mut [u8]) {
        let mut done = 0;
        let out = data.as_mut_ptr();
        self.sub(at, data.len()).for_each(|ptr, len| {
            // SAFETY: ptr..ptr+len is the caller's readable memory; `done + len`
            // never exceeds data.len(), the length of the part.
            unsafe { copy_nonoverlapping(ptr, out.add(done), len) };
            done += len;
        });
    }
}

impl<'a, D> Guest<'a, D> {
    /// A range of memory by address.
    ///
    /// # Safety
    /// `ptr..ptr + len` stays readable (and, for `GuestMut`, writable) until
    /// every operation on this handle and its copies has completed.
    pub unsafe fn from_raw(ptr: *mut u8, len: usize) -> Guest<'a, D> {
        Guest { base: Base::One(ptr), skip: 0, len, _memory: PhantomData }
    }

    /// A list of ranges, in the C way; `None` if their lengths overflow.
    ///
    /// # Safety
    /// As for `from_raw`, for each range and for the array itself; the array
    /// must not change meanwhile.
    pub unsafe fn from_iovec(iov: *const libc::iovec, count: usize) -> Option<Guest<'a, D>> {
        let mut len = 0usize;
        for i in 0..count {
            // SAFETY: i < count, and the caller vouches for the array.
            len = len.checked_add(unsafe { (*iov.add(i)).iov_len })?;
        }
        if count == 1 {
            // SAFETY: count == 1, so the first element is there.
            let base = unsafe { (*iov).iov_base }.cast();
            return Some(Guest { base: Base::One(base), skip: 0, len, _memory: PhantomData });
        }
        Some(Guest { base: Base::List(iov, count), skip: 0, len, _memory: PhantomData })
    }

    /// Number of bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The part of `len` bytes from `at` on. Asking for more than there is
    /// would be a bug of this crate: it panics rather than touch foreign memory.
    pub fn sub(self, at: usize, len: usize) -> Self {
        assert!(at <= self.len && len <= self.len - at, "part of guest memory out of range");
        Guest { skip: self.skip + at, len, ..self }
    }

    /// Whether every range begins and ends at a multiple of `alignment`.
    pub fn is_aligned(self, alignment: usize) -> bool {
        let mut aligned = true;
        self.for_each(|ptr, len| aligned &= is_multiple(ptr as usize | len, alignment));
        aligned
    }

    /// Whether every range begins at a multiple of `address` and is a multiple
    /// of `length` long; both are powers of two.
    pub fn is_aligned_for(self, address: usize, length: usize) -> bool {
        let mut aligned = true;
        self.for_each(|ptr, len| {
            aligned &= is_multiple(ptr as usize, address);
            aligned &= is_multiple(len, length);
        });
        aligned
    }

    /// Calls `f` with each contiguous range, in order.
    pub(crate) fn for_each(self, mut f: impl FnMut(*mut u8, usize)) {
        let (mut skip, mut left) = (self.skip, self.len);
        match self.base {
            Base::One(ptr) => {
                if left > 0 {
                    f(ptr.wrapping_add(skip), left);
                }
            }
            Base::List(iov, count) => {
                for i in 0..count {
                    if left == 0 {
                        break;
                    }
                    // SAFETY: i < count; the array is valid by `from_iovec`.
                    let range = unsafe { *iov.add(i) };
                    if skip >= range.iov_len {
                        skip -= range.iov_len;
                        continue;
                    }
                    let len = left.min(range.iov_len - skip);
                    f(range.iov_base.cast::<u8>().wrapping_add(skip), len);
                    skip = 0;
                    left -= len;
                }
            }
        }
    }

    /// The address, where it is one range: the common case, made cheap.
    pub(crate) fn as_single(self) -> Option<*mut u8> {
        match self.base {
            Base::One(ptr) => Some(ptr.wrapping_add(self.skip)),
            Base::List(..) => None,
        }
    }
}

/// Whether a number is a multiple of a power of two.
fn is_multiple(number: usize, power: usize) -> bool {
    number & (power - 1) == 0
}

/// Alignment of our own buffers: enough for O_DIRECT on any device.
pub const BLOCK_ALIGNMENT: usize = 4096;

/// A buffer of ours, zeroed and aligned for O_DIRECT. Clones share the bytes:
/// an operation keeps one, so the memory outlives whoever asked for it.
#[derive(Clone, Debug)]
pub struct Block(Arc<Allocation>);

#[derive(Debug)]
struct Allocation {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain bytes, reached through raw copies only.
unsafe impl Send for Allocation {}
// SAFETY: as above: two threads copying at once may see torn bytes, which is
// what sharing a buffer with a device means; no reference is ever made.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        #[cfg(feature = "sim")]
        LIVE_BLOCKS.with(|count| count.set(count.get() - 1));
        // SAFETY: allocated in `Block::zeroed` with this very layout.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

#[cfg(feature = "sim")]
thread_local! {
    static LIVE_BLOCKS: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
}

/// Blocks made on this thread, less those that went away on it: a simulation, which
/// has one thread, sees by it whether each was given back.
#[cfg(feature = "sim")]
pub fn live_blocks() -> i64 {
    LIVE_BLOCKS.with(std::cell::Cell::get)
}

impl Block {
    /// A new buffer of `len` zero bytes. `OutOfMemory` rather than an abort.
    pub fn zeroed(len: usize) -> Result<Block> {
        let no_memory = || Error::new(ErrorKind::OutOfMemory, format!("no memory for {len} bytes"));
        let layout =
            Layout::from_size_align(len.max(1), BLOCK_ALIGNMENT).map_err(|_| no_memory())?;
        // SAFETY: the layout's size is not zero.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(no_memory)?;
        #[cfg(feature = "sim")]
        LIVE_BLOCKS.with(|count| count.set(count.get() + 1));
        Ok(Block(Arc::new(Allocation { ptr, layout })))
    }

    /// A new buffer with these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Block> {
        let block = Block::zeroed(bytes.len())?;
        block.all().sub(0, bytes.len()).copy_from(0, bytes);
        Ok(block)
    }

    /// The bytes, for who has the buffer alone; if somebody still has a part of it, this
    /// becomes a copy first. `OutOfMemory`.
    pub fn make_own(&mut self) -> Result<&mut [u8]> {
        if Arc::get_mut(&mut self.0).is_none() {
            *self = Block::from_bytes(&self.all().to_vec()?)?;
        }
        let (ptr, len) = (self.0.ptr, self.0.layout.size());
        // SAFETY: `len` initialised bytes, which live as long as the block. Nobody else
        // has the block or a slice of it, and whoever gets one by `self` later ends this
        // borrow; an operation on it would have kept a slice.
        Ok(unsafe { std::slice::from_raw_parts_mut(ptr.as_ptr(), len) })
    }

    /// All of it.
    pub fn all(&self) -> BlockSlice {
        BlockSlice { block: self.clone(), start: 0, len: self.0.layout.size() }
    }

    /// `len` bytes from `start` on.
    pub fn slice(&self, start: usize, len: usize) -> BlockSlice {
        self.all().sub(start, len)
    }
}

/// A part of a [`Block`].
#[derive(Clone, Debug)]
pub struct BlockSlice {
    block: Block,
    start: usize,
    len: usize,
}

impl BlockSlice {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part of `len` bytes from `at` on; panics if it is not there.
    pub fn sub(&self, at: usize, len: usize) -> BlockSlice {
        assert!(at <= self.len && len <= self.len - at, "part of a block out of range");
        BlockSlice { block: self.block.clone(), start: self.start + at, len }
    }

    /// Copies `data` to position `at`.
    pub fn copy_from(&self, at: usize, data: &[u8]) {
        self.guest_mut().copy_from(at, data);
    }

    /// Copies from position `at` into `data`.
    pub fn copy_to(&self, at: usize, data: &mut [u8]) {
        self.guest_ref().copy_to(at, data);
    }

    /// Fills all of it with zeroes.
    pub fn fill_zero(&self) {
        self.guest_mut().fill_zero();
    }

    /// A copy of the bytes; `OutOfMemory`.
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let mut bytes = fallible::filled(self.len, 0)?;
        self.copy_to(0, &mut bytes);
        Ok(bytes)
    }

    /// The same memory as a read's destination; lives as long as the borrow.
    pub fn guest_mut(&self) -> GuestMut<'_> {
        // SAFETY: inside the allocation, which `self` keeps alive.
        unsafe { Guest::from_raw(self.as_ptr(), self.len) }
    }

    /// The same memory as a write's source; lives as long as the borrow.
    pub fn guest_ref(&self) -> GuestRef<'_> {
        // SAFETY: inside the allocation, which `self` keeps alive.
        unsafe { Guest::from_raw(self.as_ptr(), self.len) }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.block.0.ptr.as_ptr().wrapping_add(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iovec_parts_are_found() {
        let mut bytes = *b"abcdefghij";
        let base = bytes.as_mut_ptr();
        let part =
            |at: usize, len| libc::iovec { iov_base: base.wrapping_add(at).cast(), iov_len: len };
        let iov = [part(0, 3), part(3, 0), part(3, 4), part(7, 3)];
        // SAFETY: the array and the bytes outlive the handle.
        let guest: GuestRef<'_> = unsafe { Guest::from_iovec(iov.as_ptr(), iov.len()) }.unwrap();
        assert_eq!(guest.len(), 10);
        for at in 0..10 {
            for len in 0..=10 - at {
                let mut out = vec![0; len];
                guest.sub(at, len).copy_to(0, &mut out);
                assert_eq!(out, b"abcdefghij"[at..at + len]);
            }
        }
    }

    #[test]
    fn overlong_iovec_is_refused() {
        let iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: usize::MAX }; 2];
        // SAFETY: only the lengths are looked at.
        let guest = unsafe { GuestRef::from_iovec(iov.as_ptr(), iov.len()) };
        assert!(guest.is_none());
    }

    #[test]
    fn a_block_that_is_shared_is_copied_before_it_changes() {
        let mut block = Block::from_bytes(b"abc").unwrap();
        let address = block.all().as_ptr();
        assert_eq!(block.make_own().unwrap(), b"abc");
        assert_eq!(block.all().as_ptr(), address);
        let other = block.slice(1, 2);
        block.make_own().unwrap()[1] = b'x';
        assert_eq!(other.to_vec().unwrap(), b"bc");
        assert_eq!(block.slice(0, 3).to_vec().unwrap(), b"axc");
    }

    #[test]
    fn blocks_are_zeroed_aligned_and_shared() {
        let block = Block::zeroed(5000).unwrap();
        assert_eq!(block.all().as_ptr() as usize % BLOCK_ALIGNMENT, 0);
        assert_eq!(block.all().to_vec().unwrap(), vec![0; 5000]);
        let part = block.slice(100, 10);
        part.copy_from(0, b"0123456789");
        drop(part);
        assert_eq!(block.slice(100, 10).to_vec().unwrap(), b"0123456789");
        assert!(Block::zeroed(isize::MAX as usize).is_err());
    }
}
