//! The LUKS header, version 1: what it says, and every field checked as QEMU checks it.
//!
//! ```text
//! magic version cipher mode hash  payload key-bytes digest salt iterations uuid  8 slots
//! 0     6       8      40   72    104     108       112    132  164        168   208
//! ```
//!
//! Then, from byte 4096 on, the key material of the slots. Numbers are big-endian. In a
//! qcow2 image nothing lies at the payload's offset: it is the length of all that.

use std::ops::Range;

use super::SECTOR;
use super::algorithms::{Cipher, IvGenerator, Mode};
use super::hash::Hash;
use super::sectors::{SectorCipher, no_essiv};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of the header with its slots.
pub const HEADER: usize = 592;
/// Key slots.
pub const SLOTS: usize = 8;
/// Stripes that a key is split into: the only number that is in use, which QEMU insists
/// on, too.
pub(super) const STRIPES: usize = 4000;
/// Where key material may begin, and to what its places are aligned.
const MATERIAL: u64 = 4096;
/// Fewest iterations of a key derivation.
pub(crate) const MIN_ITERATIONS: u32 = 1000;
/// Bytes of salts and of the digest of the master key.
pub(super) const SALT: usize = 32;
pub(super) const DIGEST: usize = 20;

const MAGIC: &[u8; 8] = b"LUKS\xba\xbe\0\x01";
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// Bytes of a name.
const NAME: usize = 32;
const SLOTS_AT: usize = 208;
const SLOT: usize = 48;

/// What encrypts an image and its keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Suite {
    /// The cipher.
    pub cipher: Cipher,
    /// Its mode of operation.
    pub mode: Mode,
    /// How IVs are made.
    pub ivs: IvGenerator,
    /// The hash that keys are derived by.
    pub hash: Hash,
}

/// A LUKS header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// As stored, so that what is not changed stays as it is.
    bytes: [u8; HEADER],
    /// What encrypts.
    pub suite: Suite,
    /// What identifies the volume; up to 40 bytes.
    pub uuid: String,
    /// Where a payload would begin: the bytes of header and key material.
    pub payload_offset: u64,
    /// Iterations for the digest of the master key.
    pub iterations: u32,
    /// Bytes of the master key.
    pub(super) key_bytes: usize,
    pub(super) salt: [u8; SALT],
    pub(super) digest: [u8; DIGEST],
    /// The key slots.
    pub slots: [Slot; SLOTS],
}

/// A place for the master key, encrypted by a passphrase.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slot {
    /// Whether there is a key in it.
    pub active: bool,
    /// Iterations from the passphrase to the key of the slot.
    pub iterations: u32,
    pub(super) salt: [u8; SALT],
    /// Where its material lies, in bytes from the beginning of the header.
    pub offset: u64,
    /// Into how many stripes the key is split.
    pub stripes: u32,
}

fn bad(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadHeader, format!("the LUKS header: {}", text.into()))
}

fn unknown(what: &str, name: &str) -> Error {
    let text = format!("the LUKS header names the {what} {name:?}, which is not supported");
    Error::new(ErrorKind::UnsupportedFeature, text)
}

impl Suite {
    /// Bytes of a master key. `NotSupported`, `InvalidArgument`: the parts do not go
    /// together, as in QEMU.
    pub fn check(&self) -> Result<usize> {
        if let (IvGenerator::Essiv(hash), Cipher::Cast5) = (self.ivs, self.cipher) {
            return Err(no_essiv(self.cipher, hash.len()));
        }
        let key_bytes = self.cipher.key_bytes() * self.mode.keys();
        // Finds the rest.
        SectorCipher::new(self.cipher, self.mode, self.ivs, &[0; 64][..key_bytes.min(64)])?;
        if key_bytes * STRIPES % SECTOR != 0 {
            let text = format!(
                "{} has keys of {key_bytes} bytes in the mode {}, which no key slot holds: use \
                 the mode xts, or another cipher",
                self.cipher.name(),
                self.mode.name()
            );
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        Ok(key_bytes)
    }

    /// Bytes of a header with all its key material.
    pub fn header_bytes(&self) -> Result<u64> {
        Ok(MATERIAL + SLOTS as u64 * material_room(self.check()? as u64))
    }

    /// What a header says of the mode.
    fn mode_spec(&self, iv_hash: Option<Hash>) -> String {
        let hash = self.ivs.hash().or(iv_hash).map(|hash| format!(":{}", hash.name()));
        format!("{}-{}{}", self.mode.name(), self.ivs.name(), hash.unwrap_or_default())
    }
}

/// Bytes that the material of a slot takes up.
fn material_room(key_bytes: u64) -> u64 {
    (key_bytes * STRIPES as u64).next_multiple_of(MATERIAL)
}

impl Header {
    /// A header without any key. `iv_hash`: a hash that the IV generator has no use for,
    /// but that is to be named.
    pub(super) fn new(
        suite: Suite,
        iv_hash: Option<Hash>,
        uuid: &str,
        iterations: u32,
        salt: [u8; SALT],
        digest: [u8; DIGEST],
    ) -> Result<Header> {
        let key_bytes = suite.check()?;
        let mut bytes = [0; HEADER];
        let payload = (suite.header_bytes()? / SECTOR as u64) as u32;
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, suite.cipher.luks_name().as_bytes());
        put(&mut bytes, 40, suite.mode_spec(iv_hash).as_bytes());
        put(&mut bytes, 72, suite.hash.name().as_bytes());
        put(&mut bytes, 104, &payload.to_be_bytes());
        put(&mut bytes, 108, &(key_bytes as u32).to_be_bytes());
        put(&mut bytes, 112, &digest);
        put(&mut bytes, 132, &salt);
        put(&mut bytes, 164, &iterations.to_be_bytes());
        put(&mut bytes, 168, uuid.as_bytes());
        let room = material_room(key_bytes as u64);
        for index in 0..SLOTS {
            let offset = MATERIAL + index as u64 * room;
            let slot = Slot { offset, stripes: STRIPES as u32, ..Slot::default() };
            put(&mut bytes, SLOTS_AT + index * SLOT, &slot.to_bytes());
        }
        Header::parse(&bytes)
    }

