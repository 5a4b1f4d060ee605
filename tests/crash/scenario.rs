//! What is tried: a configuration and a seed, the disk that they begin with, and
//! what came of it, in numbers. How it goes on from there is told in `life`.

use std::cell::{Cell, RefCell};
use std::ops::{AddAssign, Range};
use std::sync::Arc;

use qcow2rs::image::Disk;
use qcow2rs::io::sim::{Crash, FileOptions, Rng, SimDisk, SimEngine, SimFile};
use qcow2rs::{Format, OpenOptions, Policy, Reference, ReferenceKind, Resolver, Secret, Source};

use super::images_taken::crash_image;
use super::layout::ReadAt;
use super::oracle::{Mode, Oracle, SECTOR, Word, fill, word};
pub use super::report::{Failure, Verdict};
use super::snapshot::keep_snapshot;
use super::support;
use super::support::builder::{Cluster, Kind, build_both};

/// What is tried, but for chance. [`Config::new`] gives one to be changed.
#[derive(Clone, Debug)]
pub struct Config {
    pub kind: Kind,
    /// What offsets and lengths must be multiples of.
    pub alignment: u64,
    /// Bytes of the L2 cache, and of one slice.
    pub cache: (u64, u64),
    /// Whether the storage can make holes.
    pub punch: bool,
    /// Whether discards keep their host clusters.
    pub discard_keeps: bool,
    /// Whether operations fail.
    pub faults: bool,
    /// Whether requests are given up half way.
    pub give_up: bool,
    /// Whether it is used by queues.
    pub queues: bool,
    /// Whether guests write compressed clusters, too.
    pub compress: bool,
    /// Whether the image is changed as a whole, between its uses.
    pub changes: bool,
    /// What a loss of power does.
    pub medium: Medium,
    /// After one in how many steps a crash image is drawn that is looked at, but
    /// not lived in.
    pub every: u64,
    /// How strict the oracle is.
    pub mode: Mode,
}

/// What a medium does when power is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Medium {
    /// The seed says which of the next two.
    Seeded,
    /// It tears writes at sectors of 512 bytes.
    Sectors,
    /// It tears writes at pages of 4096 bytes.
    Pages,
    /// Hostile: it tears writes at words of 8 bytes.
    Words,
    /// Hostile: sectors that were being written may hold garbage.
    Garbage,
}

impl Medium {
    pub const ALL: [(&str, Medium); 5] = [
        ("seeded", Medium::Seeded),
        ("sectors", Medium::Sectors),
        ("pages", Medium::Pages),
        ("words", Medium::Words),
        ("garbage", Medium::Garbage),
    ];

    /// Whether it does what no device says it does.
    pub fn is_hostile(self) -> bool {
        matches!(self, Medium::Words | Medium::Garbage)
    }

    /// A crash: mostly of this medium, at times of the process only.
    fn crash(self, rng: &mut Rng) -> Crash {
        if rng.chance(1, 5) {
            return Crash::Process;
        }
        match self {
            Medium::Seeded | Medium::Sectors => Crash::Power { unit: 512 },
            Medium::Pages => Crash::Power { unit: 4096 },
            Medium::Words => Crash::Power { unit: 8 },
            Medium::Garbage => Crash::Garbage { unit: 512 },
        }
    }
}

/// What one seed and the configuration make.
pub struct Scenario {
    pub config: Config,
    pub seed: u64,
    /// Every how manieth crash image is shown to QEMU; 0: none.
    pub qemu_every: Cell<u64>,
    /// All that was counted.
    pub tally: RefCell<Tally>,
    /// The medium that the seed has chosen.
    medium: Medium,
}

/// What came of scenarios, in numbers.
#[derive(Clone, Copy, Default, Debug)]
pub struct Tally {
    pub scenarios: u64,
    /// Crash images by what made them.
    pub process: u64,
    pub sectors: u64,
    pub pages: u64,
    pub hostile: u64,
    /// Crash images that were opened, used, crashed again, closed.
    pub lives: u64,
    /// Those among them that came of a crash of one that came of a crash.
    pub later_lives: u64,
    /// Crashes while an image was being opened.
    pub while_opening: u64,
    /// Images closed in good order.
    pub closed: u64,
    pub requests: u64,
    /// Changes of an image as a whole.
    pub changes: u64,
    /// Operations on simulated files, and the syncs among them.
    pub operations: u64,
    pub syncs: u64,
    /// Operations that were made to fail.
    pub failures: u64,
    /// Images that the driver's own check has looked at.
    pub own_checks: u64,
    /// Images that `qemu-img check` has looked at.
    pub qemu_checks: u64,
    /// Images that QEMU has written to in between.
    pub handovers: u64,
    /// Crash images that only QEMU's weaker promise would let pass.
    pub parity: u64,
    /// Crash images of hostile media in which an invariant is broken, by its number.
    pub broken: [u64; 15],
}

