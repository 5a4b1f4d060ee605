//! A bounded cache of slices: pieces of tables, as 64-bit words.
//!
//! Keyed by a slice's *host* offset, so that tables shared by snapshots are
//! cached once. A hit takes no lock and writes to no shared cache line: each
//! slot is an array of atomics under a sequence counter, and the slot's key is
//! part of what the counter protects. Changes, loads and evictions take the lock
//! of the slot's set, for a moment, never across I/O.
//!
//! The cache does no I/O and knows no order: who loads brings the bytes, who
//! writes back asks for copies of what is dirty. A dirty slice is never evicted.
//!
//! Memory is taken when a slot is first used, and given back to the system when somebody
//! has the cache trimmed and nobody has used the slot since the time before.

use std::ops::Range;
use std::sync::PoisonError;

use crate::error::Result;
use crate::fallible;
use crate::geometry::HostOffset;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use crate::sync::{Mutex, MutexGuard, hint};
use crate::sys::pages::Pages;

const MAX_WAYS: usize = 8;

/// The cache. All methods may be called from any thread.
pub struct SliceCache {
    slice_bits: u32,
    ways: usize,
    set_bits: u32,
    slots: Box<[Slot]>,
    /// The words of all slots, one slot after the other.
    pages: Pages,
    sets: Box<[Mutex<Set>]>,
    /// Slots that became dirty since the last `take_dirty`, oldest first.
    dirty: Mutex<Vec<usize>>,
    evictions: AtomicU64,
    bytes: AtomicU64,
}

struct Slot {
    /// Odd while the slot changes.
    sequence: AtomicU64,
    /// Host offset of the slice; 0: empty.
    key: AtomicU64,
    /// Set by hits, cleared by the search for a victim, and by `trim`.
    used: AtomicBool,
}

struct Set {
    /// Rises whenever what a slice of this set is on disk may have changed: a
    /// load that began before must not enter the cache.
    generation: u64,
    hand: usize,
    state: Box<[SlotState]>,
}

#[derive(Clone, Copy, Default)]
struct SlotState {
    dirty: bool,
    writing: bool,
    /// Its memory is taken.
    resident: bool,
}

/// Remembers when a load began.
#[derive(Clone, Copy)]
pub struct LoadTicket(u64);

/// What became of a load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loaded {
    /// The slice is in the cache now.
    Done,
    /// What was read may be out of date: read again.
    Stale,
    /// Every slot that it could take is dirty: write back first.
    Full,
}

/// A copy of a dirty slice, to be written to `key`.
pub struct DirtySlice {
    /// Where it belongs.
    pub key: HostOffset,
    /// The bytes to write.
    pub bytes: Vec<u8>,
    slot: usize,
}

/// Copies on their way to the storage. What has not been marked as written when
/// this is dropped (an error, a cancelled request) is dirty again.
pub struct WriteBack<'a> {
    cache: &'a SliceCache,
    slices: Vec<DirtySlice>,
    written: usize,
}

impl WriteBack<'_> {
    /// The next copy to write.
    pub fn next(&self) -> Option<&DirtySlice> {
        self.slices.get(self.written)
    }

    /// The copy that `next` returned is on the storage.
    pub fn mark_written(&mut self) {
        if let Some(copy) = self.slices.get(self.written) {
            self.cache.written(copy);
            self.written += 1;
        }
    }

    /// Whether nothing was dirty.
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }
}

impl Drop for WriteBack<'_> {
    fn drop(&mut self) {
        self.slices.iter().skip(self.written).for_each(|copy| self.cache.not_written(copy));
    }
}

/// Access to the words of one slice while it is changed.
pub struct SliceMut<'a> {
    words: &'a [AtomicU64],
    changed: bool,
}

impl SliceMut<'_> {
    /// The word at `index`; 0 past the end.
    pub fn get(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Sets a word; the slice becomes dirty if that changes it.
    pub fn set(&mut self, index: usize, value: u64) {
        if let Some(word) = self.words.get(index) {
            self.changed |= word.swap(value, Ordering::Relaxed) != value;
        }
    }
}

/// Keeps the sequence counter odd while a slot changes, and makes it even again
/// also when the change panics.
struct Changing<'a>(&'a AtomicU64, u64);

