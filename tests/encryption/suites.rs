//! Each cipher, mode, IV generator and hash that `qemu-img create` can make, made by
//! either and read by the other.

use crate::support::{Scratch, describe, read};
use crate::{make, open, open_rw, pattern, qemu_check, qemu_content, qemu_io, qemu_make};

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
            ("aes-256", "xts", "plain64"),
            ("aes-192", "xts", "essiv"),
            ("aes-128", "cbc", "essiv"),
            ("aes-256", "ctr", "plain"),
            ("serpent-256", "xts", "plain64"),
            ("serpent-192", "xts", "plain"),
            ("serpent-128", "ecb", "plain64"),
            ("twofish-256", "cbc", "essiv"),
            ("twofish-192", "xts", "plain"),
            ("twofish-128", "ctr", "plain64"),
            ("cast5-128", "cbc", "plain64"),
            ("cast5-128", "ctr", "plain"),
        ]
        .map(|(cipher, mode, ivs)| suite(cipher, mode, ivs))
        .to_vec(),
    };
    let hashes = ["md5", "sha1", "sha224", "sha384", "sha512", "ripemd160", "sm3"];
    let hashes = hashes.map(|hash| format!("encrypt.hash-alg={hash}"));
    // Long ciphers' names of hashes, and those that are of no use.
    suites.extend(hashes);
    suites.push(format!("{},encrypt.ivgen-hash-alg=md5", suite("aes-128", "cbc", "essiv")));
    suites.push("encrypt.ivgen-hash-alg=sha512".into());
    suites
}

#[test]
fn every_suite_of_qemu_opens_here_and_ours_there() {
    for suite in chosen() {
        describe(suite.clone(), || {
            let scratch = Scratch::new();
            let options = format!("encrypt.format=luks,encrypt.iter-time=0,{suite}");
            let (theirs, ours) = (scratch.path("theirs"), scratch.path("ours"));
            qemu_make(&theirs, &options, SIZE);
            qemu_io(&theirs, &["write -P 7 4k 100k".into()]);
            make(&ours, &options, SIZE);
            for path in [&theirs, &ours] {
                let image = open_rw(path);
                let mut expected = vec![0; SIZE as usize];
                if path == &theirs {
                    expected[4096..][..100 << 10].fill(7);
                    assert_eq!(read(&image, 0, SIZE), expected);
                }
                let data = pattern(70000);
                image.write_at(&data, 50001, Default::default()).unwrap();
                expected[50001..][..70000].copy_from_slice(&data);
                image.close().unwrap();
                crate::assert_no_plain_text(path);
                assert!(qemu_content(path) == expected, "QEMU reads something else");
                assert!(read(&open(path), 0, SIZE) == expected);
                qemu_check(path);
            }
        });
    }
}
