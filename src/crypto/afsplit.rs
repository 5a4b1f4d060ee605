//! The anti-forensic splitter of LUKS: a key is blown up into many stripes, all of which
//! are needed to get it back, so that overwriting any part of them destroys it.

use zeroize::{Zeroize, Zeroizing};

use super::hash::{Hash, LONGEST};
use super::secret::Key;
use crate::error::{Error, Result};
use crate::fallible;

/// Spreads each bit over the block: each piece of it, as long as a digest, is replaced
/// by the digest of its number and itself.
fn diffuse(hash: Hash, block: &mut [u8]) {
    let mut digest = [0; LONGEST];
    for (number, piece) in (0u32..).zip(block.chunks_mut(hash.len())) {
        hash.digest(&[&number.to_be_bytes(), piece], &mut digest);
        piece.iter_mut().zip(&digest).for_each(|(to, from)| *to = *from);
    }
    digest.zeroize();
}

fn xor(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
}

/// `stripes` times the length of the key, of which all but the last stripe are `random`.
pub(super) fn split(
    hash: Hash,
    key: &[u8],
    stripes: usize,
    random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
) -> Result<Key> {
    let overflow = || Error::invalid("too many stripes");
    let length = key.len().checked_mul(stripes).ok_or_else(overflow)?;
    let mut out = Zeroizing::new(fallible::filled(length, 0u8)?);
    let (all, last) = out.split_at_mut(length.saturating_sub(key.len()));
    random(all)?;
    let mut sum = Zeroizing::new(fallible::filled(key.len(), 0u8)?);
    for stripe in all.chunks(key.len().max(1)) {
        xor(&mut sum, stripe);
        diffuse(hash, &mut sum);
    }
    last.copy_from_slice(key);
    xor(last, &sum);
    Ok(out)
}

/// The key of `length` bytes out of its stripes.
pub(super) fn merge(hash: Hash, length: usize, stripes: &[u8]) -> Result<Key> {
    let mut key = Zeroizing::new(fallible::filled(length, 0u8)?);
    let mut left = stripes.chunks(length.max(1)).peekable();
    while let Some(stripe) = left.next() {
        xor(&mut key, stripe);
        if left.peek().is_some() {
            diffuse(hash, &mut key);
        }
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_split_comes_back_and_only_whole() {
        for hash in [Hash::Sha256, Hash::Sha1, Hash::Sha512] {
            let key: Vec<u8> = (0..48).collect();
            let mut seed = 1u32;
            let mut random = |bytes: &mut [u8]| {
                for byte in bytes {
                    seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                    *byte = (seed >> 24) as u8;
                }
                Ok(())
            };
            let mut stripes = split(hash, &key, 7, &mut random).unwrap();
            assert_eq!(stripes.len(), 7 * key.len());
            assert_eq!(*merge(hash, key.len(), &stripes).unwrap(), key);
            stripes[60] ^= 1;
            let other = merge(hash, key.len(), &stripes).unwrap();
            let other_bytes = other.iter().zip(&key).filter(|(a, b)| a != b).count();
            assert!(other_bytes > 12, "one bit of a stripe changes a digest's worth of the key");
        }
    }
}
