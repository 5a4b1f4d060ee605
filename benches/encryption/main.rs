//! Encrypted images beside QEMU: requests one after the other, on one thread, to an image
//! that is full of data and in the page cache, by `qemu-img bench -d 1` and by blocking
//! calls in the same order.
//!
//!     scripts/bench-encryption.sh [--dir DIRECTORY] [--megabytes N] [--rounds N]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use qcow2rs::{
    CreateOptions, EncryptionFormat, EncryptionOptions, Image, OpenOptions, Secret, Source,
    WriteFlags,
};

const PASSPHRASE: &str = "benchmark";

struct Settings {
    directory: PathBuf,
    bytes: usize,
    rounds: usize,
}

fn settings() -> Settings {
    let mut settings = Settings { directory: std::env::temp_dir(), bytes: 256 << 20, rounds: 5 };
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        let number = || value.parse::<usize>().expect("a number");
        match word.as_str() {
            "--dir" => settings.directory = value.into(),
            "--megabytes" => settings.bytes = number() << 20,
            "--rounds" => settings.rounds = number(),
            _ => panic!("{word}: there are --dir, --megabytes and --rounds"),
        }
    }
    settings
}

/// What is measured.
struct Row {
    name: &'static str,
    request: usize,
    /// From one request to the next; past the end of the disk it goes on at its beginning.
    step: usize,
    count: usize,
    write: bool,
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
    let data: Vec<u8> = (0..1 << 20).map(|n: u32| (n * n >> 7) as u8).collect();
    for at in (0..bytes).step_by(data.len()) {
        image.write_at(&data, at as u64, WriteFlags::default()).expect("there is room");
    }
    image.close().expect("there is room");
}

fn we_take(path: &Path, encrypted: bool, row: &Row, bytes: usize) -> f64 {
    let image = open(path, encrypted);
    let mut buffer = vec![0x5a; row.request];
    let (mut at, start) = (0, Instant::now());
    for _ in 0..row.count {
        match row.write {
            true => image.write_at(&buffer, at as u64, WriteFlags::default()),
            false => image.read_at(&mut buffer, at as u64),
        }
        .expect("the image is sound");
        at += row.step;
        // As qemu-img has it.
        if at + row.request > bytes {
            at = (at + row.request) % bytes / row.request * row.request;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    image.close().expect("there is room");
    seconds
}

fn qemu_takes(path: &Path, encrypted: bool, row: &Row) -> f64 {
    let name = path.to_str().expect("paths are text");
    let key = if encrypted { ",encrypt.key-secret=key" } else { "" };
    let image = format!("driver=qcow2,file.filename={name}{key}");
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-d", "1", "-t", "writeback", "-i", "threads"]);
    command.args(["--object", &format!("secret,id=key,data={PASSPHRASE}")]);
    command.args(["-c", &row.count.to_string(), "-s", &row.request.to_string()]);
    command.args(["-S", &row.step.to_string()]);
    if row.write {
        command.args(["-w", "--pattern=90"]);
    }
    let output = command.args(["--image-opts", &image]).stdin(Stdio::null()).output();
    let output = output.expect("qemu-img is installed");
    let text = String::from_utf8_lossy(&output.stdout);
    let seconds = text.split_once("Run completed in ").and_then(|(_, rest)| rest.split_once(' '));
    let seconds = seconds.and_then(|(number, _)| number.parse().ok());
    seconds.unwrap_or_else(|| panic!("{command:?}: {output:?}"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let Settings { directory, bytes, rounds } = settings();
    let scratch = tempfile::tempdir_in(directory).expect("the directory can be written");
    // Past neighbours, and everywhere: the step has no factor in common with the disk.
    let stride = 1021 * 4096;
    let long =
        |name, write| Row { name, request: 1 << 20, step: 1 << 20, count: bytes >> 20, write };
    let short = |name, write| Row { name, request: 4096, step: stride, count: 50_000, write };
    let rows = [
        long("read 1 MiB, in order", false),
        long("write 1 MiB, in order", true),
        short("read 4 KiB, anywhere", false),
        short("write 4 KiB, anywhere", true),
    ];
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
                theirs.push(qemu_takes(&path, format.is_some(), row));
            }
            let rate = |seconds| (row.request * row.count) as f64 / 1e6 / median(seconds);
            let (ours, theirs) = (rate(ours), rate(theirs));
            println!("| {name} | {} | {ours:.0} | {theirs:.0} | {:.2} |", row.name, ours / theirs);
        }
    }
}
