//! Modes of operation, over the sectors of a buffer at a time: where a mode allows for
//! it, blocks go to the cipher many at once, which is what the processor's instructions
//! need to be fast.

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::consts::U16;
use cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use serpent::Serpent;
use twofish::Twofish;

use super::SECTOR;
use super::algorithms::{Cipher, Mode};
use crate::error::{Error, ErrorKind, Result};

/// Sectors that are encrypted at a time.
pub(super) const BATCH: usize = 32;

/// Sectors that are encrypted side by side where their blocks depend on each other.
const LANES: usize = 8;

/// The IVs of neighbouring sectors. Ciphers with shorter blocks take the beginning.
pub(super) type Ivs = [Block<Aes128>];

/// A cipher in a mode, with its key. `data`: as many sectors as there are IVs, at most
/// [`BATCH`].
pub(super) trait Sectors: Send + Sync {
    fn encrypt(&self, data: &mut [u8], ivs: &mut Ivs);
    fn decrypt(&self, data: &mut [u8], ivs: &mut Ivs);
}

/// A block cipher that works both ways.
trait Both: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static {}
impl<C: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static> Both for C {}

struct Ecb<C>(C);
struct Cbc<C>(C);
struct Ctr<C>(C);
struct Xts<C> {
    data: C,
    tweak: C,
}

/// The cipher in the mode with the key. `NotSupported` where they do not go together.
pub(super) fn sectors(cipher: Cipher, mode: Mode, key: &[u8]) -> Result<Box<dyn Sectors>> {
    match cipher {
        Cipher::Aes128 => wide::<Aes128>(mode, key),
        Cipher::Aes192 => wide::<Aes192>(mode, key),
        Cipher::Aes256 => wide::<Aes256>(mode, key),
        Cipher::Serpent128 | Cipher::Serpent192 | Cipher::Serpent256 => wide::<Serpent>(mode, key),
        Cipher::Twofish128 | Cipher::Twofish192 | Cipher::Twofish256 => wide::<Twofish>(mode, key),
        Cipher::Cast5 if mode == Mode::Xts => {
            let text = "cast5 has blocks of 8 bytes, and the mode xts needs blocks of 16";
            Err(Error::new(ErrorKind::NotSupported, text))
        }
        Cipher::Cast5 => any::<Cast5>(mode, key),
    }
}

fn with_key<C: KeyInit>(key: &[u8]) -> Result<C> {
    let bad = |_| Error::invalid(format!("a key of {} bytes does not fit its cipher", key.len()));
    C::new_from_slice(key).map_err(bad)
}

fn any<C: Both>(mode: Mode, key: &[u8]) -> Result<Box<dyn Sectors>> {
    Ok(match mode {
        Mode::Cbc => Box::new(Cbc(with_key::<C>(key)?)),
        Mode::Ctr => Box::new(Ctr(with_key::<C>(key)?)),
        Mode::Ecb | Mode::Xts => Box::new(Ecb(with_key::<C>(key)?)),
    })
}

fn wide<C: Both + BlockSizeUser<BlockSize = U16>>(
    mode: Mode,
    key: &[u8],
) -> Result<Box<dyn Sectors>> {
    if mode != Mode::Xts {
        return any::<C>(mode, key);
    }
    let (data, tweak) = key.split_at(key.len() / 2);
    Ok(Box::new(Xts { data: with_key::<C>(data)?, tweak: with_key::<C>(tweak)? }))
}

fn blocks<C: BlockSizeUser>(data: &mut [u8]) -> &mut [Block<C>] {
    Block::<C>::slice_as_chunks_mut(data).0
}

fn xor(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
}

/// Each sector with its IV.
fn each<'a>(data: &'a mut [u8], ivs: &'a Ivs) -> impl Iterator<Item = (&'a mut [u8], &'a [u8])> {
    data.chunks_mut(SECTOR).zip(ivs.iter().map(|iv| iv.as_slice()))
}

impl<C: Both> Sectors for Ecb<C> {
    fn encrypt(&self, data: &mut [u8], _: &mut Ivs) {
        self.0.encrypt_blocks(blocks::<C>(data));
    }

    fn decrypt(&self, data: &mut [u8], _: &mut Ivs) {
        self.0.decrypt_blocks(blocks::<C>(data));
    }
}

