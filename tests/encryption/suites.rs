//! Each cipher, mode, IV generator and hash that `qemu-img create` can make, made by
//! either and read by the other.

use std::path::Path;

use crate::support::{Scratch, describe, read};
use crate::{
    LUKS, assert_no_plain_text, make, open, open_rw, pattern, qemu_check, qemu_content, qemu_io,
    qemu_make,
};

const SIZE: u64 = 256 << 10;

/// All of QEMU's, but for those with which it ends in an assertion (keys of 192 bits in
/// other modes than xts, which no key slot holds).
fn all() -> Vec<String> {
    let mut suites = Vec::new();
    for cipher in ["aes", "serpent", "twofish"] {
        for bits in ["128", "192", "256"] {
            for mode in ["xts", "cbc", "ctr", "ecb"] {
                for ivs in ["plain64", "plain", "essiv"] {
                    if bits != "192" || mode == "xts" {
                        suites.push(suite(&format!("{cipher}-{bits}"), mode, ivs));
                    }
                }
            }
        }
    }
    for mode in ["cbc", "ctr", "ecb"] {
        for ivs in ["plain64", "plain"] {
            suites.push(suite("cast5-128", mode, ivs));
        }
    }
    suites
}

fn suite(cipher: &str, mode: &str, ivs: &str) -> String {
    format!("encrypt.cipher-alg={cipher},encrypt.cipher-mode={mode},encrypt.ivgen-alg={ivs}")
}

/// Each value of each option in some suite; all of them in long runs.
fn chosen() -> Vec<String> {
    let mut suites = match std::env::var_os("QCOW2RS_ROUNDS") {
        Some(_) => all(),
        None => [
            ("aes-192", "xts", "essiv"),
            ("aes-128", "cbc", "essiv"),
            ("aes-256", "ctr", "plain"),
            ("serpent-256", "xts", "plain64"),
            ("serpent-128", "ecb", "plain64"),
            ("twofish-256", "cbc", "essiv"),
            ("twofish-192", "xts", "plain"),
            ("cast5-128", "cbc", "plain64"),
            ("cast5-128", "ctr", "plain"),
        ]
        .map(|(cipher, mode, ivs)| suite(cipher, mode, ivs))
        .to_vec(),
    };
    let hashes = ["md5", "sha1", "sha224", "sha384", "sha512", "ripemd160", "sm3"];
    for (n, hash) in hashes.iter().enumerate() {
        // With some other suite each.
        suites[n] += &format!(",encrypt.hash-alg={hash}");
    }
    suites.push(format!("{},encrypt.ivgen-hash-alg=md5", suite("aes-128", "cbc", "essiv")));
    suites.push("encrypt.ivgen-hash-alg=sha512".into());
    suites
}

#[test]
fn every_suite_of_ours_opens_in_qemu() {
    for suite in chosen() {
        both_use_it(&suite, make, |_| {});
    }
}

/// QEMU takes two seconds to make one, whatever its options say.
#[test]
fn every_suite_of_qemu_opens_here() {
    let long = std::env::var_os("QCOW2RS_ROUNDS").is_some();
    let few = if long { usize::MAX } else { 2 };
    let default = std::iter::once(String::new());
    for suite in default.chain(chosen()).take(few) {
        both_use_it(&suite, qemu_make, |path| qemu_io(path, &["write -P 7 4k 100k".into()]));
    }
}

fn both_use_it(suite: &str, make: fn(&Path, &str, u64), first: impl Fn(&Path)) {
    describe(suite.to_owned(), || {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        make(&path, format!("{LUKS},{suite}").trim_end_matches(','), SIZE);
        first(&path);
        let mut expected = qemu_content(&path);
        let image = open_rw(&path);
        assert!(read(&image, 0, SIZE) == expected, "QEMU reads something else");
        let data = pattern(70000);
        image.write_at(&data, 50001, Default::default()).unwrap();
        expected[50001..][..70000].copy_from_slice(&data);
        image.close().unwrap();
        assert_no_plain_text(&path);
        assert!(qemu_content(&path) == expected, "QEMU reads something else");
        assert!(read(&open(&path), 0, SIZE) == expected);
        qemu_check(&path);
    });
}
