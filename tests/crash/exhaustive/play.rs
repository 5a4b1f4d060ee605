//! Plays one sequence and looks at every state that a power loss may leave.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;

use qcow2rs::ErrorKind;
use qcow2rs::io::sim::{Outcome, Rng, SimDisk, Task};

use super::super::imagecheck;
use super::super::layout::{Header, ReadAt, read_guest};
use super::super::oracle::{Oracle, Word};
use super::super::schedules::scene::Scene;
use super::operations::Op;
use super::stages::{Stage, snapshot_of};

/// So many subsets of what is not durable are tried at most, but for tears.
const MOST_SUBSETS: usize = 64;

#[derive(Clone, Copy, Default)]
pub struct Totals {
    sequences: u64,
    /// Ways to lose power.
    crashes: u64,
    /// Images that differ, or of which different things are expected.
    judged: u64,
    /// Images that differ.
    distinct: u64,
}

impl Totals {
    pub fn add(&mut self, other: &Totals) {
        self.sequences += other.sequences;
        self.crashes += other.crashes;
        self.judged += other.judged;
        self.distinct += other.distinct;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { sequences, crashes, judged, distinct } = self;
        write!(f, "{sequences} sequences, {crashes} crash images: {distinct} distinct")?;
        write!(f, ", {judged} with what is expected of them")
    }
}

/// Puts the image that a crash left into a file; what to tell of it.
fn keep(after: &SimDisk) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("after-power-loss");
    let dumped = after.file("image").map(|file| file.dump(&path));
    format!("{} ({dumped:?}) is what was left", path.display())
}

/// Plays sequences on a stage, and remembers what it has seen.
pub struct Player<'a> {
    stage: &'a Stage,
    pub totals: Totals,
    /// Images that were checked, opened and used.
    sound: HashSet<u64>,
    /// Images, each with what was expected of it.
    judged: HashSet<(u64, u64)>,
}

