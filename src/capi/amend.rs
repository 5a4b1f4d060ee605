//! Amend

use std::ffi::{c_int, c_void};

use super::check::qcow2rs_progress_fn;
use super::create::{given, qcow2rs_create_opts};
use super::open::qcow2rs_image;
use crate::admin::amend::AmendOptions;
use crate::admin::keyslots::KeyState;
use crate::error::Error;

/// The program's function and what it is called with.
struct Progress {
    function: qcow2rs_progress_fn,
    opaque: *mut c_void,
}

// SAFETY: an address that the library never looks at; the function is called by the
// thread that called the library, before it returns.
unsafe impl Send for Progress {}

impl Progress {
    fn tell(&mut self, done: u64, total: u64) -> bool {
        // SAFETY: the program gave the function for calls like this one.
        self.function.is_none_or(|function| unsafe { function(self.opaque, done, total) } == 0)
    }
}

/// [EXCL] Changes what can be changed in place, option names of `qemu-img
/// amend -o`: compat (0.10|1.1), lazy_refcounts, refcount_bits; of an image
/// with a data file: data_file (its name; empty: none is stored), data_file_raw
/// (off); what was not set in opts stays.  Durable on return.  progress may be
/// NULL.  Counters of the image start again.
/// Key slots of a LUKS image, in a call of its own: encrypt.state (active: the
/// passphrase of qcow2rs_create_opts_set_secret gets a key slot; inactive: the
/// slots that it opens, or encrypt.keyslot, or that one only if it does, lose
/// their key), encrypt.keyslot (0 to 7; default a free one), encrypt.iter-time.
/// -EINVAL where a key would be overwritten, or the last one erased, or what is
/// to be erased is not there.  -EACCES: the passphrase that img was opened with
/// opens it no more.
/// -ENOTSUP: what only an image that is made anew can have (cluster_size, ...),
/// another size or backing file, which are not changed by amending; key slots
/// together with other options, or of an image that is not LUKS; for 0.10:
/// extended L2 entries, zstd, bitmaps, snapshots of another size.  -EINVAL:
/// options that do not go together (0.10 needs refcount_bits=16), a refcount
/// that does not fit.  -ECANCELED: progress said so.  -EROFS, -EBUSY (also: a
/// snapshot with zero clusters is open, which 0.10 cannot have), -ENOSPC,
/// -EFBIG.  After any of these the image is as it was, but that zero clusters
/// may have become data on the way to 0.10.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_amend(
    img: *mut qcow2rs_image,
    opts: *const qcow2rs_create_opts,
    progress: qcow2rs_progress_fn,
    opaque: *mut c_void,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let mut options = AmendOptions::default();
        let (given, secret) = given(call, opts)?;
        for (name, value) in given {
            options.set(&name, &value)?;
        }
        match options.keys.state {
            Some(KeyState::Active) => options.keys.new_secret = secret,
            Some(KeyState::Inactive) => options.keys.old_secret = secret,
            None if secret.is_some() => {
                return Err(Error::invalid("a passphrase needs \"encrypt.state\""));
            }
            None => {}
        }
        let mut program = Progress { function: progress, opaque };
        image.amend(&options, &mut |done, total| program.tell(done, total))?;
        Ok(0)
    })
}
