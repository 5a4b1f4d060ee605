//! An overlay on a raw disk: created, written, flushed, read again.
//! `cargo run --example overlay base.raw overlay.qcow2`

use std::error::Error;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use qcow2rs::{CreateOptions, Format, Image, OpenOptions, Policy, Source, WriteFlags};

/// Bytes that guests write at a time.
const BLOCK: usize = 4096;
/// Subclusters of these clusters are as large as blocks: nothing is copied.
const CLUSTER: u64 = 128 << 10;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [base, overlay] = &args[..] else {
        eprintln!("usage: overlay BASE OVERLAY");
        return ExitCode::from(2);
    };
    match run(Path::new(base), Path::new(overlay)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("overlay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(base: &Path, overlay: &Path) -> Result<(), Box<dyn Error>> {
    // A relative name would be looked for where the overlay is.
    let name = base.canonicalize().map_err(|error| format!("{}: {error}", base.display()))?;
    let mut options = CreateOptions::default();
    options.cluster_size = CLUSTER;
    options.extended_l2 = true;
    options.backing = Some((name.as_os_str().as_bytes().to_vec(), Format::Raw));

    // We make the overlay: what it names may be opened by path. `true`: a file
    // that is there already is not overwritten.
    let open = OpenOptions::new().policy(Policy::Paths);
    let image = qcow2rs::create_path_open(overlay, true, &options, &open)?;
    for offset in offsets(image.size()) {
        image.write_at(&content(offset), offset, WriteFlags::default())?;
    }
    image.flush()?; // What was written so far survives a power loss.
    let stats = image.stats();
    image.close()?; // Dropping it would be a crash.

    let image = Image::open(Source::path(overlay), &open)?;
    let below = Image::open(Source::path(base), &OpenOptions::new().format(Format::Raw))?;
    for offset in offsets(image.size()) {
        if read(&image, offset)? != content(offset) {
            return Err(format!("wrong data at {offset:#x}").into());
        }
        // The next block was not written.
        let next = offset + BLOCK as u64;
        if next + BLOCK as u64 <= image.size() && read(&image, next)? != read(&below, next)? {
            return Err(format!("wrong data at {next:#x}").into());
        }
    }
    image.close()?;
    below.close()?;
    println!("{} writes, {} bytes copied", stats.guest_writes, stats.cow_bytes);
    Ok(())
}

/// One block in each cluster, a little further on each time.
fn offsets(size: u64) -> impl Iterator<Item = u64> {
    (0..size / CLUSTER).map(|cluster| cluster * CLUSTER + cluster % 31 * BLOCK as u64)
}

fn content(offset: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&(!offset).to_le_bytes()));
    block
}

fn read(image: &Image, offset: u64) -> qcow2rs::Result<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    image.read_at(&mut block, offset)?;
    Ok(block)
}
