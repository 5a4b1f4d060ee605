//! This library as a C program uses it: the exported functions, by pointers that
//! the optimiser cannot see through. (Linked into one program and optimised as
//! one, they would be faster than any C program's.)

use std::ffi::{CStr, CString, c_int, c_void};
use std::hint::black_box;
use std::path::Path;
use std::ptr;

use qcow2rs::capi::{self, qcow2rs_image, qcow2rs_stats};

use super::pattern::REQUEST;
use super::{Layout, Page};

type Read = unsafe extern "C" fn(*mut qcow2rs_image, *mut c_void, usize, u64, u32) -> c_int;
type Write = unsafe extern "C" fn(*mut qcow2rs_image, *const c_void, usize, u64, u32) -> c_int;

/// An open image.
pub struct Disk {
    image: *mut qcow2rs_image,
    read: Read,
    write: Write,
}

// SAFETY: the functions called on it are [MT]: any thread, any time.
unsafe impl Send for Disk {}
// SAFETY: as above.
unsafe impl Sync for Disk {}

/// The result, if it tells of no error.
pub fn check(result: c_int, doing: &str) -> c_int {
    if result < 0 {
        // SAFETY: never NULL, and valid until the next call of this thread.
        let message = unsafe { CStr::from_ptr(capi::qcow2rs_error_message()) };
        panic!("{doing}: {message:?} ({result})");
    }
    result
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

fn c_path(path: &Path) -> CString {
    c_string(path.to_str().expect("paths are UTF-8"))
}

/// Creates an overlay on a base.
pub fn create(path: &Path, base: &Path, format: &CStr, layout: Layout) {
    let (path, base) = (c_path(path), c_path(base));
    let set = |opts, name: &CStr, value: &str| {
        let value = c_string(value);
        // SAFETY: an open options object and strings.
        check(unsafe { capi::qcow2rs_create_opts_set(opts, name.as_ptr(), value.as_ptr()) }, "set");
    };
    let mut opts = ptr::null_mut();
    // SAFETY: `opts` is a place for the handle; the rest gets that handle and
    // strings; it is freed at the end.
    unsafe {
        check(capi::qcow2rs_create_opts_new(&mut opts), "create options");
        check(capi::qcow2rs_create_opts_set_size(opts, layout.size), "size");
        let backing = capi::qcow2rs_create_opts_set_backing(opts, base.as_ptr(), format.as_ptr());
        check(backing, "backing");
        set(opts, c"cluster_size", &layout.cluster.to_string());
        set(opts, c"extended_l2", if layout.extended { "on" } else { "off" });
        let (no_options, no_handle) = (ptr::null(), ptr::null_mut());
        check(capi::qcow2rs_create_path(path.as_ptr(), 0, opts, no_options, no_handle), "create");
        capi::qcow2rs_create_opts_free(&mut opts);
    }
}

impl Disk {
    /// Opens for reading and writing, with options by name.
    pub fn open(path: &Path, direct: bool, options: &[(&CStr, &str)]) -> Disk {
        let path = c_path(path);
        let mut flags = capi::QCOW2RS_OPEN_RDWR;
        if direct {
            flags |= capi::QCOW2RS_OPEN_DIRECT;
        }
        let mut opts = ptr::null_mut();
        let mut image = ptr::null_mut();
        // SAFETY: places for the two handles; everything else gets those handles
        // and strings; the options are freed at the end.
        unsafe {
            check(capi::qcow2rs_open_opts_new(&mut opts), "open options");
            check(capi::qcow2rs_open_opts_set_flags(opts, flags), "flags");
            let policy = capi::QCOW2RS_REF_PATHS;
            let policy =
                capi::qcow2rs_open_opts_set_ref_policy(opts, policy, None, ptr::null_mut());
            check(policy, "policy");
            for (name, value) in options {
                let value = c_string(value);
                check(capi::qcow2rs_open_opts_set(opts, name.as_ptr(), value.as_ptr()), "option");
            }
            check(capi::qcow2rs_open_path(path.as_ptr(), opts, &mut image), "open");
            capi::qcow2rs_open_opts_free(&mut opts);
        }
        let read = black_box(capi::qcow2rs_pread as Read);
        let write = black_box(capi::qcow2rs_pwrite as Write);
        Disk { image, read, write }
    }

    #[inline]
    pub fn read(&self, to: &mut Page, offset: u64) {
        let to = ptr::from_mut(&mut to.0).cast();
        // SAFETY: an open image and a page of memory.
        check(unsafe { (self.read)(self.image, to, REQUEST as usize, offset, 0) }, "pread");
    }

    #[inline]
    pub fn write(&self, from: &[u8], offset: u64) {
        let (address, length) = (from.as_ptr().cast(), from.len());
        // SAFETY: an open image and the memory of a slice.
        check(unsafe { (self.write)(self.image, address, length, offset, 0) }, "pwrite");
    }

    /// A dirty bitmap records everything from now on; or that is over.
    pub fn record(&self, on: bool) {
        let name = c"bench".as_ptr();
        // SAFETY: an open image, which nobody uses just now, and a string.
        let result = unsafe {
            match on {
                true => capi::qcow2rs_bitmap_add(self.image, name, 0, capi::QCOW2RS_BITMAP_AUTO),
                false => capi::qcow2rs_bitmap_remove(self.image, name),
            }
        };
        check(result, "bitmap");
    }

    /// For functions that are not offered here.
    pub fn handle(&self) -> *mut qcow2rs_image {
        self.image
    }

    pub fn stats(&self) -> qcow2rs_stats {
        let mut stats = qcow2rs_stats::default();
        let size = size_of::<qcow2rs_stats>();
        // SAFETY: an open image, and a struct with its size.
        check(unsafe { capi::qcow2rs_get_stats(self.image, &mut stats, size) }, "stats");
        stats
    }

    pub fn close(mut self) {
        // SAFETY: an open image, which nobody else uses.
        check(unsafe { capi::qcow2rs_close(&mut self.image) }, "close");
    }
}
