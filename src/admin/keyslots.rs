//! Keys into the key slots of a LUKS image, and out of them.
//!
//! ```text
//! into: material -> sync -> the slot in the header -> sync
//! out:  the slot in the header -> sync -> random bytes over the material, many times
//! ```
//!
//! So a crash leaves the slot as it was, or as it is to be; no other slot is touched.
//! (A slot that is overwritten by force has no such moment: its old key is gone with the
//! first write. Its material is not where another key's is.) The header has two sectors,
//! and one slot lies in both: for a new key the part that is not looked at without the
//! other goes first.

use zeroize::Zeroizing;

use super::encrypt::{check_new_secret, iterations};
use crate::crypto::luks::{self, SLOTS};
use crate::crypto::secret::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::fallible;
use crate::format::extensions::CryptoExt;
use crate::image::disk::Disk;
use crate::image::encryption::{find_key, material_place, try_slot};
use crate::image::option_values::{bad_value, number};
use crate::image::qcow2::Qcow2;
use crate::io::engine::{Engine, Piece};
use crate::sys::memory::Block;
use crate::sys::random;

/// Bytes of the header's first sector.
const SECTOR: usize = 512;
/// How often material is overwritten: as QEMU does.
const ERASURES: usize = 40;

/// What is to become of a key slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyState {
    /// It gets a key.
    Active,
    /// It loses its key.
    Inactive,
}

/// A change of key slots, as `qemu-img amend -o encrypt.*` makes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeySlots {
    /// What is to become of them; needed.
    pub state: Option<KeyState>,
    /// Which one; `None`: a free one, or all that `old_secret` opens.
    pub slot: Option<u32>,
    /// The passphrase of the new key.
    pub new_secret: Option<Secret>,
    /// The passphrase of the keys that are to go.
    pub old_secret: Option<Secret>,
    /// Milliseconds that deriving the new key takes; `None`: 2000.
    pub iter_time: Option<u64>,
    /// Overwrite active slots, erase inactive ones, and the last key: after that nobody
    /// reads the image again.
    pub force: bool,
}

impl KeySlots {
    /// Whether nothing is asked for.
    pub(super) fn is_empty(&self) -> bool {
        *self == KeySlots { force: self.force, ..KeySlots::default() }
    }

    /// Sets an option by its name in `qemu-img amend -o`, what is behind "encrypt.".
    /// `None`: no such option.
    pub(super) fn set(&mut self, name: &str, option: &str, value: &str) -> Option<Result<()>> {
        let set = match option {
            "state" => match state(value) {
                Some(state) => {
                    self.state = Some(state);
                    Ok(())
                }
                None => Err(bad_value(name, value, "it is active or inactive")),
            },
            "keyslot" => {
                number(name, value, u64::from(u32::MAX)).map(|n| self.slot = Some(n as u32))
            }
            "iter-time" => {
                number(name, value, i64::MAX as u64).map(|time| self.iter_time = Some(time))
            }
            _ => return None,
        };
        Some(set)
    }
}

fn state(name: &str) -> Option<KeyState> {
    match name {
        "active" => Some(KeyState::Active),
        "inactive" => Some(KeyState::Inactive),
        _ => None,
    }
}

fn refuse<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::invalid(text))
}

/// A LUKS image whose keys change.
struct Keys<'a, E> {
    engine: &'a E,
    image: &'a Qcow2,
    place: CryptoExt,
    header: luks::Header,
    /// Iterations that may still be spent on trying passphrases.
    left: u64,
}

impl Disk {
    /// Changes key slots. While nobody else does anything with the disk, which is to be
    /// read again afterwards, whatever came of it.
    pub(super) async fn change_keys<E: Engine>(&self, engine: &E, change: &KeySlots) -> Result<()> {
        let luks = self.top().and_then(|image| Some((image, image.unlocked.luks.as_ref()?)));
        let Some((image, header)) = luks else {
            let text = "only images that are encrypted with LUKS have key slots";
            return Err(Error::new(ErrorKind::NotSupported, text));
        };
        image.writing()?.allocator.health.check()?;
        let Some(place) = image.header.extensions.crypto else { return Ok(()) };
        let left = self.options.max_key_iterations;
        let header = luks::Header::clone(header);
        let mut keys = Keys { engine, image, place, header, left };
        match change.state {
            Some(KeyState::Active) => keys.add(change, self.options.secret.as_ref()).await,
            Some(KeyState::Inactive) => keys.erase(change).await,
            None => refuse("key slots change if \"encrypt.state\" says how: active or inactive"),
        }
    }
}

fn slot_index(slot: u32) -> Result<usize> {
    match slot as usize {
        index if index < SLOTS => Ok(index),
        _ => refuse(format!("there is no key slot {slot}, only 0 to {}", SLOTS - 1)),
    }
}

