//! Compressed images beside QEMU: reading one from end to end, and making one, on one
//! thread each (`-m 1`), with the sizes that come of it; and on two of ours.
//!
//!     scripts/bench-compression.sh [--dir DIRECTORY] [--megabytes N] [--rounds N]
//!
//! The data is what files of this machine hold. QEMU's time is that of `qemu-img
//! convert` less that of one that has nothing to convert.

#[path = "../common/whole.rs"]
mod whole;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use qcow2rs::{CreateOptions, Image, OpenOptions, Source, WriteFlags};
use whole::{Settings, median};

/// Bytes of a request.
const REQUEST: usize = 2 << 20;

/// So many bytes of the files under /usr, in the order of their names.
fn collect(into: &Path, bytes: usize) {
    let mut out = fs::File::create(into).expect("the directory can be written");
    let (mut left, mut places) = (bytes as u64, vec![PathBuf::from("/usr")]);
    while let Some(place) = places.pop().filter(|_| left > 0) {
        let Ok(kind) = fs::symlink_metadata(&place).map(|data| data.file_type()) else { continue };
        if kind.is_dir() {
            let Ok(entries) = fs::read_dir(&place) else { continue };
            let mut entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            entries.sort();
            places.extend(entries.into_iter().rev());
        } else if let (true, Ok(file)) = (kind.is_file(), fs::File::open(&place)) {
            left -= std::io::copy(&mut file.take(left), &mut out).expect("room for the data");
        }
    }
    assert_eq!(left, 0, "/usr holds fewer than {bytes} bytes");
    out.flush().expect("room for the data");
}

fn qemu_img(words: &[&str]) -> f64 {
    let start = Instant::now();
    let status = Command::new("qemu-img").args(words).stdin(Stdio::null()).status();
    assert!(status.expect("qemu-img is installed").success(), "qemu-img {words:?}");
    start.elapsed().as_secs_f64()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths are text")
}

/// Seconds in which QEMU reads all of an image, to nowhere.
fn qemu_reads(image: &Path, bytes: usize) -> f64 {
    let target = format!("driver=null-co,size={bytes}");
    let words = ["convert", "-n", "-m", "1", "-f", "qcow2", "--target-image-opts", text(image)];
    qemu_img(&[&words[..], &[&target]].concat())
}

fn qemu_makes(raw: &Path, image: &Path, method: &str) -> f64 {
    let options = format!("compression_type={method}");
    let words = ["convert", "-c", "-m", "1", "-f", "raw", "-O", "qcow2", "-o", &options];
    qemu_img(&[&words[..], &[text(raw), text(image)]].concat())
}

/// Calls `work` with each request's offset, from so many threads; the seconds.
fn each_request(bytes: usize, threads: usize, work: impl Fn(usize, &mut [u8]) + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let work = &work;
            scope.spawn(move || {
                let mut buffer = vec![0; REQUEST];
                for at in (thread * REQUEST..bytes).step_by(threads * REQUEST) {
                    let len = REQUEST.min(bytes - at);
                    work(at, &mut buffer[..len]);
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

fn we_read(path: &Path, bytes: usize, threads: usize) -> f64 {
    let image = Image::open(Source::path(path), &OpenOptions::new()).expect("the image opens");
    each_request(bytes, threads, |at, buffer| {
        image.read_at(buffer, at as u64).expect("the image is sound");
    })
}

fn we_make(data: &[u8], path: &Path, method: &str, threads: usize) -> f64 {
    let mut options = CreateOptions::default();
    options.size = Some(data.len() as u64);
    options.set("compression_type", method).expect("a method");
    let open = OpenOptions::new();
    let image = qcow2rs::create_path_open(path, false, &options, &open).expect("it can be made");
    let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
    let start = Instant::now();
    each_request(data.len(), threads, |at, buffer| {
        image.write_at(&data[at..at + buffer.len()], at as u64, flags).expect("there is room");
    });
    image.close().expect("there is room");
    start.elapsed().as_secs_f64()
}

fn main() {
    let Settings { directory, bytes, rounds } = Settings::given();
    let scratch = tempfile::tempdir_in(directory).expect("the directory can be written");
    let path = |name: &str| scratch.path().join(name);
    let (raw, empty) = (path("raw"), path("empty"));
    collect(&raw, bytes);
    let data = fs::read(&raw).expect("it was written");
    fs::write(&empty, [0; 512]).expect("there is room");
    let size = |path: &Path| fs::metadata(path).map_or(0, |data| data.len());
    println!("{} MiB, medians of {rounds} rounds, MB/s\n", bytes >> 20);
    println!("| | qcow2rs | QEMU | ratio | qcow2rs, 2 threads | size beside QEMU's |");
    println!("|---|---:|---:|---:|---:|---:|");
    for method in ["zlib", "zstd"] {
        let (theirs, ours, nothing) = (path("theirs"), path("ours"), path("nothing"));
        let mut seconds: [Vec<f64>; 6] = Default::default();
        for _ in 0..rounds {
            let start = qemu_makes(&empty, &nothing, method);
            let of_qemu = [qemu_makes(&raw, &theirs, method), qemu_reads(&theirs, bytes)];
            let of_ours = [
                we_make(&data, &ours, method, 1),
                we_read(&theirs, bytes, 1),
                we_make(&data, &path("ours-2"), method, 2),
                we_read(&theirs, bytes, 2),
            ];
            let all = of_qemu.map(|time| (time - start).max(1e-9)).into_iter().chain(of_ours);
            seconds.iter_mut().zip(all).for_each(|(list, time)| list.push(time));
        }
        let rates = seconds.map(|list| bytes as f64 / 1e6 / median(list));
        let share = 100.0 * size(&ours) as f64 / size(&theirs) as f64;
        for (what, at, share) in
            [("writing", 0, format!("{share:.1} %")), ("reading", 1, String::new())]
        {
            let (qemu, one, two) = (rates[at], rates[at + 2], rates[at + 4]);
            println!(
                "| {what} {method} | {one:.0} | {qemu:.0} | {:.2} | {two:.0} | {share} |",
                one / qemu
            );
        }
    }
}
