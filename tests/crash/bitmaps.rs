//! Persistent bitmaps of an image file, read with other code than the driver's; and what
//! they have to say after a crash.

use super::layout::{BITMAPS, Header, ReadAt, Table, be16, be32, be64, bits};

/// A bitmap as the file has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub name: Vec<u8>,
    pub in_use: bool,
    pub auto: bool,
    pub granularity: u64,
    /// For each part of the disk; not read if it is in use.
    pub dirty: Vec<bool>,
}

/// All bitmaps of a file; an error where they contradict each other.
pub fn read(file: &dyn ReadAt) -> Result<Vec<Stored>, String> {
    let header = Header::read(file)?;
    let Some(extension) = header.extension(BITMAPS).filter(|_| header.autoclear & 1 == 1) else {
        return Ok(Vec::new());
    };
    let (count, length, offset) = (be32(extension, 0), be64(extension, 8), be64(extension, 16));
    let directory = file.bytes(offset, length);
    let (mut at, mut all) = (0, Vec::new());
    for index in 0..count {
        let entry = directory.get(at..).filter(|rest| rest.len() >= 24);
        let entry = entry.ok_or_else(|| format!("the directory ends before bitmap {index}"))?;
        let table = Table { offset: be64(entry, 0), entries: be32(entry, 8) };
        let (flags, kind, granularity) = (be32(entry, 12), entry[16], 1 << entry[17]);
        if flags & !3 != 0 || kind != 1 || be32(entry, 20) != 0 {
            return Err(format!("bitmap {index}: flags {flags:#x}, type {kind}"));
        }
        let end = 24 + be16(entry, 18) as usize;
        let name = entry.get(24..end).ok_or_else(|| format!("bitmap {index}: its name"))?;
        let in_use = flags & 1 == 1;
        let mut dirty = Vec::new();
        if !in_use {
            let parts = header.size.div_ceil(granularity);
            if parts.div_ceil(8).div_ceil(header.cluster) != table.entries {
                return Err(format!("bitmap {index}: {} entries", table.entries));
            }
            for word in header.read_table(file, table) {
                let bytes = match (word & 1, bits(word, 9..56)) {
                    (0, 0) => vec![0; header.cluster as usize],
                    (_, 0) => vec![0xff; header.cluster as usize],
                    (_, offset) => file.bytes(offset, header.cluster),
                };
                dirty.extend((0..bytes.len() * 8).map(|bit| bytes[bit / 8] >> (bit % 8) & 1 == 1));
            }
            dirty.truncate(parts as usize);
        }
        all.push(Stored { name: name.to_vec(), in_use, auto: flags & 2 == 2, granularity, dirty });
        at += end.next_multiple_of(8);
    }
    if at as u64 != length {
        return Err(format!("the directory has {length} bytes, its entries {at}"));
    }
    Ok(all)
}

/// A bitmap that is not in use knows of everything that is other than it was when
/// nothing was dirty.
pub fn covers(bitmap: &Stored, then: &[u8], now: &[u8]) -> Result<(), String> {
    if bitmap.in_use {
        return Ok(());
    }
    let part = bitmap.granularity as usize;
    let changed = then.chunks(part).zip(now.chunks(part)).map(|(then, now)| then != now);
    for (index, changed) in changed.enumerate() {
        if changed && bitmap.dirty.get(index) != Some(&true) {
            let name = String::from_utf8_lossy(&bitmap.name);
            return Err(format!("the bitmap {name} does not know that part {index} has changed"));
        }
    }
    Ok(())
}
