//! Persistent bitmaps: power may be lost, and every operation may fail, at each step of
//! lives in which they are marked, recorded, changed and stored, while requests chosen at
//! random are carried out. A bitmap that does not say of itself that it is out of date
//! knows of every change since it was cleared; one that does not record is what it was, or
//! was to become.

use std::cell::RefCell;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use qcow2rs::image::Disk;
use qcow2rs::image::handle::Replacement;
use qcow2rs::io::engine::{Piece, Target};
use qcow2rs::io::sim::{
    Crash, Fault, FileOptions, GuestMut, GuestRef, OpKind, Outcome, Pattern, Rng, SimDisk,
    SimEngine, Task,
};
use qcow2rs::snapshots::Meta;
use qcow2rs::{Buffer, Image, ResizeOptions, Result, SimQueue, WriteFlags, ZeroFlags};

use super::super::bitmaps::{covers, read};
use super::super::guest::is_taken;
use super::super::imagecheck;
use super::super::random::{SMALL, config};
use super::super::scenario::open;
use super::super::support::builder::{Cluster, Kind, build};
use super::play_some;
use super::snapshots::{State, next};

const SECTOR: u64 = 512;

fn kinds() -> Vec<Kind> {
    let small = Kind { size: 48 << 10, ..SMALL };
    let extended = Kind { extended_l2: true, cluster: 16384, size: 256 << 10, ..SMALL };
    vec![
        small,
        Kind { backing: true, refcount_bits: 64, ..small },
        Kind { lazy: true, ..small },
        Kind { cluster: 4096, size: 96 << 10, ..small },
        extended,
    ]
}

/// A file with bitmaps, and what is known of them.
struct Stage {
    kind: Kind,
    disk: SimDisk,
    rng: RefCell<Rng>,
    /// The disk's content when "b", which records, was cleared.
    base: RefCell<Vec<u8>>,
    /// What "b" knows.
    known: RefCell<Vec<bool>>,
    /// What "frozen", which does not record, was and is to be.
    frozen: RefCell<Vec<Vec<bool>>>,
    /// The disk's content when "frozen" began to record, if it did.
    thawed: RefCell<Option<Vec<u8>>>,
    what: String,
}

fn parts(size: u64, ranges: &[Range<u64>]) -> Vec<bool> {
    let sector = |index: u64| index * SECTOR;
    (0..size / SECTOR)
        .map(|index| ranges.iter().any(|r| r.start < sector(index + 1) && sector(index) < r.end))
        .collect()
}

/// The disk that goes on after a change that succeeds.
fn go(image: Disk, changed: (Result<()>, Replacement)) -> Disk {
    let (result, image) = next(image, changed);
    result.unwrap();
    image.unwrap()
}

async fn content(image: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    let target = Target::Guest(GuestMut::from_slice(&mut bytes));
    image.read(&SimEngine, target, 0).await.unwrap();
    bytes
}

async fn write(image: &Disk, range: Range<u64>, value: u8) -> Result<()> {
    let data = vec![value; (range.end - range.start) as usize];
    let piece = Piece::Guest(GuestRef::from_slice(&data));
    image.write(&SimEngine, piece, range.start, false).await
}

impl Stage {
    fn new(kind: Kind, seed: u64) -> Stage {
        Stage::with(kind, seed, FileOptions::default())
    }

