//! Moving bytes between a descriptor and memory, and asking a device its size.
//!
//! All-or-nothing: EINTR is retried and short transfers are carried on with.
//! One range of memory takes one plain `pread` or `pwrite`; lists go through
//! arrays of iovecs on the stack. Errors are bare errno values: this file knows
//! nothing of storages, names or alignment.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::memory::{GuestMut, GuestRef};

/// The result of a system call: the error is a positive errno.
pub type SysResult<T> = std::result::Result<T, i32>;

/// What a write takes its bytes from.
#[derive(Clone, Copy, Debug)]
pub enum Bytes<'a> {
    /// Memory.
    Memory(GuestRef<'a>),
    /// This many zeroes.
    Zeroes(usize),
}

impl Bytes<'_> {
    /// Number of bytes.
    pub(super) fn len(&self) -> usize {
        match self {
            Bytes::Memory(memory) => memory.len(),
            Bytes::Zeroes(len) => *len,
        }
    }
}

// Offsets are passed on as they are.
const _: () = assert!(size_of::<libc::off_t>() == 8, "needs 64-bit file offsets");

/// Iovecs handed to the kernel at a time.
const BATCH: usize = 64;
/// Bytes handed to the kernel at a time; it takes no more anyway. A multiple of
/// every page size, so that a direct transfer stays aligned. Tests have to meet
/// the limit, too.
pub const MAX_TRANSFER: usize = if cfg!(test) { 1 << 16 } else { 0x7fff_0000 };

/// Zeroes to write, aligned for direct I/O.
#[repr(align(4096))]
struct Zeroes([u8; 64 * 1024]);
static ZEROES: Zeroes = Zeroes([0; 64 * 1024]);

/// Reads `to.len()` bytes; what lies past the end of the file becomes zero.
///
/// `alignment` is that of direct I/O, or 1: a transfer that stops short of it
/// has met the end of the file, and asking for the rest would be refused.
#[inline]
pub fn read(fd: BorrowedFd<'_>, to: GuestMut<'_>, offset: u64, alignment: u32) -> SysResult<()> {
    let len = to.len();
    let Some(ptr) = to.as_single().filter(|_| len <= MAX_TRANSFER) else {
        return read_on(fd, to, offset, alignment, None);
    };
    let got = match faults::next(len) {
        // SAFETY: `to` is ptr..ptr+len, of which `part` is a part or all, writable
        // until this call returns.
        Ok(part) => unsafe { libc::pread(fd.as_raw_fd(), ptr.cast(), part, offset as libc::off_t) },
        Err(failed) => failed,
    };
    if got == len as isize {
        return Ok(());
    }
    read_on(fd, to, offset, alignment, Some(got))
}

/// As `read`, as far as it takes no waiting: whether all bytes were in memory and have
/// been read. If not, nothing is known of what `to` holds.
#[inline]
pub fn read_cached(fd: BorrowedFd<'_>, to: GuestMut<'_>, offset: u64) -> bool {
    let mut batch = Batch::new();
    to.for_each(|ptr, len| _ = batch.push(ptr, len));
    let (count, at) = (batch.count as i32, offset as libc::off_t);
    // SAFETY: the iovecs are parts of `to`, writable until this call returns.
    let got = unsafe { libc::preadv2(fd.as_raw_fd(), batch.as_ptr(), count, at, libc::RWF_NOWAIT) };
    usize::try_from(got).is_ok_and(|got| got == to.len())
}

/// Whether a write through the page cache may have to read first, and wait for that:
/// it covers a page in part that is not in memory.
pub fn write_would_read(fd: BorrowedFd<'_>, offset: u64, length: u64) -> bool {
    /// No page is smaller. Where pages are larger, more is looked at than need be.
    const PAGE: u64 = 4096;
    let end = offset.saturating_add(length);
    let absent = |edge: u64| {
        let mut byte = 0u8;
        let (at, page) = (
            edge as libc::off_t,
            libc::iovec { iov_base: std::ptr::from_mut(&mut byte).cast(), iov_len: 1 },
        );
        // SAFETY: one byte, writable until this call returns.
        let got = unsafe { libc::preadv2(fd.as_raw_fd(), &page, 1, at, libc::RWF_NOWAIT) };
        got < 0 && errno() == libc::EAGAIN
    };
    (offset % PAGE != 0 && absent(offset)) || (end % PAGE != 0 && absent(end))
}

