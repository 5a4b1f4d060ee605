//! Internal snapshots

use std::ffi::{c_char, c_int, c_void};

use super::entry::Call;
use super::io::memory;
use super::open::qcow2rs_image;
use crate::error::{Error, ErrorKind, Result};
use crate::snapshots::{Meta, SnapshotInfo};

/// What is known of a snapshot.  Grows at the end.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2rs_snapshot_info {
    /// NUL-terminated, truncated if longer.
    pub id: [c_char; 128],
    /// NUL-terminated, truncated if longer.
    pub name: [c_char; 256],
    /// Bytes.
    pub virtual_size: u64,
    /// Bytes; 0: none.
    pub vm_state_size: u64,
    /// Since 1970.
    pub date_sec: i64,
    /// Of that second.
    pub date_nsec: u32,
    /// 0.
    pub reserved: u32,
    /// How long the guest had run.
    pub vm_clock_nsec: u64,
    /// UINT64_MAX: not recorded.
    pub icount: u64,
}

/// The bytes as a C string, as far as they fit.
fn c_string<const N: usize>(bytes: &[u8]) -> [c_char; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().take(N - 1).zip(bytes) {
        *to = *from as c_char;
    }
    out
}

impl qcow2rs_snapshot_info {
    fn new(info: &SnapshotInfo) -> qcow2rs_snapshot_info {
        qcow2rs_snapshot_info {
            id: c_string(&info.id),
            name: c_string(&info.name),
            virtual_size: info.virtual_size,
            vm_state_size: info.meta.vm_state_size,
            date_sec: info.meta.date_sec.into(),
            date_nsec: info.meta.date_nsec,
            reserved: 0,
            vm_clock_nsec: info.meta.vm_clock_nsec,
            icount: info.meta.icount.unwrap_or(u64::MAX),
        }
    }

    fn meta(&self) -> Result<Meta> {
        let date_sec = u32::try_from(self.date_sec).map_err(|_| {
            Error::invalid(format!("{} is no date_sec that can be stored", self.date_sec))
        })?;
        if self.date_nsec >= 1_000_000_000 {
            return Err(Error::invalid(format!("{} is no date_nsec", self.date_nsec)));
        }
        Ok(Meta {
            vm_state_size: self.vm_state_size,
            date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: Some(self.icount).filter(|icount| *icount != u64::MAX),
        })
    }
}

/// [MT] Number of internal snapshots; 0 for a snapshot that is open itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_snapshot_count(img: *mut qcow2rs_image) -> c_int {
    entry!(|call| Ok(c_int::try_from(call.held(img)?.snapshot_count()?).unwrap_or(c_int::MAX)))
}

/// [MT] One of them, in the order of the table: index < count; -ENOENT
/// otherwise.  info_size is sizeof(*info), as in qcow2rs_get_info.  -EIO: the
/// table is malformed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_snapshot_get(
    img: *mut qcow2rs_image,
    index: u32,
    info: *mut qcow2rs_snapshot_info,
    info_size: usize,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let least = size_of::<qcow2rs_snapshot_info>();
        let to = call.sized_out(info, info_size, least, "info")?;
        to.set(&qcow2rs_snapshot_info::new(&image.snapshot(index)?));
        Ok(0)
    })
}

/// [EXCL] Takes a snapshot of the active state; durable on return.  meta: what
/// the host records (vm_state_size, date_*, vm_clock_nsec, icount are used),
/// meta_size its sizeof; NULL: now, no VM state.  With a vm_state_size, the VM
/// state written so far becomes the snapshot's, and the active one empty.  The
/// new id goes to id_out (may be NULL), NUL-terminated; -ERANGE if it does not
/// fit.  -EEXIST: the name exists.  -EINVAL: a name that is empty or longer
/// than 255 bytes; refcounts too narrow to count one more reference.  -EFBIG:
/// 65536 snapshots, a table of more than 64 MiB, or (QCOW2RS_E_LIMIT) more
/// memory than "max-metadata-size" is needed.  -ENOSPC.  -EROFS.  -ENOTSUP: a
/// RAW image.  After any of these, and -EBUSY, the image is as it was; after
/// -EIO the list tells whether there is a snapshot.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_snapshot_create(
    img: *mut qcow2rs_image,
    name: *const c_char,
    meta: *const qcow2rs_snapshot_info,
    meta_size: usize,
    id_out: *mut c_char,
    id_out_size: usize,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let name = call.string(name, "name")?.to_bytes();
        let meta = if meta.is_null() { Meta::now() } else { given(call, meta, meta_size)? };
        let room = if id_out.is_null() { usize::MAX } else { id_out_size };
        // Nothing is taken whose ID could not be told.
        let check_id = |id: &[u8]| match id.len() < room {
            true => Ok(()),
            false => {
                let text = format!("the ID has {} bytes, id_out room for {room}", id.len() + 1);
                Err(Error::new(ErrorKind::Os(libc::ERANGE), text))
            }
        };
        let id = image.snapshot_create_if(name, &meta, check_id)?;
        if !id_out.is_null() {
            for (index, byte) in id.iter().chain(&[0]).enumerate() {
                // SAFETY: the ID and its NUL fit into id_out (checked), which is
                // writable (the caller's promise).
                unsafe { id_out.add(index).write(*byte as c_char) };
            }
        }
        Ok(0)
    })
}

