//! The list of an image's snapshots: reading it, finding one by its ID or name, and
//! the ID of the next. The rules are QEMU's; it knows no refcounts and no L1 tables.

use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::limits::{MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS};
use crate::format::snapshot::{Snapshot, encode_table};
use crate::image::disk::Disk;
use crate::image::qcow2::{Qcow2, SnapshotTable};
use crate::image::views;
use crate::io::engine::Engine;
use crate::metadata::snapshot_table::read_snapshots;

/// The longest name that QEMU shows and finds, in bytes.
pub const LONGEST_NAME: usize = 255;
/// What one entry takes in memory besides its name, ID and unknown data.
const EACH: u64 = 256;

impl Disk {
    /// The disk's own image, whose snapshots are meant. `NotSupported` for raw images
    /// and for snapshots that are open themselves.
    pub(super) fn image_with_snapshots(&self) -> Result<&Qcow2> {
        views::refuse(&self.view, "its snapshots")?;
        self.top().ok_or_else(|| {
            Error::new(ErrorKind::NotSupported, "raw images have no internal snapshots")
        })
    }

    /// The snapshots of the disk's own image. `Corrupt` where the table is malformed;
    /// `Limit` where it takes more than "max-metadata-size".
    pub async fn snapshot_table<E: Engine>(&self, engine: &E) -> Result<&SnapshotTable> {
        let image = self.image_with_snapshots()?;
        if let Some(table) = image.snapshots.get() {
            return Ok(table);
        }
        let header = &image.header;
        let mut list = fallible::room_for(header.snapshot_count.min(MAX_SNAPSHOTS) as usize)?;
        let mut room = self.options.max_metadata_size;
        let bytes = read_snapshots(engine, &image.storage, header, |snapshot| {
            let bytes = snapshot.id.len() + snapshot.name.len() + snapshot.extra.len();
            room = room.checked_sub(EACH + bytes as u64).ok_or_else(|| {
                Error::new(ErrorKind::Limit, "the snapshots take more than \"max-metadata-size\"")
            })?;
            list.push(snapshot);
            Ok(())
        });
        let bytes = bytes.await.map_err(|error| error.context(image.storage.name().to_owned()))?;
        // If somebody else was faster, it is the same.
        Ok(image.snapshots.get_or_init(|| SnapshotTable { list, bytes }))
    }
}

/// The place of a snapshot: the one with this ID, or else the first with this name, as
/// QEMU looks for it to apply one. `NotFound`.
pub fn find(list: &[Snapshot], id_or_name: &[u8]) -> Result<usize> {
    let by_id = list.iter().position(|snapshot| snapshot.id == id_or_name);
    by_id.or_else(|| list.iter().position(|snapshot| snapshot.name == id_or_name)).ok_or_else(
        || {
            let name = String::from_utf8_lossy(id_or_name);
            Error::new(ErrorKind::NotFound, format!("no snapshot has the ID or the name {name:?}"))
        },
    )
}

/// Whether a snapshot can have this name. `Exists` if another one has; `InvalidArgument`
/// for what QEMU could not name.
pub fn check_name(list: &[Snapshot], name: &[u8], but: Option<usize>) -> Result<()> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains(&0) {
        let text = format!("a snapshot's name has 1 to {LONGEST_NAME} bytes, none of them zero");
        return Err(Error::invalid(text));
    }
    let taken = |(index, snapshot): (usize, &Snapshot)| Some(index) != but && snapshot.name == name;
    if list.iter().enumerate().any(taken) {
        let name = String::from_utf8_lossy(name);
        return Err(Error::new(ErrorKind::Exists, format!("a snapshot is named {name:?} already")));
    }
    Ok(())
}

/// The ID of the next snapshot: one more than the highest there is. What an ID begins
/// with counts, as far as it is decimal digits.
pub fn next_id(list: &[Snapshot]) -> Vec<u8> {
    let highest = list.iter().map(|snapshot| number(&snapshot.id)).max().unwrap_or(0);
    let mut next = highest.checked_add(1);
    loop {
        // Past the last number, the lowest that is free.
        let id = next.unwrap_or(1).to_string().into_bytes();
        if list.iter().all(|snapshot| snapshot.id != id) {
            return id;
        }
        next = Some(next.unwrap_or(1).wrapping_add(1));
    }
}

fn number(id: &[u8]) -> u64 {
    let digits = id.iter().skip_while(|byte| byte.is_ascii_whitespace());
    let digits = digits.take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number: u64, digit| {
        number.saturating_mul(10).saturating_add(u64::from(digit - b'0'))
    })
}

/// The bytes of a new table. `Os(EFBIG)` where there are too many snapshots, or too
/// large a table.
pub fn encode(list: &[Snapshot], disk_size: u64) -> Result<Vec<u8>> {
    let too_big = |what: String| Error::new(ErrorKind::Os(libc::EFBIG), what);
    if list.len() > MAX_SNAPSHOTS as usize {
        return Err(too_big(format!("an image can have {MAX_SNAPSHOTS} snapshots")));
    }
    let longest = |s: &Snapshot| 72 + s.id.len() + s.name.len() + s.extra.len();
    let bytes = list.iter().map(longest).fold(0, usize::saturating_add);
    if bytes as u64 > MAX_SNAPSHOT_TABLE_BYTES {
        return Err(too_big(format!(
            "the snapshot table would have more than {MAX_SNAPSHOT_TABLE_BYTES} bytes"
        )));
    }
    encode_table(list, disk_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(snapshots: &[(&str, &str)]) -> Vec<Snapshot> {
        let snapshot = |(id, name): &(&str, &str)| Snapshot {
            id: id.as_bytes().to_vec(),
            name: name.as_bytes().to_vec(),
            ..Snapshot::default()
        };
        snapshots.iter().map(snapshot).collect()
    }

    #[test]
    fn an_id_is_found_before_a_name() {
        let list = list(&[("1", "2"), ("2", "1"), ("3", "a"), ("4", "a")]);
        let found = |what: &str| find(&list, what.as_bytes()).ok();
        assert_eq!(
            (found("1"), found("2"), found("a"), found("4")),
            (Some(0), Some(1), Some(2), Some(3))
        );
        assert_eq!(find(&list, b"5").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn the_next_id_is_one_more_than_the_highest_number() {
        let next = |ids: &[&str]| {
            let pairs: Vec<_> = ids.iter().map(|id| (*id, "")).collect();
            String::from_utf8(next_id(&list(&pairs))).unwrap()
        };
        assert_eq!(next(&[]), "1");
        assert_eq!(next(&["7", "3"]), "8");
        assert_eq!(next(&["abc", " 12x"]), "13");
        assert_eq!(next(&["18446744073709551615", "1"]), "2");
    }

    #[test]
    fn names_are_checked() {
        let list = list(&[("1", "a"), ("2", "b")]);
        let kind = |name: &[u8], but| check_name(&list, name, but).err().map(|error| error.kind());
        assert_eq!(kind(b"c", None), None);
        assert_eq!(kind(b"1", None), None, "that it is an ID does not matter");
        assert_eq!(kind(b"a", None), Some(ErrorKind::Exists));
        assert_eq!(kind(b"a", Some(0)), None);
        assert_eq!(kind(b"a", Some(1)), Some(ErrorKind::Exists));
        for name in [&b""[..], b"a\0b", &[b'x'; 256]] {
            assert_eq!(kind(name, None), Some(ErrorKind::InvalidArgument));
        }
        assert_eq!(kind(&[b'x'; 255], None), None);
    }
}
