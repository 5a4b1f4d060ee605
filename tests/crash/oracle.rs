//! What a guest may find on its disk: for each sector of 512 bytes, the values
//! that it may hold now, and those that it may hold after a crash.
//!
//! Every write fills its sectors with a word of its own, so that what is read
//! says which write it is from, for which sector, and whether it is torn.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

pub const SECTOR: u64 = 512;

/// What a sector is filled with; 0 is zeroes.
pub type Word = u64;

/// Stands for what a sector holds that was found torn, and let pass.
const UNKNOWN: Word = u64::MAX;

/// What a crash may do to a sector that was written since the last flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// It holds what it held or what was written: this driver's promise.
    Strict,
    /// It may hold anything, another file's bytes included: QEMU's promise.
    Parity,
}

impl Mode {
    /// What `QCOW2RS_ORACLE` says, `strict` or `parity`; strict if nothing.
    pub fn from_environment() -> Mode {
        match std::env::var("QCOW2RS_ORACLE").as_deref() {
            Ok("parity") => Mode::Parity,
            Ok("strict") | Err(_) => Mode::Strict,
            Ok(other) => panic!("QCOW2RS_ORACLE={other}: neither strict nor parity"),
        }
    }
}

/// What was found after a crash.
pub struct Judged {
    pub words: Vec<Word>,
    /// Sectors that hold what only QEMU's promise allows.
    pub foreign: u64,
}

/// The word that write number `tag` puts into a sector.
pub fn word(tag: u32, sector: u64) -> Word {
    u64::from(tag) << 32 | sector
}

/// The bytes of sectors filled with these words.
pub fn fill(words: impl Iterator<Item = Word>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(words.size_hint().0 * SECTOR as usize);
    for word in words {
        let mut sector = [0; SECTOR as usize];
        sector.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&word.to_ne_bytes()));
        bytes.extend_from_slice(&sector);
    }
    bytes
}

/// The word that a sector is filled with.
fn decode(bytes: &[u8]) -> Result<Word, String> {
    let part = |at: usize| Word::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    let word = part(0);
    // All bytes are those eight bytes before.
    if bytes[..bytes.len() - 8] == bytes[8..] {
        return Ok(word);
    }
    let at = (0..bytes.len()).step_by(8).find(|at| part(*at) != word).unwrap_or(0);
    Err(format!("torn: {} and, from byte {at} on, {}", name(word), name(part(at))))
}

fn name(word: Word) -> String {
    match word {
        0 => "zeroes".to_owned(),
        UNKNOWN => "what nobody knows".to_owned(),
        _ => format!("write {} of sector {:#x}", word >> 32, word & 0xffff_ffff),
    }
}

/// What a change does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    Write,
    Zero,
    /// Zero or nothing.
    Discard,
}

/// A change under way.
#[derive(Clone, Debug)]
pub struct Ticket {
    pub tag: u32,
    pub sectors: Range<u64>,
}

impl Ticket {
    /// What the write writes.
    pub fn data(&self) -> Vec<u8> {
        fill(self.sectors.clone().map(|sector| word(self.tag, sector)))
    }

    pub fn offset(&self) -> u64 {
        self.sectors.start * SECTOR
    }

    pub fn len(&self) -> u64 {
        (self.sectors.end - self.sectors.start) * SECTOR
    }
}

/// A change of one sector. Times are numbers of calls of the oracle.
#[derive(Clone, Debug)]
struct Event {
    tag: u32,
    value: Word,
    issued: u64,
    ended: Option<u64>,
    /// It surely happened: it succeeded, and was no mere hint.
    sure: bool,
    /// A flush has covered it.
    durable: bool,
}

#[derive(Clone, Debug)]
pub struct Oracle {
    /// What the sectors hold, but for those in `open`.
    settled: Vec<Word>,
    /// Sectors that may hold more than one thing, with all that happened to them.
    open: BTreeMap<u64, Vec<Event>>,
    /// What the disk held at first.
    opened: Rc<Vec<Word>>,
    clock: u64,
    next_tag: u32,
    reads: Cell<u32>,
    /// Internal snapshots that were taken since, by name, and what they show.
    snapshots: Rc<Snapshots>,
    /// What all of it is to become by a change that is under way.
    becoming: Option<Rc<Oracle>>,
}