fn given(call: &Call, meta: *const qcow2rs_snapshot_info, size: usize) -> Result<Meta> {
    let least = size_of::<qcow2rs_snapshot_info>();
    // SAFETY: numbers and characters, for which all zeroes is valid.
    unsafe { call.sized_in(meta, size, least, "meta") }?.meta()
}

/// [EXCL] The active state, the size of the disk and VM state included, is
/// replaced; durable on return.  id_or_name: the id is tried first.  -ENOENT.
/// -ENOTSUP: a snapshot of another size, in a version 2 image or beside
/// bitmaps; a bitmap that is enabled.  Otherwise as qcow2rs_snapshot_create.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_snapshot_apply(
    img: *mut qcow2rs_image,
    id_or_name: *const c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        image.snapshot_apply(call.string(id_or_name, "id_or_name")?.to_bytes()).map(|()| 0)
    })
}

/// [EXCL] Deletes; durable on return.  The id is tried first.  -ENOENT.
/// -EBUSY: it is open, too.  Otherwise as qcow2rs_snapshot_create.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_snapshot_delete(
    img: *mut qcow2rs_image,
    id_or_name: *const c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        image.snapshot_delete(call.string(id_or_name, "id_or_name")?.to_bytes()).map(|()| 0)
    })
}

/// [EXCL] Gives it another name; durable on return.  The id is tried first.
/// -ENOENT.  -EEXIST: another one has the name.  Otherwise as
/// qcow2rs_snapshot_create.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_snapshot_rename(
    img: *mut qcow2rs_image,
    id_or_name: *const c_char,
    new_name: *const c_char,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        let old = call.string(id_or_name, "id_or_name")?.to_bytes();
        image.snapshot_rename(old, call.string(new_name, "new_name")?.to_bytes()).map(|()| 0)
    })
}

/// [MT] Opens a snapshot read-only as an image of its own.  The id is tried
/// first.  It keeps img's storage alive, with its lock; writing img goes on, and
/// so does closing it; deleting that snapshot gives -EBUSY.  It cannot be
/// reopened, invalidated or checked: -ENOTSUP.  -ENOENT.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_snapshot_open(
    img: *mut qcow2rs_image,
    id_or_name: *const c_char,
    out: *mut *mut qcow2rs_image,
) -> c_int {
    entry!(|call| {
        let out = call.out(out)?;
        let image = call.held(img)?;
        let id_or_name = call.string(id_or_name, "id_or_name")?.to_bytes();
        out.set(image.snapshot_open(id_or_name)?.into());
        Ok(0)
    })
}

/// [MT] Reads VM state of the active image or of an opened snapshot: bytes of
/// their own behind the disk, zero where nothing was written.  -ENOTSUP: a RAW
/// image.  -EINVAL: past all that can be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_vmstate_pread(
    img: *mut qcow2rs_image,
    buf: *mut c_void,
    length: usize,
    offset: u64,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        image.read_vm_state_guest(memory(call, buf, length, offset)?, offset).map(|()| 0)
    })
}

/// [MT] Writes VM state of the active image; durable with the next flush.
/// -EROFS: of a snapshot, too.  -EFBIG: past all that can be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_vmstate_pwrite(
    img: *mut qcow2rs_image,
    buf: *const c_void,
    length: usize,
    offset: u64,
) -> c_int {
    entry!(|call| {
        let image = call.held(img)?;
        image.write_vm_state_guest(memory(call, buf, length, offset)?, offset).map(|()| 0)
    })
}
