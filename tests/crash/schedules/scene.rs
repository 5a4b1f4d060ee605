//! A scene for a chosen schedule: an image in a known state, requests that the
//! oracle knows of, operations held back, and crashes at every step.

use std::cell::RefCell;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use qcow2rs::image::Disk;
use qcow2rs::io::engine::{Piece, Target};
use qcow2rs::io::sim::{
    Crash, FileOptions, GuestMut, GuestRef, Hold, OpKind, Outcome, Pattern, Rng, SimDisk,
    SimEngine, Stage, Task,
};
use qcow2rs::{Result, ZeroFlags};

use super::super::guest::is_taken;
use super::super::layout::{Entry, Header, ReadAt, bits};
use super::super::oracle::{Change, Oracle, SECTOR, Ticket, Word, fill, word};
use super::super::scenario::{Config, Failure, Scenario, known_after, open};
use super::super::snapshot::keep_snapshot;
use super::super::support::builder::{Cluster, build_both};
use super::super::{imagecheck, inspect};

/// Marks the words that the image holds at first, and those of the backing file.
const STORED: u32 = 0xaaaa_0000;
const BASE: u32 = 0xbbbb_0000;

/// What a cluster is before anything happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    Nothing,
    Stored,
    /// Zero, with a host cluster to write to.
    Reserved,
    Compressed,
}

pub struct Scene {
    pub disk: SimDisk,
    pub oracle: RefCell<Oracle>,
    pub image: Arc<Disk>,
    scenario: Scenario,
    rng: RefCell<Rng>,
}

/// A change under way; given up, it may have happened or not.
struct Pending<'a> {
    scene: &'a Scene,
    ticket: Ticket,
    success: bool,
    durable: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.scene.oracle.borrow_mut().end(&self.ticket, self.success, self.durable);
    }
}

impl Scene {
    /// Opens an image whose clusters are as `before` says.
    pub fn new(config: &Config, seed: u64, before: impl Fn(u64) -> Before) -> Scene {
        Scene::with(config, seed, |_| {}, |_| {}, before)
    }

    /// As `new`, with other abilities of the image's file and with other bytes.
    pub fn with(
        config: &Config,
        seed: u64,
        abilities: impl FnOnce(&mut FileOptions),
        patch: impl FnOnce(&mut Vec<u8>),
        before: impl Fn(u64) -> Before,
    ) -> Scene {
        let (disk, oracle, rng) = Scene::prepare(config, seed, abilities, patch, before);
        Scene::on(config, seed, disk, oracle, rng)
    }

    /// The disk of such a scene before it is opened, what is known of it, and what
    /// the seed has left.
    pub fn prepare(
        config: &Config,
        seed: u64,
        abilities: impl FnOnce(&mut FileOptions),
        patch: impl FnOnce(&mut Vec<u8>),
        before: impl Fn(u64) -> Before,
    ) -> (SimDisk, Oracle, Rng) {
        let mut rng = Rng::new(seed);
        let disk = SimDisk::new(rng.next_u64());
        let kind = config.kind;
        let (sectors, per_cluster) = (kind.size / SECTOR, kind.cluster / SECTOR);
        let below = |sector| if kind.backing { word(BASE, sector) } else { 0 };
        let mut words: Vec<Word> = (0..sectors).map(below).collect();
        let (mut image, data) = build_both(kind, |cluster| {
            let range = cluster * per_cluster..((cluster + 1) * per_cluster).min(sectors);
            let words = &mut words[range.start as usize..range.end as usize];
            let data: Vec<Word> = range.map(|sector| word(STORED, sector)).collect();
            let mut bytes = fill(data.iter().copied());
            bytes.resize(kind.cluster as usize, 0);
            let all = if kind.extended_l2 { u32::MAX } else { 1 };
            let before = before(cluster);
            match before {
                Before::Nothing => {}
                Before::Reserved => words.fill(0),
                Before::Stored | Before::Compressed => words.copy_from_slice(&data),
            }
            match before {
                Before::Nothing => Cluster::Nothing,
                Before::Compressed => Cluster::Compressed(bytes),
                Before::Stored => Cluster::Data { bytes, alloc: all, zero: 0 },
                Before::Reserved => Cluster::Reserved,
            }
        });
        patch(&mut image);
        let alignment = config.alignment;
        let mut options = FileOptions { alignment, punch: config.punch, ..FileOptions::default() };
        abilities(&mut options);
        if kind.data_file {
            disk.create_with("data", options.clone(), &data);
        }
        disk.create_with("image", options, &image);
        if kind.backing {
            let base = FileOptions { read_only: true, alignment, ..FileOptions::default() };
            disk.create_with("base", base, &fill((0..sectors).map(|s| word(BASE, s))));
        }
        keep_snapshot(&disk, &kind, &words);
        (disk, Oracle::new(words), rng)
    }

