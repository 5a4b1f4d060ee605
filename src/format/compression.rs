//! The methods of compression that an image can choose; zstd (deflate is in
//! `compressed`).
//!
//! It knows the bytes of one cluster, not where they lie. Whatever the input says,
//! output and memory are bounded: the output by its own length, memory by what a
//! context takes (some 100 KiB to read, some 700 KiB to write).

use zstd_safe::{CCtx, DCtx, ErrorCode, find_frame_compressed_size, get_error_name};

use super::compressed::{deflate, inflate};
use crate::error::{Error, ErrorKind, Result};

/// How the compressed clusters of an image are compressed: all of them alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Frames of zstd.
    Zstd,
}

impl Compression {
    /// The method with this number in a header. `BadHeader`: there is none.
    pub fn of(number: u8) -> Result<Compression> {
        match number {
            0 => Ok(Compression::Zlib),
            1 => Ok(Compression::Zstd),
            other => {
                let text = format!("compression type {other} does not exist");
                Err(Error::new(ErrorKind::BadHeader, text))
            }
        }
    }

    /// Its number in headers: 0 zlib, 1 zstd.
    pub fn number(self) -> u8 {
        match self {
            Compression::Zlib => 0,
            Compression::Zstd => 1,
        }
    }

    /// Its name in options and in what `qemu-img info` prints.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }

    /// Decompresses, so that `output` is filled exactly. What follows the data is
    /// ignored: the rest of a sector. Nothing of one call reaches the next through the
    /// context.
    ///
    /// Errors: `Corrupt`; `OutOfMemory`.
    pub fn decompress(self, context: &mut Context, input: &[u8], output: &mut [u8]) -> Result<()> {
        match self {
            Compression::Zlib => inflate(input, output),
            Compression::Zstd => read_frames(context.zstd()?, input, output),
        }
    }

    /// Compresses with the level that QEMU uses. Returns how many bytes of `output`
    /// it takes, or `None` if there are too few.
    ///
    /// Errors: `OutOfMemory`.
    pub fn compress(self, input: &[u8], output: &mut [u8]) -> Result<Option<usize>> {
        match self {
            Compression::Zlib => Ok(deflate(input, output)),
            // The level of a new context is zstd's default, 3, as in QEMU.
            Compression::Zstd => {
                let mut context = CCtx::try_create().ok_or_else(out_of_memory)?;
                Ok(context.compress2(output, input).ok())
            }
        }
    }
}

/// What decompressing needs and need not be made anew for each cluster: with zstd that
/// is a tenth of the work.
#[derive(Default)]
pub struct Context(Option<DCtx<'static>>);

impl Context {
    fn zstd(&mut self) -> Result<&mut DCtx<'static>> {
        let context = match self.0.take() {
            Some(context) => context,
            None => DCtx::try_create().ok_or_else(out_of_memory)?,
        };
        Ok(self.0.insert(context))
    }
}

/// Frame after frame until the output is full, the last of them whole, as QEMU
/// reads them. Each goes straight into the output: no window is kept beside it,
/// however large the frame says that one must be.
fn read_frames(context: &mut DCtx<'_>, input: &[u8], output: &mut [u8]) -> Result<()> {
    let (wanted, mut rest, mut filled) = (output.len(), input, 0);
    while filled < wanted {
        let whole = find_frame_compressed_size(rest).map_err(corrupt)?;
        let (Some((frame, behind)), Some(room)) =
            (rest.split_at_checked(whole).filter(|_| whole > 0), output.get_mut(filled..))
        else {
            break;
        };
        filled += context.decompress(room, frame).map_err(corrupt)?;
        rest = behind;
    }
    if filled == wanted {
        return Ok(());
    }
    Err(Error::corrupt(format!("compressed data ends after {filled} of {wanted} bytes")))
}

fn corrupt(code: ErrorCode) -> Error {
    Error::corrupt(format!("compressed data: {}", get_error_name(code)))
}

fn out_of_memory() -> Error {
    Error::new(ErrorKind::OutOfMemory, "no memory for a context of zstd")
}