/// Names of snapshots, and what the sectors of their disks hold.
pub type Snapshots = Vec<(Vec<u8>, Rc<Vec<Word>>)>;

/// What happened to a sector last, durably, of which no more is known than that.
fn settled(value: Word) -> Event {
    Event { tag: 0, value, issued: 0, ended: Some(1), sure: true, durable: true }
}

/// Those that may be what a sector holds, where events that `overwrites` says so of
/// have surely replaced what had ended before they began.
fn possible(events: &[Event], overwrites: impl Fn(&Event) -> bool) -> impl Iterator<Item = &Event> {
    let over = events.iter().filter(|event| event.sure && overwrites(event));
    let bar = over.map(|event| event.issued).max().unwrap_or(0);
    events.iter().filter(move |event| event.ended.is_none_or(|ended| ended > bar))
}

impl Oracle {
    /// A disk whose sectors hold these words.
    pub fn new(words: impl IntoIterator<Item = Word>) -> Oracle {
        let settled: Vec<Word> = words.into_iter().collect();
        let opened = Rc::new(settled.clone());
        let open = BTreeMap::new();
        let (clock, next_tag, reads) = (1, 1, Cell::new(0));
        let (snapshots, becoming) = Default::default();
        Oracle { settled, open, opened, clock, next_tag, reads, snapshots, becoming }
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// The same disk with these.
    pub fn with_snapshots(self, snapshots: Snapshots) -> Oracle {
        Oracle { snapshots: Rc::new(snapshots), ..self }
    }

    /// What the sectors hold, of a disk of which all is known.
    pub fn words(&self) -> &[Word] {
        assert!(self.open.is_empty(), "not all is known");
        &self.settled
    }

    /// The same disk while a change of all of it is under way.
    pub fn becoming(self, after: Oracle) -> Oracle {
        Oracle { becoming: Some(Rc::new(after)), ..self }
    }

    /// The disk when that is through.
    pub fn after_change(&self, done: bool) -> Oracle {
        match (&self.becoming, done) {
            (Some(after), true) => (**after).clone(),
            _ => Oracle { becoming: None, ..self.clone() },
        }
    }

    /// This state, which is what is seen, while a loss of power may bring back another
    /// of those that `all` knows.
    pub fn or_even(self, all: &Oracle) -> Oracle {
        let same = |state: &Oracle| {
            (state.size(), &state.snapshots) == (self.size(), &self.snapshots)
                && state.settled == self.settled
        };
        let other = all.states().find(|state| !same(state));
        let other = other.map(|state| Oracle { becoming: None, ..state.clone() });
        Oracle { becoming: other.map(Rc::new), ..self }
    }

    /// The states that it may be in: one, but for what may become of it.
    pub fn states(&self) -> impl Iterator<Item = &Oracle> {
        std::iter::once(self).chain(self.becoming.as_deref())
    }

    /// The disk after a crash that was found to hold these words. Tags go on, so
    /// that nothing old can pass for something new.
    pub fn recovered(&self, words: Vec<Word>) -> Oracle {
        let snapshots = self.snapshots.clone();
        Oracle { next_tag: self.next_tag, snapshots, ..Oracle::new(words) }
    }

    /// The disk after the process was killed, found to hold these words. What no
    /// flush had covered still may be lost with the power, until a flush covers what
    /// was found; whoever reads sees that.
    pub fn orphaned(&self, words: Vec<Word>) -> Oracle {
        let mut after = Oracle { clock: 2, ..self.recovered(words) };
        for (&sector, events) in &self.open {
            let last = after.settled[sector as usize];
            let old = possible(events, |event| event.durable);
            let old =
                old.map(|event| Event { sure: false, durable: false, ..settled(event.value) });
            let found = Event { issued: 1, ended: Some(2), durable: false, ..settled(last) };
            after.open.insert(sector, old.chain([found]).collect());
        }
        after
    }

    /// Whether these words are what the disk held at first.
    pub fn is_as_opened(&self, words: &[Word]) -> bool {
        self.opened[..] == *words
    }

    pub fn size(&self) -> u64 {
        self.settled.len() as u64 * SECTOR
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The word that the next change, if it is a write, will put into a sector.
    pub fn upcoming(&self, sector: u64) -> Word {
        word(self.next_tag, sector)
    }

    /// A change is about to be asked for.
    pub fn begin(&mut self, change: Change, sectors: Range<u64>) -> Ticket {
        let (issued, tag) = (self.tick(), self.next_tag);
        self.next_tag += 1;
        for sector in sectors.clone() {
            let value = if change == Change::Write { word(tag, sector) } else { 0 };
            let sure = change != Change::Discard;
            let event = Event { tag, value, issued, ended: None, sure, durable: false };
            let before = self.settled[sector as usize];
            self.open.entry(sector).or_insert_with(|| vec![settled(before)]).push(event);
        }
        Ticket { tag, sectors }
    }

    /// A change is through: with success, and durably, or not.
    pub fn end(&mut self, ticket: &Ticket, success: bool, durable: bool) {
        let now = self.tick();
        for sector in ticket.sectors.clone() {
            let events = self.open.get_mut(&sector).into_iter().flatten();
            if let Some(event) = events.into_iter().find(|event| event.tag == ticket.tag) {
                event.ended = Some(now);
                event.sure &= success;
                event.durable = success && durable;
            }
            self.prune(sector);
        }
    }

    /// A flush is about to be asked for.
    pub fn begin_flush(&mut self) -> u64 {
        self.tick()
    }

    /// A flush that was asked for at `begun` succeeded.
    pub fn end_flush(&mut self, begun: u64) {
        self.tick();
        for event in self.open.values_mut().flatten() {
            event.durable |= event.ended.is_some_and(|ended| ended <= begun);
        }
        for sector in self.open.keys().copied().collect::<Vec<_>>() {
            self.prune(sector);
        }
    }

    /// A read is about to be asked for.
    pub fn begin_read(&mut self) -> u64 {
        self.reads.set(self.reads.get() + 1);
        self.tick()
    }

    /// A read that was asked for at `begun` is through, and found this.
    pub fn end_read(&mut self, begun: u64, offset: u64, bytes: &[u8]) -> Result<(), String> {
        self.reads.set(self.reads.get() - 1);
        for (sector, bytes) in (offset / SECTOR..).zip(bytes.chunks_exact(SECTOR as usize)) {
            let overwrites = |event: &Event| event.ended.is_some_and(|ended| ended <= begun);
            self.judge(sector, bytes, overwrites)?;
        }
        Ok(())
    }

    /// A read did not come to an end.
    pub fn give_up_read(&mut self) {
        self.reads.set(self.reads.get() - 1);
    }

    /// Whether the disk may hold this after a crash; which words it is.
    pub fn after_crash(&self, bytes: &[u8]) -> Result<Vec<Word>, String> {
        Ok(self.judge_crash(bytes, Mode::Strict)?.words)
    }

    /// As `after_crash`, as strictly as the mode says.
    pub fn judge_crash(&self, bytes: &[u8], mode: Mode) -> Result<Judged, String> {
        let mut judged = Judged { words: Vec::with_capacity(self.settled.len()), foreign: 0 };
        for (sector, bytes) in (0..).zip(bytes.chunks_exact(SECTOR as usize)) {
            let word = match self.judge(sector, bytes, |event| event.durable) {
                Ok(word) => word,
                Err(what) if !self.is_unflushed(sector) => return Err(what),
                Err(what) if mode == Mode::Strict => {
                    return Err(format!("{what} (QEMU's promise would let it pass)"));
                }
                Err(_) => {
                    judged.foreign += 1;
                    decode(bytes).unwrap_or(UNKNOWN)
                }
            };
            judged.words.push(word);
        }
        Ok(judged)
    }

    /// Whether anything was asked of a sector that no flush has covered.
    fn is_unflushed(&self, sector: u64) -> bool {
        self.open.get(&sector).into_iter().flatten().any(|event| !event.durable)
    }

    /// The same for two disks that may hold the same after a crash, if nobody reads.
    pub fn fingerprint(&self) -> u64 {
        let mix = |hash: u64, word: Word| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let settled = self.settled.iter().fold(0u64, |all, word| mix(all.rotate_left(23), *word));
        self.open.iter().fold(settled, |all, (sector, events)| {
            // No older event is left that a crash could not bring back.
            let words: BTreeSet<Word> = events.iter().map(|event| event.value).collect();
            words.into_iter().fold(mix(!all.rotate_left(23), *sector), mix)
        })
    }

    /// Whether the sector may hold this; `overwrites` as in `possible`.
    fn judge(
        &self,
        sector: u64,
        bytes: &[u8],
        overwrites: impl Fn(&Event) -> bool,
    ) -> Result<Word, String> {
        let found = decode(bytes);
        let known = self.settled[sector as usize];
        let events = match self.open.get(&sector) {
            None if found == Ok(known) || known == UNKNOWN => return Ok(known),
            None => &vec![settled(known)],
            Some(events) => events,
        };
        let words: Vec<Word> = possible(events, overwrites).map(|event| event.value).collect();
        match found {
            Ok(word) if words.contains(&word) => Ok(word),
            _ if words.contains(&UNKNOWN) => Ok(UNKNOWN),
            _ => {
                let found = found.map_or_else(|torn| torn, name);
                let may: Vec<String> = words.into_iter().map(name).collect();
                Err(format!("sector {sector:#x} holds {found}; may hold: {}", may.join(", ")))
            }
        }
    }

    /// Forgets what no check will ever allow again.
    fn prune(&mut self, sector: u64) {
        if self.reads.get() > 0 {
            return;
        }
        let Some(events) = self.open.get_mut(&sector) else { return };
        *events = possible(events, |event| event.durable).cloned().collect();
        // What is left alone is what has replaced all else.
        if let [event] = &events[..] {
            self.settled[sector as usize] = event.value;
            self.open.remove(&sector);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(oracle: &Oracle, word: Word) -> bool {
        oracle.after_crash(&fill([word].into_iter())).is_ok()
    }

    fn reads(oracle: &mut Oracle, begun: u64, word: Word) -> bool {
        oracle.end_read(begun, 0, &fill([word].into_iter())).is_ok()
    }

    #[test]
    fn only_what_a_flush_covered_is_certain() {
        let mut oracle = Oracle::new([7]);
        let first = oracle.begin(Change::Write, 0..1);
        assert!(holds(&oracle, 7) && holds(&oracle, word(1, 0)));
        let early = oracle.begin_flush();
        oracle.end(&first, true, false);
        oracle.end_flush(early);
        assert!(holds(&oracle, 7), "the flush began before the write ended");
        let late = oracle.begin_flush();
        let second = oracle.begin(Change::Zero, 0..1);
        oracle.end_flush(late);
        assert!(!holds(&oracle, 7) && holds(&oracle, word(1, 0)) && holds(&oracle, 0));
        oracle.end(&second, true, true);
        assert!(!holds(&oracle, word(1, 0)) && holds(&oracle, 0));
    }

    #[test]
    fn failures_and_hints_leave_both_ways_open() {
        for (change, success) in [(Change::Write, false), (Change::Discard, true)] {
            let mut oracle = Oracle::new([7]);
            let ticket = oracle.begin(change, 0..1);
            oracle.end(&ticket, success, true);
            let flush = oracle.begin_flush();
            oracle.end_flush(flush);
            let new = if change == Change::Write { word(1, 0) } else { 0 };
            assert!(holds(&oracle, 7) && holds(&oracle, new) && !holds(&oracle, 8));
            let read = oracle.begin_read();
            assert!(reads(&mut oracle, read, 7));
        }
    }

    #[test]
    fn writes_that_overlap_in_time_end_in_any_order() {
        let mut oracle = Oracle::new([7]);
        let (a, b) = (oracle.begin(Change::Write, 0..1), oracle.begin(Change::Write, 0..1));
        oracle.end(&b, true, true);
        oracle.end(&a, true, true);
        assert!(holds(&oracle, word(1, 0)) && holds(&oracle, word(2, 0)) && !holds(&oracle, 7));
    }

    #[test]
    fn a_read_sees_what_was_there_while_it_ran() {
        let mut oracle = Oracle::new([7]);
        let slow = oracle.begin_read();
        let write = oracle.begin(Change::Write, 0..1);
        oracle.end(&write, true, true);
        let flush = oracle.begin_flush();
        oracle.end_flush(flush);
        let quick = oracle.begin_read();
        assert!(!reads(&mut oracle, quick, 7));
        let quick = oracle.begin_read();
        assert!(reads(&mut oracle, quick, word(1, 0)));
        assert!(reads(&mut oracle, slow, 7));
    }

    #[test]
    fn qemu_promises_nothing_of_what_was_not_flushed() {
        let mut oracle = Oracle::new([7, 7]);
        let ticket = oracle.begin(Change::Write, 0..1);
        oracle.end(&ticket, true, false);
        let foreign = |word: Word, other: Word| fill([word, other].into_iter());
        let strict = oracle.judge_crash(&foreign(8, 7), Mode::Strict);
        assert!(strict.err().unwrap().contains("QEMU's promise would let it pass"));
        let found = oracle.judge_crash(&foreign(8, 7), Mode::Parity).unwrap();
        assert_eq!((found.words, found.foreign), (vec![8, 7], 1));
        let mut torn = foreign(8, 7);
        torn[99] = 1;
        let found = oracle.judge_crash(&torn, Mode::Parity).unwrap();
        let later = oracle.recovered(found.words);
        assert!(later.judge_crash(&torn, Mode::Strict).is_ok(), "what was let pass stays");
        assert!(oracle.judge_crash(&foreign(7, 8), Mode::Parity).is_err(), "it was flushed");
        let flush = oracle.begin_flush();
        oracle.end_flush(flush);
        assert!(oracle.judge_crash(&foreign(8, 7), Mode::Parity).is_err(), "it is flushed now");
    }

    #[test]
    fn what_a_killed_process_left_is_seen_and_not_durable() {
        let mut oracle = Oracle::new([7, 7]);
        // A read that is under way keeps events that no crash brings back.
        oracle.begin_read();
        let ticket = oracle.begin(Change::Write, 0..1);
        oracle.end(&ticket, true, true);
        let ticket = oracle.begin(Change::Write, 0..1);
        oracle.end(&ticket, true, false);
        let disk = |word: Word| fill([word, 7].into_iter());
        for found in [word(1, 0), word(2, 0)] {
            let mut after = oracle.orphaned(oracle.after_crash(&disk(found)).unwrap());
            for (may, word) in [(true, word(1, 0)), (true, word(2, 0)), (false, 7)] {
                assert_eq!(after.after_crash(&disk(word)).is_ok(), may, "{}", name(word));
                let read = after.begin_read();
                assert_eq!(reads(&mut after, read, word), word == found, "{}", name(word));
            }
            let flush = after.begin_flush();
            after.end_flush(flush);
            for word in [word(1, 0), word(2, 0)] {
                assert_eq!(after.after_crash(&disk(word)).is_ok(), word == found, "{}", name(word));
            }
            assert!(after.open.is_empty(), "it is known what the disk holds");
        }
    }

    #[test]
    fn torn_and_foreign_sectors_are_seen() {
        let mut oracle = Oracle::new([0, 0]);
        let ticket = oracle.begin(Change::Write, 0..2);
        let mut bytes = ticket.data();
        assert!(oracle.after_crash(&bytes).is_ok());
        bytes[300] ^= 1;
        assert!(oracle.after_crash(&bytes).unwrap_err().contains("torn"));
        bytes[300] ^= 1;
        bytes.rotate_left(512);
        assert!(oracle.after_crash(&bytes).unwrap_err().contains("write 1 of sector 0x1"));
    }
}
