//! Changing what an image is, in place: its version, whether its refcounts may be
//! written late, how wide they are; how its data file is called, and whether that is to
//! be a raw image.
//!
//! ```text
//! zero clusters expanded (version 2), settle; new snapshot table, new refcounts
//!     -> sync -> one write of the header's first sector -> sync
//! ```
//!
//! Before that write the image is the old one, after it the new one, each with exact
//! refcounts. What cannot be done is refused before anything is written.

use super::keyslots::KeySlots;
use super::option_names::version;
use crate::alloc::rewidth::NewTable;
use crate::error::{Error, ErrorKind, Result};
use crate::format::compression::Compression;
use crate::format::header::{Header, autoclear, compatible, incompatible};
use crate::format::limits::MAX_BACKING_NAME;
use crate::format::refcount::RefcountWidth;
use crate::format::snapshot::Snapshot;
use crate::image::disk::Disk;
use crate::image::handle::{Image, Replacement, closed_by};
use crate::image::option_values::{bad_value, number, size, switch};
use crate::image::qcow2::Qcow2;
use crate::io::blocking::Blocking;
use crate::io::engine::Engine;
use crate::io::wait::block_on;
use crate::snapshots::Changed;
use crate::snapshots::delete::l1_of;
use crate::snapshots::list::encode;
use crate::snapshots::operation::Operation;
use crate::snapshots::tables::has_zeroes;

/// What is to change; what is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AmendOptions {
    /// Header version, 2 or 3.
    pub version: Option<u32>,
    /// Whether refcounts may be written at close.
    pub lazy_refcounts: Option<bool>,
    /// Width of a refcount in bits: a power of two up to 64.
    pub refcount_bits: Option<u32>,
    /// Bytes of the disk, which must be what they are.
    pub size: Option<u64>,
    /// Name and format of the backing file, which must be what they are.
    pub backing: (Option<Vec<u8>>, Option<Vec<u8>>),
    /// The name of the data file, for images that have one; empty: no name is stored,
    /// and whoever opens the image has to say which file it is.
    pub data_file: Option<Vec<u8>>,
    /// Whether the data file is to be a raw image by itself: it may cease to be one only.
    pub data_file_raw: Option<bool>,
    /// What is to become of the key slots of a LUKS image: in a call of its own.
    pub keys: KeySlots,
}

impl AmendOptions {
    /// Sets an option by its name in `qemu-img amend -o`:
    ///
    /// | name | value | |
    /// |---|---|---|
    /// | compat | 0.10, 1.1 (v2, v3) | header version 2 or 3 |
    /// | lazy_refcounts | on, off | refcounts are written at close, and rebuilt after a crash; version 3 only |
    /// | refcount_bits | number | a power of two up to 64; 16 in version 2 |
    /// | size, backing_file, backing_fmt | as it is | they have their own calls |
    /// | data_file | name | of the data file, as it is stored; empty: none is stored |
    /// | data_file_raw | off | the data file need not be a raw image any more |
    /// | encrypt.state | active, inactive | a key slot of a LUKS image gets a key, or loses it |
    /// | encrypt.keyslot | 0 to 7 | which one; default: a free one, or those of the old passphrase |
    /// | encrypt.iter-time | milliseconds | that deriving the new key takes; default 2000 |
    ///
    /// `NotFound`: no such option; `InvalidArgument`: bad value; `NotSupported`: what
    /// can be set only when an image is made, or not by this build.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "compat" => self.version = Some(version(name, value)?),
            "lazy_refcounts" => self.lazy_refcounts = Some(switch(name, value)?),
            "refcount_bits" => {
                let bits = number(name, value, u64::MAX)?;
                let wanted = "it is a power of two, at most 64";
                let bits = u32::try_from(bits).ok().filter(|bits| is_width(*bits));
                self.refcount_bits = Some(bits.ok_or_else(|| bad_value(name, value, wanted))?);
            }
            "size" => self.size = Some(size(name, value)?),
            "backing_file" => self.backing.0 = Some(value.as_bytes().to_vec()),
            "backing_fmt" => self.backing.1 = Some(value.as_bytes().to_vec()),
            "data_file" => self.data_file = Some(value.as_bytes().to_vec()),
            "data_file_raw" => self.data_file_raw = Some(switch(name, value)?),
            "cluster_size"
            | "extended_l2"
            | "compression_type"
            | "preallocation"
            | "encryption"
            | "encrypt.format"
            | "encrypt.key-secret"
            | "encrypt.cipher-alg"
            | "encrypt.cipher-mode"
            | "encrypt.ivgen-alg"
            | "encrypt.ivgen-hash-alg"
            | "encrypt.hash-alg" => {
                let text = format!("{name:?} can only be set when an image is made");
                return Err(Error::new(ErrorKind::NotSupported, text));
            }
            "encrypt.new-secret" | "encrypt.old-secret" => {
                let text = format!("{name:?} cannot be set by name: passphrases have their calls");
                return Err(Error::new(ErrorKind::NotSupported, text));
            }
            _ => {
                let encrypt = name.strip_prefix("encrypt.");
                let set = |option| self.keys.set(name, option, value);
                return encrypt.and_then(set).unwrap_or_else(|| {
                    let text = format!("there is no option {name:?} of an image to change");
                    Err(Error::new(ErrorKind::NotFound, text))
                });
            }
        }
        Ok(())
    }
}

