//! The snapshot table: entries of varying length, each at a multiple of 8.
//!
//! It knows entries and their limits, not what the L1 tables they name hold.

use super::bytes::Reader;
use super::limits::{
    MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS,
};
use crate::error::{Error, Result};
use crate::geometry::Geometry;

/// Bytes of the extra data that we know: VM state size, disk size, icount.
const KNOWN_EXTRA: usize = 24;
/// How QEMU stores "no icount".
const NO_ICOUNT: u64 = u64::MAX;

/// One internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table begins.
    pub l1_offset: u64,
    /// Number of entries of its L1 table.
    pub l1_size: u32,
    /// Its ID, usually a decimal number.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub date_sec: u32,
    /// When it was taken: nanoseconds of the second.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state behind the virtual disk; 0 for none.
    pub vm_state_size: u64,
    /// Size of its virtual disk in bytes; `None` (which version 3 forbids)
    /// means that of the active image.
    pub disk_size: Option<u64>,
    /// The guest's instruction count.
    pub icount: Option<u64>,
    /// Extra data behind the 24 bytes that we know, kept as it is.
    pub extra: Vec<u8>,
}

/// Reads a snapshot table of `count` entries from its start. Returns the
/// entries and how many bytes they take.
///
/// Errors: `Corrupt` if the bytes end too early, or for an entry outside the
/// limits. A caller that does not know the table's size reads on with
/// [`Snapshot::parse_next`].
pub fn parse_table(bytes: &[u8], count: u32) -> Result<(Vec<Snapshot>, usize)> {
    if count > MAX_SNAPSHOTS {
        return Err(Error::corrupt(format!(
            "there are {count} snapshots, more than {MAX_SNAPSHOTS}"
        )));
    }
    let mut snapshots = Vec::new();
    let mut used = 0;
    for index in 0..count {
        let found = Snapshot::parse_next(bytes, used)
            .map_err(|error| error.context(format!("entry {index} of the snapshot table")))?;
        let Some((snapshot, end)) = found else {
            return Err(Error::corrupt(format!(
                "the snapshot table ends inside entry {index}, at byte {}",
                bytes.len()
            )));
        };
        snapshot
            .check_l1_limits()
            .map_err(|error| error.context(format!("entry {index} of the snapshot table")))?;
        snapshots.push(snapshot);
        used = end;
    }
    Ok((snapshots, used))
}

/// The bytes of a snapshot table, as QEMU writes it: always with all extra data
/// that we know. `disk_size` is what entries get that have none of their own.
///
/// Errors: `InvalidArgument` for what the format cannot express.
pub fn encode_table(snapshots: &[Snapshot], disk_size: u64) -> Result<Vec<u8>> {
    if snapshots.len() > MAX_SNAPSHOTS as usize {
        return Err(Error::invalid(format!("an image can have {MAX_SNAPSHOTS} snapshots")));
    }
    let mut out = Vec::new();
    for snapshot in snapshots {
        out.resize(out.len().next_multiple_of(8), 0);
        snapshot.append_to(&mut out, disk_size)?;
    }
    if out.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
        return Err(Error::invalid(format!(
            "the snapshot table would have {} bytes, more than {MAX_SNAPSHOT_TABLE_BYTES}",
            out.len()
        )));
    }
    Ok(out)
}

impl Snapshot {
    /// Reads the entry behind the one that ended at `at` (0 for the first).
    /// Returns it and where it ends, or `None` if it needs more bytes than
    /// there are: a table tells its size only by its entries.
    ///
    /// Errors: `Corrupt` for an entry outside the limits, or if the table
    /// passes [`MAX_SNAPSHOT_TABLE_BYTES`].
    pub fn parse_next(bytes: &[u8], at: usize) -> Result<Option<(Snapshot, usize)>> {
        let too_big = |end: usize| end as u64 > MAX_SNAPSHOT_TABLE_BYTES;
        let start = at.checked_next_multiple_of(8).filter(|start| !too_big(*start));
        let Some(start) = start else {
            return Err(table_too_big());
        };
        let Some(entry) = bytes.get(start..) else {
            return Ok(None);
        };
        let mut fields = Reader::new(entry);
        let Some((snapshot, lengths)) = Snapshot::fixed_part(&mut fields) else {
            return Ok(None);
        };
        if lengths.extra > MAX_SNAPSHOT_EXTRA as usize {
            return Err(Error::corrupt(format!(
                "{} bytes of extra data, more than {MAX_SNAPSHOT_EXTRA}",
                lengths.extra
            )));
        }
        let Some(snapshot) = snapshot.varying_part(&mut fields, lengths) else {
            return Ok(None);
        };
        let end = bytes.len() - fields.remaining();
        if too_big(end) {
            return Err(table_too_big());
        }
        Ok(Some((snapshot, end)))
    }

