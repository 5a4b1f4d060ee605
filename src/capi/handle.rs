//! Handles: what C holds of an object of ours.
//!
//! A handle is a box with a label. The label tells a live object of the right
//! type from anything else (as far as that can be told), counts the calls
//! inside, and says whether a panic has left the object in pieces. A call gets
//! a shared reference, whatever the thread safety class of its object: what can
//! be changed has its own lock inside. This file knows no type of object.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::entry::Call;
use super::users::{Occupied, User, Users};
use crate::error::{Error, ErrorKind, Result};

/// A type that C knows as an opaque struct: `struct name(Handle<Value>)`.
/// Implemented by `object!` only.
pub trait Object: Sized + 'static {
    /// What is in the box.
    type Value: 'static;
    /// The C name.
    const NAME: &'static str;
    /// Makes the struct.
    fn new(handle: Handle<Self::Value>) -> Self;
    /// Looks inside.
    fn handle(&self) -> &Handle<Self::Value>;
    /// Takes it apart.
    fn into_handle(self) -> Handle<Self::Value>;
    /// Marks a live object of this type.
    const LABEL: u64 = hash(Self::NAME);
}

/// Declares the type of an opaque struct: `object!(qcow2rs_image: Arc<Image>)`
/// after `pub struct qcow2rs_image(Handle<Arc<Image>>)`.
macro_rules! object {
    ($name:ident: $value:ty) => {
        impl $crate::capi::handle::Object for $name {
            type Value = $value;
            const NAME: &'static str = stringify!($name);
            fn new(handle: $crate::capi::handle::Handle<$value>) -> Self {
                $name(handle)
            }
            fn handle(&self) -> &$crate::capi::handle::Handle<$value> {
                &self.0
            }
            fn into_handle(self) -> $crate::capi::handle::Handle<$value> {
                self.0
            }
        }
    };
}

/// FNV-1a.
const fn hash(name: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let bytes = name.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
}

/// An object of ours in the hands of a C program.
pub struct Handle<V> {
    label: AtomicU64,
    poisoned: AtomicBool,
    users: Users,
    value: V,
}

/// The use of an object by a call. A panic meanwhile poisons the object.
pub struct Held<'c, T: Object> {
    handle: &'c Handle<T::Value>,
    _user: User<'c>,
    panicking: bool,
}

impl<T: Object> Deref for Held<'_, T> {
    type Target = T::Value;
    fn deref(&self) -> &T::Value {
        &self.handle.value
    }
}

impl<T: Object> Drop for Held<'_, T> {
    fn drop(&mut self) {
        if !self.panicking && std::thread::panicking() {
            self.handle.poisoned.store(true, Ordering::Release);
        }
    }
}

/// A handle output: NULL until [`Out::set`].
pub struct Out<'c, T>(*mut *mut T, PhantomData<&'c Call>);

impl<T: Object> Out<'_, T> {
    /// Gives the object to the caller; returns its address.
    pub fn set(self, value: T::Value) -> *mut T {
        let object = T::new(Handle {
            label: AtomicU64::new(T::LABEL),
            poisoned: AtomicBool::new(false),
            users: Users::default(),
            value,
        });
        // SAFETY: `Call::out` has written to it before.
        unsafe {
            self.0.write(Box::into_raw(Box::new(object)));
            self.0.read()
        }
    }
}

/// An object on its way out, which no new call gets into. Dropped, it stays with
/// the caller, who may go on using it; but if a panic is under way, it is in
/// pieces, and so it is leaked: the caller has lost it.
pub struct Leaving<'c, T: Object> {
    from: *mut *mut T,
    object: *mut T,
    handle: &'c Handle<T::Value>,
}

