//! A storage that answers differently each time: bytes of metadata, or any, are
//! others at each read, and so is the length. Nobody can make sense of that; but
//! there is no panic, no loop without an end, and no access far from the image.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use qcow2rs::io::callbacks::{Abilities, Callbacks, UserIo, UserResult};
use qcow2rs::io::sim::{GuestMut, GuestRef};
use qcow2rs::{ErrorKind, Image, Source};

use crate::images::{ALL, CHANGES, change, image, options};
use crate::memory::peak;
use crate::support::damage::targets;
use crate::support::memory_disk::{MemoryDisk, Request};
use crate::support::{Rng, describe, for_seeds};

/// Calls of the storage that one call of the library may need.
const CALLS: u64 = 3000;
/// More than all that these images can become: the disk, and its tables.
const FAR: u64 = 8 << 20;
const MEMORY: u64 = 8 << 20;

/// How a storage lies.
#[derive(Clone, Copy, Debug)]
enum Lies {
    /// About fields and table entries.
    Metadata,
    /// A bit of anything, now and then.
    Bits,
    /// Any bytes instead of what is asked for, now and then.
    Garbage,
    /// About its length.
    Length,
}

const LIES: [Lies; 4] = [Lies::Metadata, Lies::Bits, Lies::Garbage, Lies::Length];

/// A disk whose length is another one each time that it is asked for.
struct Elastic {
    disk: MemoryDisk,
    noise: AtomicU64,
    lies: bool,
}

impl Elastic {
    fn length_now(&self) -> UserResult<u64> {
        let there = self.disk.length();
        if !self.lies {
            return Ok(there);
        }
        let mut rng = Rng::new(self.noise.fetch_add(1, SeqCst));
        Ok(match rng.below(6) {
            0 => 0,
            1 => there / 2,
            2 => there + rng.below(FAR / 2),
            3 => rng.below(there),
            4 => there.next_multiple_of(1 << 16),
            _ => there,
        })
    }
}

impl UserIo for Elastic {
    fn abilities(&self) -> Abilities {
        self.disk.abilities()
    }

    fn read(&self, to: GuestMut<'_>, offset: u64) -> UserResult<()> {
        self.disk.read(to, offset)
    }

    fn write(&self, from: GuestRef<'_>, offset: u64) -> UserResult<()> {
        self.disk.write(from, offset)
    }

    fn length(&self) -> UserResult<u64> {
        self.length_now()
    }

    fn flush(&self) -> UserResult<()> {
        self.disk.flush()
    }

    fn truncate(&self, length: u64) -> UserResult<()> {
        self.disk.truncate(length)
    }

    fn discard(&self, offset: u64, length: u64) -> UserResult<()> {
        self.disk.discard(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> UserResult<()> {
        self.disk.write_zeroes(offset, length, may_unmap)
    }
}

/// Counts calls, and has every one within bounds.
struct Liar {
    source: Arc<Source>,
    calls: Arc<AtomicU64>,
}

impl Liar {
    fn new(bytes: &[u8], places: Vec<std::ops::Range<u64>>, lies: Lies, seed: u64) -> Liar {
        let calls = Arc::new(AtomicU64::new(0));
        let counter = calls.clone();
        let hook = move |request: Request<'_>| {
            let mut rng = Rng::new(seed ^ counter.fetch_add(1, SeqCst) << 20);
            match request {
                Request::Read(answer, offset) => {
                    lie(answer, offset, &places, lies, &mut rng);
                    // Not more than is there can be asked for, but for a table.
                    assert!(answer.len() as u64 <= FAR, "{} bytes at once", answer.len());
                }
                Request::Write(data, offset) => {
                    assert!(data.len() as u64 <= FAR, "{} bytes at {offset:#x}", data.len());
                }
                _ => {}
            }
            Ok(())
        };
        let disk = MemoryDisk::with_hook(bytes, hook);
        let lies = matches!(lies, Lies::Length);
        let elastic = Elastic { disk, noise: AtomicU64::new(seed), lies };
        Liar { source: Source::callbacks(Callbacks::new(Box::new(elastic), false)), calls }
    }

    /// One call of the library, in bounded work and memory.
    fn bounded<R>(&self, call: impl FnOnce() -> R) -> R {
        let before = self.calls.load(SeqCst);
        let (result, bytes) = peak(call);
        let calls = self.calls.load(SeqCst) - before;
        assert!(calls < CALLS, "{calls} calls of the storage");
        assert!(bytes < MEMORY, "{bytes} bytes of memory");
        result
    }
}

fn lie(answer: &mut [u8], offset: u64, places: &[std::ops::Range<u64>], lies: Lies, rng: &mut Rng) {
    match lies {
        Lies::Metadata => {
            for range in places {
                let at = range.start + rng.below(range.end - range.start);
                let inside = at.checked_sub(offset).filter(|at| *at < answer.len() as u64);
                if let Some(at) = inside.filter(|_| rng.below(3) == 0) {
                    answer[at as usize] ^= 1 << rng.below(8);
                }
            }
        }
        Lies::Bits if rng.below(4) == 0 => {
            let at = rng.below(answer.len() as u64) as usize;
            answer[at] ^= 1 << rng.below(8);
        }
        Lies::Garbage if rng.below(12) == 0 => {
            let from = rng.below(answer.len() as u64) as usize;
            rng.fill(&mut answer[from..]);
        }
        _ => {}
    }
}

/// Everything that can be done with an image. Errors are fine.
fn use_it(liar: &Liar, image: &Image, rng: &mut Rng) {
    let size = image.size().min(1 << 20);
    let mut buf = vec![0; 64 << 10];
    for _ in 0..30 {
        let at = rng.below(size.max(1));
        let len = (1 << rng.below(16)).min(size - at.min(size));
        let done = liar.bounded(|| match rng.below(10) {
            kind @ 0..=5 if len > 1 => change(image, CHANGES[(kind % 5) as usize], at, len),
            6 => image.flush(),
            7 => image.block_status(at, len, false, 100, &mut |_| {}),
            8 => image.check(&mut ()).1,
            9 => image.reopen(rng.below(2) == 0, true),
            _ => image.read_at(&mut buf[..len as usize], at),
        });
        // The image may have been closed, or be of another size, by a reopen.
        if let Err(ErrorKind::Panic) = done.map_err(|error| error.kind()) {
            panic!("a panic was caught");
        }
    }
    let _ = liar.bounded(|| image.info_json());
}

#[test]
fn storage_that_answers_differently_each_time_does_no_harm() {
    for_seeds("hostile", 12, |seed| {
        for (number, kind) in ALL.into_iter().enumerate() {
            let sound = image(kind);
            for lies in LIES {
                let mut rng = Rng::new(seed * 100 + number as u64);
                let liar = Liar::new(&sound.bytes, targets(&sound), lies, seed);
                describe(format!("{kind:?}, {lies:?}"), || {
                    for turn in 0..4 {
                        let mut options = options(turn > 0);
                        options.check_only = turn == 3;
                        options.max_metadata_size = MEMORY / 4;
                        // Slices are read again and again.
                        options.set("l2-cache-size", "1k").unwrap();
                        options.set("l2-cache-entry-size", "512").unwrap();
                        let opened = liar.bounded(|| Image::open(liar.source.clone(), &options));
                        let Ok(image) = opened else { continue };
                        use_it(&liar, &image, &mut rng);
                        let _ = liar.bounded(|| image.close());
                    }
                });
            }
        }
    });
}