/// Everything but the simple case: lists, short reads, interruptions, the end
/// of the file, errors. `first` is the outcome of a first attempt.
#[inline(never)]
fn read_on(
    fd: BorrowedFd<'_>,
    to: GuestMut<'_>,
    offset: u64,
    alignment: u32,
    mut first: Option<isize>,
) -> SysResult<()> {
    let mut done = 0;
    while done < to.len() {
        let rest = to.sub(done, to.len() - done);
        let count = first.take().unwrap_or_else(|| {
            let mut batch = Batch::new();
            rest.for_each(|ptr, len| _ = batch.push(ptr, len));
            let at = (offset + done as u64) as libc::off_t;
            match faults::next(batch.bytes) {
                Ok(part) => batch.cut(part),
                Err(failed) => return failed,
            }
            // SAFETY: the iovecs are parts of `to`, writable until this call
            // returns.
            unsafe { libc::preadv(fd.as_raw_fd(), batch.as_ptr(), batch.count as i32, at) }
        });
        let Some(got) = transferred(count)? else { continue };
        done += got;
        if got == 0 || got % alignment as usize != 0 {
            to.sub(done, to.len() - done).fill_zero();
            break;
        }
    }
    Ok(())
}

/// Writes the parts one after the other from `offset` on.
///
/// Their lengths must not overflow when added up.
#[inline]
pub fn write<'a>(
    fd: BorrowedFd<'_>,
    parts: impl Iterator<Item = Bytes<'a>> + Clone,
    offset: u64,
) -> SysResult<()> {
    let mut first = parts.clone();
    let only = match (first.next(), first.next()) {
        (Some(Bytes::Memory(from)), None) if from.len() <= MAX_TRANSFER => from,
        _ => return write_on(fd, parts, offset, None),
    };
    let Some(ptr) = only.as_single() else {
        return write_on(fd, parts, offset, None);
    };
    let len = only.len();
    let put = match faults::next(len) {
        // SAFETY: `only` is ptr..ptr+len, of which `part` is a part or all, readable
        // until this call returns.
        Ok(part) => unsafe {
            libc::pwrite(fd.as_raw_fd(), ptr.cast(), part, offset as libc::off_t)
        },
        Err(failed) => failed,
    };
    if put == len as isize {
        return Ok(());
    }
    write_on(fd, parts, offset, Some(put))
}

/// Everything but the simple case. `first` is the outcome of a first attempt.
#[inline(never)]
fn write_on<'a>(
    fd: BorrowedFd<'_>,
    parts: impl Iterator<Item = Bytes<'a>> + Clone,
    offset: u64,
    mut first: Option<isize>,
) -> SysResult<()> {
    let total: usize = parts.clone().map(|part| part.len()).sum();
    let mut done = 0;
    while done < total {
        let count = first.take().unwrap_or_else(|| {
            let mut batch = Batch::new();
            gather(parts.clone(), done, |ptr, len| batch.push(ptr, len));
            let at = (offset + done as u64) as libc::off_t;
            match faults::next(batch.bytes) {
                Ok(part) => batch.cut(part),
                Err(failed) => return failed,
            }
            // SAFETY: the iovecs are parts of the caller's memory or of ZEROES,
            // readable until this call returns.
            unsafe { libc::pwritev(fd.as_raw_fd(), batch.as_ptr(), batch.count as i32, at) }
        });
        match transferred(count)? {
            // Nothing written and no error: not to be tried forever.
            Some(0) => return Err(libc::EIO),
            Some(put) => done += put,
            None => {}
        }
    }
    Ok(())
}

/// What becomes of the next transfer: nothing out of the ordinary.
#[cfg(not(test))]
mod faults {
    /// How many of `len` bytes to ask for.
    #[inline(always)]
    pub fn next(len: usize) -> Result<usize, isize> {
        Ok(len)
    }
}

