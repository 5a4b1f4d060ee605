//! The life of an image: opened, used by several at once, closed; crashes at
//! any moment of it, each the start of another, shorter life.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::Arc;

use qcow2rs::image::Disk;
use qcow2rs::io::engine::{Piece, Target};
use qcow2rs::io::sim::{
    Crash, Fault, FileOptions, GuestMut, GuestRef, OpKind, Outcome, Pattern, Rng, SimDisk,
    SimEngine, SimFile, Task, give_up_after,
};
use qcow2rs::{
    Error, ErrorKind, Format, OpenOptions, Policy, Reference, Resolver, Source, ZeroFlags,
};

use super::builder::{Cluster, Kind, build};
use super::imagecheck;
use super::layout::{Header, ReadAt, read_guest};
use super::oracle::{Change, Oracle, SECTOR, Word, fill, word};
use super::qemu;

/// What is tried, but for chance.
#[derive(Clone, Debug)]
pub struct Config {
    pub kind: Kind,
    /// What offsets and lengths must be multiples of.
    pub alignment: u64,
    /// Bytes of the L2 cache, and of one slice.
    pub cache: (u64, u64),
    /// Whether the storage can make holes.
    pub punch: bool,
    /// Whether discards keep their host clusters.
    pub discard_keeps: bool,
    /// Whether operations fail.
    pub faults: bool,
    /// Whether requests are given up half way.
    pub give_up: bool,
}

/// What one seed and the configuration make.
pub struct Scenario {
    pub config: Config,
    pub seed: u64,
    /// Every how manieth crash image is shown to qemu-img.
    pub qemu_every: Cell<u64>,
    pub crashes: Cell<u64>,
}

/// What went wrong, with all that is needed to see why.
#[derive(Clone)]
pub struct Failure {
    what: String,
    /// The disk that it was seen on, then those that it came from by crashes.
    disks: Vec<SimDisk>,
}

pub type Verdict = Result<(), Failure>;

impl Failure {
    pub fn on(disk: &SimDisk, what: String) -> Failure {
        Failure { what, disks: vec![disk.clone()] }
    }
}

/// Something went wrong in this life or in one that followed.
#[derive(Clone)]
enum Trouble {
    Here(String),
    Later(Failure),
}

impl From<String> for Trouble {
    fn from(what: String) -> Trouble {
        Trouble::Here(what)
    }
}

const BASE: u32 = 0xbbbb_0000;
const INITIAL: u32 = 0xaaaa_0000;

impl ReadAt for SimFile {
    fn length(&self) -> u64 {
        SimFile::length(self)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) {
        self.peek(offset, out);
    }
}

/// Gives the file "base" of the disk to whoever asks.
struct Base(SimDisk);

impl Resolver for Base {
    fn resolve(
        &self,
        _reference: &Reference,
        format: Option<Format>,
    ) -> qcow2rs::Result<(Arc<Source>, Option<Format>)> {
        let base = self.0.file("base").expect("there is a backing file");
        Ok((Source::sim(base), format))
    }
}

/// Opens the image of a disk.
pub async fn open(disk: &SimDisk, config: &Config) -> qcow2rs::Result<Disk> {
    let mut options =
        OpenOptions::new().writable(true).policy(Policy::Resolve(Arc::new(Base(disk.clone()))));
    let (bytes, slice) = config.cache;
    options.l2_cache_size = Some(bytes);
    options.l2_cache_entry_size = Some(slice);
    options.refcount_cache_size = Some(bytes);
    options.discard_no_unref = config.discard_keeps;
    let file = disk.file("image").expect("there is an image");
    Disk::open(&SimEngine, Source::sim(file), &options).await
}

