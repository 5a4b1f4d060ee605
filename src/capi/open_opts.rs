//! Open options

use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::size_of;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::entry::{Call, flags};
use super::handle::Handle;
use super::storage::qcow2rs_storage;
use crate::crypto::secret::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::image::options::{Format, OpenOptions, Policy, Reference, ReferenceKind, Resolver};
use crate::io::storage::Source;

/// Read and write; default: read-only.
pub const QCOW2RS_OPEN_RDWR: u32 = 1;
/// No OFD lock on the file.
pub const QCOW2RS_OPEN_NO_LOCK: u32 = 2;
/// O_DIRECT (cache=none).
pub const QCOW2RS_OPEN_DIRECT: u32 = 4;
/// Every write is durable.
pub const QCOW2RS_OPEN_WRITETHROUGH: u32 = 8;
/// cache=unsafe: tests only.
pub const QCOW2RS_OPEN_NO_FLUSH: u32 = 16;
/// This layer only; holes read as zero, status says ZERO
/// without ALLOCATED; -EINVAL with RDWR where the image names a backing file,
/// unless CHECK_ONLY.
pub const QCOW2RS_OPEN_NO_BACKING: u32 = 32;
/// Tolerate damage, dirty and corrupt bits; only info, check and repair are
/// allowed.
pub const QCOW2RS_OPEN_CHECK_ONLY: u32 = 64;
/// Freed clusters are not punched out of the storage.
pub const QCOW2RS_OPEN_NO_DISCARD: u32 = 128;

const OPEN_FLAGS: u32 = 255;

/// qcow2, version 2 or 3.
pub const QCOW2RS_FORMAT_QCOW2: u32 = 1;
/// The bytes of the storage are the disk.
pub const QCOW2RS_FORMAT_RAW: u32 = 2;

/// An image that needs a backing or data file fails with -EPERM and
/// QCOW2RS_E_POLICY, and no file is touched.
pub const QCOW2RS_REF_DENY: u32 = 0;
/// Trusted images only: plain paths, relative to the directory of the referring
/// image (one that was not opened by path has none: -EPERM, use RESOLVE); never
/// "json:" or "protocol:" names.
pub const QCOW2RS_REF_PATHS: u32 = 1;
/// Ask the callback.
pub const QCOW2RS_REF_RESOLVE: u32 = 2;
/// The image below.
pub const QCOW2RS_REF_KIND_BACKING: u32 = 1;
/// The external data file.
pub const QCOW2RS_REF_KIND_DATA: u32 = 2;

/// How to open.  Reusable for any number of opens, which take copies.
pub struct qcow2rs_open_opts(Handle<Mutex<Settings>>);
object!(qcow2rs_open_opts: Mutex<Settings>);

/// What the program has set so far.
#[derive(Clone, Default)]
pub struct Settings {
    flags: u32,
    /// What has a name or a setter; `flags` comes on top of it.
    options: OpenOptions,
}

impl Settings {
    fn options(&self) -> OpenOptions {
        let is_set = |flag| self.flags & flag != 0;
        let mut options = self.options.clone();
        options.writable = is_set(QCOW2RS_OPEN_RDWR);
        options.lock = !is_set(QCOW2RS_OPEN_NO_LOCK);
        options.direct = is_set(QCOW2RS_OPEN_DIRECT);
        options.writethrough = is_set(QCOW2RS_OPEN_WRITETHROUGH);
        options.no_flush = is_set(QCOW2RS_OPEN_NO_FLUSH);
        options.no_backing = is_set(QCOW2RS_OPEN_NO_BACKING);
        options.check_only = is_set(QCOW2RS_OPEN_CHECK_ONLY);
        options.discard &= !is_set(QCOW2RS_OPEN_NO_DISCARD);
        options
    }
}

/// A copy of the program's options; the defaults for NULL.
pub(super) fn options(call: &Call, opts: *const qcow2rs_open_opts) -> Result<OpenOptions> {
    let opts = call.optional(opts)?;
    Ok(opts.map_or_else(OpenOptions::new, |opts| settings(&opts).options()))
}