/// What becomes of the next transfer: what a test says.
#[cfg(test)]
mod faults {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    #[derive(Clone, Copy, Debug)]
    pub enum Fault {
        /// No more than so many bytes are transferred.
        Short(usize),
        /// It fails with this errno.
        Fails(i32),
    }

    thread_local! {
        static PLAN: RefCell<VecDeque<Fault>> = const { RefCell::new(VecDeque::new()) };
    }

    /// The next transfers of this thread, in order; those after are ordinary.
    pub fn plan(faults: impl IntoIterator<Item = Fault>) {
        PLAN.with_borrow_mut(|plan| *plan = faults.into_iter().collect());
    }

    /// How many of those have not happened.
    pub fn left() -> usize {
        PLAN.with_borrow(VecDeque::len)
    }

    /// How many of `len` bytes to ask for, or what the system call returns.
    pub fn next(len: usize) -> Result<usize, isize> {
        match PLAN.with_borrow_mut(VecDeque::pop_front) {
            None => Ok(len),
            Some(Fault::Short(most)) => Ok(len.min(most)),
            Some(Fault::Fails(errno)) => {
                // SAFETY: the address of this thread's errno is always valid.
                unsafe { *libc::__errno_location() = errno };
                Err(-1)
            }
        }
    }
}

/// The outcome of a transfer; `None`: interrupted, to be tried again.
fn transferred(count: isize) -> SysResult<Option<usize>> {
    match usize::try_from(count) {
        Ok(count) => Ok(Some(count)),
        Err(_) => match errno() {
            libc::EINTR => Ok(None),
            errno => Err(errno),
        },
    }
}

/// The calling thread's errno.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Calls `push` with each contiguous range of the parts, without the first
/// `skip` bytes, until it returns false.
pub(super) fn gather<'a>(
    parts: impl Iterator<Item = Bytes<'a>>,
    mut skip: usize,
    mut push: impl FnMut(*mut u8, usize) -> bool,
) {
    for part in parts {
        let mut len = part.len();
        if skip >= len {
            skip -= len;
            continue;
        }
        len -= skip;
        let mut more = true;
        match part {
            Bytes::Memory(from) => from.sub(skip, len).for_each(|ptr, len| {
                more = more && push(ptr, len);
            }),
            Bytes::Zeroes(_) => {
                while more && len > 0 {
                    let now = len.min(ZEROES.0.len());
                    more = push(ZEROES.0.as_ptr().cast_mut(), now);
                    len -= now;
                }
            }
        }
        if !more {
            return;
        }
        skip = 0;
    }
}

/// An array of iovecs on the stack.
struct Batch {
    iovecs: [MaybeUninit<libc::iovec>; BATCH],
    count: usize,
    bytes: usize,
}

impl Batch {
    fn new() -> Batch {
        Batch { iovecs: [MaybeUninit::uninit(); BATCH], count: 0, bytes: 0 }
    }

    /// Adds a range as far as it fits; false: full, the rest must wait.
    fn push(&mut self, ptr: *mut u8, len: usize) -> bool {
        let now = len.min(MAX_TRANSFER - self.bytes);
        if self.count == BATCH || now == 0 {
            return false;
        }
        self.iovecs[self.count].write(libc::iovec { iov_base: ptr.cast(), iov_len: now });
        self.count += 1;
        self.bytes += now;
        now == len
    }

    /// Keeps the first `bytes` only.
    fn cut(&mut self, bytes: usize) {
        while self.bytes > bytes {
            // SAFETY: the first `count` elements have been written.
            let last = unsafe { self.iovecs[self.count - 1].assume_init_mut() };
            let more = self.bytes - bytes;
            if last.iov_len > more {
                last.iov_len -= more;
                self.bytes = bytes;
            } else {
                self.bytes -= last.iov_len;
                self.count -= 1;
            }
        }
    }

    fn as_ptr(&self) -> *const libc::iovec {
        self.iovecs.as_ptr().cast()
    }
}

/// Many parts as one: a list that a [`GuestRef`] stands for.
pub struct Gathered<'a> {
    list: Vec<libc::iovec>,
    _memory: PhantomData<GuestRef<'a>>,
}

