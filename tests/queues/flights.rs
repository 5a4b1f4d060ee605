//! Requests that go to the ring as they are, without a future: those with aligned
//! buffers whose place in the file is known; next to others, which do not.

use std::path::Path;
use std::sync::Arc;

use qcow2rs::{Buffer, Engine, ErrorKind, Image, OpenOptions, Policy, Queue, Source, WriteFlags};

use crate::support::memory_disk::{MemoryDisk, Request};
use crate::support::{Rng, Scratch, assert_content, assert_same, describe, for_seeds};
use crate::support::{qemu_create, qemu_img_check, qemu_io};
use crate::{all, engines, queue, sandboxed};

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// An image all of which is stored, and its content.
fn stored(path: &Path) -> Vec<u8> {
    qemu_create(path, "", SIZE);
    qemu_io(path, &[format!("write -P 1 0 {SIZE}")]);
    vec![1; SIZE as usize]
}

/// Where the disk lies in the file: in one piece, behind everything else.
fn start(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let start = bytes.len() - SIZE as usize;
    assert!(bytes[start - 1] != 1 && bytes[start..].iter().all(|byte| *byte == 1));
    start as u64
}

/// With O_DIRECT, where writes fly, or without, where reads do if there are many.
/// `None`: there is no direct I/O where the tests run.
fn open(path: &Path, direct: bool) -> Option<Arc<Image>> {
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    (options.direct, options.no_flush) = (direct, true);
    match Image::open(Source::path(path), &options) {
        Err(error) if direct && error.kind() == ErrorKind::NotSupported => None,
        image => {
            let image = image.unwrap();
            known(&image);
            Some(Arc::new(image))
        }
    }
}

/// What has to be loaded to find the disk in the file is in memory from now on.
fn known(image: &Image) {
    image.read_at(&mut [0], 0).unwrap();
}

fn for_modes(test: impl Fn(Engine, bool)) {
    for engine in engines() {
        for direct in [false, true] {
            describe(format!("{engine:?}, direct: {direct}"), || test(engine, direct));
        }
    }
}

fn aligned(len: u64, byte: u8) -> Buffer {
    let mut buffer = Buffer::aligned(len as usize).unwrap();
    buffer.fill(byte);
    buffer
}

/// Reads the whole disk in `count` requests at once.
fn assert_reads(queue: &Queue, content: &[u8], count: usize) {
    let part = content.len() / count;
    for number in 0..count {
        let at = (number * part) as u64;
        queue.read(aligned(part as u64, 0xee), at, number as u64).unwrap();
    }
    for done in all(queue) {
        done.result.unwrap();
        let start = done.user_data as usize * part;
        assert_same(&done.buffer.unwrap(), &content[start..start + part]);
    }
}

/// What is asked for in one block.
fn ask(queue: &Queue, rng: &mut Rng, block: u64, content: &mut [u8]) {
    let byte = rng.below(250) as u8 + 2;
    let (mut at, mut len) = (block * BLOCK, BLOCK);
    if rng.below(4) == 0 {
        // A part of it, which is read first where writes are direct.
        (at, len) = (at + rng.below(2) * 512, 1 + rng.below(1000));
    }
    let buffer = match rng.below(4) {
        0 => vec![byte; len as usize].into(),
        _ => aligned(len, byte),
    };
    let old = &mut content[at as usize..(at + len) as usize];
    match rng.below(3) {
        0 => queue.read(buffer, at, block).unwrap(),
        _ => {
            old.fill(byte);
            queue.write(buffer, at, WriteFlags::default(), block).unwrap();
        }
    }
}

#[test]
fn flights_and_futures_leave_what_was_asked_for() {
    for_seeds("queues", 1, |seed| {
        for_modes(|engine, direct| {
            let (scratch, mut rng) = (Scratch::new(), Rng::new(seed));
            let path = scratch.path("image");
            let mut content = stored(&path);
            let Some(image) = open(&path, direct) else { return };
            let queue = queue(&image, engine, 64);
            for round in 0..60 {
                // One is done by itself; many go to the ring together.
                let count = [1, 7, 64][round % 3];
                let first = rng.below(SIZE / BLOCK);
                for number in 0..count {
                    let block = (first + number) % (SIZE / BLOCK);
                    ask(&queue, &mut rng, block, &mut content);
                }
                if rng.below(2) == 0 {
                    queue.submit().unwrap();
                }
                for done in all(&queue) {
                    done.result.unwrap();
                    let buffer = done.buffer.unwrap();
                    let at = (done.user_data * BLOCK) as usize;
                    if buffer.len() as u64 == BLOCK {
                        assert_same(&buffer, &content[at..at + buffer.len()]);
                    }
                }
            }
            for count in [1, 64] {
                assert_reads(&queue, &content, count);
            }
            drop(queue);
            assert_content(&image, &content);
            image.close().unwrap();
            qemu_img_check(&path);
        });
    });
}

