//! Opening: a storage, its header and tables, and the chain below it.
//!
//! Everything that this build cannot do is refused here, by name, before
//! anything is written. Memory is reckoned with before it is taken.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use super::bitmaps::Bitmaps;
use super::data_file::open_data_file;
use super::disk::{Disk, Layer, Raw};
use super::encryption::{self, Encryption};
use super::gate;
use super::open_writable::begin_writing;
use super::options::{Format, OpenOptions, Reference, ReferenceKind};
use super::qcow2::{L1Table, Qcow2};
use crate::alloc::health::Health;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, MAGIC};
use crate::format::l2::L2Format;
use crate::geometry::Geometry;
use crate::io::engine::Engine;
use crate::io::storage::{Access, Source, Storage};
use crate::metadata::cache::SliceCache;
use crate::metadata::tables::{read, read_table};

/// L2 slices, unless the options say otherwise.
const L2_CACHE_BYTES: u64 = 32 << 20;
const REFCOUNT_CACHE_BYTES: u64 = 256 << 10;

/// Memory for metadata that the options still allow.
pub(crate) struct Budget(pub u64);

impl Budget {
    /// `Limit` where so much could not be taken.
    pub fn check(&self, bytes: u64, what: &str, name: &str) -> Result<()> {
        Budget(self.0).take(bytes, what, name)
    }

    pub fn take(&mut self, bytes: u64, what: &str, name: &str) -> Result<()> {
        mutant!(MemoryNotReckoned => return Ok(()));
        self.0 = self.0.checked_sub(bytes).ok_or_else(|| {
            Error::new(
                ErrorKind::Limit,
                format!(
                    "{name}: {what} of {bytes} bytes is more than \"max-metadata-size\" leaves"
                ),
            )
        })?;
        Ok(())
    }
}

/// How the storage of a disk's own image is opened.
pub fn access(options: &OpenOptions) -> Access {
    Access {
        writable: options.writable,
        direct: options.direct,
        lock: options.lock,
        no_flush: options.no_flush,
        fixed_length: options.format == Format::Raw,
        shares_writes: false,
    }
}

impl Disk {
    /// Opens an image and what is below it.
    pub async fn open<E: Engine>(
        engine: &E,
        source: Arc<Source>,
        options: &OpenOptions,
    ) -> Result<Disk> {
        let storage = Storage::open(source, access(options))?;
        Disk::open_storage(engine, storage, options).await
    }

    /// Opens, read-only, what an image that does not exist yet names as its backing
    /// file.
    pub async fn open_named<E: Engine>(
        engine: &E,
        name: &[u8],
        format: Format,
        referrer: &str,
        directory: Option<&Path>,
        options: &OpenOptions,
    ) -> Result<Disk> {
        let reference = Reference {
            kind: ReferenceKind::Backing,
            depth: 0,
            name: name.to_vec(),
            format: Some(format.name().into()),
            referrer: referrer.to_owned(),
            writable: false,
        };
        let opened = async {
            check_depth(0, options)?;
            let (source, format) = gate::resolve(options, &reference, directory)?;
            let below = below(options, format, 1);
            let storage = Storage::open(source, access(&below))?;
            Disk::open_chain(engine, storage, (None, None), &below, 1).await
        }
        .await;
        opened.map_err(|error| below_error(error, referrer, &String::from_utf8_lossy(name), 0))
    }

    /// As `open`, on a storage that is open already.
    pub async fn open_storage<E: Engine>(
        engine: &E,
        storage: Storage,
        options: &OpenOptions,
    ) -> Result<Disk> {
        Disk::open_chain(engine, storage, (None, None), options, 0).await
    }

    /// As `open_storage`, with a data file that is open already, too, and what encrypts
    /// the data if the image was open before.
    pub async fn open_storages<E: Engine>(
        engine: &E,
        storage: Storage,
        data_file: Option<Storage>,
        key: Option<Arc<Encryption>>,
        options: &OpenOptions,
    ) -> Result<Disk> {
        Disk::open_chain(engine, storage, (data_file.map(Arc::new), key), options, 0).await
    }

