//! Many scenarios of all families, on all processors: what `scripts/crash.sh` runs.
//!
//! By itself the test runs a few seeds. `QCOW2RS_CRASH_MINUTES`
//! runs seeds for so long, from `QCOW2RS_SEED` on or from 0; without it,
//! `QCOW2RS_SEED` is the one seed to run. `QCOW2RS_CRASH_MEDIUM` says what a loss of
//! power does (see `Medium::ALL`): what hostile media break is counted, not judged.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::qemu;
use super::random::{self, SMALL, number};
use super::scenario::{Config, Medium, Scenario, Tally};
use super::support::builder::Kind;

/// Seeds that the test runs by itself.
const SEEDS: u64 = 30;
/// After one in how many steps a crash image is looked at.
const EVERY: u64 = 10;
/// So many failures, and it ends.
const ENOUGH: usize = 5;

/// Each configuration of each family, and what the family is called.
fn configs() -> Vec<(&'static str, Config)> {
    let plain = random::configs();
    let mut all: Vec<(&str, Config)> = Vec::new();
    let mut family = |name, change: &dyn Fn(&mut Config)| {
        all.extend(plain.iter().map(|config| {
            let mut config = config.clone();
            change(&mut config);
            (name, config)
        }));
    };
    family("plain", &|_| {});
    family("direct, 512", &|config| config.alignment = 512);
    family("direct, 4096, no holes", &|config| (config.alignment, config.punch) = (4096, false));
    family("faults", &|config| config.faults = true);
    family("given up", &|config| config.give_up = true);
    family("faults, given up", &|config| (config.faults, config.give_up) = (true, true));
    // Version 2 has no zero clusters, which such discards leave.
    family("discards keep", &|config| config.discard_keeps = config.kind.version > 2);
    family("queues", &|config| config.queues = true);
    family("queues, faults", &|config| (config.queues, config.faults) = (true, true));
    all.extend(random::changing().into_iter().map(|config| ("changed as a whole", config)));
    let crowded = Kind { refcount_bits: 64, crowded: true, ..SMALL };
    for (faults, give_up) in [(false, false), (true, false), (false, true)] {
        all.push(("tables grow", Config { faults, give_up, ..Config::new(crowded) }));
    }
    all
}

/// What all threads share.
struct Farm {
    configs: Vec<(&'static str, Config)>,
    medium: Option<Medium>,
    qemu_every: u64,
    next: AtomicU64,
    /// No seed from here on.
    end: u64,
    deadline: Option<Instant>,
    tally: Mutex<Tally>,
    failures: Mutex<Vec<String>>,
}

impl Farm {
    fn work(&self) {
        loop {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if late || seed >= self.end || self.failures.lock().unwrap().len() >= ENOUGH {
                return;
            }
            self.run(seed);
        }
    }

    fn run(&self, seed: u64) {
        // Neighbouring seeds are of different families.
        let index = seed * 47 % self.configs.len() as u64;
        let (family, config) = &self.configs[index as usize];
        let medium = self.medium.unwrap_or(config.medium);
        let config = Config { medium, every: EVERY, ..config.clone() };
        let scenario = Scenario::new(config, seed).show_qemu(self.qemu_every);
        let failed = match catch_unwind(AssertUnwindSafe(|| scenario.run())) {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(scenario.report(&failure)),
            Err(_) => Some(format!("seed {seed}: a panic, see above")),
        };
        *self.tally.lock().unwrap() += *scenario.tally.borrow();
        if let Some(report) = failed {
            self.failures.lock().unwrap().push(format!("family: {family}\n{report}"));
        }
    }
}

#[test]
fn crash_images_of_all_families() {
    let configs = configs();
    let minutes: Option<f64> = std::env::var("QCOW2RS_CRASH_MINUTES")
        .ok()
        .map(|text| text.parse().expect("QCOW2RS_CRASH_MINUTES is a number"));
    let first = number("QCOW2RS_SEED");
    let (start, end) = match (minutes, first) {
        (Some(_), first) => (first.unwrap_or(0), u64::MAX),
        (None, Some(seed)) => (seed, seed + 1),
        (None, None) => (0, SEEDS),
    };
    let begun = Instant::now();
    let farm = Farm {
        configs,
        medium: std::env::var("QCOW2RS_CRASH_MEDIUM").ok().map(|name| medium(&name)),
        qemu_every: if qemu::available() { 200 } else { 0 },
        next: AtomicU64::new(start),
        end,
        deadline: minutes.map(|minutes| begun + Duration::from_secs_f64(minutes * 60.0)),
        tally: Mutex::default(),
        failures: Mutex::default(),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let worker = std::thread::Builder::new().name(name.clone());
            worker.spawn_scoped(scope, || farm.work()).expect("a thread can be started");
        }
    });
    let tally = farm.tally.into_inner().unwrap();
    let failures = farm.failures.into_inner().unwrap();
    tell(&tally, begun.elapsed(), threads, failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(tally.images() > 10 * tally.scenarios, "hardly any crashes");
}

fn medium(name: &str) -> Medium {
    let known = Medium::ALL.into_iter().find(|(known, _)| *known == name);
    known.unwrap_or_else(|| panic!("QCOW2RS_CRASH_MEDIUM={name}: one of {:?}", Medium::ALL)).1
}

fn tell(tally: &Tally, time: Duration, threads: usize, failures: usize) {
    for (name, value) in tally.rows() {
        println!("{name:32} {value:>12}");
    }
    let minutes = time.as_secs_f64() / 60.0;
    println!("{:32} {:>12.0}", "crash images per minute", tally.images() as f64 / minutes);
    println!("{:32} {minutes:>12.2}", format!("minutes, {threads} threads"));
    println!("{:32} {failures:>12}", "violations");
    println!("{:32} {:>12}", "images that QEMU's promise allows", tally.parity);
    for (number, count) in (0..).zip(tally.broken).filter(|(_, count)| *count > 0) {
        println!("{:32} {count:>12}", format!("hostile media break I{number}"));
    }
}
