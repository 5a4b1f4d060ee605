//! The life of an image: opened, used by several at once, closed; crashes at any
//! moment of it, each the start of another, shorter life, or of an image that is
//! only looked at. What an image must be like is told in `inspect`.

use std::cell::{Cell, RefCell};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use qcow2rs::ErrorKind;
use qcow2rs::image::Disk;
use qcow2rs::io::engine::Target;
use qcow2rs::io::sim::{
    Crash, GuestMut, Outcome, Rng, SimDisk, SimEngine, SimFile, Task, live_blocks,
};

use super::guest::{Guest, Habit};
use super::inspect::{self, i12_length, i13_backing, i14_operations};
use super::layout::{DIRTY, Header};
use super::oracle::{Change, Oracle, SECTOR, Ticket};
use super::report::{Failure, Trouble, Verdict};
use super::scenario::{Config, Scenario, Tally, known_after, open};

/// Lives that follow upon one another by crashes, after the first.
pub const GENERATIONS: u32 = 3;

/// A life under way.
pub struct Life<'a> {
    pub scenario: &'a Scenario,
    pub disk: SimDisk,
    pub oracle: RefCell<Oracle>,
    /// The crash that this life began with.
    after: Option<Crash>,
    /// The first thing that went wrong.
    trouble: RefCell<Option<Trouble>>,
    /// How many crashes are still to be lived in, and one in how many steps is one.
    crashes: Cell<u64>,
    interval: u64,
    /// Lives that may follow upon one another.
    depth: u32,
    /// Whether operations may fail.
    pub faulty: Cell<bool>,
    /// Whether the image is being opened.
    opening: Cell<bool>,
    /// Clusters that were to be changed, counted as often as it was asked for.
    pub changed: Cell<u64>,
    pub rng: RefCell<Rng>,
    /// For the images that are only looked at: how many there are changes nothing
    /// else.
    looks: RefCell<Rng>,
}

impl Scenario {
    /// Opens the image, uses it, closes it; up to `depth` crashes may follow upon
    /// one another. `after` is the crash that has left it so.
    pub fn live(
        &self,
        disk: SimDisk,
        oracle: Oracle,
        after: Option<Crash>,
        depth: u32,
        rng: &mut Rng,
    ) -> Verdict {
        // Of the states that a change may have left one is there; what a process that was
        // killed has done is not durable before the image has been opened.
        let oracle = match (inspect::known_state(&disk, &oracle, self.config.mode), after) {
            (Ok(oracle), _) if self.config.medium.is_hostile() => oracle,
            (Ok(now), Some(Crash::Process)) => now.or_even(&oracle),
            (Ok(oracle), _) => oracle,
            (Err(what), _) => return Err(Failure::on(&disk, what)),
        };
        let interval = *rng.pick(&[20, 100, 500]);
        let crashes = match depth {
            _ if self.config.medium.is_hostile() => 0,
            GENERATIONS => 5,
            _ => rng.below(2) * u64::from(depth),
        };
        let life = Life {
            scenario: self,
            disk: disk.clone(),
            oracle: RefCell::new(oracle),
            after,
            trouble: RefCell::default(),
            crashes: Cell::new(crashes),
            interval,
            depth,
            faulty: Cell::new(false),
            opening: Cell::new(false),
            changed: Cell::new(0),
            rng: RefCell::new(rng.fork()),
            looks: RefCell::new(rng.fork()),
        };
        let blocks = live_blocks();
        let verdict = life.pass().and_then(|()| match live_blocks() - blocks {
            0 => Ok(()),
            left => Err(format!("I14: {left} buffers are held by nobody").into()),
        });
        life.count_operations();
        verdict.map_err(|trouble| match trouble {
            Trouble::Here(what) => Failure::on(&disk, what),
            Trouble::Later(mut failure) => {
                failure.disks.push(disk);
                failure
            }
        })
    }
}

