//! Many queues and blocking calls at once on one image: each has bytes of its own,
//! in clusters and sectors that it shares with the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use qcow2rs::{Engine, Image, OpenOptions, Policy, Source, WriteFlags, ZeroFlags};

use crate::support::operations::{Backing, Case};
use crate::support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, qemu_img_check, refcounts,
};
use crate::{engines, queue};

const WORKERS: usize = 5;
const DEPTH: u64 = 8;

fn cases() -> Vec<Case> {
    let case = Case {
        version: 3,
        cluster_size: 65536,
        extended_l2: true,
        refcount_bits: 16,
        size: 1 << 20,
        backing: Backing::Raw(700_000),
    };
    vec![
        case,
        Case { extended_l2: false, cluster_size: 4096, backing: Backing::None, ..case },
        Case { cluster_size: 16384, backing: Backing::Qcow2(900_000), ..case },
    ]
}

/// The stripes of a worker, with the others' in between.
fn stripes(worker: usize, stripe: usize, size: usize) -> Vec<(usize, usize)> {
    let starts = (worker * stripe..size).step_by(WORKERS * stripe);
    starts.map(|start| (start, (start + stripe).min(size))).collect()
}

/// Writes all stripes several times, with some in flight, and looks at them.
fn by_queue(image: &Arc<Image>, engine: Engine, mine: &[(usize, usize)], rng: &mut Rng) -> Vec<u8> {
    let queue = queue(image, engine, DEPTH as u32);
    let mut last = Vec::new();
    for round in 0..3 {
        let byte = rng.below(255) as u8 + 1;
        last = mine.iter().map(|_| if rng.below(4) == 0 { 0 } else { byte }).collect();
        let mut next = 0;
        while next < mine.len() || queue.in_flight() > 0 {
            while next < mine.len() && u64::from(queue.in_flight()) < DEPTH {
                let ((start, end), byte) = (mine[next], last[next]);
                match byte {
                    0 => {
                        let (at, len) = (start as u64, (end - start) as u64);
                        let flags = ZeroFlags { may_unmap: round == 1, ..Default::default() };
                        queue.write_zeroes(at, len, flags, 0).unwrap();
                    }
                    _ => {
                        let data = vec![byte; end - start];
                        queue.write(data, start as u64, WriteFlags::default(), 0).unwrap();
                    }
                }
                next += 1;
            }
            queue.wait(1, 8, None, |completion| completion.result.unwrap()).unwrap();
        }
        if round != 1 {
            queue.flush(0).unwrap();
        }
        for (index, (start, end)) in mine.iter().enumerate() {
            while u64::from(queue.in_flight()) >= DEPTH {
                look(&queue, &last);
            }
            queue.read(vec![0xee; end - start], *start as u64, index as u64 + 1).unwrap();
        }
        while queue.in_flight() > 0 {
            look(&queue, &last);
        }
    }
    last
}

fn look(queue: &qcow2rs::Queue, expected: &[u8]) {
    queue
        .wait(1, 4, None, |completion| {
            completion.result.unwrap();
            if let (index @ 1.., Some(read)) = (completion.user_data, completion.buffer) {
                assert_same(&read, &vec![expected[index as usize - 1]; read.len()]);
            }
        })
        .unwrap();
}

/// The same by blocking calls.
fn by_calls(image: &Image, mine: &[(usize, usize)], rng: &mut Rng) -> Vec<u8> {
    let mut last = Vec::new();
    for _ in 0..3 {
        last.clear();
        for (start, end) in mine {
            let byte = rng.below(255) as u8 + 1;
            let data = vec![byte; end - start];
            image.write_at(&data, *start as u64, WriteFlags::default()).unwrap();
            let mut read = vec![0; end - start];
            image.read_at(&mut read, *start as u64).unwrap();
            assert_same(&read, &data);
            last.push(byte);
        }
        image.flush().unwrap();
    }
    last
}

fn run(case: Case, direct: bool, seed: u64) {
    let (scratch, mut rng) = (Scratch::new(), Rng::new(seed));
    let path = scratch.path("image");
    let mut content = case.create_backing(&path, &mut rng);
    case.create(&path);
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    (options.no_flush, options.direct, options.backing_direct) = (!direct, direct, Some(false));
    if rng.below(2) == 0 {
        options.set("l2-cache-size", "1k").unwrap();
        options.set("l2-cache-entry-size", "512").unwrap();
    }
    let Ok(image) = Image::open(Source::path(&path), &options) else {
        assert!(direct, "only direct I/O may be missing");
        return;
    };
    let image = Arc::new(image);
    let stripe = 700 + rng.below(9000) as usize;
    let engines = engines();
    let done = AtomicUsize::new(0);
    let results: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (image, engines, done) = (&image, &engines, &done);
                let mut rng = Rng::new(rng.next());
                scope.spawn(move || {
                    let mine = stripes(worker, stripe, case.size as usize);
                    let written = match worker {
                        0 | 1 => by_calls(image, &mine, &mut rng),
                        _ => by_queue(image, engines[worker % engines.len()], &mine, &mut rng),
                    };
                    done.fetch_add(1, SeqCst);
                    written
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert_eq!(done.into_inner(), WORKERS);
    for (worker, bytes) in results.into_iter().enumerate() {
        for ((start, end), byte) in stripes(worker, stripe, content.len()).into_iter().zip(bytes) {
            content[start..end].fill(byte);
        }
    }
    assert_content(&image, &content);
    image.close().unwrap();
    qemu_img_check(&path);
    refcounts::assert_exact(&path);
}

#[test]
fn queues_and_threads_share_an_image() {
    for_seeds("queues", 1, |seed| {
        for (number, case) in cases().into_iter().enumerate() {
            for direct in [false, true] {
                let seed = seed * 1000 + number as u64;
                describe(format!("{case:?}, direct: {direct}"), || run(case, direct, seed));
            }
        }
    });
}