impl<'a> Player<'a> {
    pub fn new(stage: &'a Stage) -> Player<'a> {
        let (sound, judged) = (HashSet::new(), HashSet::new());
        Player { stage, totals: Totals::default(), sound, judged }
    }

    /// Panics where something is wrong.
    pub fn play(&mut self, sequence: &[&Op]) {
        let scene = self.stage.begin();
        let Some((last, first)) = sequence.split_last() else { return };
        for op in first {
            let result = scene.play(op.perform(&scene));
            self.judge(&scene, op, result);
        }
        let result = RefCell::new(None);
        let task = Task::new(&last.name, async {
            let done = last.perform(&scene).await;
            result.replace(Some(done));
        });
        let mut seen = None;
        let outcome = scene.disk.run_observed(vec![task], |_| {
            let due = scene.disk.sync_due("image");
            if due.is_some() && due != seen {
                seen = due;
                self.try_all(&scene);
            }
            ControlFlow::Continue(())
        });
        if outcome != Outcome::Done {
            scene.fail(format!("{outcome:?}"));
        }
        if let Some(result) = result.take() {
            self.judge(&scene, last, result);
        }
        self.try_all(&scene);
        self.totals.sequences += 1;
        self.finish(scene);
    }

    fn judge(&self, scene: &Scene, op: &Op, result: qcow2rs::Result<()>) {
        match result {
            Err(error) if !(self.stage.full && error.kind() == ErrorKind::NoSpace) => {
                scene.fail(format!("{}: {error:?}", op.name));
            }
            _ => {}
        }
    }

    /// Whoever goes on sees what is there, and nothing is left over after close.
    fn finish(&self, scene: Scene) {
        scene.read_all();
        scene.play(scene.settle()).unwrap_or_else(|error| scene.fail(format!("close: {error:?}")));
        let leaks = scene.leaks();
        if !leaks.is_empty() {
            scene.fail(format!("leaked clusters: {leaks:x?}"));
        }
        let violations = scene.disk.violations();
        if !violations.is_empty() {
            scene.fail(format!("operations that must not be: {violations:#?}"));
        }
        if let Err(what) = self.look(&scene.disk, &scene.oracle.borrow()) {
            scene.fail(format!("after close: {what}"));
        }
    }

    /// Loses power now, in all ways.
    fn try_all(&mut self, scene: &Scene) {
        let oracle = scene.oracle.borrow();
        let expected = oracle.fingerprint();
        let stake = scene.disk.at_stake("image").expect("there is an image");
        for remains in stake.tries(MOST_SUBSETS, 1) {
            self.totals.crashes += 1;
            if !self.judged.insert((remains.fingerprint, expected)) {
                continue;
            }
            self.totals.judged += 1;
            let after = stake.disk(&remains);
            let is_new = !self.sound.contains(&remains.fingerprint);
            let looked = match is_new {
                true => self
                    .look(&after, &oracle)
                    .and_then(|words| self.go_on(&after, oracle.recovered(words))),
                false => self.hold_against(&after, &oracle).map(|_| ()),
            };
            if let Err(what) = looked {
                self.judged.remove(&(remains.fingerprint, expected));
                let step = scene.disk.step();
                let kept = keep(&stake.disk(&remains));
                scene.fail(format!("after a power loss at step {step}: {what}\n{kept}"));
            }
            if is_new {
                self.sound.insert(remains.fingerprint);
                self.totals.distinct += 1;
            }
        }
    }

    /// Looks at an image with other code than the driver's; what it holds.
    fn look(&self, disk: &SimDisk, oracle: &Oracle) -> Result<Vec<Word>, String> {
        let file = disk.file("image").expect("there is an image");
        let faults = imagecheck::check(&*file).faults();
        if !faults.is_empty() {
            return Err(format!("{faults:#?}"));
        }
        if self.stage.snapshot.as_ref().is_some_and(|bytes| *bytes != snapshot_of(disk)) {
            return Err("the snapshot has changed".to_owned());
        }
        self.hold_against(disk, oracle)
    }

    /// What the disk holds, which must be what it may hold.
    fn hold_against(&self, disk: &SimDisk, oracle: &Oracle) -> Result<Vec<Word>, String> {
        let file = disk.file("image").expect("there is an image");
        let header = Header::read(&*file)?;
        let base = disk.file("base");
        let base = base.as_deref().map(|base| base as &dyn ReadAt);
        oracle.after_crash(&read_guest(&*file, &header, base))
    }

    /// Opens what a crash has left, uses and closes it.
    fn go_on(&self, after: &SimDisk, oracle: Oracle) -> Result<(), String> {
        let file = after.file("image").expect("there is an image");
        let leaks = imagecheck::check(&*file).leaks;
        let scene = Scene::on(&self.stage.config, 1, after.clone(), oracle, Rng::new(1));
        let tolerable = |result: qcow2rs::Result<()>| match result {
            Err(error) if !(self.stage.full && error.kind() == ErrorKind::NoSpace) => {
                Err(format!("{error:?}"))
            }
            _ => Ok(()),
        };
        // A cluster that may be stored, one that is not, and what was freed.
        let results = scene.play(async {
            let (inside, free) = (scene.cluster(1), scene.cluster(5));
            [
                scene.write(inside.start..inside.start + 1).await,
                scene.write(free.start..free.start + 1).await,
                scene.discard(scene.cluster(2)).await,
                scene.settle().await,
            ]
        });
        for result in results {
            tolerable(result).map_err(|error| format!("in its next life: {error}"))?;
        }
        let left = imagecheck::check(&*file).leaks;
        if let Some(new) = left.iter().find(|cluster| !leaks.contains(cluster)) {
            return Err(format!("its next life leaves cluster {new:#x} over"));
        }
        let looked = self.look(after, &scene.oracle.borrow());
        looked.map(|_| ()).map_err(|what| format!("after its next life: {what}"))
    }
}
