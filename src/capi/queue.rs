//! Queues: asynchronous I/O

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libc::iovec;

use super::entry::{Call, flags, forget_panic};
use super::handle::{Handle, Held};
use super::io::{memory, memory_list, write_flags, zero_flags};
use super::open::{QueueList, qcow2rs_image};
use crate::error::{Error, ErrorKind, Result};
use crate::image::attached::poisoned;
use crate::queue::{Completion, Engine, Queue, QueueOptions};

/// What a queue is to be like.
pub struct qcow2rs_queue_opts(Handle<Mutex<QueueOptions>>);
object!(qcow2rs_queue_opts: Mutex<QueueOptions>);

/// Asynchronous requests on an image.  A queue belongs to one image; many queues
/// per image, typically one per thread.  Functions on a queue, unless they say
/// otherwise: [OBJ]; different queues: concurrently.  Requests go on while
/// somebody is inside submit, reap or wait: one that conflicts with a request of
/// another queue goes on when that one was carried on, too.  A wait that another
/// queue of its own thread holds up carries that one on.
pub struct qcow2rs_queue(Handle<QueueObject>);
object!(qcow2rs_queue: QueueObject);

/// A queue, and what C has of it.
pub struct QueueObject {
    queue: Queue,
    /// Of the failures that were handed out last.
    messages: Mutex<Vec<CString>>,
    /// Those of its image, by address.
    siblings: Arc<QueueList>,
}

/// How a request ended.  Fixed size: 32 bytes with 8-byte pointers.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2rs_completion {
    /// As given with the request.
    pub user_data: *mut c_void,
    /// NULL on success; valid until the next reap or wait on this queue.
    pub error_message: *const c_char,
    /// >= 0, or a negative errno.
    pub ret: i32,
    /// QCOW2RS_E_*.
    pub error_code: u32,
    /// Zero.
    pub reserved: u64,
}

fn settings(opts: &Mutex<QueueOptions>) -> MutexGuard<'_, QueueOptions> {
    // A panic poisons the handle, whose options nobody sees again.
    opts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [MT] -ENOMEM.  Reusable for any number of queues.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_opts_new(out: *mut *mut qcow2rs_queue_opts) -> c_int {
    entry!(|call| {
        call.out(out)?.set(Mutex::default());
        Ok(0)
    })
}

/// [OBJ]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_opts_free(opts: *mut *mut qcow2rs_queue_opts) {
    entry!(|call| call.take(opts).map(drop))
}

/// [OBJ] Requests that may be in flight, 1 to 65536; default 128.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_opts_set_depth(
    o: *mut qcow2rs_queue_opts,
    depth: u32,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        settings(&opts).set_depth(depth)?;
        Ok(0)
    })
}

/// [OBJ] By name: "engine" (auto|io_uring|blocking, default auto: io_uring where
/// the system has it, else blocking), "completion-fd" (on|off, default on),
/// "depth".
/// -ENOENT: no such option.  -EINVAL: bad value.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_opts_set(
    o: *mut qcow2rs_queue_opts,
    name: *const c_char,
    value: *const c_char,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let (name, value) = (call.text(name, "name")?, call.text(value, "value")?);
        settings(&opts).set(name, value)?;
        Ok(0)
    })
}

/// [MT] opts may be NULL.  -ENOTSUP: io_uring was asked for and is not to be
/// had.  -EMFILE and the like: a queue takes up to three descriptors.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_create(
    img: *mut qcow2rs_image,
    opts: *const qcow2rs_queue_opts,
    out: *mut *mut qcow2rs_queue,
) -> c_int {
    entry!(|call| {
        let out = call.out(out)?;
        let image = call.held(img)?;
        let opts = call.optional(opts)?.map(|opts| settings(&opts).clone());
        let queue = Queue::new(image.shared(), &opts.unwrap_or_default())?;
        let siblings = image.queue_list().clone();
        let object = out.set(QueueObject { queue, messages: Mutex::default(), siblings });
        image.queue_list().add(object.expose_provenance());
        Ok(0)
    })
}

/// [MT] The engine in use, static storage: "io_uring" or "blocking".  "auto"
/// tries io_uring_setup(2): where a filter kills for that, ask for
/// "blocking".
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_engine(q: *mut qcow2rs_queue) -> *const c_char {
    entry!(|call| {
        let name = match call.held(q)?.queue.engine() {
            Engine::IoUring => c"io_uring",
            Engine::Auto | Engine::Blocking => c"blocking",
        };
        Ok(name.as_ptr())
    })
}