    /// Opens the image of a disk on which the oracle knows what to find.
    pub fn on(config: &Config, seed: u64, disk: SimDisk, oracle: Oracle, rng: Rng) -> Scene {
        let image = disk.block_on(open(&disk, config)).expect("the image can be opened");
        let image = Arc::new(image);
        let scenario = Scenario::new(config.clone(), seed);
        Scene { disk, oracle: RefCell::new(oracle), image, scenario, rng: RefCell::new(rng) }
    }

    /// Panics, with all that helps to understand.
    pub fn fail(&self, what: impl Into<String>) -> ! {
        panic!("{}", self.scenario.report(&Failure::on(&self.disk, what.into())))
    }

    fn ok<T>(&self, result: std::result::Result<T, String>) -> T {
        result.unwrap_or_else(|what| self.fail(what))
    }

    pub fn config(&self) -> &Config {
        &self.scenario.config
    }

    pub fn sectors(&self) -> u64 {
        self.config().kind.size / SECTOR
    }

    /// The sectors of a guest cluster.
    pub fn cluster(&self, number: u64) -> Range<u64> {
        let per_cluster = self.config().kind.cluster / SECTOR;
        number * per_cluster..(number + 1) * per_cluster
    }

    async fn change<F>(
        &self,
        change: Change,
        sectors: Range<u64>,
        durable: bool,
        request: F,
    ) -> Result<()>
    where
        F: AsyncFnOnce(&Ticket) -> Result<()>,
    {
        self.disk.note(format!("{change:?} of sectors {sectors:x?}"));
        let ticket = self.oracle.borrow_mut().begin(change, sectors);
        let mut pending = Pending { scene: self, ticket, success: false, durable: false };
        let result = request(&pending.ticket).await;
        self.disk.note(format!("{change:?} of sectors {:x?}: {result:?}", pending.ticket.sectors));
        (pending.success, pending.durable) = (result.is_ok(), durable);
        result
    }

    pub async fn write(&self, sectors: Range<u64>) -> Result<()> {
        self.write_fua(sectors, false).await
    }

    pub async fn write_fua(&self, sectors: Range<u64>, fua: bool) -> Result<()> {
        let request = async |ticket: &Ticket| {
            let data = ticket.data();
            let piece = Piece::Guest(GuestRef::from_slice(&data));
            self.image.write(&SimEngine, piece, ticket.offset(), fua).await
        };
        self.change(Change::Write, sectors, fua, request).await
    }

