//! External data files, beside QEMU: made here and used there, made there and used
//! here, the same operations in both. Needs qemu-img and qemu-io.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test data_file` replays it.

mod gate;
mod rules;
mod sizes;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};

use qcow2rs::{CreateOptions, Format, Image, OpenOptions, Policy, Source};
use support::dissect::Dissected;
use support::operations::{Backing, Case, Op};
use support::refcounts::assert_exact;
use support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, open, open_rw, open_somehow,
    qemu_create, qemu_img_check, qemu_img_compare, qemu_io, qemu_ok, text,
};

/// What the data file is to the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Data {
    Plain,
    /// A raw image by itself.
    Raw,
}

fn data_of(image: &Path) -> PathBuf {
    image.with_extension("data")
}

/// Made by QEMU; the backing file is there already.
fn qemu_makes(image: &Path, case: &Case, data: Data) {
    let name = data_of(image);
    let mut options = format!("{},data_file={}", case.options(), text(&name));
    match (data, case.backing) {
        (Data::Raw, _) => options += ",data_file_raw=on",
        (Data::Plain, Backing::None) => {}
        (Data::Plain, Backing::Raw(_)) => options += ",backing_file=base,backing_fmt=raw",
        (Data::Plain, Backing::Qcow2(_)) => options += ",backing_file=base,backing_fmt=qcow2",
    }
    qemu_create(image, &options, case.size);
}

fn create_options(image: &Path, case: &Case, data: Data) -> CreateOptions {
    let name = data_of(image);
    std::fs::write(&name, b"what was there before").unwrap();
    let mut options = CreateOptions::default();
    options.size = Some(case.size);
    options.cluster_size = case.cluster_size;
    options.extended_l2 = case.extended_l2;
    options.refcount_bits = case.refcount_bits;
    options.data_file = Some((text(&name).into(), Source::path(&name)));
    options.data_file_raw = data == Data::Raw;
    options.backing = match case.backing {
        Backing::None => None,
        Backing::Raw(_) => Some((b"base".to_vec(), Format::Raw)),
        Backing::Qcow2(_) => Some((b"base".to_vec(), Format::Qcow2)),
    };
    options
}

/// Made by the library.
fn we_make(image: &Path, case: &Case, data: Data) {
    let options = create_options(image, case, data);
    qcow2rs::create_path(image, true, &options, &OpenOptions::new()).unwrap();
}

fn for_cases(seeds: u64, test: impl Fn(Case, Data, &mut Rng)) {
    let layouts = [
        (512, false, 16),
        (4096, false, 1),
        (65536, false, 16),
        (65536, false, 64),
        (16384, true, 16),
        (65536, true, 16),
    ];
    for_seeds("data_file", seeds, |seed| {
        for (number, (cluster_size, extended_l2, refcount_bits)) in layouts.into_iter().enumerate()
        {
            let size = (cluster_size * 40).clamp(200_704, 4 << 20) + 1536;
            for (n, data) in [Data::Plain, Data::Plain, Data::Raw].into_iter().enumerate() {
                let backing = match n {
                    1 if number % 2 == 0 => Backing::Raw(size / 2 / 512 * 512 + 512),
                    1 => Backing::Qcow2(size + 8192),
                    _ => Backing::None,
                };
                let case =
                    Case { version: 3, cluster_size, extended_l2, refcount_bits, size, backing };
                let mut rng = Rng::new(seed.wrapping_mul(1000) + number as u64 * 3 + n as u64);
                describe(format!("{case:?} {data:?}"), || test(case, data, &mut rng));
            }
        }
    });
}

/// Sound for everybody; a raw data file is the disk.
fn assert_sound(image: &Path, data: Data, model: &[u8]) {
    qemu_img_check(image);
    assert_exact(image);
    let ours = open(image);
    assert_content(&ours, model);
    assert_eq!(ours.check(&mut ()).0.corruptions, 0);
    ours.close().unwrap();
    let flat = image.with_file_name("flat");
    std::fs::write(&flat, model).unwrap();
    qemu_img_compare(image, "qcow2", &flat, "raw");
    if data == Data::Raw {
        let mut bytes = std::fs::read(data_of(image)).unwrap();
        // QEMU writes the disk's last cluster as a whole.
        bytes.resize(model.len(), 0);
        assert_same(&bytes, model);
    }
}

fn assert_same_entries(ours: &Path, qemus: &Path) {
    let (ours, qemus) = (Dissected::load(ours), Dissected::load(qemus));
    for cluster in 0..ours.guest_clusters() {
        let (a, b) = (ours.entry(cluster), qemus.entry(cluster));
        assert!(a == b, "guest cluster {cluster}: {a:x?}, in QEMU {b:x?}");
    }
}