impl Tally {
    pub fn images(&self) -> u64 {
        self.process + self.sectors + self.pages + self.hostile
    }

    /// Name and value of each number.
    pub fn rows(&self) -> [(&'static str, u64); 18] {
        [
            ("scenarios", self.scenarios),
            ("crash images", self.images()),
            ("  process killed", self.process),
            ("  power lost, 512-byte units", self.sectors),
            ("  power lost, 4096-byte units", self.pages),
            ("  hostile media", self.hostile),
            ("  lived in", self.lives),
            ("  lived in, crashed, lived in", self.later_lives),
            ("  crashed while being opened", self.while_opening),
            ("images closed", self.closed),
            ("guest requests", self.requests),
            ("snapshots, sizes, widths changed", self.changes),
            ("operations on files", self.operations),
            ("  syncs", self.syncs),
            ("  made to fail", self.failures),
            ("checked by the driver", self.own_checks),
            ("checked by qemu-img", self.qemu_checks),
            ("handed to QEMU and back", self.handovers),
        ]
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.scenarios += other.scenarios;
        self.process += other.process;
        self.sectors += other.sectors;
        self.pages += other.pages;
        self.hostile += other.hostile;
        self.lives += other.lives;
        self.later_lives += other.later_lives;
        self.while_opening += other.while_opening;
        self.closed += other.closed;
        self.requests += other.requests;
        self.changes += other.changes;
        self.operations += other.operations;
        self.syncs += other.syncs;
        self.failures += other.failures;
        self.own_checks += other.own_checks;
        self.qemu_checks += other.qemu_checks;
        self.handovers += other.handovers;
        self.parity += other.parity;
        for (all, more) in self.broken.iter_mut().zip(other.broken) {
            *all += more;
        }
    }
}

impl Scenario {
    pub fn new(config: Config, seed: u64) -> Scenario {
        let medium = match config.medium {
            Medium::Seeded => {
                *Rng::new(seed).pick(&[Medium::Sectors, Medium::Sectors, Medium::Pages])
            }
            medium => medium,
        };
        Scenario { config, seed, qemu_every: Cell::new(0), tally: RefCell::default(), medium }
    }

    /// Shows every `count`th crash image to QEMU.
    pub fn show_qemu(self, count: u64) -> Scenario {
        self.qemu_every.set(count);
        self
    }

    /// Runs it all.
    pub fn run(&self) -> Verdict {
        let mut rng = Rng::new(self.seed);
        let (disk, oracle) = self.config.start(&mut rng);
        self.tally.borrow_mut().scenarios += 1;
        self.live(disk, oracle, None, super::life::GENERATIONS, &mut rng)
    }

    /// A disk as a crash of this one may leave it.
    pub fn crash(&self, disk: &SimDisk, rng: &mut Rng) -> (Crash, SimDisk) {
        let crash = self.medium.crash(rng);
        let mut tally = self.tally.borrow_mut();
        match crash {
            Crash::Process => tally.process += 1,
            Crash::Power { unit: 512 } => tally.sectors += 1,
            Crash::Power { unit: 4096 } => tally.pages += 1,
            Crash::Power { .. } | Crash::Garbage { .. } => tally.hostile += 1,
        }
        (crash, crash_image(disk, crash, rng.next_u64()))
    }
}

/// What is known of a disk after a crash that was found to hold these words.
pub fn known_after(crash: Crash, oracle: &Oracle, words: Vec<Word>) -> Oracle {
    match crash {
        Crash::Process => oracle.orphaned(words),
        Crash::Power { .. } | Crash::Garbage { .. } => oracle.recovered(words),
    }
}

const BASE: u32 = 0xbbbb_0000;
const INITIAL: u32 = 0xaaaa_0000;

impl ReadAt for SimFile {
    fn length(&self) -> u64 {
        SimFile::length(self)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) {
        self.peek(offset, out);
    }
}

/// Gives the files "base" and "data" of the disk to whoever asks.
struct Base(SimDisk);

impl Resolver for Base {
    fn resolve(
        &self,
        reference: &Reference,
        format: Option<Format>,
    ) -> qcow2rs::Result<(Arc<Source>, Option<Format>)> {
        let file = match reference.kind {
            ReferenceKind::Backing => self.0.file("base").expect("there is a backing file"),
            ReferenceKind::Data => self.0.file("data").expect("there is a data file"),
        };
        Ok((Source::sim(file), format))
    }
}

/// Opens the image of a disk.
pub async fn open(disk: &SimDisk, config: &Config) -> qcow2rs::Result<Disk> {
    let options = OpenOptions::new().writable(true);
    open_with(disk, config, options).await
}

/// As `open`, but for reading only.
pub async fn open_for_reading(disk: &SimDisk, config: &Config) -> qcow2rs::Result<Disk> {
    open_with(disk, config, OpenOptions::new()).await
}

async fn open_with(disk: &SimDisk, config: &Config, options: OpenOptions) -> qcow2rs::Result<Disk> {
    let mut options = options.policy(Policy::Resolve(Arc::new(Base(disk.clone()))));
    let (bytes, slice) = config.cache;
    options.l2_cache_size = Some(bytes);
    options.l2_cache_entry_size = Some(slice);
    options.refcount_cache_size = Some(bytes);
    options.discard_no_unref = config.discard_keeps;
    if config.kind.encrypted {
        options.secret = Some(Secret::new(support::aes::PASSPHRASE.as_bytes())?);
    }
    let file = disk.file("image").expect("there is an image");
    Disk::open(&SimEngine, Source::sim(file), &options).await
}

impl Config {
    /// The smallest caches that there can be; nothing fails.
    pub fn new(kind: Kind) -> Config {
        let slice = kind.cluster.min(4096);
        Config {
            kind,
            alignment: 1,
            cache: (2 * slice, slice),
            punch: true,
            discard_keeps: false,
            faults: false,
            give_up: false,
            queues: false,
            compress: false,
            changes: false,
            medium: Medium::Seeded,
            every: 40,
            mode: Mode::from_environment(),
        }
    }

