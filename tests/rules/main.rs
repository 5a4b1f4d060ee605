//! What the format and QEMU's driver demand at the borders, rule by rule: each
//! test is named for one. QEMU is asked wherever it can answer.

mod bitmaps;
mod entries;
mod header;
mod limits;
mod overlap;
mod refcounts;
mod reports;
#[path = "../support/mod.rs"]
mod support;
mod zeroes;

use std::path::Path;

use qcow2rs::{Image, OpenOptions, Policy, Source};
use support::dissect::Dissected;
use support::operations::Op;
use support::{qemu, text};

const KIB: u64 = 1024;
/// Bytes of a cluster, in most of the images here.
const CLUSTER: u64 = 64 * KIB;

/// How an operation on an image went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Outcome {
    done: bool,
    marked_corrupt: bool,
}

const DONE: Outcome = Outcome { done: true, marked_corrupt: false };
/// It failed, and the image says from now on that it is corrupt.
const CONDEMNED: Outcome = Outcome { done: false, marked_corrupt: true };

/// Carries out an operation on a copy of the image, opened for writing.
fn ours(image: &Path, op: Op) -> (Outcome, Dissected) {
    let copy = image.with_file_name("ours");
    std::fs::copy(image, &copy).unwrap();
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    options.no_flush = true;
    let done = Image::open(Source::path(&copy), &options)
        .and_then(|image| op.try_apply(&image).and_then(|()| image.close()))
        .is_ok();
    let after = Dissected::load(&copy);
    (Outcome { done, marked_corrupt: after.is_marked_corrupt() }, after)
}

/// The same in QEMU.
fn qemus(image: &Path, op: Op) -> (Outcome, Dissected) {
    let copy = image.with_file_name("qemus");
    std::fs::copy(image, &copy).unwrap();
    let command = op.qemu_io();
    let args = ["-f", "qcow2", "-d", "unmap", "--cache", "unsafe", "-c", &command, text(&copy)];
    let output = qemu("qemu-io", &args);
    let failed = String::from_utf8_lossy(&output.stdout).contains("failed");
    let after = Dissected::load(&copy);
    let done = output.status.success() && !failed;
    (Outcome { done, marked_corrupt: after.is_marked_corrupt() }, after)
}

/// Both programs come to the same end, which is returned, with our image.
fn agreed(image: &Path, op: Op) -> (Outcome, Dissected) {
    let (outcome, after) = ours(image, op);
    assert_eq!(outcome, qemus(image, op).0, "{op:?}: we, and QEMU");
    (outcome, after)
}
