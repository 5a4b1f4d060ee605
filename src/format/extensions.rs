//! Header extensions: the records between the header's fields and the backing
//! file name.
//!
//! It knows the records, not the header around them.

use super::bitmap::LONGEST_ENTRY;
use super::bytes::{Reader, c_string};
use super::features::KNOWN_NAMES;
use super::limits::{MAX_BACKING_FORMAT, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_HOST_OFFSET};
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::geometry::Geometry;

/// Ends the list.
const END: u32 = 0;
/// Format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the LUKS header lies.
const CRYPTO: u32 = 0x0537_be77;
/// Where the bitmap directory lies.
const BITMAPS: u32 = 0x2385_2875;
/// Name of the external data file.
const DATA_FILE: u32 = 0x4441_5441;

/// Bytes of one record of the feature name table, and of the name in it.
const FEATURE_RECORD: usize = 48;
const FEATURE_NAME: usize = 46;

/// `crypt_method` of an image encrypted by LUKS.
pub(super) const CRYPT_LUKS: u32 = 2;

/// Everything the extensions say, except the backing file's format, which
/// belongs to [`super::header::BackingRef`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The names that the image's writer gave to feature bits.
    pub feature_names: Option<Vec<FeatureName>>,
    /// The bitmap directory, if the autoclear bit says that it is valid.
    pub bitmaps: Option<BitmapsExt>,
    /// There is a bitmaps extension that a program without bitmap support made
    /// stale. It is not written back: a writer must rewrite the header before
    /// it sets the autoclear bit again.
    pub stale_bitmaps: bool,
    /// The LUKS header.
    pub crypto: Option<CryptoExt>,
    /// Name of the external data file, bytes as the image has them.
    pub data_file: Option<Vec<u8>>,
    /// Extensions we do not know, kept as they are, in the file's order.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// The name of one feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// The number of the bit.
    pub bit: u8,
    /// The name, without padding; at most 46 bytes.
    pub name: Vec<u8>,
}

/// Where the bitmap directory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExt {
    /// Number of bitmaps, 1 to [`MAX_BITMAPS`].
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Where it begins; aligned to a cluster.
    pub directory_offset: u64,
}

/// Where the LUKS header lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoExt {
    /// Where it begins; aligned to a cluster.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// What the header's fields say that decides how extensions are read.
#[derive(Clone, Copy)]
pub(super) struct Fields {
    pub(super) geometry: Geometry,
    pub(super) crypt_method: u32,
    pub(super) bitmaps_valid: bool,
}

fn bad(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadHeader, context)
}

/// Splits the area into records (magic, data), up to the end marker.
struct Records<'a> {
    area: Reader<'a>,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<(u32, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.area.remaining() == 0 {
            return None;
        }
        let record = self.record();
        if record.is_none() {
            self.area = Reader::new(&[]);
        }
        match record {
            Some((END, _)) => {
                self.area = Reader::new(&[]);
                None
            }
            Some(record) => Some(Ok(record)),
            None => Some(Err(bad("a header extension passes the end of the header's area"))),
        }
    }
}

impl<'a> Records<'a> {
    fn record(&mut self) -> Option<(u32, &'a [u8])> {
        let magic = self.area.u32()?;
        let length = usize::try_from(self.area.u32()?).ok()?;
        let data = self.area.take(length)?;
        // The padding of the last record may be cut off.
        let padding = length.next_multiple_of(8) - length;
        self.area.take(padding.min(self.area.remaining()))?;
        Some((magic, data))
    }
}

impl Extensions {
    /// Reads the extension area: the bytes from the end of the header's fields
    /// to the backing file name or the end of the first cluster. Returns the
    /// backing file's format too. Of extensions that come twice the last
    /// counts, as in QEMU. All errors are [`ErrorKind::BadHeader`].
    pub(super) fn parse(area: &[u8], fields: Fields) -> Result<(Extensions, Option<Vec<u8>>)> {
        let mut extensions = Extensions::default();
        let mut backing_format = None;
        for record in (Records { area: Reader::new(area) }) {
            let (magic, data) = record?;
            match magic {
                BACKING_FORMAT if data.len() > MAX_BACKING_FORMAT => {
                    return Err(bad(format!(
                        "the backing format's name has {} bytes, more than {MAX_BACKING_FORMAT}",
                        data.len()
                    )));
                }
                BACKING_FORMAT => backing_format = Some(c_string(data).to_vec()),
                FEATURE_NAMES => extensions.feature_names = Some(parse_names(data)),
                CRYPTO => extensions.crypto = Some(CryptoExt::parse(data, fields)?),
                // A stale extension is not even looked into.
                BITMAPS if data.len() == BitmapsExt::BYTES && !fields.bitmaps_valid => {
                    extensions.stale_bitmaps = true;
                }
                BITMAPS => extensions.bitmaps = Some(BitmapsExt::parse(data, fields.geometry)?),
                DATA_FILE => extensions.data_file = Some(fallible::copy(c_string(data))?),
                _ => extensions.unknown.push((magic, fallible::copy(data)?)),
            }
        }
        Ok((extensions, backing_format))
    }

    /// The feature names in an area that need not be valid otherwise: they
    /// explain why an image is refused.
    pub(super) fn names_in(area: &[u8]) -> Vec<FeatureName> {
        Records { area: Reader::new(area) }
            .map_while(Result::ok)
            .filter(|(magic, _)| *magic == FEATURE_NAMES)
            .last()
            .map(|(_, data)| parse_names(data))
            .unwrap_or_default()
    }

