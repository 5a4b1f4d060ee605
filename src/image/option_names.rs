//! The options of opening, by name: QEMU's names for its qcow2 driver
//! (`--image-opts`), and a few of our own. What each value may be is decided
//! here, and which values go together.

use std::path::Path;

use super::option_values::{bad_value, number, size, switch};
use super::options::{Format, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::io::storage::Source;

impl OpenOptions {
    /// Sets an option by its name in QEMU (qcow2 driver) or one of ours:
    ///
    /// | name | value | |
    /// |---|---|---|
    /// | cache-size | size | bytes for both metadata caches |
    /// | l2-cache-size | size | bytes for slices of L2 tables |
    /// | l2-cache-entry-size | size | bytes of a slice: a power of two, 512 to the cluster size |
    /// | refcount-cache-size | size | bytes for refcount blocks |
    /// | cache-clean-interval | seconds | after so many (default: 600; 0: never) the memory of what the caches of the chain hold, and nobody has used since, is given back; there is no thread that would do it, but requests, flushes and queues do when they come by, and `Image::trim` does |
    /// | lazy-refcounts | on, off | refcounts are written at close, and rebuilt after a crash; default: as the image says |
    /// | overlap-check | none, constant, cached, all | which metadata writes are checked against: nothing; header, L1, refcount and snapshot tables, bitmap directory; L2 tables, refcount blocks and snapshots' L1 tables, too (the default); snapshots' L2 tables, too. A write that would hit it fails, and the image is marked corrupt |
    /// | overlap-check.template | as above | as above |
    /// | overlap-check.KIND | on, off | for one kind, whatever the level: main-header, active-l1, active-l2, refcount-table, refcount-block, snapshot-table, inactive-l1, inactive-l2, bitmap-directory |
    /// | pass-discard-request | on, off | whether freed clusters are punched out of the storage |
    /// | pass-discard-snapshot | on, off | the same where a snapshot is deleted or gone back to; default: as pass-discard-request |
    /// | pass-discard-other | off | the same for tables, whose clusters are kept |
    /// | discard-no-unref | on, off | whether a discard keeps the host cluster |
    /// | data-file.filename | path | the external data file, whatever the image calls it; it is opened whatever the policy |
    /// | backing-format | raw, qcow2 | of a backing file whose image stores no format |
    /// | backing-direct | on, off | O_DIRECT for the images below |
    /// | repair-dirty | on, off | whether the refcounts of a dirty image are rebuilt when it is opened for writing; off: `Dirty` |
    /// | allow-qcow2-magic | on, off | open as raw, for writing, what starts with the qcow2 magic |
    /// | max-chain-depth | number | images below this one |
    /// | max-key-iterations | number | of key derivation, to find out whether a passphrase opens an image (default 268435456) |
    /// | max-metadata-size | size | bytes of metadata in memory, for the whole chain |
    /// | max-virtual-size | size | of the disk |
    ///
    /// Sizes are bytes, maybe with a suffix ("64M", "1.5G").
    ///
    /// `NotFound`: no such option; `InvalidArgument`: bad value;
    /// `NotSupported`: an option of QEMU's that this build does not have.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "cache-size" => self.cache_size = Some(size(name, value)?),
            "l2-cache-size" => self.l2_cache_size = Some(size(name, value)?),
            "l2-cache-entry-size" => self.l2_cache_entry_size = Some(slice_size(name, value)?),
            "refcount-cache-size" => self.refcount_cache_size = Some(size(name, value)?),
            "cache-clean-interval" => {
                let seconds = number(name, value, u64::from(u32::MAX))?;
                self.cache_clean_interval = u32::try_from(seconds).unwrap_or(u32::MAX);
            }
            "lazy-refcounts" => self.lazy_refcounts = Some(switch(name, value)?),
            "pass-discard-request" => self.discard = switch(name, value)?,
            "pass-discard-snapshot" => self.discard_snapshots = Some(switch(name, value)?),
            "pass-discard-other" => {
                if switch(name, value)? {
                    return Err(unsupported(name, value));
                }
            }
            "discard-no-unref" => self.discard_no_unref = switch(name, value)?,
            "backing-format" => self.backing_format = Some(format(name, value)?),
            "backing-direct" => self.backing_direct = Some(switch(name, value)?),
            "repair-dirty" => self.repair_dirty = switch(name, value)?,
            "allow-qcow2-magic" => self.allow_qcow2_magic = switch(name, value)?,
            "max-chain-depth" => {
                let depth = number(name, value, u64::from(u32::MAX))?;
                self.max_chain_depth = u32::try_from(depth).unwrap_or(u32::MAX);
            }
            "max-key-iterations" => {
                self.max_key_iterations = number(name, value, u64::MAX)?;
            }
            "max-metadata-size" => self.max_metadata_size = size(name, value)?,
            "max-virtual-size" => self.max_virtual_size = size(name, value)?,
            "data-file.filename" if value.is_empty() || value.contains('\0') => {
                return Err(bad_value(name, value, "it is a path"));
            }
            "data-file.filename" => self.data_file = Some(Source::path(Path::new(value))),
            "data-file" | "encrypt.format" | "encrypt.key-secret" => {
                return Err(unsupported(name, value));
            }
            _ => {
                let rest = name.strip_prefix("overlap-check");
                match rest.and_then(|rest| self.overlap_check.set(rest, value)) {
                    Some(set) => set.map_err(|wanted| bad_value(name, value, wanted))?,
                    None => {
                        let text = format!("there is no open option {name:?}");
                        return Err(Error::new(ErrorKind::NotFound, text));
                    }
                }
            }
        }
        Ok(())
    }

    /// Checks the options that only make sense together, as QEMU does at open.
    pub(crate) fn validate(&self) -> Result<()> {
        if self.overlap_check.is_contradictory() {
            return Err(Error::invalid(
                "overlap-check and overlap-check.template say different things: leave one out",
            ));
        }
        let Some(both) = self.cache_size else { return Ok(()) };
        if self.l2_cache_size.is_some() && self.refcount_cache_size.is_some() {
            return Err(Error::invalid(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same \
                 time: leave one out",
            ));
        }
        let parts = [
            ("l2-cache-size", self.l2_cache_size),
            ("refcount-cache-size", self.refcount_cache_size),
        ];
        for (name, part) in parts {
            if let Some(part) = part.filter(|part| *part > both) {
                return Err(Error::invalid(format!(
                    "{name} may not exceed cache-size: {part} is more than {both}"
                )));
            }
        }
        Ok(())
    }
}