impl<T: Object> Leaving<'_, T> {
    /// A panic has left it in pieces: it may be released, not used.
    pub fn poisoned(&self) -> bool {
        self.handle.poisoned.load(Ordering::Acquire)
    }

    /// Its address.
    pub fn address(&self) -> usize {
        self.object.expose_provenance()
    }

    /// Takes it from the caller, whose pointer becomes NULL.
    pub fn release(self) -> Taken<T::Value> {
        let (poisoned, object) = (self.poisoned(), self.object);
        self.forget();
        std::mem::forget(self);
        // SAFETY: made by `Out::set`, live until now, and nobody is inside.
        let object = unsafe { Box::from_raw(object) };
        Taken { value: object.into_handle().value, poisoned }
    }

    /// A second release finds no live object, if it finds this memory.
    fn forget(&self) {
        self.handle.label.store(0, Ordering::Relaxed);
        // SAFETY: the caller's variable, from which `object` was read.
        unsafe { self.from.write(ptr::null_mut()) }
    }
}

impl<T: Object> Deref for Leaving<'_, T> {
    type Target = T::Value;
    fn deref(&self) -> &T::Value {
        &self.handle.value
    }
}

impl<T: Object> Drop for Leaving<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.forget();
        } else {
            self.handle.users.reopen();
        }
    }
}

/// An object that has come back from C.
pub struct Taken<V> {
    /// The object.
    pub value: V,
    /// A panic has left it in pieces: it may be dropped, not used.
    pub poisoned: bool,
}

/// The memory of an object that ended before its caller released it.
struct Grave {
    address: usize,
    _memory: Box<dyn Send>,
}

/// How many are remembered.
const GRAVES: usize = 256;

fn graves() -> MutexGuard<'static, VecDeque<Grave>> {
    static ALL: Mutex<VecDeque<Grave>> = Mutex::new(VecDeque::new());
    // Nothing panics while it is held.
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Call {
    /// A live object, to use in this call.
    #[inline]
    pub fn held<T: Object>(&self, object: *const T) -> Result<Held<'_, T>> {
        let handle = self.live(object)?;
        let _user = handle.users.enter().ok_or_else(|| busy::<T>(Occupied::Leaving))?;
        let held = Held { handle, _user, panicking: std::thread::panicking() };
        if handle.poisoned.load(Ordering::Acquire) {
            return Err(poisoned::<T>());
        }
        Ok(held)
    }

    /// As [`Call::held`], or `None` for NULL.
    pub fn optional<T: Object>(&self, object: *const T) -> Result<Option<Held<'_, T>>> {
        if object.is_null() { Ok(None) } else { self.held(object).map(Some) }
    }

    /// A handle output, which becomes NULL here and now.
    pub fn out<T: Object>(&self, out: *mut *mut T) -> Result<Out<'_, T>> {
        self.some(out, "the output handle")?;
        // SAFETY: not NULL, aligned; writable (the caller's promise).
        unsafe { out.write(ptr::null_mut()) };
        Ok(Out(out, PhantomData))
    }

    /// A handle output that may be NULL: the caller does not want the object.
    pub fn optional_out<T: Object>(&self, out: *mut *mut T) -> Result<Option<Out<'_, T>>> {
        if out.is_null() { Ok(None) } else { self.out(out).map(Some) }
    }

    /// Closes an object to new calls, before it is taken from the caller; `None`
    /// if the pointer or the object is NULL. -EBUSY while a call is inside.
    pub fn leaving<T: Object>(&self, object: *mut *mut T) -> Result<Option<Leaving<'_, T>>> {
        if object.is_null() {
            return Ok(None);
        }
        self.some(object, T::NAME)?;
        let from = object;
        // SAFETY: not NULL, aligned; the caller's variable.
        let object = unsafe { from.read() };
        if object.is_null() {
            return Ok(None);
        }
        let handle = self.live(object)?;
        handle.users.close().map_err(busy::<T>)?;
        Ok(Some(Leaving { from, object, handle }))
    }

    /// Takes the object from the caller, whose pointer becomes NULL; `None` if
    /// it is NULL already. -EBUSY while a call is inside: the caller keeps it.
    pub fn take<T: Object>(&self, object: *mut *mut T) -> Result<Option<Taken<T::Value>>> {
        Ok(self.leaving(object)?.map(Leaving::release))
    }

    /// Takes an object that the entry point consumes: there must be one, and it
    /// must be whole.
    pub fn consume<T: Object>(&self, object: *mut *mut T) -> Result<T::Value> {
        match self.take(object)? {
            None => Err(Error::invalid(format!("{} is NULL", T::NAME))),
            Some(taken) if taken.poisoned => Err(poisoned::<T>()),
            Some(taken) => Ok(taken.value),
        }
    }

    /// Ends an object that goes with another one. The caller still has its address,
    /// which is good for nothing but to be released: the last few of them can be told
    /// from live objects, so that this is no accident.
    pub fn bury<T: Object + Send>(&self, address: usize) {
        let object = ptr::with_exposed_provenance_mut::<T>(address);
        // SAFETY: made by `Out::set` and not yet released (who calls keeps account).
        let mut object: Box<ManuallyDrop<T>> = unsafe { Box::from_raw(object.cast()) };
        object.handle().label.store(0, Ordering::Relaxed);
        // SAFETY: dropped here only; of what is left nothing but the label is read.
        unsafe { ManuallyDrop::drop(&mut object) };
        let mut graves = graves();
        if graves.len() == GRAVES {
            graves.pop_front();
        }
        graves.push_back(Grave { address, _memory: object });
    }

    /// Whether the object was buried; the caller's pointer becomes NULL then.
    pub fn forget_buried<T: Object>(&self, object: *mut *mut T) -> Result<bool> {
        if object.is_null() {
            return Ok(false);
        }
        self.some(object, T::NAME)?;
        // SAFETY: not NULL, aligned; the caller's variable.
        let address = unsafe { object.read() }.expose_provenance();
        let mut graves = graves();
        let Some(index) = graves.iter().position(|grave| grave.address == address) else {
            return Ok(false);
        };
        graves.remove(index);
        // SAFETY: as above.
        unsafe { object.write(ptr::null_mut()) };
        Ok(true)
    }

    #[inline]
    fn live<T: Object>(&self, object: *const T) -> Result<&Handle<T::Value>> {
        let object = self.some(object, T::NAME)?;
        // SAFETY: not NULL, aligned; made by `Out::set` and not yet released
        // (the caller's promise, which the label checks as far as it can).
        let handle = unsafe { &*object }.handle();
        if handle.label.load(Ordering::Relaxed) != T::LABEL {
            return Err(Error::invalid(format!("not a live {}", T::NAME)));
        }
        Ok(handle)
    }
}