#[test]
fn the_same_operations_leave_the_same_entries() {
    for_cases(1, |case, data, rng| {
        let scratch = Scratch::new();
        let (ours, qemus) = (scratch.path("ours"), scratch.path("qemus"));
        let mut model = case.create_backing(&ours, rng);
        we_make(&ours, &case, data);
        qemu_makes(&qemus, &case, data);
        let ops: Vec<Op> = (0..40).map(|_| case.op(rng, true)).collect();
        let image = open_somehow(&ours, rng);
        for op in &ops {
            op.apply(&image);
            op.model(&case, &mut model);
        }
        assert_content(&image, &model);
        image.close().unwrap();
        qemu_io(&qemus, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
        // In a raw data file we leave entries as they are where zeroes come; see
        // docs/qemu-differences.md.
        if data == Data::Plain {
            assert_same_entries(&ours, &qemus);
        }
        if data == Data::Raw {
            assert_eq!(std::fs::metadata(data_of(&ours)).unwrap().len(), case.size);
        }
        assert_sound(&ours, data, &model);
        assert_sound(&qemus, data, &model);
    });
}

#[test]
fn qemu_and_we_take_turns_on_one_image() {
    for_cases(1, |case, data, rng| {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let mut model = case.create_backing(&path, rng);
        match rng.below(2) {
            0 => we_make(&path, &case, data),
            _ => qemu_makes(&path, &case, data),
        }
        for turn in 0..4 {
            let qemus_turn = turn % 2 == 0;
            let ops: Vec<Op> = (0..20).map(|_| case.op(rng, qemus_turn)).collect();
            if qemus_turn {
                qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
                ops.iter().for_each(|op| op.model(&case, &mut model));
            } else {
                let image = open_somehow(&path, rng);
                for op in &ops {
                    op.apply(&image);
                    op.follow(&case, &image, &mut model);
                }
                image.close().unwrap();
            }
            assert_sound(&path, data, &model);
        }
    });
}

/// Start, length, whether there is a place, and where.
type Mapped = (u64, u64, bool, Option<u64>);

/// As `qemu-img map` tells it, but for holes in the data file, which we do not ask for.
fn map(path: &Path) -> Vec<Mapped> {
    let printed = qemu_ok("qemu-img", &["map", "-f", "qcow2", "--output=json", text(path)]);
    let extents: Vec<serde_json::Value> = serde_json::from_str(&printed).unwrap();
    let extents = extents.iter().map(|extent| {
        let number = |name: &str| extent[name].as_u64();
        let switch = |name: &str| extent[name].as_bool().unwrap();
        let (start, length) = (number("start").unwrap(), number("length").unwrap());
        let stored = switch("present") && (switch("data") || number("offset").is_some());
        (start, length, stored, number("offset"))
    });
    joined(extents)
}

/// What differs in more than that is not looked at.
fn joined(extents: impl IntoIterator<Item = Mapped>) -> Vec<Mapped> {
    let mut joined: Vec<Mapped> = Vec::new();
    for next in extents {
        match joined.last_mut() {
            Some(last) if last.2 == next.2 && last.3.map(|at| at + last.1) == next.3 => {
                last.1 += next.1;
            }
            _ => joined.push(next),
        }
    }
    joined
}

fn our_map(image: &Image) -> Vec<Mapped> {
    let mut extents = Vec::new();
    image
        .block_status(0, image.size(), false, usize::MAX, &mut |extent| {
            let qcow2rs::Extent { offset, length, allocated, data, host_offset, .. } = extent;
            let stored = allocated && (data || host_offset.is_some());
            extents.push((offset, length, stored, host_offset));
        })
        .unwrap();
    joined(extents)
}

#[test]
fn places_in_the_data_file_are_told_as_qemu_tells_them() {
    for (extended_l2, data) in
        [(false, Data::Plain), (false, Data::Raw), (true, Data::Plain), (true, Data::Raw)]
    {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let case = Case {
            version: 3,
            cluster_size: 65536,
            extended_l2,
            refcount_bits: 16,
            size: 1 << 20,
            backing: Backing::None,
        };
        we_make(&path, &case, data);
        assert_eq!(our_map(&open(&path)), map(&path), "{extended_l2} {data:?}: empty");
        let image = open_rw(&path);
        for op in [
            Op::Write { at: 0, len: 65536 + 4096, byte: 1 },
            Op::Write { at: 5 << 16, len: 512, byte: 2 },
            Op::Zero { at: 0, len: 2048, unmap: false },
            Op::Zero { at: 7 << 16, len: 65536, unmap: true },
            Op::Discard { at: 5 << 16, len: 65536 },
        ] {
            op.apply(&image);
        }
        image.close().unwrap();
        assert_eq!(our_map(&open(&path)), map(&path), "{extended_l2} {data:?}");
    }
}

/// Both files as `policy` has them, read-only.
fn open_with(image: &Path, policy: Policy) -> qcow2rs::Result<Image> {
    Image::open(Source::path(image), &OpenOptions::new().policy(policy))
}