    /// Reads a header. `BadHeader` where it is malformed, `UnsupportedFeature` where it
    /// names what is not known.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        let Some(bytes) = bytes.first_chunk::<HEADER>() else {
            return Err(bad(format!("it has {} bytes, fewer than {HEADER}", bytes.len())));
        };
        if bytes.get(..6) != MAGIC.get(..6) {
            return Err(bad("there is none"));
        }
        if bytes.get(6..8) != MAGIC.get(6..) {
            let version = u16::from_be_bytes(array(bytes, 6));
            return Err(bad(format!("version {version} is not supported, only 1")));
        }
        let cipher = name(bytes, 8, "cipher")?;
        let mode = name(bytes, 40, "mode")?;
        let hash = name(bytes, 72, "hash")?;
        let key_bytes = number(bytes, 108) as usize;
        let uuid: [u8; 40] = array(bytes, 168);
        let uuid = uuid.split(|byte| *byte == 0).next().unwrap_or_default();
        let header = Header {
            bytes: *bytes,
            suite: suite(cipher, mode, hash, key_bytes)?,
            uuid: String::from_utf8_lossy(uuid).into_owned(),
            payload_offset: u64::from(number(bytes, 104)) * SECTOR as u64,
            iterations: number(bytes, 164),
            key_bytes,
            salt: array(bytes, 132),
            digest: array(bytes, 112),
            slots: slots(bytes)?,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        if self.iterations == 0 {
            return Err(bad("no iterations for the digest of the master key"));
        }
        if self.payload_offset < MATERIAL {
            return Err(bad("the payload overlaps the header"));
        }
        for (index, slot) in self.slots.iter().enumerate() {
            if slot.stripes as usize != STRIPES {
                let stripes = slot.stripes;
                return Err(bad(format!("slot {index} has {stripes} stripes, not {STRIPES}")));
            }
            if slot.active && slot.iterations == 0 {
                return Err(bad(format!("slot {index} has no iterations")));
            }
            if slot.offset < HEADER as u64 {
                return Err(bad(format!("slot {index} overlaps the header")));
            }
            let room = self.room(slot);
            if room.end > self.payload_offset {
                return Err(bad(format!("slot {index} reaches into the payload")));
            }
            for (other, another) in self.slots.iter().enumerate().skip(index + 1) {
                let another = self.room(another);
                if room.start < another.end && another.start < room.end {
                    return Err(bad(format!("the slots {index} and {other} overlap")));
                }
            }
        }
        Ok(())
    }

    /// The bytes that a slot's material may take up.
    fn room(&self, slot: &Slot) -> Range<u64> {
        slot.offset..slot.offset + material_room(self.key_bytes as u64)
    }

    /// Bytes of a slot's material.
    pub fn material_bytes(&self) -> usize {
        self.key_bytes * STRIPES
    }

    /// As it is stored.
    pub fn to_bytes(&self) -> [u8; HEADER] {
        self.bytes
    }

    /// The same header with another slot.
    #[must_use]
    pub fn with_slot(&self, index: usize, slot: Slot) -> Header {
        let mut header = self.clone();
        put(&mut header.bytes, SLOTS_AT + index * SLOT, &slot.to_bytes());
        if let Some(place) = header.slots.get_mut(index) {
            *place = slot;
        }
        header
    }

    /// The same header without the key in a slot.
    #[must_use]
    pub fn without_key(&self, index: usize) -> Header {
        let slot = self.slots.get(index).copied().unwrap_or_default();
        let empty = Slot { active: false, iterations: 0, salt: [0; SALT], ..slot };
        self.with_slot(index, empty)
    }

    /// How many slots have a key.
    pub fn active(&self) -> usize {
        self.slots.iter().filter(|slot| slot.active).count()
    }

    /// The cipher of the disk.
    pub(super) fn cipher(&self, key: &[u8]) -> Result<SectorCipher> {
        SectorCipher::new(self.suite.cipher, self.suite.mode, self.suite.ivs, key)
    }
}