impl Config {
    /// A disk with an image, and what the guest finds on it.
    pub fn start(&self, rng: &mut Rng) -> (SimDisk, Oracle) {
        let kind = self.kind;
        let disk = SimDisk::new(rng.next_u64());
        let per_cluster = kind.cluster / SECTOR;
        let below = |sector| if kind.backing { word(BASE, sector) } else { 0 };
        let sectors = kind.size / SECTOR;
        let mut words: Vec<Word> = (0..sectors).map(below).collect();
        let fullness = *rng.pick(&[0, 1, 6, 8]);
        let image = build(kind, |cluster| {
            let range = cluster * per_cluster..((cluster + 1) * per_cluster).min(sectors);
            let words = &mut words[range.start as usize..range.end as usize];
            initial_cluster(&kind, range, words, fullness, rng)
        });
        let options = FileOptions {
            alignment: self.alignment,
            punch: self.punch,
            zero: rng.chance(1, 2),
            ..FileOptions::default()
        };
        disk.create_with("image", options.clone(), &image);
        if kind.backing {
            let read_only = FileOptions { read_only: true, ..options };
            // It may be shorter than the disk.
            let length = if rng.chance(1, 2) { sectors } else { rng.below(sectors) };
            words.iter_mut().skip(length as usize).for_each(|w| {
                if *w >> 32 == BASE.into() {
                    *w = 0;
                }
            });
            disk.create_with("base", read_only, &fill((0..length).map(|s| word(BASE, s))));
        }
        (disk, Oracle::new(words))
    }
}

/// Chooses what a cluster holds at first, and puts down its words.
fn initial_cluster(
    kind: &Kind,
    sectors: Range<u64>,
    words: &mut [Word],
    fullness: u64,
    rng: &mut Rng,
) -> Cluster {
    if !rng.chance(fullness, 8) {
        return Cluster::Nothing;
    }
    let data: Vec<Word> = sectors.clone().map(|sector| word(INITIAL, sector)).collect();
    let mut bytes = fill(data.iter().copied());
    bytes.resize(kind.cluster as usize, 0);
    if rng.chance(1, 4) {
        words.copy_from_slice(&data);
        return Cluster::Compressed(bytes);
    }
    if !kind.extended_l2 {
        let zero = kind.version > 2 && rng.chance(1, 4);
        let alloc = !zero || rng.chance(1, 2);
        words.copy_from_slice(&data);
        if zero {
            words.fill(0);
        }
        return Cluster::Data { bytes, alloc: alloc.into(), zero: zero.into() };
    }
    let (alloc, zero) = match rng.below(3) {
        0 => (u32::MAX, 0),
        _ => (rng.next_u64() as u32, rng.next_u64() as u32),
    };
    let zero = zero & !alloc;
    let per_subcluster = words.len().div_ceil(32);
    for (index, word) in words.iter_mut().enumerate() {
        let bit = 1 << (index / per_subcluster);
        if alloc & bit != 0 {
            *word = data[index];
        } else if zero & bit != 0 {
            *word = 0;
        }
    }
    Cluster::Data { bytes, alloc, zero }
}

/// A life under way.
struct Life<'a> {
    scenario: &'a Scenario,
    disk: SimDisk,
    oracle: RefCell<Oracle>,
    /// The first thing that went wrong.
    trouble: RefCell<Option<Trouble>>,
    /// How many crashes are still to be drawn, and one in how many steps is one.
    crashes: Cell<u64>,
    interval: u64,
    /// Lives that may follow upon one another.
    depth: u32,
    /// Whether operations may fail.
    faulty: Cell<bool>,
    rng: RefCell<Rng>,
}

impl Scenario {
    /// Runs it all.
    pub fn run(&self) -> Verdict {
        let mut rng = Rng::new(self.seed);
        let (disk, oracle) = self.config.start(&mut rng);
        self.live(disk, oracle, 2, &mut rng)
    }

