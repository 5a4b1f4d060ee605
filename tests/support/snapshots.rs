//! Internal snapshots by QEMU, and the images whose snapshots are tested: all versions,
//! cluster sizes, widths of refcounts, and kinds of backing files.

use std::path::Path;

use super::operations::{Backing, Case};
use super::{qemu_ok, text};

/// `qemu-img snapshot`.
pub fn snapshot(image: &Path, args: &[&str]) {
    qemu_ok("qemu-img", &[&["snapshot"], args, &[text(image)]].concat());
}

/// What QEMU reads from a snapshot.
pub fn content_of(image: &Path, name: &str) -> Vec<u8> {
    let out = image.with_file_name("snapshot.raw");
    let select = format!("snapshot.name={name}");
    let args = ["convert", "-f", "qcow2", "-O", "raw", "-l", &select, text(image), text(&out)];
    qemu_ok("qemu-img", &args);
    std::fs::read(out).unwrap()
}

/// Version, cluster size, extended L2 entries, bits of a refcount.
pub type Layout = (u32, u64, bool, u32);

/// An image of each layout; what is below it differs from seed to seed.
pub fn cases(seed: u64, layouts: &[Layout]) -> Vec<Case> {
    let case = |(n, layout): (usize, &Layout)| {
        let (version, cluster_size, extended_l2, refcount_bits) = *layout;
        let size = (cluster_size * 40).clamp(100_352, 8 << 20) + 1536;
        let backings = [Backing::None, Backing::Raw(size / 2 + 512), Backing::Qcow2(size + 8192)];
        let backing = backings[(n + seed as usize) % backings.len()];
        Case { version, cluster_size, extended_l2, refcount_bits, size, backing }
    };
    layouts.iter().enumerate().map(case).collect()
}
