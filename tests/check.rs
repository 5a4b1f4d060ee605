//! Checking, side by side with `qemu-img check`: images of all kinds, sound and
//! spoiled at random, must be found to have the same numbers of everything.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use qcow2rs::{CheckResult, Finding, Image, Observer, OpenOptions, Severity, Source};
use support::dissect::{COMPRESSED, COPIED, Dissected, OFFSET, field};
use support::{Rng, Scratch, describe, for_seeds, qemu, qemu_create, qemu_io, qemu_ok, text};

/// Counts findings by severity.
#[derive(Default)]
struct Tally {
    corruptions: usize,
    leaks: usize,
    unchecked: usize,
    texts: Vec<String>,
}

impl Observer for Tally {
    fn finding(&mut self, finding: &Finding) {
        match finding.severity {
            Severity::Corruption => self.corruptions += 1,
            Severity::Leak => self.leaks += 1,
            Severity::Unchecked => self.unchecked += 1,
        }
        self.texts.push(format!("{:#x}: {}", finding.host_offset, finding.message));
    }
}

fn open_for_check(path: &Path) -> qcow2rs::Result<Image> {
    let mut options = OpenOptions::new();
    options.check_only = true;
    Image::open(Source::path(path), &options)
}

/// What we find; `None` where the check cannot be completed.
fn ours(path: &Path, tally: &mut Tally) -> Option<CheckResult> {
    let image = open_for_check(path).ok()?;
    let (result, outcome) = image.check(tally);
    let no_more = |numbers: u64, findings: usize| (numbers == 0) == (findings == 0);
    assert!(no_more(result.corruptions, tally.corruptions), "{result:?}");
    assert!(no_more(result.check_errors, tally.unchecked), "{result:?}");
    assert_eq!(result.leaks, tally.leaks as u64);
    outcome.ok().map(|()| result)
}

/// What QEMU finds; `None` where it gives up.
fn qemus(path: &Path) -> Option<CheckResult> {
    let output = qemu("qemu-img", &["check", "-f", "qcow2", "--output=json", text(path)]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let number = |name: &str| json.get(name).and_then(|value| value.as_u64()).unwrap_or(0);
    Some(CheckResult {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        image_end_offset: number("image-end-offset"),
        total_clusters: number("total-clusters"),
        allocated_clusters: number("allocated-clusters"),
        fragmented_clusters: number("fragmented-clusters"),
        compressed_clusters: number("compressed-clusters"),
    })
}

/// Images to begin with: name, options, size.
const KINDS: [(&str, &str, u64); 7] = [
    ("standard", "cluster_size=4k", 1 << 20),
    ("tiny", "cluster_size=512,refcount_bits=1", 256 << 10),
    ("extended", "cluster_size=16k,extended_l2=on", 4 << 20),
    ("version 2", "cluster_size=4k,compat=0.10", 1 << 20),
    ("snapshots", "cluster_size=1k,refcount_bits=4", 512 << 10),
    ("wide", "cluster_size=2k,refcount_bits=64", 512 << 10),
    ("bitmaps", "cluster_size=4k", 1 << 20),
];

fn make(scratch: &Scratch, (name, options, size): (&str, &str, u64), seed: u64) -> PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, size);
    let mut rng = Rng::new(seed);
    let mut commands = Vec::new();
    for _ in 0..12 {
        let (at, bytes) = (rng.below(size / 2048) * 1024, (rng.below(16) + 1) * 1024);
        let verb = ["write -P 7", "write -P 9", "write -z", "discard"][rng.below(4) as usize];
        commands.push(format!("{verb} {at} {bytes}"));
    }
    qemu_io(&path, &commands);
    let cluster = Dissected::load(&path).cluster_size();
    if name != "tiny" {
        let at = size - 4 * cluster;
        let compressed = [at, at + cluster].map(|at| format!("write -c -P 5 {at} {cluster}"));
        qemu_io(&path, &compressed);
    }
    if name == "snapshots" {
        qemu_ok("qemu-img", &["snapshot", "-c", "one", text(&path)]);
        qemu_io(&path, &["write -P 3 0 5k".to_owned()]);
        qemu_ok("qemu-img", &["snapshot", "-c", "two", text(&path)]);
        qemu_io(&path, &["write -P 4 2k 5k".to_owned()]);
    }
    if name == "bitmaps" {
        qemu_ok("qemu-img", &["bitmap", "--add", text(&path), "some"]);
    }
    path
}

