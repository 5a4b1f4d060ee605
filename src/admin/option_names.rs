//! The options of creating, by name: those of `qemu-img create -o`. What each
//! value may be is decided here; what goes together, by create.

use super::create::CreateOptions;
use super::encrypt::EncryptionFormat;
use super::preallocation::Preallocation;
use crate::error::{Error, ErrorKind, Result};
use crate::format::compression::Compression;
use crate::image::option_values::{bad_value, number, size, switch};

impl CreateOptions {
    /// Sets an option by its name in `qemu-img create -o`:
    ///
    /// | name | value | |
    /// |---|---|---|
    /// | size | size | of the virtual disk |
    /// | compat | 0.10, 1.1 (v2, v3) | header version 2 or 3 |
    /// | cluster_size | size | a power of two between 512 and 2M |
    /// | extended_l2 | on, off | subclusters |
    /// | refcount_bits | number | a power of two up to 64 |
    /// | lazy_refcounts | on, off | refcounts are written at close, and rebuilt after a crash |
    /// | compression_type | zlib, zstd | of compressed clusters |
    /// | preallocation | off, metadata, falloc, full | what is taken ahead for data |
    /// | data_file_raw | on, off | the data file is a raw image by itself |
    /// | encrypt.format | luks, aes | guest data is encrypted; aes is for old readers, and not secure |
    /// | encrypt.cipher-alg | aes-128, -192, -256; cast5-128; serpent-128, ...; twofish-128, ... | default aes-256; this and what follows for luks |
    /// | encrypt.cipher-mode | ecb, cbc, ctr, xts | default xts |
    /// | encrypt.ivgen-alg | plain, plain64, essiv | default plain64 |
    /// | encrypt.ivgen-hash-alg | as hash-alg | of essiv |
    /// | encrypt.hash-alg | md5, sha1, sha224, sha256, sha384, sha512, ripemd160, sm3 | by which keys are derived; default sha256 |
    /// | encrypt.iter-time | milliseconds | that deriving a key takes here; default 2000 |
    /// | encryption | on, off | on: as encrypt.format=aes |
    ///
    /// `NotFound`: no such option; `InvalidArgument`: bad value;
    /// `NotSupported`: an option or value of QEMU's that this build does not
    /// have.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "size" => self.size = Some(size(name, value)?),
            "compat" => self.version = version(name, value)?,
            "cluster_size" => self.cluster_size = cluster_size(name, value)?,
            "extended_l2" => self.extended_l2 = switch(name, value)?,
            "refcount_bits" => self.refcount_bits = refcount_bits(name, value)?,
            "lazy_refcounts" => self.lazy_refcounts = switch(name, value)?,
            "compression_type" => match value {
                "zlib" => self.compression = Compression::Zlib,
                "zstd" => self.compression = Compression::Zstd,
                _ => return Err(bad_value(name, value, "it is zlib or zstd")),
            },
            "preallocation" => {
                let bad = || bad_value(name, value, "it is off, metadata, falloc or full");
                self.preallocation = Preallocation::from_name(value).ok_or_else(bad)?;
            }
            "data_file_raw" => self.data_file_raw = switch(name, value)?,
            "encryption" => {
                let aes = switch(name, value)?.then_some(EncryptionFormat::Aes);
                self.encryption.format = aes;
            }
            "backing_file" | "backing_fmt" | "data_file" | "encrypt.key-secret" => {
                let text = format!(
                    "{name:?} cannot be set by name: other files, and passphrases, have their own \
                     calls"
                );
                return Err(Error::new(ErrorKind::NotSupported, text));
            }
            _ => {
                let encrypt = name.strip_prefix("encrypt.");
                let set = |option| self.encryption.set(name, option, value);
                return encrypt.and_then(set).unwrap_or_else(|| {
                    let text = format!("there is no create option {name:?}");
                    Err(Error::new(ErrorKind::NotFound, text))
                });
            }
        }
        Ok(())
    }
}