/// [OBJ] Waits for what is in flight (carrying on what other queues hold it up
/// with), drops its completions; afterwards no buffer is in use, on a poisoned
/// queue too.  Close does it for queues that remain.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_destroy(queue: *mut *mut qcow2rs_queue) {
    entry!(|call| {
        if call.forget_buried(queue)? {
            return Ok(());
        }
        let Some(leaving) = call.leaving(queue)? else { return Ok(()) };
        leaving.siblings.remove(leaving.address());
        drop(leaving.release());
        Ok(())
    })
}

/// A queue, for a call that submits to it or drives it.
fn queue<'c>(call: &'c Call, q: *mut qcow2rs_queue) -> Result<Held<'c, qcow2rs_queue>> {
    call.held(q)
}

fn number(user_data: *mut c_void) -> u64 {
    user_data.expose_provenance() as u64
}

/// [OBJ] Submission.  0: accepted, there will be exactly one completion.
/// Negative: not accepted, there will be none: -EAGAIN the queue is full (reap
/// first), -EINVAL, -ENOMEM, -ENOTRECOVERABLE.  Every other failure, range and
/// read-only errors included, arrives as a completion.  Requests start with the
/// next submit, reap or wait.  user_data is not interpreted.  Flags and results
/// as in the synchronous functions.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_pread(
    q: *mut qcow2rs_queue,
    buf: *mut c_void,
    length: usize,
    offset: u64,
    flags: u32,
    user_data: *mut c_void,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        self::flags(flags, 0)?;
        let to = memory(call, buf, length, offset)?;
        object.queue.read_guest(to, offset, number(user_data))?;
        Ok(0)
    })
}

/// [OBJ] As qcow2rs_queue_pread.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_preadv(
    q: *mut qcow2rs_queue,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
    user_data: *mut c_void,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        self::flags(flags, 0)?;
        let to = memory_list(call, iov, iovcnt, offset)?;
        object.queue.read_guest(to, offset, number(user_data))?;
        Ok(0)
    })
}

/// Submits a write.
fn write(
    object: &QueueObject,
    from: crate::sys::memory::GuestRef<'static>,
    offset: u64,
    flags: u32,
    user_data: *mut c_void,
) -> Result<c_int> {
    let user_data = number(user_data);
    match write_flags(flags) {
        Ok(flags) => object.queue.write_guest(from, offset, flags, user_data)?,
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            object.queue.fail(error, user_data)?;
        }
        Err(error) => return Err(error),
    }
    Ok(0)
}

/// [OBJ] As qcow2rs_queue_pread.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_pwrite(
    q: *mut qcow2rs_queue,
    buf: *const c_void,
    length: usize,
    offset: u64,
    flags: u32,
    user_data: *mut c_void,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        let from = memory(call, buf, length, offset)?;
        write(&object, from, offset, flags, user_data)
    })
}

/// [OBJ] As qcow2rs_queue_pread.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_pwritev(
    q: *mut qcow2rs_queue,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
    user_data: *mut c_void,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        let from = memory_list(call, iov, iovcnt, offset)?;
        write(&object, from, offset, flags, user_data)
    })
}

/// [OBJ] As qcow2rs_queue_pread.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_write_zeroes(
    q: *mut qcow2rs_queue,
    offset: u64,
    length: u64,
    flags: u32,
    user_data: *mut c_void,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        object.queue.write_zeroes(offset, length, zero_flags(flags)?, number(user_data))?;
        Ok(0)
    })
}

/// [OBJ] As qcow2rs_queue_pread.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_discard(
    q: *mut qcow2rs_queue,
    offset: u64,
    length: u64,
    flags: u32,
    user_data: *mut c_void,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        self::flags(flags, 0)?;
        object.queue.discard(offset, length, number(user_data))?;
        Ok(0)
    })
}

/// [OBJ] Durable: what had COMPLETED (was reaped or reapable) on any queue of
/// the image before this call.  Not a barrier for requests in flight.
/// flags: 0.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_flush(
    q: *mut qcow2rs_queue,
    flags: u32,
    user_data: *mut c_void,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        self::flags(flags, 0)?;
        object.queue.flush(number(user_data))?;
        Ok(0)
    })
}

/// [OBJ] Makes sure that everything accepted has been started; returns how many
/// were newly started.  Never blocks on I/O, except with the blocking engine:
/// there submit, reap and wait may.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_submit(q: *mut qcow2rs_queue) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        let started = object.queue.submit()?;
        if object.queue.is_poisoned() {
            forget_panic();
            return Err(poisoned());
        }
        Ok(started as c_int)
    })
}

/// Where completions go: the caller's array.
struct Array<'o> {
    to: *mut qcow2rs_completion,
    max: usize,
    used: usize,
    messages: MutexGuard<'o, Vec<CString>>,
}

