//! The virtual disk: an image and the images below it.
//!
//! Requests are checked here once; then they descend the chain in a loop, so a
//! long chain costs no stack. The chain itself is put together by `open`.

use std::sync::{Arc, OnceLock};

use once_cell::race::OnceBox;

use super::bitmaps::Bitmaps;
use super::bitmaps::bits::Bits;
use super::cleaning::Cleaning;
use super::inflated::Inflated;
use super::options::OpenOptions;
use super::qcow2::{Lookup, Qcow2, Run};
use super::views::View;
use crate::alloc::health::Health;
use crate::error::{Error, Result};
use crate::format::subcluster::Subcluster;
use crate::geometry::{DataOffset, GuestOffset, HostOffset};
use crate::here::here;
use crate::io::engine::Engine;
use crate::io::storage::Storage;
use crate::shard::{Count, Sharded};

/// An open image and its chain.
pub struct Disk {
    /// This image first, then what is below.
    pub layers: Vec<Layer>,
    /// As opened.
    pub options: OpenOptions,
    /// Requests so far.
    pub requests: Requests,
    /// Compressed clusters that were read last.
    pub inflated: Inflated,
    /// When its caches are cleaned.
    pub(super) cleaning: Cleaning,
    /// What says that this is a snapshot, if it is one.
    pub view: Option<Arc<View>>,
    /// Its persistent bitmaps: known from the beginning where it is open for writing.
    pub(super) bitmaps: OnceLock<Bitmaps>,
    /// The bits of those that record changes. Bound to the disk, so that requests ask
    /// nobody: who changes the list makes another disk.
    pub(super) recording: Vec<Arc<Bits>>,
    /// The same image with what lies behind its end, once that is asked for.
    pub(super) vm_state: OnceBox<Disk>,
    pub(super) size: u64,
}

/// Of so many requests of a thread one looks at the clock.
const NOW_AND_THEN: u64 = 4096;

/// Requests so far.
#[derive(Default)]
pub struct Requests(Sharded<RequestCounters>);

/// Requests of one thread.
#[derive(Default)]
#[allow(missing_docs)]
pub struct RequestCounters {
    pub reads: Count,
    pub read_bytes: Count,
    pub writes: Count,
    pub write_bytes: Count,
}

impl Requests {
    /// Counts a read. Returns whether this is one of few, after which to do what is done
    /// now and then.
    #[inline]
    pub fn read(&self, bytes: u64) -> bool {
        let here = here();
        let counters = self.0.at(here);
        counters.read_bytes.add(here, bytes);
        counters.reads.add(here, 1) % NOW_AND_THEN == 0
    }

    /// Counts a write, as `read` does a read.
    #[inline]
    pub fn write(&self, bytes: u64) -> bool {
        let here = here();
        let counters = self.0.at(here);
        counters.write_bytes.add(here, bytes);
        counters.writes.add(here, 1) % NOW_AND_THEN == 0
    }

    /// The counters of all threads.
    pub fn iter(&self) -> impl Iterator<Item = &RequestCounters> {
        self.0.iter()
    }
}

/// One image of a chain; chains that differ at the top share what is below.
#[derive(Clone)]
pub enum Layer {
    /// A qcow2 image.
    Qcow2(Arc<Qcow2>),
    /// The bytes of a storage.
    Raw(Arc<Raw>),
}

/// A raw image.
pub struct Raw {
    /// Its bytes.
    pub storage: Arc<Storage>,
    /// How many there are.
    pub size: u64,
    /// Whether a sync has failed.
    pub health: Health,
}

impl Layer {
    /// Where its bytes are.
    pub fn storage(&self) -> &Storage {
        match self {
            Layer::Qcow2(image) => &image.storage,
            Layer::Raw(raw) => &raw.storage,
        }
    }

    /// Where its guest data is.
    #[inline]
    pub fn data(&self) -> &Storage {
        match self {
            Layer::Qcow2(image) => image.data(),
            Layer::Raw(raw) => &raw.storage,
        }
    }

    /// Its external data file.
    pub fn data_file(&self) -> Option<&Storage> {
        match self {
            Layer::Qcow2(image) => image.data_file.as_deref(),
            Layer::Raw(_) => None,
        }
    }

    /// Whether its guest data is encrypted.
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Layer::Qcow2(image) if image.is_encrypted())
    }

    /// Makes the locks of its files what these need, after `Storage::change_access`.
    pub(super) fn settle_locks(&self) -> Result<()> {
        self.data_file().map_or(Ok(()), Storage::settle_lock)?;
        self.storage().settle_lock()
    }

    /// Bytes of its virtual disk.
    pub fn size(&self) -> u64 {
        match self {
            Layer::Qcow2(image) => image.size,
            Layer::Raw(raw) => raw.size,
        }
    }

    /// Memory for its tables, in bytes, as far as they are in memory now.
    pub fn metadata_bytes(&self) -> u64 {
        match self {
            Layer::Qcow2(image) => image.l2.bytes().saturating_add(image.l1.len() as u64 * 8),
            Layer::Raw(_) => 0,
        }
    }

    #[inline]
    fn lookup(&self, offset: GuestOffset, max: u64) -> Result<Lookup> {
        match self {
            Layer::Qcow2(image) => image.lookup(offset, max),
            Layer::Raw(raw) => Ok(Lookup::Run(Run {
                kind: Subcluster::Normal,
                len: max.min(raw.size - offset.0),
                host: Some(DataOffset::in_data_file(offset.0)),
                copied: true,
                compressed: None,
            })),
        }
    }
}

