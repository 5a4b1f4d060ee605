//! The cipher of a disk: sectors are encrypted and decrypted in place, by their number.

use cipher::Block;
use zeroize::Zeroizing;

use super::SECTOR;
use super::algorithms::{Cipher, IvGenerator, Mode};
use super::hash::LONGEST;
use super::modes::{BATCH, Ivs, Sectors, sectors};
use super::secret::Secret;
use crate::error::{Error, ErrorKind, Result};

/// A cipher with its key, its mode and its IVs. Keys are wiped on drop.
pub struct SectorCipher {
    cipher: Box<dyn Sectors>,
    ivs: Generator,
}

enum Generator {
    Plain,
    Plain64,
    Essiv(Box<dyn Sectors>),
}

impl SectorCipher {
    /// The cipher of a disk with this master key. `NotSupported`: they do not go
    /// together.
    pub(super) fn new(
        cipher: Cipher,
        mode: Mode,
        ivs: IvGenerator,
        key: &[u8],
    ) -> Result<SectorCipher> {
        let ivs = match ivs {
            IvGenerator::Plain => Generator::Plain,
            IvGenerator::Plain64 => Generator::Plain64,
            IvGenerator::Essiv(hash) => {
                let Some(essiv) = cipher.for_essiv(hash.len()) else {
                    return Err(no_essiv(cipher, hash.len()));
                };
                let mut digest = Zeroizing::new([0; LONGEST]);
                let length = hash.digest(&[key], &mut digest);
                let salt = digest.get(..length).unwrap_or_default();
                Generator::Essiv(sectors(essiv, Mode::Ecb, salt)?)
            }
        };
        Ok(SectorCipher { cipher: sectors(cipher, mode, key)?, ivs })
    }

    /// That of images encrypted in the old way: the passphrase is the key, cut off or
    /// filled up with zeroes.
    pub fn legacy_aes(passphrase: &Secret) -> Result<SectorCipher> {
        let mut key = Zeroizing::new([0; 16]);
        key.iter_mut().zip(passphrase.bytes()).for_each(|(to, from)| *to = *from);
        SectorCipher::new(Cipher::Aes128, Mode::Cbc, IvGenerator::Plain64, key.as_slice())
    }

    /// Encrypts whole sectors, the first of which has the number `sector`.
    pub fn encrypt(&self, data: &mut [u8], sector: u64) {
        self.each(data, sector, |data, ivs| self.cipher.encrypt(data, ivs));
    }

    /// Decrypts whole sectors, the first of which has the number `sector`.
    pub fn decrypt(&self, data: &mut [u8], sector: u64) {
        self.each(data, sector, |data, ivs| self.cipher.decrypt(data, ivs));
    }

    #[inline]
    fn each(&self, data: &mut [u8], mut sector: u64, work: impl Fn(&mut [u8], &mut Ivs)) {
        let mut ivs = [Block::<aes::Aes128>::default(); BATCH];
        for batch in data.chunks_mut(BATCH * SECTOR) {
            let ivs = ivs.get_mut(..batch.len() / SECTOR).unwrap_or_default();
            for iv in &mut *ivs {
                let number = match self.ivs {
                    Generator::Plain => sector & u64::from(u32::MAX),
                    Generator::Plain64 | Generator::Essiv(_) => sector,
                };
                iv.0 = u128::from(number).to_le_bytes();
                sector = sector.wrapping_add(1);
            }
            if let Generator::Essiv(cipher) = &self.ivs {
                cipher.encrypt(Block::<aes::Aes128>::slice_as_flattened_mut(ivs), &mut []);
            }
            work(batch, ivs);
        }
    }
}

pub(super) fn no_essiv(cipher: Cipher, digest: usize) -> Error {
    let text = format!(
        "the IV generator essiv has no key of {digest} bytes for {}: choose another ivgen-hash-alg",
        cipher.name()
    );
    Error::new(ErrorKind::NotSupported, text)
}