impl<'o> Array<'o> {
    fn new(
        call: &Call,
        object: &'o QueueObject,
        completions: *mut qcow2rs_completion,
        max: c_int,
    ) -> Result<Array<'o>> {
        let max = usize::try_from(max)
            .map_err(|_| Error::invalid(format!("{max} is no number of completions")))?;
        if max > 0 {
            call.some(completions, "completions")?;
        }
        let mut messages = object.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.clear();
        Ok(Array { to: completions, max, used: 0, messages })
    }

    fn add(&mut self, completion: Completion) {
        if self.used == self.max {
            return;
        }
        let mut entry = qcow2rs_completion {
            user_data: ptr::with_exposed_provenance_mut(completion.user_data as usize),
            error_message: ptr::null(),
            ret: 0,
            error_code: 0,
            reserved: 0,
        };
        if let Err(error) = completion.result {
            // Messages have their control characters escaped, NUL included.
            let message = CString::new(error.message()).unwrap_or_default();
            entry.error_message = message.as_ptr();
            entry.ret = -error.errno();
            entry.error_code = error.kind().code();
            self.messages.push(message);
        }
        // SAFETY: used < max, the length of the array (the caller's promise).
        unsafe { self.to.add(self.used).write(entry) };
        self.used += 1;
    }
}

/// What reap and wait return.
fn taken(object: &QueueObject, count: usize) -> Result<c_int> {
    if object.queue.is_poisoned() {
        forget_panic();
        if count == 0 {
            return Err(poisoned());
        }
    }
    Ok(count as c_int)
}

/// [OBJ] Submits, then takes up to max completions without blocking; returns how
/// many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_reap(
    q: *mut qcow2rs_queue,
    completions: *mut qcow2rs_completion,
    max: c_int,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        let mut array = Array::new(call, &object, completions, max)?;
        let count = object.queue.reap(array.max, |completion| array.add(completion))?;
        taken(&object, count)
    })
}

/// [OBJ] Submits, then blocks until min completions are there (min <= in flight:
/// -EINVAL otherwise), timeout_ns has passed (relative; < 0: no
/// limit), or qcow2rs_queue_wakeup was called; returns how many were taken,
/// possibly fewer than min, possibly 0.  -EINTR only if no completion was taken
/// and a signal arrived.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_wait(
    q: *mut qcow2rs_queue,
    completions: *mut qcow2rs_completion,
    min: c_int,
    max: c_int,
    timeout_ns: i64,
) -> c_int {
    entry!(|call| {
        let object = queue(call, q)?;
        let min = usize::try_from(min)
            .map_err(|_| Error::invalid(format!("{min} is no number of completions")))?;
        let mut array = Array::new(call, &object, completions, max)?;
        let timeout = u64::try_from(timeout_ns).ok().map(Duration::from_nanos);
        let add = |completion| array.add(completion);
        let count = object.queue.wait(min, max as usize, timeout, add)?;
        taken(&object, count)
    })
}

/// [MT] Ends a qcow2rs_queue_wait in another thread, or the next one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_wakeup(q: *mut qcow2rs_queue) -> c_int {
    entry!(|call| {
        call.held(q)?.queue.wake_up();
        Ok(0)
    })
}

/// [OBJ] An eventfd (non-blocking, close-on-exec, owned by the queue) for
/// poll/epoll, level-triggered: readable whenever reap would return a completion
/// of what was submitted or carry a request on, one that another queue or thread
/// has unblocked included.  Reap and wait clear it; the caller need not read it
/// and must not write or close it.  Spurious readiness is possible, lost
/// wake-ups are not.  With io_uring, the kernel may interrupt a thread to
/// complete what it submitted: its own poll or epoll_wait then fails with EINTR,
/// without a signal.  -ENOTSUP: turned off.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_completion_fd(q: *mut qcow2rs_queue) -> c_int {
    entry!(|call| {
        use std::os::fd::AsRawFd;
        let object = call.held(q)?;
        let fd = object.queue.completion_fd().map(|fd| fd.as_raw_fd());
        fd.ok_or_else(|| {
            let text = "the queue was made without a completion descriptor";
            Error::new(ErrorKind::NotSupported, text)
        })
    })
}

/// [OBJ] While disabled the fd may stay unreadable: saves a system call per
/// batch when polling.  Enabling makes it readable if completions wait.
/// -ENOTSUP: turned off.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_set_completion_fd_enabled(
    q: *mut qcow2rs_queue,
    enabled: bool,
) -> c_int {
    entry!(|call| {
        call.held(q)?.queue.set_completion_fd_enabled(enabled)?;
        Ok(0)
    })
}

/// [MT] Accepted and not yet taken by reap or wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_queue_in_flight(q: *mut qcow2rs_queue) -> u32 {
    entry!(|call| Ok(call.held(q)?.queue.in_flight()))
}
