//! The way from C into the crate and back: the wrapper of every entry point.
//!
//! [`entry!`] catches panics, turns an error into a negative errno value and
//! the thread's error record, and gives the entry point a [`Call`], through
//! which the pointers that came from C are looked at. Functions that only
//! return a constant or the record itself cannot fail and go without.
//!
//! Order inside an entry point: handle outputs first (they are NULL on any
//! failure), then the object, then the rest.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_int};
use std::marker::PhantomData;
use std::mem::{size_of, zeroed};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::ptr;
use std::sync::Once;

use crate::error::{Error, ErrorKind, Result};
use crate::log;

/// Runs the body of an entry point: a closure from [`&Call`](Call) to a
/// [`Result`] of what the C function returns.
macro_rules! entry {
    ($body:expr) => {{
        // SAFETY: an entry point hands on what its C caller passed; that each
        // pointer is what the header asks for is the caller's promise.
        let call = unsafe { $crate::capi::entry::Call::new() };
        $crate::capi::entry::run(&call, $body)
    }};
}

/// What an entry point may return, and what it returns on failure.
pub trait Return {
    /// The value for a (positive) errno.
    fn failure(errno: c_int) -> Self;
}

impl Return for c_int {
    fn failure(errno: c_int) -> c_int {
        -errno
    }
}

impl Return for i64 {
    fn failure(errno: c_int) -> i64 {
        -i64::from(errno)
    }
}

impl Return for u32 {
    fn failure(_: c_int) -> u32 {
        0
    }
}

impl Return for () {
    fn failure(_: c_int) {}
}

impl<T> Return for *const T {
    fn failure(_: c_int) -> *const T {
        ptr::null()
    }
}

/// See [`entry!`].
pub fn run<'c, R: Return>(call: &'c Call, body: impl FnOnce(&'c Call) -> Result<R>) -> R {
    let quiet = Quiet::begin();
    // What a panic leaves half done is never seen again: the handles that the
    // body held are poisoned.
    let error = match catch_unwind(AssertUnwindSafe(|| body(call))) {
        Ok(Ok(value)) => return value,
        Ok(Err(error)) => error,
        Err(payload) => caught(payload),
    };
    drop(quiet);
    super::error::record(&error);
    R::failure(error.errno())
}

/// Makes an error of a panic.
#[cold]
fn caught(payload: Box<dyn Any + Send>) -> Error {
    let text = PANIC.with(RefCell::take).unwrap_or_else(|| describe(&*payload, ""));
    // Dropping a payload may panic again; leaking it harms nobody.
    std::mem::forget(payload);
    log::emit(log::ERROR, "capi", || text.clone());
    Error::new(ErrorKind::Panic, text)
}

/// A panic was caught, and told of, further down: its message is no news any more.
pub fn forget_panic() {
    let _ = PANIC.try_with(RefCell::take);
}

fn describe(payload: &(dyn Any + Send), place: &str) -> String {
    let what = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!("internal error{place}: {what}")
}

thread_local! {
    /// How many entry points of ours this thread is inside of.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// What the panic under way is about.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// While it lives, panics of this thread print nothing: the program learns of
/// them by the error record.
struct Quiet(());

impl Quiet {
    #[inline]
    fn begin() -> Quiet {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let others = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                if !remember(info) {
                    others(info);
                }
            }));
        });
        let _ = DEPTH.try_with(|depth| depth.set(depth.get() + 1));
        Quiet(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = DEPTH.try_with(|depth| depth.set(depth.get() - 1));
    }
}

/// Keeps the message of a panic inside an entry point. False for any other one,
/// and for a panic during a panic, which ends the process and had better be
/// printed.
fn remember(info: &PanicHookInfo<'_>) -> bool {
    if DEPTH.try_with(Cell::get).unwrap_or(0) == 0 {
        return false;
    }
    let place = info.location().map(|at| format!(" at {at}")).unwrap_or_default();
    PANIC
        .try_with(|slot| match slot.try_borrow_mut() {
            Ok(mut slot) if slot.is_none() => {
                *slot = Some(describe(info.payload(), &place));
                true
            }
            _ => false,
        })
        .unwrap_or(false)
}

/// Longer than any struct of ours will ever be: such a size is a mistake, and
/// heeding it would overwrite the caller's memory.
pub const MAX_STRUCT: usize = 65536;

/// Checks a flag word: `known` are the bits that the entry point has.
#[inline]
pub fn flags(given: u32, known: u32) -> Result<()> {
    if given & !known == 0 { Ok(()) } else { Err(unknown_flags(given & !known)) }
}

#[cold]
fn unknown_flags(unknown: u32) -> Error {
    Error::invalid(format!("the flag bits {unknown:#x} are unknown here"))
}

/// A call from C: the caller's promise that the pointers it passed are what the
/// header asks for. The methods check what can be checked.
pub struct Call(());

/// A value that the caller gets on success.
pub struct Slot<'c, T>(*mut T, PhantomData<&'c Call>);