    fn fixed_part(fields: &mut Reader) -> Option<(Snapshot, Lengths)> {
        let (l1_offset, l1_size) = (fields.u64()?, fields.u32()?);
        let (id, name) = (fields.u16()?.into(), fields.u16()?.into());
        let snapshot = Snapshot {
            l1_offset,
            l1_size,
            date_sec: fields.u32()?,
            date_nsec: fields.u32()?,
            vm_clock_nsec: fields.u64()?,
            vm_state_size: fields.u32()?.into(),
            ..Snapshot::default()
        };
        let extra = usize::try_from(fields.u32()?).ok()?;
        Some((snapshot, Lengths { extra, id, name }))
    }

    fn varying_part(mut self, fields: &mut Reader, lengths: Lengths) -> Option<Snapshot> {
        let mut extra = Reader::new(fields.take(lengths.extra)?);
        self.vm_state_size = extra.u64().unwrap_or(self.vm_state_size);
        self.disk_size = extra.u64();
        self.icount = extra.u64().filter(|icount| *icount != NO_ICOUNT);
        if lengths.extra > KNOWN_EXTRA {
            self.extra = extra.take(extra.remaining())?.to_vec();
        }
        self.id = fields.take(lengths.id)?.to_vec();
        self.name = fields.take(lengths.name)?.to_vec();
        Some(self)
    }

    /// Checks the limits of the L1 table that need no geometry. `Corrupt` if it
    /// is outside them.
    pub fn check_l1_limits(&self) -> Result<()> {
        let bytes = u64::from(self.l1_size) * 8;
        let end = self.l1_offset.checked_add(bytes);
        if bytes > MAX_L1_BYTES || end.is_none_or(|end| end > MAX_HOST_OFFSET + 1) {
            return Err(Error::corrupt(format!(
                "the L1 table at {:#x} with {} entries is outside the limits",
                self.l1_offset, self.l1_size
            )));
        }
        Ok(())
    }

    /// Checks that the L1 table may be used: limits and alignment. `Corrupt` if
    /// not.
    pub fn check_l1(&self, geometry: Geometry) -> Result<()> {
        self.check_l1_limits()?;
        if geometry.in_cluster(self.l1_offset) != 0 {
            return Err(Error::corrupt(format!(
                "the snapshot's L1 table offset {:#x} is unaligned",
                self.l1_offset
            )));
        }
        Ok(())
    }

    fn append_to(&self, out: &mut Vec<u8>, disk_size: u64) -> Result<()> {
        let length = |what: &str, bytes: &[u8]| {
            u16::try_from(bytes.len())
                .map_err(|_| Error::invalid(format!("the snapshot's {what} is too long")))
        };
        let extra = (KNOWN_EXTRA as u32)
            .checked_add(u32::try_from(self.extra.len()).unwrap_or(u32::MAX))
            .filter(|extra| *extra <= MAX_SNAPSHOT_EXTRA)
            .ok_or_else(|| Error::invalid("the snapshot's extra data is too long"))?;
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(length("ID", &self.id)?.to_be_bytes());
        out.extend(length("name", &self.name)?.to_be_bytes());
        out.extend(self.date_sec.to_be_bytes());
        out.extend(self.date_nsec.to_be_bytes());
        out.extend(self.vm_clock_nsec.to_be_bytes());
        // Programs that know the short field only shall see no VM state rather
        // than a part of it.
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend(extra.to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(self.disk_size.unwrap_or(disk_size).to_be_bytes());
        out.extend(self.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.id);
        out.extend(&self.name);
        Ok(())
    }
}

/// Lengths of the parts of an entry that vary.
struct Lengths {
    extra: usize,
    id: usize,
    name: usize,
}

fn table_too_big() -> Error {
    Error::corrupt(format!("the snapshot table has more than {MAX_SNAPSHOT_TABLE_BYTES} bytes"))
}