    fn with(kind: Kind, seed: u64, options: FileOptions) -> Stage {
        let mut rng = Rng::new(seed);
        let disk = SimDisk::new(rng.next_u64());
        let alloc = if kind.extended_l2 { u32::MAX } else { 1 };
        let bytes = build(kind, |cluster| match cluster % 3 {
            0 => Cluster::Data { bytes: vec![0x11; kind.cluster as usize], alloc, zero: 0 },
            1 => Cluster::Reserved,
            _ => Cluster::Nothing,
        });
        disk.create_with("image", options, &bytes);
        if kind.backing {
            let read_only = FileOptions { read_only: true, ..FileOptions::default() };
            disk.create_with("base", read_only, &vec![0x33; kind.size as usize]);
        }
        let image = disk.block_on(open(&disk, &config(kind))).unwrap();
        let base = disk.block_on(async {
            let added = image.bitmap_add(b"frozen", SECTOR as u32, true);
            let image = go(image, added);
            write(&image, 512..1024, 1).await.unwrap();
            write(&image, 4096..4608, 2).await.unwrap();
            let disabled = image.bitmap_set_enabled(&SimEngine, b"frozen", false).await;
            let image = go(image, disabled);
            let added = image.bitmap_add(b"b", SECTOR as u32, true);
            let image = go(image, added);
            let base = content(&image).await;
            image.put_away(&SimEngine, &mut None).await.unwrap();
            base
        });
        let frozen = parts(kind.size, &[512..1024, 4096..4608]);
        Stage {
            kind,
            disk,
            rng: RefCell::new(rng),
            base: RefCell::new(base),
            known: RefCell::new(vec![false; (kind.size / SECTOR) as usize]),
            frozen: RefCell::new(vec![frozen]),
            thawed: RefCell::default(),
            what: format!("seed {seed}, {kind:?}"),
        }
    }

    async fn open(&self) -> Disk {
        let image = open(&self.disk, &config(self.kind)).await;
        image.unwrap_or_else(|error| panic!("{}: {error:?}", self.what))
    }

    fn below(&self, limit: u64) -> u64 {
        self.rng.borrow_mut().below(limit)
    }

    fn record(&self, range: &Range<u64>) {
        let mut known = self.known.borrow_mut();
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        sectors.for_each(|sector| known[sector as usize] = true);
    }

    /// One request, whatever it may be.
    async fn request(&self, image: &Disk) {
        let size = self.kind.size;
        let unit = [1, SECTOR, self.kind.cluster][self.below(3) as usize];
        let start = self.below(size) / unit * unit;
        let end = (start + unit * (1 + self.below(4))).min(size);
        let (range, value) = (start..end, self.below(200) as u8 + 20);
        match self.below(10) {
            0..=4 => {
                self.record(&range);
                write(image, range, value).await.unwrap();
            }
            5 | 6 => {
                self.record(&range);
                let flags = ZeroFlags { may_unmap: value & 1 == 1, ..ZeroFlags::default() };
                image.write_zeroes(&SimEngine, start, end - start, flags).await.unwrap();
            }
            7 => {
                self.record(&range);
                image.discard(&SimEngine, start, end - start).await.unwrap();
            }
            8 => {
                let cluster = self.kind.cluster;
                let start = start / cluster * cluster;
                let range = start..(start + cluster).min(size);
                self.record(&range);
                let data = vec![value; (range.end - range.start) as usize];
                let piece = Piece::Guest(GuestRef::from_slice(&data));
                match image.write_compressed(&SimEngine, piece, start, false).await {
                    Err(error) if is_taken(&error) => {}
                    result => result.unwrap(),
                }
            }
            _ => image.flush(&SimEngine).await.unwrap(),
        }
    }

    async fn requests(&self, image: &Disk, count: u64) {
        for _ in 0..count {
            self.request(image).await;
        }
    }

    /// Changes bitmaps, or something else that they have to survive.
    async fn change(&self, image: Disk) -> Disk {
        let engine = &SimEngine;
        match self.below(6) {
            0 => {
                self.base.replace(content(&image).await);
                self.known.borrow_mut().fill(false);
                let changed = image.bitmap_clear(engine, b"b").await;
                go(image, changed)
            }
            1 if self.thawed.borrow().is_none() => {
                let mut frozen = self.frozen.borrow().last().unwrap().clone();
                frozen.iter_mut().zip(&*self.known.borrow()).for_each(|(to, from)| *to |= from);
                self.frozen.borrow_mut().push(frozen);
                let changed = image.bitmap_merge(engine, b"frozen", b"b").await;
                go(image, changed)
            }
            2 => {
                // What it knows of from now on is durable now.
                image.flush(engine).await.unwrap();
                self.thawed.replace(Some(content(&image).await));
                let changed = image.bitmap_set_enabled(engine, b"frozen", true).await;
                go(image, changed)
            }
            3 => {
                let image = {
                    let added = image.bitmap_add(b"c", 1024, true);
                    go(image, added)
                };
                self.request(&image).await;
                let changed = image.bitmap_remove(engine, b"c").await;
                go(image, changed)
            }
            4 => {
                let meta = Meta::default();
                let taken = image.snapshot_create(engine, b"s", &meta, |_| Ok(())).await;
                let (result, replacement): (Result<_>, _) = taken.into();
                let image = go(image, (result.map(drop), replacement));
                self.request(&image).await;
                let deleted = image.snapshot_delete(engine, b"s", |_| false).await;
                go(image, deleted.into())
            }
            _ => image,
        }
    }

