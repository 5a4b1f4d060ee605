//! What a queue promises, one promise at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2rs::{Engine, ErrorKind, Image, OpenOptions, Queue, QueueOptions, Source};
use qcow2rs::{WriteFlags, ZeroFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::support::memory_disk::{Gate, MemoryDisk, Request};
use crate::support::{self, Scratch, assert_content, qemu_create};
use crate::{all, engines, one, queue};

const SIZE: u64 = 1 << 20;

/// A new image, open for writing.
fn image(scratch: &Scratch) -> Arc<Image> {
    let path = scratch.path("image");
    qemu_create(&path, "extended_l2=on", SIZE);
    Arc::new(support::open_rw(&path))
}

/// Whether the descriptor can be read, now or in so many seconds.
fn readable_in(queue: &Queue, seconds: i64) -> bool {
    let fd = queue.completion_fd().unwrap();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
    // The kernel interrupts, without a signal, to complete what was submitted.
    retry_on_intr(|| poll(&mut fds, Some(&limit))).unwrap() == 1
}

fn readable(queue: &Queue) -> bool {
    readable_in(queue, 0)
}

fn wait_readable(queue: &Queue) {
    assert!(readable_in(queue, 60), "not readable for ever");
}

fn for_engines(test: impl Fn(Engine)) {
    for engine in engines() {
        support::describe(format!("{engine:?}"), || test(engine));
    }
}

#[test]
fn every_kind_of_request_completes_once() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let queue = queue(&image, engine, 8);
        let flags = WriteFlags::default();
        queue.write(vec![7; 100_000], 5000, flags, 1).unwrap();
        assert_eq!(queue.in_flight(), 1);
        assert_eq!(queue.submit().unwrap(), 1);
        assert_eq!(queue.submit().unwrap(), 0);
        let completion = one(&queue);
        assert_eq!((completion.user_data, completion.buffer.unwrap().len()), (1, 100_000));
        completion.result.unwrap();
        queue.write_zeroes(10_000, 20_000, ZeroFlags::default(), 2).unwrap();
        one(&queue).result.unwrap();
        queue.discard(65536, 65536, 3).unwrap();
        one(&queue).result.unwrap();
        queue.flush(4).unwrap();
        one(&queue).result.unwrap();
        queue.read(vec![1; SIZE as usize], 0, 5).unwrap();
        queue.read(Vec::new(), SIZE, 6).unwrap();
        let mut done = all(&queue);
        done.sort_by_key(|completion| completion.user_data);
        assert!(done.iter().all(|completion| completion.result.is_ok()));
        let mut expected = vec![0; SIZE as usize];
        expected[5000..65536].fill(7);
        expected[10_000..30_000].fill(0);
        support::assert_same(done[0].buffer.as_ref().unwrap(), &expected);
        assert_eq!((done[1].user_data, done.len()), (6, 2));
        assert_eq!(queue.reap(10, |_| panic!("twice")).unwrap(), 0);
        image.close().unwrap();
    });
}

#[test]
fn a_full_queue_says_so_and_gives_the_buffer_back() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let queue = queue(&image, engine, 2);
        queue.read(vec![1; 512], 0, 1).unwrap();
        queue.flush(2).unwrap();
        let refused = queue.read(vec![9; 3], 0, 3).unwrap_err();
        assert_eq!(refused.error.errno(), libc::EAGAIN);
        assert_eq!(refused.buffer.unwrap(), [9; 3]);
        // Completed is not yet taken.
        queue.submit().unwrap();
        wait_readable(&queue);
        assert_eq!(queue.flush(3).unwrap_err().errno(), libc::EAGAIN);
        assert_eq!(queue.in_flight(), 2);
        assert_eq!(queue.wait(1, 1, None, |_| ()).unwrap(), 1);
        queue.flush(3).unwrap();
        assert_eq!(all(&queue).len(), 2);
        drop(queue);
        image.close().unwrap();
    });
}

