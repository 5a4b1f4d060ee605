//! Operations on a disk that QEMU, the library and a byte array can all carry
//! out, and the images that they are tried on.

use std::path::Path;

use qcow2rs::{Image, WriteFlags, ZeroFlags};

use super::{Rng, qemu_create};

/// What an image is like.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub version: u32,
    pub cluster_size: u64,
    pub extended_l2: bool,
    pub refcount_bits: u32,
    pub size: u64,
    pub backing: Backing,
}

/// What is below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    None,
    /// A raw file of so many bytes.
    Raw(u64),
    /// A qcow2 image of so many bytes, with data, holes and zeroes.
    Qcow2(u64),
}

impl Case {
    /// Makes the backing file in the directory of `image`, if there is to be one.
    /// Returns what a disk on top of it reads as.
    pub fn create_backing(&self, image: &Path, rng: &mut Rng) -> Vec<u8> {
        let mut content = match self.backing {
            Backing::None => Vec::new(),
            Backing::Raw(size) => {
                let mut bytes = vec![0; size as usize];
                rng.fill(&mut bytes);
                std::fs::write(image.with_file_name("base"), &bytes).unwrap();
                bytes
            }
            Backing::Qcow2(size) => {
                let path = image.with_file_name("base");
                qemu_create(&path, "cluster_size=4k", size);
                let case = Case { size, backing: Backing::None, cluster_size: 4096, ..*self };
                let ops: Vec<Op> = (0..12).map(|_| case.op(rng, true)).collect();
                let mut bytes = vec![0; size as usize];
                ops.iter().for_each(|op| op.model(&case, &mut bytes));
                super::qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
                bytes
            }
        };
        content.resize(self.size as usize, 0);
        content
    }

    /// As behind `-o` of `qemu-img`, without a backing file.
    pub fn options(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut options = format!("compat={compat},cluster_size={}", self.cluster_size);
        if self.version > 2 {
            options += &format!(",refcount_bits={}", self.refcount_bits);
        }
        if self.extended_l2 {
            options += ",extended_l2=on";
        }
        options
    }

    /// Makes an empty image; the backing file is there already.
    pub fn create(&self, image: &Path) {
        let mut options = self.options();
        match self.backing {
            Backing::None => {}
            Backing::Raw(_) => options += ",backing_file=base,backing_fmt=raw",
            Backing::Qcow2(_) => options += ",backing_file=base,backing_fmt=qcow2",
        }
        qemu_create(image, &options, self.size);
    }

    /// Bytes of a subcluster (the cluster, without extended L2 entries).
    pub fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size / 32 } else { self.cluster_size }
    }

    /// A range of the disk. Where it begins and ends is aligned in many ways.
    pub fn range(&self, rng: &mut Rng) -> (u64, u64) {
        let units = [1, 512, 4096, self.subcluster_size(), self.cluster_size];
        let unit = units[rng.below(5) as usize];
        let start = rng.below(self.size) / unit * unit;
        let most = [unit, 4 * unit, 3 * self.cluster_size][rng.below(3) as usize];
        let len = (rng.below(most) + 1).next_multiple_of(unit).min(self.size - start);
        (start, len)
    }

    /// A random operation. `aligned`: discards cover whole clusters, which QEMU
    /// and we treat alike.
    pub fn op(&self, rng: &mut Rng, aligned: bool) -> Op {
        let (at, len) = self.range(rng);
        match rng.below(10) {
            0..=4 => Op::Write { at, len, byte: rng.below(255) as u8 + 1 },
            5..=6 => Op::Zero { at, len, unmap: rng.below(2) == 0 },
            7..=8 if aligned => {
                let first = at / self.cluster_size * self.cluster_size;
                let end = (at + len).next_multiple_of(self.cluster_size).min(self.size);
                Op::Discard { at: first, len: end - first }
            }
            7..=8 => Op::Discard { at, len },
            _ => Op::Flush,
        }
    }
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read {
        at: u64,
        len: u64,
    },
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Zero {
        at: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        at: u64,
        len: u64,
    },
    /// Whole clusters that are not allocated, or compressed.
    Compress {
        at: u64,
        len: u64,
        byte: u8,
    },
    Flush,
}