    /// Looks at a file, whatever has become of it.
    fn look(&self, left: &SimDisk, when: &str) {
        let what = format!("{}, {when}", self.what);
        let file = left.file("image").expect("there is an image");
        let report = imagecheck::check(&*file);
        let excused = |fault: &String| report.dirty && fault.starts_with("I4");
        let faults = report.faults();
        assert!(faults.iter().all(excused), "{what}: {faults:#?}");
        let bitmaps = read(&*file).unwrap_or_else(|error| panic!("{what}: {error}"));
        let now = State::of(left).active;
        for bitmap in &bitmaps {
            let judged = match &bitmap.name[..] {
                b"b" => covers(bitmap, &self.base.borrow(), &now),
                b"frozen" => self.look_at_frozen(bitmap, &now),
                _ => Ok(()),
            };
            judged.unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
        }
        for name in [&b"b"[..], b"frozen"] {
            assert!(bitmaps.iter().any(|bitmap| bitmap.name == name), "{what}: one is missing");
        }
    }

    fn look_at_frozen(
        &self,
        bitmap: &super::super::bitmaps::Stored,
        now: &[u8],
    ) -> std::result::Result<(), String> {
        match &*self.thawed.borrow() {
            _ if bitmap.in_use => Ok(()),
            Some(then) => covers(bitmap, then, now),
            None if self.frozen.borrow().contains(&bitmap.dirty) => Ok(()),
            None => Err(format!("frozen is {:?}", bitmap.dirty)),
        }
    }

    /// Runs tasks to their end, with crashes on the way.
    fn run(&self, tasks: Vec<Task<'_>>) {
        let mut crashes = self.rng.borrow_mut().fork();
        let outcome = self.disk.run_observed(tasks, |step| {
            let power = |unit| Crash::Power { unit };
            let crash = *crashes.pick(&[Crash::Process, power(512), power(512), power(4096)]);
            let left = self.disk.crash(crash, crashes.next_u64());
            self.look(&left, &format!("{crash:?} at step {step}"));
            ControlFlow::Continue(())
        });
        assert_eq!(outcome, Outcome::Done, "{}", self.what);
    }

    fn play<T>(&self, future: impl Future<Output = T>) -> T {
        let mut result = None;
        self.run(vec![Task::new("main", async { result = Some(future.await) })]);
        result.expect("it came to its end")
    }

    /// Closed: everything is right, exactly, and nothing is left over.
    fn closed(&self) {
        let left = self.disk.crash(Crash::Power { unit: 512 }, self.rng.borrow_mut().next_u64());
        self.look(&left, "after close");
        let file = left.file("image").unwrap();
        let bitmaps = read(&*file).unwrap();
        assert!(bitmaps.iter().all(|bitmap| !bitmap.in_use), "{}: one is in use", self.what);
        let b = bitmaps.iter().find(|bitmap| bitmap.name == b"b").unwrap();
        assert!(b.dirty == *self.known.borrow(), "{}: b is {:?}", self.what, b.dirty);
        let report = imagecheck::check(&*file);
        assert_eq!((report.leaks, report.dirty), (vec![], false), "{}", self.what);
    }
}

#[test]
fn bitmaps_know_of_every_change_or_say_that_they_do_not() {
    play_some(2, |seed| {
        for kind in kinds() {
            let stage = Stage::new(kind, seed);
            for _ in 0..2 {
                let image = stage.play(stage.open());
                stage.run(vec![
                    Task::new("one", stage.requests(&image, 5)),
                    Task::new("two", stage.requests(&image, 5)),
                ]);
                let image = stage.play(stage.change(image));
                stage.play(stage.requests(&image, 4));
                stage.play(image.put_away(&SimEngine, &mut None)).unwrap();
                stage.closed();
            }
        }
    });
}

