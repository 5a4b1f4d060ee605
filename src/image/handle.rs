//! The handle that programs hold: blocking calls, and the operations that need
//! the image for themselves (close, invalidate, reopen).

use std::future::Future;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard, TryLockError};

use super::attached::{Queues, poisoned};
use super::data_file::data_access;
use super::disk::{Disk, Layer};
use super::info::{Info, Stats, StoredReference};
use super::open::access;
use super::options::{OpenOptions, ReferenceKind};
pub use super::status::Extent;
use super::views::{self, Views};
pub use super::zero::ZeroFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::here::here;
use crate::io::blocking::Blocking;
use crate::io::engine::{Engine, Piece, Target};
use crate::io::storage::{Source, Storage};
use crate::io::wait::{block_on, block_on_unless};
use crate::shard::Sharded;
use crate::sys::memory::{GuestMut, GuestRef};

/// An open image. All methods may be called from any thread at any time, unless
/// they say otherwise. Dropping it without `close` gives up what was not flushed,
/// as a crash would.
pub struct Image {
    /// Each group of threads has a lock of its own, so that calls on different
    /// threads do not meet; who needs the image for itself takes all of them.
    doors: Sharded<RwLock<Option<Arc<Disk>>>>,
    /// The same disk, for questions that are answered at any time.
    current: Mutex<Option<Arc<Disk>>>,
    queues: Queues,
    views: Views,
}

/// Flags of a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Durable on completion.
    pub fua: bool,
    /// Store compressed: whole clusters (the disk's last one may be cut off by its
    /// end) that are not allocated. Those that do not get smaller are stored as
    /// usual. `InvalidArgument` for parts of clusters; `EIO` where a cluster is
    /// allocated, unless it is a compressed one, which is replaced.
    pub compressed: bool,
    /// The guest-visible data does not change: bitmaps do not record it.
    pub unchanged: bool,
}

impl WriteFlags {
    /// Whether writing in place, and recording it, is all that there is to it.
    #[inline]
    pub(crate) fn are_plain(self) -> bool {
        !self.fua && !self.compressed && !self.unchanged
    }
}

/// All doors, closed to everybody else.
struct Exclusive<'a> {
    doors: Vec<RwLockWriteGuard<'a, Option<Arc<Disk>>>>,
    image: &'a Image,
}

impl Exclusive<'_> {
    /// The disk behind the doors from now on.
    fn replace(&mut self, disk: Option<Arc<Disk>>) {
        *self.image.current() = disk.clone();
        for door in &mut self.doors {
            **door = disk.clone();
        }
    }
}

/// What goes on behind the doors after a change of the whole disk.
pub enum Replacement {
    /// The disk that was there.
    None,
    /// This one.
    Disk(Box<Disk>),
    /// Nothing: the image could not be read again.
    Closed,
}

fn closed() -> Error {
    Error::invalid("the image is closed")
}

impl Image {
    /// Opens an image. Blocks.
    pub fn open(source: Arc<Source>, options: &OpenOptions) -> Result<Image> {
        options.validate()?;
        let disk = block_on(Disk::open(&Blocking, source, options))?;
        Ok(Image::from_disk(disk))
    }

    /// As `open`, on a storage that is open, and locked, already; and its data file, if
    /// it has one (that of an image that has none is closed).
    pub(crate) fn open_storages(
        storage: Storage,
        data_file: Option<Storage>,
        options: &OpenOptions,
    ) -> Result<Image> {
        options.validate()?;
        let disk = block_on(Disk::open_storages(&Blocking, storage, data_file, None, options))?;
        Ok(Image::from_disk(disk))
    }

    pub(crate) fn from_disk(disk: Disk) -> Image {
        Image::sharing(Arc::new(disk))
    }