impl<'a> Changing<'a> {
    fn begin(sequence: &'a AtomicU64) -> Changing<'a> {
        let now = sequence.load(Ordering::Relaxed);
        sequence.store(now.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        Changing(sequence, now.wrapping_add(2))
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::Release);
    }
}

impl SliceCache {
    /// A cache of at most `capacity` bytes, and of at least two slices. Memory
    /// is taken when a slot is first used.
    pub fn new(slice_bytes: usize, capacity: u64) -> Result<SliceCache> {
        let slots = usize::try_from(capacity / slice_bytes as u64).unwrap_or(usize::MAX).max(2);
        let set_bits = (slots / MAX_WAYS).max(1).ilog2();
        let sets = 1usize << set_bits;
        let ways = slots / sets;
        let slot = || Slot {
            sequence: AtomicU64::new(0),
            key: AtomicU64::new(0),
            used: AtomicBool::new(false),
        };
        let set = || {
            let state = vec![SlotState::default(); ways].into_boxed_slice();
            Mutex::new(Set { generation: 0, hand: 0, state })
        };
        Ok(SliceCache {
            slice_bits: slice_bytes.ilog2(),
            ways,
            set_bits,
            slots: fallible::collect(sets * ways, std::iter::repeat_with(slot))?.into(),
            pages: Pages::new((sets * ways).saturating_mul(slice_bytes / 8))?,
            sets: fallible::collect(sets, std::iter::repeat_with(set))?.into(),
            dirty: Mutex::new(Vec::new()),
            evictions: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    /// Bytes of a slice.
    pub fn slice_bytes(&self) -> usize {
        1 << self.slice_bits
    }

    /// Slices given up to make room, so far.
    pub fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }

    /// Memory held, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
            + (self.slots.len() * size_of::<Slot>() + self.sets.len() * size_of::<Set>()) as u64
    }

    /// The words of a slot.
    #[inline]
    fn words(&self, slot: usize) -> &[AtomicU64] {
        let bits = self.slice_bits - 3;
        &self.pages.words()[slot << bits..(slot + 1) << bits]
    }

    #[inline]
    fn set_of(&self, key: HostOffset) -> usize {
        let number = key.get() >> self.slice_bits;
        // Fibonacci hashing spreads both neighbours and equal strides evenly.
        (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & ((1 << self.set_bits) - 1)
    }

    fn lock(&self, set: usize) -> MutexGuard<'_, Set> {
        self.sets[set].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dirty_list(&self) -> MutexGuard<'_, Vec<usize>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at a slice without a lock. `look` may see words from different
    /// moments and is then called again; it must have no effect but its result.
    /// `None`: not in the cache.
    #[inline]
    pub fn read<R>(&self, key: HostOffset, look: impl Fn(&[AtomicU64]) -> R) -> Option<R> {
        let set = self.set_of(key);
        let first = set * self.ways;
        let slots = &self.slots[first..first + self.ways];
        'again: loop {
            for (way, slot) in slots.iter().enumerate() {
                if slot.key.load(Ordering::Relaxed) != key.get() {
                    continue;
                }
                let before = slot.sequence.load(Ordering::Acquire);
                if before & 1 == 1 {
                    hint::spin_loop();
                    continue 'again;
                }
                let same_key = slot.key.load(Ordering::Relaxed) == key.get();
                let result = look(self.words(first + way));
                fence(Ordering::Acquire);
                if slot.sequence.load(Ordering::Relaxed) != before {
                    continue 'again;
                }
                if same_key {
                    if !slot.used.load(Ordering::Relaxed) {
                        slot.used.store(true, Ordering::Relaxed);
                    }
                    return Some(result);
                }
            }
            return None;
        }
    }

    /// Changes a slice in one step that readers cannot see half of. `None`: not
    /// in the cache, nothing happened. `change` runs under a lock: it must be
    /// short and call nothing that takes one.
    pub fn update<R>(
        &self,
        key: HostOffset,
        change: impl FnOnce(&mut SliceMut<'_>) -> R,
    ) -> Option<R> {
        let set_index = self.set_of(key);
        let mut set = self.lock(set_index);
        let way = self.find(set_index, key)?;
        let index = set_index * self.ways + way;
        let slot = &self.slots[index];
        let mut slice = SliceMut { words: self.words(index), changed: false };
        let result = {
            let _changing = Changing::begin(&slot.sequence);
            change(&mut slice)
        };
        slot.used.store(true, Ordering::Relaxed);
        if slice.changed {
            let state = &mut set.state[way];
            if !state.dirty {
                state.dirty = true;
                self.dirty_list().push(index);
            }
        }
        Some(result)
    }

    fn find(&self, set: usize, key: HostOffset) -> Option<usize> {
        (0..self.ways)
            .find(|way| self.slots[set * self.ways + way].key.load(Ordering::Relaxed) == key.get())
    }

    /// To be called before the bytes of a slice are read from the storage.
    pub fn begin_load(&self, key: HostOffset) -> LoadTicket {
        LoadTicket(self.lock(self.set_of(key)).generation)
    }

    /// Brings what was read; bytes that are missing at the end are zero.
    pub fn finish_load(&self, key: HostOffset, ticket: LoadTicket, bytes: &[u8]) -> Result<Loaded> {
        let set_index = self.set_of(key);
        let mut set = self.lock(set_index);
        if self.find(set_index, key).is_some() {
            return Ok(Loaded::Done);
        }
        if set.generation != ticket.0 && !mutant!(StaleSliceAccepted) {
            return Ok(Loaded::Stale);
        }
        let Some(way) = self.victim(set_index, &mut set) else {
            return Ok(Loaded::Full);
        };
        let index = set_index * self.ways + way;
        let (slot, words) = (&self.slots[index], self.words(index));
        if !std::mem::replace(&mut set.state[way].resident, true) {
            self.bytes.fetch_add(self.slice_bytes() as u64, Ordering::Relaxed);
        }
        let _changing = Changing::begin(&slot.sequence);
        if slot.key.swap(key.get(), Ordering::Relaxed) != 0 {
            self.evictions.fetch_add(1, Ordering::Relaxed);
        }
        for (index, word) in words.iter().enumerate() {
            let mut raw = [0; 8];
            if let Some(part) = bytes.get(index * 8..index * 8 + 8) {
                raw.copy_from_slice(part);
            }
            word.store(u64::from_be_bytes(raw), Ordering::Relaxed);
        }
        slot.used.store(true, Ordering::Relaxed);
        Ok(Loaded::Done)
    }

    /// A slot of the set that may be taken: an empty one, else the next clean
    /// one that was not used since the hand last passed.
    fn victim(&self, set_index: usize, set: &mut Set) -> Option<usize> {
        let slots = &self.slots[set_index * self.ways..(set_index + 1) * self.ways];
        if let Some(way) = slots.iter().position(|slot| slot.key.load(Ordering::Relaxed) == 0) {
            return Some(way);
        }
        for _ in 0..2 * self.ways {
            let way = set.hand;
            set.hand = (set.hand + 1) % self.ways;
            let state = set.state[way];
            mutant!(DirtySliceEvicted => {
                set.state[way] = SlotState { resident: true, ..SlotState::default() };
                return Some(way);
            });
            if !state.dirty && !state.writing && !slots[way].used.swap(false, Ordering::Relaxed) {
                return Some(way);
            }
        }
        None
    }

    /// Copies of all dirty slices, oldest first; they stay in the cache until
    /// they are written. Only one write-back may be under way at a time.
    /// `OutOfMemory`: all are as dirty as before.
    pub fn take_dirty(&self) -> Result<WriteBack<'_>> {
        let mut list = std::mem::take(&mut *self.dirty_list());
        let mut taken = WriteBack { cache: self, slices: Vec::new(), written: 0 };
        let mut copied = 0;
        let outcome = fallible::room_for(list.len()).and_then(|room| {
            taken.slices = room;
            for index in &list {
                taken.slices.extend(self.copy_dirty(*index)?);
                copied += 1;
            }
            Ok(())
        });
        // What was copied already is put back by dropping the copies.
        self.dirty_list().extend(list.drain(copied..));
        outcome.map(|()| taken)
    }

    /// The copy of a slot, if it is dirty: it is on its way from now on.
    fn copy_dirty(&self, index: usize) -> Result<Option<DirtySlice>> {
        let (set_index, way) = (index / self.ways, index % self.ways);
        let mut set = self.lock(set_index);
        let slot = &self.slots[index];
        let state = &mut set.state[way];
        let key = HostOffset::new(slot.key.load(Ordering::Relaxed));
        let (true, Some(key)) = (state.dirty, key) else { return Ok(None) };
        let mut bytes = fallible::room_for(self.slice_bytes())?;
        for word in self.words(index) {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_be_bytes());
        }
        state.dirty = false;
        state.writing = true;
        Ok(Some(DirtySlice { key, bytes, slot: index }))
    }