fn settings(opts: &Mutex<Settings>) -> MutexGuard<'_, Settings> {
    // A panic poisons the handle, whose options nobody sees again.
    opts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of a format.
pub(super) fn number(format: Format) -> u32 {
    match format {
        Format::Qcow2 => QCOW2RS_FORMAT_QCOW2,
        Format::Raw => QCOW2RS_FORMAT_RAW,
    }
}

fn format(number: u32) -> Option<Format> {
    match number {
        QCOW2RS_FORMAT_QCOW2 => Some(Format::Qcow2),
        QCOW2RS_FORMAT_RAW => Some(Format::Raw),
        _ => None,
    }
}

/// [MT] Defaults: see each setter. -ENOMEM. Reusable for any number of opens.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_new(out: *mut *mut qcow2rs_open_opts) -> c_int {
    entry!(|call| {
        call.out(out)?.set(Mutex::default());
        Ok(0)
    })
}

/// [OBJ]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_free(opts: *mut *mut qcow2rs_open_opts) {
    entry!(|call| call.take(opts).map(drop))
}

/// [OBJ] The image's format is never guessed: QCOW2 unless RAW is set here.  A
/// RAW image is the bytes of its storage: the same calls serve both kinds of
/// disk, and what RAW has no answer for (snapshots, check, ...) is -ENOTSUP.
/// Opening a storage that starts with the qcow2 magic as RAW is -EINVAL unless
/// read-only or "allow-qcow2-magic" is "on".
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_set_format(
    o: *mut qcow2rs_open_opts,
    format: u32,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let Some(format) = self::format(format) else {
            return Err(Error::invalid(format!("{format} is no QCOW2RS_FORMAT_*")));
        };
        settings(&opts).options.format = format;
        Ok(0)
    })
}

/// [OBJ] Replaces the flag word.  flags: QCOW2RS_OPEN_*.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_set_flags(
    o: *mut qcow2rs_open_opts,
    flags: u32,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        self::flags(flags, OPEN_FLAGS)?;
        settings(&opts).flags = flags;
        Ok(0)
    })
}

/// [OBJ] Any option by name, value as text ("64M", "on"): what a command line
/// or test harness needs.  Names are those of `qemu-img --image-opts` for the
/// qcow2 driver where one exists ("cache-size", "l2-cache-size",
/// "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval",
/// "lazy-refcounts", "overlap-check" and its single switches,
/// "pass-discard-request", "pass-discard-snapshot" (default: as the former),
/// "pass-discard-other" (off only), "discard-no-unref"), plus "backing-format"
/// (raw | qcow2: for an image that stores no backing format, which is otherwise
/// refused with QCOW2RS_E_BACKING), "repair-dirty" (on|off, default on as in
/// QEMU: a read-write open of an image whose dirty bit is set rebuilds its
/// refcounts, in time proportional to the image, or fails with
/// QCOW2RS_E_CORRUPT, nothing changed, where that cannot be; off:
/// QCOW2RS_E_DIRTY), "allow-qcow2-magic" (on|off, default off: see set_format),
/// "max-chain-depth" (images below this one, default 200), "max-metadata-size"
/// (default 1G: for the whole chain, caches included; the cache sizes are per
/// layer), "max-virtual-size" (default: the format's), "max-key-iterations" (of
/// key derivation, to find out whether a passphrase opens a LUKS image; default
/// 268435456), "backing-direct"
/// (on|off: O_DIRECT for the images below, default as this one's, so that many
/// disks can share one base's page cache), "data-file.filename" (the path of the
/// external data file, whatever the image calls it; the reference policy is not
/// asked).  "cache-clean-interval": see qcow2rs_trim_caches.
/// -ENOENT: no such option.  -EINVAL: bad value.  -ENOTSUP: an option of QEMU's
/// that this build does not have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_set(
    o: *mut qcow2rs_open_opts,
    name: *const c_char,
    value: *const c_char,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let (name, value) = (call.text(name, "name")?, call.text(value, "value")?);
        settings(&opts).options.set(name, value)?;
        Ok(0)
    })
}

