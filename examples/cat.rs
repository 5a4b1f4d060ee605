//! Writes the contents of a disk to standard output, those of the images it stands
//! on included: `cargo run --example cat disk.qcow2 > disk.raw`.

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use qcow2rs::{Image, OpenOptions, Policy, Source};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(path), None) = (args.next(), args.next()) else {
        eprintln!(
            "usage: cat IMAGE > FILE\n  only for images you trust: the files that they name are opened"
        );
        return ExitCode::from(2);
    };
    match cat(Path::new(&path), &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cat: {error}");
            ExitCode::FAILURE
        }
    }
}

fn cat(path: &Path, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
    // Without this policy, the default, an image that names others is refused.
    let options = OpenOptions::new().policy(Policy::Paths);
    let image = Image::open(Source::path(path), &options)?;
    let mut buf = vec![0; CHUNK];
    let mut at = 0;
    while at < image.size() {
        let left = usize::try_from(image.size() - at).unwrap_or(CHUNK);
        let part = &mut buf[..left.min(CHUNK)];
        image.read_at(part, at)?;
        out.write_all(part)?;
        at += part.len() as u64;
    }
    out.flush()?;
    image.close()?;
    Ok(())
}