/// What a part of the disk is, and which layer says so.
#[derive(Clone, Copy, Debug)]
pub struct Located {
    /// Index of the layer; the last one where no layer has it.
    pub layer: usize,
    /// What it is there. `Unallocated` and `Reserved`: in no layer.
    pub run: Run,
    /// The layer is shorter than the disk and ends before this part.
    pub past_end: bool,
}

impl Located {
    /// Whether it reads as zero without looking at any data.
    pub fn is_zero(&self) -> bool {
        match self.run.kind {
            Subcluster::Normal | Subcluster::Compressed => false,
            Subcluster::Unallocated
            | Subcluster::Reserved
            | Subcluster::Zero
            | Subcluster::ZeroReserved => true,
        }
    }

    /// Whether the layer leaves it to those below.
    pub fn is_absent(&self) -> bool {
        match self.run.kind {
            Subcluster::Unallocated | Subcluster::Reserved => true,
            Subcluster::Zero
            | Subcluster::ZeroReserved
            | Subcluster::Normal
            | Subcluster::Compressed => false,
        }
    }
}

/// A slice that is missing for an answer.
pub struct Missing {
    layer: usize,
    key: HostOffset,
}

impl Disk {
    /// A disk of these layers.
    pub fn new(layers: Vec<Layer>, options: OpenOptions) -> Disk {
        let (requests, inflated) = (Requests::default(), Inflated::default());
        let size = layers.first().map_or(0, Layer::size);
        let cleaning = Cleaning::every(options.cache_clean_interval);
        Disk {
            layers,
            options,
            requests,
            inflated,
            cleaning,
            view: None,
            bitmaps: OnceLock::new(),
            recording: Vec::new(),
            vm_state: OnceBox::new(),
            size,
        }
    }

    /// The same chain as a disk that ends later, for what is to be done behind the end
    /// before anybody sees it.
    pub fn ending_at(&self, size: u64) -> Disk {
        let mut disk = Disk::new(self.layers.clone(), self.options.clone());
        disk.size = size.max(self.size);
        disk
    }

    /// This image, if it is qcow2.
    pub fn top(&self) -> Option<&Qcow2> {
        match self.layers.first() {
            Some(Layer::Qcow2(image)) => Some(image),
            Some(Layer::Raw(_)) | None => None,
        }
    }

    /// Bytes of the virtual disk.
    #[inline]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// `InvalidArgument` where a range does not lie on the disk.
    #[inline]
    pub fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(out_of_range(offset, length, self.size())),
        }
    }

    /// What the part from `offset` on is, without I/O: starting at layer `from`,
    /// down to the layer that has it.
    #[inline]
    pub fn try_locate(
        &self,
        from: usize,
        offset: GuestOffset,
        max: u64,
    ) -> Result<std::result::Result<Located, Missing>> {
        let mut max = max;
        let mut index = from;
        loop {
            let Some(layer) = self.layers.get(index) else {
                return Err(Error::invalid("there is no such layer"));
            };
            let size = if index == 0 { self.size } else { layer.size() };
            let left = size.saturating_sub(offset.0);
            if left == 0 {
                let kind = Subcluster::Unallocated;
                let run = Run { kind, len: max, host: None, copied: false, compressed: None };
                return Ok(Ok(Located { layer: index, run, past_end: true }));
            }
            let run = match layer.lookup(offset, max.min(left)) {
                Ok(Lookup::Run(run)) => run,
                Ok(Lookup::Load(key)) => return Ok(Err(Missing { layer: index, key })),
                Err(error) if index > 0 => return Err(error.mark_from_below()),
                Err(error) => return Err(error),
            };
            let here = Located { layer: index, run, past_end: false };
            if !here.is_absent() || index + 1 == self.layers.len() {
                return Ok(Ok(here));
            }
            max = run.len;
            index += 1;
        }
    }

    /// As `try_locate`, loading what is missing.
    #[inline]
    pub async fn locate<E: Engine>(
        &self,
        engine: &E,
        from: usize,
        offset: GuestOffset,
        max: u64,
    ) -> Result<Located> {
        let (mut from, mut max) = (from, max);
        loop {
            let missing = match self.try_locate(from, offset, max)? {
                Ok(located) => return Ok(located),
                Err(missing) => missing,
            };
            let Some(Layer::Qcow2(image)) = self.layers.get(missing.layer) else { continue };
            self.clean_if_due(engine);
            if !image.load(engine, missing.key).await? {
                // No room in an unhealthy image's cache; it is the topmost one.
                let run = image.find(engine, offset, max).await?;
                let here = Located { layer: missing.layer, run, past_end: false };
                if !here.is_absent() || missing.layer + 1 == self.layers.len() {
                    return Ok(here);
                }
                (from, max) = (missing.layer + 1, run.len);
            }
        }
    }
}

#[cold]
fn out_of_range(offset: u64, length: u64, size: u64) -> Error {
    Error::invalid(format!(
        "{length} bytes at {offset:#x} do not lie on the disk, which has {size} bytes"
    ))
}
