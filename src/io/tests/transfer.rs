//! Random operations against a plain byte array, in every mode.

use super::*;
use crate::io::file::Alignment;
use crate::sys::memory::Block;

/// The largest file of these tests.
const SPACE: usize = 40_000;

/// Does the same to a storage and to a byte array.
struct Twin {
    storage: Storage,
    bytes: Vec<u8>,
    random: Random,
}

impl Twin {
    fn range(&mut self) -> (usize, usize) {
        // Often on the edges of blocks, and often beside them.
        let mut point = || {
            let near = [0, 1, 8, 511, 512, 4095, 4096, 4097][self.random.below(8)];
            let block = self.random.below(SPACE / 4096) * 4096;
            (block + near + self.random.below(2) * self.random.below(600)).min(SPACE)
        };
        let (a, b) = (point(), point());
        (a.min(b), a.max(b))
    }

    fn write(&mut self) {
        let (start, end) = self.range();
        // A raw image is not written past its end.
        let limit = if self.storage.access().fixed_length { self.bytes.len() } else { SPACE };
        let (start, end) = (start.min(limit), end.min(limit));
        let new = self.random.bytes(end - start);
        // Memory at an odd address, memory of ours, and zeroes in between.
        let cut = self.random.below(new.len() + 1);
        let zeroes = [0, 3, 512, 4096][self.random.below(4)].min(new.len() - cut);
        let mut guest = vec![0u8; 16];
        let shift = self.random.below(16);
        guest.truncate(shift);
        guest.extend(&new[..cut]);
        let block = Block::from_bytes(&new[cut + zeroes..]).unwrap();
        let pieces = [
            Piece::Guest(GuestRef::from_slice(&guest[shift..])),
            Piece::Zeroes(zeroes),
            Piece::Block(block.slice(0, new.len() - cut - zeroes)),
        ];
        block_on(self.storage.write(&Strict, &pieces, start as u64)).unwrap();
        if end > start {
            let length = self.bytes.len().max(end);
            self.bytes.resize(length, 0);
            self.bytes[start..end].copy_from_slice(&new);
            self.bytes[start + cut..start + cut + zeroes].fill(0);
        }
    }

    fn zero(&mut self) {
        let (start, end) = self.range();
        let mode = [ZeroMode::Punch, ZeroMode::Keep][self.random.below(2)];
        let length = (end - start) as u64;
        block_on(self.storage.zero(&Strict, start as u64, length, mode)).unwrap();
        let len = self.bytes.len();
        self.bytes[start.min(len)..end.min(len)].fill(0);
    }

    fn truncate(&mut self) {
        if self.storage.access().fixed_length {
            return;
        }
        let (_, length) = self.range();
        block_on(self.storage.truncate(&Strict, length as u64)).unwrap();
        self.bytes.resize(length, 0);
        assert_eq!(self.storage.length().unwrap(), length as u64);
    }

    fn check(&mut self) {
        let (start, end) = self.range();
        let mut expected = vec![0; end - start];
        let len = self.bytes.len();
        let there = &self.bytes[start.min(len)..end.min(len)];
        expected[..there.len()].copy_from_slice(there);
        assert_eq!(read(&self.storage, start as u64, end - start), expected, "{start}..{end}");
        // Memory of ours, at an odd address.
        let block = Block::zeroed(end - start + 8).unwrap();
        let part = block.slice(3, end - start);
        block_on(self.storage.read(&Strict, Target::Block(part.clone()), start as u64)).unwrap();
        assert_eq!(part.to_vec().unwrap(), expected, "{start}..{end}");
        let length = self.storage.length().unwrap();
        let aligned = match self.storage.access().fixed_length {
            true => len as u64,
            false => (len as u64).next_multiple_of(self.storage.request_alignment().into()),
        };
        assert!(length >= len as u64 && length <= aligned, "{length} bytes, not {len}");
    }
}

fn run(mut storage: Storage, alignment: Option<Alignment>, length: usize, seed: u64) {
    if let Some(alignment) = alignment {
        storage.set_alignment(alignment);
    }
    let mut twin = Twin { storage, bytes: Vec::new(), random: Random(seed) };
    block_on(twin.storage.truncate(&Strict, length as u64)).unwrap();
    twin.bytes.resize(length, 0);
    for _ in 0..400 {
        match twin.random.below(10) {
            0..=4 => twin.write(),
            5 => twin.zero(),
            6 => twin.truncate(),
            _ => twin.check(),
        }
    }
}

fn in_each_way(access: Access, alignment: Option<Alignment>) {
    let dir = direct_dir();
    for (seed, length) in [(1, 0), (2, 1000), (3, 4096), (4, 10_001)] {
        let path = dir.path().join(format!("{seed}"));
        std::fs::write(&path, b"").unwrap();
        run(open(&path, access), alignment, length, seed);
    }
}

#[test]
fn buffered() {
    in_each_way(PLAIN, None);
}

#[test]
fn direct() {
    in_each_way(Access { direct: true, ..PLAIN }, None);
}

#[test]
fn direct_with_fixed_length() {
    in_each_way(Access { direct: true, fixed_length: true, ..PLAIN }, None);
}

#[test]
fn blocks_of_4096() {
    let alignment = Alignment { memory: 4096, request: 4096 };
    in_each_way(Access { direct: true, ..PLAIN }, Some(alignment));
    in_each_way(Access { direct: true, fixed_length: true, ..PLAIN }, Some(alignment));
}

