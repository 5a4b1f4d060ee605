//! The one error type: a kind, what was being done to what, and the cause.
//!
//! This is the only place that maps kinds to errno values and to the stable
//! codes of the C API (`QCOW2RS_E_*`). It knows nothing of images or I/O.

use std::error::Error as _;
use std::fmt;

/// Result of everything fallible in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a program may want to react to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file does not start with the qcow2 magic.
    NotQcow2,
    /// The header or a table named by it is malformed.
    BadHeader,
    /// The header version is neither 2 nor 3.
    UnsupportedVersion,
    /// The image needs a feature that this build does not have.
    UnsupportedFeature,
    /// The image's metadata contradicts itself.
    Corrupt,
    /// Stored data cannot be understood; the metadata is sound.
    DataLost,
    /// The image carries the corrupt bit and was to be opened for writing.
    MarkedCorrupt,
    /// Somebody else uses the image.
    Locked,
    /// The reference policy does not allow a file that the image names.
    Policy,
    /// A limit of the open options is exceeded.
    Limit,
    /// The backing chain is too long or closes a circle.
    ChainDepth,
    /// A backing file cannot be opened; the errno is the cause's.
    Backing(i32),
    /// The external data file cannot be opened; the errno is the cause's.
    DataFile(i32),
    /// A secret is missing or wrong.
    Encrypted,
    /// A callback of the user failed; the errno is the callback's.
    Callback(i32),
    /// A panic was caught; the handle is unusable from now on.
    Panic,
    /// A sync failed earlier or just now: what is durable is unknown.
    FlushFailed,
    /// The image is dirty and must be repaired before it is written.
    Dirty,
    /// The operating system refused; the errno is its own.
    Os(i32),
    /// An argument is out of its domain.
    InvalidArgument,
    /// The name is not known, or the thing does not exist.
    NotFound,
    /// The file exists already.
    Exists,
    /// Opened read-only.
    ReadOnly,
    /// The storage is full.
    NoSpace,
    /// The image was marked corrupt while open: no more writes.
    Shutdown,
    /// Another call is in progress on the same object.
    Busy,
    /// The caller's progress function said to stop.
    Cancelled,
    /// The call would wait for work that only its own thread can carry on.
    Deadlock,
    /// The request is valid but cannot be served.
    NotSupported,
    /// Memory could not be had.
    OutOfMemory,
}

/// Stable numbers of the C API. Their meaning is documented in the header.
pub mod code {
    #![allow(missing_docs)]
    pub const NONE: u32 = 0;
    pub const NOT_QCOW2: u32 = 1;
    pub const BAD_HEADER: u32 = 2;
    pub const UNSUPPORTED_VERSION: u32 = 3;
    pub const UNSUPPORTED_FEATURE: u32 = 4;
    pub const CORRUPT: u32 = 5;
    pub const MARKED_CORRUPT: u32 = 6;
    pub const LOCKED: u32 = 7;
    pub const POLICY: u32 = 8;
    pub const LIMIT: u32 = 9;
    pub const CHAIN_DEPTH: u32 = 10;
    pub const BACKING: u32 = 11;
    pub const DATA_FILE: u32 = 12;
    pub const ENCRYPTED: u32 = 13;
    pub const CALLBACK: u32 = 14;
    pub const PANIC: u32 = 15;
    pub const FLUSH_FAILED: u32 = 16;
    pub const DIRTY: u32 = 17;
}

impl ErrorKind {
    /// The positive errno value that the C API returns (negated) for this kind.
    pub fn errno(self) -> i32 {
        use ErrorKind::*;
        match self {
            NotQcow2 | BadHeader | InvalidArgument => libc::EINVAL,
            UnsupportedVersion | UnsupportedFeature | NotSupported => libc::ENOTSUP,
            Corrupt | DataLost | FlushFailed => libc::EIO,
            MarkedCorrupt | ReadOnly => libc::EROFS,
            Locked => libc::EAGAIN,
            Policy => libc::EPERM,
            Limit => libc::EFBIG,
            ChainDepth => libc::ELOOP,
            Encrypted => libc::EACCES,
            Panic => libc::ENOTRECOVERABLE,
            Dirty => libc::EUCLEAN,
            NotFound => libc::ENOENT,
            Exists => libc::EEXIST,
            NoSpace => libc::ENOSPC,
            Shutdown => libc::ESHUTDOWN,
            Busy => libc::EBUSY,
            Cancelled => libc::ECANCELED,
            Deadlock => libc::EDEADLK,
            OutOfMemory => libc::ENOMEM,
            Backing(errno) | DataFile(errno) | Callback(errno) | Os(errno) => errno,
        }
    }

    /// The stable code of the C API, `QCOW2RS_E_*`; 0 where errno says it all.
    pub fn code(self) -> u32 {
        use ErrorKind::*;
        match self {
            NotQcow2 => code::NOT_QCOW2,
            BadHeader => code::BAD_HEADER,
            UnsupportedVersion => code::UNSUPPORTED_VERSION,
            UnsupportedFeature => code::UNSUPPORTED_FEATURE,
            Corrupt | DataLost => code::CORRUPT,
            MarkedCorrupt => code::MARKED_CORRUPT,
            Locked => code::LOCKED,
            Policy => code::POLICY,
            Limit => code::LIMIT,
            ChainDepth => code::CHAIN_DEPTH,
            Backing(_) => code::BACKING,
            DataFile(_) => code::DATA_FILE,
            Encrypted => code::ENCRYPTED,
            Callback(_) => code::CALLBACK,
            Panic => code::PANIC,
            FlushFailed => code::FLUSH_FAILED,
            Dirty => code::DIRTY,
            Os(_) | InvalidArgument | NotFound | Exists | ReadOnly | NoSpace | Shutdown | Busy
            | Cancelled | Deadlock | NotSupported | OutOfMemory => code::NONE,
        }
    }