    /// An image that others use, too, past its queues.
    pub(crate) fn sharing(disk: Arc<Disk>) -> Image {
        Image {
            doors: Sharded::new(|| RwLock::new(Some(disk.clone()))),
            current: Mutex::new(Some(disk)),
            queues: Queues::default(),
            views: Views::default(),
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Disk>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk for a question that does not wait for anybody.
    fn disk(&self) -> Result<Arc<Disk>> {
        if self.queues.is_poisoned() {
            return Err(poisoned());
        }
        self.current().clone().ok_or_else(closed)
    }

    /// The snapshots of this image that are open beside it.
    pub(crate) fn views(&self) -> &Views {
        &self.views
    }

    /// The queues of this image.
    pub(crate) fn queues(&self) -> &Queues {
        &self.queues
    }

    /// Calls `accept` with the disk for a request that stays when this returns, or
    /// with the reason why there is none. Who needs the image for itself sees what
    /// `accept` has counted.
    pub(crate) fn accept<R>(&self, accept: impl FnOnce(Result<Arc<Disk>>) -> R) -> R {
        let door = self.doors.at(here()).read().unwrap_or_else(PoisonError::into_inner);
        let disk = door.as_ref().ok_or_else(closed).and_then(|disk| match self.usable(disk) {
            Ok(()) => Ok(disk.clone()),
            Err(error) => Err(error),
        });
        accept(disk)
    }

    /// Calls `call` with the disk, through this thread's door.
    #[inline]
    fn enter<R>(&self, call: impl FnOnce(&Disk) -> Result<R>) -> Result<R> {
        let door = self.doors.at(here()).read().unwrap_or_else(PoisonError::into_inner);
        let disk = door.as_deref().ok_or_else(closed)?;
        self.usable(disk)?;
        call(disk)
    }

    /// Waits for a call's future; `Deadlock` rather than for ever.
    #[inline]
    pub(crate) fn block<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        match block_on_unless(call, |parked| self.queues.idle(parked, &self.doors)) {
            ControlFlow::Continue(result) => result,
            ControlFlow::Break(deadlock) => Err(deadlock),
        }
    }

    /// Whether data may be read and written.
    #[inline]
    fn usable(&self, disk: &Disk) -> Result<()> {
        if self.queues.is_poisoned() {
            return Err(poisoned());
        }
        if disk.options.check_only {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "the image is open for checking only: no data is read or written",
            ));
        }
        Ok(())
    }

    /// Closes all doors; `Busy` if somebody is inside, or a request in flight.
    fn exclusive(&self) -> Result<Exclusive<'_>> {
        let all = self.doors()?;
        self.queues.check_idle()?;
        Ok(all)
    }

    /// Closes all doors; `Busy` if somebody is inside.
    fn doors(&self) -> Result<Exclusive<'_>> {
        let mut doors = Vec::new();
        for door in self.doors.iter() {
            doors.push(match door.try_write() {
                Ok(guard) => guard,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::new(
                        ErrorKind::Busy,
                        "another call is in progress on this image",
                    ));
                }
            });
        }
        Ok(Exclusive { doors, image: self })
    }

    /// Waits for the requests of queues, flushes, stores bitmaps and releases. `Busy` if another
    /// thread is inside a call, of a queue or not: the image stays as it was. After
    /// any other result the image is closed, and all calls but drop are errors, as
    /// are requests of its queues.
    pub fn close(&self) -> Result<()> {
        block_on(self.close_by(&Blocking))
    }

    /// As `close`, by this engine.
    pub(crate) async fn close_by<E: Engine>(&self, engine: &E) -> Result<()> {
        let mut all = self.doors()?;
        self.queues.finish().await?;
        // After a panic there is nothing to settle: it is released as it is.
        let settled = match self.disk() {
            Ok(disk) => disk.put_away(engine, &mut None).await,
            Err(error) => Err(error),
        };
        all.replace(None);
        settled
    }

    /// Releases without writing anything; requests of queues end as `Cancelled`.
    /// `Busy` as for close.
    pub fn abandon(&self) -> Result<()> {
        let mut all = self.doors()?;
        self.queues.give_up()?;
        all.replace(None);
        Ok(())
    }

    /// Calls `work` with the disk while nobody else is inside; `Busy` as for close.
    pub(crate) fn alone<R>(&self, work: impl FnOnce(&Disk) -> Result<R>) -> Result<R> {
        let _all = self.exclusive()?;
        work(&*self.disk()?)
    }

    /// As `enter`, for who has no handle of its own inside.
    pub(crate) fn inside<R>(&self, call: impl FnOnce(&Disk) -> Result<R>) -> Result<R> {
        self.enter(call)
    }

    /// Calls `call` with the disk, unless somebody has closed the doors.
    pub(crate) fn inside_now(&self, call: impl FnOnce(&Disk)) {
        if let Ok(door) = self.doors.at(here()).try_read() {
            door.as_deref().map(call);
        }
    }

    /// Has `work` change the disk while nobody else is inside, and goes on with what
    /// takes its place, if that is another; `None`: the image is closed. `Busy` as for
    /// close.
    pub(crate) fn alter<R>(
        &self,
        work: impl FnOnce(&Disk) -> (Result<R>, Replacement),
    ) -> Result<R> {
        let mut all = self.exclusive()?;
        let disk = self.disk()?;
        self.usable(&disk)?;
        let (result, replacement) = work(&disk);
        match replacement {
            Replacement::None => {}
            Replacement::Disk(disk) => all.replace(Some(Arc::from(disk))),
            Replacement::Closed => all.replace(None),
        }
        result
    }

    /// Drops all caches and reads the chain's metadata again. `InvalidArgument`
    /// on an image open for writing; `Busy`. On failure the old state stands.
    pub fn invalidate(&self) -> Result<()> {
        self.change(|options| match options.writable {
            true => Err(Error::invalid("invalidate is for images that are open read-only")),
            false => Ok(options.clone()),
        })
    }

    /// Changes between read-only and read-write, with or without locks. `Locked`,
    /// and all errors of open; on failure the old state stands.
    pub fn reopen(&self, writable: bool, lock: bool) -> Result<()> {
        self.change(|options| Ok(OpenOptions { writable, lock, ..options.clone() }))
    }

    /// Opens the same storage and its chain again with other options, made from
    /// those that nobody changes meanwhile.
    fn change(&self, options: impl FnOnce(&OpenOptions) -> Result<OpenOptions>) -> Result<()> {
        let mut all = self.exclusive()?;
        let old = self.disk()?;
        views::refuse(&old.view, "opening it in another way")?;
        let options = &options(&old.options)?;
        let mut stored = None;
        let error = match block_on(old.put_away(&Blocking, &mut stored)) {
            Ok(()) => match old.open_again(options) {
                Ok(disk) => {
                    all.replace(Some(Arc::new(disk)));
                    return Ok(());
                }
                Err(error) => error,
            },
            Err(error) => error,
        };
        if stored.is_some() {
            // It goes on, with bitmaps that are out of date in the file again.
            match block_on(old.reload_with(&Blocking, stored)) {
                Ok(disk) => all.replace(Some(Arc::new(disk))),
                Err(second) => {
                    all.replace(None);
                    let text = format!("{}; the image is closed", error.message());
                    return Err(second.context(text));
                }
            }
        }
        Err(error)
    }

    /// Size of the virtual disk in bytes; 0 when closed.
    pub fn size(&self) -> u64 {
        self.current().as_ref().map_or(0, |disk| disk.size())
    }

    /// What this image is.
    pub fn info(&self) -> Result<Info> {
        self.disk()?.info()
    }

    /// The same as JSON, in the members of `qemu-img info --output=json`.
    pub fn info_json(&self) -> Result<String> {
        Ok(block_on(self.disk()?.info_with_bitmaps(&Blocking))?.to_json())
    }

    /// Counters since open.
    pub fn stats(&self) -> Stats {
        self.disk().map_or_else(|_| Stats::default(), |disk| disk.stats())
    }

    /// A reference as the header stores it; `None` if there is none.
    pub fn reference(&self, kind: ReferenceKind) -> Option<StoredReference> {
        let disk = self.disk().ok()?;
        let header = &disk.top()?.header;
        match kind {
            ReferenceKind::Backing => header.backing.as_ref().map(|backing| StoredReference {
                name: backing.name.clone(),
                format: backing.format.clone(),
            }),
            ReferenceKind::Data => header
                .extensions
                .data_file
                .as_ref()
                .map(|name| StoredReference { name: name.clone(), format: None }),
        }
    }

    /// Reads into a buffer. `InvalidArgument` past the end of the disk.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_guest(GuestMut::from_slice(buf), offset)
    }

    /// Writes a buffer.
    pub fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.write_guest(GuestRef::from_slice(buf), offset, flags)
    }

    /// As `read_at`, into the caller's memory by handle.
    #[inline]
    pub(crate) fn read_guest(&self, to: GuestMut<'_>, offset: u64) -> Result<()> {
        let to = Target::Guest(to);
        self.enter(|disk| match disk.read_now(&Blocking, &to, offset) {
            Some(result) => result,
            None => self.block(disk.read(&Blocking, to, offset)),
        })
    }

    /// As `write_at`, from the caller's memory by handle.
    #[inline]
    pub(crate) fn write_guest(
        &self,
        from: GuestRef<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> Result<()> {
        let data = Piece::Guest(from);
        self.enter(|disk| {
            let now =
                if flags.are_plain() { disk.write_now(&Blocking, &data, offset) } else { None };
            match now {
                Some(result) => result,
                None => self.block(disk.write_with(&Blocking, data, offset, flags)),
            }
        })
    }

    /// Makes a range read as zero.
    pub fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Result<()> {
        self.enter(|disk| self.block(disk.write_zeroes(&Blocking, offset, length, flags)))
    }

    /// Gives a range up: a hint.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.enter(|disk| self.block(disk.discard(&Blocking, offset, length)))
    }

    /// Makes durable everything that completed before this call.
    pub fn flush(&self) -> Result<()> {
        self.enter(|disk| self.block(disk.flush(&Blocking)))
    }

    /// Calls `out` with up to `max` extents that cover the range from its start
    /// on. `this_layer`: do not descend into the backing chain.
    pub fn block_status(
        &self,
        offset: u64,
        length: u64,
        this_layer: bool,
        max: usize,
        out: &mut (dyn FnMut(Extent) + Send),
    ) -> Result<()> {
        self.enter(|disk| {
            self.block(disk.block_status(&Blocking, offset, length, this_layer, max, out))
        })
    }
}

