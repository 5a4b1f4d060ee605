//! Random operations by us and by QEMU in turn, on one image, beside a byte array.
//!
//! `QCOW2RS_SEED=n cargo test --test encryption` replays a failure, `QCOW2RS_ROUNDS=n`
//! runs more.

use std::sync::Arc;

use qcow2rs::{Format, Image, OpenOptions};

use crate::support::operations::{Backing, Case, Op};
use crate::support::{
    Rng, Scratch, assert_same, describe, for_seeds, qemu_ok, read, smallest_caches,
};
use crate::{AES, create_options, named, options, qemu_io, secrets};

/// Quick to open.
const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=0,encrypt.cipher-alg=aes-128,\
                    encrypt.hash-alg=sha1";
const CBC: &str = "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv";

fn cases() -> Vec<(Case, String)> {
    let case = Case {
        version: 3,
        cluster_size: 4096,
        extended_l2: false,
        refcount_bits: 16,
        size: 300_032,
        backing: Backing::Raw(200_000),
    };
    let large = Case { cluster_size: 65536, size: 1 << 20, ..case };
    vec![
        (case, LUKS.into()),
        (Case { cluster_size: 512, backing: Backing::None, ..case }, AES.into()),
        (Case { extended_l2: true, backing: Backing::Qcow2(900_000), ..large }, LUKS.into()),
        (Case { version: 2, backing: Backing::Qcow2(400_000), ..case }, format!("{LUKS},{CBC}")),
        (Case { extended_l2: true, cluster_size: 16384, ..large }, AES.into()),
        (Case { backing: Backing::None, ..large }, format!("{LUKS},{CBC}")),
    ]
}

fn open(image: &std::path::Path, rng: &mut Rng) -> Image {
    let mut options: OpenOptions = options(crate::PASSPHRASE, true);
    options.direct = rng.below(4) == 0;
    if rng.below(2) == 0 {
        smallest_caches(&mut options);
    }
    Image::open(qcow2rs::Source::path(image), &options).unwrap()
}

#[test]
fn random_operations_by_us_and_by_qemu_in_turn() {
    for_seeds("encryption", 4, |seed| {
        for (number, (case, encryption)) in cases().into_iter().enumerate() {
            let mut rng = Rng::new(seed * 1000 + number as u64);
            describe(format!("{case:?} {encryption}"), || run(case, &encryption, &mut rng));
        }
    });
}

fn run(case: Case, encryption: &str, rng: &mut Rng) {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut bytes = case.create_backing(&path, rng);
    let mut make = create_options(&format!("{encryption},{}", case.options()), case.size);
    make.backing = match case.backing {
        Backing::None => None,
        Backing::Raw(_) => Some((b"base".to_vec(), Format::Raw)),
        Backing::Qcow2(_) => Some((b"base".to_vec(), Format::Qcow2)),
    };
    qcow2rs::create_path(&path, true, &make, &OpenOptions::new()).unwrap();
    for round in 0..2 {
        let image = open(&path, rng);
        if round == 1 && case.refcount_bits > 1 {
            image.snapshot_create(b"before", &qcow2rs_meta()).unwrap();
        }
        for _ in 0..25 {
            let op = case.op(rng, true);
            op.apply(&image);
            op.model(&case, &mut bytes);
            let (at, len) = case.range(rng);
            let expected = &bytes[at as usize..(at + len) as usize];
            describe(format!("after {op:?}"), || assert_same(&read(&image, at, len), expected));
        }
        assert_same(&read(&image, 0, case.size), &bytes);
        image.close().unwrap();
        check(&path);
        let ops: Vec<Op> = (0..15).map(|_| case.op(rng, true)).collect();
        ops.iter().for_each(|op| op.model(&case, &mut bytes));
        qemu_io(&path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
    }
    assert_same(&crate::qemu_content(&path), &bytes);
    let image = open(&path, rng);
    assert_same(&read(&image, 0, case.size), &bytes);
    image.snapshot_delete(b"before").unwrap();
    assert_same(&read(&image, 0, case.size), &bytes);
    image.close().unwrap();
    check(&path);
}

fn qcow2rs_meta() -> qcow2rs::snapshots::Meta {
    qcow2rs::snapshots::Meta::now()
}

/// No corruption; QEMU's own discards may leak nothing either.
fn check(path: &std::path::Path) {
    let (secrets, image) = (secrets(), named(path, "s"));
    let mut args = vec!["check", "-q"];
    args.extend(secrets.iter().map(String::as_str));
    args.push(&image);
    qemu_ok("qemu-img", &args);
}

#[test]
fn bytes_of_one_sector_are_written_by_many_at_once() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let options = create_options(&format!("{AES},cluster_size=4k"), 64 << 10);
    qcow2rs::create_path(&path, true, &options, &OpenOptions::new()).unwrap();
    let image = Arc::new(crate::open_rw(&path));
    const THREADS: usize = 4;
    for round in 1..=20u8 {
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let image = &image;
                scope.spawn(move || {
                    for at in (thread * 100..32 << 10).step_by(THREADS * 100) {
                        let byte = [round + 30 * thread as u8; 100];
                        image.write_at(&byte, at as u64, Default::default()).unwrap();
                        assert_eq!(read(image, at as u64, 100), byte);
                    }
                });
            }
        });
        let all = read(&image, 0, 32 << 10);
        for (n, part) in all.chunks(100).enumerate() {
            let byte = round + 30 * (n % THREADS) as u8;
            assert!(part.iter().all(|it| *it == byte), "part {n} in round {round}");
        }
    }
}
