//! Making a new image.
//!
//! Everything is checked before anything is written, and the header is written
//! last: what is interrupted is no image rather than a broken one.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use super::data_length;
use super::encrypt::{EncryptionOptions, NewLuks, Prepared};
use super::layout::{Ahead, Layout, fully_allocated, layout};
use super::preallocation::{Filling, Preallocation};
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::compression::Compression;
use crate::format::extensions::{CryptoExt, Extensions};
use crate::format::header::{BackingRef, Header, MAGIC, autoclear, compatible, incompatible};
use crate::format::l2::{COPIED, L2Format};
use crate::format::limits::{MAX_BACKING_NAME, MIN_SUBCLUSTER_SIZE};
use crate::format::refcount::RefcountWidth;
use crate::geometry::{DataOffset, Geometry, HostOffset, SUBCLUSTERS};
use crate::image::data_file::data_access;
use crate::image::disk::Disk;
use crate::image::handle::Image;
use crate::image::open::{access, check_new};
use crate::image::options::{Format, OpenOptions};
use crate::io::blocking::Blocking;
use crate::io::engine::{Engine, Piece};
use crate::io::storage::{Access, Source, Storage};
use crate::io::wait::block_on;
use crate::log;
use crate::metadata::tables::read;
use crate::sys::memory::Block;

/// What the new image is to be. The default: version 3, 64 KiB clusters,
/// 16-bit refcounts, no backing file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Bytes of the virtual disk, rounded up to 512; `None`: as the backing
    /// file, which is opened for that if the policy allows it.
    pub size: Option<u64>,
    /// Header version, 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Whether L2 entries are extended.
    pub extended_l2: bool,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Whether refcounts may be written at close, and rebuilt after a crash.
    pub lazy_refcounts: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The image below, as it is written into the header, and its format.
    pub backing: Option<(Vec<u8>, Format)>,
    /// What is taken ahead for data. With a backing file it needs extended L2 entries:
    /// others could not leave what is below visible.
    pub preallocation: Preallocation,
    /// The file that guest data will be in, as it is written into the header, and what
    /// it is: whatever is in there is lost. Version 3 only.
    pub data_file: Option<(Vec<u8>, Arc<Source>)>,
    /// Whether that file is to be a raw image by itself: with a data file only, and
    /// without a backing file.
    pub data_file_raw: bool,
    /// How guest data is encrypted, and by which passphrase.
    pub encryption: EncryptionOptions,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            size: None,
            version: 3,
            cluster_size: 65536,
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
            encryption: EncryptionOptions::default(),
        }
    }
}

impl CreateOptions {
    /// The geometry; `InvalidArgument` where the options do not go together.
    fn geometry(&self) -> Result<Geometry> {
        let size = self.cluster_size;
        if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
            return Err(Error::invalid(
                "the cluster size must be a power of two between 512 and 2048k",
            ));
        }
        let version_3_only = [
            (self.extended_l2, "extended L2 entries"),
            (self.lazy_refcounts, "lazy refcounts"),
            (self.compression != Compression::Zlib, "a compression type other than zlib"),
            (self.refcount_bits != 16, "a refcount width other than 16 bits"),
            (self.data_file.is_some(), "external data files"),
        ];
        for (wanted, what) in version_3_only {
            if wanted && self.version < 3 {
                return Err(Error::invalid(format!("{what} need version 3 (compat=1.1)")));
            }
        }
        if self.extended_l2 && size < MIN_SUBCLUSTER_SIZE * u64::from(SUBCLUSTERS) {
            return Err(Error::invalid(
                "extended L2 entries need clusters of at least 16384 bytes",
            ));
        }
        if self.backing.as_ref().is_some_and(|(name, _)| name.len() > MAX_BACKING_NAME) {
            return Err(Error::invalid("a backing file name has at most 1023 bytes"));
        }
        if self.backing.as_ref().is_some_and(|(name, _)| name.is_empty()) {
            return Err(Error::invalid("the name of the backing file is empty"));
        }
        let preallocated = self.preallocation != Preallocation::Off;
        if preallocated && self.backing.is_some() && !self.extended_l2 {
            return Err(Error::invalid(
                "preallocation over a backing file needs extended L2 entries (extended_l2=on)",
            ));
        }
        if preallocated && self.version < 3 && self.encryption.format.is_some() {
            let text = "encrypted clusters that nobody has written read as zero in version 3 \
                        (compat=1.1) only: version 2 has no preallocation with encryption";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        self.check_data_file()?;
        Ok(Geometry { cluster_bits: size.ilog2(), extended_l2: self.extended_l2 })
    }

