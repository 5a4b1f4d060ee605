//! A header in the place of another one, by the write of one sector: a crash leaves the
//! old header or the new one.
//!
//! It knows bytes, not what has to be durable before that write.

use super::{BackingRef, Header, NAMES_ABOVE, autoclear, place_name};
use crate::error::{Error, ErrorKind, Result};
use crate::format::extensions::{BitmapsExt, Extensions};

/// Bytes that a medium writes as a whole.
const SECTOR: usize = 512;
/// Where the fields begin that say nothing about where extensions and names lie.
const FIELDS: usize = Header::SIZE_AT as usize;
/// Where those of version 2 and of version 3 end, up to the length of the header.
const FIELDS_END_2: usize = 72;
const FIELDS_END_3: usize = 100;

/// What is to be written.
#[derive(Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The backing file's name, if it gets a new place apart, and where: durable before
    /// the sector is written, where the old header has nothing.
    pub name: Option<(u64, Vec<u8>)>,
    /// The first sector.
    pub sector: Vec<u8>,
}

impl Header {
    /// How to replace the header that is in `old`, the first cluster, by this one: of
    /// the same image, maybe in another version, or with another name of the
    /// data file.
    ///
    /// `NotSupported` where fields and extensions do not fit into a sector, or the
    /// backing file's name has no place; `InvalidArgument` as for [`Header::to_bytes`].
    pub fn rewrite(&self, old: &[u8]) -> Result<Rewrite> {
        self.check_writable()?;
        let old_sector = old.get(..SECTOR).unwrap_or_default();
        let parsed = Header::parse(old)?;
        let same_names = parsed.extensions.data_file == self.extensions.data_file;
        if parsed.version == self.version && same_names {
            let end = if self.version > 2 { FIELDS_END_3 } else { FIELDS_END_2 };
            let mut sector = old_sector.to_vec();
            let new = self.head(false);
            let same = FIELDS..end;
            if let (Some(to), Some(from)) = (sector.get_mut(same.clone()), new.get(same)) {
                to.copy_from_slice(from);
            }
            return Ok(Rewrite { name: None, sector });
        }
        self.lay_out(old)
    }

    /// The writes, each to be durable before the next one, by which the header in `old`,
    /// the first cluster, says that the bitmap directory is at `place`, and right; `None`:
    /// that there is none. Where all of it fits into a sector, a crash leaves the old
    /// header or the new one. Elsewhere the directory that there was is changed under the
    /// cleared autoclear bit: a crash may leave an image without bitmaps.
    ///
    /// `NotSupported` where neither is possible: there is no extension, and no room.
    pub fn place_bitmaps(old: &[u8], place: Option<BitmapsExt>) -> Result<Vec<(u64, Vec<u8>)>> {
        let mut header = Header::parse(old)?;
        let valid = header.autoclear & autoclear::BITMAPS != 0;
        header.extensions.stale_bitmaps = false;
        header.extensions.bitmaps = place;
        header.autoclear &= !autoclear::BITMAPS;
        let cleared = (Header::AUTOCLEAR_AT, header.autoclear.to_be_bytes().to_vec());
        if place.is_some() {
            header.autoclear |= autoclear::BITMAPS;
        }
        let full = match header.lay_out(old) {
            Ok(Rewrite { name, sector }) => {
                return Ok(name.into_iter().chain([(0, sector)]).collect());
            }
            Err(error) if error.kind() == ErrorKind::NotSupported => error,
            Err(error) => return Err(error),
        };
        let start = header.header_length as usize;
        let end = match &header.backing {
            Some(_) => backing_offset(old) as usize,
            None => old.len(),
        };
        let area = old.get(start..end).unwrap_or_default();
        match (place, Extensions::bitmaps_at(area)) {
            (None, _) => Ok(vec![cleared]),
            (Some(place), Some(at)) => {
                let data = ((start + at) as u64, place.to_bytes());
                let set = (Header::AUTOCLEAR_AT, header.autoclear.to_be_bytes().to_vec());
                Ok(Some(cleared).filter(|_| valid).into_iter().chain([data, set]).collect())
            }
            (Some(_), None) => Err(full),
        }
    }

