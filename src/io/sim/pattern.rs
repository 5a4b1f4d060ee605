//! Which operations a test means: to make them fail, or to hold them back.

use std::ops::Range;

use super::journal::OpKind;
use super::rng::Rng;

/// Matches operations as they are issued. Empty, it matches each.
#[derive(Clone, Default, Debug)]
pub struct Pattern {
    kinds: Vec<OpKind>,
    file: Option<String>,
    range: Option<Range<u64>>,
    word: Option<u64>,
    skip: u64,
    /// One in so many, but for chance; 0 is all.
    rarity: u64,
}

impl Pattern {
    /// Any operation at all.
    pub fn any() -> Pattern {
        Pattern::default()
    }

    /// Only operations of this kind, or of the others added likewise.
    pub fn kind(mut self, kind: OpKind) -> Pattern {
        self.kinds.push(kind);
        self
    }

    /// Only on the file of this name.
    pub fn file(mut self, name: &str) -> Pattern {
        self.file = Some(name.to_owned());
        self
    }

    /// Only where the operation touches this range.
    pub fn touching(mut self, range: Range<u64>) -> Pattern {
        self.range = Some(range);
        self
    }

    /// Only writes of a sector that begins with these eight bytes (in the
    /// machine's order): finds a guest's data wherever it is put.
    pub fn carrying(mut self, word: u64) -> Pattern {
        self.word = Some(word);
        self
    }

    /// Lets the first `count` operations pass that would match.
    pub fn after(mut self, count: u64) -> Pattern {
        self.skip = count;
        self
    }

    /// Only one in `count` of those that would match, at random.
    pub fn one_in(mut self, count: u64) -> Pattern {
        self.rarity = count;
        self
    }

    /// Whether this operation is meant; counts down those to be let pass.
    pub(super) fn matches(
        &mut self,
        kind: OpKind,
        file: &str,
        range: Range<u64>,
        data: &[u8],
        rng: &mut Rng,
    ) -> bool {
        let touches = |wanted: &Range<u64>| wanted.start < range.end && range.start < wanted.end;
        let carries = |word: u64| {
            kind == OpKind::Write && data.chunks(512).any(|s| s.starts_with(&word.to_ne_bytes()))
        };
        let meant = (self.kinds.is_empty() || self.kinds.contains(&kind))
            && self.file.as_ref().is_none_or(|wanted| wanted == file)
            && self.range.as_ref().is_none_or(touches)
            && self.word.is_none_or(carries);
        if meant && self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        meant && (self.rarity < 2 || rng.chance(1, self.rarity))
    }
}

/// Makes operations fail.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Which ones.
    pub pattern: Pattern,
    /// With which errno.
    pub errno: i32,
    /// Every one that matches, or the first only.
    pub forever: bool,
}

/// At which point an operation is held back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Before it takes effect.
    Apply,
    /// After it took effect, before its future completes.
    Complete,
}