/// [OBJ] Passphrase for LUKS / legacy AES; copied, wiped on free (and when the
/// last image that was opened with it is gone).  It is tried on each encrypted
/// image of the chain that has none of its own.  A LUKS image takes the time to
/// open that its writer chose, two seconds usually.  Without a passphrase, or
/// with a wrong one, open is -EACCES, QCOW2RS_E_ENCRYPTED, but with CHECK_ONLY,
/// which needs none.  Length 0 is a passphrase, too.  For LUKS images that ask
/// for too much time: see "max-key-iterations" (QCOW2RS_E_LIMIT).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_set_secret(
    o: *mut qcow2rs_open_opts,
    secret: *const c_void,
    length: usize,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let secret = Secret::new(call.bytes(secret.cast(), length, "secret")?)?;
        settings(&opts).options.secret = Some(secret);
        Ok(0)
    })
}

/// [OBJ] The same for one image below: depth 1 is the backing file of the image
/// that is opened, 2 the one below that, ...  -EINVAL: depth 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_set_backing_secret(
    o: *mut qcow2rs_open_opts,
    depth: u32,
    secret: *const c_void,
    length: usize,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        if depth == 0 {
            return Err(Error::invalid(
                "depth 0 is no image below: see qcow2rs_open_opts_set_secret",
            ));
        }
        let secret = Secret::new(call.bytes(secret.cast(), length, "secret")?)?;
        let secrets = &mut settings(&opts).options.backing_secrets;
        secrets.retain(|(other, _)| *other != depth);
        secrets.push((depth, secret));
        Ok(0)
    })
}

/// A file that an image names: untrusted input.  Grows at the end;
/// library-owned.
#[repr(C)]
pub struct qcow2rs_ref {
    /// sizeof(struct qcow2rs_ref) in the library.
    pub struct_size: usize,
    /// QCOW2RS_REF_KIND_*
    pub kind: u32,
    /// 0: referred to by the image being opened.
    pub depth: u32,
    /// Exactly as stored, plus a NUL.
    pub name: *const c_char,
    /// May contain NULs: compare lengths.
    pub name_length: usize,
    /// Backing format as stored, or NULL if none; the library never probes
    /// formats.
    pub format: *const c_char,
    /// Path or fd name of the referrer, or NULL.
    pub referrer: *const c_char,
    /// 1: will be written (data file, commit).
    pub writable: u32,
}

/// Returns 0 and sets *storage (ownership passes) and *format (preset from
/// ref->format, 0: none or unknown), or a negative errno (-EPERM to refuse).
/// fn and opaque must outlive every image opened with these options; it runs on
/// the thread that calls open, create, reopen, invalidate or commit.
pub type qcow2rs_resolve_fn = Option<
    unsafe extern "C" fn(
        opaque: *mut c_void,
        r#ref: *const qcow2rs_ref,
        storage: *mut *mut qcow2rs_storage,
        format: *mut u32,
    ) -> c_int,
>;

/// [OBJ] Policy for files that an image names (untrusted input!): one of
/// QCOW2RS_REF_DENY, the default, QCOW2RS_REF_PATHS and QCOW2RS_REF_RESOLVE.
/// fn is required for RESOLVE, must be NULL otherwise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_open_opts_set_ref_policy(
    o: *mut qcow2rs_open_opts,
    policy: u32,
    r#fn: qcow2rs_resolve_fn,
    opaque: *mut c_void,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let policy = match (policy, r#fn) {
            (QCOW2RS_REF_DENY, None) => Policy::Deny,
            (QCOW2RS_REF_PATHS, None) => Policy::Paths,
            (QCOW2RS_REF_RESOLVE, Some(callback)) => {
                Policy::Resolve(Arc::new(Program { callback, opaque }))
            }
            (QCOW2RS_REF_RESOLVE, None) => {
                return Err(Error::invalid("QCOW2RS_REF_RESOLVE needs a function"));
            }
            (QCOW2RS_REF_DENY | QCOW2RS_REF_PATHS, Some(_)) => {
                return Err(Error::invalid("only QCOW2RS_REF_RESOLVE takes a function"));
            }
            _ => return Err(Error::invalid(format!("{policy} is no QCOW2RS_REF_*"))),
        };
        settings(&opts).options.policy = policy;
        Ok(0)
    })
}