    fn check_data_file(&self) -> Result<()> {
        if self.data_file_raw && self.data_file.is_none() {
            return Err(Error::invalid("\"data_file_raw\" needs a data file"));
        }
        if self.data_file_raw && self.backing.is_some() {
            let text = "a data file that is a raw image cannot be used with a backing file";
            return Err(Error::invalid(text));
        }
        match &self.data_file {
            Some((name, _)) if name.is_empty() || name.contains(&0) => {
                Err(Error::invalid("the name of the data file is empty, or has a NUL in it"))
            }
            Some((name, _)) if name.len() > MAX_BACKING_NAME => {
                Err(Error::invalid("a data file name has at most 1023 bytes"))
            }
            _ => Ok(()),
        }
    }

    fn width(&self) -> Result<RefcountWidth> {
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(Error::invalid("the refcount width must be a power of two up to 64"));
        }
        RefcountWidth::new(self.refcount_bits.ilog2())
    }

    fn header(
        &self,
        geometry: Geometry,
        layout: &Layout,
        size: u64,
        encryption: Option<&Prepared>,
    ) -> Header {
        let luks = encryption.filter(|encryption| encryption.bytes > 0);
        let offset = layout.encryption_at() << geometry.cluster_bits;
        Header {
            version: self.version,
            geometry,
            size,
            crypt_method: encryption.map_or(0, |encryption| encryption.method),
            backing: self.backing.as_ref().map(|(name, format)| BackingRef {
                name: name.clone(),
                format: Some(format.name().into()),
            }),
            l1_offset: layout.l1_at() << geometry.cluster_bits,
            l1_size: layout.l1_entries as u32,
            reftable_offset: geometry.cluster_size(),
            reftable_clusters: layout.reftable as u32,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: self.incompatible(),
            compatible: if self.lazy_refcounts { compatible::LAZY_REFCOUNTS } else { 0 },
            autoclear: if self.data_file_raw { autoclear::RAW_EXTERNAL_DATA } else { 0 },
            refcount_order: self.refcount_bits.ilog2(),
            compression: self.compression.number(),
            unknown_fields: Vec::new(),
            header_length: if self.version < 3 { 72 } else { 112 },
            extensions: Extensions {
                data_file: self.data_file.as_ref().map(|(name, _)| name.clone()),
                crypto: luks.map(|luks| CryptoExt { offset, length: luks.bytes }),
                ..Extensions::default()
            },
        }
    }

    fn incompatible(&self) -> u64 {
        let bits = [
            (self.extended_l2, incompatible::EXTENDED_L2),
            (self.compression != Compression::Zlib, incompatible::COMPRESSION),
            (self.data_file.is_some(), incompatible::EXTERNAL_DATA),
        ];
        bits.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum()
    }

    /// What a person should know about this choice, through the log.
    fn advise(&self, name: &str) {
        let reader = match (self.extended_l2, self.version) {
            (true, _) => "QEMU 5.2 or later",
            (false, _) if self.compression == Compression::Zstd => "QEMU 5.1 or later",
            (false, _) if self.data_file.is_some() => "QEMU 4.0 or later",
            (false, 3) => "QEMU 1.1 or later",
            (false, _) => "any QEMU",
        };
        log::emit(log::INFO, "create", || format!("{name}: {reader} can read this image"));
        if !self.extended_l2 {
            return;
        }
        let subcluster = self.cluster_size / u64::from(SUBCLUSTERS);
        if subcluster < 4096 {
            log::emit(log::WARN, "create", || {
                format!(
                    "{name}: subclusters of {subcluster} bytes are smaller than the 4096-byte \
                     blocks of most guests, which gain nothing from that: cluster_size=128k makes \
                     them fit"
                )
            });
        }
        if self.backing.is_none() {
            log::emit(log::WARN, "create", || {
                format!(
                    "{name}: without a backing file there is nothing to copy, and extended L2 \
                     entries mostly cost memory (they double the size of L2 tables)"
                )
            });
        }
        log::emit(log::INFO, "create", || {
            format!(
                "{name}: compressed clusters gain nothing from extended L2 entries: they are \
                 stored and rewritten as a whole"
            )
        });
    }
}

/// What is checked and known before anything is written.
struct Plan {
    width: RefcountWidth,
    layout: Layout,
    header: Header,
    first_bytes: Vec<u8>,
    preallocation: Preallocation,
    luks: Option<NewLuks>,
}