/// What to say where the disk that was to go on could not be read, so that the image is
/// closed.
pub(crate) fn closed_by(error: Error) -> Error {
    error.context("the image could not be read again and is closed")
}

impl Disk {
    /// See `Qcow2::settle`; a raw image is synced.
    pub async fn settle<E: Engine>(&self, engine: &E) -> Result<()> {
        match self.layers.first() {
            Some(Layer::Qcow2(image)) => match image.settle(engine).await {
                Ok(()) => Ok(()),
                Err(error) => Err(self.note_corruption(engine, error).await),
            },
            _ => self.flush(engine).await,
        }
    }

    /// The same storage and its chain, opened with other options. Settled before.
    fn open_again(&self, options: &OpenOptions) -> Result<Disk> {
        let Some(top) = self.layers.first() else { return Err(closed()) };
        let storage = top.storage().change_access(access(options))?;
        let data_file = match top.data_file() {
            Some(file) => file.change_access(data_access(options)).map(Some),
            None => Ok(None),
        };
        // The passphrase may be another by now.
        let key = self.top().and_then(|image| image.unlocked.encryption.clone());
        let opened = data_file
            .and_then(|file| block_on(Disk::open_storages(&Blocking, storage, file, key, options)))
            .and_then(|disk| {
                disk.layers.first().map_or(Ok(()), Layer::settle_locks)?;
                Ok(disk)
            });
        if opened.is_err() {
            // The lock was held all the time; should it not go back to what it was, it is
            // too strong at worst.
            _ = top.settle_locks();
        }
        opened
    }
}
