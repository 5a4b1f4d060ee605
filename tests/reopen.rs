//! Opening again, closing, giving up: who may, who has to wait, what is left.

mod support;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use qcow2rs::{
    CreateOptions, Error, ErrorKind, Format, Image, OpenOptions, Policy, Reference, Resolver,
    Source, WriteFlags,
};
use support::{Scratch, qemu, qemu_img_check, qemu_ok, text};

const MIB: u64 = 1 << 20;

fn overlay(scratch: &Scratch) -> Image {
    std::fs::write(scratch.path("base.raw"), vec![7; MIB as usize]).unwrap();
    let mut options = CreateOptions::default();
    options.size = Some(8 * MIB);
    options.cluster_size = 128 << 10;
    options.extended_l2 = true;
    options.backing = Some((b"base.raw".to_vec(), Format::Raw));
    let open = OpenOptions::new().policy(Policy::Paths);
    qcow2rs::create_path_open(&scratch.path("top.qcow2"), true, &options, &open).unwrap()
}

fn byte_at(image: &Image, offset: u64) -> u8 {
    let mut byte = [0xee];
    image.read_at(&mut byte, offset).unwrap();
    byte[0]
}

#[test]
fn access_changes_back_and_forth() {
    let scratch = Scratch::new();
    let image = overlay(&scratch);
    let top = scratch.path("top.qcow2");
    for round in 0..4u8 {
        image.write_at(&[round + 1; 4096], 4096 * u64::from(round), WriteFlags::default()).unwrap();
        image.reopen(false, true).unwrap();
        // Flushed, nothing reserved, and readers are welcome.
        qemu_img_check(&top);
        assert_eq!(byte_at(&image, 4096 * u64::from(round)), round + 1);
        assert_eq!(byte_at(&image, 512 << 10), 7);
        let refused = image.write_at(&[0; 512], 0, WriteFlags::default());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);
        image.invalidate().unwrap();
        image.reopen(true, true).unwrap();
        assert_eq!(image.invalidate().unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert!(!qemu("qemu-img", &["check", text(&top)]).status.success(), "it is locked");
    }
    image.close().unwrap();
    qemu_img_check(&top);
}

#[test]
fn a_failed_reopen_leaves_the_old_state() {
    let scratch = Scratch::new();
    let image = overlay(&scratch);
    image.write_at(&[3; 4096], 0, WriteFlags::default()).unwrap();
    image.reopen(false, true).unwrap();
    // Another reader keeps us from writing.
    let path = scratch.path("top.qcow2");
    let options = OpenOptions::new().policy(Policy::Paths);
    let other = Image::open(Source::path(&path), &options).unwrap();
    assert_eq!(image.reopen(true, true).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(byte_at(&image, 0), 3);
    other.close().unwrap();
    // So does a missing backing file: the chain is opened again.
    std::fs::rename(scratch.path("base.raw"), scratch.path("gone")).unwrap();
    assert!(matches!(image.reopen(true, true).unwrap_err().kind(), ErrorKind::Backing(_)));
    assert_eq!(byte_at(&image, 512 << 10), 7, "the old chain is still open");
    std::fs::rename(scratch.path("gone"), scratch.path("base.raw")).unwrap();
    assert_eq!(
        Image::open(Source::path(&path), &options.clone().writable(true)).err().unwrap().kind(),
        ErrorKind::Locked,
        "the lock is held again"
    );
    image.reopen(true, true).unwrap();
    image.write_at(&[4; 4096], 0, WriteFlags::default()).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
}

/// Finds the backing file at first. Then it refuses, and another user comes for the
/// image that is being opened.
struct Intruder {
    dir: PathBuf,
    refuse: AtomicBool,
    got_in: Mutex<Vec<(bool, Image)>>,
}

impl Resolver for Intruder {
    fn resolve(
        &self,
        _: &Reference,
        _: Option<Format>,
    ) -> qcow2rs::Result<(Arc<Source>, Option<Format>)> {
        if !self.refuse.load(Ordering::SeqCst) {
            return Ok((Source::path(self.dir.join("base.raw")), Some(Format::Raw)));
        }
        let options = OpenOptions::new().policy(Policy::Paths);
        for writable in [true, false] {
            let source = Source::path(self.dir.join("top.qcow2"));
            if let Ok(image) = Image::open(source, &options.clone().writable(writable)) {
                self.got_in.lock().unwrap().push((writable, image));
            }
        }
        Err(Error::new(ErrorKind::Policy, "not now"))
    }
}

#[test]
fn nobody_gets_in_while_a_reopen_fails() {
    let scratch = Scratch::new();
    overlay(&scratch).close().unwrap();
    let path = scratch.path("top.qcow2");
    let intruder = Arc::new(Intruder {
        dir: path.parent().unwrap().to_owned(),
        refuse: AtomicBool::new(false),
        got_in: Mutex::default(),
    });
    let options = OpenOptions::new().policy(Policy::Resolve(intruder.clone())).writable(true);
    for (writable, lock) in [(true, true), (false, true), (true, false), (false, false)] {
        let what = format!("writable: {writable}, lock: {lock}");
        intruder.refuse.store(false, Ordering::SeqCst);
        let image = Image::open(Source::path(&path), &options).unwrap();
        intruder.refuse.store(true, Ordering::SeqCst);
        assert_eq!(image.reopen(writable, lock).unwrap_err().kind(), ErrorKind::Policy, "{what}");
        assert!(intruder.got_in.lock().unwrap().is_empty(), "{what}");
        assert!(!qemu("qemu-img", &["check", text(&path)]).status.success(), "{what}: locked");
        image.write_at(&[5; 4096], 0, WriteFlags::default()).unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
    }
}

#[test]
fn invalidate_sees_what_others_wrote() {
    let scratch = Scratch::new();
    overlay(&scratch).close().unwrap();
    let top = scratch.path("top.qcow2");
    let mut options = OpenOptions::new().policy(Policy::Paths);
    options.set("l2-cache-size", "1M").unwrap();
    options.lock = false;
    let image = Image::open(Source::path(&top), &options).unwrap();
    assert_eq!(byte_at(&image, 4096), 7);
    qemu_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 4k 4k", text(&top)]);
    image.invalidate().unwrap();
    assert_eq!(byte_at(&image, 4096), 9);
}

#[test]
fn abandoning_writes_nothing() {
    let scratch = Scratch::new();
    let image = overlay(&scratch);
    image.write_at(&[1; 4096], 0, WriteFlags::default()).unwrap();
    image.flush().unwrap();
    image.write_at(&[2; 4096], MIB, WriteFlags::default()).unwrap();
    let top = scratch.path("top.qcow2");
    let before = std::fs::read(&top).unwrap();
    image.abandon().unwrap();
    assert!(std::fs::read(&top).unwrap() == before);
    let refused = image.write_at(&[1; 512], 0, WriteFlags::default());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidArgument);
    // Flushed data is there, and leaks are all that is wrong.
    qemu_ok("qemu-img", &["check", "-r", "leaks", "-f", "qcow2", text(&top)]);
    let image = Image::open(Source::path(&top), &OpenOptions::new().policy(Policy::Paths)).unwrap();
    assert_eq!(byte_at(&image, 0), 1);
}