fn plan(options: &CreateOptions, size: u64) -> Result<Plan> {
    let (geometry, width) = (options.geometry()?, options.width()?);
    let preallocation = options.preallocation;
    let ahead = match (preallocation, options.data_file_raw) {
        (Preallocation::Off, false) => Ahead::Nothing,
        // Data has its places in the other file.
        _ if options.data_file.is_some() => Ahead::Tables,
        _ => Ahead::Data,
    };
    let encryption = options.encryption.prepare()?;
    let bytes = encryption.as_ref().map_or(0, |encryption| encryption.bytes);
    let layout = layout(geometry, width, size, ahead, geometry.clusters_for(bytes))?;
    let header = options.header(geometry, &layout, size, encryption.as_ref());
    let first_bytes = header.to_bytes()?;
    let luks = match &encryption {
        Some(encryption) => options.encryption.generate(encryption)?,
        None => None,
    };
    Ok(Plan { width, layout, header, first_bytes, preallocation, luks })
}

/// The size of the disk, from the options or the backing file.
fn size(options: &CreateOptions, below: Option<&Disk>) -> Result<u64> {
    let Some(size) = options.size.or(below.map(Disk::size)) else {
        return Err(Error::invalid("a size is needed where there is no backing file"));
    };
    let size = size.checked_next_multiple_of(512).filter(|size| *size <= i64::MAX as u64);
    size.ok_or_else(|| Error::invalid("the size is too large"))
}

/// Opens what is below the new image, where that is needed: for its size, or to
/// know that the new image can be opened (`opened`) once it is made.
fn open_below(
    options: &CreateOptions,
    open: &OpenOptions,
    place: Option<&Path>,
    opened: bool,
) -> Result<Option<Disk>> {
    let Some((name, format)) = &options.backing else { return Ok(None) };
    let followed = opened && !open.no_backing && !open.check_only;
    if options.size.is_some() && !followed {
        return Ok(None);
    }
    let referrer = place.map_or("the new image".into(), |path| path.to_string_lossy().into_owned());
    let directory = place.and_then(Path::parent);
    block_on(Disk::open_named(&Blocking, name, *format, &referrer, directory, open)).map(Some)
}

/// Where an image is made.
enum Place<'a> {
    /// Over what there is.
    Source(Arc<Source>),
    /// In a file that may have to be made, or (`exclusive`) must be.
    File { path: &'a Path, exclusive: bool },
}

impl Place<'_> {
    fn path(&self) -> Option<&Path> {
        match self {
            Place::File { path, .. } => Some(path),
            Place::Source(source) => match &**source {
                Source::Path(path) => Some(path),
                _ => None,
            },
        }
    }

    fn name(&self) -> String {
        match self {
            Place::File { path, .. } => Source::path(path).name(),
            Place::Source(source) => source.name(),
        }
    }

    fn open(&self, open: &OpenOptions) -> Result<Storage> {
        let access = Access { writable: true, fixed_length: false, ..access(open) };
        match self {
            Place::Source(source) => Storage::open(source.clone(), access),
            Place::File { path, exclusive } => Storage::create(path, *exclusive, access),
        }
    }

    /// Whether it is the file that `other` is.
    fn is(&self, other: &Storage) -> bool {
        let Some(file) = self.path().and_then(|path| std::fs::metadata(path).ok()) else {
            return false;
        };
        other.identity() == Some((file.dev(), file.ino()))
    }

    /// After a failure: what was made for the image alone goes again.
    fn give_up(&self) {
        if let Place::File { path, exclusive: true } = self {
            // Whether it goes is no news.
            _ = std::fs::remove_file(path);
        }
    }
}

/// Opens what is to be the data file, which the image itself cannot be.
fn open_data_file(source: &Arc<Source>, open: &OpenOptions, place: &Place<'_>) -> Result<Storage> {
    let access = Access { writable: true, ..data_access(open) };
    let file = Storage::open(source.clone(), access)?;
    if place.is(&file) {
        return Err(data_in_itself(&file));
    }
    Ok(file)
}

fn data_in_itself(file: &Storage) -> Error {
    Error::invalid(format!("{} cannot be both the image and its data file", file.name()))
}

