//! Encryption of guest data: LUKS (version 1) as it lies in qcow2 images, and the AES of
//! old ones.
//!
//! Bytes to bytes, without I/O, clock or random numbers of its own (who calls brings
//! them), and without knowing what a qcow2 image is. Sectors have 512 bytes; whatever
//! is secret is wiped when it goes out of use.
//!
//! | module | subject |
//! |---|---|
//! | `secret` | passphrases and keys, wiped on drop |
//! | `hash` | hash functions, PBKDF2 |
//! | `algorithms` | which ciphers, modes and IV generators there are, and their names |
//! | `modes` | modes of operation over the sectors of a buffer |
//! | `sectors` | the cipher of a disk: sectors by number |
//! | `afsplit` | the anti-forensic splitter |
//! | `luks` | the LUKS header and its validation |
//! | `keyslot` | the master key into a key slot, and out of it |

mod afsplit;
pub mod algorithms;
pub mod hash;
mod keyslot;
#[cfg(test)]
mod known_answers;
pub mod luks;
mod modes;
pub mod secret;
pub mod sectors;

/// Bytes that are encrypted as one, each such with its own IV.
pub const SECTOR: usize = 512;