fn is_width(bits: u32) -> bool {
    bits.is_power_of_two() && bits <= 64
}

fn unsupported<T>(text: &str) -> Result<T> {
    Err(Error::new(ErrorKind::NotSupported, text))
}

/// An image that is to be.
struct Plan {
    header: Header,
    /// The width of refcounts changes.
    rewidth: Option<RefcountWidth>,
    /// Zero clusters have to go.
    expand: bool,
}

impl Image {
    /// Changes the image in place. `progress` is told how far it is, of how much, and
    /// returns false to give up: `Cancelled`. Durable on return; counters of the image
    /// start again.
    ///
    /// Errors: `Busy` if another call is in progress, or a request of a queue in flight;
    /// `ReadOnly`; `NotSupported` for raw images and for what only an image that is
    /// made anew can have: among them version 2 with extended L2 entries, zstd,
    /// bitmaps, or snapshots of another size, or with more than 4 GiB of VM state;
    /// `Busy`, too, where a snapshot with zero clusters is open, which version 2 cannot
    /// have; `InvalidArgument` where options do not go together, or a refcount
    /// does not fit; `Os(EFBIG)`, `NoSpace`, `Limit`. After any of these the image is
    /// as it was, but for zero clusters that may have become data.
    ///
    /// Key slots: `InvalidArgument` where QEMU refuses, too (overwriting an active slot,
    /// erasing one that has no key, or the last key; `force` allows for it); `Encrypted` if
    /// the passphrase that the image was opened with opens it no more; `NotSupported`
    /// together with other options, and for images that are not LUKS. `progress` is not
    /// called.
    pub fn amend(
        &self,
        options: &AmendOptions,
        progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
    ) -> Result<()> {
        self.alter(|disk| {
            let is_open = |snapshot: &Snapshot| self.views().has(snapshot);
            block_on(disk.amend(&Blocking, options, is_open, progress)).into()
        })
    }
}

