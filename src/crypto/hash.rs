//! The hash functions that a LUKS header may name, and PBKDF2 with them.

use cipher::Array;
use md5::Md5;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::digest::{Digest, OutputSizeUser};
use sha2::{Sha224, Sha256, Sha384, Sha512};
use sm3::Sm3;

/// A hash function.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub enum Hash {
    Md5,
    Sha1,
    Sha224,
    #[default]
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
    Sm3,
}

/// Evaluates an expression with a type in the place of the function.
macro_rules! with {
    ($hash:expr, $D:ident => $use:expr) => {
        match $hash {
            Hash::Md5 => {
                type $D = Md5;
                $use
            }
            Hash::Sha1 => {
                type $D = Sha1;
                $use
            }
            Hash::Sha224 => {
                type $D = Sha224;
                $use
            }
            Hash::Sha256 => {
                type $D = Sha256;
                $use
            }
            Hash::Sha384 => {
                type $D = Sha384;
                $use
            }
            Hash::Sha512 => {
                type $D = Sha512;
                $use
            }
            Hash::Ripemd160 => {
                type $D = Ripemd160;
                $use
            }
            Hash::Sm3 => {
                type $D = Sm3;
                $use
            }
        }
    };
}

/// Their names, which are QEMU's and those in LUKS headers.
const NAMES: [(Hash, &str); 8] = [
    (Hash::Md5, "md5"),
    (Hash::Sha1, "sha1"),
    (Hash::Sha224, "sha224"),
    (Hash::Sha256, "sha256"),
    (Hash::Sha384, "sha384"),
    (Hash::Sha512, "sha512"),
    (Hash::Ripemd160, "ripemd160"),
    (Hash::Sm3, "sm3"),
];

/// Room for any digest.
pub const LONGEST: usize = 64;

impl Hash {
    /// The function of that name.
    pub fn from_name(name: &str) -> Option<Hash> {
        NAMES.iter().find(|(_, known)| *known == name).map(|(hash, _)| *hash)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(hash, _)| *hash == self).map_or("", |(_, name)| name)
    }

    /// Bytes of a digest.
    pub fn len(self) -> usize {
        with!(self, D => <D as Digest>::output_size())
    }

    /// The digest of `parts`, one after the other, to the beginning of `out`; returns
    /// its length.
    pub(super) fn digest(self, parts: &[&[u8]], out: &mut [u8; LONGEST]) -> usize {
        with!(self, D => {
            let mut state = D::new();
            for part in parts {
                state.update(part);
            }
            let mut digest: Array<u8, <D as OutputSizeUser>::OutputSize> = Array::default();
            state.finalize_into(&mut digest);
            out.iter_mut().zip(&digest).for_each(|(to, from)| *to = *from);
            zeroize::Zeroize::zeroize(digest.as_mut_slice());
            digest.len()
        })
    }

    /// PBKDF2-HMAC: fills `out`.
    pub(crate) fn pbkdf2(self, passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        with!(self, D => pbkdf2::pbkdf2_hmac::<D>(passphrase, salt, iterations, out));
    }
}
