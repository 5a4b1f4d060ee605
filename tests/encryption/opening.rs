//! What opens an image, what does not, and what is told of it.

use std::path::Path;

use qcow2rs::{ErrorKind, Image, OpenOptions, Source};

use crate::support::{Scratch, qemu, text};
use crate::{AES, LUKS, make, open_rw, options, qemu_make, secret};

fn refusal(path: &Path, options: &OpenOptions) -> ErrorKind {
    Image::open(Source::path(path), options).err().expect("it does not open").kind()
}

#[test]
fn without_its_passphrase_an_image_is_only_looked_at() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for format in [LUKS, AES] {
        make(&path, format, 1 << 20);
        let before = std::fs::read(&path).unwrap();
        for writable in [false, true] {
            let none = OpenOptions::new().writable(writable);
            let error = Image::open(Source::path(&path), &none).err().unwrap();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Encrypted, libc::EACCES));
            assert!(error.message().contains("qcow2rs_open_opts_set_secret"), "{error}");
        }
        let mut look = OpenOptions::new();
        look.check_only = true;
        let image = Image::open(Source::path(&path), &look).unwrap();
        let info = image.info().unwrap().qcow2.unwrap();
        assert_eq!(info.luks.is_some(), format == LUKS);
        assert!(info.crypt_method != 0);
        let (result, outcome) = image.check(&mut ());
        outcome.unwrap();
        assert_eq!((result.corruptions, result.leaks), (0, 0));
        image.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == before, "it was written to");
        assert_eq!(qcow2rs::probe(&Source::path(&path)).unwrap(), qcow2rs::Format::Qcow2);
    }
    // Of LUKS it is known when a passphrase is wrong; AES reads something else.
    make(&path, LUKS, 1 << 20);
    for wrong in ["", "hunter", "hunter22", "HUNTER2"] {
        assert_eq!(refusal(&path, &options(wrong, true)), ErrorKind::Encrypted, "{wrong:?}");
    }
}

#[test]
fn info_tells_what_qemu_tells() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let essiv = "encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,encrypt.hash-alg=sha1";
    for options in [LUKS.to_owned(), format!("{LUKS},{essiv}"), AES.to_owned()] {
        make(&path, &options, 1 << 20);
        let image = open_rw(&path);
        let ours: serde_json::Value = serde_json::from_str(&image.info_json().unwrap()).unwrap();
        image.close().unwrap();
        let output = qemu("qemu-img", &["info", "--output=json", text(&path)]);
        let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let encrypt = |json: &serde_json::Value| json["format-specific"]["data"]["encrypt"].clone();
        assert_eq!(encrypt(&ours), encrypt(&theirs), "{options}");
        assert!(encrypt(&ours)["format"].is_string());
        assert_eq!(ours["encrypted"], theirs["encrypted"]);
    }
}

fn patch_copy(from: &Path, to: &Path, change: impl FnOnce(&mut [u8])) {
    let mut bytes = std::fs::read(from).unwrap();
    change(&mut bytes);
    std::fs::write(to, bytes).unwrap();
}

/// Where the LUKS header lies in the file.
fn luks_at(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    let found = bytes.chunks(512).position(|sector| sector.starts_with(b"LUKS\xba\xbe"));
    found.expect("there is a LUKS header") * 512
}

#[test]
fn malformed_headers_are_refused_as_qemu_refuses_them() {
    let scratch = Scratch::new();
    let (sound, path) = (scratch.path("sound"), scratch.path("image"));
    make(&sound, LUKS, 1 << 20);
    let at = luks_at(&sound);
    let slot = |n: usize| 208 + 48 * n;
    let cases: [(&str, usize, &[u8], bool); 20] = [
        ("as it is", 0, b"L", true),
        ("magic", 0, b"X", false),
        ("version", 7, &[2], false),
        ("cipher", 8, b"des", false),
        ("cipher without end", 8, &[b'a'; 32], false),
        ("mode", 40, b"yts-plain64", false),
        ("no IV generator", 40, b"xts\0", false),
        ("hash of IVs", 40, b"xts-plain64:md9", false),
        ("useless hash of IVs", 40, b"xts-plain64:md5", true),
        ("hash", 72, b"sha255", false),
        ("payload", 104, &[0; 4], false),
        ("key bytes", 108, &[0, 0, 0, 65], false),
        ("iterations", 164, &[0; 4], false),
        ("uuid", 168, &[b'u'; 40], true),
        ("state", slot(1), &[1; 4], false),
        ("iterations of a slot", slot(0) + 4, &[0; 4], false),
        ("place of a slot", slot(1) + 40, &[0, 0, 0, 1], false),
        ("overlap", slot(1) + 40, &[0, 0, 0, 8], false),
        ("past the payload", slot(7) + 40, &[0, 0, 0x10, 0], false),
        ("stripes", slot(3) + 44, &[0, 0, 0, 1], false),
    ];
    for (what, offset, field, opens) in cases {
        patch_copy(&sound, &path, |bytes| {
            bytes[at + offset..][..field.len()].copy_from_slice(field);
        });
        let theirs = qemu("qemu-img", &["info", "-f", "qcow2", text(&path)]).status.success();
        assert_eq!(theirs, opens, "QEMU, {what}");
        let ours = Image::open(Source::path(&path), &options(crate::PASSPHRASE, true));
        assert_eq!(ours.is_ok(), opens, "{what}: {:?}", ours.err());
        if let Err(error) = ours {
            let kinds = [ErrorKind::BadHeader, ErrorKind::UnsupportedFeature];
            assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
        }
    }
}

#[test]
fn an_image_does_not_say_how_long_it_is_guessed_at() {
    let scratch = Scratch::new();
    let (sound, path) = (scratch.path("sound"), scratch.path("image"));
    make(&sound, LUKS, 1 << 20);
    let at = luks_at(&sound);
    for field in [164, 208 + 4] {
        patch_copy(&sound, &path, |bytes| {
            bytes[at + field..][..4].fill(0xff);
        });
        // Nobody waits for four thousand million iterations.
        let error = Image::open(Source::path(&path), &options(crate::PASSPHRASE, false));
        let error = error.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Limit);
        assert!(error.message().contains("max-key-iterations"), "{error}");
    }
    let mut few = options(crate::PASSPHRASE, false);
    few.set("max-key-iterations", "1999").unwrap();
    assert_eq!(refusal(&sound, &few), ErrorKind::Limit);
    few.set("max-key-iterations", "2000").unwrap();
    Image::open(Source::path(&sound), &few).unwrap();
}

#[test]
fn what_qemu_makes_with_old_aes_opens() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_make(&path, "compat=0.10,encryption=on", 1 << 20);
    crate::qemu_io(&path, &["write -P 5 64k 64k".into()]);
    let image = open_rw(&path);
    assert_eq!(crate::support::read(&image, 64 << 10, 4), [5; 4]);
    image.close().unwrap();
    // A key of more than 16 bytes is cut off, one of fewer filled up: so does QEMU.
    let cut = secret("hunter2\0\0\0\0\0\0\0\0\0cut off");
    let options = OpenOptions::new().secret(cut);
    let image = Image::open(Source::path(&path), &options).unwrap();
    assert_eq!(crate::support::read(&image, 64 << 10, 4), [5; 4]);
}