/// The program's resolver and what it is called with.
struct Program {
    callback: unsafe extern "C" fn(
        *mut c_void,
        *const qcow2rs_ref,
        *mut *mut qcow2rs_storage,
        *mut u32,
    ) -> c_int,
    opaque: *mut c_void,
}

// SAFETY: the library never looks at what `opaque` points to, and the header
// tells the program that the function runs on any thread that opens an image.
unsafe impl Send for Program {}
// SAFETY: as above, concurrently.
unsafe impl Sync for Program {}

impl Resolver for Program {
    fn resolve(
        &self,
        reference: &Reference,
        format: Option<Format>,
    ) -> Result<(Arc<Source>, Option<Format>)> {
        let mut name = reference.name.clone();
        name.push(0);
        let stored_format = reference.format.as_deref().map(c_string);
        let referrer = c_string(reference.referrer.as_bytes());
        let r#ref = qcow2rs_ref {
            struct_size: size_of::<qcow2rs_ref>(),
            kind: match reference.kind {
                ReferenceKind::Backing => QCOW2RS_REF_KIND_BACKING,
                ReferenceKind::Data => QCOW2RS_REF_KIND_DATA,
            },
            depth: reference.depth,
            name: name.as_ptr().cast(),
            name_length: reference.name.len(),
            format: stored_format.as_ref().map_or(ptr::null(), |format| format.as_ptr()),
            referrer: if referrer.is_empty() { ptr::null() } else { referrer.as_ptr() },
            writable: reference.writable.into(),
        };
        let mut storage = ptr::null_mut();
        let mut number = format.map_or(0, self::number);
        // SAFETY: the program gave the function for calls like this one; all
        // that it gets lives until it returns.
        let ret = unsafe {
            (self.callback)(self.opaque, &raw const r#ref, &raw mut storage, &raw mut number)
        };
        // SAFETY: what the program has put into `storage` is one of its storage
        // objects, which it gives away (the header's contract).
        let call = unsafe { Call::new() };
        // Taken whatever was returned, so that it is released.
        let storage = call.take(&raw mut storage)?;
        if ret < 0 {
            return Err(refused(ret, reference));
        }
        let Some(storage) = storage else {
            let text = "the resolve callback has set no storage";
            return Err(Error::new(ErrorKind::Callback(libc::EINVAL), text));
        };
        match (number, self::format(number)) {
            (0, _) => Ok((storage.value, None)),
            (_, Some(format)) => Ok((storage.value, Some(format))),
            (_, None) => {
                let text = format!("the resolve callback has set {number}, no QCOW2RS_FORMAT_*");
                Err(Error::new(ErrorKind::Callback(libc::EINVAL), text))
            }
        }
    }
}

/// The error for a callback that returned `ret`, which is negative.
fn refused(ret: c_int, reference: &Reference) -> Error {
    let name = String::from_utf8_lossy(&reference.name);
    match ret.checked_neg() {
        Some(libc::EPERM) => {
            let text = format!("the resolve callback refuses {name:?}");
            Error::new(ErrorKind::Policy, text)
        }
        Some(errno @ 1..4096) => {
            let text = format!("the resolve callback failed for {name:?}");
            Error::os(errno, "it returned").wrap_as(ErrorKind::Callback(errno), text)
        }
        _ => {
            let text = format!("the resolve callback returned {ret}, which is no errno");
            Error::new(ErrorKind::Callback(libc::EIO), text)
        }
    }
}

/// The bytes up to the first NUL.
fn c_string(bytes: &[u8]) -> CString {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    CString::new(text).unwrap_or_default()
}