    /// Whether anything is dirty that `take_dirty` would return.
    pub fn has_dirty(&self) -> bool {
        !self.dirty_list().is_empty()
    }

    fn written(&self, copy: &DirtySlice) {
        let mut set = self.lock(copy.slot / self.ways);
        set.generation += 1;
        set.state[copy.slot % self.ways].writing = false;
        mutant!(ChangeDuringWriteForgotten => set.state[copy.slot % self.ways].dirty = false);
    }

    fn not_written(&self, copy: &DirtySlice) {
        mutant!(FailedFlushForgetsSlices => return self.written(copy));
        let mut set = self.lock(copy.slot / self.ways);
        set.generation += 1;
        let still_there = self.slots[copy.slot].key.load(Ordering::Relaxed) == copy.key.get();
        let state = &mut set.state[copy.slot % self.ways];
        state.writing = false;
        if !state.dirty && still_there {
            state.dirty = true;
            self.dirty_list().push(copy.slot);
        }
    }

    /// Gives up the clean slices that nobody has used since the last time (or since a
    /// search for room), and the memory of all slots that hold nothing. Returns how many
    /// bytes the system got back.
    pub fn trim(&self) -> u64 {
        (0..self.sets.len()).map(|set| self.trim_set(set)).sum()
    }

    fn trim_set(&self, set_index: usize) -> u64 {
        let mut set = self.lock(set_index);
        let first = set_index * self.ways;
        let slots = &self.slots[first..first + self.ways];
        for (slot, state) in slots.iter().zip(&set.state) {
            let busy = state.dirty || state.writing || slot.key.load(Ordering::Relaxed) == 0;
            if !busy && !slot.used.swap(false, Ordering::Relaxed) {
                let _changing = Changing::begin(&slot.sequence);
                slot.key.store(0, Ordering::Relaxed);
            }
        }
        // Whoever still looks at one of them finds that it has changed. The lock keeps
        // others from being loaded there meanwhile.
        let mut given = 0;
        let mut way = 0;
        while way < self.ways {
            let empty = |way: &usize| slots[*way].key.load(Ordering::Relaxed) == 0;
            let end = (way..self.ways).take_while(empty).last().map_or(way, |last| last + 1);
            if set.state[way..end].iter().any(|state| state.resident) {
                given += self.give_back(first, way..end, &mut set.state);
            }
            way = end.max(way + 1);
        }
        given
    }