#[test]
fn blocks_larger_than_what_memory_is_aligned_to() {
    in_each_way(PLAIN, Some(Alignment { memory: 4, request: 8192 }));
}

#[test]
fn long_requests_go_through_the_buffer_in_parts() {
    let dir = direct_dir();
    let path = dir.path().join("long");
    std::fs::write(&path, b"").unwrap();
    let storage = open(&path, Access { direct: true, ..PLAIN });
    let data = Random(5).bytes((5 << 20) / 2);
    write(&storage, 777, &data);
    assert_eq!(read(&storage, 777, data.len()), data);
    assert_eq!(read(&storage, 0, 777), vec![0; 777]);
    assert_eq!(&std::fs::read(&path).unwrap()[777..777 + data.len()], &data[..]);
}

#[test]
fn what_lies_past_the_end_reads_as_zero() {
    let dir = direct_dir();
    let path = dir.path().join("short");
    std::fs::write(&path, [7; 700]).unwrap();
    for direct in [false, true] {
        let storage = open(&path, Access { direct, ..Access::default() });
        assert_eq!(read(&storage, 699, 3), [7, 0, 0]);
        assert_eq!(read(&storage, 700, 5), [0; 5]);
        assert_eq!(read(&storage, 512, 512)[187..190], [7, 0, 0]);
        assert_eq!(read(&storage, 1 << 40, 4096), [0; 4096]);
        assert_eq!(storage.length().unwrap(), 700);
    }
}

#[test]
fn offsets_out_of_range_are_errors() {
    let dir = direct_dir();
    let path = dir.path().join("file");
    std::fs::write(&path, [7; 700]).unwrap();
    for direct in [false, true] {
        let storage = open(&path, Access { direct, ..PLAIN });
        for offset in [u64::MAX, u64::MAX - 511, i64::MAX as u64 - 3, 1 << 63] {
            let mut bytes = [0; 512];
            let to = Target::Guest(GuestMut::from_slice(&mut bytes));
            let error = block_on(storage.read(&Strict, to, offset)).err();
            // Past the end, but not past what is an offset: zeroes will do.
            let may_pass = offset <= i64::MAX as u64;
            assert!(may_pass || error.is_some_and(|error| error.errno() == libc::EINVAL));
            assert!(try_write(&storage, offset, &[1; 512]).is_err());
            assert!(block_on(storage.zero(&Strict, offset, 512, ZeroMode::Punch)).is_err());
            assert!(block_on(storage.truncate(&Strict, u64::MAX - 5)).is_err());
        }
        assert_eq!(storage.length().unwrap(), 700);
    }
}

#[test]
fn more_pieces_than_a_system_call_takes() {
    let dir = direct_dir();
    let path = dir.path().join("pieces");
    std::fs::write(&path, b"").unwrap();
    let storage = open(&path, PLAIN);
    let data = Random(6).bytes(3000);
    let mut pieces = Vec::new();
    for piece in data.chunks(3) {
        pieces.push(Piece::Guest(GuestRef::from_slice(piece)));
        pieces.push(Piece::Zeroes(1));
        pieces.push(Piece::Zeroes(0));
    }
    pieces.push(Piece::Zeroes(200_000));
    block_on(storage.write(&Strict, &pieces, 10)).unwrap();
    let mut expected = vec![0; 10];
    for piece in data.chunks(3) {
        expected.extend(piece);
        expected.push(0);
    }
    expected.resize(expected.len() + 200_000, 0);
    assert_eq!(std::fs::read(&path).unwrap(), expected);
}

#[test]
fn counters_count_what_the_storage_saw() {
    let dir = direct_dir();
    let path = dir.path().join("counted");
    std::fs::write(&path, [1; 4096]).unwrap();
    let storage = open(&path, PLAIN);
    read(&storage, 5, 10);
    read(&storage, 5, 0);
    write(&storage, 1, &[1; 20]);
    block_on(storage.sync(&Strict)).unwrap();
    let counted = storage.counters();
    assert_eq!((counted.reads, counted.read_bytes), (1, 10));
    assert_eq!((counted.writes, counted.write_bytes, counted.syncs), (1, 20, 1));

    let storage = open(&path, Access { direct: true, no_flush: true, ..PLAIN });
    let block = u64::from(storage.request_alignment());
    write(&storage, 1, &[1; 20]);
    block_on(storage.sync(&Strict)).unwrap();
    let counted = storage.counters();
    assert_eq!((counted.reads, counted.read_bytes), (1, block));
    assert_eq!((counted.writes, counted.write_bytes, counted.syncs), (1, block, 0));
}

#[test]
fn holes_give_space_back() {
    let dir = direct_dir();
    let path = dir.path().join("holes");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let storage = open(&path, PLAIN);
    block_on(storage.sync(&Strict)).unwrap();
    assert!(storage.can_punch());
    let before = storage.allocated().unwrap();
    assert!(before >= 1 << 20);
    block_on(storage.discard(&Strict, 0, 1 << 19)).unwrap();
    assert!(storage.allocated().unwrap() <= before - (1 << 19));
    assert_eq!(storage.length().unwrap(), 1 << 20);
    assert!(!open(&path, Access::default()).can_punch());
}
