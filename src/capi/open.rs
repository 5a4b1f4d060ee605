//! Open and close

use std::ffi::{c_char, c_int};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::entry::{Call, flags};
use super::handle::Handle;
use super::open_opts::{
    QCOW2RS_OPEN_NO_LOCK, QCOW2RS_OPEN_RDWR, number, options, qcow2rs_open_opts,
};
use super::queue::qcow2rs_queue;
use super::storage::{fd, path, qcow2rs_storage};
use crate::admin::create::probe;
use crate::error::{Error, ErrorKind, Result};
use crate::image::handle::Image;
use crate::io::storage::Source;

/// An open image.
pub struct qcow2rs_image(Handle<OpenImage>);
object!(qcow2rs_image: OpenImage);

/// An image, and the queues that go with it.
pub struct OpenImage {
    image: Arc<Image>,
    queues: Arc<QueueList>,
}

/// Addresses of queues, as C knows them.
#[derive(Default)]
pub struct QueueList(Mutex<Vec<usize>>);

impl QueueList {
    fn list(&self) -> MutexGuard<'_, Vec<usize>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new one.
    pub fn add(&self, address: usize) {
        self.list().push(address);
    }

    /// One that is released.
    pub fn remove(&self, address: usize) {
        self.list().retain(|other| *other != address);
    }
}

impl From<Image> for OpenImage {
    fn from(image: Image) -> OpenImage {
        OpenImage { image: Arc::new(image), queues: Arc::default() }
    }
}

impl OpenImage {
    /// For queues.
    pub fn shared(&self) -> &Arc<Image> {
        &self.image
    }

    /// Those that there are.
    pub fn queue_list(&self) -> &Arc<QueueList> {
        &self.queues
    }
}

impl Deref for OpenImage {
    type Target = Image;
    fn deref(&self) -> &Image {
        &self.image
    }
}

/// [MT] What the first bytes look like, for a person to confirm; the storage
/// is not consumed.  Returns QCOW2RS_FORMAT_*.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_probe(storage: *mut qcow2rs_storage) -> c_int {
    entry!(|call| {
        let storage = call.held(storage)?;
        Ok(number(probe(&storage)?) as c_int)
    })
}

/// What all three ways of opening do.
fn open(
    call: &Call,
    source: impl FnOnce() -> Result<Arc<Source>>,
    opts: *const qcow2rs_open_opts,
    out: *mut *mut qcow2rs_image,
) -> Result<c_int> {
    // The source first: it is consumed whatever else is wrong.
    let source = source();
    let out = call.out(out)?;
    let image = Image::open(source?, &options(call, opts)?)?;
    out.set(image.into());
    Ok(0)
}

/// [MT] Consumes *storage (sets it to NULL), also on failure.  opts may be
/// NULL.  Errors: the QCOW2RS_E_* table; -EROFS; -EAGAIN (locked); errno of
/// open(2)/read(2).
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open(
    storage: *mut *mut qcow2rs_storage,
    opts: *const qcow2rs_open_opts,
    out: *mut *mut qcow2rs_image,
) -> c_int {
    entry!(|call| open(call, || call.consume(storage), opts, out))
}

/// [MT] As qcow2rs_open, of a file by name: a shorthand.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_path(
    path: *const c_char,
    opts: *const qcow2rs_open_opts,
    out: *mut *mut qcow2rs_image,
) -> c_int {
    entry!(|call| {
        let source = || Ok(Source::path(self::path(call.string(path, "path")?)?));
        open(call, source, opts, out)
    })
}

/// [MT] As qcow2rs_open, of a descriptor: see qcow2rs_storage_from_fd.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_fd(
    fd: c_int,
    opts: *const qcow2rs_open_opts,
    out: *mut *mut qcow2rs_image,
) -> c_int {
    entry!(|call| open(call, || self::fd(fd), opts, out))
}

/// Drains requests in flight, destroys remaining queues, flushes, stores
/// persistent bitmaps, clears the dirty bit, releases.  -EBUSY: another thread
/// is inside a call; the handle is kept.  Whatever else is returned, the handle
/// is gone and set to NULL; the value tells of a flush error, or that bitmaps
/// could not be stored and are out of date (QCOW2RS_BITMAP_IN_USE) now.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_close(img: *mut *mut qcow2rs_image) -> c_int {
    entry!(|call| release(call, img, Image::close))
}

/// Releases without writing anything: models a crash, or gives up on dead
/// storage.  Starts nothing new, waits until the kernel has let go of the
/// buffers in flight.  -EBUSY as for close.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_abandon(img: *mut *mut qcow2rs_image) -> c_int {
    entry!(|call| release(call, img, Image::abandon))
}

fn release(
    call: &Call,
    img: *mut *mut qcow2rs_image,
    end: impl FnOnce(&Image) -> Result<()>,
) -> Result<c_int> {
    let Some(image) = call.leaving(img)? else { return Ok(0) };
    // What a panic has left in pieces is not written any more.
    let poisoned = image.poisoned() || image.queues().is_poisoned();
    let ended = if poisoned { image.abandon() } else { end(&image) };
    if ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy) {
        return ended.map(|()| 0);
    }
    let queues = std::mem::take(&mut *image.queue_list().list());
    queues.into_iter().for_each(|queue| call.bury::<qcow2rs_queue>(queue));
    drop(image.release());
    if poisoned {
        let text = "the image was unusable after an internal error: what was not flushed is lost";
        return Err(Error::new(ErrorKind::Panic, text));
    }
    ended.map(|()| 0)
}

/// [EXCL] Drops all caches and reads the metadata again, the whole chain's
/// (live migration).  -EINVAL on an image opened read-write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_invalidate(img: *mut qcow2rs_image) -> c_int {
    entry!(|call| call.held(img)?.invalidate().map(|()| 0))
}

/// [EXCL] Changes between read-only and read-write, with or without locks;
/// flags: OPEN_RDWR, OPEN_NO_LOCK.  Towards RDWR: the lock is taken (-EAGAIN),
/// the metadata is read again, then writing starts; towards read-only: flushed,
/// then unlocked.  The image keeps its storage; files of the chain are reopened
/// through the policy where they must be.  On failure the old state stands; but
/// where bitmaps had been stored, and the image cannot be read again, it is
/// closed, as the message says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_reopen(img: *mut qcow2rs_image, flags: u32) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        self::flags(flags, QCOW2RS_OPEN_RDWR | QCOW2RS_OPEN_NO_LOCK)?;
        image.reopen(flags & QCOW2RS_OPEN_RDWR != 0, flags & QCOW2RS_OPEN_NO_LOCK == 0)?;
        Ok(0)
    })
}
