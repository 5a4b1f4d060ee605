//! The state of a simulated disk, and what happens to an operation in it:
//! issued, applied (in one part or several), completed, each at a time that the
//! scheduler chooses.

use std::collections::BTreeMap;
use std::task::Waker;

use super::content::{Content, OpId, SECTOR};
use super::event::SimEvent;
use super::file::{Counters, FileOptions};
use super::journal::{Event, Journal, OpKind};
use super::pages::PAGE;
use super::pattern::{Fault, Pattern, Stage};
use super::rng::Rng;

pub(super) struct World {
    pub(super) rng: Rng,
    mood: Mood,
    pub(super) step: u64,
    pub(super) files: Vec<FileState>,
    pub(super) ops: BTreeMap<OpId, Op>,
    next_op: OpId,
    /// Number of operations completed.
    completed: u64,
    pub(super) faults: Vec<Fault>,
    pub(super) holds: Vec<HoldState>,
    /// By number.
    pub(super) events: Vec<SimEvent>,
    /// The task that is being polled, as a thread; 0: none.
    pub(super) thread: u64,
    pub(super) journal: Journal,
    pub(super) violations: Vec<String>,
    /// What was going on has been stopped: nothing changes any more.
    pub(super) stopped: bool,
    /// A write whose future is dropped stays in flight.
    pub(super) leave_dropped: bool,
}

pub(super) struct FileState {
    pub(super) name: String,
    pub(super) options: FileOptions,
    pub(super) content: Content,
    pub(super) counters: Counters,
    /// The errno of a sync that failed when nobody waited for it any more.
    pub(super) owed: Option<i32>,
    /// Nobody has it open: each operation is a violation.
    pub(super) retired: bool,
}

pub(super) struct Op {
    pub(super) kind: OpKind,
    pub(super) file: usize,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// What is to be written, or has been read.
    pub(super) bytes: Vec<u8>,
    /// How many bytes have taken effect.
    pub(super) progress: u64,
    pub(super) state: State,
    /// What a sync vouches for: all that had completed when it was issued.
    claims: u64,
    fault: Option<i32>,
    weight: u64,
    hold: Option<usize>,
    pub(super) waker: Option<Waker>,
    /// Nobody waits for it.
    orphan: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    Issued,
    Applied(Result<(), i32>),
    Completed(Result<(), i32>),
}

pub(super) struct HoldState {
    pub(super) pattern: Pattern,
    pub(super) stage: Stage,
    pub(super) active: bool,
    /// It keeps what it has caught and catches nothing more.
    pub(super) closed: bool,
    /// Whether an operation was caught.
    pub(super) caught: bool,
    /// Nothing else can go on: who waits for a catch waits in vain.
    pub(super) idle: bool,
    pub(super) waiters: Vec<Waker>,
}

/// How the scheduler is disposed in this run; drawn from the seed.
struct Mood {
    poll: u64,
    slow: u64,
    stuck: u64,
    split: u64,
}

/// What happens next.
pub(super) enum Action {
    Poll(usize),
    Advance(OpId),
    Wake(Vec<Waker>),
    Nothing,
}

const NORMAL: u64 = 32;

