//! Many threads on one handle. What each of them does follows from the seed; how
//! they meet does not, so the checks hold for every schedule: who writes where
//! nobody else does finds its bytes; where several write, each sector is one
//! writer's; who reads sees what was, or what comes, and no third thing.

mod support;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use qcow2rs::{ErrorKind, Image, OpenOptions, Policy, Source, WriteFlags, ZeroFlags};
use support::memory_disk::{Gate, MemoryDisk, Request};
use support::operations::{Backing, Case};
use support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, open, qemu_img_check, qemu_io,
    qemu_ok, refcounts, smallest_caches, text,
};

const THREADS: usize = 6;
const SECTOR: usize = 512;

/// The images that all of this is tried on, with and without caches.
fn cases() -> Vec<(Case, bool)> {
    let standard = Case {
        version: 3,
        cluster_size: 65536,
        extended_l2: false,
        refcount_bits: 16,
        size: 1 << 20,
        backing: Backing::None,
    };
    let extended = Case { extended_l2: true, ..standard };
    vec![
        (standard, false),
        (Case { cluster_size: 512, size: 200 << 10, ..standard }, true),
        (Case { backing: Backing::Raw(700_000), ..standard }, true),
        (
            Case { version: 2, cluster_size: 4096, backing: Backing::Raw(500_000), ..standard },
            false,
        ),
        (extended, true),
        (Case { backing: Backing::Raw(700_000), ..extended }, false),
        (Case { cluster_size: 16384, backing: Backing::Qcow2(900_000), ..extended }, true),
        (Case { cluster_size: 2 << 20, size: 4 << 20, ..extended }, false),
    ]
}

/// An image, what it reads as, and what its snapshot does if it has one.
struct Run {
    scratch: Scratch,
    case: Case,
    tiny_caches: bool,
    content: Vec<u8>,
    snapshot: Option<Vec<u8>>,
    rng: Rng,
}

impl Run {
    fn new(case: Case, tiny_caches: bool, seed: u64) -> Run {
        let (scratch, mut rng) = (Scratch::new(), Rng::new(seed));
        let path = scratch.path("image");
        let mut content = case.create_backing(&path, &mut rng);
        case.create(&path);
        let mut snapshot = None;
        if rng.below(2) == 0 {
            let quarter = case.size / 4;
            qemu_io(&path, &[format!("write -P 77 {quarter} {quarter}")]);
            content[quarter as usize..][..quarter as usize].fill(77);
            qemu_ok("qemu-img", &["snapshot", "-c", "before", text(&path)]);
            snapshot = Some(content.clone());
        }
        Run { scratch, case, tiny_caches, content, snapshot, rng }
    }

    fn path(&self) -> PathBuf {
        self.scratch.path("image")
    }

    fn open(&self) -> Image {
        let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
        options.no_flush = true;
        if self.tiny_caches {
            smallest_caches(&mut options);
        }
        Image::open(Source::path(self.path()), &options).unwrap()
    }

    /// What QEMU, a checker of our own and the model say in the end.
    fn finish(self, image: &Image) {
        assert_content(image, &self.content);
        image.close().unwrap();
        let path = self.path();
        qemu_img_check(&path);
        refcounts::assert_exact(&path);
        assert_content(&open(&path), &self.content);
        if let Some(snapshot) = &self.snapshot {
            let raw = self.scratch.path("snapshot.raw");
            let args = ["convert", "-l", "before", "-f", "qcow2", "-O", "raw"];
            qemu_ok("qemu-img", &[&args[..], &[text(&path), text(&raw)]].concat());
            assert_same(&std::fs::read(raw).unwrap(), snapshot);
        }
    }
}

/// Runs a test on each kind of image.
fn on_all(seeds: u64, test: impl Fn(Run)) {
    for_seeds("threads", seeds, |seed| {
        for (number, (case, tiny_caches)) in cases().into_iter().enumerate() {
            let seed = seed * 100 + number as u64;
            describe(format!("{case:?}, tiny caches: {tiny_caches}"), || {
                test(Run::new(case, tiny_caches, seed));
            });
        }
    });
}

#[test]
fn writers_of_different_bytes_of_the_same_clusters() {
    on_all(2, |mut run| {
        let image = run.open();
        let size = run.case.size as usize;
        // Each thread's stripes lie between the others', across all boundaries.
        let stripe = 1 + run.rng.below(9000) as usize;
        let mine = |number: usize| {
            let starts = (number * stripe..size).step_by(THREADS * stripe);
            starts.map(move |start| start..(start + stripe).min(size))
        };
        let written: Vec<_> = std::thread::scope(|scope| {
            let seeds: Vec<u64> = (0..THREADS).map(|_| run.rng.next()).collect();
            let (image, before) = (&image, &run.content);
            let writers: Vec<_> = (0..THREADS)
                .map(|number| {
                    let mut rng = Rng::new(seeds[number]);
                    scope.spawn(move || {
                        let stripe = |range| write_stripe(image, before, range, &mut rng);
                        mine(number).map(stripe).collect::<Vec<_>>()
                    })
                })
                .collect();
            writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect()
        });
        for (at, data) in written {
            run.content[at..at + data.len()].copy_from_slice(&data);
        }
        run.finish(&image);
    });
}