    /// A disk with an image, and what the guest finds on it.
    pub fn start(&self, rng: &mut Rng) -> (SimDisk, Oracle) {
        let kind = self.kind;
        let disk = SimDisk::new(rng.next_u64());
        let per_cluster = kind.cluster / SECTOR;
        let below = |sector| if kind.backing { word(BASE, sector) } else { 0 };
        let sectors = kind.size / SECTOR;
        let mut words: Vec<Word> = (0..sectors).map(below).collect();
        let fullness = *rng.pick(&[0, 1, 6, 8]);
        let (image, data) = build_both(kind, |cluster| {
            let range = cluster * per_cluster..((cluster + 1) * per_cluster).min(sectors);
            let words = &mut words[range.start as usize..range.end as usize];
            initial_cluster(&kind, range, words, fullness, rng)
        });
        let options = FileOptions {
            alignment: self.alignment,
            punch: self.punch,
            zero: rng.chance(1, 2),
            ..FileOptions::default()
        };
        disk.create_with("image", options.clone(), &image);
        if kind.data_file {
            disk.create_with("data", options.clone(), &data);
        }
        if kind.backing {
            let read_only = FileOptions { read_only: true, ..options };
            // It may be shorter than the disk.
            let length = if rng.chance(1, 2) { sectors } else { rng.below(sectors) };
            words.iter_mut().skip(length as usize).for_each(|w| {
                if *w >> 32 == u64::from(BASE) {
                    *w = 0;
                }
            });
            disk.create_with("base", read_only, &fill((0..length).map(|s| word(BASE, s))));
        }
        keep_snapshot(&disk, &kind, &words);
        (disk, Oracle::new(words))
    }
}

/// Chooses what a cluster holds at first, and puts down its words.
fn initial_cluster(
    kind: &Kind,
    sectors: Range<u64>,
    words: &mut [Word],
    fullness: u64,
    rng: &mut Rng,
) -> Cluster {
    // A raw data file is all there is, from the beginning.
    if !kind.raw && !rng.chance(fullness, 8) {
        return Cluster::Nothing;
    }
    let data: Vec<Word> = sectors.clone().map(|sector| word(INITIAL, sector)).collect();
    let mut bytes = fill(data.iter().copied());
    bytes.resize(kind.cluster as usize, 0);
    if kind.raw {
        words.copy_from_slice(&data);
        let alloc = if kind.extended_l2 { u32::MAX } else { 1 };
        return Cluster::Data { bytes, alloc, zero: 0 };
    }
    if !kind.data_file && rng.chance(1, 4) {
        words.copy_from_slice(&data);
        return Cluster::Compressed(bytes);
    }
    if !kind.extended_l2 {
        let zero = kind.version > 2 && rng.chance(1, 4);
        let alloc = !zero || rng.chance(1, 2);
        words.copy_from_slice(&data);
        if zero {
            words.fill(0);
        }
        return Cluster::Data { bytes, alloc: alloc.into(), zero: zero.into() };
    }
    let (alloc, zero) = match rng.below(3) {
        0 => (u32::MAX, 0),
        _ => (rng.next_u64() as u32, rng.next_u64() as u32),
    };
    let zero = zero & !alloc;
    let per_subcluster = words.len().div_ceil(32);
    for (index, word) in words.iter_mut().enumerate() {
        let bit = 1 << (index / per_subcluster);
        if alloc & bit != 0 {
            *word = data[index];
        } else if zero & bit != 0 {
            *word = 0;
        }
    }
    Cluster::Data { bytes, alloc, zero }
}