    /// `known`: the data file of the first image, if it is open already, and what encrypts
    /// its data, if that is known. `depth`: how many images there are above.
    async fn open_chain<E: Engine>(
        engine: &E,
        storage: Storage,
        known: (Option<Arc<Storage>>, Option<Arc<Encryption>>),
        options: &OpenOptions,
        depth: u32,
    ) -> Result<Disk> {
        let (data_file, key) = known;
        let mut budget = Budget(options.max_metadata_size);
        let mut seen = Vec::from_iter(storage.identity());
        seen.extend(data_file.as_ref().and_then(|file| file.identity()));
        let mut first = open_layer(engine, storage, options, &mut budget, key).await?;
        match (&mut first, data_file) {
            (Layer::Qcow2(image), Some(file)) if image.header.external_data_file() => {
                own(image)?.data_file = Some(file);
            }
            _ => add_data_file(&mut first, options, depth, &mut seen)?,
        }
        let mut layers = vec![first];
        while let Some(reference) = next_reference(&layers, options, depth)? {
            let depth = reference.depth;
            let name = String::from_utf8_lossy(&reference.name).into_owned();
            let referrer = reference.referrer.clone();
            let lower = async {
                let directory = layers.last().and_then(|layer| layer.storage().path()?.parent());
                let (source, format) = gate::resolve(options, &reference, directory)?;
                let below = below(options, format, depth + 1);
                let storage = open_once(source, access(&below), &seen)?;
                seen.extend(storage.identity());
                let mut layer = open_layer(engine, storage, &below, &mut budget, None).await?;
                add_data_file(&mut layer, &below, depth + 1, &mut seen)?;
                Ok(layer)
            }
            .await;
            layers.push(lower.map_err(|error| below_error(error, &referrer, &name, depth))?);
        }
        // The chain is there: nothing is refused any more but for the image itself.
        let mut bitmaps = None;
        if let (Some(Layer::Qcow2(image)), true) = (layers.first_mut(), will_write(options)) {
            bitmaps = Some(begin_writing(engine, own(image)?, options, &mut budget, None).await?);
        }
        let disk = Disk::new(layers, options.clone());
        Ok(match bitmaps {
            Some(bitmaps) => disk.with_bitmaps(bitmaps),
            None => disk,
        })
    }

    /// The memory that the images below leave to this disk's own.
    fn budget_above(&self) -> Budget {
        let below = self.layers.get(1..).unwrap_or_default();
        let held = below.iter().map(Layer::metadata_bytes).fold(0, u64::saturating_add);
        Budget(self.options.max_metadata_size.saturating_sub(held))
    }

    /// The memory that is left beside all that an open takes, but for bitmaps.
    pub(super) fn budget_beside(&self) -> Result<Budget> {
        let mut budget = self.budget_above();
        if let Some(image) = self.top() {
            reserve(&image.header, &self.options, &mut budget, image.storage.name())?;
        }
        Ok(budget)
    }

    /// Whether this disk's own image could have bitmaps of so many bytes, as far as memory goes.
    pub(crate) fn check_bitmaps(&self, bytes: u64) -> Result<()> {
        let name = self.layers.first().map_or("", |top| top.storage().name());
        self.budget_beside()?.take(bytes, "persistent bitmaps", name)
    }

    /// Whether this disk's own image could be opened again with another header and these
    /// bitmaps, as far as options and memory go.
    pub(crate) fn check_reload(&self, header: &Header, bitmaps: Option<&Bitmaps>) -> Result<()> {
        let name = self.layers.first().map_or("", |top| top.storage().name());
        let mut budget = self.budget_above();
        reserve(header, &self.options, &mut budget, name)?;
        budget.take(bitmaps.map_or(0, Bitmaps::bytes), "persistent bitmaps", name)
    }

    /// The same chain, with its own image read again from the storage that it is on.
    /// To be called after everything of it has been settled, and to take the place of
    /// this disk, whose bitmaps go on.
    pub async fn reload<E: Engine>(&self, engine: &E) -> Result<Disk> {
        self.reload_with(engine, self.bitmaps_now().cloned()).await
    }

