//! A header in the place of another one, by the write of one sector: a crash leaves the
//! old header or the new one.
//!
//! It knows bytes, not what has to be durable before that write.

use super::{BackingRef, Header, NAMES_ABOVE, place_name};
use crate::error::{Error, ErrorKind, Result};

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

#[cold]
fn too_long(what: &str) -> Error {
    let text = format!("{what}, so that the header cannot be changed in one step");
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