/// The ring says how much there was, which is less.
#[test]
fn what_lies_past_the_end_of_the_file_reads_as_zero() {
    for_modes(|engine, direct| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let mut content = stored(&path);
        let start = start(&path);
        for end in [SIZE - 5000, SIZE - 65536 - 700, SIZE / 2 + 512] {
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(start + end).unwrap();
            content[end as usize..].fill(0);
            let mut options = OpenOptions::new();
            options.direct = direct;
            let image = match Image::open(Source::path(&path), &options) {
                Err(error) if direct && error.kind() == ErrorKind::NotSupported => return,
                image => Arc::new(image.unwrap()),
            };
            let queue = queue(&image, engine, 64);
            for count in [1, 4, 16, 64] {
                assert_reads(&queue, &content, count);
            }
            drop(queue);
            image.close().unwrap();
        }
    });
}

/// The image, with writes of all of it under way; the addresses of their buffers.
fn writing(path: &Path, engine: Engine) -> Option<(Arc<Image>, Queue, Vec<*const u8>)> {
    stored(path);
    let image = open(path, true)?;
    let queue = queue(&image, engine, 32);
    let mut addresses = Vec::new();
    for number in 0..16 {
        let buffer = aligned(SIZE / 16, 7);
        addresses.push(buffer.as_ptr());
        queue.write(buffer, number * (SIZE / 16), WriteFlags::default(), number).unwrap();
    }
    queue.submit().unwrap();
    Some((image, queue, addresses))
}

#[test]
fn an_abandoned_image_hands_back_what_the_kernel_has() {
    for engine in engines() {
        let scratch = Scratch::new();
        let Some((image, queue, addresses)) = writing(&scratch.path("image"), engine) else {
            return;
        };
        image.abandon().unwrap();
        let done = all(&queue);
        assert_eq!(done.len(), 16);
        for completion in done {
            if let Err(error) = completion.result {
                assert_eq!(error.kind(), ErrorKind::Cancelled);
            }
            let mut buffer = completion.buffer.unwrap();
            assert_eq!(buffer.as_ptr(), addresses[completion.user_data as usize]);
            // Nobody else has it any more.
            buffer.fill(0xdd);
        }
        drop(queue);
        let bytes = std::fs::read(scratch.path("image")).unwrap();
        assert!(!bytes.windows(512).any(|window| window == [0xdd; 512]));
    }
}

#[test]
fn a_queue_that_goes_and_an_image_that_closes_wait_for_flights() {
    for engine in engines() {
        for close in [false, true] {
            let scratch = Scratch::new();
            let path = scratch.path("image");
            let Some((image, queue, _)) = writing(&path, engine) else { return };
            if close {
                image.close().unwrap();
                assert!(all(&queue).into_iter().all(|done| done.result.is_ok()));
                drop(queue);
            } else {
                drop(queue);
                image.close().unwrap();
            }
            assert_content(&crate::support::open(&path), &vec![7; SIZE as usize]);
        }
    }
}

