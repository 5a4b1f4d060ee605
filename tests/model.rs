//! Random operations against a plain byte array, over the matrix of cluster size,
//! extended L2 entries, refcount width, version and backing file. QEMU checks and
//! compares what is left.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test model` replays it.

mod support;

use qcow2rs::{CreateOptions, Format, Image, OpenOptions, Policy, Source, WriteFlags, ZeroFlags};
use support::{Rng, Scratch, qemu_img_check, qemu_img_compare};

#[derive(Clone, Copy, Debug)]
struct Case {
    version: u32,
    cluster_size: u64,
    extended_l2: bool,
    refcount_bits: u32,
    /// Bytes of the backing file; 0: none.
    backing: u64,
    size: u64,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for cluster_size in [512u64, 4096, 65536, 2 << 20] {
        for (version, refcount_bits) in [(2, 16), (3, 1), (3, 16), (3, 64)] {
            let size = (cluster_size * 40).clamp(200_704, 24 << 20) + 1536;
            for backing in [0, size / 2 + 700, size + 8192] {
                let extended_l2 = false;
                cases.push(Case {
                    version,
                    cluster_size,
                    extended_l2,
                    refcount_bits,
                    backing,
                    size,
                });
            }
        }
    }
    for cluster_size in [16384u64, 65536, 131072, 2 << 20] {
        for refcount_bits in [2, 16, 32] {
            let size = (cluster_size * 30).min(24 << 20) + 512 * 3;
            for backing in [0, size / 2 + 700, size + 8192] {
                let (version, extended_l2) = (3, true);
                cases.push(Case {
                    version,
                    cluster_size,
                    extended_l2,
                    refcount_bits,
                    backing,
                    size,
                });
            }
        }
    }
    cases
}

struct Run {
    scratch: Scratch,
    case: Case,
    rng: Rng,
    image: Image,
    model: Vec<u8>,
    backing: Vec<u8>,
}

impl Run {
    fn new(case: Case, seed: u64) -> Run {
        let scratch = Scratch::new();
        let mut rng = Rng::new(seed);
        let mut backing = vec![0; case.backing as usize];
        rng.fill(&mut backing);
        std::fs::write(scratch.path("base.raw"), &backing).unwrap();
        let mut options = CreateOptions::default();
        options.size = Some(case.size);
        options.version = case.version;
        options.cluster_size = case.cluster_size;
        options.extended_l2 = case.extended_l2;
        options.refcount_bits = case.refcount_bits;
        options.backing = (case.backing > 0).then(|| (b"base.raw".to_vec(), Format::Raw));
        let mut open = OpenOptions::new().policy(Policy::Paths);
        if rng.below(2) == 0 {
            // A cache of two slices: everything is evicted all the time.
            open.set("l2-cache-size", "1k").unwrap();
            open.set("l2-cache-entry-size", "512").unwrap();
        }
        let path = scratch.path("top.qcow2");
        let image = qcow2rs::create_path_open(&path, true, &options, &open).unwrap();
        let mut model = backing.clone();
        model.resize(case.size as usize, 0);
        Run { scratch, case, rng, image, model, backing }
    }

    fn range(&mut self) -> (usize, usize) {
        let size = self.case.size;
        let sub = if self.case.extended_l2 { self.case.cluster_size / 32 } else { 4096 };
        let unit = [1, 512, 4096, sub, self.case.cluster_size][self.rng.below(5) as usize];
        let start = self.rng.below(size) / unit * unit;
        let most = [unit, 4 * unit, 3 * self.case.cluster_size][self.rng.below(3) as usize];
        let len = (self.rng.below(most) + 1).next_multiple_of(unit).min(size - start);
        (start as usize, (start + len) as usize)
    }

    fn step(&mut self) {
        let (start, end) = self.range();
        let (offset, len) = (start as u64, (end - start) as u64);
        match self.rng.below(12) {
            0..=3 => {
                let mut data = vec![0; end - start];
                self.rng.fill(&mut data);
                let flags = WriteFlags { fua: self.rng.below(20) == 0, ..Default::default() };
                self.image.write_at(&data, offset, flags).unwrap();
                self.model[start..end].copy_from_slice(&data);
            }
            4 | 5 => {
                let may_unmap = self.rng.below(2) == 0;
                let flags = ZeroFlags { may_unmap, ..Default::default() };
                self.image.write_zeroes(offset, len, flags).unwrap();
                self.model[start..end].fill(0);
            }
            6 | 7 => {
                self.image.discard(offset, len).unwrap();
                self.check_discarded(start, end);
            }
            8 => self.image.flush().unwrap(),
            9 if self.rng.below(5) == 0 => self.reopen(),
            _ => self.compare(start, end),
        }
    }

    /// Each 512-byte sector of a discarded range reads as before or as zero.
    fn check_discarded(&mut self, start: usize, end: usize) {
        let mut now = vec![1; end - start];
        self.image.read_at(&mut now, start as u64).unwrap();
        let mut at = start;
        while at < end {
            let next = end.min((at / 512 + 1) * 512);
            let is = &now[at - start..next - start];
            let zero = is.iter().all(|byte| *byte == 0);
            assert!(zero || *is == self.model[at..next], "discard left foreign bytes at {at:#x}");
            at = next;
        }
        self.model[start..end].copy_from_slice(&now);
    }

    fn compare(&mut self, start: usize, end: usize) {
        let mut now = vec![1; end - start];
        self.image.read_at(&mut now, start as u64).unwrap();
        if now != self.model[start..end] {
            let at = now.iter().zip(&self.model[start..end]).position(|(a, b)| a != b).unwrap();
            panic!("wrong byte at {:#x} (read {start:#x}..{end:#x})", start + at);
        }
    }

    fn reopen(&mut self) {
        self.image.close().unwrap();
        let options = OpenOptions::new().policy(Policy::Paths).writable(true);
        let source = Source::path(self.scratch.path("top.qcow2"));
        self.image = Image::open(source, &options).unwrap();
    }

    fn finish(mut self) {
        self.compare(0, self.case.size as usize);
        self.image.close().unwrap();
        let top = self.scratch.path("top.qcow2");
        qemu_img_check(&top);
        let flat = self.scratch.path("model.raw");
        std::fs::write(&flat, &self.model).unwrap();
        qemu_img_compare(&top, "qcow2", &flat, "raw");
        let base = std::fs::read(self.scratch.path("base.raw")).unwrap();
        assert!(base == self.backing, "the backing file was written to");
    }
}

#[test]
fn random_operations_agree_with_a_byte_array() {
    support::for_seeds("model", 2, |seed| {
        for (number, case) in cases().into_iter().enumerate() {
            let seed = seed.wrapping_mul(1000) + number as u64;
            support::describe(format!("{case:?}"), || {
                let mut run = Run::new(case, seed);
                for _ in 0..150 {
                    run.step();
                }
                run.finish();
            });
        }
    });
}