/// Where 8-byte entries of metadata are: those of the L1 table, of L2 tables, of the
/// refcount table, of refcount blocks; the rest of the file now and then.
fn places(image: &Dissected, rng: &mut Rng) -> usize {
    let cluster = image.cluster_size();
    let words = |bytes: u64| bytes / 8;
    let length = image.bytes.len() as u64;
    let l1 = |rng: &mut Rng| image.l1_offset() + rng.below(image.l1_size().max(1)) * 8;
    let table = |rng: &mut Rng| image.l1(rng.below(image.l1_size().max(1))) & OFFSET;
    let at = match rng.below(10) {
        0 | 1 => l1(rng),
        2..=5 => table(rng) + rng.below(words(cluster)) * 8,
        6 => image.u64(field::REFTABLE_OFFSET) + rng.below(3) * 8,
        7 | 8 => {
            let blocks = image.reftable();
            let blocks: Vec<_> = blocks.into_iter().filter(|entry| *entry != 0).collect();
            blocks.first().map_or(0, |block| block & OFFSET) + rng.below(words(cluster).min(16)) * 8
        }
        _ => cluster + rng.below(words(length.saturating_sub(2 * cluster)).max(1)) * 8,
    };
    // Not the header: what QEMU says of it is tested elsewhere.
    at.clamp(cluster, length - 8) as usize / 8 * 8
}

fn spoil(image: &mut Dissected, rng: &mut Rng) -> String {
    let at = places(image, rng);
    let old = image.u64(at);
    let cluster = image.cluster_size();
    let clusters = image.bytes.len() as u64 / cluster;
    let new = match rng.below(9) {
        0 => 0,
        1 => old ^ COPIED,
        2 => old ^ COMPRESSED,
        3 => old ^ 1 << rng.below(64),
        4 => (rng.below(clusters + 2) * cluster) | COPIED,
        5 => old + 512,
        6 => rng.next(),
        7 => old ^ 1,
        _ => rng.below(1 << 16) << rng.below(48),
    };
    image.put64(at, new);
    format!("{at:#x}: {old:#x} -> {new:#x}")
}

fn compare(path: &Path, what: &str) {
    let mut tally = Tally::default();
    let (ours, theirs) = (ours(path, &mut tally), qemus(path));
    assert_eq!(ours, theirs, "{what}\nleft is ours: {:#?}", tally.texts);
}

#[test]
fn sound_images_are_found_to_be_sound() {
    for kind in KINDS {
        let scratch = Scratch::new();
        let path = make(&scratch, kind, 1);
        compare(&path, kind.0);
        let mut tally = Tally::default();
        let found = ours(&path, &mut tally).unwrap();
        assert_eq!((found.corruptions, found.leaks, found.check_errors), (0, 0, 0));
        assert!(found.allocated_clusters > 0 && found.image_end_offset > 0);
    }
}

#[test]
fn damage_is_counted_as_qemu_counts_it() {
    for_seeds("check", 60, |seed| {
        let mut rng = Rng::new(seed);
        let kind = KINDS[(seed % KINDS.len() as u64) as usize];
        let scratch = Scratch::new();
        let path = make(&scratch, kind, seed);
        let sound = fs::read(&path).unwrap();
        for round in 0..6 {
            let mut image = Dissected::load(&path);
            let done: Vec<_> = (0..=rng.below(3)).map(|_| spoil(&mut image, &mut rng)).collect();
            image.save();
            let what = format!("{}, round {round}: {done:?}", kind.0);
            describe(what.clone(), || compare(&path, &what));
            fs::write(&path, &sound).unwrap();
        }
    });
}

#[test]
fn a_writable_image_is_checked_as_it_is() {
    let scratch = Scratch::new();
    let path = make(&scratch, KINDS[0], 5);
    let image = support::open_rw(&path);
    image.write_at(&[1; 9000], 700_000, Default::default()).unwrap();
    image.discard(0, 64 << 10).unwrap();
    let (result, outcome) = image.check(&mut ());
    outcome.unwrap();
    assert_eq!((result.corruptions, result.leaks, result.check_errors), (0, 0, 0));
    // It goes on as before.
    image.write_at(&[2; 9000], 100_000, Default::default()).unwrap();
    image.close().unwrap();
    compare(&path, "after close");
}

/// The header that was read at open tells of the old one.
#[test]
fn a_refcount_table_that_has_moved_is_checked_where_it_is() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    // One cluster of table counts 2 MiB.
    qemu_create(&path, "cluster_size=512,refcount_bits=64", 4 << 20);
    let before = Dissected::load(&path).u64(field::REFTABLE_OFFSET);
    let image = support::open_rw(&path);
    image.write_at(&vec![1; 3 << 20], 0, Default::default()).unwrap();
    let mut tally = Tally::default();
    let (result, outcome) = image.check(&mut tally);
    outcome.unwrap();
    assert_eq!((result.corruptions, result.leaks), (0, 0), "{:?}", tally.texts);
    image.close().unwrap();
    assert_ne!(Dissected::load(&path).u64(field::REFTABLE_OFFSET), before, "it has moved");
    compare(&path, "after close");
}

#[test]
fn progress_may_stop_a_check() {
    struct Stop(u64);
    impl Observer for Stop {
        fn progress(&mut self, done: u64, total: u64) -> bool {
            assert!(done > self.0 && done <= total);
            self.0 = done;
            done < 3
        }
    }
    let scratch = Scratch::new();
    let image = support::open(&make(&scratch, KINDS[1], 5));
    let error = image.check(&mut Stop(0)).1.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (qcow2rs::ErrorKind::Cancelled, libc::ECANCELED));
}
