//! A queue and all that was asked of it: each request that it accepts is told to the
//! oracle when it is accepted and when its completion is taken, and has one
//! completion, no more and no less.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use qcow2rs::{Buffer, Completion, ErrorKind, Image, Refused, SimQueue, WriteFlags, ZeroFlags};

use super::guest::Guest;
use super::life::Life;
use super::oracle::{Change, Ticket};

/// What was asked for and has not ended.
enum Asked {
    Change { change: Change, ticket: Ticket, fua: bool },
    Read { begun: u64, offset: u64, len: usize },
    Flush { begun: u64 },
}

/// A queue, as far as all threads may know it.
pub struct Shared {
    pub queue: SimQueue,
    /// Somebody has ended a wait, and none has ended early since.
    woken: Cell<bool>,
}

impl Shared {
    /// Ends the wait under way, or the next one.
    pub fn wake_up(&self) {
        self.woken.set(true);
        self.queue.wake_up();
    }
}

pub struct User<'a> {
    life: &'a Life<'a>,
    pub shared: Rc<Shared>,
    name: String,
    depth: usize,
    asked: BTreeMap<u64, Asked>,
    next: u64,
    /// The completion event is to tell of completions.
    pub told: bool,
}

fn unexpected(what: &str, got: impl std::fmt::Debug) -> Result<(), String> {
    Err(format!("{what} gave {got:?}"))
}

/// A vector or an aligned buffer, which may go to the disk as it is, without a future.
fn buffer(guest: &mut Guest<'_>, bytes: Vec<u8>) -> Buffer {
    if guest.rng.chance(1, 3) {
        return bytes.into();
    }
    let mut buffer = Buffer::aligned(bytes.len()).expect("there is memory");
    buffer.copy_from_slice(&bytes);
    buffer
}