/// Each kind by itself, so that none hides behind another.
#[test]
fn each_kind_of_change_is_known() {
    play_some(2, |seed| {
        // Writes fly in direct mode.
        let direct = FileOptions { alignment: 512, ..FileOptions::default() };
        let stage = Stage::with(kinds()[0], seed, direct);
        let cluster = stage.kind.cluster;
        let at = |number: u64| number * 3 * cluster;
        let image = stage.play(stage.open());
        stage.play(async {
            // Stored; then not.
            for range in [at(3)..at(3) + 512, at(4) + 2 * cluster..at(4) + 3 * cluster] {
                stage.record(&range);
                write(&image, range, 9).await.unwrap();
            }
            stage.record(&(at(6)..at(6) + cluster));
            image.write_zeroes(&SimEngine, at(6), cluster, ZeroFlags::default()).await.unwrap();
            stage.record(&(at(9)..at(9) + cluster));
            image.discard(&SimEngine, at(9), cluster).await.unwrap();
            let free = at(12) + 2 * cluster;
            stage.record(&(free..free + cluster));
            let data = vec![7; cluster as usize];
            let piece = Piece::Guest(GuestRef::from_slice(&data));
            image.write_compressed(&SimEngine, piece, free, false).await.unwrap();
        });
        // Many at once go to the ring as they are.
        let image = Arc::new(image);
        let shared = Image::simulated(image.clone());
        let queue = SimQueue::new(&shared, &stage.disk, 16).unwrap();
        stage.play(async {
            content(&image).await;
            for number in 13..25 {
                let mut buffer = Buffer::aligned(cluster as usize).unwrap();
                buffer.fill(0x55);
                stage.record(&(at(number)..at(number) + cluster));
                queue.write(buffer, at(number), WriteFlags::default(), number).unwrap();
            }
            let mut done = 0;
            while done < 12 {
                let _ = queue
                    .wait(1, 12, |completion| {
                        completion.result.unwrap();
                        done += 1;
                    })
                    .await;
            }
        });
        drop(queue);
        stage.play(image.put_away(&SimEngine, &mut None)).unwrap();
        stage.closed();
    });
}

/// What is written in place is there after a crash, so the mark has to be.
#[test]
fn a_bitmap_that_begins_to_record_is_marked_before_anything_changes() {
    play_some(4, |seed| {
        let stage = Stage::new(kinds()[0], seed);
        let image = stage.play(stage.open());
        stage.thawed.replace(Some(stage.play(content(&image))));
        let changed = stage.play(image.bitmap_set_enabled(&SimEngine, b"frozen", true));
        let image = go(image, changed);
        stage.play(async {
            for cluster in 1..16 {
                let start = cluster * 3 * stage.kind.cluster;
                stage.record(&(start..start + 512));
                write(&image, start..start + 512, 0x77).await.unwrap();
            }
        });
        stage.play(image.put_away(&SimEngine, &mut None)).unwrap();
        stage.closed();
    });
}

/// A bitmap's table has to fit the disk, or nobody opens the image.
#[test]
fn bitmaps_follow_the_size_through_crashes() {
    play_some(2, |seed| {
        // One cluster has bits for 2 MiB.
        let stage = Stage::new(Kind { size: 1 << 20, ..SMALL }, seed);
        let image = stage.play(stage.open());
        stage.play(stage.requests(&image, 3));
        let options = ResizeOptions { shrink: true, ..ResizeOptions::default() };
        let mut image = image;
        for size in [4 << 20, 512 << 10] {
            let mut crashes = stage.rng.borrow_mut().fork();
            let mut result = None;
            let task = Task::new("resize", async {
                let progress: &mut (dyn FnMut(u64, u64) -> bool + Send) = &mut |_, _| true;
                let changed = image.resize(&SimEngine, size, &options, progress).await;
                result = Some((changed.result, changed.disk));
            });
            let outcome = stage.disk.run_observed(vec![task], |step| {
                if step % 3 == 0 {
                    let left = stage.disk.crash(Crash::Power { unit: 512 }, crashes.next_u64());
                    let file = left.file("image").unwrap();
                    let bitmaps = read(&*file);
                    let bitmaps =
                        bitmaps.unwrap_or_else(|e| panic!("{} at {step}: {e}", stage.what));
                    assert_eq!(bitmaps.len(), 2);
                }
                ControlFlow::Continue(())
            });
            assert_eq!(outcome, Outcome::Done);
            image = go(image, result.unwrap());
        }
        stage.disk.block_on(image.put_away(&SimEngine, &mut None)).unwrap();
        let file = stage.disk.file("image").unwrap();
        let bitmaps = read(&*file).unwrap();
        let b = bitmaps.iter().find(|bitmap| bitmap.name == b"b").unwrap();
        assert!(!b.in_use && b.dirty[..] == stage.known.borrow()[..1024]);
        assert_eq!(imagecheck::check(&*file).leaks, []);
    });
}