    /// As `reload`, with these bitmaps; `None`: with those that are stored.
    pub async fn reload_with<E: Engine>(
        &self,
        engine: &E,
        bitmaps: Option<Bitmaps>,
    ) -> Result<Disk> {
        let Some(old) = self.top() else {
            return Err(Error::new(ErrorKind::NotSupported, "raw images have no metadata"));
        };
        let (options, below) = (&self.options, self.layers.get(1..).unwrap_or_default());
        let mut budget = self.budget_above();
        let first = read(engine, &old.storage, 0, Header::READ_FIRST).await?;
        let storage = old.storage.clone();
        let key = old.unlocked.encryption.clone();
        let mut image = open_qcow2(engine, storage, &first, options, &mut budget, key).await?;
        image.data_file = old.data_file.clone();
        let mut kept = None;
        if will_write(options) {
            kept = Some(begin_writing(engine, &mut image, options, &mut budget, bitmaps).await?);
        }
        let mut layers = vec![Layer::Qcow2(Arc::new(image))];
        layers.extend_from_slice(below);
        let disk = Disk::new(layers, options.clone());
        Ok(match kept {
            Some(bitmaps) => disk.with_bitmaps(bitmaps),
            None => disk,
        })
    }
}

/// An image that nobody else has yet.
fn own(image: &mut Arc<Qcow2>) -> Result<&mut Qcow2> {
    let shared = || Error::new(ErrorKind::Busy, "an image is in use while it is opened");
    Arc::get_mut(image).ok_or_else(shared)
}

fn add_data_file(
    layer: &mut Layer,
    options: &OpenOptions,
    depth: u32,
    seen: &mut Vec<(u64, u64)>,
) -> Result<()> {
    let image = match layer {
        Layer::Qcow2(image) => image,
        Layer::Raw(_) if options.data_file.is_none() => return Ok(()),
        Layer::Raw(_) => return Err(Error::invalid("a raw image has no external data file")),
    };
    let file = open_data_file(&image.storage, &image.header, options, depth, seen)?;
    own(image)?.data_file = file;
    Ok(())
}

/// Opens a storage that is not in the chain yet; `ChainDepth` if it is.
pub(super) fn open_once(
    source: Arc<Source>,
    access: Access,
    seen: &[(u64, u64)],
) -> Result<Storage> {
    let in_chain = |storage: &Storage| storage.identity().is_some_and(|it| seen.contains(&it));
    let storage = match Storage::open(source.clone(), access) {
        // Our own lock may be in the way: the topmost image is open for writing.
        Err(error) if error.kind() == ErrorKind::Locked => {
            let unlocked = Storage::open(source, Access { lock: false, ..access })?;
            if !in_chain(&unlocked) {
                return Err(error);
            }
            unlocked
        }
        opened => opened?,
    };
    if in_chain(&storage) {
        return Err(Error::new(
            ErrorKind::ChainDepth,
            format!("{} is in the chain already: the chain is a loop", storage.name()),
        ));
    }
    Ok(storage)
}

/// How an image below one that is opened with `options` is opened. `depth`: images above.
fn below(options: &OpenOptions, format: Format, depth: u32) -> OpenOptions {
    let own = options.backing_secrets.iter().find(|(at, _)| *at == depth);
    OpenOptions {
        secret: own.map(|(_, secret)| secret).or(options.secret.as_ref()).cloned(),
        format,
        writable: false,
        direct: options.backing_direct.unwrap_or(options.direct),
        // It was chosen for the topmost image's clusters; those below may be smaller.
        l2_cache_entry_size: None,
        no_backing: false,
        check_only: false,
        // What only images that are written heed, and not every version has.
        lazy_refcounts: None,
        discard_no_unref: false,
        data_file: None,
        ..options.clone()
    }
}

/// Errors of a lower image are this image's trouble, too; some keep their kind.
fn below_error(error: Error, referrer: &str, name: &str, depth: u32) -> Error {
    let context = format!("{referrer}: opening the backing file {name:?} (depth {})", depth + 1);
    match error.kind() {
        ErrorKind::Policy
        | ErrorKind::ChainDepth
        | ErrorKind::Limit
        | ErrorKind::Backing(_)
        | ErrorKind::DataFile(_)
        | ErrorKind::Encrypted
        | ErrorKind::OutOfMemory => error.context(context),
        _ => {
            let kind = ErrorKind::Backing(error.errno());
            error.wrap_as(kind, context)
        }
    }
}