impl Life<'_> {
    pub fn config(&self) -> &Config {
        &self.scenario.config
    }

    pub fn file(&self) -> Arc<SimFile> {
        self.disk.file("image").expect("there is an image")
    }

    pub fn tally(&self, count: impl FnOnce(&mut Tally)) {
        count(&mut self.scenario.tally.borrow_mut());
    }

    fn count_operations(&self) {
        let counters = self.file().counters();
        self.tally(|tally| {
            tally.operations += counters.reads + counters.writes + counters.zeroes;
            tally.operations += counters.truncates + counters.syncs;
            tally.syncs += counters.syncs;
            tally.failures += counters.failed;
        });
    }

    /// Something went wrong; the run will stop.
    pub fn fail(&self, what: String) {
        self.trouble.borrow_mut().get_or_insert(what.into());
    }

    /// A change is about to be asked for.
    pub fn begin(&self, change: Change, sectors: Range<u64>) -> Ticket {
        let per_cluster = self.config().kind.cluster / SECTOR;
        let clusters = sectors.end.div_ceil(per_cluster) - sectors.start / per_cluster;
        self.changed.set(self.changed.get() + clusters);
        self.oracle.borrow_mut().begin(change, sectors)
    }

    fn draw(&self, of: u64) -> bool {
        self.rng.borrow_mut().chance(1, of)
    }

    /// How often the image is to be changed as a whole: in later lives rarely, for there are
    /// many of them.
    fn draw_changes(&self) -> u64 {
        match self.depth {
            _ if !self.config().changes => 0,
            GENERATIONS => 1 + self.rng.borrow_mut().below(2),
            _ => u64::from(self.draw(6)),
        }
    }

    /// Looks at the image file itself; the leaks in it.
    fn check(&self, when: &str) -> Result<Vec<u64>, Trouble> {
        let report = inspect::structure(&self.disk, self.config());
        let report = report.map_err(|what| format!("{when}: {what}"))?;
        let every = self.scenario.qemu_every.get();
        if every > 0 && self.draw(every) {
            self.ask_qemu(&report).map_err(|what| format!("{when}: {what}"))?;
        }
        Ok(report.leaks)
    }

    /// Whether the image says that its refcounts may be stale.
    fn is_dirty(&self) -> bool {
        Header::read(&*self.file()).is_ok_and(|header| header.incompatible & DIRTY != 0)
    }

    fn pass(&self) -> Result<(), Trouble> {
        let mut leaks = self.check("at open")?;
        let dirty = self.is_dirty();
        let length = self.file().length();
        self.opening.set(self.depth < GENERATIONS);
        let Some(image) = self.run_one("open", open(&self.disk, self.config()))? else {
            return Ok(());
        };
        self.opening.set(false);
        let image = Arc::new(image.map_err(|error| format!("opening: {error:?}"))?);
        if dirty {
            leaks = self.check("after repair")?;
            if self.is_dirty() || !leaks.is_empty() {
                return Err(format!("I7: repaired, but for {leaks:#x?}").into());
            }
        }
        let Some(found) = self.run_one("verify", self.read_all(&image))? else { return Ok(()) };
        self.recover(&found?)?;

        if self.config().faults && self.draw(2) {
            self.inject();
            if !self.use_image(&image)? {
                return Ok(());
            }
            self.disk.clear_faults();
            if !self.poisoned(&image)? {
                return Ok(());
            }
        }
        if !self.use_image(&image)? {
            return Ok(());
        }
        let mut image = image;
        for _ in 0..self.draw_changes() {
            let Some(changed) = self.change_whole(image)? else { return Ok(()) };
            image = changed;
            if !self.use_image(&image)? {
                return Ok(());
            }
        }
        self.part(image, leaks, length)
    }

    /// What was found after a crash is what the disk holds from now on.
    fn recover(&self, found: &[u8]) -> Result<(), Trouble> {
        let recovered = {
            let oracle = self.oracle.borrow();
            let judged = oracle.judge_crash(found, self.config().mode);
            let judged = judged.map_err(|what| format!("I9: {what}"))?;
            if judged.foreign > 0 {
                self.tally(|tally| tally.parity += 1);
            }
            inspect::second_opinion(&self.disk, found)?;
            inspect::raw_data(&self.disk, self.config(), found)?;
            match self.after {
                Some(crash) => known_after(crash, &oracle, judged.words),
                None => oracle.recovered(judged.words),
            }
        };
        self.oracle.replace(recovered);
        Ok(())
    }

    /// Closes the image: nothing may be lost, nothing left over.
    fn part(&self, image: Arc<Disk>, leaks: Vec<u64>, length: u64) -> Result<(), Trouble> {
        i14_operations(&self.disk, true)?;
        let begun = self.oracle.borrow_mut().begin_flush();
        let Some(closed) = self.run_one("close", self.close(&image))? else { return Ok(()) };
        drop(image);
        self.file().retire();
        match closed {
            Ok(()) => self.oracle.borrow_mut().end_flush(begun),
            Err(error) if self.expected(&error) || error.kind() == ErrorKind::Cancelled => {
                // Given up, but seen to its end.
                i14_operations(&self.disk, true)?;
                return self.crash(Crash::Process);
            }
            Err(error) => return Err(format!("closing: {error:?}").into()),
        }
        self.tally(|tally| tally.closed += 1);
        let left: Vec<u64> = self.check("after close")?;
        if self.is_dirty() {
            return Err("I7: dirty after close".to_owned().into());
        }
        let new: Vec<&u64> = left.iter().filter(|cluster| !leaks.contains(cluster)).collect();
        let may_leak = self.faulty.get() || self.config().give_up;
        if !new.is_empty() && !may_leak {
            return Err(format!("clusters {new:#x?} are left over after close").into());
        }
        i14_operations(&self.disk, true)?;
        i12_length(&self.file(), self.config(), length, self.changed.get())?;
        self.is_durable(&left)?;
        let every = self.scenario.qemu_every.get();
        if every > 0 && self.depth > 0 && self.draw(every) {
            self.hand_over()?;
        }
        Ok(())
    }

    /// Nothing that close did may depend on luck, but for the end of the file.
    fn is_durable(&self, leaks: &[u64]) -> Result<(), Trouble> {
        let seed = self.rng.borrow_mut().next_u64();
        let after = self.disk.crash(Crash::Power { unit: 512 }, seed);
        let report = inspect::structure(&after, self.config())?;
        if report.leaks != leaks {
            return Err(format!("what close wrote is not durable: {report:#?}").into());
        }
        inspect::reads(&after, &self.oracle.borrow(), self.config().mode)?;
        i13_backing(&self.disk, &after)?;
        Ok(())
    }

    async fn close(&self, image: &Arc<Disk>) -> qcow2rs::Result<()> {
        match self.config().queues {
            true => self.close_with_queues(image).await,
            false => image.settle(&SimEngine).await,
        }
    }

    /// Lives that may follow upon this one.
    pub fn generations_left(&self) -> u64 {
        u64::from(self.depth)
    }

    /// Uses the image by several at once. False if that is the end.
    fn use_image(&self, image: &Arc<Disk>) -> Result<bool, Trouble> {
        let mut rng = self.rng.borrow_mut().fork();
        let depth = u64::from(self.depth);
        let habit = *rng.pick(&Habit::ALL);
        let tasks = (0..rng.between(1, 8)).map(|index| {
            let (rng, requests) = (rng.fork(), rng.between(1, 12 * (depth + 1)));
            let name = format!("guest {index}");
            Task::new(name, Guest { life: self, image, index, habit, rng }.run(requests))
        });
        let used = match self.config().queues {
            true => self.use_by_queues(image)?,
            false => self.run(tasks.collect())?,
        };
        if !used {
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

    pub fn run_one<T>(
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
    pub fn run(&self, tasks: Vec<Task<'_>>) -> Result<bool, Trouble> {
        let outcome = self.disk.run_observed(tasks, |_| {
            if self.trouble.borrow().is_none() {
                let trouble = self.after_a_step().err();
                self.trouble.replace(trouble);
            }
            match self.trouble.borrow().is_some() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
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

    /// Crashes now and then. What opening does is short, so crashes are thicker.
    fn after_a_step(&self) -> Result<(), Trouble> {
        let thicker = |every: u64| if self.opening.get() { every.min(8) } else { every };
        let every = thicker(self.config().every);
        if every > 0 && self.looks.borrow_mut().chance(1, every) {
            self.look()?;
        }
        if self.crashes.get() > 0 && self.draw(thicker(self.interval)) {
            self.crashes.set(self.crashes.get() - 1);
            let seed = self.rng.borrow_mut().fork();
            self.live_on(self.scenario.crash(&self.disk, &mut seed.clone()))?;
        }
        Ok(())
    }

    /// Crashes now, and only looks at what is left.
    fn look(&self) -> Result<(), Trouble> {
        let mut rng = self.looks.borrow_mut();
        let (crash, after) = self.scenario.crash(&self.disk, &mut rng);
        if self.opening.get() {
            self.tally(|tally| tally.while_opening += 1);
        }
        let hostile = self.config().medium.is_hostile();
        let found = inspect::crash_image(self.scenario, &self.disk, &after, &self.oracle.borrow())
            .and_then(|_| match !hostile && rng.chance(1, 8) {
                true => inspect::i10_own_check(self.scenario, &after),
                false => Ok(()),
            });
        if let (true, Err(what)) = (hostile, &found) {
            let number = broken_invariant(what).ok_or_else(|| what.clone())?;
            self.tally(|tally| tally.broken[number] += 1);
            return Ok(());
        }
        found.map_err(|what| {
            let step = self.disk.step();
            let what = format!("after {crash:?} at step {step}: {what}");
            let disks = vec![after];
            Trouble::Later(Failure { what, disks })
        })
    }

    /// The process dies, or the power, and life goes on.
    pub fn crash(&self, crash: Crash) -> Result<(), Trouble> {
        let seed = self.rng.borrow_mut().next_u64();
        self.live_on((crash, self.disk.crash(crash, seed)))
    }

    /// Sees whether life goes on after a crash.
    fn live_on(&self, (crash, after): (Crash, SimDisk)) -> Result<(), Trouble> {
        if self.depth == 0 {
            return Ok(());
        }
        self.tally(|tally| {
            tally.lives += 1;
            tally.later_lives += u64::from(self.depth < GENERATIONS);
            tally.while_opening += u64::from(self.opening.get());
        });
        let mut rng = self.rng.borrow_mut().fork();
        let oracle = self.oracle.borrow().clone();
        self.disk.note(format!("{crash:?}"));
        let step = self.disk.step();
        let told = |what: String| format!("after {crash:?} at step {step}: {what}");
        inspect::i1_header(&after).and_then(|()| i13_backing(&self.disk, &after)).map_err(told)?;
        let life = self.scenario.live(after, oracle, Some(crash), self.depth - 1, &mut rng);
        life.map_err(|failure| Trouble::Later(Failure { what: told(failure.what), ..failure }))
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
}

/// The number of the first invariant that a text names.
fn broken_invariant(what: &str) -> Option<usize> {
    let (before, _) = what.split_once(':')?;
    let (_, number) = before.rsplit_once('I')?;
    number.parse().ok().filter(|number| *number < 15)
}