    /// The kind for an errno of the operating system.
    pub fn from_errno(errno: i32) -> ErrorKind {
        match errno {
            libc::ENOSPC | libc::EDQUOT => ErrorKind::NoSpace,
            libc::ENOMEM => ErrorKind::OutOfMemory,
            libc::EEXIST => ErrorKind::Exists,
            // A lower layer that returns success as an error is lying: EIO.
            errno if errno <= 0 => ErrorKind::Os(libc::EIO),
            errno => ErrorKind::Os(errno),
        }
    }
}

/// The name of a stable code, as `qcow2rs_error_code_name` returns it.
pub fn code_name(code: u32) -> &'static std::ffi::CStr {
    match code {
        code::NONE => c"none",
        code::NOT_QCOW2 => c"not-qcow2",
        code::BAD_HEADER => c"bad-header",
        code::UNSUPPORTED_VERSION => c"unsupported-version",
        code::UNSUPPORTED_FEATURE => c"unsupported-feature",
        code::CORRUPT => c"corrupt",
        code::MARKED_CORRUPT => c"marked-corrupt",
        code::LOCKED => c"locked",
        code::POLICY => c"policy",
        code::LIMIT => c"limit",
        code::CHAIN_DEPTH => c"chain-depth",
        code::BACKING => c"backing",
        code::DATA_FILE => c"data-file",
        code::ENCRYPTED => c"encrypted",
        code::CALLBACK => c"callback",
        code::PANIC => c"panic",
        code::FLUSH_FAILED => c"flush-failed",
        code::DIRTY => c"dirty",
        _ => c"unknown",
    }
}

/// An error: kind, context, cause. Boxed, so that a `Result` stays small.
pub struct Error(Box<Inner>);

#[derive(Debug, thiserror::Error)]
#[error("{context}")]
struct Inner {
    kind: ErrorKind,
    context: String,
    /// The trouble is in an image below the one that was asked.
    from_below: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl Error {
    /// An error without a cause. `context` is a sentence for a person: it names
    /// the file, the offset and, where there is one, the remedy.
    #[cold]
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error(Box::new(Inner { kind, context: context.into(), from_below: false, source: None }))
    }

    /// Metadata that contradicts itself.
    #[cold]
    pub fn corrupt(context: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, context)
    }

    /// An argument out of its domain.
    #[cold]
    pub fn invalid(context: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidArgument, context)
    }

    /// An error of the operating system, by errno.
    #[cold]
    pub fn os(errno: i32, context: impl Into<String>) -> Error {
        let source = std::io::Error::from_raw_os_error(errno);
        Error(Box::new(Inner {
            kind: ErrorKind::from_errno(errno),
            context: context.into(),
            from_below: false,
            source: Some(Box::new(source)),
        }))
    }

    /// Says what was being done when this error came up; kind and errno stay.
    #[cold]
    #[must_use]
    pub fn context(self, context: impl Into<String>) -> Error {
        let kind = self.0.kind;
        self.wrap_as(kind, context)
    }

    /// Makes this error the cause of one of another kind.
    #[cold]
    #[must_use]
    pub fn wrap_as(self, kind: ErrorKind, context: impl Into<String>) -> Error {
        let from_below = self.0.from_below;
        // Not by `into`, which would box the box.
        let source: Box<dyn std::error::Error + Send + Sync> = Box::new(self);
        Error(Box::new(Inner { kind, context: context.into(), from_below, source: Some(source) }))
    }

    /// Says that the trouble is in an image below the one that was asked: it
    /// tells nothing about that one.
    #[cold]
    #[must_use]
    pub fn mark_from_below(mut self) -> Error {
        self.0.from_below = true;
        self
    }

    /// Whether the trouble is in an image below.
    pub fn is_from_below(&self) -> bool {
        self.0.from_below
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The positive errno value of the C API for this error.
    pub fn errno(&self) -> i32 {
        self.0.kind.errno()
    }

    /// The whole story on one line: context, then each cause. Control
    /// characters, which may come from an image, are escaped.
    pub fn message(&self) -> String {
        let mut text = self.0.context.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            let line = match error.downcast_ref::<Error>() {
                Some(own) => own.0.context.clone(),
                None => error.to_string(),
            };
            text.push_str(": ");
            text.push_str(&line);
            cause = error.source();
        }
        escape(&text)
    }
}

/// Replaces control characters, so that a name taken from an image cannot
/// forge lines or move a terminal's cursor.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.message())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_tells_each_cause_once() {
        let error = Error::os(libc::ENOSPC, "writing base").context("top").context("guest");
        let cause = std::io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(error.message(), format!("guest: top: writing base: {cause}"));
        assert_eq!(error.errno(), libc::ENOSPC);
    }
}