    /// Where in an area the content of the bitmaps extension begins that counts.
    pub(super) fn bitmaps_at(area: &[u8]) -> Option<usize> {
        let mut records = Records { area: Reader::new(area) };
        let mut found = None;
        while let Some(Ok((magic, data))) = records.next() {
            if magic == BITMAPS && data.len() == BitmapsExt::BYTES {
                let behind = area.len() - records.area.remaining();
                found = behind.checked_sub(BitmapsExt::BYTES);
            }
        }
        found
    }

    /// Appends all extensions in QEMU's order, with the end marker. `names`
    /// says whether the table of the known feature names is written, `data_file`
    /// whether that name is. The caller checks what fits.
    pub(super) fn append_to(
        &self,
        out: &mut Vec<u8>,
        backing_format: Option<&[u8]>,
        data_file: bool,
        names: bool,
    ) {
        if let Some(format) = backing_format {
            append(out, BACKING_FORMAT, format);
        }
        if let Some(name) = self.data_file.as_deref().filter(|_| data_file) {
            append(out, DATA_FILE, name);
        }
        if let Some(crypto) = &self.crypto {
            let fields = [crypto.offset.to_be_bytes(), crypto.length.to_be_bytes()];
            append(out, CRYPTO, fields.as_flattened());
        }
        if names {
            append(out, FEATURE_NAMES, &known_names());
        }
        if let Some(bitmaps) = &self.bitmaps {
            append(out, BITMAPS, &bitmaps.to_bytes());
        }
        for (magic, data) in &self.unknown {
            append(out, *magic, data);
        }
        append(out, END, &[]);
    }
}

impl BitmapsExt {
    const BYTES: usize = 24;

    /// As it is stored.
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut data = Vec::with_capacity(BitmapsExt::BYTES);
        data.extend(self.count.to_be_bytes());
        data.extend([0; 4]);
        data.extend(self.directory_size.to_be_bytes());
        data.extend(self.directory_offset.to_be_bytes());
        data
    }

    fn parse(data: &[u8], geometry: Geometry) -> Result<BitmapsExt> {
        let mut fields = Reader::new(data);
        let read = (|| Some((fields.u32()?, fields.u32()?, fields.u64()?, fields.u64()?)))();
        let Some((count, reserved, directory_size, directory_offset)) =
            read.filter(|_| data.len() == BitmapsExt::BYTES)
        else {
            return Err(bad(format!("the bitmaps extension has {} bytes, not 24", data.len())));
        };
        if reserved != 0 {
            return Err(bad("the reserved field of the bitmaps extension is not zero"));
        }
        if count == 0 || count > MAX_BITMAPS {
            return Err(bad(format!(
                "the bitmaps extension names {count} bitmaps; 1 to {MAX_BITMAPS} are possible"
            )));
        }
        if geometry.in_cluster(directory_offset) != 0 || directory_offset > MAX_HOST_OFFSET {
            return Err(bad(format!(
                "the bitmap directory's offset {directory_offset:#x} is invalid"
            )));
        }
        if directory_size > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(bad(format!(
                "the bitmap directory has {directory_size} bytes, more than \
                 {MAX_BITMAP_DIRECTORY_BYTES}"
            )));
        }
        Ok(BitmapsExt { count, directory_size, directory_offset })
    }

    /// Whether the directory is no longer than its entries can be: asked before so
    /// much is read. `Corrupt` if it is. Apart from parsing, for an image with such
    /// a directory may be read.
    pub fn check_directory(&self) -> Result<()> {
        if self.directory_size > u64::from(self.count) * LONGEST_ENTRY {
            return Err(Error::corrupt("the bitmap directory is longer than its entries"));
        }
        Ok(())
    }
}

impl CryptoExt {
    fn parse(data: &[u8], fields: Fields) -> Result<CryptoExt> {
        if fields.crypt_method != CRYPT_LUKS {
            return Err(bad("there is an encryption header, but the image is not LUKS encrypted"));
        }
        let mut reader = Reader::new(data);
        let read = (|| Some((reader.u64()?, reader.u64()?)))();
        let Some((offset, length)) = read.filter(|_| data.len() == 16) else {
            return Err(bad(format!("the encryption extension has {} bytes, not 16", data.len())));
        };
        if fields.geometry.in_cluster(offset) != 0 {
            return Err(bad(format!("the encryption header's offset {offset:#x} is unaligned")));
        }
        if offset.checked_add(length).is_none_or(|end| end > MAX_HOST_OFFSET) {
            let text =
                format!("{length} bytes at {offset:#x} are no place of an encryption header");
            return Err(bad(text));
        }
        Ok(CryptoExt { offset, length })
    }
}

/// Reads a feature name table. Records without a name say nothing; a last
/// record that is cut off counts as padded with zeros.
fn parse_names(data: &[u8]) -> Vec<FeatureName> {
    data.chunks(FEATURE_RECORD)
        .filter_map(|record| match record {
            [kind, bit, name @ ..] => {
                let name = c_string(name).to_vec();
                (!name.is_empty()).then_some(FeatureName { kind: *kind, bit: *bit, name })
            }
            _ => None,
        })
        .collect()
}

/// The feature name table that QEMU writes.
fn known_names() -> Vec<u8> {
    let mut table = Vec::with_capacity(KNOWN_NAMES.len() * FEATURE_RECORD);
    for (kind, bit, name) in KNOWN_NAMES {
        table.extend([kind, bit]);
        table.extend(name.bytes().chain(std::iter::repeat(0)).take(FEATURE_NAME));
    }
    table
}

/// Appends one extension, padded to a multiple of 8 bytes.
fn append(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    out.extend(magic.to_be_bytes());
    // What does not fit into a cluster is refused by the caller.
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
    let padding = data.len().next_multiple_of(8) - data.len();
    out.extend(std::iter::repeat_n(0, padding));
}