    /// Gives back the memory of slots of a set that hold nothing; where they are smaller
    /// than a page, as far as they fill some.
    fn give_back(&self, first: usize, ways: Range<usize>, state: &mut [SlotState]) -> u64 {
        let bits = self.slice_bits - 3;
        let given = self.pages.give_back((first + ways.start) << bits..(first + ways.end) << bits);
        let mut bytes = 0;
        for way in ways {
            let words = (first + way) << bits..(first + way + 1) << bits;
            let gone = given.start <= words.start && words.end <= given.end;
            if gone && std::mem::take(&mut state[way].resident) {
                bytes += self.slice_bytes() as u64;
            }
        }
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        bytes
    }

    /// Forgets the slices of a host range: what was there is gone, or something
    /// else will be put there by other means than this cache.
    pub fn forget(&self, start: HostOffset, bytes: u64) {
        let end = start.get().saturating_add(bytes);
        for offset in (start.get()..end).step_by(self.slice_bytes()) {
            let Some(key) = HostOffset::new(offset) else { continue };
            let set_index = self.set_of(key);
            let mut set = self.lock(set_index);
            set.generation += 1;
            if let Some(way) = self.find(set_index, key) {
                let slot = &self.slots[set_index * self.ways + way];
                let _changing = Changing::begin(&slot.sequence);
                slot.key.store(0, Ordering::Relaxed);
                set.state[way].dirty = false;
            }
        }
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