impl<T> Slot<'_, T> {
    /// Hands the value over.
    pub fn set(self, value: T) {
        // SAFETY: not NULL, aligned (checked), writable (the caller's promise).
        unsafe { self.0.write(value) }
    }
}

/// A struct that may be shorter or longer in the caller's version of the header.
pub struct Prefix<'c, T>(*mut T, usize, PhantomData<&'c Call>);

impl<T: Copy> Prefix<'_, T> {
    /// Hands over the part that both versions know; the rest of the caller's
    /// struct becomes zero.
    pub fn set(self, value: &T) {
        let known = self.1.min(size_of::<T>());
        let to = self.0.cast::<u8>();
        // SAFETY: `self.1` bytes are writable (the caller's promise), `known` of
        // them readable in `value`; ours and theirs do not overlap.
        unsafe {
            ptr::copy_nonoverlapping(ptr::from_ref(value).cast::<u8>(), to, known);
            ptr::write_bytes(to.add(known), 0, self.1 - known);
        }
    }
}

impl Call {
    /// Use [`entry!`].
    ///
    /// # Safety
    /// All pointers given to this call's methods come from the C caller, who
    /// promises that they are what the header asks for, until the entry point
    /// returns.
    pub unsafe fn new() -> Call {
        Call(())
    }

    /// A pointer that must not be NULL.
    pub fn some<T>(&self, ptr: *const T, name: &str) -> Result<*const T> {
        if ptr.is_null() {
            return Err(Error::invalid(format!("{name} is NULL")));
        }
        if !ptr.is_aligned() {
            return Err(Error::invalid(format!("{name} is misaligned")));
        }
        Ok(ptr)
    }

    /// A string.
    pub fn string(&self, ptr: *const c_char, name: &str) -> Result<&CStr> {
        let ptr = self.some(ptr, name)?;
        // SAFETY: not NULL; NUL-terminated and unchanged during the call (the
        // caller's promise).
        Ok(unsafe { CStr::from_ptr(ptr) })
    }

    /// A string that must be UTF-8.
    pub fn text(&self, ptr: *const c_char, name: &str) -> Result<&str> {
        let string = self.string(ptr, name)?;
        string.to_str().map_err(|_| Error::invalid(format!("{name} is not UTF-8")))
    }

    /// Bytes that nobody changes during the call (a secret; never the guest's
    /// memory). NULL is allowed for none.
    pub fn bytes(&self, ptr: *const u8, len: usize, name: &str) -> Result<&[u8]> {
        if len == 0 {
            return Ok(&[]);
        }
        if isize::try_from(len).is_err() {
            return Err(Error::invalid(format!("{name} is longer than memory")));
        }
        let ptr = self.some(ptr, name)?;
        // SAFETY: not NULL, not too long; readable and unchanged during the
        // call (the caller's promise).
        Ok(unsafe { std::slice::from_raw_parts(ptr, len) })
    }