impl<'a> Gathered<'a> {
    /// Collects the parts; allocates.
    pub fn new(parts: impl Iterator<Item = Bytes<'a>>) -> Gathered<'a> {
        let mut list = Vec::new();
        gather(parts, 0, |ptr, len| {
            list.push(libc::iovec { iov_base: ptr.cast(), iov_len: len });
            true
        });
        Gathered { list, _memory: PhantomData }
    }

    /// All of it; `None` if it is more than the address space holds.
    pub fn guest(&self) -> Option<GuestRef<'_>> {
        // SAFETY: the array lives as long as the borrow and does not change,
        // the memory behind it lives for 'a, which is longer.
        unsafe { GuestRef::from_iovec(self.list.as_ptr(), self.list.len()) }
    }
}

/// The size of a block device in bytes, asked without moving a file position.
pub fn device_length(fd: BorrowedFd<'_>) -> SysResult<u64> {
    /// `_IOR(0x12, 114, size_t)`: despite the size_t it fills a u64.
    const BLKGETSIZE64: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<usize>(0x12, 114);
    let mut length = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the address.
    let result =
        unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64 as _, std::ptr::from_mut(&mut length)) };
    if result < 0 { Err(errno()) } else { Ok(length) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::faults::Fault;
    use super::*;

    /// Iovecs over the same memory, `count` times.
    fn repeated(memory: &mut [u8], count: usize) -> Vec<libc::iovec> {
        let iov = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
        vec![iov; count]
    }

    #[test]
    fn long_lists_and_long_ranges_are_cut_up() {
        let file = tempfile::tempfile().unwrap();
        // More iovecs than a batch, more bytes than a transfer, and a range that
        // the limit of a transfer falls into.
        for (size, count) in [(1, 1000), (1000, 200), (50_001, 5), (3 * MAX_TRANSFER + 5, 1)] {
            let mut data: Vec<u8> = (0..size).map(|i| i as u8 | 1).collect();
            let list = repeated(&mut data, count);
            // SAFETY: the array and the memory outlive the handle.
            let from = unsafe { GuestRef::from_iovec(list.as_ptr(), count) }.unwrap();
            write(file.as_fd(), [Bytes::Memory(from)].into_iter(), 7).unwrap();
            let mut all = vec![0; size * count];
            read(file.as_fd(), GuestMut::from_slice(&mut all), 7, 1).unwrap();
            assert!(all.chunks(size).all(|chunk| chunk == data), "{size} bytes {count} times");

            let mut back = vec![0; size];
            let list = repeated(&mut back, count);
            // SAFETY: as above; the parts overlap, which a read does not mind.
            let to = unsafe { GuestMut::from_iovec(list.as_ptr(), count) }.unwrap();
            read(file.as_fd(), to, 7, 1).unwrap();
            assert_eq!(back, data);
            file.set_len(0).unwrap();
        }
    }

    #[test]
    fn a_transfer_may_end_inside_any_part() {
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..MAX_TRANSFER + 1000).map(|i| i as u8 | 1).collect();
        let memory = Bytes::Memory(GuestRef::from_slice(&data));
        let zeroes = Bytes::Zeroes(MAX_TRANSFER + 77);
        let parts = [memory, zeroes, memory, memory, zeroes, memory];
        write(file.as_fd(), parts.into_iter(), 3).unwrap();
        let mut expected = Vec::new();
        for part in parts {
            match part {
                Bytes::Memory(_) => expected.extend(&data),
                Bytes::Zeroes(len) => expected.resize(expected.len() + len, 0),
            }
        }
        let mut all = vec![0; expected.len()];
        read(file.as_fd(), GuestMut::from_slice(&mut all), 3, 1).unwrap();
        assert!(all == expected);
    }

    /// Interruptions, and transfers of every length.
    fn interruptions(seed: usize) -> Vec<Fault> {
        let kinds = (0..40).map(|index| match (seed + index) % 3 {
            0 => Fault::Fails(libc::EINTR),
            1 => Fault::Short(1 + (seed * 7919 + index * 104_729) % 3000),
            _ => Fault::Short(1 + (seed + index) % 5),
        });
        kinds.collect()
    }

    #[test]
    fn interrupted_and_short_transfers_are_carried_on_with() {
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..20_000).map(|i| i as u8 | 1).collect();
        for seed in 0..60 {
            let (head, tail) = data.split_at(1 + seed * 300);
            let parts = [
                Bytes::Memory(GuestRef::from_slice(head)),
                Bytes::Zeroes(seed * 40),
                Bytes::Memory(GuestRef::from_slice(tail)),
            ];
            let expected = [head, &vec![0; seed * 40], tail].concat();
            for parts in [&parts[..], &parts[..1]] {
                file.set_len(0).unwrap();
                faults::plan(interruptions(seed));
                write(file.as_fd(), parts.iter().copied(), 9).unwrap();
                assert!(faults::left() < 40, "nothing happened");
                let len: usize = parts.iter().map(Bytes::len).sum();
                let (mut one, mut list) = (vec![1; len], vec![1; len]);
                faults::plan(interruptions(seed + 1));
                read(file.as_fd(), GuestMut::from_slice(&mut one), 9, 1).unwrap();
                let (a, b) = list.split_at_mut(len / 3);
                let iovecs = [a, b].map(|part| libc::iovec {
                    iov_base: part.as_mut_ptr().cast(),
                    iov_len: part.len(),
                });
                // SAFETY: the array and the memory outlive the handle.
                let to = unsafe { GuestMut::from_iovec(iovecs.as_ptr(), 2) }.unwrap();
                faults::plan(interruptions(seed + 2));
                read(file.as_fd(), to, 9, 1).unwrap();
                assert!(one == expected[..len] && list == expected[..len], "seed {seed}");
            }
        }
        faults::plan([]);
    }

    #[test]
    fn errors_after_a_part_are_told() {
        let file = tempfile::tempfile().unwrap();
        let data = [7; 1000];
        let part = Bytes::Memory(GuestRef::from_slice(&data));
        for errno in [libc::ENOSPC, libc::EIO] {
            faults::plan([Fault::Short(300), Fault::Fails(libc::EINTR), Fault::Fails(errno)]);
            assert_eq!(write(file.as_fd(), [part].into_iter(), 0), Err(errno));
            assert_eq!(file.metadata().unwrap().len(), 300);
            faults::plan([Fault::Short(100), Fault::Fails(errno)]);
            let mut back = [0; 300];
            let to = GuestMut::from_slice(&mut back);
            assert_eq!(read(file.as_fd(), to, 0, 1), Err(errno));
            file.set_len(0).unwrap();
        }
        // Nothing written, no error: not for ever.
        faults::plan([Fault::Short(0), Fault::Short(0)]);
        assert_eq!(write(file.as_fd(), [part].into_iter(), 0), Err(libc::EIO));
        faults::plan([]);
    }

    #[test]
    fn a_gathered_list_is_all_of_it() {
        let parts = [
            Bytes::Memory(GuestRef::from_slice(b"abc")),
            Bytes::Zeroes(0),
            Bytes::Zeroes(100_000),
            Bytes::Memory(GuestRef::from_slice(b"de")),
        ];
        let gathered = Gathered::new(parts.into_iter());
        let guest = gathered.guest().unwrap();
        assert_eq!(guest.len(), 100_005);
        let mut out = vec![1; 100_005];
        guest.copy_to(0, &mut out);
        assert_eq!((&out[..4], &out[100_002..]), (&b"abc\0"[..], &b"\0de"[..]));
        assert!(Gathered::new([].into_iter()).guest().unwrap().is_empty());
    }

    #[test]
    fn errors_are_errno_values() {
        let file = tempfile::tempfile().unwrap();
        let reader = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let part = Bytes::Memory(GuestRef::from_slice(b"abc"));
        let refused = write(reader.as_fd(), [part].into_iter(), 0);
        assert_eq!(refused, Err(libc::EBADF));
        let refused = write(reader.as_fd(), [part, part].into_iter(), 0);
        assert_eq!(refused, Err(libc::EBADF));
        let mut bytes = [0; 8];
        let refused = read(file.as_fd(), GuestMut::from_slice(&mut bytes), u64::MAX - 3, 1);
        assert_eq!(refused, Err(libc::EINVAL));
        assert_eq!(device_length(file.as_fd()), Err(libc::ENOTTY));
    }
}
