//! Chains of images that are encrypted or not, each by its own passphrase.

use std::path::Path;

use qcow2rs::{CreateOptions, EncryptionFormat, EncryptionOptions, ErrorKind, Format, Image};
use qcow2rs::{OpenOptions, Policy, Source};

use crate::support::{Scratch, qemu_ok, read, text};
use crate::{LUKS, create_options, options, pattern, secret, secrets};

const SIZE: u64 = 1 << 20;

/// An image over another, encrypted if there is a passphrase.
fn overlay(path: &Path, below: Option<&str>, passphrase: Option<&str>) {
    let mut options = create_options(LUKS, SIZE);
    options.encryption = match passphrase {
        Some(text) => {
            let mut luks = create_options(LUKS, SIZE).encryption;
            luks.set_secret(secret(text));
            luks
        }
        None => EncryptionOptions::default(),
    };
    options.backing = below.map(|name| (name.as_bytes().to_vec(), Format::Qcow2));
    qcow2rs::create_path(path, false, &options, &OpenOptions::new()).unwrap();
}

#[test]
fn each_image_of_a_chain_has_its_own_passphrase_or_none() {
    let scratch = Scratch::new();
    let paths = ["base", "middle", "top"].map(|name| scratch.path(name));
    let passphrases = [Some("hunter2"), Some("new")];
    // Plain over encrypted over plain, and the like.
    for chain in [
        [None, None, passphrases[0]],
        [passphrases[0], None, None],
        [None, passphrases[0], None],
        [passphrases[0], passphrases[0], passphrases[0]],
        [passphrases[0], passphrases[1], passphrases[0]],
    ] {
        let below = [None, Some("base"), Some("middle")];
        let open = |top: usize, writable: bool| {
            let mut options = OpenOptions::new().policy(Policy::Paths).writable(writable);
            options.secret = chain[top].map(secret);
            let lower = (0..top).rev().zip(1..);
            options.backing_secrets =
                lower.filter_map(|(n, depth)| Some((depth, secret(chain[n]?)))).collect();
            Image::open(Source::path(&paths[top]), &options).unwrap()
        };
        let mut expected = vec![0; SIZE as usize];
        for top in 0..3 {
            overlay(&paths[top], below[top], chain[top]);
            let image = open(top, true);
            // What is copied up comes from another image, and goes under another key.
            let at = 30_000 + 40_000 * top;
            image.write_at(&pattern(70_001), at as u64, Default::default()).unwrap();
            expected[at..][..70_001].copy_from_slice(&pattern(70_001));
            assert!(read(&image, 0, SIZE) == expected, "{chain:?} {top}");
            image.close().unwrap();
            if chain[top].is_some() {
                crate::assert_no_plain_text(&paths[top]);
            }
        }
        assert!(qemu_reads(&paths, &chain) == expected, "{chain:?}");
    }
}

/// The disk as QEMU reads it.
fn qemu_reads(paths: &[std::path::PathBuf; 3], chain: &[Option<&str>; 3]) -> Vec<u8> {
    let raw = paths[2].with_extension("raw");
    let secrets = secrets();
    let mut json = String::new();
    for (path, passphrase) in paths.iter().zip(chain) {
        let id = passphrase.map(|text| if text == "new" { "n" } else { "s" });
        let key = id.map_or(String::new(), |id| format!("\"encrypt.key-secret\":\"{id}\","));
        let below = if json.is_empty() { String::new() } else { format!("\"backing\":{json},") };
        json = format!(
            "{{\"driver\":\"qcow2\",{key}{below}\"file\":{{\"driver\":\"file\",\
             \"filename\":\"{}\"}}}}",
            text(path)
        );
    }
    let image = format!("json:{json}");
    let mut args = vec!["convert", "-O", "raw"];
    args.extend(secrets.iter().map(String::as_str));
    args.extend([&image, text(&raw)]);
    qemu_ok("qemu-img", &args);
    std::fs::read(raw).unwrap()
}

#[test]
fn an_encrypted_backing_file_without_its_passphrase_is_named() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base"), scratch.path("top"));
    overlay(&base, None, Some("hunter2"));
    overlay(&top, Some("base"), None);
    let open = |secrets: &[(u32, &str)], own: Option<&str>| {
        let mut options = OpenOptions::new().policy(Policy::Paths);
        options.secret = own.map(secret);
        options.backing_secrets = secrets.iter().map(|(n, text)| (*n, secret(text))).collect();
        Image::open(Source::path(&top), &options).err().map(|error| (error.kind(), error.message()))
    };
    for (secrets, own) in
        [(&[][..], None), (&[(1, "wrong")], Some("hunter2")), (&[(2, "hunter2")], None)]
    {
        let (kind, message) = open(secrets, own).unwrap();
        assert_eq!(kind, ErrorKind::Encrypted);
        assert!(message.contains("base"), "{message}");
    }
    assert_eq!(open(&[], Some("hunter2")), None, "one passphrase for all");
    assert_eq!(open(&[(1, "hunter2")], Some("unused")), None);
    // Making an image over it needs no passphrase, unless its size is asked for.
    let mut unsized_options = CreateOptions::default();
    unsized_options.backing = Some((b"base".to_vec(), Format::Qcow2));
    let over = scratch.path("over");
    let made = qcow2rs::create_path(&over, true, &unsized_options, &options("hunter2", true));
    made.unwrap();
    let aes = EncryptionOptions::new(EncryptionFormat::Aes, secret("hunter2"));
    unsized_options.encryption = aes;
    let made = qcow2rs::create_path_open(&over, false, &unsized_options, &options("hunter2", true));
    assert_eq!(made.unwrap().size(), SIZE);
}
