//! Which ciphers, modes and IV generators there are, and what they are called by QEMU
//! and in LUKS headers.

use super::hash::Hash;

/// A block cipher and the length of its key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub enum Cipher {
    Aes128,
    Aes192,
    #[default]
    Aes256,
    Cast5,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
}

/// A mode of operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub enum Mode {
    Ecb,
    Cbc,
    #[default]
    Xts,
    Ctr,
}

/// How the IV of a sector is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IvGenerator {
    /// The low 32 bits of its number.
    Plain,
    /// Its number.
    #[default]
    Plain64,
    /// Its number, encrypted with a hash of the key.
    Essiv(Hash),
}

/// QEMU's name, the name in LUKS headers, and the bytes of a key.
const CIPHERS: [(Cipher, &str, &str, usize); 10] = [
    (Cipher::Aes128, "aes-128", "aes", 16),
    (Cipher::Aes192, "aes-192", "aes", 24),
    (Cipher::Aes256, "aes-256", "aes", 32),
    (Cipher::Cast5, "cast5-128", "cast5", 16),
    (Cipher::Serpent128, "serpent-128", "serpent", 16),
    (Cipher::Serpent192, "serpent-192", "serpent", 24),
    (Cipher::Serpent256, "serpent-256", "serpent", 32),
    (Cipher::Twofish128, "twofish-128", "twofish", 16),
    (Cipher::Twofish192, "twofish-192", "twofish", 24),
    (Cipher::Twofish256, "twofish-256", "twofish", 32),
];

const MODES: [(Mode, &str); 4] =
    [(Mode::Ecb, "ecb"), (Mode::Cbc, "cbc"), (Mode::Xts, "xts"), (Mode::Ctr, "ctr")];

impl Cipher {
    /// The one that QEMU calls so.
    pub fn from_name(name: &str) -> Option<Cipher> {
        CIPHERS.iter().find(|known| known.1 == name).map(|known| known.0)
    }

    /// The one that a LUKS header calls so, with a key of that many bytes.
    pub(super) fn from_luks(name: &str, key_bytes: usize) -> Option<Cipher> {
        CIPHERS.iter().find(|known| known.2 == name && known.3 == key_bytes).map(|known| known.0)
    }

    /// QEMU's name.
    pub fn name(self) -> &'static str {
        CIPHERS.iter().find(|known| known.0 == self).map_or("", |known| known.1)
    }

    /// The name in LUKS headers.
    pub(super) fn luks_name(self) -> &'static str {
        CIPHERS.iter().find(|known| known.0 == self).map_or("", |known| known.2)
    }

    /// Bytes of its key.
    pub(super) fn key_bytes(self) -> usize {
        CIPHERS.iter().find(|known| known.0 == self).map_or(0, |known| known.3)
    }

    /// The same cipher that takes a digest of so many bytes as its key.
    pub(super) fn for_essiv(self, key_bytes: usize) -> Option<Cipher> {
        match self {
            Cipher::Cast5 => None,
            _ => Cipher::from_luks(self.luks_name(), key_bytes),
        }
    }
}

impl Mode {
    /// The mode of that name.
    pub fn from_name(name: &str) -> Option<Mode> {
        MODES.iter().find(|(_, known)| *known == name).map(|(mode, _)| *mode)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        MODES.iter().find(|(mode, _)| *mode == self).map_or("", |(_, name)| name)
    }

    /// Keys of the cipher that it takes.
    pub(super) fn keys(self) -> usize {
        if self == Mode::Xts { 2 } else { 1 }
    }
}

impl IvGenerator {
    /// Its name, without that of a hash.
    pub fn name(self) -> &'static str {
        match self {
            IvGenerator::Plain => "plain",
            IvGenerator::Plain64 => "plain64",
            IvGenerator::Essiv(_) => "essiv",
        }
    }

    /// The hash that it needs.
    pub fn hash(self) -> Option<Hash> {
        match self {
            IvGenerator::Essiv(hash) => Some(hash),
            IvGenerator::Plain | IvGenerator::Plain64 => None,
        }
    }
}
