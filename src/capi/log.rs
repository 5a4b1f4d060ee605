//! Log messages

use std::ffi::{CString, c_char, c_void};

use crate::log;

/// The operation cannot go on, or data is in danger.
pub const QCOW2RS_LOG_ERROR: u32 = 1;
/// Something a person should look at.
pub const QCOW2RS_LOG_WARN: u32 = 2;
/// What happens once in the life of an image.
pub const QCOW2RS_LOG_INFO: u32 = 3;
/// What happens now and then.
pub const QCOW2RS_LOG_DEBUG: u32 = 4;
/// What happens with each request.
pub const QCOW2RS_LOG_TRACE: u32 = 5;

const _: () = {
    assert!(QCOW2RS_LOG_ERROR == log::ERROR);
    assert!(QCOW2RS_LOG_WARN == log::WARN);
    assert!(QCOW2RS_LOG_INFO == log::INFO);
    assert!(QCOW2RS_LOG_DEBUG == log::DEBUG);
    assert!(QCOW2RS_LOG_TRACE == log::TRACE);
};

/// Called from any thread, concurrently.  msg is NUL-terminated, no newline,
/// valid during the call.  The callback may make [CB] calls only.
pub type qcow2rs_log_fn = Option<
    unsafe extern "C" fn(
        opaque: *mut c_void,
        level: u32,
        target: *const c_char,
        msg: *const c_char,
    ),
>;

/// The callback's opaque pointer on its way to other threads.
struct Opaque(*mut c_void);
// SAFETY: the library never looks at what it points to, and the header tells
// the program that its callback runs on any thread.
unsafe impl Send for Opaque {}
// SAFETY: as above, concurrently.
unsafe impl Sync for Opaque {}

impl Opaque {
    fn get(&self) -> *mut c_void {
        self.0
    }
}

/// [MT] Process-wide; default: none, nothing is logged.  fn == NULL removes.
/// Returns after the last call of the previous callback has finished, so that
/// its opaque may be released.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_set_log(
    r#fn: qcow2rs_log_fn,
    opaque: *mut c_void,
    max_level: u32,
) {
    entry!(|_call| {
        let opaque = Opaque(opaque);
        let sink = r#fn.map(|callback| -> Box<log::Sink> {
            Box::new(move |level, target, text| {
                let target = CString::new(target).unwrap_or_default();
                let text = CString::new(crate::error::escape(text)).unwrap_or_default();
                // SAFETY: the program gave the function for calls like this one,
                // until another call of qcow2rs_set_log returns; the strings
                // live until the end of this statement.
                unsafe { callback(opaque.get(), level, target.as_ptr(), text.as_ptr()) }
            })
        });
        log::listen(sink, max_level);
        Ok(())
    });
}