    /// Opens the image, uses it, closes it; up to `depth` crashes may follow upon
    /// one another.
    pub fn live(&self, disk: SimDisk, oracle: Oracle, depth: u32, rng: &mut Rng) -> Verdict {
        let interval = *rng.pick(&[20, 100, 500]);
        let crashes = if depth == 2 { 8 } else { rng.below(2) * u64::from(depth) };
        let life = Life {
            scenario: self,
            disk: disk.clone(),
            oracle: RefCell::new(oracle),
            trouble: RefCell::default(),
            crashes: Cell::new(crashes),
            interval,
            depth,
            faulty: Cell::new(false),
            rng: RefCell::new(rng.fork()),
        };
        life.pass().map_err(|trouble| match trouble {
            Trouble::Here(what) => Failure::on(&disk, what),
            Trouble::Later(mut failure) => {
                failure.disks.push(disk);
                failure
            }
        })
    }
}

impl Life<'_> {
    fn config(&self) -> &Config {
        &self.scenario.config
    }

    fn file(&self) -> Arc<SimFile> {
        self.disk.file("image").expect("there is an image")
    }

    /// Looks at the image file itself; the leaks in it.
    fn check(&self, when: &str) -> Result<Vec<u64>, String> {
        let file = self.file();
        let report = imagecheck::check(&*file);
        let faults = report.faults();
        if !faults.is_empty() {
            return Err(format!("{when}: {faults:#?}"));
        }
        let every = self.scenario.qemu_every.get();
        if every > 0 && self.rng.borrow_mut().chance(1, every) {
            let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
            let path = dir.path().join("image");
            let dumped = file.dump(&path).and_then(|()| match self.disk.file("base") {
                Some(base) => base.dump(&dir.path().join("base")),
                None => Ok(()),
            });
            dumped.map_err(|error| error.to_string())?;
            let (verdict, said) = qemu::check(&path);
            if (verdict.corruptions, verdict.errors, verdict.leaks) != (0, 0, report.leaks_inside) {
                return Err(format!("{when}: {report:#?}, but qemu-img check: {said}"));
            }
        }
        Ok(report.leaks)
    }

    fn pass(&self) -> Result<(), Trouble> {
        let leaks = self.check("at open")?;
        let Some(image) = self.run_one("open", open(&self.disk, self.config()))? else {
            return Ok(());
        };
        let image = image.map_err(|error| format!("opening: {error:?}"))?;
        let Some(found) = self.run_one("verify", self.read_all(&image))? else { return Ok(()) };
        let words = self.oracle.borrow().after_crash(&found?)?;
        self.second_opinion(&words)?;
        let oracle = self.oracle.borrow().recovered(words);
        self.oracle.replace(oracle);

        if self.config().faults && self.rng.borrow_mut().chance(1, 2) {
            self.inject();
            if !self.use_image(&image)? {
                return Ok(());
            }
            self.disk.clear_faults();
        }
        if !self.use_image(&image)? {
            return Ok(());
        }
        self.part(image, leaks)
    }

    /// Closes the image: nothing may be lost, nothing left over.
    fn part(&self, image: Disk, leaks: Vec<u64>) -> Result<(), Trouble> {
        let begun = self.oracle.borrow_mut().begin_flush();
        let Some(closed) = self.run_one("close", image.settle(&SimEngine))? else { return Ok(()) };
        drop(image);
        match closed {
            Ok(()) => self.oracle.borrow_mut().end_flush(begun),
            Err(error) if self.expected(&error) => {
                return self.crash(Crash::Process);
            }
            Err(error) => return Err(format!("closing: {error:?}").into()),
        }
        let left: Vec<u64> = self.check("after close")?;
        let new: Vec<&u64> = left.iter().filter(|cluster| !leaks.contains(cluster)).collect();
        let may_leak = self.faulty.get() || self.config().give_up;
        if !new.is_empty() && !may_leak {
            return Err(format!("clusters {new:#x?} are left over after close").into());
        }
        let violations = self.disk.violations();
        if !violations.is_empty() {
            return Err(format!("operations that must not be: {violations:#?}").into());
        }
        // Nothing that close did may depend on luck, but for the end of the file.
        let seed = self.rng.borrow_mut().next_u64();
        let after = self.disk.crash(Crash::Power { unit: 512 }, seed).file("image");
        let report = after.map(|file| imagecheck::check(&*file)).unwrap_or_default();
        if !report.faults().is_empty() || report.leaks != left {
            return Err(format!("what close wrote is not durable: {report:#?}").into());
        }
        Ok(())
    }

    /// Uses the image by several at once. False if that is the end.
    fn use_image(&self, image: &Disk) -> Result<bool, Trouble> {
        let mut rng = self.rng.borrow_mut().fork();
        let depth = u64::from(self.depth);
        let tasks = (0..rng.between(1, 8)).map(|index| {
            let (rng, requests) = (rng.fork(), rng.between(1, 12 * (depth + 1)));
            let name = format!("guest {index}");
            Task::new(name, Guest { life: self, image, index, rng }.run(requests))
        });
        let tasks = tasks.collect();
        if !self.run(tasks)? {
            return Ok(false);
        }
        let begun = self.oracle.borrow_mut().begin_read();
        let Some(found) = self.run_one("read all", self.read_all(image))? else {
            return Ok(false);
        };
        match found {
            Ok(found) => self.oracle.borrow_mut().end_read(begun, 0, &found)?,
            Err(_) if self.faulty.get() => self.oracle.borrow_mut().give_up_read(),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Makes something fail.
    fn inject(&self) {
        let mut rng = self.rng.borrow_mut();
        self.faulty.set(true);
        let kind = *rng.pick(&[OpKind::Read, OpKind::Write, OpKind::Write, OpKind::Sync]);
        let kind = if rng.chance(1, 8) { OpKind::Punch } else { kind };
        let errno = *rng.pick(&[libc::EIO, libc::ENOSPC]);
        let pattern = Pattern::any().file("image").kind(kind).after(rng.below(40));
        let fault = Fault { pattern, errno, forever: rng.chance(1, 2) };
        self.disk.note(format!("{fault:?}"));
        self.disk.inject(fault);
    }

    /// Whether an error is what faults lead to.
    fn expected(&self, error: &Error) -> bool {
        let kind = error.kind();
        let fault =
            matches!(kind, ErrorKind::Os(libc::EIO) | ErrorKind::NoSpace | ErrorKind::FlushFailed);
        self.faulty.get() && fault
    }

    fn run_one<T>(
        &self,
        name: &str,
        future: impl Future<Output = T>,
    ) -> Result<Option<T>, Trouble> {
        let mut result = None;
        let task = Task::new(name, async { result = Some(future.await) });
        self.run(vec![task])?;
        Ok(result)
    }

    /// Runs tasks, drawing crashes meanwhile. False if it was stopped.
    fn run(&self, tasks: Vec<Task<'_>>) -> Result<bool, Trouble> {
        let outcome = self.disk.run_observed(tasks, |_| {
            if self.trouble.borrow().is_some() {
                return ControlFlow::Break(());
            }
            let due = self.crashes.get() > 0 && self.rng.borrow_mut().chance(1, self.interval);
            if due {
                self.crashes.set(self.crashes.get() - 1);
                let unit = *self.rng.borrow_mut().pick(&[0, 512, 512, 512, 4096]);
                let crash = if unit == 0 { Crash::Process } else { Crash::Power { unit } };
                if let Err(trouble) = self.crash(crash) {
                    self.trouble.replace(Some(trouble));
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
        if let Some(trouble) = self.trouble.take() {
            return Err(trouble);
        }
        match outcome {
            Outcome::Done => Ok(true),
            Outcome::Stopped => Ok(false),
            other => Err(Trouble::Here(format!("{other:?}"))),
        }
    }

    /// Crashes now, and sees whether life goes on.
    fn crash(&self, crash: Crash) -> Result<(), Trouble> {
        if self.depth == 0 {
            return Ok(());
        }
        self.scenario.crashes.set(self.scenario.crashes.get() + 1);
        let mut rng = self.rng.borrow_mut().fork();
        let after = self.disk.crash(crash, rng.next_u64());
        let oracle = self.oracle.borrow().clone();
        self.disk.note(format!("{crash:?}"));
        let life = self.scenario.live(after, oracle, self.depth - 1, &mut rng);
        life.map_err(|failure| {
            let step = self.disk.step();
            let what = format!("after {crash:?} at step {step}: {}", failure.what);
            Trouble::Later(Failure { what, ..failure })
        })
    }

    async fn read_all(&self, image: &Disk) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0xee; self.oracle.borrow().size() as usize];
        for (index, part) in bytes.chunks_mut(64 << 10).enumerate() {
            let target = Target::Guest(GuestMut::from_slice(part));
            let read = image.read(&SimEngine, target, (index as u64) << 16).await;
            read.map_err(|error| format!("reading all: {error:?}"))?;
        }
        Ok(bytes)
    }

    /// Reads the image with other code.
    fn second_opinion(&self, words: &[Word]) -> Result<(), String> {
        let file = self.file();
        let header = Header::read(&*file)?;
        let base = self.disk.file("base");
        let base = base.as_deref().map(|base| base as &dyn ReadAt);
        match read_guest(&*file, &header, base) == fill(words.iter().copied()) {
            true => Ok(()),
            false => Err("the image reads differently with other code".to_owned()),
        }
    }
}

/// One who uses the disk.
struct Guest<'a> {
    life: &'a Life<'a>,
    image: &'a Disk,
    index: u64,
    rng: Rng,
}

impl Guest<'_> {
    async fn run(mut self, requests: u64) {
        for _ in 0..requests {
            if let Err(what) = self.request().await {
                let trouble = format!("guest {}: {what}", self.index);
                self.life.trouble.borrow_mut().get_or_insert(trouble.into());
                return;
            }
        }
    }

    /// Sectors to work on: mostly few, mostly where others work, too.
    fn range(&mut self) -> Range<u64> {
        let kind = self.life.config().kind;
        let rng = &mut self.rng;
        let sectors = kind.size / SECTOR;
        let per_cluster = kind.cluster / SECTOR;
        let per_subcluster = (per_cluster / kind.subclusters()).max(1);
        let per_table = kind.cluster / kind.l2_entry() * per_cluster;
        let near = match rng.below(4) {
            0 => rng.below(sectors),
            1 => per_table * rng.below(sectors.div_ceil(per_table)),
            _ => rng.below(sectors.min(8 * per_cluster)),
        };
        let unit = *rng.pick(&[1, per_subcluster, per_cluster]);
        let start = if rng.chance(1, 2) { near / unit * unit } else { near };
        let start = start.saturating_sub(rng.below(2)).min(sectors - 1);
        let len = match rng.below(4) {
            0 => rng.between(1, 4),
            1 => per_subcluster * rng.between(1, 4),
            2 => per_cluster * rng.between(1, 3),
            _ => rng.between(1, 2 * per_cluster),
        };
        start..(start + len).min(sectors)
    }

    async fn request(&mut self) -> Result<(), String> {
        match self.rng.below(16) {
            0..=5 => self.change(Change::Write).await,
            6 | 7 => self.change(Change::Zero).await,
            8 | 9 => self.change(Change::Discard).await,
            10 | 11 => self.flush().await,
            _ => self.read().await,
        }
    }

    fn note(&self, what: &str, sectors: &Range<u64>) {
        let (start, end) = (sectors.start * SECTOR, sectors.end * SECTOR);
        self.life.disk.note(format!("guest {}: {what} {start:#x}..{end:#x}", self.index));
    }

    /// Waits for the request, or for some time only.
    async fn ask<T>(&mut self, request: impl Future<Output = T>) -> Option<T> {
        let impatient = self.life.config().give_up && self.rng.chance(1, 16);
        let polls = if impatient { self.rng.between(1, 12) } else { u64::MAX };
        give_up_after(polls, request).await
    }

    async fn change(&mut self, change: Change) -> Result<(), String> {
        let sectors = self.range();
        let fua = self.rng.chance(1, 8);
        let may_unmap = self.rng.chance(1, 2);
        self.note(&format!("{change:?}{}", if fua { " FUA" } else { "" }), &sectors);
        let ticket = self.life.oracle.borrow_mut().begin(change, sectors.clone());
        let (image, offset, len) = (self.image, ticket.offset(), ticket.len());
        let data = ticket.data();
        let request = async {
            match change {
                Change::Write => {
                    let piece = Piece::Guest(GuestRef::from_slice(&data));
                    image.write(&SimEngine, piece, offset, fua).await
                }
                Change::Zero => {
                    let flags = ZeroFlags { fua, may_unmap, no_fallback: false };
                    image.write_zeroes(&SimEngine, offset, len, flags).await
                }
                Change::Discard => image.discard(&SimEngine, offset, len).await,
            }
        };
        let result = self.ask(request).await;
        let durable = fua && change != Change::Discard;
        let success = matches!(result, Some(Ok(())));
        self.life.oracle.borrow_mut().end(&ticket, success, durable);
        self.note(&format!("{change:?} gave {result:?} for"), &sectors);
        self.judge(result)
    }

    async fn flush(&mut self) -> Result<(), String> {
        self.life.disk.note(format!("guest {}: flush", self.index));
        let begun = self.life.oracle.borrow_mut().begin_flush();
        let image = self.image;
        let result = self.ask(image.flush(&SimEngine)).await;
        if matches!(result, Some(Ok(()))) {
            self.life.oracle.borrow_mut().end_flush(begun);
        }
        self.life.disk.note(format!("guest {}: flush gave {result:?}", self.index));
        self.judge(result)
    }

    async fn read(&mut self) -> Result<(), String> {
        let sectors = self.range();
        self.note("read", &sectors);
        let mut bytes = vec![0xee; ((sectors.end - sectors.start) * SECTOR) as usize];
        let begun = self.life.oracle.borrow_mut().begin_read();
        let (image, offset) = (self.image, sectors.start * SECTOR);
        let target = Target::Guest(GuestMut::from_slice(&mut bytes));
        let result = self.ask(image.read(&SimEngine, target, offset)).await;
        if matches!(result, Some(Ok(()))) {
            self.life.oracle.borrow_mut().end_read(begun, offset, &bytes)?;
        } else {
            self.life.oracle.borrow_mut().give_up_read();
        }
        self.judge(result)
    }

    fn judge(&self, result: Option<qcow2rs::Result<()>>) -> Result<(), String> {
        match result {
            Some(Err(error)) if !self.life.expected(&error) => Err(format!("{error:?}")),
            _ => Ok(()),
        }
    }
}

impl Scenario {
    /// Puts everything that helps into a directory; what to tell.
    pub fn report(&self, failure: &Failure) -> String {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{}", self.seed));
        let mut text = format!("{}\nseed {}, {:?}\n", failure.what, self.seed, self.config);
        let keep = || {
            std::fs::create_dir_all(&dir)?;
            let mut story = text.clone();
            for (index, disk) in failure.disks.iter().enumerate() {
                let _ = write!(story, "\ndisk {index}\n{}", disk.journal());
                for name in ["image", "base"] {
                    if let Some(file) = disk.file(name) {
                        file.dump(&dir.join(format!("{name}.{index}")))?;
                    }
                }
            }
            std::fs::write(dir.join("story"), story)
        };
        let kept: std::io::Result<()> = keep();
        let _ = match kept {
            Ok(()) => writeln!(text, "images and what happened to them: {}", dir.display()),
            Err(error) => writeln!(text, "nothing could be kept: {error}"),
        };
        let thread = std::thread::current();
        let test = thread.name().unwrap_or_default();
        let _ = writeln!(text, "again: QCOW2RS_SEED={} cargo test --test crash {test}", self.seed);
        text
    }
}
