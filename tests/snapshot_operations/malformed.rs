//! Snapshot tables that no driver has written.

use qcow2rs::{ErrorKind, Image, OpenOptions, Source};

use super::support::{Scratch, assert_content, describe, open, open_rw};
use super::{CLUSTER, snapshot, written};

/// Malformed entries are refused when the table is first needed, or the snapshot is:
/// nothing is changed then, and memory is bounded.
#[test]
fn malformed_snapshots_are_refused() {
    type Patch = fn(&mut Vec<u8>, usize);
    let patches: [(&str, Patch, bool); 9] = [
        ("extra data", |b, at| b[at + 36..at + 40].fill(0xff), true),
        ("a name past the end", |b, at| b[at + 14..at + 16].fill(0xff), false),
        ("an L1 table that is too long", |b, at| b[at + 8..at + 12].fill(0xff), false),
        ("an L1 table past all offsets", |b, at| b[at..at + 8].fill(0xff), false),
        ("an L1 table inside a cluster", |b, at| b[at + 6] ^= 2, false),
        ("an L1 table past the end", |b, at| b[at + 4] = 1, false),
        ("an L1 table in the header", |b, at| b[at..at + 8].fill(0), false),
        ("a size past all sizes", |b, at| b[at + 48..at + 56].fill(0xff), false),
        ("an odd size", |b, at| b[at + 55] = 1, false),
    ];
    for (what, patch, at_list) in patches {
        describe(what.to_owned(), || {
            let scratch = Scratch::new();
            let path = written(&scratch, "");
            snapshot(&path, &["-c", "s"]);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
            patch(&mut bytes, at);
            std::fs::write(&path, &bytes).unwrap();
            let image = open(&path);
            let listed = image.snapshot(0);
            assert!(!at_list || listed.is_err());
            // Those that are not malformed but lie have no content.
            if let Ok(snapshot) = image.snapshot_open(b"1") {
                _ = snapshot.read_at(&mut [0; 512], 0);
            }
            image.close().unwrap();
            let Ok(image) = Image::open(Source::path(&path), &OpenOptions::new().writable(true))
            else {
                assert!(std::fs::read(&path).unwrap() == bytes, "opening has changed it");
                return;
            };
            for failed in [image.snapshot_apply(b"1"), image.snapshot_delete(b"1")] {
                if let Err(error) = failed {
                    let kinds = [ErrorKind::Corrupt, ErrorKind::NotFound, ErrorKind::Limit];
                    assert!(kinds.contains(&error.kind()), "{error:?}");
                }
            }
            _ = image.close();
            let image = open(&path);
            let mut expected = vec![1; 512 << 10];
            expected.resize(16 * CLUSTER as usize, 0);
            if image.size() == 16 * CLUSTER && what.starts_with("an L1") && !what.ends_with("end") {
                assert_content(&image, &expected);
            }
        });
    }
}

/// Two snapshots that name the same L1 table: its references are counted once only.
#[test]
fn snapshots_that_share_their_l1_table_are_not_freed_twice() {
    let scratch = Scratch::new();
    let path = written(&scratch, "");
    for name in ["a", "b"] {
        snapshot(&path, &["-c", name]);
    }
    let mut bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    // The second entry begins behind 40 + 24 + 2 bytes, padded to 72.
    let l1 = bytes[table..table + 8].to_vec();
    bytes[table + 72..table + 80].copy_from_slice(&l1);
    std::fs::write(&path, bytes).unwrap();
    let image = open_rw(&path);
    image.snapshot_delete(b"a").unwrap();
    // Its L1 table is free now: it may be anything, but the active disk's data.
    _ = image.snapshot_delete(b"b");
    _ = image.close();
    let mut expected = vec![1; 512 << 10];
    expected.resize(16 * CLUSTER as usize, 0);
    assert_content(&open(&path), &expected);
}