impl World {
    pub(super) fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let mood = Mood {
            poll: *rng.pick(&[4, NORMAL, 256]),
            slow: *rng.pick(&[0, 4, 16]),
            stuck: *rng.pick(&[0, 1, 4]),
            split: *rng.pick(&[0, 1, 4]),
        };
        World {
            rng,
            mood,
            step: 0,
            files: Vec::new(),
            ops: BTreeMap::new(),
            next_op: 1,
            completed: 0,
            faults: Vec::new(),
            holds: Vec::new(),
            events: Vec::new(),
            thread: 0,
            journal: Journal::default(),
            violations: Vec::new(),
            stopped: false,
            leave_dropped: false,
        }
    }

    /// Numbers operations behind those of another world, some of whose changes may
    /// be here.
    pub(super) fn go_on_from(&mut self, other: &World) {
        self.next_op = other.next_op;
    }

    /// Takes an operation in.
    pub(super) fn issue(
        &mut self,
        file: usize,
        kind: OpKind,
        offset: u64,
        len: u64,
        bytes: Vec<u8>,
    ) -> OpId {
        let id = self.next_op;
        self.next_op += 1;
        self.journal.add(self.step, id, Event::Issue { kind, file, offset, len });
        self.files[file].counters.count(kind, len);
        let refused = self.refusal(file, kind, offset, len);
        let (name, range) = (&self.files[file].name, offset..offset.saturating_add(len));
        let mut fault = None;
        self.faults.retain_mut(|f| {
            let hit = fault.is_none()
                && f.pattern.matches(kind, name, range.clone(), &bytes, &mut self.rng);
            if hit {
                fault = Some(f.errno);
            }
            !hit || f.forever
        });
        if kind == OpKind::Sync {
            fault = fault.or(self.files[file].owed.take());
        }
        let name = &self.files[file].name;
        let mut hold = None;
        for (index, h) in self.holds.iter_mut().enumerate() {
            let catches = h.active && !h.closed;
            if catches && h.pattern.matches(kind, name, range.clone(), &bytes, &mut self.rng) {
                hold = Some(index);
            }
        }
        let mut op = Op {
            kind,
            file,
            offset,
            len,
            bytes,
            progress: 0,
            state: refused.map_or(State::Issued, |errno| State::Applied(Err(errno))),
            claims: self.completed,
            fault,
            weight: 0,
            hold,
            waker: None,
            orphan: false,
        };
        self.draw_weight(&mut op);
        self.ops.insert(id, op);
        self.report_held(id);
        id
    }

    /// The errno for what must not be asked at all; noted as a violation.
    fn refusal(&mut self, file: usize, kind: OpKind, offset: u64, len: u64) -> Option<i32> {
        let FileState { name, options, retired, .. } = &self.files[file];
        let fits = |value: u64| value % options.alignment.max(1) == 0;
        let (errno, why) = if self.stopped {
            (libc::EIO, "after the disk was stopped")
        } else if *retired {
            (libc::EBADF, "on a file that is closed")
        } else if kind.changes() && options.read_only {
            (libc::EBADF, "on a read-only file")
        } else if kind == OpKind::Truncate && options.device.is_some() {
            (libc::EINVAL, "on a device")
        } else if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            (libc::EINVAL, "past the largest offset")
        } else if !(fits(offset) && fits(len)) && matches!(kind, OpKind::Read | OpKind::Write) {
            (libc::EINVAL, "unaligned")
        } else {
            return None;
        };
        self.violations.push(format!("{kind:?} {name} {offset:#x}+{len:#x}: {why}"));
        Some(errno)
    }

    /// Chooses what happens next, given the tasks that can be polled.
    pub(super) fn choose(&mut self, ready: &[usize]) -> Action {
        let pending = self.ops.iter().filter(|(_, op)| !matches!(op.state, State::Completed(_)));
        let pending: Vec<(OpId, &Op)> = pending.map(|(id, op)| (*id, op)).collect();
        let tasks = ready.len() as u64 * self.mood.poll;
        let total = tasks + pending.iter().map(|(_, op)| op.weight).sum::<u64>();
        let mut at = self.rng.below(total);
        if at < tasks {
            return Action::Poll(ready[(at / self.mood.poll) as usize]);
        }
        at -= tasks;
        if total > tasks {
            for (id, op) in pending {
                if at < op.weight {
                    return Action::Advance(id);
                }
                at -= op.weight;
            }
        } else {
            // Only what is stuck is left. What is held goes last of all.
            let (held, free): (Vec<_>, Vec<_>) =
                pending.into_iter().partition(|(_, op)| self.is_held(op));
            let stuck = if free.is_empty() { held } else { free };
            let ids: Vec<OpId> = stuck.into_iter().map(|(id, _)| id).collect();
            if !ids.is_empty() {
                return Action::Advance(*self.rng.pick(&ids));
            }
        }
        let waiting = self.holds.iter_mut().filter(|hold| !hold.waiters.is_empty());
        let wakers: Vec<Waker> = waiting
            .flat_map(|hold| {
                hold.idle = true;
                std::mem::take(&mut hold.waiters)
            })
            .collect();
        if wakers.is_empty() { Action::Nothing } else { Action::Wake(wakers) }
    }

    /// Carries an operation one stage further; returns whom to wake.
    pub(super) fn advance(&mut self, id: OpId) -> Option<Waker> {
        let mut op = self.ops.remove(&id)?;
        match op.state {
            State::Issued => self.apply(id, &mut op),
            State::Applied(result) => self.complete(id, &mut op, result),
            State::Completed(_) => {}
        }
        let done = matches!(op.state, State::Completed(_));
        let waker = if done { op.waker.take() } else { None };
        if !(done && op.orphan) {
            self.ops.insert(id, op);
            self.report_held(id);
        }
        waker
    }

    fn apply(&mut self, id: OpId, op: &mut Op) {
        let result = match op.fault.or_else(|| self.no_space(op)) {
            Some(errno) => {
                self.fail(id, op, errno);
                Err(errno)
            }
            None => {
                let upto = self.part(op);
                self.effect(id, op, upto);
                if op.progress < op.len {
                    return;
                }
                Ok(())
            }
        };
        op.state = State::Applied(result);
        self.draw_weight(op);
    }

    /// How far a read or write gets in this step: mostly to its end.
    fn part(&mut self, op: &Op) -> u64 {
        let first = (op.offset + op.progress) / SECTOR + 1;
        let sectors = ((op.offset + op.len).div_ceil(SECTOR)).saturating_sub(first);
        let divisible = matches!(op.kind, OpKind::Read | OpKind::Write);
        if !divisible || sectors == 0 || !self.rng.chance(self.mood.split, 16) {
            return op.len;
        }
        (first + self.rng.below(sectors)) * SECTOR - op.offset
    }

    /// Lets an operation take effect up to its byte `upto`.
    fn effect(&mut self, id: OpId, op: &mut Op, upto: u64) {
        let content = &mut self.files[op.file].content;
        if op.kind == OpKind::Read {
            let part = &mut op.bytes[op.progress as usize..upto as usize];
            content.visible.read(op.offset + op.progress, part);
        } else if op.kind == OpKind::Sync {
            content.sync(op.claims);
        } else {
            op.change(id, content, upto);
        }
        self.journal.add(self.step, id, Event::Apply(upto - op.progress));
        op.progress = upto;
    }

    /// Whether the effect of an operation is still to come, and would be one.
    pub(super) fn may_still_happen(&self, op: &Op) -> bool {
        op.state == State::Issued && op.fault.is_none() && self.no_space(op).is_none()
    }

    /// The errno for a change that finds no room.
    fn no_space(&self, op: &Op) -> Option<i32> {
        let FileState { options, content, .. } = &self.files[op.file];
        let occupies = match op.kind {
            OpKind::Write => true,
            OpKind::Zero => op.offset < content.length,
            _ => false,
        };
        let past = |limit: u64| op.offset + op.len > limit;
        let no_room = |space: u64| {
            let free = (space / PAGE).saturating_sub(content.visible.count());
            content.visible.missing(op.offset, op.len) > free
        };
        let refused =
            occupies && (options.device.is_some_and(past) || options.space.is_some_and(no_room));
        refused.then_some(libc::ENOSPC)
    }

    /// An operation fails, maybe after a part of it took effect.
    fn fail(&mut self, id: OpId, op: &mut Op, errno: i32) {
        self.journal.add(self.step, id, Event::Fail(errno));
        let FileState { content, options, counters, .. } = &mut self.files[op.file];
        counters.failed += 1;
        match op.kind {
            OpKind::Sync => content.fail_sync(op.claims),
            OpKind::Write if self.rng.chance(1, 2) => {
                for (at, sector) in op.sectors() {
                    let missing = content.visible.missing(at, sector.len() as u64);
                    let room = options.space.is_none_or(|s| content.visible.count() < s / PAGE);
                    let inside = options.device.is_none_or(|end| at + SECTOR <= end);
                    if inside && (missing == 0 || room) && self.rng.chance(1, 2) {
                        content.write(id, at, sector);
                    }
                }
            }
            _ => {}
        }
    }

    fn complete(&mut self, id: OpId, op: &mut Op, result: Result<(), i32>) {
        self.completed += 1;
        self.files[op.file].content.complete(id, self.completed);
        self.journal.add(self.step, id, Event::Complete);
        op.state = State::Completed(result);
    }

    /// What an operation that has completed has read, or its errno.
    pub(super) fn take_result(&mut self, id: OpId) -> Result<Vec<u8>, i32> {
        match self.ops.remove(&id) {
            Some(Op { state: State::Completed(result), bytes, .. }) => result.map(|()| bytes),
            _ => panic!("operation {id} is asked for though it has not completed"),
        }
    }

    /// The future of an operation was dropped. As a real engine would, this
    /// cancels it or waits for it: it may have happened, in part or not at all.
    pub(super) fn abandon(&mut self, id: OpId) {
        if self.stopped {
            return;
        }
        let Some(mut op) = self.ops.remove(&id) else { return };
        self.journal.add(self.step, id, Event::Drop);
        if self.leave_dropped && !matches!(op.state, State::Completed(_)) {
            op.orphan = true;
            op.waker = None;
            self.ops.insert(id, op);
            return;
        }
        if self.may_still_happen(&op) {
            let upto = match self.rng.below(3) {
                0 => None,
                1 => Some(op.len),
                _ => Some(self.part(&op)),
            };
            if let Some(upto) = upto.filter(|_| op.kind != OpKind::Read) {
                self.effect(id, &mut op, upto);
            }
        }
        // Its failure is not lost with the future: the next sync tells of it.
        if let (OpKind::Sync, State::Applied(Err(errno)) | State::Completed(Err(errno))) =
            (op.kind, op.state)
        {
            self.files[op.file].owed = Some(errno);
        }
        if !matches!(op.state, State::Completed(_)) {
            self.complete(id, &mut op, Ok(()));
        }
    }

    /// How eager the scheduler is to carry the operation further.
    fn draw_weight(&mut self, op: &mut Op) {
        let chance = self.rng.below(64);
        op.weight = if chance < self.mood.stuck {
            0
        } else if chance < self.mood.stuck + self.mood.slow {
            1
        } else {
            NORMAL
        };
        if self.is_held(op) {
            op.weight = 0;
        }
    }

    fn is_held(&self, op: &Op) -> bool {
        let stage = if op.state == State::Issued { Stage::Apply } else { Stage::Complete };
        op.hold.is_some_and(|hold| self.holds[hold].active && self.holds[hold].stage == stage)
    }

    /// Tells who waits for a hold that it has caught this operation.
    fn report_held(&mut self, id: OpId) {
        let Some(op) = self.ops.get(&id) else { return };
        let Some(hold) = op.hold.filter(|_| self.is_held(op)) else { return };
        self.holds[hold].caught = true;
        for waker in std::mem::take(&mut self.holds[hold].waiters) {
            waker.wake();
        }
    }

    /// Lets go of what a hold has caught, and catches nothing more.
    pub(super) fn release(&mut self, hold: usize) {
        self.holds[hold].active = false;
        for op in self.ops.values_mut().filter(|op| op.hold == Some(hold)) {
            op.weight = NORMAL;
        }
    }

    pub(super) fn file_name(&self, file: usize) -> String {
        self.files[file].name.clone()
    }
}

