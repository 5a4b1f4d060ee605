//! The one gate for files that an image names: backing files and data files.
//!
//! A name from an image is an opaque string of bytes: it is never parsed as a
//! URL, as JSON or as a protocol, its format is never probed, and unless the
//! policy says so nothing of it is opened.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::{Format, OpenOptions, Policy, Reference, ReferenceKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::storage::Source;

/// What a reference stands for: a source and its format, which is raw for a data file.
/// `directory`: that of the referring image, if it has one.
pub fn resolve(
    options: &OpenOptions,
    reference: &Reference,
    directory: Option<&Path>,
) -> Result<(Arc<Source>, Format)> {
    let name = String::from_utf8_lossy(&reference.name).into_owned();
    let referrer = &reference.referrer;
    let stored = reference.format.as_deref().and_then(Format::from_name);
    let (source, format) = match &options.policy {
        Policy::Deny => {
            return Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{referrer} needs the file {name:?}, and the reference policy allows none \
                     (choose PATHS for images that are trusted, or RESOLVE)"
                ),
            ));
        }
        Policy::Paths => (Source::path(path(reference, directory)?), stored),
        Policy::Resolve(resolver) => {
            let (source, format) = resolver.resolve(reference, stored).map_err(|error| {
                // A refusal is one, whoever decides.
                let kind = match error.kind() {
                    ErrorKind::Policy => ErrorKind::Policy,
                    _ => kind_of(reference, error.errno()),
                };
                error.wrap_as(kind, format!("{referrer}: resolving {name:?}"))
            })?;
            return match (format, reference.kind) {
                (Some(Format::Qcow2), ReferenceKind::Data) => Err(Error::new(
                    kind_of(reference, libc::EINVAL),
                    format!("{referrer}: the data file {name:?} is a raw file, not qcow2"),
                )),
                (_, ReferenceKind::Data) => Ok((source, Format::Raw)),
                (Some(format), ReferenceKind::Backing) => Ok((source, format)),
                (None, ReferenceKind::Backing) => Err(no_format(reference, &name)),
            };
        }
    };
    if reference.kind == ReferenceKind::Data {
        return Ok((source, Format::Raw));
    }
    // What the caller says is for images that store no format, only.
    let format = match (format, &reference.format) {
        (Some(format), _) => Some(format),
        (None, None) => options.backing_format,
        (None, Some(_)) => None,
    };
    format.map(|format| (source, format)).ok_or_else(|| no_format(reference, &name))
}

/// The trouble of an image whose file cannot be had.
fn kind_of(reference: &Reference, errno: i32) -> ErrorKind {
    match reference.kind {
        ReferenceKind::Backing => ErrorKind::Backing(errno),
        ReferenceKind::Data => ErrorKind::DataFile(errno),
    }
}

fn no_format(reference: &Reference, name: &str) -> Error {
    let referrer = &reference.referrer;
    let text = match &reference.format {
        Some(format) => format!(
            "{referrer}: the file {name:?} has the format {:?}, which is neither raw nor qcow2",
            String::from_utf8_lossy(format)
        ),
        None => format!(
            "{referrer} does not say which format {name:?} has, and formats are never guessed: \
             set \"backing-format\", or write it down with qemu-img rebase -u -F"
        ),
    };
    Error::new(ErrorKind::Backing(libc::EINVAL), text)
}

/// A plain path, relative to the referring image.
fn path(reference: &Reference, directory: Option<&Path>) -> Result<PathBuf> {
    let name = &reference.name;
    let refuse = |why: &str| {
        let name = String::from_utf8_lossy(name);
        let referrer = &reference.referrer;
        Err(Error::new(ErrorKind::Policy, format!("{referrer}: the name {name:?} {why}")))
    };
    if name.contains(&0) {
        return refuse("contains a NUL byte");
    }
    let first = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    if first.contains(&b':') {
        return refuse("looks like a protocol; only plain paths are allowed (\"./\" helps)");
    }
    let path = Path::new(OsStr::from_bytes(name));
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    match directory {
        Some(directory) => Ok(directory.join(path)),
        None => refuse("is relative, and the image was not opened by path"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::ReferenceKind;
    use super::*;

    fn named(name: &[u8]) -> Reference {
        Reference {
            kind: ReferenceKind::Backing,
            depth: 0,
            name: name.to_vec(),
            format: Some(b"raw".to_vec()),
            referrer: "top".into(),
            writable: false,
        }
    }

    #[test]
    fn nothing_is_allowed_by_default() {
        let error = resolve(&OpenOptions::default(), &named(b"/etc/passwd"), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy);
    }

    #[test]
    fn protocols_and_json_are_no_paths() {
        let directory = Some(Path::new("/images"));
        for name in ["json:{}", "nbd://host", "file:x", "a:b/c", "x\0y"] {
            let error = path(&named(name.as_bytes()), directory).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Policy, "{name}");
        }
        assert_eq!(path(&named(b"./a:b"), directory).unwrap(), Path::new("/images/./a:b"));
        assert_eq!(path(&named(b"/x:y"), directory).unwrap(), Path::new("/x:y"));
        assert!(path(&named(b"base"), None).is_err());
    }

    #[test]
    fn formats_are_never_guessed() {
        let options = OpenOptions { policy: Policy::Paths, ..OpenOptions::default() };
        let unnamed = Reference { format: None, ..named(b"/base") };
        let error = resolve(&options, &unnamed, None).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Backing(_)));
        let told = OpenOptions { backing_format: Some(Format::Raw), ..options.clone() };
        assert_eq!(resolve(&told, &unnamed, None).unwrap().1, Format::Raw);
        let odd = Reference { format: Some(b"vmdk".to_vec()), ..named(b"/base") };
        assert!(resolve(&told, &odd, None).is_err(), "what is stored counts");
    }
}