/// Changes parts of a stripe, and looks whether it is then as it should be. Where it
/// begins, and its bytes in the end.
fn write_stripe(
    image: &Image,
    before: &[u8],
    range: Range<usize>,
    rng: &mut Rng,
) -> (usize, Vec<u8>) {
    let mut data = before[range.clone()].to_vec();
    for _ in 0..3 {
        let from = rng.below(data.len() as u64) as usize;
        let len = 1 + rng.below((data.len() - from) as u64) as usize;
        let (at, part) = (range.start + from, &mut data[from..from + len]);
        if rng.below(4) == 0 {
            let flags = ZeroFlags { may_unmap: rng.below(2) == 0, ..Default::default() };
            part.fill(0);
            image.write_zeroes(at as u64, len as u64, flags).unwrap();
        } else {
            rng.fill(part);
            image.write_at(part, at as u64, WriteFlags::default()).unwrap();
        }
        assert_same(&support::read(image, range.start as u64, data.len() as u64), &data);
    }
    if rng.below(8) == 0 {
        image.flush().unwrap();
    }
    (range.start, data)
}

#[test]
fn overlapping_writes_leave_whole_sectors() {
    on_all(2, |mut run| {
        let image = run.open();
        let size = run.case.size as usize / SECTOR;
        for round in 0..12u8 {
            // Around one place, so that they meet.
            let middle = run.rng.below(size as u64) as usize;
            let ranges: Vec<_> = (0..THREADS)
                .map(|_| {
                    let start = middle.saturating_sub(run.rng.below(150) as usize);
                    start..(middle + 1 + run.rng.below(150) as usize).min(size)
                })
                .collect();
            let byte = |number: usize| round * THREADS as u8 + number as u8 + 1;
            let barrier = Barrier::new(THREADS);
            std::thread::scope(|scope| {
                for (number, range) in ranges.iter().enumerate() {
                    let (image, barrier) = (&image, &barrier);
                    scope.spawn(move || {
                        let data = vec![byte(number); range.len() * SECTOR];
                        barrier.wait();
                        let at = (range.start * SECTOR) as u64;
                        image.write_at(&data, at, WriteFlags::default()).unwrap();
                        if number == 0 {
                            image.flush().unwrap();
                        }
                    });
                }
            });
            let mut now = vec![0; size * SECTOR];
            image.read_at(&mut now, 0).unwrap();
            for sector in 0..size {
                let bytes = sector * SECTOR..(sector + 1) * SECTOR;
                let writers: Vec<usize> =
                    (0..THREADS).filter(|n| ranges[*n].contains(&sector)).collect();
                if writers.is_empty() {
                    assert_same(&now[bytes.clone()], &run.content[bytes]);
                    continue;
                }
                let one = writers
                    .iter()
                    .any(|number| now[bytes.clone()].iter().all(|found| *found == byte(*number)));
                assert!(one, "sector {sector} is none of its writers'");
            }
            run.content.copy_from_slice(&now);
        }
        run.finish(&image);
    });
}

/// A part of the disk whose bytes are all alike, but while they change.
struct Area {
    bytes: Range<usize>,
    /// What the steps make of it, the first being what it is at first. Each value
    /// is another, but for zero.
    values: Vec<u8>,
    begun: AtomicUsize,
    done: AtomicUsize,
}

impl Area {
    /// Every byte is what it was before, or became in, one of the steps that were
    /// under way during a read.
    fn check(&self, image: &Image) {
        let mut now = vec![0xee; self.bytes.len()];
        let first = self.done.load(SeqCst);
        image.read_at(&mut now, self.bytes.start as u64).unwrap();
        let last = self.begun.load(SeqCst);
        let possible = &self.values[first..=last];
        // A discard may come before a step.
        let zero = last > first;
        let known = |byte: &u8| possible.contains(byte) || (zero && *byte == 0);
        let third = now.iter().find(|byte| !known(byte));
        assert_eq!(third, None, "{:?} while it was one of {possible:?}", self.bytes);
    }

    fn run_steps(&self, image: &Image, rng: &mut Rng) {
        let (at, len) = (self.bytes.start as u64, self.bytes.len() as u64);
        for (step, value) in self.values.iter().enumerate().skip(1) {
            self.begun.store(step, SeqCst);
            if rng.below(3) == 0 {
                image.discard(at, len).unwrap();
            }
            match value {
                0 => {
                    let may_unmap = rng.below(2) == 0;
                    let flags = ZeroFlags { may_unmap, ..Default::default() };
                    image.write_zeroes(at, len, flags).unwrap();
                }
                value => {
                    let data = vec![*value; len as usize];
                    image.write_at(&data, at, WriteFlags::default()).unwrap();
                }
            }
            self.done.store(step, SeqCst);
            self.check(image);
        }
    }
}