    /// A value that is written on success only.
    pub fn slot<T>(&self, ptr: *mut T, name: &str) -> Result<Slot<'_, T>> {
        self.some(ptr, name)?;
        Ok(Slot(ptr, PhantomData))
    }

    /// A struct that the library fills in: `size` is the caller's idea of its
    /// size, at least `least`, what its first version had.
    pub fn sized_out<T: Copy>(
        &self,
        ptr: *mut T,
        size: usize,
        least: usize,
        name: &str,
    ) -> Result<Prefix<'_, T>> {
        self.some(ptr, name)?;
        if size < least || size > MAX_STRUCT {
            return Err(Error::invalid(format!("{size} is no size of {name}")));
        }
        Ok(Prefix(ptr, size, PhantomData))
    }

    /// A struct that the library reads: what the caller's version does not
    /// have is zero (`None` for a function), what ours does not have must be.
    ///
    /// # Safety
    /// All zeroes is a valid `T`.
    pub unsafe fn sized_in<T: Copy>(
        &self,
        ptr: *const T,
        size: usize,
        least: usize,
        name: &str,
    ) -> Result<T> {
        self.some(ptr, name)?;
        if size < least || size > MAX_STRUCT {
            return Err(Error::invalid(format!("{size} is no size of {name}")));
        }
        let known = size.min(size_of::<T>());
        // SAFETY: all zeroes is valid (this function's contract).
        let mut value: T = unsafe { zeroed() };
        // SAFETY: `size` bytes are readable (the caller's promise), the first
        // `known` of them fit into `value`.
        let rest = unsafe {
            let from = ptr.cast::<u8>();
            ptr::copy_nonoverlapping(from, ptr::from_mut(&mut value).cast::<u8>(), known);
            std::slice::from_raw_parts(from.add(known), size - known)
        };
        if rest.iter().any(|&byte| byte != 0) {
            return Err(Error::invalid(format!("{name} has members this version does not know")));
        }
        Ok(value)
    }

    /// A copy of `text` and a NUL for the caller, who releases it with
    /// `qcow2rs_free`.
    pub fn hand_out(&self, text: &[u8]) -> Result<*mut c_char> {
        // SAFETY: malloc has no preconditions.
        let copy = unsafe { libc::malloc(text.len() + 1) }.cast::<u8>();
        if copy.is_null() {
            return Err(Error::new(ErrorKind::OutOfMemory, "no memory for a string"));
        }
        // SAFETY: `copy` has room for the text and the NUL, and is fresh.
        unsafe {
            ptr::copy_nonoverlapping(text.as_ptr(), copy, text.len());
            copy.add(text.len()).write(0);
        }
        Ok(copy.cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capi::{QCOW2RS_E_PANIC, qcow2rs_error_code, qcow2rs_error_message, qcow2rs_free};

    fn call() -> Call {
        // SAFETY: the tests hand in pointers to what they own, or wrong ones
        // that the methods must refuse.
        unsafe { Call::new() }
    }

    fn message() -> String {
        // SAFETY: never NULL, and this thread makes no other call meanwhile.
        unsafe { CStr::from_ptr(qcow2rs_error_message()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_an_error_that_says_where() {
        let ret: i64 = entry!(|_call| panic!("number {}", 7));
        assert_eq!(ret, -i64::from(libc::ENOTRECOVERABLE));
        assert_eq!(qcow2rs_error_code(), QCOW2RS_E_PANIC);
        let message = message();
        assert!(message.starts_with("internal error at src/capi/entry.rs:"), "{message}");
        assert!(message.ends_with(": number 7"), "{message}");
    }

    #[test]
    fn a_panic_in_a_payload_is_not_seen() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("twice");
            }
        }
        let ret: c_int = entry!(|_call| std::panic::panic_any(Bomb));
        assert_eq!(ret, -libc::ENOTRECOVERABLE);
        assert!(message().ends_with(": no message"));
    }

    #[test]
    fn failure_by_return_type() {
        let ret: *const u8 = entry!(|_call| Err(Error::invalid("pointer")));
        assert!(ret.is_null());
        assert_eq!(message(), "pointer");
        let () = entry!(|_call| Err(Error::invalid("nothing")));
        assert_eq!(message(), "nothing");
        let ret: c_int = entry!(|_call| Err(Error::os(libc::EBADF, "descriptor")));
        assert_eq!(ret, -libc::EBADF);
    }

    #[test]
    fn pointers_are_looked_at() {
        let mut number = 7_u64;
        let null = ptr::null_mut::<u64>();
        let odd = ptr::from_mut(&mut number).wrapping_byte_add(1);
        let call = call();
        for wrong in [null, odd] {
            assert!(call.some(wrong, "it").is_err());
            assert!(call.slot(wrong, "it").is_err());
            assert!(call.sized_out(wrong, 8, 8, "it").is_err());
            // SAFETY: zero is a number.
            assert!(unsafe { call.sized_in(wrong, 8, 8, "it") }.is_err());
        }
        call.slot(&mut number, "it").unwrap().set(8);
        assert_eq!(number, 8);
        assert!(call.bytes(ptr::null(), 1, "it").is_err());
        assert!(call.bytes(c"x".as_ptr().cast(), usize::MAX, "it").is_err());
        assert_eq!(call.bytes(ptr::null(), 0, "it").unwrap(), b"");
        assert!(call.text(c"\xff".as_ptr(), "it").is_err());
        assert_eq!(call.string(c"\xff".as_ptr(), "it").unwrap(), c"\xff");
    }

    #[test]
    fn a_struct_may_be_of_another_version() {
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq)]
        struct Info {
            first: u64,
            second: u64,
        }
        let info = Info { first: 1, second: 2 };
        let call = call();
        let (old, same, new) = (8, 16, 24);
        for size in [old, same, new] {
            let mut theirs = [9_u64; 4];
            let to = theirs.as_mut_ptr().cast::<Info>();
            call.sized_out(to, size, old, "it").unwrap().set(&info);
            let expected = match size {
                8 => [1, 9, 9, 9],
                16 => [1, 2, 9, 9],
                _ => [1, 2, 0, 9],
            };
            assert_eq!(theirs, expected);
        }
        let mut room = [1_u64, 2, 0, 5];
        let from = room.as_mut_ptr().cast::<Info>();
        assert!(call.sized_out(from, old - 1, old, "it").is_err());

        // SAFETY: zero is a number.
        let read = |size| unsafe { call.sized_in(from, size, old, "it") }.ok();
        assert_eq!(read(old - 1), None);
        assert_eq!(read(old), Some(Info { first: 1, second: 0 }));
        assert_eq!(read(same), Some(info));
        assert_eq!(read(new), Some(info), "an unknown member that is zero");
        assert_eq!(read(new + 8), None, "an unknown member that is set");
    }

    #[test]
    fn a_string_handed_out_is_freed_by_the_caller() {
        let out = call().hand_out(b"a string").unwrap();
        // SAFETY: just made, NUL-terminated, freed once.
        unsafe {
            assert_eq!(CStr::from_ptr(out), c"a string");
            qcow2rs_free(out.cast());
        }
    }
}