/// Makes an image; with all checks that can be done before if it will be `opened`.
fn make(
    place: &Place<'_>,
    options: &CreateOptions,
    open: &OpenOptions,
    opened: bool,
) -> Result<(Storage, Option<Storage>)> {
    open.validate()?;
    // Open, and locked, until all is written: it is not to be overwritten itself.
    let below = open_below(options, open, place.path(), opened)?;
    let plan = plan(options, size(options, below.as_ref())?)?;
    if opened {
        check_new(&plan.header, &open_after(open), &place.name())?;
    }
    let data_file = match &options.data_file {
        Some((_, source)) => Some(open_data_file(source, open, place)?),
        None => None,
    };
    let storage = place.open(open)?;
    let made = block_on(async {
        if let Some(file) = &data_file {
            let same = file.identity().is_some() && file.identity() == storage.identity();
            if same {
                return Err(data_in_itself(file));
            }
            // Entries lead there from the beginning where there are any.
            let (disk, shown) = (0..plan.header.virtual_size(), plan.layout.l2 > 0);
            let mode = options.preallocation;
            data_length::renew(&Blocking, file, disk, shown, mode, &mut |_, _| true).await?;
            file.sync(&Blocking).await?;
        }
        write(&Blocking, &storage, &plan).await
    });
    made.inspect_err(|_| place.give_up())?;
    options.advise(storage.name());
    Ok((storage, data_file))
}

fn make_open(place: &Place<'_>, options: &CreateOptions, open: &OpenOptions) -> Result<Image> {
    let (storage, data_file) = make(place, options, open, true)?;
    let mut open = open_after(open);
    open.secret = open.secret.or_else(|| options.encryption.secret.clone());
    Image::open_storages(storage, data_file, &open).inspect_err(|_| place.give_up())
}

fn open_after(open: &OpenOptions) -> OpenOptions {
    OpenOptions { writable: true, format: Format::Qcow2, ..open.clone() }
}

/// Makes an image in `source`, whatever was there before. Durable on return
/// unless `open` says `no_flush`. Blocks.
pub fn create(source: Arc<Source>, options: &CreateOptions, open: &OpenOptions) -> Result<()> {
    make(&Place::Source(source), options, open, false).map(drop)
}

/// As [`create`], and returns the new image open for writing. That `open` allows
/// for that, and the backing file with it, is found out first.
pub fn create_open(
    source: Arc<Source>,
    options: &CreateOptions,
    open: &OpenOptions,
) -> Result<Image> {
    make_open(&Place::Source(source), options, open)
}

/// Makes an image in a file, mode 0644 less the umask. `exclusive`: `Exists`
/// rather than overwrite, and a file made in vain is removed. The file is locked
/// before it is emptied.
pub fn create_path(
    path: &Path,
    exclusive: bool,
    options: &CreateOptions,
    open: &OpenOptions,
) -> Result<()> {
    make(&Place::File { path, exclusive }, options, open, false).map(drop)
}

/// As [`create_path`], and returns the new image open for writing; see
/// [`create_open`].
pub fn create_path_open(
    path: &Path,
    exclusive: bool,
    options: &CreateOptions,
    open: &OpenOptions,
) -> Result<Image> {
    make_open(&Place::File { path, exclusive }, options, open)
}

/// Writes a new image. Whatever was there is no image any more before the first
/// table is written, and is one again with the last write.
async fn write<E: Engine>(engine: &E, storage: &Storage, plan: &Plan) -> Result<()> {
    let Plan { width, layout, header, first_bytes, .. } = plan;
    let geometry = header.geometry;
    let cluster = geometry.cluster_size();
    match storage.truncate(engine, 0).await {
        Err(error) if error.kind() != ErrorKind::NotSupported => return Err(error),
        _ => {}
    }
    if storage.length()? > 0 {
        let bytes = storage.length()?.min(cluster) as usize;
        storage.write(engine, &[Piece::Zeroes(bytes)], 0).await?;
        storage.sync(engine).await?;
    }
    // A table of any size, and nothing after it but the next one.
    let end = match layout.l2 + layout.encryption {
        0 => (layout.l1_at() << geometry.cluster_bits) + layout.l1_entries * 8,
        _ => layout.used << geometry.cluster_bits,
    };
    match storage.truncate(engine, end).await {
        Ok(()) if storage.capacity().is_none() => {}
        Ok(()) => zero_tables(engine, storage, cluster, end).await?,
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            zero_tables(engine, storage, cluster, end).await?;
        }
        Err(error) => return Err(error),
    }
    let entries: Vec<u8> = (0..layout.blocks)
        .flat_map(|n| ((layout.blocks_at() + n) << geometry.cluster_bits).to_be_bytes())
        .collect();
    write_at(engine, storage, &entries, cluster).await?;
    let per_block = width.entries_per(cluster);
    for n in 0..layout.blocks {
        let used = layout.used.saturating_sub(n * per_block).min(per_block);
        let mut counts = vec![0; (used * u64::from(width.bits())).div_ceil(64) as usize * 8];
        for index in 0..used {
            width.set_in(&mut counts, index, 1);
        }
        write_at(engine, storage, &counts, (layout.blocks_at() + n) << geometry.cluster_bits)
            .await?;
    }
    if layout.l2 > 0 {
        write_l2_tables(engine, storage, layout, header).await?;
        let data = layout.data_at() << geometry.cluster_bits;
        let bytes = data..layout.used << geometry.cluster_bits;
        if !bytes.is_empty() {
            plan.preallocation.prepare(engine, storage, bytes, data, &mut |_, _| true).await?;
        }
    }
    if let Some(luks) = &plan.luks {
        let at = layout.encryption_at() << geometry.cluster_bits;
        write_at(engine, storage, &luks.header.to_bytes(), at).await?;
        let slot = luks.header.slots.first().map_or(0, |slot| slot.offset);
        write_at(engine, storage, &luks.material, at + slot).await?;
    }
    storage.sync(engine).await?;
    write_at(engine, storage, first_bytes, 0).await?;
    storage.sync(engine).await
}