#[cold]
fn busy<T: Object>(occupied: Occupied) -> Error {
    let why = match occupied {
        Occupied::Leaving => "is being released",
        Occupied::InUse => "is in use",
    };
    Error::new(ErrorKind::Busy, format!("{} {why}", T::NAME))
}

#[cold]
fn poisoned<T: Object>() -> Error {
    let text = format!("{} is unusable after an internal error, it can only be released", T::NAME);
    Error::new(ErrorKind::Panic, text)
}

#[cfg(test)]
mod tests {
    use std::ffi::c_int;
    use std::sync::{Arc, mpsc};

    use super::*;
    use crate::capi::{QCOW2RS_E_PANIC, qcow2rs_error_code};

    struct a_thing(Handle<Arc<()>>);
    object!(a_thing: Arc<()>);
    struct other(Handle<()>);
    object!(other: ());

    fn make(value: &Arc<()>, out: *mut *mut a_thing) -> c_int {
        entry!(|call| {
            let out = call.out(out)?;
            out.set(Arc::clone(value));
            Ok(0)
        })
    }

    fn call(thing: *const a_thing, body: impl FnOnce()) -> c_int {
        entry!(|call| {
            let _held = call.held(thing)?;
            body();
            Ok(1)
        })
    }

    fn release(thing: *mut *mut a_thing) -> c_int {
        entry!(|call| {
            let taken = call.take(thing)?;
            Ok(c_int::from(taken.is_some_and(|taken| taken.poisoned)))
        })
    }

