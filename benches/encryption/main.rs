//! Encrypted images beside QEMU: requests one after the other, on one thread, to an image
//! that is full of data and in the page cache. QEMU's are those of `qemu-img convert -m 1`
//! from the image to nowhere, and from a raw file to it, and of `qemu-io`, which reads a
//! command for each (`qemu-img bench` takes no passphrase); less the time of one that has
//! nothing to do. The rows of a plain image show what is not encryption.
//!
//!     scripts/bench-encryption.sh [--dir DIRECTORY] [--megabytes N] [--rounds N]

#[path = "../common/whole.rs"]
mod whole;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use qcow2rs::{
    CreateOptions, EncryptionFormat, EncryptionOptions, Image, OpenOptions, Secret, Source,
    WriteFlags,
};
use whole::{Settings, median};

const PASSPHRASE: &str = "benchmark";

/// What is measured.
struct Row {
    name: &'static str,
    request: usize,
    /// From one request to the next, round the disk.
    step: usize,
    count: usize,
    write: bool,
}

/// Where a row's requests go.
struct Places {
    next: usize,
    left: usize,
    step: usize,
    bytes: usize,
}

impl Places {
    fn of(row: &Row, bytes: usize) -> Places {
        Places { next: 0, left: row.count, step: row.step, bytes }
    }
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        let at = self.next;
        self.next = (self.next + self.step) % self.bytes;
        Some(at as u64)
    }
}

fn secret() -> Secret {
    Secret::new(PASSPHRASE.as_bytes()).expect("there is memory")
}

fn open(path: &Path, encrypted: bool) -> Image {
    let mut options = OpenOptions::new().writable(true);
    options.secret = encrypted.then(secret);
    Image::open(Source::path(path), &options).expect("the image opens")
}

/// An image that is full of data.
fn make(path: &Path, format: Option<EncryptionFormat>, bytes: usize) {
    let mut options = CreateOptions::default();
    options.size = Some(bytes as u64);
    if let Some(format) = format {
        options.encryption = EncryptionOptions::new(format, secret());
    }
    if format == Some(EncryptionFormat::Luks) {
        options.set("encrypt.iter-time", "0").expect("an option");
    }
    let image = qcow2rs::create_path_open(path, false, &options, &OpenOptions::new());
    let image = image.expect("it can be made");
    let data: Vec<u8> = (0..1 << 20).map(|n: u32| (n.wrapping_mul(n) >> 7) as u8).collect();
    for at in (0..bytes).step_by(data.len()) {
        image.write_at(&data, at as u64, WriteFlags::default()).expect("there is room");
    }
    image.close().expect("there is room");
}

fn we_take(path: &Path, encrypted: bool, row: &Row, bytes: usize) -> f64 {
    let image = open(path, encrypted);
    let mut buffer = vec![0x5a; row.request];
    let start = Instant::now();
    for at in Places::of(row, bytes) {
        match row.write {
            true => image.write_at(&buffer, at, WriteFlags::default()),
            false => image.read_at(&mut buffer, at),
        }
        .expect("the image is sound");
    }
    let seconds = start.elapsed().as_secs_f64();
    image.close().expect("there is room");
    seconds
}

/// Seconds of a tool of QEMU's that reads `input`.
fn qemu(tool: &str, words: &[&str], input: &str) -> f64 {
    let start = Instant::now();
    let mut child = Command::new(tool)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("QEMU's tools are installed");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.as_bytes()).expect("it reads");
    drop(stdin);
    assert!(child.wait().expect("it ends").success(), "{tool} {words:?}");
    start.elapsed().as_secs_f64()
}

/// The same requests by QEMU, and what it takes to carry out none.
fn qemu_takes(path: &Path, raw: &Path, encrypted: bool, row: &Row, bytes: usize) -> f64 {
    let text = |path: &Path| path.to_str().expect("paths are text").to_owned();
    let secret = format!("secret,id=key,data={PASSPHRASE}");
    let key = if encrypted { ",encrypt.key-secret=key" } else { "" };
    let image = format!("driver=qcow2,file.filename={}{key}", text(path));
    let null = format!("driver=null-co,size={bytes}");
    let file = |size| format!("driver=raw,size={size},file.filename={}", text(raw));
    let convert = ["convert", "-n", "-m", "1", "--object", &secret, "--image-opts"];
    let convert = |from: &str, to: &str| {
        qemu("qemu-img", &[&convert[..], &["--target-image-opts", from, to]].concat(), "")
    };
    let io = |commands: &str| {
        let words = ["--object", &secret, "--cache", "writeback", "--image-opts", &image];
        qemu("qemu-io", &words, commands)
    };
    if row.request < 1 << 20 {
        let command = if row.write { "write -q -P 90" } else { "read -q" };
        let places = Places::of(row, bytes);
        let line = |at| format!("{command} {at} {}\n", row.request);
        let commands: String = places.map(line).collect();
        return io(&commands) - io("");
    }
    let nothing = convert(&file(512), &null);
    let all = if row.write { convert(&file(bytes), &image) } else { convert(&image, &null) };
    (all - nothing).max(1e-9)
}

fn main() {
    let Settings { directory, bytes, rounds } = Settings::given();
    let scratch = tempfile::tempdir_in(directory).expect("the directory can be written");
    // Past neighbours, and everywhere: the step has no factor in common with the disk.
    let stride = 1021 * 4096;
    let long =
        |name, write| Row { name, request: 1 << 20, step: 1 << 20, count: bytes >> 20, write };
    let short = |name, write| Row { name, request: 4096, step: stride, count: 20_000, write };
    let rows = [
        long("read 1 MiB, in order", false),
        long("write 1 MiB, in order", true),
        short("read 4 KiB, anywhere", false),
        short("write 4 KiB, anywhere", true),
    ];
    let raw = scratch.path().join("raw");
    std::fs::write(&raw, vec![0x5a; bytes]).expect("there is room");
    println!("{} MiB, medians of {rounds} rounds, MB/s\n", bytes >> 20);
    println!("| image | requests | qcow2rs | QEMU | ratio |");
    println!("|---|---|---:|---:|---:|");
    for (name, format) in [
        ("plain", None),
        ("LUKS, aes-256-xts", Some(EncryptionFormat::Luks)),
        ("AES, aes-128-cbc", Some(EncryptionFormat::Aes)),
    ] {
        let path = scratch.path().join("image");
        make(&path, format, bytes);
        for row in &rows {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                ours.push(we_take(&path, format.is_some(), row, bytes));
                theirs.push(qemu_takes(&path, &raw, format.is_some(), row, bytes));
            }
            let rate = |seconds| (row.request * row.count) as f64 / 1e6 / median(seconds);
            let (ours, theirs) = (rate(ours), rate(theirs));
            println!("| {name} | {} | {ours:.0} | {theirs:.0} | {:.2} |", row.name, ours / theirs);
        }
    }
}