#[test]
fn errors_come_as_completions() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let rw = image(&scratch);
        {
            let queue = queue(&rw, engine, 8);
            queue.read(vec![0; 512], SIZE - 511, 1).unwrap();
            assert_eq!(one(&queue).result.unwrap_err().kind(), ErrorKind::InvalidArgument);
            queue.write(vec![0; 1], u64::MAX, WriteFlags::default(), 1).unwrap();
            let completion = one(&queue);
            assert_eq!(completion.result.unwrap_err().kind(), ErrorKind::InvalidArgument);
            assert_eq!(completion.buffer.unwrap(), [0]);
        }
        rw.close().unwrap();
        let ro = Arc::new(support::open(&scratch.path("image")));
        let queue = queue(&ro, engine, 8);
        queue.write(vec![0; 1], 0, WriteFlags::default(), 1).unwrap();
        assert_eq!(one(&queue).result.unwrap_err().kind(), ErrorKind::ReadOnly);
        queue.discard(0, 65536, 1).unwrap();
        assert_eq!(one(&queue).result.unwrap_err().kind(), ErrorKind::ReadOnly);
        // After the image was closed, too.
        ro.close().unwrap();
        queue.read(vec![3; 5], 0, 7).unwrap();
        let completion = one(&queue);
        assert_eq!(completion.result.unwrap_err().errno(), libc::EINVAL);
        assert_eq!(completion.user_data, 7);
        assert_eq!(completion.buffer.unwrap(), [3; 5]);
        assert!(Queue::new(&ro, &QueueOptions::new()).is_err());
    });
}

#[test]
fn a_wait_is_checked_limited_and_ended() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let queue = queue(&image, engine, 4);
        let wait = |min, max, timeout| queue.wait(min, max, timeout, |_| ());
        let invalid = |result: qcow2rs::Result<usize>| {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidArgument);
        };
        invalid(wait(1, 1, None));
        queue.flush(1).unwrap();
        invalid(wait(2, 2, None));
        assert_eq!(wait(1, 0, None).unwrap(), 0);
        assert_eq!(wait(1, 1, None).unwrap(), 1);
        assert_eq!(wait(0, 5, None).unwrap(), 0);

        drop(queue);
        image.close().unwrap();
    });
}

#[test]
fn a_wake_up_or_the_time_ends_a_wait() {
    for_engines(|engine| {
        held_up(engine, |queue, gate| {
            queue.wake_up();
            assert_eq!(queue.wait(1, 1, None, |_| ()).unwrap(), 0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(20));
                    queue.wake_up();
                });
                assert_eq!(queue.wait(1, 1, None, |_| ()).unwrap(), 0);
            });
            let (start, limit) = (Instant::now(), Duration::from_millis(20));
            assert_eq!(queue.wait(1, 1, Some(limit), |_| ()).unwrap(), 0);
            assert!(start.elapsed() >= limit);
            assert_eq!(queue.wait(1, 1, Some(Duration::ZERO), |_| ()).unwrap(), 0);
            gate.open();
            one(queue).result.unwrap();
        });
    });
}

#[test]
fn a_request_that_another_thread_lets_go_on_makes_the_descriptor_readable() {
    for_engines(|engine| {
        held_up(engine, |queue, gate| {
            queue.reap(1, |_| panic!("too early")).unwrap();
            // Nothing but a wake-up that was left over may be told now.
            queue.reap(1, |_| panic!("too early")).unwrap();
            assert!(!readable(queue));
            gate.open();
            wait_readable(queue);
            let mut count = 0;
            while count == 0 {
                queue
                    .reap(1, |completion| {
                        completion.result.unwrap();
                        count += 1;
                    })
                    .unwrap();
            }
            assert_eq!((count, queue.in_flight()), (1, 0));
        });
    });
}

