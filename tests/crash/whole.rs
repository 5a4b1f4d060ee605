//! Changes of the image as a whole, between one use of it and the next: snapshots are
//! taken, applied and deleted, the disk gets another size, refcounts another width.
//! While one is under way the oracle knows two states, and all that a crash leaves is
//! one of them.

use std::rc::Rc;
use std::sync::Arc;

use qcow2rs::image::Disk;
use qcow2rs::image::handle::Replacement;
use qcow2rs::io::sim::SimEngine;
use qcow2rs::snapshots::Meta;
use qcow2rs::{AmendOptions, ErrorKind, Preallocation, ResizeOptions, Result as Done};

use super::inspect;
use super::life::Life;
use super::oracle::{Oracle, SECTOR};
use super::report::Trouble;

/// Snapshots that there may be at a time, besides the one from the beginning.
const MOST: usize = 3;

#[derive(Clone, Debug)]
enum Change {
    Take(Vec<u8>),
    Apply(Vec<u8>),
    Delete(Vec<u8>),
    Resize(u64, Preallocation),
    Refcounts(u32),
}

impl Change {
    /// What a disk of which all is known becomes.
    fn of(&self, known: &Oracle) -> Oracle {
        let mut snapshots = known.snapshots().to_vec();
        let words = match self {
            Change::Refcounts(_) => return known.clone(),
            Change::Take(name) => {
                snapshots.push((name.clone(), Rc::new(known.words().to_vec())));
                known.words().to_vec()
            }
            Change::Delete(name) => {
                snapshots.retain(|(other, _)| other != name);
                known.words().to_vec()
            }
            Change::Apply(name) => {
                let found = snapshots.iter().find(|(other, _)| other == name);
                found.expect("it is known").1.to_vec()
            }
            Change::Resize(size, _) => {
                let mut words = known.words().to_vec();
                words.resize((size / SECTOR) as usize, 0);
                words
            }
        };
        known.recovered(words).with_snapshots(snapshots)
    }

    async fn play(&self, disk: &Disk) -> (Done<()>, Replacement) {
        let engine = &SimEngine;
        match self {
            Change::Take(name) => {
                let meta = Meta::default();
                let (result, disk) =
                    disk.snapshot_create(engine, name, &meta, |_| Ok(())).await.into();
                (result.map(drop), disk)
            }
            Change::Apply(name) => disk.snapshot_apply(engine, name).await.into(),
            Change::Delete(name) => disk.snapshot_delete(engine, name, |_| false).await.into(),
            Change::Resize(size, preallocation) => {
                let options = ResizeOptions { shrink: true, preallocation: *preallocation };
                disk.resize(engine, *size, &options, &mut |_, _| true).await.into()
            }
            Change::Refcounts(bits) => {
                let mut options = AmendOptions::default();
                options.refcount_bits = Some(*bits);
                disk.amend(engine, &options, |_| false, &mut |_, _| true).await.into()
            }
        }
    }
}

impl Life<'_> {
    /// Changes the image, and gives back what it is then; `None` if that is the end.
    pub fn change_whole(&self, image: Arc<Disk>) -> Result<Option<Arc<Disk>>, Trouble> {
        let begun = self.oracle.borrow_mut().begin_flush();
        let Some(settled) = self.run_one("settle", image.settle(&SimEngine))? else {
            return Ok(None);
        };
        settled.map_err(|error| format!("settling: {error:?}"))?;
        let (change, known) = {
            let mut oracle = self.oracle.borrow_mut();
            oracle.end_flush(begun);
            // What discards have left is known now, too, and durable.
            let judged = oracle.judge_crash(&inspect::content(&self.disk)?, self.config().mode)?;
            let known = oracle.recovered(judged.words);
            (self.draw_change(&known), known)
        };
        let (size, after) = (known.size(), change.of(&known));
        let clusters = size.max(after.size()) / self.config().kind.cluster;
        self.changed.set(self.changed.get() + clusters);
        self.oracle.replace(known.becoming(after));
        self.disk.note(format!("{change:?}"));
        let Some((result, replacement)) = self.run_one("change", change.play(&image))? else {
            return Ok(None);
        };
        self.disk.note(format!("{change:?}: {result:?}"));
        let done = match result {
            Ok(()) => true,
            // Too many references, or what version 2 cannot do.
            Err(error)
                if [ErrorKind::InvalidArgument, ErrorKind::NotSupported]
                    .contains(&error.kind()) =>
            {
                false
            }
            Err(error) => return Err(format!("{change:?}: {error:?}").into()),
        };
        let now = self.oracle.borrow().after_change(done);
        self.oracle.replace(now);
        self.tally(|tally| tally.changes += u64::from(done));
        match replacement {
            Replacement::None => Ok(Some(image)),
            Replacement::Disk(disk) => Ok(Some(Arc::from(disk))),
            Replacement::Closed => Err(format!("{change:?}: the image is closed").into()),
        }
    }

    fn draw_change(&self, known: &Oracle) -> Change {
        let mut rng = self.rng.borrow_mut();
        let kind = self.config().kind;
        let snapshots = known.snapshots();
        let name = |index: u64| snapshots[index as usize].0.clone();
        let count = snapshots.len() as u64;
        // Version 2 has nothing that says what a crash has left of a snapshot.
        let what = if kind.version < 3 { 4 } else { rng.below(7) };
        match what {
            0 | 1 if snapshots.len() < MOST => {
                let number = (1..).find(|n| !snapshots.iter().any(|(s, _)| *s == own_name(*n)));
                Change::Take(own_name(number.unwrap_or(0)))
            }
            1 | 2 if count > 0 => Change::Apply(name(rng.below(count))),
            0 | 3 if count > 0 => Change::Delete(name(rng.below(count))),
            6 => Change::Refcounts(*rng.pick(&[8, 16, 32, 64])),
            _ => {
                let most = kind.size / SECTOR * 3 / 2;
                let sectors = rng.between(most / 3, most);
                let mode = match sectors * SECTOR > known.size() {
                    true => *rng.pick(&[
                        Preallocation::Off,
                        Preallocation::Off,
                        Preallocation::Metadata,
                        Preallocation::Full,
                    ]),
                    false => Preallocation::Off,
                };
                Change::Resize(sectors * SECTOR, mode)
            }
        }
    }
}

/// No other snapshot is named so.
fn own_name(number: u64) -> Vec<u8> {
    format!("own {number}").into_bytes()
}

/// Whether a snapshot was taken by a change of these.
pub fn is_own(name: &[u8]) -> bool {
    name.starts_with(b"own ")
}