impl Disk {
    /// See `Image::amend`; while nobody else does anything with the disk. `is_open`:
    /// whether somebody has the snapshot open.
    pub async fn amend<E: Engine>(
        &self,
        engine: &E,
        options: &AmendOptions,
        is_open: impl Fn(&Snapshot) -> bool + Send,
        progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
    ) -> Changed<()> {
        if !options.keys.is_empty() {
            return self.amend_keys(engine, options).await;
        }
        // What is done has several parts, each of which begins to count anew.
        let mut most = 0;
        let progress = &mut |done: u64, total: u64| {
            most = done.max(most);
            progress(most, total.max(most))
        };
        let mut expanded = None;
        match self.snapshots_have_zeroes(engine, options).await {
            Ok(false) => {}
            Ok(true) => {
                let changed = self.expand_snapshots(engine, is_open, progress).await;
                match (changed.result, changed.disk) {
                    (Ok(()), Replacement::Disk(disk)) => expanded = Some(disk),
                    (Ok(()), Replacement::None) => {}
                    (result, disk) => return Changed { result, disk },
                }
            }
            Err(error) => {
                let error = self.note_corruption(engine, error).await;
                return Changed { result: Err(error), disk: Replacement::None };
            }
        }
        let disk = expanded.as_deref().unwrap_or(self);
        let Changed { result, disk } = disk.amend_header(engine, options, progress).await;
        let disk = match (disk, expanded) {
            (Replacement::None, Some(expanded)) => Replacement::Disk(expanded),
            (disk, _) => disk,
        };
        Changed { result, disk }
    }

    fn has_bitmaps(&self) -> bool {
        self.bitmaps_now().is_some_and(|bitmaps| !bitmaps.list.is_empty())
    }

