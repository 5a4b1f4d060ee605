//! Encrypted guest data: how an image is unlocked, and the way of data between the
//! caller's memory and the storage.
//!
//! The file never has plain text, and the caller's memory never has cipher text: all
//! data goes through a buffer of ours, in whole sectors. What is written is copied
//! first, as a guest may change it meanwhile. A sector that is written in part is read,
//! decrypted and written back while nobody else writes it.
//!
//! The IV of a sector comes from where it lies in the file (LUKS), or from where the
//! guest has it (AES): what is moved by copy-on-write is decrypted by one and encrypted
//! by the other, as it passes through here twice.

use std::ops::Range;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::options::OpenOptions;
use super::qcow2::Qcow2;
use crate::crypto::SECTOR;
use crate::crypto::luks;
use crate::crypto::secret::{Key, Secret};
use crate::crypto::sectors::SectorCipher;
use crate::error::{Error, ErrorKind, Result};
use crate::format::extensions::CryptoExt;
use crate::format::header::Header;
use crate::io::copy_pieces;
use crate::io::engine::{Engine, Piece, Target};
use crate::io::range_lock::RangeLock;
use crate::io::storage::Storage;
use crate::metadata::tables::read;
use crate::sys::memory::Block;

/// Longest part of a request that is encrypted in one go: what a processor's cache holds.
const PART: u64 = 256 << 10;

/// What encrypts the data of an image.
pub struct Encryption {
    cipher: SectorCipher,
    /// Whether a sector's number is that of its place in the file.
    by_host: bool,
    /// Sectors that are being written.
    sectors: RangeLock,
}

/// What is known of the encryption of an image that was opened.
#[derive(Clone, Default)]
pub struct Unlocked {
    /// `None`: the image is not encrypted, or open only to be looked at.
    pub encryption: Option<Arc<Encryption>>,
    /// The LUKS header.
    pub luks: Option<Arc<luks::Header>>,
}

/// The passphrase is missing, or wrong.
fn locked(name: &str, text: &str) -> Error {
    Error::new(
        ErrorKind::Encrypted,
        format!(
            "{name} is encrypted: {text} (OpenOptions::secret, qcow2rs_open_opts_set_secret); to \
             look at it or check it, no passphrase is needed with check-only"
        ),
    )
}

/// Unlocks an image. `before`: the encryption of the same image when it was opened
/// earlier, so that its key need not be derived again.
pub(super) async fn unlock<E: Engine>(
    engine: &E,
    storage: &Storage,
    header: &Header,
    options: &OpenOptions,
    before: Option<Arc<Encryption>>,
) -> Result<Unlocked> {
    let name = storage.name();
    let secret = || {
        let missing = || locked(name, "a passphrase is needed");
        options.secret.as_ref().ok_or_else(missing)
    };
    if header.crypt_method == 0 {
        return Ok(Unlocked::default());
    }
    let Some(place) = header.extensions.crypto else {
        let encryption = match (before, options.check_only) {
            (_, true) => None,
            (Some(before), _) => Some(before),
            (None, _) => Some(Encryption::new(SectorCipher::legacy_aes(secret()?)?, false)),
        };
        return Ok(Unlocked { encryption, luks: None });
    };
    let luks = match read_luks(engine, storage, place).await {
        // Whatever is wrong with it, the clusters can be checked.
        Err(error) if options.check_only && error.errno() != libc::EIO => {
            let warning = || format!("{name}: {error}");
            crate::log::emit(crate::log::WARN, "image", warning);
            return Ok(Unlocked::default());
        }
        luks => Arc::new(luks?),
    };
    let encryption = match (before, options.check_only) {
        (_, true) => None,
        (Some(before), _) => Some(before),
        (None, _) => {
            let most = options.max_key_iterations;
            let key = find_key(engine, storage, place, &luks, secret()?, most).await?;
            let Some((key, _)) = key else {
                return Err(locked(name, "this passphrase opens none of its key slots"));
            };
            Some(Encryption::new(luks.open(&key)?, true))
        }
    };
    Ok(Unlocked { encryption, luks: Some(luks) })
}

/// The LUKS header of an image.
async fn read_luks<E: Engine>(
    engine: &E,
    storage: &Storage,
    place: CryptoExt,
) -> Result<luks::Header> {
    let in_image = |error: Error| error.context(storage.name().to_owned());
    if place.length < luks::HEADER as u64 {
        let text = format!("the place of the LUKS header has only {} bytes", place.length);
        return Err(in_image(Error::new(ErrorKind::BadHeader, text)));
    }
    let bytes = read(engine, storage, place.offset, luks::HEADER).await?;
    luks::Header::parse(&bytes).map_err(in_image)
}

