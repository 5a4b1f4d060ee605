//! Check

use std::ffi::{CString, c_char, c_int, c_void};

use super::entry::flags;
use super::log::{QCOW2RS_LOG_ERROR, QCOW2RS_LOG_WARN};
use super::open::qcow2rs_image;
use crate::check::{CheckResult, Finding, Observer, Severity};
use crate::error::{Error, ErrorKind, escape};

/// Give leaked clusters back.
pub const QCOW2RS_REPAIR_LEAKS: u32 = 1;
/// Mend what is damaged.
pub const QCOW2RS_REPAIR_ERRORS: u32 = 2;

/// What a check has found: the numbers of `qemu-img check`.  Grows at the
/// end.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct qcow2rs_check_result {
    /// What contradicts itself, or is used without being counted.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// Could not be checked.
    pub check_errors: u64,
    /// 0: nothing is repaired yet.
    pub corruptions_fixed: u64,
    /// 0: nothing is repaired yet.
    pub leaks_fixed: u64,
    /// Highest host offset in use.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a place in the image file.
    pub allocated_clusters: u64,
    /// Those that do not follow their neighbour.
    pub fragmented_clusters: u64,
    /// Those that are stored compressed.
    pub compressed_clusters: u64,
}

impl qcow2rs_check_result {
    fn new(result: &CheckResult) -> qcow2rs_check_result {
        qcow2rs_check_result {
            corruptions: result.corruptions,
            leaks: result.leaks,
            check_errors: result.check_errors,
            corruptions_fixed: 0,
            leaks_fixed: 0,
            image_end_offset: result.image_end_offset,
            total_clusters: result.total_clusters,
            allocated_clusters: result.allocated_clusters,
            fragmented_clusters: result.fragmented_clusters,
            compressed_clusters: result.compressed_clusters,
        }
    }
}

/// Called for each finding.  severity: QCOW2RS_LOG_WARN for a leak,
/// QCOW2RS_LOG_ERROR for damage and for what could not be checked.  message is
/// NUL-terminated, no newline, valid during the call.  The callback may make
/// [CB] calls only.
pub type qcow2rs_finding_fn = Option<
    unsafe extern "C" fn(
        opaque: *mut c_void,
        severity: u32,
        host_offset: u64,
        message: *const c_char,
    ),
>;

/// Return 0 to go on, non-zero to cancel: the operation then fails with
/// -ECANCELED, the image consistent.  Runs on the calling thread; total may
/// change; done never decreases.  The callback may make [CB] calls only.
pub type qcow2rs_progress_fn =
    Option<unsafe extern "C" fn(opaque: *mut c_void, done: u64, total: u64) -> c_int>;

/// The program's functions and what they are called with.
struct Program {
    finding: qcow2rs_finding_fn,
    progress: qcow2rs_progress_fn,
    opaque: *mut c_void,
}

// SAFETY: an address that the library never looks at; the functions are called by
// the thread that called the library, before it returns.
unsafe impl Send for Program {}

impl Observer for Program {
    fn finding(&mut self, finding: &Finding) {
        let Some(function) = self.finding else { return };
        let severity = match finding.severity {
            Severity::Leak => QCOW2RS_LOG_WARN,
            Severity::Corruption | Severity::Unchecked => QCOW2RS_LOG_ERROR,
        };
        // Names from images have their control characters escaped, NUL included.
        let message = CString::new(escape(&finding.message)).unwrap_or_default();
        // SAFETY: the program gave the function for calls like this one; the
        // message lives until it returns.
        unsafe { function(self.opaque, severity, finding.host_offset, message.as_ptr()) }
    }

    fn progress(&mut self, done: u64, total: u64) -> bool {
        // SAFETY: the program gave the function for calls like this one.
        self.progress.is_none_or(|function| unsafe { function(self.opaque, done, total) } == 0)
    }
}

/// [EXCL] Returns 0 if the check ran to its end, whatever it found: look at the
/// result.  result_size is sizeof(*result), as in qcow2rs_get_info.  Of a chain
/// this image only; one that is open for writing is flushed first.  finding and
/// progress may be NULL.  flags 0: change nothing; QCOW2RS_REPAIR_*: -EROFS on
/// a read-only image, and -ENOTSUP, for this build does not repair.
/// -ENOTSUP: a RAW image.  -ECANCELED: progress said so.  -EFBIG
/// (QCOW2RS_E_LIMIT): more memory than "max-metadata-size" is needed.  -EIO: a
/// table cannot be read or understood at all; its finding was told.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_check(
    img: *mut qcow2rs_image,
    flags: u32,
    result: *mut qcow2rs_check_result,
    result_size: usize,
    finding: qcow2rs_finding_fn,
    progress: qcow2rs_progress_fn,
    opaque: *mut c_void,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        self::flags(flags, QCOW2RS_REPAIR_LEAKS | QCOW2RS_REPAIR_ERRORS)?;
        let least = size_of::<qcow2rs_check_result>();
        let to = call.sized_out(result, result_size, least, "result")?;
        if flags != 0 {
            return Err(match image.info()?.writable {
                false => Error::new(ErrorKind::ReadOnly, "a read-only image cannot be repaired"),
                true => Error::new(ErrorKind::NotSupported, "this build does not repair images"),
            });
        }
        let mut program = Program { finding, progress, opaque };
        let (result, outcome) = image.check(&mut program);
        outcome?;
        to.set(&qcow2rs_check_result::new(&result));
        Ok(0)
    })
}
