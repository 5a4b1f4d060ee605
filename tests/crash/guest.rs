//! One who uses the disk: requests at random, each told to the oracle.

use std::ops::Range;

use qcow2rs::ZeroFlags;
use qcow2rs::image::Disk;
use qcow2rs::io::engine::{Piece, Target};
use qcow2rs::io::sim::{GuestMut, GuestRef, Rng, SimEngine, give_up_after};

use super::life::Life;
use super::oracle::{Change, SECTOR};

/// What guests mostly do in a life.
#[derive(Clone, Copy, Debug)]
pub enum Habit {
    /// A bit of everything.
    Mixed,
    /// Clusters are freed and taken again all the time, in few places.
    Reuse,
    /// Everything is written, hardly anything flushed.
    Careless,
}

impl Habit {
    pub const ALL: [Habit; 4] = [Habit::Mixed, Habit::Mixed, Habit::Reuse, Habit::Careless];

    /// Out of 16 requests: writes, zeroes, discards, flushes; the rest are reads.
    fn shares(self) -> [u64; 4] {
        match self {
            Habit::Mixed => [6, 2, 2, 2],
            Habit::Reuse => [6, 2, 5, 2],
            Habit::Careless => [10, 1, 2, 0],
        }
    }
}

pub struct Guest<'a> {
    pub life: &'a Life<'a>,
    pub image: &'a Disk,
    pub index: u64,
    pub habit: Habit,
    pub rng: Rng,
}

impl Guest<'_> {
    pub async fn run(mut self, requests: u64) {
        for _ in 0..requests {
            self.life.tally(|tally| tally.requests += 1);
            if let Err(what) = self.request().await {
                self.life.fail(format!("guest {}: {what}", self.index));
                return;
            }
        }
    }

    /// Sectors to work on: mostly few, mostly where others work, too.
    pub fn range(&mut self) -> Range<u64> {
        let kind = self.life.config().kind;
        let rng = &mut self.rng;
        let sectors = self.life.oracle.borrow().size() / SECTOR;
        let per_cluster = kind.cluster / SECTOR;
        let per_subcluster = (per_cluster / kind.subclusters()).max(1);
        let per_table = kind.cluster / kind.l2_entry() * per_cluster;
        let spread = if matches!(self.habit, Habit::Reuse) { 16 } else { 4 };
        let near = match rng.below(spread) {
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

    /// A change to ask for; `None`: rather a flush or a read.
    pub fn what(&mut self) -> Option<Change> {
        let [writes, zeroes, discards, _] = self.habit.shares();
        match self.rng.below(16) {
            at if at < writes => Some(Change::Write),
            at if at < writes + zeroes => Some(Change::Zero),
            at if at < writes + zeroes + discards => Some(Change::Discard),
            _ => None,
        }
    }

    async fn request(&mut self) -> Result<(), String> {
        if self.life.config().compress && self.rng.chance(1, 3) {
            return self.compress().await;
        }
        let [writes, zeroes, discards, flushes] = self.habit.shares();
        let mut at = self.rng.below(16);
        for (share, change) in
            [(writes, Change::Write), (zeroes, Change::Zero), (discards, Change::Discard)]
        {
            if at < share {
                return self.change(change).await;
            }
            at -= share;
        }
        if at < flushes { self.flush().await } else { self.read().await }
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
        let ticket = self.life.begin(change, sectors.clone());
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

    /// Whole clusters; mostly what was there is given up first, for compressed data
    /// does not replace it.
    async fn compress(&mut self) -> Result<(), String> {
        let per_cluster = self.life.config().kind.cluster / SECTOR;
        let all = self.life.oracle.borrow().size() / SECTOR;
        let range = self.range();
        let start = range.start / per_cluster * per_cluster;
        let sectors = start..range.end.next_multiple_of(per_cluster).min(all);
        let image = self.image;
        if self.rng.chance(7, 8) {
            self.note("Discard before compressing", &sectors);
            let ticket = self.life.begin(Change::Discard, sectors.clone());
            let discard = image.discard(&SimEngine, ticket.offset(), ticket.len());
            let result = self.ask(discard).await;
            let success = matches!(result, Some(Ok(())));
            self.life.oracle.borrow_mut().end(&ticket, success, false);
            self.judge(result)?;
        }
        let fua = self.rng.chance(1, 8);
        self.note("Compress", &sectors);
        let ticket = self.life.begin(Change::Write, sectors.clone());
        let data = ticket.data();
        let piece = Piece::Guest(GuestRef::from_slice(&data));
        let write = image.write_compressed(&SimEngine, piece, ticket.offset(), fua);
        let result = self.ask(write).await;
        let success = matches!(result, Some(Ok(())));
        self.life.oracle.borrow_mut().end(&ticket, success, fua);
        self.note(&format!("Compress gave {result:?} for"), &sectors);
        match result {
            // Somebody was faster, or nothing was given up.
            Some(Err(error)) if is_taken(&error) => Ok(()),
            result => self.judge(result),
        }
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

/// Whether a compressed write was refused because the cluster is allocated.
pub fn is_taken(error: &qcow2rs::Error) -> bool {
    error.message().contains("discard it first")
}