impl Op {
    /// As a command of `qemu-io`.
    pub fn qemu_io(&self) -> String {
        match *self {
            Op::Read { at, len } => format!("read {at} {len}"),
            Op::Write { at, len, byte } => format!("write -P {byte} {at} {len}"),
            Op::Zero { at, len, unmap: true } => format!("write -z -u {at} {len}"),
            Op::Zero { at, len, unmap: false } => format!("write -z {at} {len}"),
            Op::Discard { at, len } => format!("discard {at} {len}"),
            Op::Compress { at, len, byte } => format!("write -c -P {byte} {at} {len}"),
            Op::Flush => "flush".into(),
        }
    }

    /// Through the library.
    pub fn apply(&self, image: &Image) {
        self.try_apply(image).unwrap_or_else(|error| panic!("{self:?}: {error}"));
    }

    /// As `apply`, where it may fail.
    pub fn try_apply(&self, image: &Image) -> qcow2rs::Result<()> {
        match *self {
            Op::Read { at, len } => image.read_at(&mut vec![0; len as usize], at),
            Op::Write { at, len, byte } => {
                image.write_at(&vec![byte; len as usize], at, WriteFlags::default())
            }
            Op::Zero { at, len, unmap: may_unmap } => {
                image.write_zeroes(at, len, ZeroFlags { may_unmap, ..Default::default() })
            }
            Op::Discard { at, len } => image.discard(at, len),
            Op::Compress { at, len, byte } => {
                let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
                image.write_at(&vec![byte; len as usize], at, flags)
            }
            Op::Flush => image.flush(),
        }
    }

    /// On a byte array. Discards count where they cover clusters, as in QEMU.
    pub fn model(&self, case: &Case, bytes: &mut [u8]) {
        match *self {
            Op::Write { at, len, byte } | Op::Compress { at, len, byte } => {
                bytes[at as usize..(at + len) as usize].fill(byte);
            }
            Op::Zero { at, len, .. } => bytes[at as usize..(at + len) as usize].fill(0),
            Op::Discard { at, len } => {
                // In version 2 only data can hide a backing file: it stays.
                if case.version == 2 && case.backing != Backing::None {
                    return;
                }
                let start = at.next_multiple_of(case.cluster_size);
                let end = match at + len == case.size {
                    true => case.size,
                    false => (at + len) / case.cluster_size * case.cluster_size,
                };
                if start < end {
                    bytes[start as usize..end as usize].fill(0);
                }
            }
            Op::Read { .. } | Op::Flush => {}
        }
    }

    /// On a byte array, after the library did it: where a discard leaves us a
    /// choice, what we chose is looked at.
    pub fn follow(&self, case: &Case, image: &Image, bytes: &mut [u8]) {
        match *self {
            Op::Discard { at, len } => follow_discard(image, at, len, bytes),
            _ => self.model(case, bytes),
        }
    }
}

/// Each sector of a discarded range reads as before or as zero; the model follows.
fn follow_discard(image: &Image, at: u64, len: u64, model: &mut [u8]) {
    follow_read(&super::read(image, at, len), at, model);
}

/// The same, with what was read of the range from `at` on.
pub fn follow_read(now: &[u8], at: u64, model: &mut [u8]) {
    let len = now.len() as u64;
    let model = &mut model[at as usize..(at + len) as usize];
    let first = (512 - at % 512).min(len) as usize;
    let sectors = std::iter::once(0..first)
        .chain((first..now.len()).step_by(512).map(|start| start..now.len().min(start + 512)));
    for sector in sectors {
        let (new, old) = (&now[sector.clone()], &model[sector.clone()]);
        let zero = new.iter().all(|byte| *byte == 0);
        assert!(zero || new == old, "foreign bytes {:#x} after a discarded offset", sector.start);
    }
    model.copy_from_slice(now);
}
