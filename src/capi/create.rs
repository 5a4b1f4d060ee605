//! Create

use std::ffi::{c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::entry::{Call, flags};
use super::handle::Handle;
use super::open::qcow2rs_image;
use super::open_opts::{options, qcow2rs_open_opts};
use super::storage::{path, qcow2rs_storage};
use crate::admin::amend::AmendOptions;
use crate::admin::create::{self, CreateOptions};
use crate::crypto::secret::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::format::limits::MAX_BACKING_NAME;
use crate::image::options::Format;

/// -EEXIST rather than truncate; a file made in vain is removed.
pub const QCOW2RS_CREATE_EXCL: u32 = 1;

/// What a new image is to be.  Reusable for any number of images.
pub struct qcow2rs_create_opts(Handle<Mutex<CreateSettings>>);
object!(qcow2rs_create_opts: Mutex<CreateSettings>);

/// Names and values.
type Given = Vec<(String, String)>;

/// Options for an image that is made, or that is changed.
#[derive(Default)]
pub struct CreateSettings {
    create: CreateOptions,
    /// What was set, by name, in that order: what was not does not change.
    given: Given,
    /// The passphrase.
    secret: Option<Secret>,
    /// What was set that only an image that there is has: key slots.
    amend_only: Option<String>,
}

impl CreateSettings {
    fn give(&mut self, name: &str, value: &str) {
        self.given.push((name.to_owned(), value.to_owned()));
    }
}

fn settings(opts: &Mutex<CreateSettings>) -> MutexGuard<'_, CreateSettings> {
    // A panic poisons the handle, whose options nobody sees again.
    opts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn copy(call: &Call, opts: *const qcow2rs_create_opts) -> Result<CreateOptions> {
    let opts = call.held(opts)?;
    let settings = settings(&opts);
    if settings.create.data_file.is_none() && settings.given.iter().any(|it| it.0 == "data_file") {
        return Err(Error::invalid(
            "\"data_file\" by name is for amending: an image is made with \
             qcow2rs_create_opts_set_data_file",
        ));
    }
    if let Some(name) = &settings.amend_only {
        return Err(Error::invalid(format!("{name:?} is for qcow2rs_amend only")));
    }
    let mut create = settings.create.clone();
    if let Some(secret) = &settings.secret {
        create.encryption.set_secret(secret.clone());
    }
    Ok(create)
}

/// What was set, by name, and the passphrase.
pub(super) fn given(
    call: &Call,
    opts: *const qcow2rs_create_opts,
) -> Result<(Given, Option<Secret>)> {
    let opts = call.held(opts)?;
    let settings = settings(&opts);
    Ok((settings.given.clone(), settings.secret.clone()))
}

/// [MT]
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_opts_new(out: *mut *mut qcow2rs_create_opts) -> c_int {
    entry!(|call| {
        call.out(out)?.set(Mutex::default());
        Ok(0)
    })
}

/// [OBJ]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_opts_free(opts: *mut *mut qcow2rs_create_opts) {
    entry!(|call| call.take(opts).map(drop))
}

/// [OBJ] Typed setters for what every program sets...  The size is rounded up
/// to a multiple of 512.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_opts_set_size(
    o: *mut qcow2rs_create_opts,
    bytes: u64,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let mut settings = settings(&opts);
        settings.create.size = Some(bytes);
        settings.give("size", &bytes.to_string());
        Ok(0)
    })
}

/// [OBJ] The image below, as it is to be written into the header.  format: raw
/// or qcow2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_opts_set_backing(
    o: *mut qcow2rs_create_opts,
    name: *const c_char,
    format: *const c_char,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let name = call.string(name, "name")?.to_bytes();
        if name.is_empty() || name.len() > MAX_BACKING_NAME {
            return Err(Error::invalid(format!(
                "the name of a backing file has 1 to {MAX_BACKING_NAME} bytes, not {}",
                name.len()
            )));
        }
        let format = call.string(format, "format")?;
        let Some(format) = Format::from_name(format.to_bytes()) else {
            return Err(Error::invalid(format!("{format:?} is no backing format: raw or qcow2")));
        };
        let mut settings = settings(&opts);
        settings.create.backing = Some((name.to_vec(), format));
        settings.give("backing_file", &String::from_utf8_lossy(name));
        settings.give("backing_fmt", format.name());
        Ok(0)
    })
}

/// [OBJ] The file that guest data will be in; *storage is consumed, and what
/// it holds is lost when an image is made.  name: as it is to be written into
/// the header, for those who open the image later.  Not for version 2 (compat
/// 0.10).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_opts_set_data_file(
    o: *mut qcow2rs_create_opts,
    name: *const c_char,
    storage: *mut *mut qcow2rs_storage,
) -> c_int {
    entry!(|call| {
        // The storage first: it is consumed whatever else is wrong.
        let source = call.consume(storage);
        let opts = call.held(o)?;
        let name = call.string(name, "name")?.to_bytes();
        if name.is_empty() || name.len() > MAX_BACKING_NAME {
            return Err(Error::invalid(format!(
                "the name of a data file has 1 to {MAX_BACKING_NAME} bytes, not {}",
                name.len()
            )));
        }
        let mut settings = settings(&opts);
        settings.create.data_file = Some((name.to_vec(), source?));
        settings.give("data_file", &String::from_utf8_lossy(name));
        Ok(0)
    })
}