/// A request that panics ends the queue; what the kernel has comes back.
#[test]
fn flights_come_back_after_a_panic_next_to_them() {
    for engine in engines() {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let below = MemoryDisk::with_hook(&vec![9; SIZE as usize], |request| {
            assert!(!matches!(request, Request::Reading(at) if at >= SIZE / 2), "as told");
            Ok(())
        });
        qemu_create(&path, "", SIZE);
        qemu_io(&path, &[format!("write -P 1 0 {}", SIZE / 2)]);
        let args = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "below"];
        let args: Vec<&str> = args.into_iter().chain([crate::support::text(&path)]).collect();
        crate::support::qemu_ok("qemu-img", &args);
        let policy = Policy::Resolve(Arc::new(below));
        let mut options = OpenOptions::new().policy(policy).writable(true);
        options.direct = true;
        options.backing_direct = Some(false);
        let image = match Image::open(Source::path(&path), &options) {
            Err(error) if error.kind() == ErrorKind::NotSupported => return,
            image => Arc::new(image.unwrap()),
        };
        known(&image);
        let queue = queue(&image, engine, 32);
        for number in 0..16 {
            let (byte, flags) = (number as u8 + 10, WriteFlags::default());
            queue.write(aligned(BLOCK, byte), number * BLOCK, flags, number).unwrap();
        }
        queue.submit().unwrap();
        queue.read(aligned(BLOCK, 0), SIZE - BLOCK, 99).unwrap();
        let done = all(&queue);
        assert_eq!(done.len(), 17);
        for completion in done {
            match completion.user_data {
                99 => {
                    assert_eq!(completion.result.unwrap_err().kind(), ErrorKind::Panic);
                }
                number => {
                    completion.result.unwrap();
                    assert_eq!(completion.buffer.unwrap(), aligned(BLOCK, number as u8 + 10));
                }
            }
        }
        assert_eq!(queue.flush(1).unwrap_err().kind(), ErrorKind::Panic);
        drop(queue);
        assert_eq!(image.close().unwrap_err().kind(), ErrorKind::Panic);
    }
}

/// A compressed write is no transfer, wherever it goes.
#[test]
fn a_compressed_write_does_not_fly() {
    for_modes(|engine, direct| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let content = stored(&path);
        let Some(image) = open(&path, direct) else { return };
        let queue = queue(&image, engine, 64);
        let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
        for count in [1, 16] {
            for number in 0..count {
                queue.write(aligned(65536, 3), number * 65536, flags, number).unwrap();
            }
            for done in all(&queue) {
                assert_eq!(done.result.unwrap_err().errno(), libc::EIO);
                assert_eq!(done.buffer.unwrap(), aligned(65536, 3));
            }
        }
        drop(queue);
        assert_content(&image, &content);
        image.close().unwrap();
    });
}

/// Set in the process whose files may not be long.
const SHORT: &str = "QCOW2RS_SHORT_FILES";

fn ignore_the_signal() -> std::io::Result<()> {
    // SAFETY: no handler of ours runs.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Lets files be written up to there only.
fn limit_files(end: u64) {
    let limit = libc::rlimit { rlim_cur: end, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit lives until the call returns.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
}

fn write_as_far_as_it_goes() {
    for engine in engines() {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let mut content = stored(&path);
        let Some(image) = open(&path, true) else { return };
        let queue = queue(&image, engine, 32);
        // The last requests fail; one before them comes back short.
        limit_files(start(&path) + SIZE / 16 * 11 + SIZE / 32);
        for number in 0..16 {
            let at = number * (SIZE / 16);
            queue.write(aligned(SIZE / 16, 7), at, WriteFlags::default(), number).unwrap();
        }
        let mut failed = Vec::new();
        for done in all(&queue) {
            assert_eq!(done.buffer.unwrap(), aligned(SIZE / 16, 7));
            let part = (SIZE / 16 * done.user_data) as usize..;
            match done.result {
                Ok(()) => content[part][..SIZE as usize / 16].fill(7),
                Err(error) => {
                    assert_eq!(error.errno(), libc::EFBIG, "{error}");
                    assert!(error.to_string().contains("writing"), "{error}");
                    failed.push(done.user_data);
                }
            }
        }
        failed.sort_unstable();
        assert_eq!(failed, [11, 12, 13, 14, 15]);
        limit_files(libc::RLIM_INFINITY);
        // What came back short was written as far as it went.
        let half = SIZE as usize / 16 * 11;
        content[half..half + SIZE as usize / 32].fill(7);
        assert_reads(&queue, &content, 16);
        drop(queue);
        image.close().unwrap();
    }
}

#[test]
fn a_flight_that_fails_or_comes_back_short_says_so() {
    match std::env::var(SHORT) {
        Ok(_) => write_as_far_as_it_goes(),
        Err(_) => {
            let name = "flights::a_flight_that_fails_or_comes_back_short_says_so";
            sandboxed::run(&[name, "--exact"], &[(SHORT, "1")], ignore_the_signal);
        }
    }
}
