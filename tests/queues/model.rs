//! Random operations with many in flight, against a byte array. Those that touch the
//! same bytes are not in flight at the same time; those that share clusters and
//! sectors are.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use qcow2rs::{Buffer, Completion, Engine, Image, OpenOptions, Policy, Queue, Source, WriteFlags};
use qcow2rs::{ErrorKind, ZeroFlags};

use crate::support::operations::{Backing, Case, Op, follow_read};
use crate::support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, open, qemu_img_check, refcounts,
};
use crate::{engines, queue};

fn cases() -> Vec<Case> {
    let standard = Case {
        version: 3,
        cluster_size: 65536,
        extended_l2: false,
        refcount_bits: 16,
        size: (1 << 20) + 1536,
        backing: Backing::None,
    };
    let extended = Case { extended_l2: true, ..standard };
    vec![
        standard,
        Case { cluster_size: 512, size: 150 << 10, ..standard },
        Case { version: 2, cluster_size: 4096, backing: Backing::Raw(500_000), ..standard },
        Case { backing: Backing::Raw(700_100), refcount_bits: 1, ..standard },
        extended,
        Case { backing: Backing::Raw(700_100), ..extended },
        Case { cluster_size: 16384, backing: Backing::Qcow2(900_000), ..extended },
        Case { cluster_size: 2 << 20, size: 5 << 20, ..extended },
    ]
}

struct Run<'a> {
    case: Case,
    queue: &'a Queue,
    content: Vec<u8>,
    flying: HashMap<u64, Op>,
    /// Reads of what was discarded.
    discarded: HashSet<u64>,
    rng: Rng,
}

fn span(op: &Op) -> (u64, u64) {
    match *op {
        Op::Read { at, len } | Op::Discard { at, len } => (at, at + len),
        Op::Compress { at, len, .. } => (at, at + len),
        Op::Write { at, len, .. } | Op::Zero { at, len, .. } => (at, at + len),
        Op::Flush => (0, 0),
    }
}

/// Of either kind.
fn buffer(rng: &mut Rng, len: u64, byte: u8) -> Buffer {
    let mut buffer = match rng.below(2) {
        0 => vec![0; len as usize].into(),
        _ => Buffer::aligned(len as usize).unwrap(),
    };
    buffer.fill(byte);
    buffer
}

impl Run<'_> {
    fn submit(&mut self, op: Op, number: u64) {
        let queue = self.queue;
        match op {
            Op::Read { at, len } => {
                let buffer = buffer(&mut self.rng, len, 0xee);
                queue.read(buffer, at, number).unwrap();
            }
            Op::Write { at, len, byte } => {
                let flags = WriteFlags { fua: self.rng.below(20) == 0, ..Default::default() };
                let buffer = buffer(&mut self.rng, len, byte);
                queue.write(buffer, at, flags, number).unwrap();
            }
            Op::Compress { at, len, byte } => {
                let flags = WriteFlags { compressed: true, ..Default::default() };
                queue.write(vec![byte; len as usize], at, flags, number).unwrap();
            }
            Op::Zero { at, len, unmap: may_unmap } => {
                let flags = ZeroFlags { may_unmap, ..Default::default() };
                queue.write_zeroes(at, len, flags, number).unwrap();
            }
            Op::Discard { at, len } => queue.discard(at, len, number).unwrap(),
            Op::Flush => queue.flush(number).unwrap(),
        }
        assert!(self.flying.insert(number, op).is_none());
    }

    fn completed(&mut self, completion: Completion) {
        let number = completion.user_data;
        let op = self.flying.remove(&number).expect("one completion for each");
        completion.result.unwrap_or_else(|error| panic!("{op:?}: {error}"));
        let discarded = self.discarded.remove(&number);
        match (op, completion.buffer) {
            (Op::Read { at, .. }, Some(read)) if discarded => {
                follow_read(&read, at, &mut self.content);
            }
            (Op::Read { at, len }, Some(read)) => {
                let expected = &self.content[at as usize..(at + len) as usize];
                describe(format!("{op:?}"), || assert_same(&read, expected));
            }
            (Op::Read { .. }, None) => panic!("a read gives its buffer back"),
            // What it left is looked at through the queue: a blocking call might wait
            // for what is in flight there.
            (Op::Discard { at, len }, _) => {
                self.discarded.insert(number);
                self.submit(Op::Read { at, len }, number);
            }
            _ => op.model(&self.case, &mut self.content),
        }
    }

    fn reap(&mut self, wait: bool) {
        let mut done = Vec::new();
        if wait {
            self.queue.wait(1, 3, None, |completion| done.push(completion)).unwrap();
        } else {
            self.queue.reap(3, |completion| done.push(completion)).unwrap();
        }
        done.into_iter().for_each(|completion| self.completed(completion));
    }

    fn step(&mut self, number: u64, depth: usize) {
        let mut op = self.case.op(&mut self.rng, false);
        if self.rng.below(3) == 0 {
            let (at, len) = self.case.range(&mut self.rng);
            op = Op::Read { at, len };
        }
        let (start, end) = span(&op);
        while self.flying.len() == depth
            || self.flying.values().map(span).any(|(from, to)| from < end && start < to)
        {
            self.reap(true);
        }
        self.submit(op, number);
        match self.rng.below(6) {
            0 => _ = self.queue.submit().unwrap(),
            1 => self.reap(false),
            _ => {}
        }
    }
}

fn run(case: Case, engine: Engine, direct: bool, seed: u64) {
    let (scratch, mut rng) = (Scratch::new(), Rng::new(seed));
    let path = scratch.path("image");
    let content = case.create_backing(&path, &mut rng);
    case.create(&path);
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    options.no_flush = rng.below(4) > 0;
    options.direct = direct;
    options.backing_direct = Some(false);
    if rng.below(2) == 0 {
        options.set("l2-cache-size", "1k").unwrap();
        options.set("l2-cache-entry-size", "512").unwrap();
    }
    let image = match Image::open(Source::path(&path), &options) {
        Ok(image) => Arc::new(image),
        // No direct I/O where the tests run.
        Err(error) if direct && error.kind() == ErrorKind::NotSupported => return,
        Err(error) => panic!("{error}"),
    };
    let depth = [1, 2, 7, 64][rng.below(4) as usize];
    let queue = queue(&image, engine, depth);
    let mut run = Run {
        case,
        queue: &queue,
        content,
        flying: HashMap::new(),
        discarded: HashSet::new(),
        rng,
    };
    for number in 0..250 {
        run.step(number, depth as usize);
    }
    while !run.flying.is_empty() {
        run.reap(true);
    }
    assert_content(&image, &run.content);
    let content = run.content;
    drop(queue);
    image.close().unwrap();
    qemu_img_check(&path);
    refcounts::assert_exact(&path);
    assert_content(&open(&path), &content);
}

#[test]
fn random_operations_in_flight_agree_with_a_byte_array() {
    for_seeds("queues", 1, |seed| {
        for (number, case) in cases().into_iter().enumerate() {
            for engine in engines() {
                for direct in [false, true] {
                    let seed = seed * 1000 + number as u64;
                    let what = format!("{case:?}, {engine:?}, direct: {direct}");
                    describe(what, || run(case, engine, direct, seed));
                }
            }
        }
    });
}