/// Calls `test` with a queue whose only request, a flush, waits for another thread's
/// blocking flush, which the gate holds up.
fn held_up(engine: Engine, test: impl FnOnce(&Queue, &Gate)) {
    let gate = Gate::new();
    let (image, _disk) = in_memory(&gate);
    let queue = queue(&image, engine, 4);
    image.write_at(&[1; 512], 0, WriteFlags::default()).unwrap();
    gate.close();
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| image.flush());
        gate.wait_for_one();
        queue.flush(1).unwrap();
        queue.submit().unwrap();
        test(&queue, &gate);
        flush.join().unwrap().unwrap();
    });
    drop(queue);
    image.close().unwrap();
}

/// An image in memory, whose flushes pass a gate.
fn in_memory(gate: &Gate) -> (Arc<Image>, MemoryDisk) {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "extended_l2=on", SIZE);
    let gate = gate.clone();
    let disk = MemoryDisk::with_hook(&std::fs::read(&path).unwrap(), move |request| {
        if matches!(request, Request::Flush) {
            gate.pass();
        }
        Ok(())
    });
    let image = Image::open(disk.source(), &OpenOptions::new().writable(true)).unwrap();
    (Arc::new(image), disk)
}

#[test]
fn the_users_storage_serves_too() {
    for_engines(|engine| {
        let (image, _disk) = in_memory(&Gate::new());
        let queue = queue(&image, engine, 16);
        for number in 0..16 {
            let data = vec![number as u8 + 1; 70_000];
            queue.write(data, number * 65_536 / 2, WriteFlags::default(), number).unwrap();
        }
        assert!(all(&queue).into_iter().all(|completion| completion.result.is_ok()));
        queue.read(vec![0; 512], 0, 1).unwrap();
        assert_eq!(one(&queue).buffer.unwrap(), [1; 512]);
        drop(queue);
        image.close().unwrap();
    });
}

#[test]
fn the_descriptor_is_readable_while_completions_wait() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let queue = queue(&image, engine, 8);
        assert!(!readable(&queue));
        for number in 0..3 {
            queue.read(vec![0; 4096], number * 4096, number).unwrap();
        }
        queue.submit().unwrap();
        wait_readable(&queue);
        let take = || queue.reap(1, |completion| completion.result.unwrap()).unwrap();
        while take() == 0 {}
        assert!(readable(&queue), "two more");
        while queue.in_flight() > 0 {
            wait_readable(&queue);
            take();
        }
        take();
        assert!(!readable(&queue), "nothing is left");

        // Disabled, and enabled with something there.
        queue.set_completion_fd_enabled(false).unwrap();
        queue.write(vec![1; 4096], 0, WriteFlags::default(), 1).unwrap();
        queue.read(vec![0; 4096], 8192, 1).unwrap();
        queue.submit().unwrap();
        assert!(!readable(&queue));
        queue.set_completion_fd_enabled(true).unwrap();
        wait_readable(&queue);
        assert_eq!(all(&queue).len(), 2);

        let mut options = QueueOptions::new();
        options.engine = engine;
        options.completion_fd = false;
        let without = Queue::new(&image, &options).unwrap();
        assert!(without.completion_fd().is_none());
        let refused = without.set_completion_fd_enabled(true).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotSupported);
        without.flush(1).unwrap();
        one(&without).result.unwrap();
        drop((queue, without));
        image.close().unwrap();
    });
}

#[test]
fn a_queue_that_goes_waits_for_its_requests() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let image = image(&scratch);
        for submit in [false, true] {
            let queue = queue(&image, engine, 64);
            for number in 0..60 {
                let data = vec![submit as u8 + 1; 10_000];
                queue.write(data, number * 10_000, WriteFlags::default(), number).unwrap();
            }
            queue.flush(60).unwrap();
            if submit {
                queue.submit().unwrap();
            }
            drop(queue);
            let mut expected = vec![0; SIZE as usize];
            expected[..600_000].fill(submit as u8 + 1);
            assert_content(&image, &expected);
        }
        image.close().unwrap();
    });
}

