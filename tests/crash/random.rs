//! Random scenarios over many kinds of images.
//!
//! `QCOW2RS_SEED=n` runs one seed; `QCOW2RS_CRASH_ROUNDS=n` says how many are
//! run for each kind.

use super::images_taken::ImagesTaken;
use super::qemu;
use super::scenario::{Config, Scenario};
use super::support::builder::Kind;

pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

/// Seeds for each configuration, unless the environment says otherwise.
const ROUNDS: u64 = 1;

/// Runs the seeds of one family of configurations. A seed says which one it is.
fn run(family: u64, configs: &[Config]) {
    let count = configs.len() as u64;
    let qemu_every = if qemu::available() { 50 } else { 0 };
    let run = |seed: u64| {
        let config = configs[(seed / 10 % count) as usize].clone();
        let scenario = Scenario::new(config, seed).show_qemu(qemu_every);
        if let Err(failure) = scenario.run() {
            panic!("{}", scenario.report(&failure));
        }
        scenario.crashes.get()
    };
    let _images = ImagesTaken;
    if let Some(seed) = number("QCOW2RS_SEED") {
        if seed % 10 == family {
            run(seed);
        }
        return;
    }
    let rounds = number("QCOW2RS_CRASH_ROUNDS").unwrap_or(ROUNDS) * count;
    let crashes: u64 = (0..rounds).map(|round| run(round * 10 + family)).sum();
    println!("{rounds} scenarios, {crashes} crashes");
    assert!(crashes >= rounds, "hardly any crashes");
}

pub const SMALL: Kind = Kind { size: 128 << 10, ..Kind::PLAIN };

pub fn config(kind: Kind) -> Config {
    Config::new(kind)
}

fn kinds() -> Vec<Kind> {
    let large = Kind { cluster: 65536, size: 1 << 20, ..SMALL };
    let extended = Kind { extended_l2: true, cluster: 16384, size: 512 << 10, ..SMALL };
    vec![
        SMALL,
        Kind { backing: true, ..SMALL },
        Kind { refcount_bits: 1, ..SMALL },
        Kind { refcount_bits: 64, ..SMALL },
        Kind { snapshot: true, ..SMALL },
        Kind { version: 2, ..SMALL },
        Kind { version: 2, backing: true, ..SMALL },
        Kind { cluster: 4096, size: 512 << 10, ..SMALL },
        Kind { cluster: 4096, size: 500 << 10, backing: true, refcount_bits: 1, ..SMALL },
        large,
        Kind { backing: true, ..large },
        extended,
        Kind { backing: true, ..extended },
        Kind { snapshot: true, refcount_bits: 64, ..extended },
        Kind { backing: true, cluster: 65536, size: (1 << 20) + 512, ..extended },
        Kind { lazy: true, ..SMALL },
        Kind { autoclear: true, backing: true, ..SMALL },
        Kind { autoclear: true, ..extended },
    ]
}

pub fn configs() -> Vec<Config> {
    kinds().into_iter().map(config).collect()
}

#[test]
fn random_requests_survive_crashes() {
    run(0, &configs());
}

#[test]
fn random_requests_survive_crashes_in_direct_mode() {
    let direct =
        |alignment| move |config: Config| Config { alignment, punch: alignment == 512, ..config };
    let sectors = configs().into_iter().map(direct(512));
    let blocks = configs().into_iter().map(direct(4096));
    run(1, &sectors.chain(blocks).collect::<Vec<_>>());
}

/// Refcounts may lag behind while the dirty bit is set, and only then; opening the
/// image again makes all of them right.
#[test]
fn lazy_refcounts_survive_crashes() {
    let with = |faults, give_up| {
        move |kind| Config { faults, give_up, ..config(Kind { lazy: true, ..kind }) }
    };
    let kinds: Vec<Kind> = kinds().into_iter().filter(|kind| kind.version > 2).collect();
    let crowded = Kind { refcount_bits: 64, crowded: true, ..SMALL };
    let some = || kinds.iter().copied().step_by(2).chain([crowded]);
    let few = || kinds.iter().copied().step_by(4);
    let all = some().map(with(false, false)).chain(few().map(with(true, false)));
    run(5, &all.chain(few().map(with(false, true))).collect::<Vec<_>>());
}

#[test]
fn refcount_tables_grow() {
    let crowded = Kind { refcount_bits: 64, crowded: true, ..SMALL };
    let calm = config(crowded);
    let hasty = Config { give_up: true, ..config(crowded) };
    run(4, &[calm, Config { faults: true, ..config(crowded) }, hasty]);
}

/// Compressed data packed into host clusters, whole and in parts of sectors, while
/// others use, free and fill the clusters around it.
#[test]
fn compressed_writes_survive_crashes() {
    let with = |faults, give_up, alignment| {
        move |config: Config| Config { compress: true, faults, give_up, alignment, ..config }
    };
    let some = |first: usize| configs().into_iter().skip(first).step_by(3);
    let direct = configs().into_iter().skip(1).step_by(5);
    let all = configs().into_iter().map(with(false, false, 1));
    let bad = some(0).map(with(true, false, 1)).chain(some(1).map(with(false, true, 1)));
    run(7, &all.chain(bad).chain(direct.map(with(false, false, 512))).collect::<Vec<_>>());
}

#[test]
fn random_requests_survive_faults() {
    let faulty = configs().into_iter().map(|config| Config { faults: true, ..config });
    run(2, &faulty.collect::<Vec<_>>());
}

#[test]
fn random_requests_survive_those_given_up() {
    let hasty = configs().into_iter().map(|config| Config { give_up: true, ..config });
    run(3, &hasty.collect::<Vec<_>>());
}

#[test]
fn one_seed_tells_one_story() {
    let kind = Kind { backing: true, ..SMALL };
    let story = |seed| {
        let scenario = Scenario::new(Config { faults: true, give_up: true, ..config(kind) }, seed);
        if let Err(failure) = scenario.run() {
            panic!("{}", scenario.report(&failure));
        }
        let tally = *scenario.tally.borrow();
        format!("{tally:?}")
    };
    assert_eq!(story(7), story(7));
    assert_ne!(story(7), story(8));
}

#[test]
fn images_go_to_qemu_and_come_back() {
    if !qemu::available() {
        return;
    }
    let small = Kind { size: 64 << 10, ..SMALL };
    let extended = Kind { extended_l2: true, cluster: 16384, ..small };
    let kinds = [Kind { backing: true, ..small }, Kind { snapshot: true, ..small }, extended];
    for kind in kinds {
        // By chance; but not for long.
        let both = (1..20).any(|seed| {
            let scenario = Scenario::new(config(kind), seed).show_qemu(4);
            if let Err(failure) = scenario.run() {
                panic!("{}", scenario.report(&failure));
            }
            let tally = *scenario.tally.borrow();
            tally.handovers > 0 && tally.qemu_checks > 0
        });
        assert!(both, "{kind:?}");
    }
}
