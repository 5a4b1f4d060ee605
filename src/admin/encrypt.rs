//! What is to encrypt a new image: the options, and what they become.

use std::time::{Duration, Instant};

use crate::crypto::algorithms::{Cipher, IvGenerator, Mode};
use crate::crypto::hash::Hash;
use crate::crypto::luks::{self, MIN_ITERATIONS, Suite};
use crate::crypto::secret::{Key, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::image::option_values::{bad_value, number};
use crate::sys::random;

/// Milliseconds that deriving the key of a slot takes, unless the options say otherwise:
/// QEMU's choice.
const ITER_TIME: u64 = 2000;

/// How an image is encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EncryptionFormat {
    /// LUKS, version 1.
    Luks,
    /// AES-128 in CBC mode with the passphrase as its key, as very old images have it: not
    /// secure.
    Aes,
}

/// How a new image is to be encrypted; what is `None` is QEMU's default (aes-256 in xts
/// mode, plain64, sha256). The default: not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncryptionOptions {
    pub(super) format: Option<EncryptionFormat>,
    pub(super) secret: Option<Secret>,
    pub(super) cipher: Option<Cipher>,
    pub(super) mode: Option<Mode>,
    pub(super) ivs: Option<IvGenerator>,
    pub(super) iv_hash: Option<Hash>,
    pub(super) hash: Option<Hash>,
    pub(super) iter_time: Option<u64>,
}

/// How a new image will be encrypted.
pub(super) struct Prepared {
    /// `crypt_method` in the header.
    pub method: u32,
    /// Bytes of the LUKS header, if there is one.
    pub bytes: u64,
    suite: Suite,
}

/// A LUKS header with the one key slot that is in use.
pub(super) struct NewLuks {
    pub header: luks::Header,
    /// Of slot 0.
    pub material: Key,
}

impl EncryptionOptions {
    /// Encryption of that format by a passphrase, all else by default.
    pub fn new(format: EncryptionFormat, secret: Secret) -> EncryptionOptions {
        EncryptionOptions { format: Some(format), secret: Some(secret), ..Default::default() }
    }

    /// The passphrase.
    pub fn set_secret(&mut self, secret: Secret) {
        self.secret = Some(secret);
    }

    /// Sets an option by its name in `qemu-img create -o`, what is behind "encrypt.".
    /// `None`: no such option.
    pub(super) fn set(&mut self, name: &str, option: &str, value: &str) -> Option<Result<()>> {
        let found = match option {
            "format" => choose(&mut self.format, format_from_name(value)),
            "cipher-alg" => choose(&mut self.cipher, Cipher::from_name(value)),
            "cipher-mode" => choose(&mut self.mode, Mode::from_name(value)),
            "ivgen-alg" => choose(&mut self.ivs, generator(value)),
            "ivgen-hash-alg" => choose(&mut self.iv_hash, Hash::from_name(value)),
            "hash-alg" => choose(&mut self.hash, Hash::from_name(value)),
            "iter-time" => {
                let time = number(name, value, i64::MAX as u64);
                return Some(time.map(|time| self.iter_time = Some(time)));
            }
            _ => return None,
        };
        let values = match option {
            "format" => "it is luks or aes",
            "cipher-alg" => {
                "it is aes-128, aes-192, aes-256, cast5-128, or serpent or twofish with 128, 192 \
                 or 256"
            }
            "cipher-mode" => "it is ecb, cbc, ctr or xts",
            "ivgen-alg" => "it is plain, plain64 or essiv",
            _ => "it is md5, sha1, sha224, sha256, sha384, sha512, ripemd160 or sm3",
        };
        Some(if found { Ok(()) } else { Err(bad_value(name, value, values)) })
    }

    /// Checks what goes together; `None`: not encrypted.
    pub(super) fn prepare(&self) -> Result<Option<Prepared>> {
        let luks_only = self.cipher.is_some()
            || self.mode.is_some()
            || self.ivs.is_some()
            || self.iv_hash.is_some()
            || self.hash.is_some()
            || self.iter_time.is_some();
        let suite = self.suite();
        match self.format {
            None if luks_only => {
                Err(Error::invalid("options of encryption need \"encrypt.format\""))
            }
            None => Ok(None),
            Some(EncryptionFormat::Aes) if luks_only => {
                Err(Error::invalid("\"encrypt.format\" = \"aes\" leaves nothing else to choose"))
            }
            Some(EncryptionFormat::Aes) => Ok(Some(Prepared { method: 1, bytes: 0, suite })),
            Some(EncryptionFormat::Luks) => {
                Ok(Some(Prepared { method: 2, bytes: suite.header_bytes()?, suite }))
            }
        }
    }