/// [OBJ] Passphrase of an encrypted image (UTF-8 without NUL, as QEMU demands);
/// copied, wiped on free.  For qcow2rs_amend: that of a new key (encrypt.state =
/// active), or of the keys to erase (inactive).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_opts_set_secret(
    o: *mut qcow2rs_create_opts,
    secret: *const c_void,
    length: usize,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let secret = Secret::new(call.bytes(secret.cast(), length, "secret")?)?;
        settings(&opts).secret = Some(secret);
        Ok(0)
    })
}

/// [OBJ] ...and the rest by the names of `qemu-img create -o`: size, compat
/// (0.10|1.1), cluster_size, lazy_refcounts, refcount_bits, extended_l2,
/// compression_type (zlib|zstd), data_file_raw,
/// preallocation (off|metadata|falloc|full), encrypt.format (luks|aes),
/// encrypt.cipher-alg (aes-256, ...), encrypt.cipher-mode (xts|cbc|ctr|ecb),
/// encrypt.ivgen-alg (plain64|plain|essiv), encrypt.ivgen-hash-alg,
/// encrypt.hash-alg (sha256, ...), encrypt.iter-time (milliseconds that it takes
/// to make, and later to open, the image; default 2000); for qcow2rs_amend also
/// data_file (a name), encrypt.state and encrypt.keyslot.
/// -ENOENT: no such option.  -EINVAL: bad value.  -ENOTSUP: an option or value
/// of QEMU's that this build does not have.  What goes together is checked by
/// create.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_opts_set(
    o: *mut qcow2rs_create_opts,
    name: *const c_char,
    value: *const c_char,
) -> c_int {
    entry!(|call| {
        let opts = call.held(o)?;
        let (name, value) = (call.text(name, "name")?, call.text(value, "value")?);
        let mut settings = settings(&opts);
        match settings.create.set(name, value) {
            // A name is for amending; with a storage of its own an image has both.
            Err(_) if name == "data_file" => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {
                AmendOptions::default().set(name, value)?;
                settings.amend_only = Some(name.to_owned());
            }
            set => set?,
        }
        settings.give(name, value);
        Ok(0)
    })
}

/// [MT] Overwrites *storage (consumed).  When out is not NULL the new image is
/// returned open, as by qcow2rs_open with open_opts (which may be NULL) plus
/// OPEN_RDWR.  The backing file is opened, through the policy of open_opts, if
/// size was not set or out is not NULL (for that once more in the end).  What
/// open_opts and the backing file say against it is found out before anything is
/// written.  Durable on return unless open_opts say NO_FLUSH (honoured without
/// out, too).
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create(
    storage: *mut *mut qcow2rs_storage,
    opts: *const qcow2rs_create_opts,
    open_opts: *const qcow2rs_open_opts,
    out: *mut *mut qcow2rs_image,
) -> c_int {
    entry!(|call| {
        // The storage first: it is consumed whatever else is wrong.
        let source = call.consume(storage);
        let out = call.optional_out(out)?;
        let (opts, open) = (copy(call, opts)?, options(call, open_opts)?);
        match out {
            None => create::create(source?, &opts, &open)?,
            Some(out) => _ = out.set(create::create_open(source?, &opts, &open)?.into()),
        }
        Ok(0)
    })
}

/// [MT] Creates the file, mode 0644 less the umask, or overwrites the one there
/// is.  flags: QCOW2RS_CREATE_EXCL.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_create_path(
    path: *const c_char,
    flags: u32,
    opts: *const qcow2rs_create_opts,
    open_opts: *const qcow2rs_open_opts,
    out: *mut *mut qcow2rs_image,
) -> c_int {
    entry!(|call| {
        let out = call.optional_out(out)?;
        let path = self::path(call.string(path, "path")?)?;
        self::flags(flags, QCOW2RS_CREATE_EXCL)?;
        let exclusive = flags & QCOW2RS_CREATE_EXCL != 0;
        let (opts, open) = (copy(call, opts)?, options(call, open_opts)?);
        match out {
            None => create::create_path(&path, exclusive, &opts, &open)?,
            Some(out) => {
                let image = create::create_path_open(&path, exclusive, &opts, &open)?;
                out.set(image.into());
            }
        }
        Ok(0)
    })
}

/// [MT] Bytes needed by an image with these options: required for one without
/// data, fully_allocated for one holding size bytes (`qemu-img measure`).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_measure(
    opts: *const qcow2rs_create_opts,
    required: *mut u64,
    fully_allocated: *mut u64,
) -> c_int {
    entry!(|call| {
        let opts = copy(call, opts)?;
        let required = call.slot(required, "required")?;
        let fully_allocated = call.slot(fully_allocated, "fully_allocated")?;
        let (empty, full) = create::measure(&opts)?;
        required.set(empty);
        fully_allocated.set(full);
        Ok(0)
    })
}