/// Where the material of a slot lies in the file; `BadHeader` if not in its place there.
pub(crate) fn material_place(
    place: CryptoExt,
    luks: &luks::Header,
    slot: usize,
    name: &str,
) -> Result<Range<u64>> {
    let start = luks.slots.get(slot).map_or(0, |slot| slot.offset);
    let end = start + luks.material_bytes() as u64;
    let range = place.offset.checked_add(start).zip(place.offset.checked_add(end));
    match range.filter(|_| end <= place.length) {
        Some((start, end)) => Ok(start..end),
        None => {
            let text = format!("{name}: key slot {slot} lies outside of the LUKS header");
            Err(Error::new(ErrorKind::BadHeader, text))
        }
    }
}

/// The master key and the slot that the passphrase opens, if there is one. `most`:
/// iterations that may be spent on that.
pub(crate) async fn find_key<E: Engine>(
    engine: &E,
    storage: &Storage,
    place: CryptoExt,
    luks: &luks::Header,
    secret: &Secret,
    most: u64,
) -> Result<Option<(Key, usize)>> {
    let mut left = most;
    for index in 0..luks::SLOTS {
        let key = try_slot(engine, storage, place, luks, index, secret, &mut left).await?;
        if let Some(key) = key {
            return Ok(Some((key, index)));
        }
    }
    Ok(None)
}

/// The master key, if the passphrase opens this slot. `left`: iterations that may still
/// be spent.
pub(crate) async fn try_slot<E: Engine>(
    engine: &E,
    storage: &Storage,
    place: CryptoExt,
    luks: &luks::Header,
    index: usize,
    secret: &Secret,
    left: &mut u64,
) -> Result<Option<Key>> {
    let name = storage.name();
    if !luks.slots.get(index).is_some_and(|slot| slot.active) {
        return Ok(None);
    }
    let cost = luks.cost(index);
    *left = left.checked_sub(cost).ok_or_else(|| {
        let text = format!(
            "{name}: trying key slot {index} takes {cost} iterations, more than \
             \"max-key-iterations\" leaves"
        );
        Error::new(ErrorKind::Limit, text)
    })?;
    let material = material_place(place, luks, index, name)?;
    let length = (material.end - material.start) as usize;
    let mut material = Zeroizing::new(read(engine, storage, material.start, length).await?);
    luks.unlock(index, secret, &mut material)
}

impl Encryption {
    fn new(cipher: SectorCipher, by_host: bool) -> Arc<Encryption> {
        Arc::new(Encryption { cipher, by_host, sectors: RangeLock::default() })
    }

    /// The number of the sector at `host`, which the guest has at `guest`.
    fn number(&self, host: u64, guest: u64) -> u64 {
        let at = if self.by_host { host } else { guest };
        at / SECTOR as u64
    }
}

/// A range of the storage in whole sectors, and where the guest has it.
struct Sectors {
    host: Range<u64>,
    guest: u64,
}

impl Sectors {
    /// Those that a request of `len` bytes touches. Sectors lie in the file as they do in
    /// the disk, as clusters do not cut them.
    fn of(host: u64, guest: u64, len: u64) -> Result<Sectors> {
        let sector = SECTOR as u64;
        let before = host % sector;
        let end = host.checked_add(len).and_then(|end| end.checked_next_multiple_of(sector));
        match (end, guest.checked_sub(before)) {
            (Some(end), Some(guest)) => Ok(Sectors { host: host - before..end, guest }),
            _ => Err(Error::invalid("a request ends past the largest offset")),
        }
    }

    /// Pieces that fit a buffer: where they lie, and where the guest has them.
    fn parts(&self) -> impl Iterator<Item = (Range<u64>, u64)> + use<> {
        let (host, guest) = (self.host.clone(), self.guest);
        let starts = host.clone().step_by(PART as usize);
        starts.map(move |start| (start..host.end.min(start + PART), guest + (start - host.start)))
    }
}

impl Qcow2 {
    /// Reads guest data from `host`, which the guest has at `guest`.
    #[inline]
    pub(super) async fn read_data<E: Engine>(
        &self,
        engine: &E,
        to: Target<'_>,
        host: u64,
        guest: u64,
    ) -> Result<()> {
        match &self.unlocked.encryption {
            None => self.data().read(engine, to, host).await,
            Some(it) => Box::pin(it.read(engine, self.data(), to, host, guest)).await,
        }
    }

