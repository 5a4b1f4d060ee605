//! What is left of an image after a panic inside a request: its storage's, here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use qcow2rs::{Completion, Engine, ErrorKind, Image, OpenOptions, WriteFlags};

use crate::support::builder::{Cluster, Kind, build};
use crate::support::memory_disk::{MemoryDisk, Request};
use crate::{all, engines, one, queue};

/// Nothing hangs, whatever was under way: the request completes, the other queue, the
/// calls that only look, and close all return.
#[test]
fn after_a_panic_in_a_request_everything_returns() {
    type Provoke = fn(&Request<'_>) -> bool;
    let writing: Provoke = |request| matches!(request, Request::Write(..));
    let flushing: Provoke = |request| matches!(request, Request::Flush);
    for engine in engines() {
        for provoke in [writing, flushing] {
            after_a_panic(engine, provoke);
        }
    }
}

fn after_a_panic(engine: Engine, provoke: fn(&Request<'_>) -> bool) {
    let armed = Arc::new(AtomicBool::new(false));
    let bytes = build(Kind::PLAIN, |_| Cluster::Nothing);
    let also = armed.clone();
    let hook = move |request: Request<'_>| {
        assert!(!(also.load(SeqCst) && provoke(&request)), "as told");
        Ok(())
    };
    let disk = MemoryDisk::with_hook(&bytes, hook);
    let options = OpenOptions::new().writable(true);
    let image = Arc::new(Image::open(disk.source(), &options).unwrap());
    let (first, second) = (queue(&image, engine, 4), queue(&image, engine, 4));
    let (size, flags) = (image.size(), WriteFlags::default());
    image.write_at(&[1; 512], 0, flags).unwrap();
    armed.store(true, SeqCst);
    first.write(vec![2; 512], 8192, flags, 1).unwrap();
    first.flush(2).unwrap();
    let done = all(&first);
    assert_eq!(done.len(), 2);
    let kind = |done: Completion| done.result.err().map(|error| error.kind());
    assert!(done.into_iter().any(|done| kind(done) == Some(ErrorKind::Panic)));
    armed.store(false, SeqCst);

    assert_eq!(image.size(), size);
    assert_eq!(image.stats().guest_writes, 0, "nothing is known any more");
    let poisoned = |error: qcow2rs::Error| assert_eq!(error.kind(), ErrorKind::Panic, "{error}");
    poisoned(image.write_at(&[3; 512], 0, flags).unwrap_err());
    poisoned(first.flush(3).unwrap_err());
    second.flush(4).unwrap();
    poisoned(one(&second).result.unwrap_err());
    // What is still in flight is seen to its end.
    second.write(vec![4; 512], 0, flags, 5).unwrap();
    poisoned(image.close().unwrap_err());
    assert_eq!(image.size(), 0, "closed all the same");
    poisoned(one(&second).result.unwrap_err());
}
