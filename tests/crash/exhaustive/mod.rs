//! Every short sequence of operations, on every kind of image in every state, and
//! every way in which a power loss may end it.
//!
//! A sequence is played without crashes up to its last operation (the crashes
//! before it belong to the shorter sequences); from then on, whenever changes are
//! about to become durable, and at the end, all states are tried in which they may
//! be left. What was looked at before, in this sequence or another, is not looked
//! at again.
//!
//! By default a slice of all that is played: see `slice`. Otherwise
//! - `QCOW2RS_EXHAUSTIVE=full` plays all sequences of up to three operations, and
//!   `QCOW2RS_EXHAUSTIVE=K/N` the Kth of N shares of them (for as many processes);
//! - `QCOW2RS_EXHAUSTIVE_OPS=N` says how long the sequences of these may be;
//! - `QCOW2RS_STAGE=TEXT` leaves out stages whose name does not contain this;
//! - `QCOW2RS_SEQUENCE='STAGE: OPERATION, OPERATION'` plays one sequence.

mod operations;
mod play;
mod stages;

use std::panic::{AssertUnwindSafe, catch_unwind};

use qcow2rs::io::sim::Rng;

use operations::{Op, may_follow};
use play::{Player, Totals};
use stages::Stage;

/// More violations than anybody wants to read of.
const ENOUGH: usize = 10;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn name_of(stage: &Stage, sequence: &[&Op]) -> String {
    let ops: Vec<&str> = sequence.iter().map(|op| &op.name[..]).collect();
    format!("{}: {}", stage.name, ops.join(", "))
}

/// Plays sequences and notes those in which something is wrong.
struct Run<'a> {
    player: Player<'a>,
    stage: &'a Stage,
    violations: Vec<String>,
}

impl<'a> Run<'a> {
    fn on(stage: &'a Stage) -> Run<'a> {
        Run { player: Player::new(stage), stage, violations: Vec::new() }
    }

    fn play(&mut self, sequence: &[&Op]) {
        let player = &mut self.player;
        if catch_unwind(AssertUnwindSafe(|| player.play(sequence))).is_err() {
            let name = name_of(self.stage, sequence);
            eprintln!(
                "again: QCOW2RS_SEQUENCE='{name}' cargo test --test crash every_way -- --nocapture"
            );
            self.violations.push(name);
        }
    }

    /// All sequences of `len` operations, or that share of them.
    fn play_all(&mut self, ops: &'a [Op], len: usize, share: (u64, u64)) {
        let mut number = 0;
        let mut sequence = Vec::new();
        self.extend(ops, len, share, &mut number, &mut sequence);
    }

    fn extend(
        &mut self,
        ops: &'a [Op],
        len: usize,
        share: (u64, u64),
        number: &mut u64,
        sequence: &mut Vec<&'a Op>,
    ) {
        if sequence.len() == len {
            *number += 1;
            if *number % share.1 == share.0 && self.violations.len() < ENOUGH {
                self.play(sequence);
            }
            return;
        }
        for op in ops {
            if may_follow(sequence, op, len) {
                sequence.push(op);
                self.extend(ops, len, share, number, sequence);
                sequence.pop();
            }
        }
    }

    fn end(self, all: &mut Totals, violations: &mut Vec<String>) {
        all.add(&self.player.totals);
        violations.extend(self.violations);
    }
}

fn tell(totals: &Totals, violations: &[String]) {
    println!("{totals}, {} violations", violations.len());
    assert!(violations.is_empty(), "something is wrong after: {violations:#?}");
}

/// All sequences of up to `longest` operations, or that share of them.
fn whole(share: (u64, u64), longest: usize) {
    let wanted = variable("QCOW2RS_STAGE").unwrap_or_default();
    let (mut totals, mut violations) = (Totals::default(), Vec::new());
    for name in stages::names().into_iter().filter(|name| name.contains(&wanted)) {
        let stage = Stage::new(&name);
        let ops = operations::all(&stage.config.kind);
        let mut run = Run::on(&stage);
        let begun = std::time::Instant::now();
        for len in 1..=longest {
            run.play_all(&ops, len, share);
        }
        let (done, wrong) = (&run.player.totals, run.violations.len());
        println!("{name}: {done}, {wrong} violations, {} s", begun.elapsed().as_secs());
        run.end(&mut totals, &mut violations);
    }
    tell(&totals, &violations);
}

/// On every stage some sequences of up to three operations, drawn from the seed; on
/// those with small disks each operation alone; on some, all sequences of two.
fn slice(seed: u64) {
    const SMALL: u64 = 512 << 10;
    const PAIRS: [&str; 3] = ["std512 fresh", "std512 full", "std512-64 snapshot"];
    const DRAWN: u64 = 5;
    println!("QCOW2RS_SEED={seed}");
    let (mut totals, mut violations) = (Totals::default(), Vec::new());
    let mut rng = Rng::new(seed);
    for name in stages::names() {
        let stage = Stage::new(&name);
        let ops = operations::all(&stage.config.kind);
        let mut run = Run::on(&stage);
        if stage.config.kind.size < SMALL {
            run.play_all(&ops, 1, (0, 1));
        }
        if PAIRS.contains(&&name[..]) {
            run.play_all(&ops, 2, (0, 1));
        }
        for _ in 0..DRAWN {
            let len = *rng.pick(&[1, 2, 3, 3]);
            let mut sequence: Vec<&Op> = Vec::new();
            while sequence.len() < len {
                let op = rng.pick(&ops);
                if may_follow(&sequence, op, len) {
                    sequence.push(op);
                }
            }
            run.play(&sequence);
        }
        run.end(&mut totals, &mut violations);
    }
    tell(&totals, &violations);
}

fn one(name: &str) {
    let (stage, ops) = name.split_once(": ").expect("a stage and operations");
    let stage = Stage::new(stage);
    let all = operations::all(&stage.config.kind);
    let find = |name: &str| all.iter().find(|op| op.name == name).expect("an operation's name");
    let sequence: Vec<&Op> = ops.split(", ").map(find).collect();
    let mut player = Player::new(&stage);
    player.play(&sequence);
    println!("{}", player.totals);
}

#[test]
fn every_way_in_which_a_short_sequence_may_end_is_sound() {
    if let Some(name) = variable("QCOW2RS_SEQUENCE") {
        return one(&name);
    }
    let longest = variable("QCOW2RS_EXHAUSTIVE_OPS").map_or(3, |n| n.parse().expect("a number"));
    match variable("QCOW2RS_EXHAUSTIVE").as_deref() {
        Some("full") => whole((0, 1), longest),
        Some(share) => {
            let (k, n) = share.split_once('/').expect("full or K/N");
            let (k, n): (u64, u64) = (k.parse().unwrap(), n.parse().unwrap());
            whole((k % n, n), longest);
        }
        None => slice(variable("QCOW2RS_SEED").map_or(1, |seed| seed.parse().unwrap())),
    }
}