pub(super) fn version(name: &str, value: &str) -> Result<u32> {
    match value {
        "0.10" | "v2" => Ok(2),
        "1.1" | "v3" => Ok(3),
        _ => Err(bad_value(name, value, "it is 0.10 (version 2) or 1.1 (version 3)")),
    }
}

fn cluster_size(name: &str, value: &str) -> Result<u64> {
    let bytes = size(name, value)?;
    if !bytes.is_power_of_two() || !(512..=2 << 20).contains(&bytes) {
        return Err(bad_value(name, value, "it is a power of two between 512 and 2048k"));
    }
    Ok(bytes)
}

fn refcount_bits(name: &str, value: &str) -> Result<u32> {
    let bits = number(name, value, 64)?;
    if !bits.is_power_of_two() {
        return Err(bad_value(name, value, "it is a power of two, at most 64"));
    }
    Ok(bits as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str, value: &str) -> ErrorKind {
        CreateOptions::default().set(name, value).unwrap_err().kind()
    }

    #[test]
    fn values_arrive() {
        let mut options = CreateOptions::default();
        for (name, value) in [
            ("size", "1.5G"),
            ("compat", "0.10"),
            ("cluster_size", "2M"),
            ("extended_l2", "on"),
            ("refcount_bits", "64"),
            ("lazy_refcounts", "on"),
            ("compression_type", "zstd"),
            ("preallocation", "falloc"),
            ("data_file_raw", "off"),
            ("encryption", "on"),
            ("encrypt.format", "luks"),
            ("encrypt.cipher-alg", "twofish-192"),
            ("encrypt.cipher-mode", "xts"),
            ("encrypt.ivgen-alg", "essiv"),
            ("encrypt.ivgen-hash-alg", "sm3"),
            ("encrypt.hash-alg", "ripemd160"),
            ("encrypt.iter-time", "10"),
        ] {
            options.set(name, value).unwrap();
        }
        assert_eq!(options.size, Some(3 << 29));
        assert_eq!((options.version, options.cluster_size), (2, 2 << 20));
        assert_eq!((options.extended_l2, options.lazy_refcounts), (true, true));
        assert_eq!((options.refcount_bits, options.compression), (64, Compression::Zstd));
        assert_eq!(options.preallocation, Preallocation::Falloc);
        options.set("compression_type", "zlib").unwrap();
        assert_eq!(options.compression, Compression::Zlib);
        options.set("compat", "v3").unwrap();
        assert_eq!(options.version, 3);
    }

    #[test]
    fn errors_tell_name_from_value_from_lack() {
        for name in ["", "cluster-size", "nocow", "encrypt."] {
            assert_eq!(kind(name, "on"), ErrorKind::NotFound, "{name}");
        }
        for (name, value) in [
            ("size", "big"),
            ("compat", "1.2"),
            ("cluster_size", "256"),
            ("cluster_size", "4M"),
            ("cluster_size", "65537"),
            ("cluster_size", "0"),
            ("extended_l2", "1"),
            ("refcount_bits", "0"),
            ("refcount_bits", "3"),
            ("refcount_bits", "128"),
            ("compression_type", "lz4"),
            ("preallocation", "on"),
            ("encrypt.format", "rot13"),
            ("encrypt.cipher-alg", "des"),
            ("encrypt.cipher-mode", "XTS"),
            ("encrypt.ivgen-alg", "plain128"),
            ("encrypt.hash-alg", "sha3"),
            ("encrypt.ivgen-hash-alg", ""),
            ("encrypt.iter-time", "-1"),
            ("data_file_raw", "maybe"),
        ] {
            assert_eq!(kind(name, value), ErrorKind::InvalidArgument, "{name}={value}");
        }
        for (name, value) in
            [("data_file", "data"), ("encrypt.key-secret", "sec0"), ("backing_file", "base")]
        {
            assert_eq!(kind(name, value), ErrorKind::NotSupported, "{name}={value}");
        }
    }
}
