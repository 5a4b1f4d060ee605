//! Each operation of the storage fails once, and for good, in a workload that does a
//! bit of everything.

use qcow2rs::{ErrorKind, Image, OpenOptions};

use crate::bench::{Asked, BELOW, Bench, Failure, Model, SECTOR, image, kinds};
use crate::support::builder::Kind;
use crate::support::operations::Op;
use crate::support::{Scratch, describe, qemu, text};

/// New, shared, compressed and stored clusters are written to, in whole and in part;
/// zeroed; given up; flushed at times.
fn workload(kind: &Kind) -> Vec<Op> {
    let (cluster, part) = (kind.cluster, (kind.cluster / 8).max(SECTOR));
    let clusters = kind.clusters();
    let far = clusters / 2 / 4 * 4 * cluster;
    vec![
        Op::Write { at: 3 * cluster, len: part, byte: 201 },
        Op::Write { at: cluster, len: part, byte: 202 },
        Op::Flush,
        Op::Write { at: far, len: 5 * cluster, byte: 203 },
        Op::Discard { at: 4 * cluster, len: 3 * cluster },
        Op::Zero { at: far, len: part, unmap: false },
        Op::Write { at: 4 * cluster, len: 2 * cluster, byte: 204 },
        Op::Zero { at: 8 * cluster, len: 3 * cluster, unmap: true },
        Op::Flush,
        Op::Write { at: 5 * cluster, len: 4 * cluster, byte: 205 },
        Op::Read { at: 0, len: 8 * cluster },
        Op::Write { at: (clusters - 2) * cluster, len: 2 * cluster, byte: 206 },
        Op::Discard { at: 0, len: 2 * cluster },
        // Over what is compressed, and over nothing.
        Op::Compress { at: far + 9 * cluster, len: cluster, byte: 208 },
        Op::Compress { at: far + 11 * cluster, len: cluster, byte: 209 },
        Op::Flush,
        Op::Write { at: 0, len: part, byte: 207 },
    ]
}

/// What our check says: nothing is wrong; the number of leaks.
fn leaks(bench: &Bench) -> u64 {
    let mut options = OpenOptions::new();
    options.check_only = true;
    let (result, done) = Image::open(bench.disk.source(), &options).unwrap().check(&mut ());
    done.unwrap();
    assert_eq!(result.corruptions + result.check_errors, 0, "{result:?}");
    result.leaks
}

/// The same of QEMU's.
fn qemu_agrees(bench: &Bench, leaks: u64) {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    std::fs::write(&path, bench.disk.bytes()).unwrap();
    std::fs::write(scratch.path("base"), [BELOW; 512]).unwrap();
    let code = qemu("qemu-img", &["check", "-f", "qcow2", text(&path)]).status.code();
    // 3: there are leaks, and nothing is worse.
    assert_eq!(code, Some(if leaks > 0 { 3 } else { 0 }));
}

/// Whether the caller has to hear of it: space that cannot be given back is no loss,
/// and zeroes can be written where there is no quicker way.
fn matters(met: &[Asked]) -> bool {
    met.iter().any(|asked| !matches!(asked, Asked::Shrink | Asked::Zero))
}

/// The error is that of the storage.
fn assert_of(error: &qcow2rs::Error, failure: Failure, met: &[Asked], flush_failed: bool) {
    if flush_failed && error.kind() == ErrorKind::FlushFailed {
        return;
    }
    assert!(!met.is_empty(), "nothing failed in this call: {error}");
    assert_eq!(error.errno(), failure.errno, "{error}");
}

/// How the workload went.
struct Course {
    flush_failed: bool,
    failed: u64,
}

fn run(bench: &Bench, image: &Image, ops: &[Op], model: &mut Model, failure: Failure) -> Course {
    let mut course = Course { flush_failed: false, failed: 0 };
    for op in ops {
        let done = op.try_apply(image);
        let met = bench.met();
        course.flush_failed |= met.contains(&Asked::Flush);
        model.note(*op, done.is_ok());
        match done {
            Ok(()) => assert!(!matters(&met), "{op:?} succeeded although {met:?} failed"),
            Err(error) => {
                assert_of(&error, failure, &met, course.flush_failed);
                course.failed += 1;
                let reading = matches!(op, Op::Read { .. });
                if !failure.forever && !course.flush_failed {
                    // It can be done again at once.
                    op.try_apply(image).unwrap_or_else(|error| panic!("again: {op:?}: {error}"));
                    model.note(*op, true);
                } else if course.flush_failed && !reading {
                    // Nothing is, until the image is opened again.
                    let kind = op.try_apply(image).unwrap_err().kind();
                    assert_eq!(kind, ErrorKind::FlushFailed);
                }
            }
        }
    }
    course
}

/// Everything works, and in the end nothing is left over.
fn works(bench: &Bench, ops: &[Op], model: &mut Model, leaks_before: u64) {
    let image = bench.open().unwrap();
    model.compare(&image);
    for op in ops {
        op.apply(&image);
        model.note(*op, true);
        if matches!(op, Op::Discard { .. }) {
            model.compare(&image);
        }
    }
    model.compare(&image);
    image.close().unwrap();
    assert!(leaks(bench) <= leaks_before);
}

fn one(kind: &Kind, bytes: &[u8], failure: Failure, with_qemu: bool) {
    let bench = Bench::new(bytes, Some(failure));
    let ops = workload(kind);
    let mut model = Model::of(&Bench::new(bytes, None).open().unwrap());
    let mut left = 0;
    match bench.open() {
        Err(error) => {
            assert_of(&error, failure, &bench.met(), false);
            assert!(bench.disk.bytes() == bytes, "a failed open has changed the image");
        }
        Ok(image) => {
            let course = run(&bench, &image, &ops, &mut model, failure);
            if !failure.forever && !course.flush_failed {
                bench.calmly(|| model.compare(&image));
            }
            let closed = image.close();
            let met = bench.met();
            let refused = course.flush_failed || met.contains(&Asked::Flush);
            match closed {
                Ok(()) => {
                    assert!(!refused && !matters(&met), "closed although {met:?} failed");
                    model.note(Op::Flush, true);
                }
                Err(error) => assert_of(&error, failure, &met, refused),
            }
            bench.mend();
            left = leaks(&bench);
            let lossless = !refused && !matters(&met);
            assert!(left == 0 || !lossless, "{left} leaks though closing worked");
        }
    }
    if with_qemu {
        qemu_agrees(&bench, left);
    }
    bench.mend();
    model.start_again();
    works(&bench, &ops, &mut model, left);
}

#[test]
fn each_operation_fails_once_and_for_good() {
    for (number, kind) in kinds().into_iter().enumerate() {
        let bytes = image(&kind);
        let sound = Bench::new(&bytes, None);
        assert_eq!(leaks(&sound), 0);
        let before = sound.count();
        let mut model = Model::of(&sound.open().unwrap());
        works(&sound, &workload(&kind), &mut model, 0);
        let count = sound.count() - before;
        for index in 0..count {
            let other = [libc::EIO, libc::ENOSPC][(index % 2) as usize];
            for (errno, forever) in [(libc::EIO, false), (libc::ENOSPC, false), (other, true)] {
                let failure = Failure { index, errno, forever };
                // QEMU is slow to start.
                let with_qemu = (index + number as u64) % 17 == 0 && !forever;
                describe(format!("{kind:?}, {failure:?}"), || {
                    one(&kind, &bytes, failure, with_qemu);
                });
            }
        }
    }
}
