//! Encrypted images, beside QEMU: LUKS and the old AES, in both directions.

#[path = "../support/mod.rs"]
mod support;

mod create;
mod data;
mod keyslots;
mod meets;
mod model;
mod opening;
mod secrets;
mod suites;

use std::path::Path;

use qcow2rs::{
    CreateOptions, EncryptionFormat, EncryptionOptions, Image, OpenOptions, Policy, Secret, Source,
};
use support::{qemu, qemu_ok, text};

/// The passphrase of nearly all images here.
const PASSPHRASE: &str = "hunter2";
/// LUKS by QEMU's defaults, with the fewest iterations.
const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=0";
const AES: &str = "encrypt.format=aes";

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes()).unwrap()
}

fn secrets() -> [String; 4] {
    let object = |id: &str, data: &str| format!("secret,id={id},data={data}");
    ["--object".into(), object("s", PASSPHRASE), "--object".into(), object("n", "new")]
}

/// How QEMU opens an image by the secret `id`.
fn named(image: &Path, id: &str) -> String {
    format!(
        "json:{{\"driver\":\"qcow2\",\"encrypt.key-secret\":\"{id}\",\
         \"file.filename\":\"{}\"}}",
        text(image)
    )
}

/// `qemu-img create -o options`, with the passphrase.
fn qemu_make(image: &Path, options: &str, size: u64) {
    let secrets = secrets();
    let options = format!("{options},encrypt.key-secret=s");
    let size = size.to_string();
    let mut args: Vec<&str> = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    args.extend(secrets.iter().map(String::as_str));
    args.extend([text(image), &size]);
    qemu_ok("qemu-img", &args);
}

/// `qemu-img COMMAND args`, with the passphrases, and the image by its key as the last
/// argument.
fn qemu_img(command: &[&str], image: &Path) -> std::process::Output {
    let (secrets, image) = (secrets(), named(image, "s"));
    let (name, rest) = command.split_first().unwrap();
    let mut args = vec![*name];
    args.extend(secrets.iter().map(String::as_str));
    args.extend(rest);
    args.push(&image);
    qemu("qemu-img", &args)
}

fn qemu_check(image: &Path) {
    let output = qemu_img(&["check"], image);
    assert!(output.status.success(), "{output:?}");
}

/// Lets QEMU carry out commands.
fn qemu_io_as(image: &Path, id: &str, commands: &[String]) {
    let (secrets, image) = (secrets(), named(image, id));
    let mut args: Vec<&str> = secrets.iter().map(String::as_str).collect();
    args.extend(["-d", "unmap", "--cache", "unsafe"]);
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(&image);
    let printed = qemu_ok("qemu-io", &args);
    assert!(!printed.contains("failed") && !printed.contains("invalid"), "{printed}");
}

fn qemu_io(image: &Path, commands: &[String]) {
    qemu_io_as(image, "s", commands);
}

/// All that QEMU reads.
fn qemu_content(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw");
    let (secrets, image) = (secrets(), named(image, "s"));
    let mut args = vec!["convert", "-O", "raw"];
    args.extend(secrets.iter().map(String::as_str));
    args.extend([&image, text(&raw)]);
    qemu_ok("qemu-img", &args);
    std::fs::read(raw).unwrap()
}

fn options(passphrase: &str, writable: bool) -> OpenOptions {
    let options = OpenOptions::new().policy(Policy::Paths).writable(writable);
    let mut options = options.secret(secret(passphrase));
    options.no_flush = true;
    options
}

fn open(image: &Path) -> Image {
    Image::open(Source::path(image), &options(PASSPHRASE, false)).unwrap()
}

fn open_rw(image: &Path) -> Image {
    Image::open(Source::path(image), &options(PASSPHRASE, true)).unwrap()
}

/// Options of an image that we make: those behind `-o`, and the passphrase.
fn create_options(text: &str, size: u64) -> CreateOptions {
    let mut options = CreateOptions::default();
    options.encryption = EncryptionOptions::new(EncryptionFormat::Luks, secret(PASSPHRASE));
    options.size = Some(size);
    for option in text.split(',').filter(|option| !option.is_empty()) {
        let (name, value) = option.split_once('=').unwrap();
        options.set(name, value).unwrap();
    }
    options
}

fn make(image: &Path, options: &str, size: u64) {
    let options = create_options(options, size);
    qcow2rs::create_path(image, false, &options, &OpenOptions::new()).unwrap();
}

/// A plain text that is easily found.
fn pattern(len: usize) -> Vec<u8> {
    b"This is the secret. ".iter().copied().cycle().take(len).collect()
}

/// No file of the image has the plain text.
fn assert_no_plain_text(file: &Path) {
    let bytes = std::fs::read(file).unwrap();
    let found = bytes.windows(16).position(|window| window == &pattern(32)[..16]);
    assert_eq!(found, None, "plain text in {}", file.display());
}
