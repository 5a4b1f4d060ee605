//! An image of any kind, damaged or not, and any requests to it, all decoded from
//! the input. What a check finds nothing wrong with has to behave: no request fails,
//! the disk reads as a byte array that had the same done to it, and in the end the
//! check finds nothing again. What is damaged may fail, and must do no harm.
#![no_main]

use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};
use qcow2rs::{ErrorKind, Image, OpenOptions, WriteFlags, ZeroFlags};
use qcow2rs_fuzz::bounds::{BELOW, REQUEST, bounded, expect, open, options};
use qcow2rs_fuzz::images::{IMAGES, KINDS};
use qcow2rs_fuzz::support::Bytes;
use qcow2rs_fuzz::support::damage::{Choices, assert_no_data_in_metadata, damage, targets};
use qcow2rs_fuzz::support::dissect::Dissected;
use qcow2rs_fuzz::support::memory_disk::MemoryDisk;

/// The guest's bytes.
const GUEST: u8 = 0xc3;
const REQUESTS: usize = 48;

/// Numbers of leaks; `None` where anything worse is found.
fn check(disk: &MemoryDisk) -> Option<u64> {
    let mut options = options(false, false);
    options.check_only = true;
    let image = open_disk(disk, &options)?;
    let (result, done) = bounded(disk, || image.check(&mut ()));
    (done.is_ok() && result.corruptions + result.check_errors == 0).then_some(result.leaks)
}

fn open_disk(disk: &MemoryDisk, options: &OpenOptions) -> Option<Image> {
    bounded(disk, || Image::open(disk.source(), options)).ok()
}

/// The disk, an image on it, and what the image should read as, where that is known.
struct Bench<'a> {
    disk: MemoryDisk,
    image: Image,
    options: OpenOptions,
    model: Option<Vec<u8>>,
    choices: Bytes<'a>,
}