impl<C: Both> Sectors for Cbc<C> {
    // Within a sector each block waits for the one before: so several sectors at a time.
    fn encrypt(&self, data: &mut [u8], ivs: &mut Ivs) {
        let mut lanes: [Block<C>; LANES] = std::array::from_fn(|_| Block::<C>::default());
        let size = lanes.first().map_or(SECTOR, |block| block.len());
        for (sectors, ivs) in data.chunks_mut(LANES * SECTOR).zip(ivs.chunks(LANES)) {
            let lanes = lanes.get_mut(..ivs.len()).unwrap_or_default();
            for (last, iv) in lanes.iter_mut().zip(ivs) {
                last.iter_mut().zip(iv).for_each(|(to, from)| *to = *from);
            }
            for at in (0..SECTOR).step_by(size) {
                for (last, sector) in lanes.iter_mut().zip(sectors.chunks(SECTOR)) {
                    xor(last, sector.get(at..at + size).unwrap_or_default());
                }
                self.0.encrypt_blocks(lanes);
                for (last, sector) in lanes.iter().zip(sectors.chunks_mut(SECTOR)) {
                    let to = sector.get_mut(at..at + size).unwrap_or_default();
                    to.iter_mut().zip(last).for_each(|(to, from)| *to = *from);
                }
            }
        }
    }

    fn decrypt(&self, data: &mut [u8], ivs: &mut Ivs) {
        let mut before = [0; SECTOR];
        for (sector, iv) in each(data, ivs) {
            before.copy_from_slice(sector);
            let blocks = blocks::<C>(sector);
            let size = blocks.first().map_or(0, |block| block.len());
            self.0.decrypt_blocks(blocks);
            let (first, rest) = sector.split_at_mut(size);
            xor(first, iv);
            xor(rest, &before);
        }
    }
}

impl<C: Both> Ctr<C> {
    fn apply(&self, data: &mut [u8], ivs: &Ivs) {
        let mut stream = [0; SECTOR];
        for (sector, iv) in each(data, ivs) {
            let counters = blocks::<C>(&mut stream);
            let mut count = Block::<C>::default();
            count.iter_mut().zip(iv).for_each(|(to, from)| *to = *from);
            for block in &mut *counters {
                block.clone_from(&count);
                // The block is one large number, its last byte the lowest.
                for byte in count.iter_mut().rev() {
                    *byte = byte.wrapping_add(1);
                    if *byte != 0 {
                        break;
                    }
                }
            }
            self.0.encrypt_blocks(counters);
            xor(sector, &stream);
        }
    }
}

impl<C: Both> Sectors for Ctr<C> {
    fn encrypt(&self, data: &mut [u8], ivs: &mut Ivs) {
        self.apply(data, ivs);
    }

    fn decrypt(&self, data: &mut [u8], ivs: &mut Ivs) {
        self.apply(data, ivs);
    }
}

/// Blocks of 16 bytes in a sector.
const WIDE: usize = SECTOR / 16;

impl<C: Both + BlockSizeUser<BlockSize = U16>> Xts<C> {
    /// `transform` on the blocks, between two times the tweaks, which begin as the
    /// encrypted IV and are doubled from block to block.
    fn apply(&self, data: &mut [u8], ivs: &mut Ivs, transform: impl Fn(&C, &mut [Block<C>])) {
        self.tweak.encrypt_blocks(ivs);
        let mut tweaks = [0u128; WIDE];
        for (sector, iv) in data.chunks_mut(SECTOR).zip(ivs.iter()) {
            let mut tweak = u128::from_le_bytes(iv.0);
            for slot in &mut tweaks {
                *slot = tweak;
                tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
            }
            let blocks = blocks::<C>(sector);
            whiten::<C>(blocks, &tweaks);
            transform(&self.data, blocks);
            whiten::<C>(blocks, &tweaks);
        }
    }
}

fn whiten<C: BlockSizeUser<BlockSize = U16>>(blocks: &mut [Block<C>], tweaks: &[u128; WIDE]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        block.0 = (u128::from_le_bytes(block.0) ^ tweak).to_le_bytes();
    }
}

impl<C: Both + BlockSizeUser<BlockSize = U16>> Sectors for Xts<C> {
    fn encrypt(&self, data: &mut [u8], ivs: &mut Ivs) {
        self.apply(data, ivs, |cipher, blocks| cipher.encrypt_blocks(blocks));
    }

    fn decrypt(&self, data: &mut [u8], ivs: &mut Ivs) {
        self.apply(data, ivs, |cipher, blocks| cipher.decrypt_blocks(blocks));
    }
}