#[cold]
fn unsupported(name: &str, value: &str) -> Error {
    let text = format!("the open option {name:?} = {value:?} is not supported by this build");
    Error::new(ErrorKind::NotSupported, text)
}

/// Its upper limit, the image's cluster size, is not known yet.
fn slice_size(name: &str, value: &str) -> Result<u64> {
    let bytes = size(name, value)?;
    if !bytes.is_power_of_two() || !(512..=2 << 20).contains(&bytes) {
        let wanted = "it is a power of two between 512 and the cluster size";
        return Err(bad_value(name, value, wanted));
    }
    Ok(bytes)
}

fn format(name: &str, value: &str) -> Result<Format> {
    Format::from_name(value.as_bytes()).ok_or_else(|| bad_value(name, value, "it is raw or qcow2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str, value: &str) -> ErrorKind {
        OpenOptions::new().set(name, value).unwrap_err().kind()
    }

    #[test]
    fn values_arrive() {
        let mut options = OpenOptions::new();
        for (name, value) in [
            ("cache-size", "3M"),
            ("l2-cache-size", "2M"),
            ("l2-cache-entry-size", "8k"),
            ("refcount-cache-size", "0x40000"),
            ("pass-discard-request", "off"),
            ("pass-discard-snapshot", "on"),
            ("pass-discard-other", "off"),
            ("discard-no-unref", "on"),
            ("backing-format", "raw"),
            ("backing-direct", "off"),
            ("lazy-refcounts", "on"),
            ("repair-dirty", "off"),
            ("allow-qcow2-magic", "on"),
            ("cache-clean-interval", "7"),
            ("max-chain-depth", "3"),
            ("max-metadata-size", "64M"),
            ("max-virtual-size", "1T"),
        ] {
            options.set(name, value).unwrap();
        }
        assert_eq!(options.cache_size, Some(3 << 20));
        assert_eq!(options.l2_cache_size, Some(2 << 20));
        assert_eq!(options.l2_cache_entry_size, Some(8192));
        assert_eq!(options.refcount_cache_size, Some(0x40000));
        assert!(!options.discard && options.discard_no_unref);
        assert_eq!(options.discard_snapshots, Some(true));
        assert_eq!(options.backing_format, Some(Format::Raw));
        assert_eq!(options.backing_direct, Some(false));
        assert_eq!(options.lazy_refcounts, Some(true));
        assert!(!options.repair_dirty && options.allow_qcow2_magic);
        assert_eq!(options.cache_clean_interval, 7);
        assert_eq!(options.max_chain_depth, 3);
        assert_eq!(options.max_metadata_size, 64 << 20);
        assert_eq!(options.max_virtual_size, 1 << 40);
    }

    #[test]
    fn values_that_are_none_are_refused() {
        for (name, value) in [
            ("cache-clean-interval", "4294967296"),
            ("cache-clean-interval", "1.5"),
            ("lazy-refcounts", "maybe"),
            ("overlap-check", "some"),
            ("overlap-check.template", "on"),
            ("overlap-check.active-l2", "all"),
        ] {
            assert_eq!(kind(name, value), ErrorKind::InvalidArgument, "{name}={value}");
        }
    }

    #[test]
    fn errors_tell_name_from_value() {
        for name in ["", "cache_size", "Cache-Size", "overlap-check.", "overlap-check.l3", "driver"]
        {
            assert_eq!(kind(name, "on"), ErrorKind::NotFound, "{name}");
        }
        for (name, value) in [
            ("cache-size", ""),
            ("cache-size", "-1"),
            ("l2-cache-entry-size", "256"),
            ("l2-cache-entry-size", "4M"),
            ("l2-cache-entry-size", "5000"),
            ("backing-format", "vmdk"),
            ("backing-direct", "auto"),
            ("max-chain-depth", "4294967296"),
        ] {
            assert_eq!(kind(name, value), ErrorKind::InvalidArgument, "{name}={value}");
        }
        assert_eq!(kind("data-file.filename", ""), ErrorKind::InvalidArgument);
        assert_eq!(kind("data-file", "node"), ErrorKind::NotSupported);
        assert_eq!(kind("encrypt.key-secret", "sec0"), ErrorKind::NotSupported, "it has a call");
        assert_eq!(kind("pass-discard-other", "on"), ErrorKind::NotSupported);
        assert_eq!(kind("pass-discard-other", "some"), ErrorKind::InvalidArgument);
    }

    #[test]
    fn cache_sizes_go_together() {
        let check = |sizes: [(&str, &str); 2], third: Option<(&str, &str)>| {
            let mut options = OpenOptions::new();
            for (name, value) in sizes.into_iter().chain(third) {
                options.set(name, value).unwrap();
            }
            options.validate().map_err(|error| error.kind())
        };
        let refused = Err(ErrorKind::InvalidArgument);
        let (l2, refcount) = (("l2-cache-size", "1M"), ("refcount-cache-size", "256K"));
        assert_eq!(check([l2, refcount], None), Ok(()));
        assert_eq!(check([("cache-size", "1M"), l2], None), Ok(()));
        assert_eq!(check([("cache-size", "1M"), refcount], None), Ok(()));
        assert_eq!(check([("cache-size", "1023K"), l2], None), refused);
        assert_eq!(check([("cache-size", "255K"), refcount], None), refused);
        assert_eq!(check([("cache-size", "4M"), l2], Some(refcount)), refused);
        assert!(OpenOptions::new().validate().is_ok());
    }
}
