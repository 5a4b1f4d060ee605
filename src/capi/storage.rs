//! Storage objects: where bytes live

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::callbacks::{Program, QCOW2RS_IO_SERIALIZED, qcow2rs_io_ops};
use super::entry::flags;
use super::handle::Handle;
use crate::error::{Error, Result};
use crate::io::callbacks::Callbacks;
use crate::io::storage::Source;

/// A path, a descriptor or callbacks.  Consumed (ownership taken, also on
/// failure) by open and create.
pub struct qcow2rs_storage(Handle<Arc<Source>>);
object!(qcow2rs_storage: Arc<Source>);

/// Paths are bytes.
pub(super) fn path(path: &CStr) -> Result<PathBuf> {
    if path.is_empty() {
        return Err(Error::os(libc::ENOENT, "the path is empty"));
    }
    Ok(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

/// The source for a descriptor of the program's.
pub(super) fn fd(fd: c_int) -> Result<Arc<Source>> {
    if fd < 0 {
        return Err(Error::os(libc::EBADF, format!("there is no descriptor {fd}")));
    }
    // SAFETY: not -1. That it is open is not relied upon: it is duplicated,
    // which fails if it is not, and not used after.
    Source::fd(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// [MT][CB] -ENOENT, -EACCES, ... arise when the storage is opened.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_storage_from_path(
    path: *const c_char,
    out: *mut *mut qcow2rs_storage,
) -> c_int {
    entry!(|call| {
        let out = call.out(out)?;
        out.set(Source::path(self::path(call.string(path, "path")?)?));
        Ok(0)
    })
}

/// [MT][CB] The descriptor is dup()ed with O_CLOEXEC; the caller keeps fd.
/// RDWR needs an fd that can be written, else -EACCES.  The status flags of fd
/// are never changed: OPEN_DIRECT or "backing-direct" that disagree with its
/// O_DIRECT are -EINVAL.  OFD locks belong to the open file description: give
/// each process (and each writer) its own.  The library keeps count by (st_dev,
/// st_ino) in the process: a second read-write open of a file is -EAGAIN
/// (QCOW2RS_E_LOCKED), and the locks go with the last image that uses it.
/// -ENOLCK where the file system has no locks.  -EBADF.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_storage_from_fd(
    fd: c_int,
    out: *mut *mut qcow2rs_storage,
) -> c_int {
    entry!(|call| {
        let out = call.out(out)?;
        out.set(self::fd(fd)?);
        Ok(0)
    })
}

/// [MT][CB] ops is copied. opaque is released by ops->close, also if a later
/// open fails (not if this call does). flags: QCOW2RS_IO_SERIALIZED.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_storage_from_callbacks(
    ops: *const qcow2rs_io_ops,
    opaque: *mut c_void,
    flags: u32,
    out: *mut *mut qcow2rs_storage,
) -> c_int {
    entry!(|call| {
        let out = call.out(out)?;
        self::flags(flags, QCOW2RS_IO_SERIALIZED)?;
        let ops = qcow2rs_io_ops::copy(call, ops)?;
        let serialized = flags & QCOW2RS_IO_SERIALIZED != 0;
        let callbacks = Callbacks::new(Box::new(Program::new(ops, opaque)), serialized);
        out.set(Source::callbacks(callbacks));
        Ok(0)
    })
}

/// [OBJ][CB] For a storage that was not consumed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_storage_free(storage: *mut *mut qcow2rs_storage) {
    entry!(|call| call.take(storage).map(drop))
}