    /// All of it anew, in the first sector.
    fn lay_out(&self, old: &[u8]) -> Result<Rewrite> {
        let names = self.version >= 3 && self.geometry.cluster_size() > NAMES_ABOVE;
        let name = self.backing.as_ref().map_or(0, |backing| backing.name.len());
        let fits = |head: &Vec<u8>| head.len() + name <= SECTOR;
        // The names of features are for programs that do not know them: they may go.
        let head = Some(self.head(names)).filter(fits).unwrap_or_else(|| self.head(false));
        match &self.backing {
            Some(backing) if fits(&head) => {
                let mut sector = head;
                let at = sector.len() as u64;
                place_name(&mut sector, at, backing);
                sector.extend(&backing.name);
                sector.resize(SECTOR, 0);
                Ok(Rewrite { name: None, sector })
            }
            Some(backing) => self.with_name_apart(old, head, backing),
            None if head.len() <= SECTOR => {
                let mut sector = head;
                sector.resize(SECTOR, 0);
                Ok(Rewrite { name: None, sector })
            }
            None => Err(too_long("the header's extensions do not fit into its first sector")),
        }
    }

    /// With the backing file's name behind all that the old header has.
    fn with_name_apart(
        &self,
        old: &[u8],
        mut head: Vec<u8>,
        backing: &BackingRef,
    ) -> Result<Rewrite> {
        if head.len() > SECTOR {
            return Err(too_long("the header's extensions do not fit into its first sector"));
        }
        let place = backing_offset(old);
        if place >= SECTOR as u64 {
            // It is apart already.
            place_name(&mut head, place, backing);
            head.resize(SECTOR, 0);
            return Ok(Rewrite { name: None, sector: head });
        }
        let used = old.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let at = used.max(SECTOR).next_multiple_of(8);
        if at + backing.name.len() > old.len() {
            return Err(too_long("the backing file's name has no second place in the header"));
        }
        place_name(&mut head, at as u64, backing);
        head.resize(SECTOR, 0);
        Ok(Rewrite { name: Some((at as u64, backing.name.clone())), sector: head })
    }
}

/// Where the backing file's name begins in a header; 0: there is none.
fn backing_offset(header: &[u8]) -> u64 {
    let bytes = header.get(8..16).unwrap_or_default();
    bytes.iter().fold(0, |offset, byte| offset << 8 | u64::from(*byte))
}

