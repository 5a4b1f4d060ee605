//! What several tests need: a scratch directory, seeded random numbers, QEMU.
#![allow(dead_code)] // Each test uses its part of it.

pub mod aes;
pub mod builder;
pub mod damage;
pub mod dissect;
pub mod memory_disk;
pub mod operations;
pub mod refcounts;
pub mod snapshots;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use qcow2rs::{Image, OpenOptions, Policy, Source};

/// A directory that goes away, unless the test fails.
pub struct Scratch(Option<tempfile::TempDir>);

impl Scratch {
    pub fn new() -> Scratch {
        Scratch(Some(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.as_ref().unwrap().path().join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Some(dir) = self.0.take() {
                eprintln!("kept: {}", dir.keep().display());
            }
        }
    }
}

/// A small random number generator (splitmix64): the seed is all its state.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

impl damage::Choices for Rng {
    fn below(&mut self, limit: u64) -> u64 {
        Rng::below(self, limit)
    }
}

/// Runs `test` with `count` seeds, or with the one that `QCOW2RS_SEED` gives.
pub fn for_seeds(name: &str, count: u64, test: impl Fn(u64)) {
    if let Ok(seed) = std::env::var("QCOW2RS_SEED") {
        return test(seed.parse().expect("QCOW2RS_SEED is a number"));
    }
    let rounds: u64 = std::env::var("QCOW2RS_ROUNDS").map_or(1, |n| n.parse().unwrap());
    for seed in 1..=count * rounds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(seed))) {
            let thread = std::thread::current();
            let test = thread.name().unwrap_or_default();
            eprintln!("replay: QCOW2RS_SEED={seed} cargo test --test {name} {test}");
            resume_unwind(panic);
        }
    }
}

/// Says what was being done if `test` fails.
pub fn describe<R>(what: String, test: impl FnOnce() -> R) -> R {
    match catch_unwind(AssertUnwindSafe(test)) {
        Ok(result) => result,
        Err(panic) => {
            eprintln!("failed: {what}");
            resume_unwind(panic);
        }
    }
}

/// Runs a tool of QEMU; fails the test if it is not there.
pub fn qemu(tool: &str, args: &[&str]) -> Output {
    let output = Command::new(tool).args(args).output();
    output.unwrap_or_else(|error| panic!("{tool}: {error} (Debian package qemu-utils)"))
}

/// Runs a tool of QEMU that must succeed.
pub fn qemu_ok(tool: &str, args: &[&str]) -> String {
    let output = qemu(tool, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}:\n{text}{errors}");
    text
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// No corruption and no leak.
pub fn qemu_img_check(image: &Path) {
    qemu_ok("qemu-img", &["check", "-f", "qcow2", text(image)]);
}

/// The same content.
pub fn qemu_img_compare(a: &Path, a_format: &str, b: &Path, b_format: &str) {
    qemu_ok("qemu-img", &["compare", "-f", a_format, "-F", b_format, text(a), text(b)]);
}

/// Lets QEMU carry out `qemu-io` commands, all in one process and without syncs.
pub fn qemu_io(image: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2", "-d", "unmap", "--cache", "unsafe"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(text(image));
    // Some failures show in the text only.
    let printed = qemu_ok("qemu-io", &args);
    assert!(!printed.contains("failed") && !printed.contains("invalid"), "{printed}");
}

/// Makes an image with `qemu-img create`; `options` as behind `-o`.
pub fn qemu_create(image: &Path, options: &str, size: u64) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(image), &size]);
    qemu_ok("qemu-img", &args);
}

/// Opens an image and the files that it names, for reading.
pub fn open(image: &Path) -> Image {
    let options = OpenOptions::new().policy(Policy::Paths);
    Image::open(Source::path(image), &options).unwrap()
}

/// Opens an image and the files that it names, for writing. What is on disk after
/// a power loss is for others to test: no syncs.
pub fn open_rw(image: &Path) -> Image {
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    options.no_flush = true;
    Image::open(Source::path(image), &options).unwrap()
}

/// Caches of two slices each: everything is evicted all the time.
pub fn smallest_caches(options: &mut OpenOptions) {
    for name in ["l2-cache-size", "refcount-cache-size"] {
        options.set(name, "1k").unwrap();
    }
    options.set("l2-cache-entry-size", "512").unwrap();
}

/// As `open_rw`, half of the time with the smallest caches.
pub fn open_somehow(image: &Path, rng: &mut Rng) -> Image {
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    options.no_flush = true;
    if rng.below(2) == 0 {
        smallest_caches(&mut options);
    }
    Image::open(Source::path(image), &options).unwrap()
}

/// The bytes of a range of the disk.
pub fn read(image: &Image, offset: u64, len: u64) -> Vec<u8> {
    let mut buf = vec![0xee; len as usize];
    image.read_at(&mut buf, offset).unwrap();
    buf
}

/// Fails, naming the first place, where the disk does not hold `expected`.
pub fn assert_content(image: &Image, expected: &[u8]) {
    assert_eq!(image.size(), expected.len() as u64);
    assert_same(&read(image, 0, image.size()), expected);
}

/// Fails, naming the first place, where bytes differ.
pub fn assert_same(found: &[u8], expected: &[u8]) {
    if found != expected {
        let at = found.iter().zip(expected).position(|(a, b)| a != b);
        let at = at.unwrap_or_else(|| panic!("{} bytes, not {}", found.len(), expected.len()));
        panic!("at {at:#x}: {:#04x} where {:#04x} should be", found[at], expected[at]);
    }
}