    fn suite(&self) -> Suite {
        let ivs = match self.ivs.unwrap_or_default() {
            IvGenerator::Essiv(_) => IvGenerator::Essiv(self.iv_hash.unwrap_or_default()),
            other => other,
        };
        Suite {
            cipher: self.cipher.unwrap_or_default(),
            mode: self.mode.unwrap_or_default(),
            ivs,
            hash: self.hash.unwrap_or_default(),
        }
    }

    /// The passphrase. `Encrypted` if there is none, `InvalidArgument` if QEMU could not
    /// be told it.
    pub(super) fn passphrase(&self) -> Result<&Secret> {
        let Some(secret) = &self.secret else {
            let text = "an encrypted image needs a passphrase (CreateOptions::encryption, \
                        qcow2rs_create_opts_set_secret)";
            return Err(Error::new(ErrorKind::Encrypted, text));
        };
        check_new_secret(secret)?;
        Ok(secret)
    }

    /// Makes the LUKS header; takes the time that the options say.
    pub(super) fn generate(&self, prepared: &Prepared) -> Result<Option<NewLuks>> {
        let secret = self.passphrase()?;
        if prepared.bytes == 0 {
            return Ok(None);
        }
        let (suite, time) = (prepared.suite, self.iter_time);
        let digest = iterations(suite.hash, time, 20, 8)?;
        let random = &mut random::fill;
        let (header, key) = luks::Header::generate(suite, self.iv_hash, digest, random)?;
        let iterations = iterations(suite.hash, time, key.len(), 1)?;
        let (header, material) = header.seal(0, secret, &key, iterations, random)?;
        Ok(Some(NewLuks { header, material }))
    }
}

/// Whether a passphrase can be that of a key from now on.
pub(super) fn check_new_secret(secret: &Secret) -> Result<()> {
    match secret.is_text() {
        true => Ok(()),
        false => Err(Error::invalid("a passphrase is UTF-8 text without NUL: QEMU takes no other")),
    }
}

/// Iterations for a key of `bytes` that take `time` milliseconds here, divided by `part`;
/// but never too few.
pub(super) fn iterations(hash: Hash, time: Option<u64>, bytes: usize, part: u64) -> Result<u32> {
    let time = time.unwrap_or(ITER_TIME);
    if time == 0 {
        return Ok(MIN_ITERATIONS);
    }
    let enough = Duration::from_millis(time.min(50));
    let mut tried = MIN_ITERATIONS;
    let mut key = [0; 64];
    let key = key.get_mut(..bytes).unwrap_or_default();
    let taken = loop {
        let start = Instant::now();
        hash.pbkdf2(b"password", &[0; 32], tried, key);
        let taken = start.elapsed();
        if taken >= enough || tried >= 1 << 28 {
            break taken;
        }
        tried *= 2;
    };
    let nanos = u128::from(time) * 1_000_000;
    let all = u128::from(tried) * nanos / taken.as_nanos().max(1) / u128::from(part);
    let all = u32::try_from(all).map_err(|_| {
        Error::invalid(format!(
            "\"encrypt.iter-time\" = {time} is more iterations than a key slot can name"
        ))
    })?;
    Ok(all.max(MIN_ITERATIONS))
}

fn choose<T>(place: &mut Option<T>, value: Option<T>) -> bool {
    let found = value.is_some();
    if found {
        *place = value;
    }
    found
}

fn format_from_name(name: &str) -> Option<EncryptionFormat> {
    match name {
        "luks" => Some(EncryptionFormat::Luks),
        "aes" => Some(EncryptionFormat::Aes),
        _ => None,
    }
}

/// The hash of essiv is an option of its own.
fn generator(name: &str) -> Option<IvGenerator> {
    match name {
        "plain" => Some(IvGenerator::Plain),
        "plain64" => Some(IvGenerator::Plain64),
        "essiv" => Some(IvGenerator::Essiv(Hash::default())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_never_too_few_iterations() {
        assert_eq!(iterations(Hash::Sha256, Some(0), 64, 1).unwrap(), MIN_ITERATIONS);
        assert_eq!(iterations(Hash::Sha256, Some(1), 20, 1 << 40).unwrap(), MIN_ITERATIONS);
        assert!(iterations(Hash::Sha256, Some(i64::MAX as u64), 64, 1).is_err());
    }

    #[test]
    fn longer_times_are_more_iterations() {
        let few = iterations(Hash::Sha1, Some(10), 20, 1).unwrap();
        let many = iterations(Hash::Sha1, Some(100_000), 20, 1).unwrap();
        assert!(many / 100 > few, "{many} in 10000 times the time of {few}");
    }
}