#[cold]
fn too_long(what: &str) -> Error {
    let text = format!("{what}, so that it cannot be changed in one step");
    Error::new(ErrorKind::NotSupported, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::{compatible, incompatible};
    use crate::format::header_samples;

    /// The first cluster after these writes.
    fn apply(rewrite: &Rewrite, old: &[u8]) -> Vec<u8> {
        let mut new = old.to_vec();
        if let Some((at, name)) = &rewrite.name {
            new[*at as usize..][..name.len()].copy_from_slice(name);
            assert_eq!(Header::parse(&new).unwrap(), Header::parse(old).unwrap());
        }
        new[..SECTOR].copy_from_slice(&rewrite.sector);
        new
    }

    fn with_name(version: u32, length: usize) -> Header {
        let mut header = Header { version, ..header_samples::header(16) };
        let (name, format) = (vec![b'n'; length], Some(b"qcow2".to_vec()));
        header.backing = (length > 0).then_some(BackingRef { name, format });
        header
    }

    #[test]
    fn the_version_changes_and_nothing_else() {
        for length in [0, 1, 300, 376, 377, 500, 1023] {
            for (from, to) in [(2, 3), (3, 2)] {
                let header = with_name(from, length);
                let old = header.to_bytes().unwrap();
                let new = Header { version: to, ..header.clone() };
                let written = apply(&new.rewrite(&old).unwrap(), &old);
                let found = Header::parse(&written).unwrap();
                assert_eq!(found.version, to);
                assert_eq!(found.backing, header.backing);
                assert_eq!(found.size, header.size);
                assert_eq!(found.l1_offset, header.l1_offset);
                assert!(found.extensions.unknown.is_empty());
            }
        }
    }

    #[test]
    fn within_a_version_only_fields_change() {
        let header = with_name(3, 1023);
        let old = header.to_bytes().unwrap();
        let new = Header {
            compatible: compatible::LAZY_REFCOUNTS,
            refcount_order: 6,
            reftable_offset: 7 << 16,
            ..header.clone()
        };
        let written = apply(&new.rewrite(&old).unwrap(), &old);
        let header_length = Header::parse(&written).unwrap().header_length;
        assert_eq!(written, new.to_bytes().unwrap());
        assert_eq!(header_length, 112);
    }

    /// The header after each of these writes, the old one first.
    fn after_each(old: &[u8], steps: &[(u64, Vec<u8>)]) -> Vec<Header> {
        let mut bytes = old.to_vec();
        let mut headers = vec![Header::parse(&bytes).unwrap()];
        for (at, data) in steps {
            bytes[*at as usize..][..data.len()].copy_from_slice(data);
            headers.push(Header::parse(&bytes).unwrap());
        }
        headers
    }

    fn place(cluster: u64) -> BitmapsExt {
        BitmapsExt { count: 3, directory_size: 320, directory_offset: cluster << 16 }
    }

    #[test]
    fn one_write_places_the_bitmap_directory() {
        for length in [0, 1, 300, 377, 500, 1023] {
            let header = with_name(3, length);
            let mut bytes = header.to_bytes().unwrap();
            for now in [Some(place(7)), Some(place(8)), None, None, Some(place(9))] {
                let steps = Header::place_bitmaps(&bytes, now).unwrap();
                let headers = after_each(&bytes, &steps);
                let (last, before) = headers.split_last().unwrap();
                assert!(before.iter().all(|other| *other == headers[0]), "all at once");
                assert_eq!(last.extensions.bitmaps, now);
                assert_eq!(last.autoclear & 1, u64::from(now.is_some()));
                let same = Header {
                    autoclear: headers[0].autoclear,
                    extensions: headers[0].extensions.clone(),
                    header_length: headers[0].header_length,
                    ..last.clone()
                };
                assert_eq!(same, headers[0], "nothing else has changed");
                for (at, data) in steps {
                    bytes[at as usize..][..data.len()].copy_from_slice(&data);
                }
            }
            // However often it is changed: the name stays where it is.
            for cluster in 10..200 {
                for (at, data) in Header::place_bitmaps(&bytes, Some(place(cluster))).unwrap() {
                    bytes[at as usize..][..data.len()].copy_from_slice(&data);
                }
            }
        }
    }

    #[test]
    fn a_header_that_is_too_long_has_no_directory_while_it_is_replaced() {
        let mut header = with_name(3, 0);
        header.extensions.unknown = vec![(0x1234, vec![1; 500])];
        let old = header.to_bytes().unwrap();
        let error = Header::place_bitmaps(&old, Some(place(7))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported);
        header.extensions.bitmaps = Some(place(7));
        header.autoclear = 1;
        let old = header.to_bytes().unwrap();
        let steps = Header::place_bitmaps(&old, Some(place(8))).unwrap();
        let places: Vec<_> =
            after_each(&old, &steps).into_iter().map(|header| header.extensions.bitmaps).collect();
        assert_eq!(places, [Some(place(7)), None, None, Some(place(8))]);
        let steps = Header::place_bitmaps(&old, None).unwrap();
        let left = &after_each(&old, &steps)[1];
        assert_eq!((left.extensions.bitmaps, left.autoclear), (None, 0));
        // What was void already is written first, and then believed.
        header.autoclear = 0;
        let stale = header.to_bytes().unwrap();
        let steps = Header::place_bitmaps(&stale, Some(place(8))).unwrap();
        assert_eq!(after_each(&stale, &steps).len(), 3);
    }

    #[test]
    fn another_name_of_the_data_file_moves_what_follows() {
        for name in [&b""[..], b"d", b"a name that is a little longer"] {
            for length in [0, 1, 300, 500] {
                let mut header = with_name(3, length);
                header.incompatible |= incompatible::EXTERNAL_DATA;
                header.extensions.data_file = Some(b"data".to_vec());
                let old = header.to_bytes().unwrap();
                let mut new = header.clone();
                new.extensions.data_file = Some(name.to_vec()).filter(|name| !name.is_empty());
                let written = apply(&new.rewrite(&old).unwrap(), &old);
                let found = Header::parse(&written).unwrap();
                assert_eq!(found.extensions.data_file, new.extensions.data_file);
                assert_eq!(found.backing, new.backing);
                assert_eq!((found.size, found.l1_offset), (new.size, new.l1_offset));
            }
        }
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let header = Header { backing: with_name(3, 1000).backing, ..header_samples::header(11) };
        let old = header.to_bytes().unwrap();
        let new = Header { version: 2, ..header };
        assert_eq!(new.rewrite(&old).unwrap_err().kind(), ErrorKind::NotSupported);
        let mut header = with_name(2, 0);
        header.extensions.unknown = vec![(0x1234, vec![1; 500])];
        let old = header.to_bytes().unwrap();
        let new = Header { version: 3, ..header };
        assert_eq!(new.rewrite(&old).unwrap_err().kind(), ErrorKind::NotSupported);
    }
}
