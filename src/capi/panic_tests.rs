//! What a program sees of a bug of ours: a panic that a storage or a resolver
//! has been told to have, wherever the call happens to be.

use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::entry::Call;
use super::*;
use crate::error::Result;
use crate::image::handle::Image;
use crate::image::options::{Format, OpenOptions, Policy, Reference, Resolver};
use crate::io::callbacks::{Abilities, Callbacks, UserIo, UserResult};
use crate::io::storage::Source;
use crate::sys::memory::{GuestMut, GuestRef};

const SIZE: u64 = 1 << 20;

/// What the test sees and tells of its storage.
#[derive(Default)]
struct Control {
    bytes: Mutex<Vec<u8>>,
    /// The kind of call that panics.
    panic_in: AtomicUsize,
    dropped: AtomicUsize,
}

const READ: usize = 1;
const WRITE: usize = 2;
const FLUSH: usize = 3;

struct Disk(Arc<Control>);

impl Disk {
    fn enter(&self, kind: usize) {
        assert_ne!(self.0.panic_in.load(Ordering::Relaxed), kind, "as told");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

impl UserIo for Disk {
    fn abilities(&self) -> Abilities {
        Abilities { write: true, ..Abilities::default() }
    }
    fn read(&self, to: GuestMut<'_>, offset: u64) -> UserResult<()> {
        self.enter(READ);
        let mut bytes = self.0.bytes.lock().unwrap();
        let end = offset as usize + to.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        to.copy_from(0, &bytes[offset as usize..end]);
        Ok(())
    }
    fn write(&self, from: GuestRef<'_>, offset: u64) -> UserResult<()> {
        self.enter(WRITE);
        let mut bytes = self.0.bytes.lock().unwrap();
        let end = offset as usize + from.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        from.copy_to(0, &mut bytes[offset as usize..end]);
        Ok(())
    }
    fn length(&self) -> UserResult<u64> {
        Ok(self.0.bytes.lock().unwrap().len() as u64)
    }
    fn flush(&self) -> UserResult<()> {
        self.enter(FLUSH);
        Ok(())
    }
    fn truncate(&self, _: u64) -> UserResult<()> {
        Err(libc::ENOTSUP)
    }
    fn discard(&self, _: u64, _: u64) -> UserResult<()> {
        Err(libc::ENOTSUP)
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> UserResult<()> {
        Err(libc::ENOTSUP)
    }
}

fn call() -> Call {
    // SAFETY: the tests hand in pointers to what they own.
    unsafe { Call::new() }
}

fn storage(control: &Arc<Control>) -> *mut qcow2rs_storage {
    let mut storage = ptr::null_mut();
    let disk = Callbacks::new(Box::new(Disk(Arc::clone(control))), false);
    call().out(&mut storage).unwrap().set(Source::callbacks(disk));
    storage
}

/// A new image, open for writing; its storage does as it is told.
fn image(control: &Arc<Control>) -> *mut qcow2rs_image {
    let (mut storage, mut opts, mut image) = (storage(control), ptr::null_mut(), ptr::null_mut());
    // SAFETY: objects made here, and variables of this function.
    unsafe {
        assert_eq!(qcow2rs_create_opts_new(&mut opts), 0);
        assert_eq!(qcow2rs_create_opts_set_size(opts, SIZE), 0);
        assert_eq!(qcow2rs_create(&mut storage, opts, ptr::null(), &mut image), 0);
        qcow2rs_create_opts_free(&mut opts);
    }
    image
}

/// Checks that a call has failed because of a panic.
#[track_caller]
fn check_panicked(ret: impl Into<i64>) {
    assert_eq!(ret.into(), -i64::from(libc::ENOTRECOVERABLE));
    assert_eq!(qcow2rs_error_code(), QCOW2RS_E_PANIC);
    // SAFETY: never NULL, and this thread makes no other call meanwhile.
    let message = unsafe { CStr::from_ptr(qcow2rs_error_message()) };
    assert!(!message.is_empty());
}

#[test]
fn a_panic_while_opening_loses_nothing_but_the_image() {
    let control = Arc::new(Control::default());
    control.panic_in.store(READ, Ordering::Relaxed);
    let mut storage = storage(&control);
    let (mut opts, mut image) = (ptr::null_mut(), ptr::dangling_mut());
    // SAFETY: objects made here, and variables of this function.
    unsafe {
        assert_eq!(qcow2rs_open_opts_new(&mut opts), 0);
        check_panicked(qcow2rs_open(&mut storage, opts, &mut image));
        assert!(storage.is_null() && image.is_null());
        assert_eq!(control.dropped.load(Ordering::Relaxed), 1);
        // The options were not in use any more.
        assert_eq!(qcow2rs_open_opts_set_flags(opts, 0), 0);
        qcow2rs_open_opts_free(&mut opts);
    }
}

#[test]
fn a_storage_that_panicked_can_only_be_released() {
    let control = Arc::new(Control::default());
    control.panic_in.store(READ, Ordering::Relaxed);
    let mut storage = storage(&control);
    let mut image = ptr::dangling_mut();
    // SAFETY: objects made here, and variables of this function.
    unsafe {
        check_panicked(qcow2rs_probe(storage));
        control.panic_in.store(0, Ordering::Relaxed);
        check_panicked(qcow2rs_probe(storage));
        let mut another = storage;
        check_panicked(qcow2rs_open(&mut another, ptr::null(), &mut image));
        assert!(another.is_null() && image.is_null(), "consumed all the same");
        storage = ptr::null_mut();
        qcow2rs_storage_free(&mut storage);
    }
    assert_eq!(control.dropped.load(Ordering::Relaxed), 1);
}

/// Makes every call that there is, and checks that each refuses.
unsafe fn refuses_everything(image: *mut qcow2rs_image) {
    let mut buf = [0_u8; 16];
    let iov = iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: 16 };
    let mut extent =
        qcow2rs_extent { offset: 0, length: 0, host_offset: 0, flags: 0, depth: 0, reserved: 0 };
    let (mut info, mut stats) = (qcow2rs_info::default(), qcow2rs_stats::default());
    let (mut name, mut length) = (ptr::null_mut(), 0);
    let out = buf.as_mut_ptr().cast();
    // SAFETY: an image, poisoned or not, and variables of this function.
    unsafe {
        check_panicked(qcow2rs_pread(image, out, 16, 0, 0));
        check_panicked(qcow2rs_preadv(image, &iov, 1, 0, 0));
        check_panicked(qcow2rs_pwrite(image, out, 16, 0, 0));
        check_panicked(qcow2rs_pwritev(image, &iov, 1, 0, 0));
        check_panicked(qcow2rs_write_zeroes(image, 0, 16, 0));
        check_panicked(qcow2rs_discard(image, 0, 16, 0));
        check_panicked(qcow2rs_flush(image));
        check_panicked(qcow2rs_block_status(image, 0, 16, 0, &mut extent, 1));
        check_panicked(qcow2rs_get_info(image, &mut info, size_of::<qcow2rs_info>()));
        check_panicked(qcow2rs_get_stats(image, &mut stats, size_of::<qcow2rs_stats>()));
        check_panicked(qcow2rs_get_size(image));
        check_panicked(qcow2rs_get_info_json(image, &mut name));
        let kind = QCOW2RS_REF_KIND_BACKING;
        check_panicked(qcow2rs_get_ref(image, kind, &mut name, &mut length, ptr::null_mut()));
        check_panicked(qcow2rs_invalidate(image));
        check_panicked(qcow2rs_reopen(image, 0));
        let mut found = qcow2rs_check_result::default();
        let (size, none) = (size_of::<qcow2rs_check_result>(), ptr::null_mut());
        check_panicked(qcow2rs_check(image, 0, &mut found, size, None, None, none));
    }
}

/// Panics in a call, then ends with `end`.
fn poisoned(
    kind: usize,
    provoke: unsafe fn(*mut qcow2rs_image) -> c_int,
    end: unsafe extern "C" fn(*mut *mut qcow2rs_image) -> c_int,
) {
    let control = Arc::new(Control::default());
    let mut image = image(&control);
    // SAFETY: an image made here.
    unsafe {
        assert_eq!(write(image), 0);
        control.panic_in.store(kind, Ordering::Relaxed);
        check_panicked(provoke(image));
        control.panic_in.store(0, Ordering::Relaxed);
        refuses_everything(image);
        // Gone, and what was not flushed with it.
        let before = control.bytes.lock().unwrap().clone();
        check_panicked(end(&mut image));
        assert!(image.is_null());
        assert_eq!(*control.bytes.lock().unwrap(), before, "nothing was written");
    }
    assert_eq!(control.dropped.load(Ordering::Relaxed), 1);
}

unsafe fn write(image: *mut qcow2rs_image) -> c_int {
    // SAFETY: the caller's image.
    unsafe { qcow2rs_pwrite(image, c"data".as_ptr().cast(), 4, 70_000, 0) }
}

unsafe fn read(image: *mut qcow2rs_image) -> c_int {
    let mut byte = 0_u8;
    // SAFETY: the caller's image.
    unsafe { qcow2rs_pread(image, ptr::from_mut(&mut byte).cast(), 1, 70_000, 0) }
}

unsafe fn flush(image: *mut qcow2rs_image) -> c_int {
    // SAFETY: the caller's image.
    unsafe { qcow2rs_flush(image) }
}

#[test]
fn a_panic_poisons_the_image_until_it_is_closed() {
    poisoned(WRITE, write, qcow2rs_close);
    poisoned(READ, read, qcow2rs_abandon);
    poisoned(FLUSH, flush, qcow2rs_close);
}

#[test]
fn a_panic_in_close_takes_the_image_along() {
    let control = Arc::new(Control::default());
    let mut image = image(&control);
    control.panic_in.store(FLUSH, Ordering::Relaxed);
    // SAFETY: an image made here.
    unsafe {
        assert_eq!(write(image), 0);
        check_panicked(qcow2rs_close(&mut image));
        assert!(image.is_null());
        assert_eq!(qcow2rs_close(&mut image), 0);
    }
}

/// Takes the one completion that is there.
unsafe fn reap(queue: *mut qcow2rs_queue) -> qcow2rs_completion {
    let null = ptr::null_mut();
    let mut completion = qcow2rs_completion {
        user_data: null,
        error_message: ptr::null(),
        ret: 0,
        error_code: 0,
        reserved: 0,
    };
    // SAFETY: the caller's queue.
    assert_eq!(unsafe { qcow2rs_queue_reap(queue, &mut completion, 1) }, 1);
    completion
}

#[test]
fn a_panic_in_a_request_completes_it_and_poisons_queue_and_image() {
    let control = Arc::new(Control::default());
    let (mut image, mut queue, mut other) = (image(&control), ptr::null_mut(), ptr::null_mut());
    let (data, null) = (c"data".as_ptr().cast(), ptr::null_mut());
    // SAFETY: objects made here, and a string.
    unsafe {
        assert_eq!(qcow2rs_queue_create(image, ptr::null(), &mut queue), 0);
        assert_eq!(qcow2rs_queue_create(image, ptr::null(), &mut other), 0);
        control.panic_in.store(WRITE, Ordering::Relaxed);
        let mark = ptr::from_mut(&mut queue).cast();
        assert_eq!(qcow2rs_queue_pwrite(queue, data, 4, 70_000, 0, mark), 0);
        let mut byte = 0_u8;
        let to = ptr::from_mut(&mut byte).cast();
        assert_eq!(qcow2rs_queue_pread(queue, to, 1, 0, 0, null), 0);
        let completion = reap(queue);
        assert_eq!((completion.ret, completion.user_data), (-libc::ENOTRECOVERABLE, mark));
        assert_eq!(completion.error_code, QCOW2RS_E_PANIC);
        let message = CStr::from_ptr(completion.error_message).to_str().unwrap();
        assert!(message.contains("as told"), "{message}");
        // What was accepted before still completes.
        assert_eq!(reap(queue).ret, 0);
        control.panic_in.store(0, Ordering::Relaxed);

        check_panicked(qcow2rs_queue_pwrite(queue, data, 4, 0, 0, null));
        check_panicked(qcow2rs_queue_flush(queue, 0, null));
        check_panicked(qcow2rs_queue_submit(queue));
        check_panicked(qcow2rs_queue_reap(queue, ptr::null_mut(), 0));
        // Another queue is whole, the image is not.
        assert_eq!(qcow2rs_queue_flush(other, 0, null), 0);
        assert_eq!(reap(other).error_code, QCOW2RS_E_PANIC);
        check_panicked(write(image));
        check_panicked(read(image));
        check_panicked(flush(image));
        check_panicked(qcow2rs_reopen(image, 0));
        let mut info = qcow2rs_info::default();
        check_panicked(qcow2rs_get_info(image, &mut info, size_of::<qcow2rs_info>()));
        let mut stats = qcow2rs_stats::default();
        check_panicked(qcow2rs_get_stats(image, &mut stats, size_of::<qcow2rs_stats>()));
        check_panicked(qcow2rs_get_size(image));
        check_panicked(qcow2rs_queue_create(image, ptr::null(), &mut ptr::null_mut()));
        qcow2rs_queue_destroy(&mut queue);
        check_panicked(qcow2rs_close(&mut image));
        qcow2rs_queue_destroy(&mut other);
        assert!(queue.is_null() && image.is_null() && other.is_null());
    }
    // A later panic is told of as any other.
    let again: c_int = entry!(|_call| panic!("a new one"));
    check_panicked(again);
    // SAFETY: never NULL, and this thread makes no other call meanwhile.
    let message = unsafe { CStr::from_ptr(qcow2rs_error_message()) }.to_str().unwrap();
    assert!(message.contains("a new one"), "{message}");
    assert_eq!(control.dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn other_threads_get_out() {
    struct Address(*mut qcow2rs_image);
    // SAFETY: images may be used from any thread.
    unsafe impl Send for Address {}

    let control = Arc::new(Control::default());
    let mut image = image(&control);
    control.panic_in.store(WRITE, Ordering::Relaxed);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let address = Address(image);
            // SAFETY: an image made here, closed after the threads have ended.
            scope.spawn(move || unsafe {
                let address = address;
                check_panicked(write(address.0));
                check_panicked(qcow2rs_flush(address.0));
            });
        }
    });
    // SAFETY: an image made here.
    unsafe { check_panicked(qcow2rs_close(&mut image)) };
    assert!(image.is_null());
}

#[test]
fn a_panic_in_a_resolver_is_caught() {
    struct Panics;
    impl Resolver for Panics {
        fn resolve(
            &self,
            _: &Reference,
            _: Option<Format>,
        ) -> Result<(Arc<Source>, Option<Format>)> {
            panic!("as told")
        }
    }
    let control = Arc::new(Control::default());
    let (mut storage, mut create) = (storage(&control), ptr::null_mut());
    // SAFETY: objects made here, and variables of this function.
    unsafe {
        assert_eq!(qcow2rs_create_opts_new(&mut create), 0);
        assert_eq!(qcow2rs_create_opts_set_size(create, SIZE), 0);
        let (name, format) = (c"below".as_ptr(), c"raw".as_ptr());
        assert_eq!(qcow2rs_create_opts_set_backing(create, name, format), 0);
        let (none, no_image) = (ptr::null(), ptr::null_mut());
        assert_eq!(qcow2rs_create(&mut storage, create, none, no_image), 0);
        qcow2rs_create_opts_free(&mut create);
    }
    let disk = Callbacks::new(Box::new(Disk(Arc::clone(&control))), false);
    let ret: c_int = entry!(|_call| {
        let options = OpenOptions::new().policy(Policy::Resolve(Arc::new(Panics)));
        Image::open(Source::callbacks(disk), &options).map(|_| 0)
    });
    check_panicked(ret);
    assert_eq!(control.dropped.load(Ordering::Relaxed), 2);
}