impl Slot {
    fn to_bytes(self) -> [u8; SLOT] {
        let mut bytes = [0; SLOT];
        let state = if self.active { ACTIVE } else { INACTIVE };
        put(&mut bytes, 0, &state.to_be_bytes());
        put(&mut bytes, 4, &self.iterations.to_be_bytes());
        put(&mut bytes, 8, &self.salt);
        put(&mut bytes, 40, &((self.offset / SECTOR as u64) as u32).to_be_bytes());
        put(&mut bytes, 44, &self.stripes.to_be_bytes());
        bytes
    }
}

fn slots(bytes: &[u8; HEADER]) -> Result<[Slot; SLOTS]> {
    let mut slots = [Slot::default(); SLOTS];
    for (index, slot) in slots.iter_mut().enumerate() {
        let at = SLOTS_AT + index * SLOT;
        let active = match number(bytes, at) {
            ACTIVE => true,
            INACTIVE => false,
            other => return Err(bad(format!("slot {index} is in the unknown state {other:#x}"))),
        };
        *slot = Slot {
            active,
            iterations: number(bytes, at + 4),
            salt: array(bytes, at + 8),
            offset: u64::from(number(bytes, at + 40)) * SECTOR as u64,
            stripes: number(bytes, at + 44),
        };
    }
    Ok(slots)
}

fn suite(cipher: &str, mode: &str, hash: &str, key_bytes: usize) -> Result<Suite> {
    let Some((mode, ivs)) = mode.split_once('-') else {
        return Err(bad(format!("the mode {mode:?} does not name an IV generator")));
    };
    let (ivs, iv_hash) = match ivs.split_once(':') {
        Some((ivs, hash)) => (ivs, Some(hash)),
        None => (ivs, None),
    };
    // Named for nothing it must be known all the same, as in QEMU.
    let iv_hash = match iv_hash {
        None => None,
        Some(name) => Some(Hash::from_name(name).ok_or_else(|| unknown("hash", name))?),
    };
    let mode = Mode::from_name(mode).ok_or_else(|| unknown("mode", mode))?;
    let found = match key_bytes % mode.keys() {
        0 => Cipher::from_luks(cipher, key_bytes / mode.keys()),
        _ => None,
    };
    let missing = || unknown("cipher", &format!("{cipher} with a key of {key_bytes} bytes"));
    let cipher = found.ok_or_else(missing)?;
    let hash = Hash::from_name(hash).ok_or_else(|| unknown("hash", hash))?;
    let ivs = match (ivs, iv_hash) {
        ("plain", _) => IvGenerator::Plain,
        ("plain64", _) => IvGenerator::Plain64,
        ("essiv", Some(hash)) => IvGenerator::Essiv(hash),
        ("essiv", None) => return Err(bad("essiv without a hash")),
        (other, _) => return Err(unknown("IV generator", other)),
    };
    let suite = Suite { cipher, mode, ivs, hash };
    suite.check().map_err(|error| {
        let text = "the LUKS header names what does not go together";
        error.wrap_as(ErrorKind::UnsupportedFeature, text)
    })?;
    Ok(suite)
}

/// A name of up to 31 bytes with a NUL behind it.
fn name<'a>(bytes: &'a [u8; HEADER], at: usize, what: &str) -> Result<&'a str> {
    let field = bytes.get(at..at + NAME).unwrap_or_default();
    let Some(end) = field.iter().position(|byte| *byte == 0) else {
        return Err(bad(format!("the name of the {what} does not end")));
    };
    let name = field.get(..end).and_then(|name| std::str::from_utf8(name).ok());
    name.ok_or_else(|| bad(format!("the name of the {what} is no text")))
}

fn array<const N: usize>(bytes: &[u8; HEADER], at: usize) -> [u8; N] {
    let mut array = [0; N];
    let field = bytes.get(at..at + N).unwrap_or_default();
    array.iter_mut().zip(field).for_each(|(to, from)| *to = *from);
    array
}

fn number(bytes: &[u8; HEADER], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    let place = bytes.iter_mut().skip(at);
    place.zip(field).for_each(|(to, from)| *to = *from);
}

#[cfg(test)]
#[path = "luks_tests.rs"]
mod tests;
