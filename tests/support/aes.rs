//! The old encryption of qcow2 images, written once more for tests: AES-128 in CBC mode,
//! sector by sector of the disk, whose number is the IV, and with the passphrase as key.

use aes::Aes128;
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

/// Of all images that tests build.
pub const PASSPHRASE: &str = "sixteen letters.";

fn cipher() -> Aes128 {
    Aes128::new_from_slice(PASSPHRASE.as_bytes()).unwrap()
}

fn sectors(bytes: &mut [u8], guest: u64) -> impl Iterator<Item = (&mut [u8], [u8; 16])> {
    let number = move |n: u64| u128::from(guest / 512 + n).to_le_bytes();
    bytes.chunks_mut(512).zip(0..).map(move |(sector, n)| (sector, number(n)))
}

/// Encrypts sectors that the guest has at `guest`.
pub fn encrypt(bytes: &mut [u8], guest: u64) {
    for (sector, mut last) in sectors(bytes, guest) {
        for block in sector.chunks_mut(16) {
            let mut mixed: [u8; 16] = std::array::from_fn(|n| block[n] ^ last[n]);
            let whole = <&mut Array<u8, _>>::try_from(&mut mixed[..]).unwrap();
            cipher().encrypt_block(whole);
            block.copy_from_slice(&mixed);
            last = mixed;
        }
    }
}

/// Decrypts them.
pub fn decrypt(bytes: &mut [u8], guest: u64) {
    let cipher = cipher();
    for (sector, mut last) in sectors(bytes, guest) {
        for block in sector.chunks_mut(16) {
            let stored: [u8; 16] = block.try_into().unwrap();
            let whole = <&mut Array<u8, _>>::try_from(&mut *block).unwrap();
            cipher.decrypt_block(whole);
            (0..16).for_each(|n| block[n] ^= last[n]);
            last = stored;
        }
    }
}
