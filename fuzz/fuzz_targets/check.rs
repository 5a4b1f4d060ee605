//! Checking any bytes: it ends, within bounds, finds the same twice, and changes
//! nothing. As for `open`, the file is all but the last byte; that one says whether
//! the file is taken as it is or mended a little first, so that checks get far.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2rs::{CheckResult, Finding, Observer};
use qcow2rs_fuzz::bounds::{bounded, open, options};
use qcow2rs_fuzz::support::damage::{damage, targets};
use qcow2rs_fuzz::support::dissect::Dissected;
use qcow2rs_fuzz::support::memory_disk::MemoryDisk;
use qcow2rs_fuzz::{images::IMAGES, support::Bytes};

/// A check of more steps is given up, as a person would.
const PATIENCE: u64 = 3000;

#[derive(Default)]
struct Watch {
    findings: u64,
    steps: u64,
}

impl Observer for Watch {
    fn finding(&mut self, finding: &Finding) {
        assert!(!finding.message.is_empty());
        self.findings += 1;
    }

    fn progress(&mut self, _: u64, _: u64) -> bool {
        self.steps += 1;
        self.steps < PATIENCE
    }
}

fn check(disk: &MemoryDisk, sound: bool) -> Option<(CheckResult, u64, bool)> {
    let mut options = options(false, false);
    options.check_only = true;
    let image = open(disk, &options)?;
    let mut watch = Watch::default();
    let (result, done) = bounded(disk, || image.check(&mut watch));
    if watch.findings == 0 {
        let counted = result.corruptions + result.leaks + result.check_errors;
        assert_eq!(counted, 0, "counted, but not told: {result:?}");
    }
    if sound {
        assert!(done.is_ok() && watch.findings == 0, "{result:?}: {done:?}");
    }
    assert_eq!(disk.writes(), 0);
    Some((result, watch.findings, done.is_ok()))
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, file)) = data.split_last() else { return };
    let image = match usize::from(how).checked_sub(128) {
        // One of the sound images, damaged as the bytes say.
        Some(kind) => {
            let mut image = Dissected::of(IMAGES[kind % IMAGES.len()].clone());
            let mut choices = Bytes(libfuzzer_sys::arbitrary::Unstructured::new(file));
            let places = targets(&image);
            while !choices.0.is_empty() {
                damage(&mut image, &places, &mut choices);
            }
            image.bytes
        }
        None => file.to_vec(),
    };
    let sound = IMAGES.contains(&image);
    let disk = MemoryDisk::new(&image);
    let first = check(&disk, sound);
    assert_eq!(first, check(&disk, sound), "two answers");
});
