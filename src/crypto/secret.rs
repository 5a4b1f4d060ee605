//! Passphrases and keys: shared without copies, never shown, wiped on drop.

use std::fmt;
use std::sync::Arc;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::error::Result;
use crate::fallible;

/// Bytes that are a key; wiped on drop.
pub type Key = Zeroizing<Vec<u8>>;

/// A passphrase. Clones share the bytes, which are wiped when the last one goes.
#[derive(Clone)]
pub struct Secret(Arc<Key>);

impl Secret {
    /// A copy of `bytes`. (The caller's own is the caller's to wipe.)
    pub fn new(bytes: &[u8]) -> Result<Secret> {
        Ok(Secret(Arc::new(Zeroizing::new(fallible::copy(bytes)?))))
    }

    /// The passphrase itself.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether QEMU can be told it: UTF-8 without NUL.
    pub(crate) fn is_text(&self) -> bool {
        std::str::from_utf8(&self.0).is_ok() && !self.0.contains(&0)
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown() {
        let secret = Secret::new(b"hunter2").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert_eq!(secret, secret.clone());
        assert_ne!(secret, Secret::new(b"hunter3").unwrap());
        assert!(!Secret::new(b"a\0").unwrap().is_text());
        assert!(!Secret::new(b"\xff").unwrap().is_text());
    }
}
