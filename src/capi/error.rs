//! Errors: the calling thread's record of its last failure

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_void};

use crate::error::{Error, code, code_name};

/// No finer code than the errno value.
pub const QCOW2RS_E_NONE: u32 = 0;
/// Bad magic; -EINVAL.
pub const QCOW2RS_E_NOT_QCOW2: u32 = 1;
/// The header is malformed; -EINVAL.
pub const QCOW2RS_E_BAD_HEADER: u32 = 2;
/// The version is not 2 or 3; -ENOTSUP.
pub const QCOW2RS_E_UNSUPPORTED_VERSION: u32 = 3;
/// An unknown incompatible feature bit; -ENOTSUP.
pub const QCOW2RS_E_UNSUPPORTED_FEATURE: u32 = 4;
/// The metadata contradicts itself; -EIO.
pub const QCOW2RS_E_CORRUPT: u32 = 5;
/// Marked corrupt, and to be opened read-write; -EROFS.
pub const QCOW2RS_E_MARKED_CORRUPT: u32 = 6;
/// In use by another; -EAGAIN.
pub const QCOW2RS_E_LOCKED: u32 = 7;
/// A file that the image names was refused; -EPERM.
pub const QCOW2RS_E_POLICY: u32 = 8;
/// A limit of the open options is exceeded; -EFBIG.
pub const QCOW2RS_E_LIMIT: u32 = 9;
/// The backing chain is too deep; -ELOOP.
pub const QCOW2RS_E_CHAIN_DEPTH: u32 = 10;
/// The backing file cannot be opened; errno of the cause.
pub const QCOW2RS_E_BACKING: u32 = 11;
/// The data file cannot be opened; errno of the cause.
pub const QCOW2RS_E_DATA_FILE: u32 = 12;
/// No secret, or a wrong one; -EACCES.
pub const QCOW2RS_E_ENCRYPTED: u32 = 13;
/// A callback of the program failed; errno of its own.
pub const QCOW2RS_E_CALLBACK: u32 = 14;
/// An internal bug was caught; -ENOTRECOVERABLE.
pub const QCOW2RS_E_PANIC: u32 = 15;
/// A sync failed, for whatever reason. Sticky: writes and flushes fail until
/// the image is opened again; -EIO.
pub const QCOW2RS_E_FLUSH_FAILED: u32 = 16;
/// Dirty, and the option "repair-dirty" is off; -EUCLEAN.
pub const QCOW2RS_E_DIRTY: u32 = 17;

// The header's numbers are literals; they are those of the crate.
const _: () = {
    assert!(QCOW2RS_E_NONE == code::NONE);
    assert!(QCOW2RS_E_NOT_QCOW2 == code::NOT_QCOW2);
    assert!(QCOW2RS_E_BAD_HEADER == code::BAD_HEADER);
    assert!(QCOW2RS_E_UNSUPPORTED_VERSION == code::UNSUPPORTED_VERSION);
    assert!(QCOW2RS_E_UNSUPPORTED_FEATURE == code::UNSUPPORTED_FEATURE);
    assert!(QCOW2RS_E_CORRUPT == code::CORRUPT);
    assert!(QCOW2RS_E_MARKED_CORRUPT == code::MARKED_CORRUPT);
    assert!(QCOW2RS_E_LOCKED == code::LOCKED);
    assert!(QCOW2RS_E_POLICY == code::POLICY);
    assert!(QCOW2RS_E_LIMIT == code::LIMIT);
    assert!(QCOW2RS_E_CHAIN_DEPTH == code::CHAIN_DEPTH);
    assert!(QCOW2RS_E_BACKING == code::BACKING);
    assert!(QCOW2RS_E_DATA_FILE == code::DATA_FILE);
    assert!(QCOW2RS_E_ENCRYPTED == code::ENCRYPTED);
    assert!(QCOW2RS_E_CALLBACK == code::CALLBACK);
    assert!(QCOW2RS_E_PANIC == code::PANIC);
    assert!(QCOW2RS_E_FLUSH_FAILED == code::FLUSH_FAILED);
    assert!(QCOW2RS_E_DIRTY == code::DIRTY);
};

/// The last failure of a thread.
struct Record {
    code: u32,
    message: CString,
}

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// Makes `error` the calling thread's last failure. A thread that is being torn
/// down keeps no record.
pub(super) fn record(error: &Error) {
    // Messages have their control characters escaped, NUL included.
    let message = CString::new(error.message()).unwrap_or_default();
    let record = Record { code: error.kind().code(), message };
    let _ = RECORD.try_with(|slot| slot.replace(Some(record)));
}

/// [MT][CB] Message of the calling thread's most recent failure, never NULL,
/// "" if none.  UTF-8; untrusted bytes taken from images are escaped.  Valid
/// until the next qcow2rs call of this thread.  Copy it before yielding if
/// coroutines can migrate between threads.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2rs_error_message() -> *const c_char {
    RECORD
        .try_with(|slot| slot.borrow().as_ref().map(|record| record.message.as_ptr()))
        .ok()
        .flatten()
        .unwrap_or(c"".as_ptr())
}

/// [MT][CB] QCOW2RS_E_* of the same failure.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2rs_error_code() -> u32 {
    RECORD
        .try_with(|slot| slot.borrow().as_ref().map(|record| record.code))
        .ok()
        .flatten()
        .unwrap_or(QCOW2RS_E_NONE)
}

/// [MT][CB] Static name of a code, e.g. "corrupt"; "unknown" if unknown.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2rs_error_code_name(code: u32) -> *const c_char {
    code_name(code).as_ptr()
}

/// [MT][CB] Releases memory the library handed out; NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_free(ptr: *mut c_void) {
    // SAFETY: what the library hands out through `char **` comes from malloc
    // (see `Call::hand_out`), and the caller hands it back once.
    unsafe { libc::free(ptr) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: never NULL, and this thread makes no other call meanwhile.
        unsafe { CStr::from_ptr(qcow2rs_error_message()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_thread_has_its_own_record() {
        record(&Error::new(ErrorKind::Policy, "not \u{0} yours"));
        assert_eq!(message(), "not \\u{0} yours");
        assert_eq!(qcow2rs_error_code(), QCOW2RS_E_POLICY);
        std::thread::spawn(|| {
            assert_eq!(message(), "");
            assert_eq!(qcow2rs_error_code(), QCOW2RS_E_NONE);
        })
        .join()
        .unwrap();
        assert_eq!(qcow2rs_error_code(), QCOW2RS_E_POLICY);
    }

    #[test]
    fn a_thread_at_its_end_finds_no_record() {
        struct AtExit;
        impl Drop for AtExit {
            fn drop(&mut self) {
                record(&Error::invalid("lost"));
                let _ = message();
            }
        }
        thread_local!(static LAST: AtExit = const { AtExit });
        std::thread::spawn(|| {
            // Initialised first, so that it is dropped around the record.
            LAST.with(|_| ());
            record(&Error::invalid("kept"));
        })
        .join()
        .unwrap();
    }
}