/// Gives each guest cluster its place: the L1 table and the L2 tables. All is zero
/// before. In a data file that is to be a raw image, which has them from the beginning,
/// what is written there by itself is seen through the image.
async fn write_l2_tables<E: Engine>(
    engine: &E,
    storage: &Storage,
    layout: &Layout,
    header: &Header,
) -> Result<()> {
    let geometry = header.geometry;
    let bits = geometry.cluster_bits;
    let data_file = header.external_data_file();
    let data = match data_file {
        true => Some(DataOffset::in_data_file(0)),
        false => HostOffset::new(layout.data_at() << bits).map(DataOffset::from),
    };
    let format = L2Format { geometry, version: header.version, data_file };
    // What lies there is no zeroes once it is decrypted.
    let hide = header.crypt_method != 0 && (data_file || !geometry.extended_l2);
    let filling = Filling { format, data, hide, raw: header.raw_external_data() };
    let clusters = geometry.clusters_for(header.virtual_size());
    let per_table = geometry.l2_coverage() >> bits;
    let places = || (0..layout.l2).map(|n| (layout.l2_at() + n) << bits);
    let l1 = places().flat_map(|at| (at | COPIED).to_be_bytes());
    let l1 = fallible::collect(layout.l2 as usize * 8, l1)?;
    write_at(engine, storage, &l1, header.l1_offset).await?;
    for (n, at) in (0..).zip(places()) {
        let first = n * per_table;
        let entries = filling.entries(first, per_table.min(clusters - first))?;
        write_at(engine, storage, &entries, at).await?;
    }
    Ok(())
}

/// Zeroes what lies between the header and `end`, where the storage may hold
/// something else.
async fn zero_tables<E: Engine>(engine: &E, storage: &Storage, start: u64, end: u64) -> Result<()> {
    let mut at = start;
    while at < end {
        let len = (end - at).min(1 << 20);
        storage.write(engine, &[Piece::Zeroes(len as usize)], at).await?;
        at += len;
    }
    Ok(())
}

async fn write_at<E: Engine>(
    engine: &E,
    storage: &Storage,
    bytes: &[u8],
    offset: u64,
) -> Result<()> {
    let block = Block::from_bytes(bytes)?;
    storage.write(engine, &[Piece::Block(block.slice(0, bytes.len()))], offset).await
}

/// Bytes that an image with these options needs: without data, and holding
/// `size` bytes of it, as `qemu-img measure` reckons.
pub fn measure(options: &CreateOptions) -> Result<(u64, u64)> {
    let below = open_below(options, &OpenOptions::default(), None, false)?;
    let size = size(options, below.as_ref())?;
    let (geometry, width) = (options.geometry()?, options.width()?);
    let encryption = options.encryption.prepare()?;
    let bytes = encryption.map_or(0, |encryption| encryption.bytes);
    layout(geometry, width, size, Ahead::Nothing, geometry.clusters_for(bytes))?;
    let luks = geometry.clusters_for(bytes) << geometry.cluster_bits;
    let full = fully_allocated(geometry, width, size) + luks;
    if options.preallocation.takes_space() {
        return Ok((full, full));
    }
    let data = geometry.clusters_for(size) << geometry.cluster_bits;
    Ok((full - data, full))
}

/// What the first bytes look like, for a person to confirm. Takes no lock.
pub fn probe(source: &Arc<Source>) -> Result<Format> {
    let storage = Storage::open(source.clone(), Access::default())?;
    let first = block_on(read(&Blocking, &storage, 0, 8))?;
    let (magic, version) = first.split_at(4);
    let looks = magic == MAGIC.to_be_bytes() && version >= 2u32.to_be_bytes().as_slice();
    Ok(if looks { Format::Qcow2 } else { Format::Raw })
}