impl Op {
    /// Makes the change, up to byte `upto`, on this content.
    pub(super) fn change(&self, id: OpId, content: &mut Content, upto: u64) {
        match self.kind {
            OpKind::Write => {
                let part = &self.bytes[self.progress as usize..upto as usize];
                content.write(id, self.offset + self.progress, part);
            }
            OpKind::Punch => content.zero(id, self.offset, self.len, false),
            OpKind::Zero => content.zero(id, self.offset, self.len, true),
            OpKind::Truncate => content.truncate(id, self.offset),
            OpKind::Read | OpKind::Sync => {}
        }
    }

    /// How far a crash lets the operation get, if it lets it happen at all: a write
    /// may stop at any sector.
    pub(super) fn stop(&self, rng: &mut Rng) -> u64 {
        let sectors = (self.len - self.progress) / SECTOR;
        if self.kind != OpKind::Write || sectors < 2 || rng.chance(1, 2) {
            return self.len;
        }
        let first = (self.offset + self.progress) / SECTOR + 1;
        ((first + rng.below(sectors)) * SECTOR - self.offset).min(self.len)
    }

    /// The parts of a write that lie in one sector each, with their offsets.
    fn sectors(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = self.offset + done;
            let len = (SECTOR - at % SECTOR).min(self.len - done);
            let part = &self.bytes[done as usize..(done + len) as usize];
            done += len;
            (len > 0).then_some((at, part))
        })
    }
}