    fn consume(thing: *mut *mut a_thing) -> c_int {
        entry!(|call| call.consume(thing).map(|_| 0))
    }

    #[test]
    fn an_object_lives_from_out_to_take() {
        let value = Arc::new(());
        let mut raw = ptr::null_mut();
        assert_eq!(make(&value, &mut raw), 0);
        assert_eq!(Arc::strong_count(&value), 2);
        assert_eq!(call(raw, || ()), 1);
        assert_eq!(release(&mut raw), 0);
        assert!(raw.is_null());
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn null_is_refused_or_allowed() {
        assert_eq!(make(&Arc::new(()), ptr::null_mut()), -libc::EINVAL);
        assert_eq!(call(ptr::null(), || ()), -libc::EINVAL);
        assert_eq!(release(ptr::null_mut()), 0);
        assert_eq!(release(&mut ptr::null_mut()), 0);
        assert_eq!(consume(ptr::null_mut()), -libc::EINVAL);
        assert_eq!(consume(&mut ptr::null_mut()), -libc::EINVAL);
    }

    #[test]
    fn an_output_is_null_after_a_failure() {
        let mut raw = ptr::dangling_mut::<a_thing>();
        let ret: c_int = entry!(|call| {
            let _out = call.out(&mut raw)?;
            Err(Error::invalid("no"))
        });
        assert_eq!(ret, -libc::EINVAL);
        assert!(raw.is_null());
    }

    #[test]
    fn an_object_of_another_type_is_refused() {
        let mut raw = ptr::null_mut();
        make(&Arc::new(()), &mut raw);
        let wrong = raw.cast::<other>();
        let ret: c_int = entry!(|call| call.held(wrong).map(|_| 0));
        assert_eq!(ret, -libc::EINVAL);
        release(&mut raw);
    }

    #[test]
    fn a_panic_poisons_the_object_that_the_call_held() {
        let value = Arc::new(());
        let (mut raw, mut bystander) = (ptr::null_mut(), ptr::null_mut());
        make(&value, &mut raw);
        make(&value, &mut bystander);
        assert_eq!(call(raw, || panic!("on purpose")), -libc::ENOTRECOVERABLE);
        assert_eq!(qcow2rs_error_code(), QCOW2RS_E_PANIC);
        assert_eq!(call(raw, || unreachable!()), -libc::ENOTRECOVERABLE);
        assert_eq!(call(bystander, || ()), 1);
        // It can be released, and whoever does so is told.
        assert_eq!(release(&mut raw), 1);
        assert_eq!(release(&mut bystander), 0);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn what_is_consumed_is_gone_even_if_poisoned() {
        let value = Arc::new(());
        let mut raw = ptr::null_mut();
        make(&value, &mut raw);
        call(raw, || panic!("on purpose"));
        assert_eq!(consume(&mut raw), -libc::ENOTRECOVERABLE);
        assert!(raw.is_null());
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn an_object_in_use_stays() {
        let mut raw = ptr::null_mut();
        make(&Arc::new(()), &mut raw);
        let (entered, on_entry) = mpsc::channel();
        let (let_go, gate) = mpsc::channel::<()>();
        let address = raw.expose_provenance();
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                call(ptr::with_exposed_provenance(address), || {
                    entered.send(()).unwrap();
                    gate.recv().unwrap();
                })
            });
            on_entry.recv().unwrap();
            assert_eq!(release(&mut raw), -libc::EBUSY);
            assert!(!raw.is_null());
            // Others come and go meanwhile.
            assert_eq!(call(raw, || ()), 1);
            let_go.send(()).unwrap();
            assert_eq!(inside.join().unwrap(), 1);
        });
        // Also from within a call of the same thread.
        let mut again = raw;
        assert_eq!(call(raw, || assert_eq!(release(&mut again), -libc::EBUSY)), 1);
        assert_eq!(release(&mut raw), 0);
    }
}
