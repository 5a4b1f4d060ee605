//! Operations that fail, and what a driver must do once a sync has failed.

use qcow2rs::image::Disk;
use qcow2rs::io::engine::Piece;
use qcow2rs::io::sim::{Fault, GuestRef, OpKind, Pattern, SimEngine};
use qcow2rs::{Error, ErrorKind, ZeroFlags};

use super::life::Life;
use super::oracle::{Change, Ticket};
use super::report::Trouble;

impl Life<'_> {
    /// Makes something fail: the operation of some index, from there on, or now
    /// and then; in one file or in the other; at times for two reasons.
    pub fn inject(&self) {
        let mut rng = self.rng.borrow_mut();
        self.faulty.set(true);
        for _ in 0..rng.between(1, 2) {
            let kinds = [OpKind::Read, OpKind::Write, OpKind::Write, OpKind::Sync];
            let kind = match rng.below(8) {
                0 => OpKind::Punch,
                1 => OpKind::Truncate,
                _ => *rng.pick(&kinds),
            };
            let errno = *rng.pick(&[libc::EIO, libc::ENOSPC]);
            let pattern = Pattern::any().kind(kind).after(rng.below(40));
            let pattern = if rng.chance(1, 8) { pattern } else { pattern.file("image") };
            let (pattern, forever) = match rng.below(3) {
                0 => (pattern, false),
                1 => (pattern, true),
                _ => (pattern.one_in(8), true),
            };
            let fault = Fault { pattern, errno, forever };
            self.disk.note(format!("{fault:?}"));
            self.disk.inject(fault);
        }
    }

    /// Whether an error is what faults lead to.
    pub fn expected(&self, error: &Error) -> bool {
        let kind = error.kind();
        let fault =
            matches!(kind, ErrorKind::Os(libc::EIO) | ErrorKind::NoSpace | ErrorKind::FlushFailed);
        self.faulty.get() && fault
    }

    /// After a sync that failed, nothing is changed any more, and who asks for it
    /// is told why (I14). False if life is over.
    pub fn poisoned(&self, image: &Disk) -> Result<bool, Trouble> {
        let before = self.file().counters();
        if before.failed_syncs == 0 {
            return Ok(true);
        }
        let attempts = self.run_one("attempts", self.attempts(image))?;
        let Some(attempts) = attempts else { return Ok(false) };
        attempts?;
        let after = self.file().counters();
        let changes = |c: qcow2rs::io::sim::Counters| (c.writes, c.zeroes, c.truncates, c.syncs);
        if changes(before) != changes(after) {
            let what = format!("I14: operations after a failed sync: {before:?}, {after:?}");
            return Err(what.into());
        }
        Ok(true)
    }

    /// One of each request that must be refused now.
    async fn attempts(&self, image: &Disk) -> Result<(), String> {
        let refused = |what: &str, result: qcow2rs::Result<()>| match result {
            Err(error) if error.kind() == ErrorKind::FlushFailed => Ok(()),
            result => Err(format!("I14: {what} after a failed sync gave {result:?}")),
        };
        let attempt = |change| -> Ticket { self.begin(change, 0..1) };
        let end = |ticket: &Ticket| self.oracle.borrow_mut().end(ticket, false, false);

        let ticket = attempt(Change::Write);
        let data = ticket.data();
        let piece = Piece::Guest(GuestRef::from_slice(&data));
        let result = image.write(&SimEngine, piece, 0, false).await;
        end(&ticket);
        refused("a write", result)?;

        let ticket = attempt(Change::Zero);
        let result = image.write_zeroes(&SimEngine, 0, 512, ZeroFlags::default()).await;
        end(&ticket);
        refused("zeroes", result)?;

        let ticket = attempt(Change::Discard);
        let result = image.discard(&SimEngine, 0, 512).await;
        end(&ticket);
        refused("a discard", result)?;
        refused("a flush", image.flush(&SimEngine).await)
    }
}