impl<'a> User<'a> {
    pub fn new(life: &'a Life<'a>, image: &Arc<Image>, name: String, depth: usize) -> User<'a> {
        let queue = SimQueue::new(image, &life.disk, depth).expect("a queue can be made");
        life.disk.note(format!("{name}: made, for {depth} requests"));
        let shared = Rc::new(Shared { queue, woken: Cell::new(false) });
        User { life, shared, name, depth, asked: BTreeMap::new(), next: 0, told: true }
    }

    fn queue(&self) -> &SimQueue {
        &self.shared.queue
    }

    pub fn in_flight(&self) -> usize {
        self.asked.len()
    }

    pub fn is_full(&self) -> bool {
        self.in_flight() == self.depth
    }

    fn note(&self, what: impl std::fmt::Display) {
        self.life.disk.note(format!("{}: {what}", self.name));
    }

    /// Asks for something that the guest thinks of. A queue that is full must say so.
    pub fn ask(&mut self, guest: &mut Guest<'_>) -> Result<(), String> {
        let (change, sectors) = (guest.what(), guest.range());
        let (fua, may_unmap) = (guest.rng.chance(1, 8), guest.rng.chance(1, 2));
        let number = self.next;
        self.next += 1;
        self.life.tally(|tally| tally.requests += 1);
        let text = format!("request {number}, {change:?}{}", if fua { " FUA" } else { "" });
        self.note(format_args!("{text} {sectors:x?}"));
        let asked = match change {
            Some(change) => Asked::Change { change, ticket: self.life.begin(change, sectors), fua },
            None if guest.rng.chance(1, 4) => {
                Asked::Flush { begun: self.life.oracle.borrow_mut().begin_flush() }
            }
            None => {
                let begun = self.life.oracle.borrow_mut().begin_read();
                let len = (sectors.end - sectors.start) as usize * 512;
                Asked::Read { begun, offset: sectors.start * 512, len }
            }
        };
        let queue = self.queue();
        let accepted = match &asked {
            Asked::Change { change, ticket, fua } => {
                let (offset, len, fua) = (ticket.offset(), ticket.len(), *fua);
                match change {
                    Change::Write => {
                        let flags = WriteFlags { fua, ..WriteFlags::default() };
                        queue.write(buffer(guest, ticket.data()), offset, flags, number)
                    }
                    Change::Zero => {
                        let flags = ZeroFlags { fua, may_unmap, no_fallback: false };
                        queue.write_zeroes(offset, len, flags, number)
                    }
                    Change::Discard => queue.discard(offset, len, number),
                }
            }
            Asked::Read { offset, len, .. } => {
                queue.read(buffer(guest, vec![0xee; *len]), *offset, number)
            }
            Asked::Flush { .. } => queue.flush(number),
        };
        match (accepted, self.is_full()) {
            (Ok(()), false) => {
                self.asked.insert(number, asked);
                self.count()
            }
            (Err(refused), true) => self.refused(asked, refused),
            (got, full) => unexpected(&format!("{text}, full: {full},"), got),
        }
    }

    fn refused(&self, asked: Asked, refused: Refused) -> Result<(), String> {
        self.note("refused, it is full");
        if refused.error.errno() != libc::EAGAIN {
            return unexpected("a full queue", refused);
        }
        self.gives_back(&asked, refused.buffer.as_deref())?;
        // It never happened.
        self.ended_somehow(asked, false);
        Ok(())
    }

    /// Whether this is the buffer that came with a request.
    fn gives_back(&self, asked: &Asked, buffer: Option<&[u8]>) -> Result<(), String> {
        let own = match asked {
            Asked::Change { change: Change::Write, ticket, .. } => {
                buffer == Some(&ticket.data()[..])
            }
            Asked::Read { len, .. } => buffer.is_some_and(|buffer| buffer.len() == *len),
            _ => buffer.is_none(),
        };
        if own { Ok(()) } else { Err(format!("{}: a buffer is not given back", self.name)) }
    }

    /// As many are in flight as were accepted and have no completion.
    fn count(&self) -> Result<(), String> {
        match self.queue().in_flight() as usize {
            count if count == self.in_flight() => Ok(()),
            count => Err(format!("{} requests, {count} in flight", self.in_flight())),
        }
    }

    pub fn submit(&mut self) -> Result<(), String> {
        self.note("submit");
        match self.queue().submit() {
            Ok(count) if count <= self.in_flight() => self.count(),
            got => unexpected("submit", got),
        }
    }

    pub fn reap(&mut self, max: usize) -> Result<(), String> {
        let mut done = Vec::new();
        let count = self.queue().reap(max, |completion| done.push(completion));
        self.note(format_args!("reap {max}: {count:?}"));
        match count {
            Ok(count) if count == done.len() && count <= max => self.completed(done),
            got => unexpected("reap", got),
        }
    }

    /// Waits for completions. It may end early only if somebody wanted it to, or
    /// because of a signal.
    pub async fn wait(&mut self, min: usize, max: usize) -> Result<(), String> {
        let mut done = Vec::new();
        self.note(format_args!("wait for {min}, {max} at most"));
        let count = self.queue().wait(min, max, |completion| done.push(completion)).await;
        self.note(format_args!("wait gave {count:?}"));
        match count {
            Err(error) if min > self.in_flight() => match error.kind() {
                ErrorKind::InvalidArgument => Ok(()),
                _ => unexpected("a wait for more than there is", error),
            },
            Err(error) if error.kind() == ErrorKind::Os(libc::EINTR) => self.completed(done),
            Ok(count) if count == done.len() && count <= max && min <= self.in_flight() => {
                // With completions, a signal may have ended it, too.
                let early = count == 0 && min.min(max) > 0;
                if early && !self.shared.woken.take() {
                    return Err(format!("a wait for {min} ended with {count}"));
                }
                self.completed(done)
            }
            got => unexpected("wait", got),
        }
    }

    /// Whether the completion event is used.
    pub fn tell(&mut self, told: bool) -> Result<(), String> {
        self.told = told;
        match self.queue().set_completion_event_enabled(told) {
            Ok(()) => Ok(()),
            got => unexpected("enabling the event", got),
        }
    }

    fn completed(&mut self, done: Vec<Completion>) -> Result<(), String> {
        done.into_iter().try_for_each(|completion| self.complete(completion, false))?;
        self.count()
    }

    fn complete(&mut self, completion: Completion, flushed: bool) -> Result<(), String> {
        let Completion { user_data: number, result, buffer } = completion;
        self.note(format_args!("request {number} gave {result:?}"));
        let Some(asked) = self.asked.remove(&number) else {
            return Err(format!("{}: a completion too many, of request {number}", self.name));
        };
        self.gives_back(&asked, buffer.as_deref())?;
        let success = result.is_ok();
        let mut oracle = self.life.oracle.borrow_mut();
        match asked {
            Asked::Change { change, ticket, fua } => {
                let durable = flushed || fua && change != Change::Discard;
                oracle.end(&ticket, success, durable);
            }
            Asked::Read { begun, offset, .. } if success => {
                oracle.end_read(begun, offset, buffer.as_deref().unwrap_or_default())?;
            }
            Asked::Read { .. } => oracle.give_up_read(),
            Asked::Flush { begun } if success => oracle.end_flush(begun),
            Asked::Flush { .. } => {}
        }
        match result {
            Err(error) if !self.life.expected(&error) => Err(format!("{number}: {error:?}")),
            _ => Ok(()),
        }
    }

    /// A request of which there is no completion; `surely`: it was carried out.
    fn ended_somehow(&self, asked: Asked, surely: bool) {
        let mut oracle = self.life.oracle.borrow_mut();
        match asked {
            Asked::Change { change, ticket, fua } => {
                oracle.end(&ticket, surely, surely && fua && change != Change::Discard);
            }
            Asked::Read { .. } => oracle.give_up_read(),
            Asked::Flush { begun } if surely => oracle.end_flush(begun),
            Asked::Flush { .. } => {}
        }
    }

    /// Ends the queue, which waits for what is in flight.
    pub async fn destroy(&mut self) -> Result<(), String> {
        self.note(format_args!("destroy, {} in flight", self.in_flight()));
        self.queue().destroy().await;
        self.note("destroyed");
        let surely = !self.life.faulty.get();
        for (_, asked) in std::mem::take(&mut self.asked) {
            self.ended_somehow(asked, surely);
        }
        self.count()
    }

    /// The image was closed: every request has completed, and if closing succeeded
    /// what they have done is durable.
    pub fn reap_after_close(&mut self, closed: bool) -> Result<(), String> {
        let mut done = Vec::new();
        let count = self.queue().reap(usize::MAX, |completion| done.push(completion));
        if !matches!(count, Ok(count) if count == self.in_flight()) {
            let left = self.in_flight();
            return unexpected(&format!("a reap after close, with {left} in flight,"), count);
        }
        done.into_iter().try_for_each(|completion| self.complete(completion, closed))
    }

    /// The image was abandoned: every request has ended, with an error unless it had
    /// completed before.
    pub fn reap_after_abandoning(&mut self) -> Result<(), String> {
        let mut done = Vec::new();
        let count = self.queue().reap(usize::MAX, |completion| done.push(completion));
        if !matches!(count, Ok(count) if count == self.in_flight()) {
            return unexpected("a reap after abandoning", count);
        }
        for completion in done {
            match &completion.result {
                Err(error) if error.kind() == ErrorKind::Cancelled => {
                    self.note(format_args!("request {} was given up", completion.user_data));
                    let asked = self.asked.remove(&completion.user_data);
                    let asked = asked.ok_or("a completion too many")?;
                    // What was under way may have lost its buffer.
                    if completion.buffer.is_some() {
                        self.gives_back(&asked, completion.buffer.as_deref())?;
                    }
                    self.ended_somehow(asked, false);
                }
                _ => self.complete(completion, false)?,
            }
        }
        Ok(())
    }
}
