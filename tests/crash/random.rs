//! Random scenarios over many kinds of images.
//!
//! `QCOW2RS_SEED=n` runs one seed, by whichever test; `QCOW2RS_CRASH_ROUNDS=n` says how many are
//! run for each kind.

use super::images_taken::ImagesTaken;
use super::qemu;
use super::scenario::{Config, Scenario, Tally};
use super::support::builder::Kind;

pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

/// Seeds for each configuration, unless the environment says otherwise.
const ROUNDS: u64 = 1;

/// A test that runs seeds, and its configurations.
type Family = (&'static str, fn() -> Vec<Config>);

/// The first ten by the last digit of their seeds, the next ten by that of seeds from
/// `TEN_MORE` on.
const FAMILIES: [Family; 11] = [
    ("random_requests_survive_crashes", configs),
    ("random_requests_survive_crashes_in_direct_mode", direct),
    ("random_requests_survive_faults", faulty),
    ("random_requests_survive_those_given_up", hasty),
    ("refcount_tables_grow", growing),
    ("lazy_refcounts_survive_crashes", lazy),
    ("queues_survive_crashes", with_queues),
    ("compressed_writes_survive_crashes", compressing),
    ("queues_survive_faults", with_queues_and_faults),
    ("external_data_files_survive_crashes", with_data_files),
    ("images_changed_as_a_whole_survive_crashes", changing_some),
];

const TEN_MORE: u64 = 1_000_000;

/// A seed of a family.
fn seed_of(family: u64, round: u64) -> u64 {
    family / 10 * TEN_MORE + round * 10 + family % 10
}

/// Runs one seed, and returns what came of it.
fn run_seed(seed: u64, configs: &[Config]) -> Tally {
    let config = configs[(seed / 10 % configs.len() as u64) as usize].clone();
    let qemu_every = if qemu::available() { 50 } else { 0 };
    let scenario = Scenario::new(config, seed).show_qemu(qemu_every);
    if let Err(failure) = scenario.run() {
        panic!("{}", scenario.report(&failure));
    }
    *scenario.tally.borrow()
}

/// The family that a seed belongs to.
fn family_of(seed: u64) -> Result<Family, String> {
    let family = seed / TEN_MORE * 10 + seed % 10;
    let none = || format!("QCOW2RS_SEED={seed}: no random test has it");
    usize::try_from(family).ok().and_then(|family| FAMILIES.get(family)).copied().ok_or_else(none)
}

/// Runs the seeds of one family; or the seed that is asked for, which may be of
/// another: that one is run then, rather than nothing.
fn run(family: u64) {
    let _images = ImagesTaken;
    if let Some(seed) = number("QCOW2RS_SEED") {
        let (test, configs) = family_of(seed).unwrap_or_else(|what| panic!("{what}"));
        println!("seed {seed} is of {test}: {} crashes", run_seed(seed, &configs()).images());
        return;
    }
    let configs = FAMILIES[family as usize].1();
    let rounds = number("QCOW2RS_CRASH_ROUNDS").unwrap_or(ROUNDS) * configs.len() as u64;
    let mut all = Tally::default();
    for round in 0..rounds {
        all += run_seed(seed_of(family, round), &configs);
    }
    println!("{rounds} scenarios, {} crashes", all.images());
    assert!(all.images() >= rounds, "hardly any crashes");
    let changing = configs.iter().any(|config| config.changes);
    assert!(!changing || all.changes >= rounds / 2, "hardly anything was changed");
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

/// The same, changed as a whole in between: snapshots, sizes, widths of refcounts.
pub fn changing() -> Vec<Config> {
    let all = configs().into_iter().filter(|config| !config.kind.autoclear);
    all.map(|config| Config { changes: true, ..config }).collect()
}

fn changing_some() -> Vec<Config> {
    changing().into_iter().step_by(2).collect()
}

fn direct() -> Vec<Config> {
    let direct =
        |alignment| move |config: Config| Config { alignment, punch: alignment == 512, ..config };
    let sectors = configs().into_iter().map(direct(512));
    sectors.chain(configs().into_iter().map(direct(4096))).collect()
}

fn faulty() -> Vec<Config> {
    configs().into_iter().map(|config| Config { faults: true, ..config }).collect()
}

fn hasty() -> Vec<Config> {
    configs().into_iter().map(|config| Config { give_up: true, ..config }).collect()
}

fn growing() -> Vec<Config> {
    let crowded = Kind { refcount_bits: 64, crowded: true, ..SMALL };
    let calm = config(crowded);
    let hasty = Config { give_up: true, ..config(crowded) };
    vec![calm, Config { faults: true, ..config(crowded) }, hasty]
}

fn lazy() -> Vec<Config> {
    let with = |faults, give_up| {
        move |kind| Config { faults, give_up, ..config(Kind { lazy: true, ..kind }) }
    };
    let kinds: Vec<Kind> = kinds().into_iter().filter(|kind| kind.version > 2).collect();
    let crowded = Kind { refcount_bits: 64, crowded: true, ..SMALL };
    let some = || kinds.iter().copied().step_by(2).chain([crowded]);
    let few = || kinds.iter().copied().step_by(4);
    let all = some().map(with(false, false)).chain(few().map(with(true, false)));
    all.chain(few().map(with(false, true))).collect()
}

fn with_queues() -> Vec<Config> {
    let all = configs().into_iter().chain(direct().into_iter().step_by(3));
    all.map(|config| Config { queues: true, ..config }).collect()
}

fn with_queues_and_faults() -> Vec<Config> {
    let some = with_queues().into_iter().step_by(2);
    some.map(|config| Config { faults: true, ..config }).collect()
}

fn with_data_files() -> Vec<Config> {
    let small = Kind { data_file: true, ..SMALL };
    let extended = Kind { extended_l2: true, cluster: 16384, size: 512 << 10, ..small };
    let with =
        |kind: Kind, faults, give_up, queues| Config { faults, give_up, queues, ..config(kind) };
    vec![
        with(small, false, false, false),
        with(Kind { backing: true, ..small }, false, false, false),
        with(Kind { cluster: 4096, size: 500 << 10, backing: true, ..small }, false, true, true),
        with(Kind { backing: true, ..extended }, false, false, true),
        with(Kind { lazy: true, ..extended }, false, true, false),
        with(small, true, false, true),
        Config { alignment: 4096, ..with(extended, true, false, false) },
        with(Kind { raw: true, ..small }, false, true, false),
        with(Kind { raw: true, ..extended }, true, false, true),
    ]
}

fn compressing() -> Vec<Config> {
    let with = |faults, give_up, alignment| {
        move |config: Config| Config { compress: true, faults, give_up, alignment, ..config }
    };
    let some = |first: usize| configs().into_iter().skip(first).step_by(3);
    let direct = configs().into_iter().skip(1).step_by(5);
    let all = configs().into_iter().map(with(false, false, 1));
    let bad = some(0).map(with(true, false, 1)).chain(some(1).map(with(false, true, 1)));
    all.chain(bad).chain(direct.map(with(false, false, 512))).collect()
}

#[test]
fn random_requests_survive_crashes() {
    run(0);
}

/// Snapshots are taken, applied and deleted, disks resized, refcounts made wider.
#[test]
fn images_changed_as_a_whole_survive_crashes() {
    run(10);
}

#[test]
fn random_requests_survive_crashes_in_direct_mode() {
    run(1);
}

/// Compressed data packed into host clusters, whole and in parts of sectors, while
/// others use, free and fill the clusters around it.
#[test]
fn compressed_writes_survive_crashes() {
    run(7);
}

#[test]
fn random_requests_survive_faults() {
    run(2);
}

#[test]
fn random_requests_survive_those_given_up() {
    run(3);
}

#[test]
fn refcount_tables_grow() {
    run(4);
}

/// Refcounts may lag behind while the dirty bit is set, and only then; opening the
/// image again makes all of them right.
#[test]
fn lazy_refcounts_survive_crashes() {
    run(5);
}

#[test]
fn a_seed_is_run_as_what_it_is_of_whoever_is_asked() {
    for (family, (test, _)) in (0..).zip(FAMILIES) {
        let seed = seed_of(family, 13);
        let (found, configs) = family_of(seed).unwrap();
        assert_eq!(found, test);
        assert!(run_seed(seed, &configs()).images() > 0, "{test}: nothing was crashed");
    }
    assert!(family_of(seed_of(FAMILIES.len() as u64, 13)).is_err());
}

#[test]
fn queues_survive_crashes() {
    run(6);
}

#[test]
fn queues_survive_faults() {
    run(8);
}

#[test]
fn external_data_files_survive_crashes() {
    run(9);
}

#[test]
fn one_seed_tells_one_story() {
    let kind = Kind { backing: true, ..SMALL };
    let story = |queues, seed| {
        let config = Config { faults: true, give_up: true, queues, ..config(kind) };
        let scenario = Scenario::new(config, seed);
        if let Err(failure) = scenario.run() {
            panic!("{}", scenario.report(&failure));
        }
        let tally = *scenario.tally.borrow();
        format!("{tally:?}")
    };
    for queues in [false, true] {
        assert_eq!(story(queues, 7), story(queues, 7));
        assert_ne!(story(queues, 7), story(queues, 8));
    }
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
