//! Where sequences are played: kinds of images, each in several states.
//!
//! The disks are small: one slice of an L2 table and a little more. What is stored
//! lies near the edges that the operations are about.

use qcow2rs::io::sim::{AtStake, FileOptions, Rng, SimDisk};

use super::super::layout::{Header, read_guest};
use super::super::oracle::{Oracle, SECTOR, Word, fill, word};
use super::super::random::SMALL;
use super::super::scenario::Config;
use super::super::schedules::scene::Scene;
use super::super::support::builder::{Cluster, Kind, build};
use super::operations::entries_per_slice;

/// Marks the words that the image holds at first, and those of the backing file.
const STORED: u32 = 0xaaaa_0000;
const BASE: u32 = 0xbbbb_0000;

fn kinds() -> Vec<(&'static str, Kind)> {
    let of = |cluster, refcount_bits| {
        let kind = Kind { cluster, refcount_bits, ..SMALL };
        sized(kind)
    };
    let extended =
        |cluster, refcount_bits| sized(Kind { extended_l2: true, cluster, refcount_bits, ..SMALL });
    vec![
        ("std512", of(512, 16)),
        ("std512-1", of(512, 1)),
        ("std512-64", of(512, 64)),
        ("std512-v2", Kind { version: 2, ..of(512, 16) }),
        ("std4k", of(4096, 16)),
        ("std4k-v2", Kind { version: 2, ..of(4096, 16) }),
        ("std64k", of(65536, 16)),
        ("ext16k-1", extended(16384, 1)),
        ("ext64k-64", extended(65536, 64)),
        ("ext128k", extended(131_072, 16)),
    ]
}

/// With a disk that ends a few clusters behind the first slice; where it can, in the
/// middle of one.
fn sized(kind: Kind) -> Kind {
    let over = if kind.cluster > 512 { 512 } else { kind.cluster };
    Kind { size: (entries_per_slice(&kind) + 5) * kind.cluster + over, ..kind }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Nothing is stored.
    Fresh,
    Populated,
    /// Stored in odd order, with free clusters in between.
    Fragmented,
    /// On a device with room for this many more clusters.
    Full(u64),
    /// Over a backing file that ends in the second cluster.
    BackingShorter,
    /// Over one that is longer than the disk; some is stored here, some is zero.
    BackingLonger,
    Compressed,
    /// An internal snapshot shares all there is.
    Snapshot,
    /// Zero, with and without a host cluster; with subclusters, each as another.
    Zeroes,
}

const STATES: [(&str, State); 10] = [
    ("fresh", State::Fresh),
    ("populated", State::Populated),
    ("fragmented", State::Fragmented),
    ("full", State::Full(1)),
    ("nearly full", State::Full(4)),
    ("backing shorter", State::BackingShorter),
    ("backing longer", State::BackingLonger),
    ("compressed", State::Compressed),
    ("snapshot", State::Snapshot),
    ("zeroes", State::Zeroes),
];

fn possible(kind: &Kind, state: State) -> bool {
    match state {
        State::Snapshot => kind.refcount_bits > 1,
        State::Zeroes => kind.version > 2,
        _ => true,
    }
}

/// The names of all stages.
pub fn names() -> Vec<String> {
    let name = |kind: &str, state: &str| format!("{kind} {state}");
    let of = |(kind_name, kind): (&'static str, Kind)| {
        let states = STATES.into_iter().filter(move |(_, state)| possible(&kind, *state));
        states.map(move |(state, _)| name(kind_name, state))
    };
    kinds().into_iter().flat_map(of).collect()
}

/// An image to begin with, as often as wanted.
pub struct Stage {
    pub name: String,
    pub config: Config,
    /// Whether operations may find no space.
    pub full: bool,
    /// What the snapshot holds.
    pub snapshot: Option<Vec<u8>>,
    template: AtStake,
    words: Vec<Word>,
}

impl Stage {
    pub fn new(name: &str) -> Stage {
        let (kind, state) = name.split_once(' ').expect("a kind and a state");
        let (_, kind) = *kinds().iter().find(|(name, _)| *name == kind).expect("a kind's name");
        let (_, state) = *STATES.iter().find(|(name, _)| *name == state).expect("a state's name");
        let backing = matches!(state, State::BackingShorter | State::BackingLonger);
        let kind = Kind { backing, snapshot: state == State::Snapshot, ..kind };
        let config = Config { cache: (1024, 512), ..super::super::random::config(kind) };
        let stage = Stage::build(name, config, state);
        if state == State::Fragmented { stage.fragmented() } else { stage }
    }

