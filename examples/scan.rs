//! Reads all of a disk through a queue, many requests in flight, past the page cache,
//! straight into aligned buffers; tells how much of it is zero.
//! `cargo run --example scan disk.qcow2`

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use qcow2rs::{Buffer, Completion, Image, OpenOptions, Policy, Queue, QueueOptions, Source};

const DEPTH: u32 = 32;
const PIECE: u64 = 64 << 10;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [disk] = &args[..] else {
        eprintln!("usage: scan DISK");
        return ExitCode::from(2);
    };
    match scan(Path::new(disk)) {
        Ok(zeroes) => println!("{zeroes} bytes are zero"),
        Err(error) => {
            eprintln!("scan: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn scan(path: &Path) -> Result<u64, Box<dyn Error>> {
    let mut options = OpenOptions::new().policy(Policy::Paths);
    options.direct = true;
    let image = Arc::new(Image::open(Source::path(path), &options)?);
    let mut queue_options = QueueOptions::new();
    queue_options.set_depth(DEPTH)?;
    let queue = Queue::new(&image, &queue_options)?;

    // A buffer goes along with its request and comes back with the completion.
    let mut free = Vec::new();
    for _ in 0..DEPTH {
        free.push(Buffer::aligned(PIECE as usize)?);
    }
    let (size, mut next, mut zeroes) = (image.size(), 0, 0);
    let mut done: Vec<Completion> = Vec::new();
    loop {
        while next < size {
            let Some(mut buffer) = free.pop() else { break };
            if size - next < PIECE {
                // The end of the disk.
                buffer = Buffer::aligned((size - next) as usize)?;
            }
            let length = buffer.len() as u64;
            queue.read(buffer, next, next)?;
            next += length;
        }
        if queue.in_flight() == 0 {
            break;
        }
        queue.wait(1, DEPTH as usize, None, |completion| done.push(completion))?;
        for Completion { user_data: offset, result, buffer } in done.drain(..) {
            result.map_err(|error| format!("at {offset:#x}: {error}"))?;
            if let Some(buffer) = buffer {
                zeroes += buffer.iter().filter(|byte| **byte == 0).count() as u64;
                free.push(buffer);
            }
        }
    }
    drop(queue);
    image.close()?;
    Ok(zeroes)
}