impl Bench<'_> {
    /// Does what the next bytes of the input say. False: it is over.
    fn step(&mut self) -> bool {
        let size = self.image.size();
        let what = self.choices.below(16);
        let unit = [1, 512, 4096, 1][self.choices.below(4) as usize];
        let at = self.choices.below(size + 1) / unit * unit;
        let length = (self.choices.below(REQUEST) + 1).next_multiple_of(unit).min(size - at);
        let flags = self.choices.below(4);
        let range = at as usize..(at + length) as usize;
        let image = &self.image;
        let done = match what {
            0..=5 => {
                let data = vec![GUEST; length as usize];
                let compressed = flags == 1 && self.is_whole(at, length);
                let flags = WriteFlags { fua: flags == 0, compressed, ..WriteFlags::default() };
                match bounded(&self.disk, || image.write_at(&data, at, flags)) {
                    // Up to the first cluster that is allocated.
                    Err(error) if compressed && error.message().contains("discard it first") => {
                        self.follow(at, length, GUEST);
                        Ok(())
                    }
                    done => done.inspect(|()| {
                        if let Some(model) = &mut self.model {
                            model[range].fill(GUEST);
                        }
                    }),
                }
            }
            6..=8 => {
                let flags = ZeroFlags { may_unmap: flags & 1 != 0, ..ZeroFlags::default() };
                bounded(&self.disk, || image.write_zeroes(at, length, flags)).inspect(|()| {
                    if let Some(model) = &mut self.model {
                        model[range].fill(0);
                    }
                })
            }
            9..=10 => {
                let done = bounded(&self.disk, || image.discard(at, length));
                self.follow_discard(at, length);
                done
            }
            11 => bounded(&self.disk, || image.flush()),
            12 => bounded(&self.disk, || {
                image.block_status(at, length, flags & 1 != 0, 64, &mut |_| {})
            }),
            13 => return self.reopen(flags),
            14 => return self.change_bitmaps(flags),
            _ => {
                self.read(at, length);
                Ok(())
            }
        };
        self.judge(done);
        true
    }

    /// One of two bitmaps is there, or not; what is stored of them must not hurt anybody.
    fn change_bitmaps(&mut self, how: u64) -> bool {
        let (image, name) = (&self.image, [&b"a"[..], b"b"][self.choices.below(2) as usize]);
        let done = bounded(&self.disk, || match how {
            0 => image.bitmap_add(name, 512 << (name[0] & 3), true),
            1 => image.bitmap_remove(name),
            2 => image.bitmap_merge(name, b"a"),
            _ => image.bitmap_set_enabled(name, false),
        });
        match done.as_ref().map_err(|error| error.kind()) {
            // What is there already, or not there, or cannot be in this image.
            Err(
                ErrorKind::NotFound
                | ErrorKind::Exists
                | ErrorKind::InvalidArgument
                | ErrorKind::NotSupported
                | ErrorKind::Limit,
            ) => {}
            _ => self.judge(done),
        }
        true
    }

    fn judge(&self, done: qcow2rs::Result<()>) {
        match done {
            Err(error) if self.model.is_some() && error.errno() != 28 => {
                panic!("nothing was wrong with the image: {error:?}")
            }
            done => {
                if let Err(error) = &done {
                    // Half of what was to be done may be.
                    assert!(self.model.is_none() || error.errno() == 28);
                }
                expect(done);
            }
        }
    }

    /// Two answers are the same, and right.
    fn read(&self, at: u64, length: u64) {
        let mut answers = [vec![1; length as usize], vec![2; length as usize]];
        let done = answers
            .each_mut()
            .map(|answer| bounded(&self.disk, || self.image.read_at(answer, at)))
            .map(|done| done.map_err(|error| error.kind()));
        assert_eq!(done[0], done[1]);
        if let Some(model) = &self.model {
            assert_eq!(done[0], Ok(()), "nothing was wrong with the image");
            assert!(answers[0] == model[at as usize..][..length as usize], "wrong at {at:#x}");
        }
        if done[0].is_ok() {
            assert!(answers[0] == answers[1], "two answers at {at:#x}");
        }
    }

    /// Whether a range is clusters and nothing less.
    fn is_whole(&self, at: u64, length: u64) -> bool {
        let qcow2 = self.image.info().ok().and_then(|info| info.qcow2);
        let cluster = qcow2.map_or(1, |qcow2| u64::from(qcow2.cluster_size));
        let end = at + length;
        at % cluster == 0 && (end % cluster == 0 || end == self.image.size())
    }

    /// What was given up reads as before, as zero, or as what is below.
    fn follow_discard(&mut self, at: u64, length: u64) {
        self.follow(at, length, 0);
    }

    /// What may have become `value` reads as before, as that, or as what is below.
    fn follow(&mut self, at: u64, length: u64, value: u8) {
        let Some(model) = &mut self.model else { return };
        let mut now = vec![1; length as usize];
        self.image.read_at(&mut now, at).expect("nothing was wrong with the image");
        let model = &mut model[at as usize..][..length as usize];
        for (old, new) in model.iter().zip(&now) {
            assert!([*old, value, BELOW].contains(new), "foreign bytes after a change");
        }
        model.copy_from_slice(&now);
    }

    /// Anew, or to read only and back. False: that is not possible any more.
    fn reopen(&mut self, how: u64) -> bool {
        if how & 1 == 0 {
            for writable in [false, true] {
                let done = bounded(&self.disk, || self.image.reopen(writable, true));
                let refused = matches!(
                    done.as_ref().map_err(|error| error.kind()),
                    Err(ErrorKind::UnsupportedFeature | ErrorKind::ReadOnly)
                );
                if !refused {
                    self.judge(done);
                }
            }
            return self.image.info().is_ok_and(|info| info.writable);
        }
        let closed = bounded(&self.disk, || self.image.close());
        self.judge(closed);
        match open_disk(&self.disk, &self.options) {
            Some(image) => self.image = image,
            None => {
                assert!(self.model.is_none(), "nothing was wrong with the image");
                return false;
            }
        }
        true
    }

    /// All of the disk.
    fn contents(&self) -> Option<Vec<u8>> {
        let mut all = vec![0; self.image.size() as usize];
        let pieces = all.chunks_mut(REQUEST as usize).enumerate();
        for (index, piece) in pieces {
            self.image.read_at(piece, index as u64 * REQUEST).ok()?;
        }
        Some(all)
    }
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Bytes(Unstructured::new(data));
    let mut image = Dissected::of(IMAGES[choices.below(KINDS.len() as u64) as usize].clone());
    let places = targets(&image);
    let damages = choices.below(4);
    for _ in 0..damages {
        damage(&mut image, &places, &mut choices);
    }
    let disk = MemoryDisk::new(&image.bytes);
    let mut options = options(true, choices.below(2) == 1);
    options.discard_no_unref = choices.below(8) == 1;
    let leaks = check(&disk);
    let Some(opened) = open(&disk, &options) else { return };
    // Caches do not last; what a check took is not held against the requests.
    let mut bench = Bench { disk, image: opened, options, model: None, choices };
    if leaks.is_some() && bench.image.size() <= 1 << 20 {
        bench.model = bench.contents();
    }
    for _ in 0..REQUESTS {
        if bench.choices.0.is_empty() || !bench.step() {
            break;
        }
    }
    if bench.model.is_some() {
        assert_eq!(bench.contents(), bench.model, "what is not touched stays");
    }
    let closed = bounded(&bench.disk, || bench.image.close());
    if closed.as_ref().is_err_and(|error| error.kind() == ErrorKind::InvalidArgument) {
        // It was closed, and could not be opened again.
        return;
    }
    bench.judge(closed);
    let after = Dissected::of(bench.disk.bytes());
    assert_no_data_in_metadata(&image, &after, GUEST);
    if bench.model.is_some() {
        let now = check(&bench.disk).expect("a sound image became unsound");
        // Clusters behind the end of the file may be counted, which shows when it grows.
        assert!(damages > 0 || Some(now) <= leaks, "{now} clusters leaked");
    }
});