    fn build(name: &str, config: Config, state: State) -> Stage {
        let kind = config.kind;
        let (sectors, per_cluster) = (kind.size / SECTOR, kind.cluster / SECTOR);
        let base = match state {
            State::BackingShorter => per_cluster + per_cluster.div_ceil(2),
            State::BackingLonger => sectors + 3,
            _ => 0,
        };
        let below = |sector| if sector < base { word(BASE, sector) } else { 0 };
        let mut words: Vec<Word> = (0..sectors).map(below).collect();
        let image = build(kind, |cluster| {
            let range = cluster * per_cluster..((cluster + 1) * per_cluster).min(sectors);
            let words = &mut words[range.start as usize..range.end as usize];
            let data: Vec<Word> = range.map(|sector| word(STORED, sector)).collect();
            content(&kind, state, cluster, words, &data)
        });
        let disk = SimDisk::new(1);
        let room = match state {
            State::Full(clusters) => Some(image.len() as u64 + clusters * kind.cluster),
            _ => None,
        };
        let options = FileOptions { device: room, ..FileOptions::default() };
        disk.create_with("image", options, &image);
        if kind.backing {
            let read_only = FileOptions { read_only: true, ..FileOptions::default() };
            disk.create_with("base", read_only, &fill((0..base).map(|s| word(BASE, s))));
        }
        Stage::of(name, config, disk, words, room.is_some())
    }

    fn of(name: &str, config: Config, disk: SimDisk, words: Vec<Word>, full: bool) -> Stage {
        let template = disk.at_stake("image").expect("there is an image");
        let snapshot = config.kind.snapshot.then(|| snapshot_of(&disk));
        Stage { name: name.to_owned(), config, full, snapshot, template, words }
    }

    /// The same after some use.
    fn fragmented(self) -> Stage {
        let scene = self.begin();
        let clusters = self.config.kind.clusters();
        let whole = 0..clusters - 1;
        let near_edges: Vec<u64> = whole.filter(|n| is_near_edge(*n, clusters)).collect();
        let half = near_edges.len() / 2;
        scene.play(async {
            // What is written in between is freed at the end.
            for (n, index) in (0..near_edges.len()).enumerate() {
                let odd = near_edges[index * (half | 1) % near_edges.len()];
                scene.write_clusters(odd..odd + 1).await.unwrap();
                scene.write_clusters(8 + n as u64..9 + n as u64).await.unwrap();
            }
            scene.flush().await.unwrap();
            scene.discard(scene.cluster(8).start..scene.cluster(20).start).await.unwrap();
            scene.settle().await.unwrap();
        });
        let file = scene.file();
        let header = Header::read(&*file).expect("a sound image");
        let bytes = read_guest(&*file, &header, None);
        let words = scene.oracle.borrow().after_crash(&bytes).expect("what was written");
        Stage::of(&self.name, self.config.clone(), scene.disk.clone(), words, false)
    }

    /// Opens a new copy of the image.
    pub fn begin(&self) -> Scene {
        let disk = self.template.disk(&self.template.remains(0, |_, _| false));
        Scene::on(&self.config, 1, disk, Oracle::new(self.words.iter().copied()), Rng::new(1))
    }
}

/// What the snapshot of an image holds.
pub fn snapshot_of(disk: &SimDisk) -> Vec<u8> {
    let file = disk.file("image").expect("there is an image");
    let mut header = Header::read(&*file).expect("a header");
    let (tables, _) = header.read_snapshots(&*file);
    header.l1 = tables[0];
    read_guest(&*file, &header, None)
}

/// Whether a cluster is near an edge that operations are about.
fn is_near_edge(cluster: u64, clusters: u64) -> bool {
    cluster < 4 || cluster + 9 > clusters
}

/// What a cluster holds at first; puts down its words.
fn content(kind: &Kind, state: State, cluster: u64, words: &mut [Word], data: &[Word]) -> Cluster {
    if !is_near_edge(cluster, kind.clusters()) {
        return Cluster::Nothing;
    }
    let mut bytes = fill(data.iter().copied());
    bytes.resize(kind.cluster as usize, 0);
    let all = if kind.extended_l2 { u32::MAX } else { 1 };
    let version_2 = kind.version == 2;
    let (mut store, mut zero) = (0, 0);
    match state {
        State::Fresh | State::Fragmented | State::BackingShorter => return Cluster::Nothing,
        State::BackingLonger if cluster % 3 == 2 => store = all,
        State::BackingLonger if cluster % 3 == 1 && !version_2 => zero = all,
        State::BackingLonger => return Cluster::Nothing,
        State::Full(_) if cluster % 2 == 1 => return Cluster::Nothing,
        State::Populated | State::Full(_) => store = all,
        State::Snapshot if cluster % 4 != 3 => store = all,
        State::Compressed | State::Snapshot => {
            words.copy_from_slice(data);
            return Cluster::Compressed(bytes);
        }
        State::Zeroes if kind.extended_l2 && cluster % 2 == 0 => {
            (store, zero) = (0x0f5a_0ff0, 0xf005_5003);
        }
        State::Zeroes if cluster % 2 == 0 => {
            words.fill(0);
            return Cluster::Reserved;
        }
        State::Zeroes => zero = all,
    }
    let per_subcluster = (kind.cluster / SECTOR / kind.subclusters()).max(1) as usize;
    for (index, word) in words.iter_mut().enumerate() {
        let bit = if kind.extended_l2 { 1 << (index / per_subcluster) } else { 1 };
        if store & bit != 0 {
            *word = data[index];
        } else if zero & bit != 0 {
            *word = 0;
        }
    }
    Cluster::Data { bytes, alloc: store, zero }
}
