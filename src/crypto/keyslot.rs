//! The master key into a key slot, and out of it.

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::afsplit;
use super::hash::Hash;
use super::luks::{DIGEST, Header, SALT, STRIPES, Slot, Suite};
use super::secret::{Key, Secret};
use super::sectors::SectorCipher;
use crate::error::Result;
use crate::fallible;

/// Fills a buffer with random bytes.
pub type Random<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<()>;

impl Header {
    /// A header and its master key, which no slot has yet. `digest_iterations`: for the
    /// digest that tells a right key from a wrong one.
    pub fn generate(
        suite: Suite,
        iv_hash: Option<Hash>,
        digest_iterations: u32,
        random: Random<'_>,
    ) -> Result<(Header, Key)> {
        let mut key = Zeroizing::new(fallible::filled(suite.check()?, 0u8)?);
        random(&mut key)?;
        let (mut salt, mut uuid) = ([0; SALT], [0; 16]);
        random(&mut salt)?;
        random(&mut uuid)?;
        let mut digest = [0; DIGEST];
        suite.hash.pbkdf2(&key, &salt, digest_iterations, &mut digest);
        let header =
            Header::new(suite, iv_hash, &random_uuid(uuid), digest_iterations, salt, digest)?;
        Ok((header, key))
    }

    /// Iterations that it takes to try a slot.
    pub fn cost(&self, index: usize) -> u64 {
        let slot = self.slots.get(index).map_or(0, |slot| slot.iterations);
        u64::from(slot) + u64::from(self.iterations)
    }

    /// The master key, if the passphrase is that of the slot, which is active; `material`
    /// is what lies in the slot's place, and is wiped.
    pub fn unlock(
        &self,
        index: usize,
        passphrase: &Secret,
        material: &mut Key,
    ) -> Result<Option<Key>> {
        let Some(slot) = self.slots.get(index).filter(|slot| slot.active) else { return Ok(None) };
        let cipher = self.slot_cipher(slot, passphrase)?;
        cipher.decrypt(material, 0);
        let key = afsplit::merge(self.suite.hash, self.key_bytes, material)?;
        let mut digest = Zeroizing::new([0; DIGEST]);
        self.suite.hash.pbkdf2(&key, &self.salt, self.iterations, &mut *digest);
        let is_right = bool::from(digest.ct_eq(&self.digest));
        Ok(is_right.then_some(key))
    }

    /// Puts the master key into a slot: the header that says so, and the material to be
    /// written to the slot's place before.
    pub fn seal(
        &self,
        index: usize,
        passphrase: &Secret,
        key: &Key,
        iterations: u32,
        random: Random<'_>,
    ) -> Result<(Header, Key)> {
        let mut slot: Slot = self.slots.get(index).copied().unwrap_or_default();
        random(&mut slot.salt)?;
        slot.active = true;
        slot.iterations = iterations;
        let mut material = afsplit::split(self.suite.hash, key, STRIPES, random)?;
        self.slot_cipher(&slot, passphrase)?.encrypt(&mut material, 0);
        Ok((self.with_slot(index, slot), material))
    }

    /// The cipher of a disk that this is the header of.
    pub fn open(&self, key: &Key) -> Result<SectorCipher> {
        self.cipher(key)
    }

    fn slot_cipher(&self, slot: &Slot, passphrase: &Secret) -> Result<SectorCipher> {
        let mut key = Zeroizing::new([0; 64]);
        let (key, _) = key.split_at_mut(self.key_bytes.min(64));
        self.suite.hash.pbkdf2(passphrase.bytes(), &slot.salt, slot.iterations, key);
        self.cipher(key)
    }
}

/// A UUID of version 4.
fn random_uuid(bytes: [u8; 16]) -> String {
    let number = u128::from_be_bytes(bytes);
    let number = number & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{number:032x}");
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
    parts.map(|part| hex.get(part).unwrap_or_default().to_owned()).join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::luks::SLOTS;

    fn random(bytes: &mut [u8]) -> Result<()> {
        bytes.iter_mut().zip(7u8..=255).for_each(|(to, from)| *to = from.wrapping_mul(31));
        Ok(())
    }

    #[test]
    fn a_key_comes_out_of_its_slot_by_its_passphrase_only() {
        let (header, key) = Header::generate(Suite::default(), None, 1000, &mut random).unwrap();
        let secret = |text: &[u8]| Secret::new(text).unwrap();
        let (header, material) =
            header.seal(SLOTS - 1, &secret(b"open"), &key, 1000, &mut random).unwrap();
        assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
        assert_eq!(material.len(), header.material_bytes());
        let unlock = |header: &Header, index, text: &[u8]| {
            header.unlock(index, &secret(text), &mut material.clone()).unwrap()
        };
        assert_eq!(unlock(&header, 7, b"open"), Some(key));
        assert_eq!(unlock(&header, 7, b"opeN"), None);
        assert_eq!(unlock(&header, 0, b"open"), None, "not an active slot");
        assert_eq!(unlock(&header.without_key(7), 7, b"open"), None);
    }

    #[test]
    fn uuids_are_of_version_4() {
        assert_eq!(random_uuid([0; 16]), "00000000-0000-4000-8000-000000000000");
        assert_eq!(random_uuid([255; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