    /// Whether the change is one that zero clusters in snapshots are in the way of.
    async fn snapshots_have_zeroes<E: Engine>(
        &self,
        engine: &E,
        options: &AmendOptions,
    ) -> Result<bool> {
        let snapshots = &self.snapshot_table(engine).await?.list;
        let Some(image) = self.top() else { return unsupported("a raw image has no options") };
        image.writing()?;
        let plan = plan(image, snapshots, self.has_bitmaps(), options)?;
        let Some(plan) = plan.filter(|plan| plan.expand) else { return Ok(false) };
        self.check_reload(&plan.header, self.bitmaps_now())?;
        for snapshot in snapshots {
            let l1 = l1_of(engine, image, snapshot).await?;
            if !mutant!(AmendZeroesKept) && has_zeroes(engine, image, &l1).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The change itself, where no snapshot is in its way.
    async fn amend_header<E: Engine>(
        &self,
        engine: &E,
        options: &AmendOptions,
        progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
    ) -> Changed<()> {
        match self.prepare(engine, options, progress).await {
            Ok(None) => Changed { result: Ok(()), disk: Replacement::None },
            Ok(Some((mut operation, plan))) => {
                let result = carry_out(&mut operation, plan, progress).await;
                operation.finish(result).await
            }
            Err(error) => {
                let error = self.note_corruption(engine, error).await;
                Changed { result: Err(error), disk: Replacement::None }
            }
        }
    }

    async fn amend_keys<E: Engine>(&self, engine: &E, options: &AmendOptions) -> Changed<()> {
        let unchanged = |error| Changed { result: Err(error), disk: Replacement::None };
        if *options != (AmendOptions { keys: options.keys.clone(), ..AmendOptions::default() }) {
            let text = "key slots are changed by a call of their own, with no other option";
            return unchanged(Error::new(ErrorKind::NotSupported, text));
        }
        if let Err(error) = self.settle(engine).await {
            return unchanged(error);
        }
        let result = self.change_keys(engine, &options.keys).await;
        match self.reload(engine).await {
            Ok(disk) => Changed { result, disk: Replacement::Disk(Box::new(disk)) },
            // It would go on with slots that are others in the file.
            Err(error) => {
                Changed { result: result.and(Err(closed_by(error))), disk: Replacement::Closed }
            }
        }
    }

    /// Everything up to the change itself; `None`: there is nothing to change.
    async fn prepare<'a, E: Engine>(
        &'a self,
        engine: &'a E,
        options: &AmendOptions,
        progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
    ) -> Result<Option<(Operation<'a, E>, Plan)>> {
        let snapshots = &self.snapshot_table(engine).await?.list;
        let Some(image) = self.top() else { return unsupported("a raw image has no options") };
        image.writing()?;
        let plan = plan(image, snapshots, self.has_bitmaps(), options)?;
        let Some(plan) = plan else { return Ok(None) };
        // The options of opening may want what the image is not to have any more.
        self.check_reload(&plan.header, self.bitmaps_now())?;
        if plan.expand && !mutant!(AmendZeroesKept) {
            self.expand_zeroes(engine, progress).await?;
        }
        Ok(Some((Operation::begin(engine, self).await?, plan)))
    }
}

/// What is to become of an image, if it can be; `None`: it is that already.
fn plan(
    image: &Qcow2,
    snapshots: &[Snapshot],
    bitmaps: bool,
    options: &AmendOptions,
) -> Result<Option<Plan>> {
    let old = &image.header;
    check_unchanged(old, options)?;
    let mut header = old.clone();
    header.version = options.version.unwrap_or(old.version);
    if !(2..=3).contains(&header.version) {
        return Err(Error::invalid("the version is 2 or 3"));
    }
    let bits = options.refcount_bits.unwrap_or(old.refcount_bits());
    if !is_width(bits) {
        return Err(Error::invalid("the refcount width must be a power of two up to 64"));
    }
    header.refcount_order = bits.ilog2();
    match options.lazy_refcounts {
        Some(true) => header.compatible |= compatible::LAZY_REFCOUNTS,
        Some(false) => header.compatible &= !compatible::LAZY_REFCOUNTS,
        None => {}
    }
    amend_data_file(&mut header, options)?;
    if header.version < 3 {
        if bits != 16 {
            return Err(Error::invalid("version 2 (compat=0.10) needs refcount_bits=16"));
        }
        if options.lazy_refcounts == Some(true) {
            return Err(Error::invalid("lazy refcounts need version 3 (compat=1.1)"));
        }
        if old.version > 2 {
            check_downgrade(old, snapshots, bitmaps)?;
        }
        header.incompatible = 0;
        header.compatible = 0;
        header.autoclear = 0;
    }
    let rewidth = match bits == old.refcount_bits() {
        true => None,
        false => Some(RefcountWidth::new(header.refcount_order)?),
    };
    let same = header.version == old.version
        && (header.compatible, header.autoclear) == (old.compatible, old.autoclear)
        && header.extensions == old.extensions;
    if same && rewidth.is_none() {
        return Ok(None);
    }
    let expand = header.version < old.version;
    Ok(Some(Plan { header, rewidth, expand }))
}

/// What has a call of its own may be named, as it is.
fn check_unchanged(old: &Header, options: &AmendOptions) -> Result<()> {
    if options.size.is_some_and(|size| size != old.virtual_size()) {
        return unsupported("the size of the disk is not changed by amending");
    }
    let backing = old.backing.as_ref();
    let name = backing.map_or(&b""[..], |backing| &backing.name);
    let format = backing.and_then(|backing| backing.format.as_deref()).unwrap_or_default();
    let (new_name, new_format) = &options.backing;
    if new_name.as_ref().is_some_and(|new| new != name)
        || new_format.as_ref().is_some_and(|new| new != format)
    {
        return unsupported("the backing file is not changed by amending: rebase the image");
    }
    Ok(())
}

/// The data file of an image that has one. It stays open, whatever it is to be called.
fn amend_data_file(header: &mut Header, options: &AmendOptions) -> Result<()> {
    match options.data_file_raw {
        Some(true) if !header.raw_external_data() => {
            return Err(Error::invalid("data_file_raw cannot be set on an image that exists"));
        }
        Some(false) => header.autoclear &= !autoclear::RAW_EXTERNAL_DATA,
        _ => {}
    }
    let Some(name) = &options.data_file else { return Ok(()) };
    if !header.external_data_file() {
        return Err(Error::invalid("data_file can only be set for an image that has a data file"));
    }
    if name.contains(&0) || name.len() > MAX_BACKING_NAME {
        return Err(Error::invalid(format!(
            "the name of a data file has at most {MAX_BACKING_NAME} bytes, and no NUL"
        )));
    }
    header.extensions.data_file = Some(name.clone()).filter(|name| !name.is_empty());
    Ok(())
}

/// Whether version 2 can say what a version 3 image says.
fn check_downgrade(old: &Header, snapshots: &[Snapshot], bitmaps: bool) -> Result<()> {
    if old.external_data_file() {
        return unsupported("version 2 (compat=0.10) knows no external data file");
    }
    if old.extended_l2() {
        return unsupported("version 2 (compat=0.10) knows no extended L2 entries");
    }
    if old.compression != Compression::Zlib.number() {
        return unsupported("version 2 (compat=0.10) knows no compression but zlib");
    }
    if old.incompatible & !incompatible::DIRTY != 0 {
        return unsupported("version 2 (compat=0.10) knows no incompatible features");
    }
    if bitmaps {
        return unsupported("version 2 (compat=0.10) knows no bitmaps: remove them first");
    }
    if !old.unknown_fields.is_empty() {
        return unsupported("the header has fields that version 2 (compat=0.10) has no place for");
    }
    let size = old.virtual_size();
    let fits = |snapshot: &Snapshot| {
        snapshot.disk_size.is_none_or(|other| other == size)
            && u32::try_from(snapshot.vm_state_size).is_ok()
    };
    match snapshots.iter().all(fits) {
        true => Ok(()),
        false => unsupported(
            "a snapshot has another size, or VM state of more than 4 GiB, which version 2 \
             (compat=0.10) cannot record",
        ),
    }
}

async fn carry_out<E: Engine>(
    operation: &mut Operation<'_, E>,
    plan: Plan,
    progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
) -> Result<()> {
    let Plan { header, rewidth, .. } = plan;
    let allocator = &operation.writing.allocator;
    let old_table = allocator.clusters_of(operation.header.snapshots_offset, operation.table.bytes);
    let upgrade = header.version > operation.header.version;
    // Version 3 wants each snapshot to say how large its disk is.
    let new_table = upgrade && operation.table.list.iter().any(|s| s.disk_size.is_none());
    if new_table {
        let bytes = encode(&operation.table.list, header.virtual_size())?;
        operation.header.snapshots_offset = operation.place(&bytes).await?;
        operation.publish().await?;
    }
    let (offset, bytes) = allocator.refcounts.table_place();
    operation.header.reftable_offset = offset;
    operation.header.reftable_clusters = header.geometry.clusters_for(bytes) as u32;
    if let Some(width) = rewidth {
        let gone = if new_table { vec![old_table] } else { Vec::new() };
        let (engine, storage) = (operation.engine, &operation.image.storage);
        let NewTable { offset, clusters } =
            allocator.rewidth(engine, storage, width, &gone, progress).await?;
        operation.header.reftable_offset = offset;
        operation.header.reftable_clusters = clusters as u32;
    }
    operation.header.version = header.version;
    operation.header.refcount_order = header.refcount_order;
    operation.header.incompatible = header.incompatible & !incompatible::DIRTY;
    operation.header.compatible = header.compatible;
    operation.header.autoclear = header.autoclear;
    operation.header.extensions = header.extensions;
    operation.disk.check_reload(&operation.header, operation.disk.bitmaps_now())?;
    operation.switch_all().await?;
    if new_table && rewidth.is_none() {
        operation.free_old_table().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str, value: &str) -> Option<ErrorKind> {
        AmendOptions::default().set(name, value).err().map(|error| error.kind())
    }

    #[test]
    fn errors_tell_name_from_value() {
        for (name, value) in [
            ("compat", "1.2"),
            ("lazy_refcounts", "maybe"),
            ("refcount_bits", "7"),
            ("refcount_bits", "128"),
            ("refcount_bits", "0"),
            ("size", "x"),
        ] {
            assert_eq!(kind(name, value), Some(ErrorKind::InvalidArgument), "{name}={value}");
        }
        for name in ["cluster_size", "extended_l2", "compression_type", "encrypt.new-secret"] {
            assert_eq!(kind(name, "on"), Some(ErrorKind::NotSupported), "{name}");
        }
        for name in ["", "bogus", "Compat"] {
            assert_eq!(kind(name, "on"), Some(ErrorKind::NotFound), "{name}");
        }
        assert_eq!(kind("refcount_bits", "64"), None);
        assert_eq!(kind("compat", "v2"), None);
    }
}