#[test]
fn who_needs_the_image_alone_is_told_of_requests_in_flight() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let queue = queue(&image, engine, 4);
        queue.write(vec![5; 4096], 0, WriteFlags::default(), 1).unwrap();
        let busy = |result: qcow2rs::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Busy);
        };
        busy(image.reopen(false, true));
        queue.submit().unwrap();
        busy(image.reopen(false, true));
        one(&queue).result.unwrap();
        // An idle queue stays, and finds the image as it is now.
        image.reopen(false, true).unwrap();
        queue.write(vec![6; 4096], 0, WriteFlags::default(), 2).unwrap();
        assert_eq!(one(&queue).result.unwrap_err().kind(), ErrorKind::ReadOnly);
        image.invalidate().unwrap();
        image.reopen(true, true).unwrap();
        queue.write(vec![7; 4096], 4096, WriteFlags::default(), 3).unwrap();
        one(&queue).result.unwrap();
        queue.read(vec![0; 8192], 0, 4).unwrap();
        assert_eq!(one(&queue).buffer.unwrap(), [[5; 4096], [7; 4096]].concat());

        // Close carries out what is in flight.
        queue.write(vec![8; 4096], 8192, WriteFlags::default(), 5).unwrap();
        queue.flush(6).unwrap();
        image.close().unwrap();
        let again = support::open(&scratch.path("image"));
        assert_eq!(support::read(&again, 8192, 4096), [8; 4096]);
        let done = all(&queue);
        assert!(done.len() == 2 && done.iter().all(|completion| completion.result.is_ok()));
    });
}

#[test]
fn an_abandoned_image_carries_nothing_on() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let image = image(&scratch);
        let queue = queue(&image, engine, 4);
        queue.write(vec![5; 4096], 0, WriteFlags::default(), 1).unwrap();
        queue.flush(2).unwrap();
        image.abandon().unwrap();
        let done = all(&queue);
        assert_eq!(done.len(), 2);
        for completion in done {
            assert_eq!(completion.result.unwrap_err().kind(), ErrorKind::Cancelled);
            assert!(completion.buffer.is_some() == (completion.user_data == 1));
        }
        drop(queue);
        let again = support::open(&scratch.path("image"));
        assert_eq!(support::read(&again, 0, 4096), [0; 4096]);
    });
}

/// Requests that stay in flight until they are reaped exist with io_uring only.
fn with_a_flush_in_flight(test: impl FnOnce(&Arc<Image>, &Queue)) {
    if !engines().contains(&Engine::IoUring) {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "extended_l2=on", SIZE);
    let options = OpenOptions::new().writable(true);
    let image = Arc::new(Image::open(Source::path(&path), &options).unwrap());
    let queue = queue(&image, Engine::IoUring, 4);
    image.write_at(&[1; 512], 0, WriteFlags::default()).unwrap();
    queue.flush(1).unwrap();
    queue.submit().unwrap();
    test(&image, &queue);
    assert!(all(&queue).into_iter().all(|completion| completion.result.is_ok()));
    drop(queue);
    image.close().unwrap();
}

#[test]
fn a_call_that_would_wait_for_its_own_threads_queue_fails() {
    with_a_flush_in_flight(|image, queue| {
        image.write_at(&[2; 512], 0, WriteFlags::default()).unwrap();
        assert_eq!(image.flush().unwrap_err().errno(), libc::EDEADLK);
        // What need not wait works; and the queue is none the worse.
        assert_eq!(support::read(image, 0, 512), [2; 512]);
        one(queue).result.unwrap();
        image.flush().unwrap();
    });
}