    /// Writes guest data to `host`, which the guest has at `guest`.
    #[inline]
    pub(crate) async fn write_data<E: Engine>(
        &self,
        engine: &E,
        pieces: &[Piece<'_>],
        host: u64,
        guest: u64,
    ) -> Result<()> {
        match &self.unlocked.encryption {
            None => self.data().write(engine, pieces, host).await,
            Some(it) => Box::pin(it.write(engine, self.data(), pieces, host, guest)).await,
        }
    }

    /// Whether guest data is encrypted.
    #[inline]
    pub fn is_encrypted(&self) -> bool {
        self.header.crypt_method != 0
    }
}

impl Encryption {
    async fn read<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        to: Target<'_>,
        host: u64,
        guest: u64,
    ) -> Result<()> {
        let wanted = host..host.saturating_add(to.len() as u64);
        let sectors = Sectors::of(host, guest, to.len() as u64)?;
        let whole = sectors.host == wanted;
        // The rest of a sector may be on its way to be written back as it is.
        let _turn = match whole {
            true => None,
            false => Some(self.sectors.lock(sectors.host.clone(), false).await),
        };
        let length = sectors.host.end - sectors.host.start;
        let mut buffer = Block::zeroed(PART.min(length) as usize)?;
        for (part, guest) in sectors.parts() {
            let bytes = buffer.slice(0, (part.end - part.start) as usize);
            storage.read(engine, Target::Block(bytes), part.start).await?;
            let bytes = sectors_in(&mut buffer, 0..(part.end - part.start) as usize)?;
            self.cipher.decrypt(bytes, self.number(part.start, guest));
            let start = part.start.max(wanted.start);
            let end = part.end.min(wanted.end);
            let to = to.sub((start - wanted.start) as usize, (end - start) as usize);
            let from = (start - part.start) as usize..(end - part.start) as usize;
            to.copy_from(bytes.get(from).unwrap_or_default());
        }
        Ok(())
    }

    async fn write<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        pieces: &[Piece<'_>],
        host: u64,
        guest: u64,
    ) -> Result<()> {
        let length: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        let given = host..host.saturating_add(length);
        let sectors = Sectors::of(host, guest, length)?;
        let alone = sectors.host != given && !mutant!(PartOfSectorNotLocked);
        let _turn = self.sectors.lock(sectors.host.clone(), alone).await;
        let length = sectors.host.end - sectors.host.start;
        let mut buffer = Block::zeroed(PART.min(length) as usize)?;
        for (part, guest) in sectors.parts() {
            let size = (part.end - part.start) as usize;
            let first = self.number(part.start, guest);
            if part.start < given.start {
                self.old_sector(engine, storage, &mut buffer, &part, 0, first).await?;
            }
            let last = size - SECTOR;
            if part.end > given.end && (part.start >= given.start || last > 0) {
                let number = first + (last / SECTOR) as u64;
                self.old_sector(engine, storage, &mut buffer, &part, last, number).await?;
            }
            let start = part.start.max(given.start);
            let end = part.end.min(given.end);
            let to = buffer.slice((start - part.start) as usize, (end - start) as usize);
            copy_pieces(pieces, (start - given.start) as usize, &to);
            drop(to);
            self.cipher.encrypt(sectors_in(&mut buffer, 0..size)?, first);
            storage.write(engine, &[Piece::Block(buffer.slice(0, size))], part.start).await?;
        }
        Ok(())
    }

    /// Reads the sector at `at` in a part into its place in the buffer, decrypted.
    async fn old_sector<E: Engine>(
        &self,
        engine: &E,
        storage: &Storage,
        buffer: &mut Block,
        part: &Range<u64>,
        at: usize,
        number: u64,
    ) -> Result<()> {
        let bytes = buffer.slice(at, SECTOR);
        storage.read(engine, Target::Block(bytes), part.start + at as u64).await?;
        self.cipher.decrypt(sectors_in(buffer, at..at + SECTOR)?, number);
        Ok(())
    }
}

/// Bytes of a buffer that nobody else uses any more.
fn sectors_in(buffer: &mut Block, range: Range<usize>) -> Result<&mut [u8]> {
    let bytes = buffer.make_own()?.get_mut(range);
    bytes.ok_or_else(|| Error::invalid("part of a buffer out of range"))
}