impl<E: Engine> Keys<'_, E> {
    fn is_active(&self, index: usize) -> bool {
        self.header.slots.get(index).is_some_and(|slot| slot.active)
    }

    async fn add(&mut self, change: &KeySlots, secret: Option<&Secret>) -> Result<()> {
        let Some(new) = &change.new_secret else {
            return refuse("a key slot becomes active with a new passphrase");
        };
        if change.old_secret.is_some() {
            return refuse("a key slot that becomes active has no old passphrase");
        }
        check_new_secret(new)?;
        let index = match change.slot {
            Some(slot) => slot_index(slot)?,
            None => match (0..SLOTS).find(|index| !self.is_active(*index)) {
                Some(index) => index,
                None => return refuse("all key slots are in use: erase one first"),
            },
        };
        if self.is_active(index) && !change.force {
            return refuse(format!("key slot {index} is in use: erase it first"));
        }
        let name = self.image.storage.name();
        let storage = &self.image.storage;
        let key = match secret {
            Some(secret) => {
                let most = self.left;
                find_key(self.engine, storage, self.place, &self.header, secret, most).await?
            }
            None => None,
        };
        let Some((key, _)) = key else {
            let text = format!("{name}: the passphrase it was opened with opens it no more");
            return Err(Error::new(ErrorKind::Encrypted, text));
        };
        let hash = self.header.suite.hash;
        let iterations = iterations(hash, change.iter_time, key.len(), 1)?;
        let random = &mut random::fill;
        let (header, material) = self.header.seal(index, new, &key, iterations, random)?;
        let place = material_place(self.place, &header, index, name)?;
        if mutant!(KeyNamedBeforeMaterial) {
            self.write_header(&header, false).await?;
        }
        self.write(&material, place.start).await?;
        storage.sync(self.engine).await?;
        self.write_header(&header, true).await?;
        self.header = header;
        Ok(())
    }

    async fn erase(&mut self, change: &KeySlots) -> Result<()> {
        if change.new_secret.is_some() {
            return refuse("a key slot that is erased gets no new passphrase");
        }
        if change.iter_time.is_some() {
            return refuse("\"encrypt.iter-time\" is for key slots that become active");
        }
        let slots = self.slots_to_erase(change).await?;
        let left = self.header.active() - slots.iter().filter(|it| self.is_active(**it)).count();
        if left == 0 && !change.force {
            return refuse("nobody could read the image any more: its last key is not erased");
        }
        for index in slots {
            self.erase_slot(index).await?;
        }
        Ok(())
    }

    async fn slots_to_erase(&mut self, change: &KeySlots) -> Result<Vec<usize>> {
        let slots = match (change.slot, &change.old_secret) {
            (None, None) => {
                return refuse(
                    "what is to be erased is said by \"encrypt.keyslot\" or by its passphrase",
                );
            }
            (Some(slot), _) => vec![slot_index(slot)?],
            (None, Some(_)) => (0..SLOTS).collect(),
        };
        let Some(secret) = &change.old_secret else {
            return match slots.iter().find(|index| !self.is_active(**index)) {
                Some(index) if !change.force => refuse(format!("key slot {index} has no key")),
                _ => Ok(slots),
            };
        };
        let mut found = Vec::new();
        for index in slots {
            let (storage, left) = (&self.image.storage, &mut self.left);
            let place = self.place;
            let key =
                try_slot(self.engine, storage, place, &self.header, index, secret, left).await?;
            if key.is_some() {
                found.push(index);
            }
        }
        match found.is_empty() {
            true => refuse("the old passphrase opens none of these key slots"),
            false => Ok(found),
        }
    }

    async fn erase_slot(&mut self, index: usize) -> Result<()> {
        let (engine, storage) = (self.engine, &self.image.storage);
        let place = material_place(self.place, &self.header, index, storage.name())?;
        let header = self.header.without_key(index);
        let mut garbage = Zeroizing::new(fallible::filled(self.header.material_bytes(), 0u8)?);
        mutant!(KeyOverwrittenFirst => {
            self.write(&garbage, place.start).await?;
            storage.sync(engine).await?;
        });
        self.write_header(&header, false).await?;
        self.header = header;
        for _ in 0..ERASURES {
            random::fill(&mut garbage)?;
            self.write(&garbage, place.start).await?;
            storage.sync(engine).await?;
        }
        Ok(())
    }

    /// Writes the header, one sector after the other. `second_first`: what is in there
    /// becomes true with the first one.
    async fn write_header(&self, header: &luks::Header, second_first: bool) -> Result<()> {
        let bytes = header.to_bytes();
        let (first, second) = bytes.split_at(SECTOR);
        let (first, second) = ((first, 0), (second, SECTOR as u64));
        let order = if second_first { [second, first] } else { [first, second] };
        for (bytes, at) in order {
            self.write(bytes, self.place.offset + at).await?;
            self.image.storage.sync(self.engine).await?;
        }
        Ok(())
    }

    async fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        let block = Block::from_bytes(bytes)?;
        let piece = [Piece::Block(block.slice(0, bytes.len()))];
        self.image.storage.write(self.engine, &piece, at).await
    }
}