#[test]
fn a_call_that_waits_for_another_threads_queue_waits() {
    with_a_flush_in_flight(|image, queue| {
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| image.flush());
            std::thread::sleep(Duration::from_millis(60));
            assert!(!flush.is_finished());
            one(queue).result.unwrap();
            flush.join().unwrap().unwrap();
        });
    });
    // A call that another one waits for is no hope either.
    with_a_flush_in_flight(|image, _queue| {
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| image.flush());
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(image.flush().unwrap_err().errno(), libc::EDEADLK);
            one(_queue).result.unwrap();
            flush.join().unwrap().unwrap();
        });
    });
}

#[test]
fn a_thread_that_waits_on_one_queue_carries_its_others_on() {
    for engine in engines() {
        with_a_flush_in_flight(|image, first| {
            let second = queue(image, engine, 4);
            image.write_at(&[3; 512], 0, WriteFlags::default()).unwrap();
            second.flush(2).unwrap();
            one(&second).result.unwrap();
            // Its completion is still to be had, and told of.
            wait_readable(first);
        });
        with_a_flush_in_flight(|image, _first| {
            let second = queue(image, engine, 4);
            second.flush(2).unwrap();
            second.submit().unwrap();
            drop(second);
        });
    }
}

#[test]
fn requests_outlive_the_thread_that_submitted_them() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        qemu_create(&path, "extended_l2=on", SIZE);
        let options = OpenOptions::new().writable(true);
        let image = Arc::new(Image::open(Source::path(&path), &options).unwrap());
        let queue = queue(&image, engine, 64);
        // Holes are punched one after the other: most wait when the thread ends.
        for _ in 0..10 {
            image.write_at(&[7; SIZE as usize], 0, WriteFlags::default()).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for number in 0..SIZE / 65_536 {
                        queue.discard(number * 65_536, 65_536, number).unwrap();
                    }
                    queue.submit().unwrap();
                });
            });
            let done = all(&queue);
            assert_eq!(done.len() as u64, SIZE / 65_536);
            done.into_iter().for_each(|completion| completion.result.unwrap());
            assert_content(&image, &[0; SIZE as usize]);
        }
        drop(queue);
        image.close().unwrap();
    });
}

#[test]
fn a_flush_covers_what_completed_on_other_queues() {
    for_engines(|engine| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        qemu_create(&path, "", SIZE);
        let image = Image::open(Source::path(&path), &OpenOptions::new().writable(true)).unwrap();
        let image = Arc::new(image);
        let (a, b) = (queue(&image, engine, 4), queue(&image, engine, 4));
        a.write(vec![9; 65536], 0, WriteFlags::default(), 1).unwrap();
        one(&a).result.unwrap();
        let before = image.stats().storage_syncs;
        b.flush(1).unwrap();
        one(&b).result.unwrap();
        assert!(image.stats().storage_syncs > before);
        drop((a, b));
        // Nothing that closing would do is needed for it.
        image.abandon().unwrap();
        assert_eq!(support::read(&support::open(&path), 0, 65536), vec![9; 65536]);
    });
}

#[test]
fn what_the_system_refuses_is_an_error_and_leaks_nothing() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let mut options = QueueOptions::new();
    assert!(options.set("depth", "0").is_err());
    assert!(options.set("engine", "aio").is_err());
    assert!(options.set("completion-fd", "yes").is_err());
    assert_eq!(options.set("size", "1").unwrap_err().kind(), ErrorKind::NotFound);
    options.set("depth", "3").unwrap();
    options.set("engine", "blocking").unwrap();
    options.set("completion-fd", "off").unwrap();
    let queue = Queue::new(&image, &options).unwrap();
    assert_eq!((queue.engine(), options.depth()), (Engine::Blocking, 3));
    if !engines().contains(&Engine::IoUring) {
        options.set("engine", "io_uring").unwrap();
        let refused = Queue::new(&image, &options).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::NotSupported);
        options.set("engine", "auto").unwrap();
        assert_eq!(Queue::new(&image, &options).unwrap().engine(), Engine::Blocking);
    }
}