/// Lets the `index`th operation of a kind fail, or all from there on, while the image is
/// closed or a bitmap is removed; false if there are not that many.
fn fail_one(kind: Kind, seed: u64, remove: bool, op: OpKind, index: u64) -> bool {
    let mut stage = Stage::new(kind, seed.wrapping_add(index));
    let forever = index % 3 == 1;
    stage.what += &format!(", remove: {remove}, {op:?} {index}, forever: {forever}");
    let image = stage.disk.block_on(async {
        let image = stage.open().await;
        stage.requests(&image, 6).await;
        image
    });
    let errno = if index % 2 == 0 && op != OpKind::Sync { libc::ENOSPC } else { libc::EIO };
    let pattern = Pattern::any().file("image").kind(op).after(index);
    stage.disk.inject(Fault { pattern, errno, forever });
    let played = match remove {
        false => {
            let closed = stage.disk.block_on(image.put_away(&SimEngine, &mut None));
            (closed, Replacement::Closed)
        }
        true => stage.disk.block_on(image.bitmap_remove(&SimEngine, b"frozen")),
    };
    stage.disk.clear_faults();
    let (result, image) = next(image, played);
    let failed = result.is_err();
    stage.what += &format!(", {result:?}");
    if let (Some(image), true) = (image, op != OpKind::Sync) {
        stage.disk.block_on(async {
            stage.requests(&image, 4).await;
            image.put_away(&SimEngine, &mut None).await.unwrap();
        });
        let file = stage.disk.file("image").unwrap();
        let b = read(&*file).unwrap().into_iter().find(|bitmap| bitmap.name == b"b").unwrap();
        assert!(!b.in_use && b.dirty == *stage.known.borrow(), "{}", stage.what);
        // A failure behind the change itself, which has taken place then, is a leak at worst.
        let gone = read(&*file).unwrap().iter().all(|bitmap| bitmap.name != b"frozen");
        if !forever && !gone {
            assert_eq!(imagecheck::check(&*file).leaks, [], "{}", stage.what);
        }
    }
    let file = stage.disk.file("image").unwrap();
    let report = imagecheck::check(&*file);
    let excused = |fault: &String| report.dirty && fault.starts_with("I4");
    assert!(report.faults().iter().all(excused), "{}: {:#?}", stage.what, report.faults());
    let now = State::of(&stage.disk).active;
    for bitmap in read(&*file).unwrap().iter().filter(|bitmap| bitmap.name == b"b") {
        covers(bitmap, &stage.base.borrow(), &now).unwrap();
    }
    // Whoever comes next can open it, and leaves it in order.
    stage.disk.block_on(async {
        let image = stage.open().await;
        image.put_away(&SimEngine, &mut None).await.unwrap();
    });
    failed
}

#[test]
fn bitmaps_that_cannot_be_stored_or_removed_are_never_wrong() {
    play_some(1, |seed| {
        for (kind, remove) in [(kinds()[0], false), (kinds()[0], true), (kinds()[2], false)] {
            for op in [OpKind::Read, OpKind::Write, OpKind::Sync, OpKind::Truncate] {
                let mut index = 0;
                while fail_one(kind, seed, remove, op, index) {
                    index += 1 + index / 8;
                }
                assert!(index > 0 || op == OpKind::Truncate || op == OpKind::Read, "no {op:?}");
            }
        }
    });
}
