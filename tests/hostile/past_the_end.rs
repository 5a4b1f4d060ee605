//! Entries that lead past the end of the file, to clusters that nobody has given
//! out yet. QEMU writes to such places, and so do we, but nothing else suffers.

use qcow2rs::{ErrorKind, WriteFlags};

use crate::images::{GUEST, Kind, image, open, options};
use crate::support::dissect::{COPIED, Dissected};
use crate::support::memory_disk::MemoryDisk;

/// An image whose guest cluster 0 is so many clusters past the end of the file.
fn aimed(kind: Kind, past: u64) -> Dissected {
    let mut spoiled = image(kind);
    let size = spoiled.cluster_size();
    let end = (spoiled.bytes.len() as u64).next_multiple_of(size);
    spoiled.set_entry(0, ((end + past * size) | COPIED, u64::from(u32::MAX)));
    spoiled
}

#[test]
fn what_is_written_there_stays_when_the_file_grows_and_shrinks() {
    for kind in [Kind::Standard, Kind::WideRefcounts, Kind::Extended] {
        // Behind what is reserved first.
        let spoiled = aimed(kind, 1 << 21 >> spoiled_bits(kind));
        let disk = MemoryDisk::new(&spoiled.bytes);
        let size = spoiled.cluster_size();
        let image = open(&disk, &options(true)).unwrap();
        image.write_at(&vec![GUEST; size as usize], 0, WriteFlags::default()).unwrap();
        image.flush().unwrap();
        image.write_at(&[7; 512], image.size() - 512, WriteFlags::default()).unwrap();
        image.flush().unwrap();
        for step in ["after an allocation", "after closing"] {
            if step == "after closing" {
                image.close().unwrap();
            }
            let reader = open(&disk, &options(false)).unwrap();
            let mut data = vec![0; size as usize];
            reader.read_at(&mut data, 0).unwrap();
            assert!(data.iter().all(|byte| *byte == GUEST), "{kind:?}: {step}");
        }
    }
}

fn spoiled_bits(kind: Kind) -> u32 {
    image(kind).cluster_bits()
}

#[test]
fn a_new_table_is_empty_wherever_the_guest_has_written_before() {
    let spoiled = aimed(Kind::Standard, 0);
    let disk = MemoryDisk::new(&spoiled.bytes);
    let image = open(&disk, &options(true)).unwrap();
    image.write_at(&[GUEST; 512], 0, WriteFlags::default()).unwrap();
    // The first free cluster, where the guest's bytes are, becomes an L2 table.
    let empty = image.size() - 1024;
    image.write_at(&[7; 512], empty, WriteFlags::default()).unwrap();
    let mut data = [9; 1024];
    image.read_at(&mut data, empty).unwrap();
    assert!(data[..512] == [7; 512] && data[512..] == [0; 512]);
    let again = image.write_at(&[GUEST; 512], 0, WriteFlags::default()).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Corrupt);
}

#[test]
fn a_new_cluster_is_empty_wherever_the_guest_has_written_before() {
    for kind in [Kind::WideRefcounts, Kind::Extended] {
        let spoiled = aimed(kind, 1);
        let disk = MemoryDisk::new(&spoiled.bytes);
        let image = open(&disk, &options(true)).unwrap();
        let size = spoiled.cluster_size();
        let empty = image.size() / 4 * 3;
        // The first one is reserved together with the next.
        image.write_at(&[7; 512], empty, WriteFlags::default()).unwrap();
        image.write_at(&vec![GUEST; size as usize], 0, WriteFlags::default()).unwrap();
        image.write_at(&[7; 5], empty + size + 77, WriteFlags::default()).unwrap();
        let mut data = vec![9; size as usize];
        image.read_at(&mut data, empty + size).unwrap();
        data[77..82].fill(0);
        assert!(data.iter().all(|byte| *byte == 0), "{kind:?}");
    }
}
