//! Against which kinds of metadata writes are checked: QEMU's "overlap-check", as it is
//! said by name. Pure; where metadata is, `overlap` knows.

use super::overlap::Metadata;

/// Kinds that a level covers, each level those of the ones before it, too.
const CONSTANT: [Metadata; 6] = [
    Metadata::Header,
    Metadata::L1,
    Metadata::RefcountTable,
    Metadata::SnapshotTable,
    Metadata::BitmapDirectory,
    Metadata::EncryptionHeader,
];
const CACHED: [Metadata; 3] = [Metadata::L2, Metadata::RefcountBlock, Metadata::InactiveL1];
const ALL: [Metadata; 1] = [Metadata::InactiveL2];

/// A level, by QEMU's name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// Nothing is checked.
    None,
    /// What is found in a time that does not depend on the image: the header, the
    /// active L1 table, the refcount table, the snapshot table, the bitmap directory,
    /// the encryption header.
    Constant,
    /// All that is in memory anyway: L2 tables, refcount blocks, snapshots' L1 tables.
    Cached,
    /// The L2 tables of snapshots, too, which have to be looked for.
    All,
}

impl Level {
    fn kinds(self) -> u16 {
        let levels: [(Level, &[Metadata]); 3] =
            [(Level::Constant, &CONSTANT), (Level::Cached, &CACHED), (Level::All, &ALL)];
        let covered = levels.into_iter().filter(|(level, _)| *level as u8 <= self as u8);
        covered.flat_map(|(_, kinds)| kinds).fold(0, |all, kind| all | *kind as u16)
    }
}

/// What was asked for: a level, and single kinds otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OverlapCheck {
    /// "overlap-check", and "overlap-check.template": if both are given they agree.
    levels: [Option<Level>; 2],
    on: u16,
    off: u16,
}

impl OverlapCheck {
    /// Says something by the name behind "overlap-check", "" or ".template" or that of a
    /// kind, as in ".main-header". `None`: there is no such name; `Some(Err)`: what it
    /// may be.
    pub fn set(&mut self, name: &str, value: &str) -> Option<Result<(), &'static str>> {
        let which = match name {
            "" => 0,
            ".template" => 1,
            _ => {
                let name = name.strip_prefix('.')?;
                let kind =
                    Metadata::ALL.into_iter().find(|kind| kind.option_name() == Some(name))?;
                return Some(self.switch(kind, value));
            }
        };
        let level = match value {
            "none" => Level::None,
            "constant" => Level::Constant,
            "cached" => Level::Cached,
            "all" => Level::All,
            _ => return Some(Err("it is none, constant, cached or all")),
        };
        self.levels[which] = Some(level);
        Some(Ok(()))
    }

    fn switch(&mut self, kind: Metadata, value: &str) -> Result<(), &'static str> {
        let (to, from) = match value {
            "on" | "yes" | "true" | "y" => (&mut self.on, &mut self.off),
            "off" | "no" | "false" | "n" => (&mut self.off, &mut self.on),
            _ => return Err("it is on or off"),
        };
        *to |= kind as u16;
        *from &= !(kind as u16);
        Ok(())
    }

    /// Whether two levels were given that are not the same.
    pub fn is_contradictory(&self) -> bool {
        matches!(self.levels, [Some(one), Some(other)] if one != other)
    }

    /// The kinds that are checked, as bits of [`Metadata`].
    pub(super) fn kinds(&self) -> u16 {
        let level = self.levels[0].or(self.levels[1]).unwrap_or(Level::Cached);
        level.kinds() & !self.off | self.on
    }

    /// Whether the L2 tables of snapshots have to be known.
    pub fn needs_inactive_l2(&self) -> bool {
        self.kinds() & Metadata::InactiveL2 as u16 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(list: &[(&str, &str)]) -> u16 {
        let mut check = OverlapCheck::default();
        list.iter().for_each(|(name, value)| check.set(name, value).unwrap().unwrap());
        check.kinds()
    }

    #[test]
    fn levels_contain_one_another() {
        let all = Metadata::ALL.into_iter().fold(0, |all, kind| all | kind as u16);
        assert_eq!(kinds(&[("", "none")]), 0);
        assert_eq!(kinds(&[("", "all")]), all);
        assert_eq!(kinds(&[("", "cached")]), all & !(Metadata::InactiveL2 as u16));
        assert_eq!(kinds(&[]), kinds(&[(".template", "cached")]));
        assert_eq!(kinds(&[("", "constant")]).count_ones(), 6);
    }

    #[test]
    fn kinds_are_switched_whatever_comes_first() {
        let header = Metadata::Header as u16;
        assert_eq!(kinds(&[(".main-header", "on"), ("", "none")]), header);
        assert_eq!(kinds(&[("", "all"), (".main-header", "off")]), kinds(&[("", "all")]) & !header);
        assert_eq!(kinds(&[(".main-header", "on"), (".main-header", "off"), ("", "none")]), 0);
        assert_eq!(kinds(&[(".inactive-l2", "y")]), kinds(&[("", "all")]));
    }

    #[test]
    fn names_and_values_are_qemus() {
        let mut check = OverlapCheck::default();
        assert!(check.set(".l3", "on").is_none() && check.set("x", "on").is_none());
        assert!(check.set("", "on").unwrap().is_err());
        assert!(check.set(".template", "some").unwrap().is_err());
        assert!(check.set(".active-l2", "all").unwrap().is_err());
        assert_eq!(check, OverlapCheck::default());
        check.set("", "all").unwrap().unwrap();
        check.set(".template", "all").unwrap().unwrap();
        assert!(!check.is_contradictory());
        check.set(".template", "none").unwrap().unwrap();
        assert!(check.is_contradictory());
    }
}