    /// Writes compressed; `false` where the cluster is allocated.
    pub async fn compress(&self, sectors: Range<u64>) -> Result<bool> {
        let request = async |ticket: &Ticket| {
            let data = ticket.data();
            let piece = Piece::Guest(GuestRef::from_slice(&data));
            self.image.write_compressed(&SimEngine, piece, ticket.offset(), false).await
        };
        match self.change(Change::Write, sectors, false, request).await {
            Ok(()) => Ok(true),
            Err(error) if is_taken(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub async fn zero(&self, sectors: Range<u64>, may_unmap: bool) -> Result<()> {
        let request = async |ticket: &Ticket| {
            let flags = ZeroFlags { may_unmap, ..ZeroFlags::default() };
            self.image.write_zeroes(&SimEngine, ticket.offset(), ticket.len(), flags).await
        };
        self.change(Change::Zero, sectors, false, request).await
    }

    pub async fn discard(&self, sectors: Range<u64>) -> Result<()> {
        let request = async |ticket: &Ticket| {
            self.image.discard(&SimEngine, ticket.offset(), ticket.len()).await
        };
        self.change(Change::Discard, sectors, false, request).await
    }

    pub async fn flush(&self) -> Result<()> {
        let begun = self.oracle.borrow_mut().begin_flush();
        self.disk.note("flush");
        let result = self.image.flush(&SimEngine).await;
        self.disk.note(format!("flush: {result:?}"));
        if result.is_ok() {
            self.oracle.borrow_mut().end_flush(begun);
        }
        result
    }

    /// Reads, and sees whether that is what may be read.
    pub async fn read(&self, sectors: Range<u64>) -> Result<()> {
        let mut bytes = vec![0xee; ((sectors.end - sectors.start) * SECTOR) as usize];
        let begun = self.oracle.borrow_mut().begin_read();
        let offset = sectors.start * SECTOR;
        let target = Target::Guest(GuestMut::from_slice(&mut bytes));
        let result = self.image.read(&SimEngine, target, offset).await;
        match result {
            Ok(()) => {
                let seen = self.oracle.borrow_mut().end_read(begun, offset, &bytes);
                self.ok(seen);
            }
            Err(_) => self.oracle.borrow_mut().give_up_read(),
        }
        result
    }

    /// Writes each of these clusters on its own.
    pub async fn write_clusters(&self, clusters: Range<u64>) -> Result<()> {
        for cluster in clusters {
            self.write(self.cluster(cluster)).await?;
        }
        Ok(())
    }

    /// Holds back what puts the data of the next write into this sector.
    pub fn hold_next_write(&self, sector: u64) -> Hold {
        let word = self.oracle.borrow().upcoming(sector);
        self.disk.hold(Pattern::any().file("image").carrying(word), Stage::Apply)
    }

    /// Holds back the next operations of this kind on the image.
    pub fn hold(&self, kind: OpKind) -> Hold {
        self.disk.hold(Pattern::any().file("image").kind(kind), Stage::Apply)
    }

    /// Runs one thing to its end.
    pub fn play<T>(&self, future: impl Future<Output = T>) -> T {
        let mut result = None;
        self.run(vec![Task::new("main", async { result = Some(future.await) })]);
        result.unwrap_or_else(|| self.fail("it did not come to its end"))
    }

    /// Runs tasks to their end.
    pub fn run(&self, tasks: Vec<Task<'_>>) {
        match self.disk.run(tasks) {
            Outcome::Done => {}
            other => self.fail(format!("{other:?}")),
        }
    }

    /// Runs tasks to their end; after every `every`th step, a crash.
    pub fn run_crashing(&self, every: u64, tasks: Vec<Task<'_>>) {
        let outcome = self.disk.run_observed(tasks, |step| {
            if step % every == 0 {
                self.crash_quick();
            }
            ControlFlow::Continue(())
        });
        if outcome != Outcome::Done {
            self.fail(format!("{outcome:?}"));
        }
    }

    fn draw(&self) -> (Crash, SimDisk) {
        self.scenario.crash(&self.disk, &mut self.rng.borrow_mut())
    }

    /// What is left after a crash now.
    pub fn after_crash(&self) -> SimDisk {
        self.draw().1
    }

    /// Looks at what a crash left with other code than the driver's.
    fn inspect(&self, after: &SimDisk) -> std::result::Result<Vec<Word>, String> {
        let oracle = self.oracle.borrow();
        Ok(inspect::crash_image(&self.scenario, &self.disk, after, &oracle)?.words)
    }

    /// Crashes now, and looks at what is left with other code than the driver's.
    pub fn crash_quick(&self) {
        let (crash, after) = self.draw();
        let step = self.disk.step();
        if let Err(what) = self.inspect(&after) {
            self.fail(format!("after {crash:?} at step {step}: {what}"));
        }
    }

    /// Crashes now, several times; each time life goes on: used at random,
    /// crashed again, closed.
    pub fn crash(&self, times: u64) {
        for _ in 0..times {
            let (crash, after) = self.draw();
            self.disk.note(format!("{crash:?}"));
            let (oracle, mut rng) = (self.oracle.borrow().clone(), self.rng.borrow_mut().fork());
            if let Err(failure) = self.scenario.live(after, oracle, Some(crash), 1, &mut rng) {
                panic!("{}", self.scenario.report(&failure));
            }
        }
    }

    /// Crashes now, and opens what is left.
    pub fn crash_and_open(&self) -> Scene {
        let (crash, after) = self.draw();
        self.disk.note(format!("{crash:?}"));
        let words = match self.inspect(&after) {
            Ok(words) => words,
            Err(what) => self.fail(format!("after {crash:?}: {what}")),
        };
        let oracle = known_after(crash, &self.oracle.borrow(), words);
        Scene::on(self.config(), self.scenario.seed, after, oracle, self.rng.borrow_mut().fork())
    }

    /// Reads the whole disk.
    pub fn read_all(&self) {
        let read = self.play(self.read(0..self.sectors()));
        if let Err(error) = read {
            self.fail(format!("reading all: {error:?}"));
        }
    }

    /// Brings the image into the state in which it is closed.
    pub async fn settle(&self) -> Result<()> {
        let begun = self.oracle.borrow_mut().begin_flush();
        let result = self.image.settle(&SimEngine).await;
        if result.is_ok() {
            self.oracle.borrow_mut().end_flush(begun);
        }
        result
    }

    /// Closes the image, after which it must be sound, without leaks, and hold
    /// what it may hold; looks at it with other code, opens it again, uses it.
    pub fn close(self) {
        if let Err(error) = self.play(self.settle()) {
            self.fail(format!("closing: {error:?}"));
        }
        let leaks = self.leaks();
        if !leaks.is_empty() {
            self.fail(format!("leaked clusters: {leaks:x?}"));
        }
        let violations = self.disk.violations();
        if !violations.is_empty() {
            self.fail(format!("operations that must not be: {violations:#?}"));
        }
        self.ok(self.inspect(&self.disk));
        let (oracle, mut rng) = (self.oracle.borrow().clone(), self.rng.borrow_mut().fork());
        drop(self.image);
        if let Err(failure) = self.scenario.live(self.disk, oracle, None, 0, &mut rng) {
            panic!("{}", self.scenario.report(&failure));
        }
    }

    /// Clusters whose refcount is higher than it need be, as the file is now.
    pub fn leaks(&self) -> Vec<u64> {
        imagecheck::check(&*self.file()).leaks
    }

    pub fn file(&self) -> std::sync::Arc<qcow2rs::io::sim::SimFile> {
        self.disk.file("image").expect("there is an image")
    }

    /// What the L2 entry of a guest cluster says in the file; `None` without a
    /// table.
    pub fn entry(&self, cluster: u64) -> Option<Entry> {
        let file = self.file();
        let header = self.ok(Header::read(&*file));
        let per_table = header.l2_entries();
        let l1 = header.read_table(&*file, header.l1);
        let table = bits(l1[(cluster / per_table) as usize], 9..56);
        let table = (table != 0).then(|| ReadAt::bytes(&*file, table, header.cluster))?;
        Some(header.l2_entry(&table, cluster % per_table))
    }
}