#[test]
fn readers_see_what_was_or_what_comes() {
    on_all(2, |mut run| {
        let image = run.open();
        let size = run.case.size as usize;
        // Neighbours share a cluster here and there.
        let area = size / 4 - run.rng.below(3000) as usize;
        let areas: Vec<Area> = (0..4)
            .map(|number| {
                let start = number * area + 100;
                let len = 1 + run.rng.below((area - 1) as u64) as usize;
                let steps = 1..24u8;
                let values = steps.map(|step| if step % 5 == 4 { 0 } else { step }).collect();
                let (begun, done) = Default::default();
                Area { bytes: start..start + len, values, begun, done }
            })
            .collect();
        for area in &areas {
            let bytes = area.bytes.clone();
            run.content[bytes.clone()].fill(1);
            image
                .write_at(&run.content[bytes], area.bytes.start as u64, WriteFlags::default())
                .unwrap();
        }
        let running = AtomicUsize::new(areas.len());
        std::thread::scope(|scope| {
            for area in &areas {
                let (image, running, mut rng) = (&image, &running, Rng::new(run.rng.next()));
                scope.spawn(move || {
                    let _last = Leaving(running);
                    area.run_steps(image, &mut rng);
                });
            }
            for number in 0..2 {
                let (image, running, areas) = (&image, &running, &areas);
                scope.spawn(move || {
                    while running.load(SeqCst) > 0 {
                        areas.iter().for_each(|area| area.check(image));
                        if number == 0 {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        for area in areas {
            run.content[area.bytes].fill(*area.values.last().unwrap());
        }
        run.finish(&image);
    });
}

/// Counts down also when the thread panics, so that nobody waits for it.
struct Leaving<'a>(&'a AtomicUsize);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[test]
fn who_needs_the_image_alone_is_told_that_it_is_busy() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    support::qemu_create(&path, "cluster_size=4k", 1 << 20);
    qemu_io(&path, &["write -P 5 0 64k".into()]);
    let gate = Gate::new();
    let held = gate.clone();
    let disk = MemoryDisk::with_hook(&std::fs::read(&path).unwrap(), move |request| {
        if let Request::Read(..) = request {
            held.pass();
        }
        Ok(())
    });
    let image = Image::open(disk.source(), &OpenOptions::new().writable(true)).unwrap();
    image.read_at(&mut [0; 512], 0).unwrap();
    gate.close();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut data = [0; 512];
            image.read_at(&mut data, 0).unwrap();
            assert_eq!(data, [5; 512]);
        });
        gate.wait_for_one();
        for attempt in [Image::close, Image::abandon, |image: &Image| image.reopen(true, true)] {
            assert_eq!(attempt(&image).unwrap_err().kind(), ErrorKind::Busy);
        }
        // What does not need it alone goes on.
        image.write_at(&[6; 512], 512, WriteFlags::default()).unwrap();
        image.flush().unwrap();
        assert_eq!(image.info().unwrap().virtual_size, 1 << 20);
        gate.open();
        reader.join().unwrap();
    });
    image.reopen(false, true).unwrap();
    image.close().unwrap();
    std::fs::write(&path, disk.bytes()).unwrap();
    qemu_img_check(&path);
    assert_eq!(support::read(&open(&path), 512, 512), [6; 512]);
}

#[test]
fn an_image_is_reopened_while_others_come_and_go() {
    on_all(1, |mut run| {
        let image = run.open();
        let size = run.case.size;
        let share = size / THREADS as u64;
        let working = AtomicUsize::new(THREADS);
        let shares: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..THREADS as u64)
                .map(|number| {
                    let (image, working) = (&image, &working);
                    let (seed, from) = (run.rng.next(), (number * share) as usize);
                    let mut mine = run.content[from..from + share as usize].to_vec();
                    scope.spawn(move || {
                        let _last = Leaving(working);
                        let mut rng = Rng::new(seed);
                        for _ in 0..40 {
                            let at = rng.below(share) as usize;
                            let len = 1 + rng.below((share as usize - at) as u64) as usize;
                            let mut data = vec![0; len];
                            rng.fill(&mut data);
                            let offset = (from + at) as u64;
                            match image.write_at(&data, offset, WriteFlags::default()) {
                                Ok(()) => mine[at..at + len].copy_from_slice(&data),
                                Err(error) => assert_eq!(error.kind(), ErrorKind::ReadOnly),
                            }
                            let mut now = vec![0; share as usize];
                            image.read_at(&mut now, from as u64).unwrap();
                            assert_same(&now, &mine);
                        }
                        mine
                    })
                })
                .collect();
            let mut writable = true;
            while working.load(SeqCst) > 0 {
                match image.reopen(!writable, true) {
                    Ok(()) => writable = !writable,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Busy),
                }
                std::thread::yield_now();
            }
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        for (number, mine) in shares.into_iter().enumerate() {
            let from = number * share as usize;
            run.content[from..from + mine.len()].copy_from_slice(&mine);
        }
        run.finish(&image);
    });
}