/// The reference of the lowest layer so far, if it has one that is to be followed.
fn next_reference(
    layers: &[Layer],
    options: &OpenOptions,
    above: u32,
) -> Result<Option<Reference>> {
    let Some(Layer::Qcow2(image)) = layers.last() else { return Ok(None) };
    let Some(backing) = &image.header.backing else { return Ok(None) };
    check_backing(&image.header, options, image.storage.name())?;
    if options.no_backing || options.check_only {
        return Ok(None);
    }
    let depth = above + layers.len() as u32 - 1;
    check_depth(depth, options)?;
    Ok(Some(Reference {
        kind: ReferenceKind::Backing,
        depth,
        name: backing.name.clone(),
        format: backing.format.clone(),
        referrer: image.storage.name().to_owned(),
        writable: false,
    }))
}

/// Whether there may be an image below the one at `depth`.
fn check_depth(depth: u32, options: &OpenOptions) -> Result<()> {
    if depth < options.max_chain_depth {
        return Ok(());
    }
    let text =
        format!("more than {depth} images are below the first one (see \"max-chain-depth\")");
    Err(Error::new(ErrorKind::ChainDepth, text))
}

async fn open_layer<E: Engine>(
    engine: &E,
    storage: Storage,
    options: &OpenOptions,
    budget: &mut Budget,
    key: Option<Arc<Encryption>>,
) -> Result<Layer> {
    let length = storage.length()?;
    let first = read(engine, &storage, 0, Header::READ_FIRST).await?;
    match options.format {
        Format::Raw => {
            let is_qcow2 = first.starts_with(&MAGIC.to_be_bytes());
            if is_qcow2 && options.writable && !options.allow_qcow2_magic {
                return Err(Error::invalid(format!(
                    "{} starts with the qcow2 magic: opening it as raw for writing is refused \
                     unless \"allow-qcow2-magic\" is on",
                    storage.name()
                )));
            }
            check_size(length, options, storage.name())?;
            let (storage, health) = (Arc::new(storage), Health::default());
            Ok(Layer::Raw(Arc::new(Raw { storage, size: length, health })))
        }
        Format::Qcow2 => {
            let storage = Arc::new(storage);
            let image = open_qcow2(engine, storage, &first, options, budget, key).await?;
            Ok(Layer::Qcow2(Arc::new(image)))
        }
    }
}

fn check_size(size: u64, options: &OpenOptions, name: &str) -> Result<()> {
    if size <= options.max_virtual_size {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Limit,
        format!("{name}: a disk of {size} bytes exceeds \"max-virtual-size\""),
    ))
}

async fn open_qcow2<E: Engine>(
    engine: &E,
    storage: Arc<Storage>,
    first: &[u8],
    options: &OpenOptions,
    budget: &mut Budget,
    unlocked_before: Option<Arc<Encryption>>,
) -> Result<Qcow2> {
    let in_image = |error: Error| error.context(storage.name().to_owned());
    let wanted = Header::bytes_wanted(first).map_err(in_image)?;
    let bytes = read(engine, &storage, 0, wanted).await?;
    let header = match options.check_only {
        true => Header::parse_for_check(&bytes).map_err(in_image)?,
        false => Header::parse(&bytes).map_err(in_image)?,
    };
    if !options.check_only {
        header.unsupported(options.writable).map_err(in_image)?;
    }
    if will_write(options) && header.dirty() && !options.repair_dirty {
        return Err(in_image(Error::new(
            ErrorKind::Dirty,
            "the image was not closed cleanly, and \"repair-dirty\" is off: turn it on, open the \
             image read-only, or repair it with `qemu-img check -r all`",
        )));
    }
    let geometry = header.geometry;
    let l2 = reserve(&header, options, budget, storage.name())?;
    let table = read_table(engine, &storage, header.l1_offset, l1_size(&header, options)).await?;
    let l1 = L1Table::new(header.l1_offset, table.into_iter());
    // Last: it may take a while.
    let unlocked = encryption::unlock(engine, &storage, &header, options, unlocked_before).await?;

    Ok(Qcow2 {
        storage,
        data_file: None,
        format: L2Format {
            geometry,
            version: header.version,
            data_file: header.external_data_file(),
        },
        size: header.virtual_size(),
        header,
        unlocked,
        l1,
        l2,
        writing: None,
        misses: AtomicU64::new(0),
        snapshots: OnceLock::new(),
    })
}