#[test]
fn opening_and_closing_writes_nothing() {
    let scratch = Scratch::new();
    overlay(&scratch).close().unwrap();
    let top = scratch.path("top.qcow2");
    let before = std::fs::read(&top).unwrap();
    let options = OpenOptions::new().policy(Policy::Paths).writable(true);
    let image = Image::open(Source::path(&top), &options).unwrap();
    image.flush().unwrap();
    let stats = image.stats();
    image.close().unwrap();
    // (The open: who wrote before may have left something to sync.)
    assert_eq!((stats.storage_writes, stats.storage_syncs), (0, 1));
    assert!(std::fs::read(&top).unwrap() == before);
}

#[test]
fn flushes_cost_one_sync_in_place_and_two_over_a_backing_file() {
    let scratch = Scratch::new();
    let image = overlay(&scratch);
    let syncs_of = |work: &dyn Fn()| {
        let before = image.stats().storage_syncs;
        work();
        image.flush().unwrap();
        image.stats().storage_syncs - before
    };
    let write = |offset| image.write_at(&[5; 4096], offset, WriteFlags::default()).unwrap();
    assert_eq!(syncs_of(&|| write(0)), 2, "allocating, the first L2 table included");
    assert_eq!(syncs_of(&|| write(8192)), 2, "another subcluster");
    assert_eq!(syncs_of(&|| write(8192)), 1, "in place");
    assert_eq!(syncs_of(&|| {}), 0, "nothing");
    assert_eq!(syncs_of(&|| image.discard(0, 4096).unwrap()), 1, "a discard");
    image.close().unwrap();
}

#[test]
fn close_does_not_pull_the_image_away_from_others() {
    let scratch = Scratch::new();
    let image = overlay(&scratch);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut buf = vec![0; 1 << 20];
            while !stop.load(Ordering::SeqCst) {
                image.read_at(&mut buf, 0).unwrap();
            }
        });
        let mut busy = 0;
        for _ in 0..1000 {
            match image.reopen(true, true) {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Busy);
                    busy += 1;
                }
            }
            if busy > 3 {
                break;
            }
        }
        assert!(busy > 0, "a reader was inside all the time");
        stop.store(true, Ordering::SeqCst);
        reader.join().unwrap();
    });
    image.close().unwrap();
    assert_eq!(image.close().unwrap_err().kind(), ErrorKind::InvalidArgument);
}