/// Whether the image is going to be written.
fn will_write(options: &OpenOptions) -> bool {
    options.writable && !options.check_only
}

/// Entries of the L1 table to read. CHECK_ONLY tolerates any damage: nothing but
/// the header is looked at.
fn l1_size(header: &Header, options: &OpenOptions) -> usize {
    if options.check_only { 0 } else { header.l1_size as usize }
}

/// That the options allow for an image with this header, as yet to be written.
pub fn check_new(header: &Header, options: &OpenOptions, name: &str) -> Result<()> {
    options.validate()?;
    check_backing(header, options, name)?;
    reserve(header, options, &mut Budget(options.max_metadata_size), name).map(drop)
}

/// An image that has a backing file is written with it only.
fn check_backing(header: &Header, options: &OpenOptions, name: &str) -> Result<()> {
    let without = options.no_backing && options.writable && !options.check_only;
    if without && header.backing.is_some() {
        let text = format!("{name} has a backing file: it cannot be written without it");
        return Err(Error::invalid(text));
    }
    Ok(())
}

/// Checks the options against what the header says, and takes the memory that is
/// needed whatever the image holds. Returns the cache of L2 slices.
pub(crate) fn reserve(
    header: &Header,
    options: &OpenOptions,
    budget: &mut Budget,
    name: &str,
) -> Result<SliceCache> {
    let size = header.virtual_size();
    check_size(size, options, name)?;
    if options.lazy_refcounts == Some(true) && header.version < 3 {
        return Err(Error::invalid(format!("{name}: lazy refcounts need version 3 (compat=1.1)")));
    }
    if options.discard_no_unref && header.version < 3 {
        return Err(Error::invalid(format!(
            "{name}: \"discard-no-unref\" needs version 3 (compat=1.1)"
        )));
    }
    budget.take(header.extra_bytes(), "what is in the header", name)?;
    budget.take(l1_size(header, options) as u64 * 8, "the L1 table", name)?;
    let mapped = if options.check_only { 0 } else { size };
    let l2 = l2_cache(header.geometry, mapped, options, budget, name)?;
    if will_write(options) {
        let bytes = reftable_bytes(header) + refcount_cache(options);
        budget.take(bytes, "the refcount table and its cache", name)?;
    }
    Ok(l2)
}

pub(super) fn reftable_bytes(header: &Header) -> u64 {
    u64::from(header.reftable_clusters) * header.geometry.cluster_size()
}

pub(super) fn refcount_cache(options: &OpenOptions) -> u64 {
    options.refcount_cache_size.unwrap_or(REFCOUNT_CACHE_BYTES)
}

fn l2_cache(
    geometry: Geometry,
    size: u64,
    options: &OpenOptions,
    budget: &mut Budget,
    name: &str,
) -> Result<SliceCache> {
    let cluster = geometry.cluster_size();
    let slice = options.l2_cache_entry_size.unwrap_or(4096.min(cluster));
    if !slice.is_power_of_two() || slice < 512 || slice > cluster {
        return Err(Error::invalid(format!(
            "l2-cache-entry-size must be a power of two between 512 and the cluster size \
             ({cluster})"
        )));
    }
    // Twice what maps the disk: slots are found by hash, and memory is taken only
    // when it is used.
    let covering = geometry.clusters_for(size).saturating_mul(geometry.l2_entry_size() * 2);
    let covering = covering.next_multiple_of(cluster).max(2 * slice);
    let asked = match (options.l2_cache_size, options.cache_size) {
        (Some(bytes), _) => Some(bytes),
        (None, Some(all)) => Some(all.saturating_sub(refcount_cache(options))),
        (None, None) => None,
    };
    // Long chains share what there is; an explicit size is taken at its word.
    let capacity = asked.unwrap_or(L2_CACHE_BYTES.min(budget.0 / 8)).min(covering).max(2 * slice);
    budget.take(capacity, "a cache of L2 slices", name)?;
    SliceCache::new(slice as usize, capacity)
}
