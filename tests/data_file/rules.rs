//! The rules of entries that point into a data file, one by one, and images that break
//! them.

use std::path::PathBuf;

use qcow2rs::{ErrorKind, Image, OpenOptions, Policy, Source, WriteFlags};

use crate::support::dissect::{COMPRESSED, COPIED, Dissected, ZERO, field};
use crate::support::operations::{Backing, Case, Op};
use crate::support::{Scratch, open, open_rw, qemu, qemu_img_check, read, text};
use crate::{Data, assert_sound, data_of, our_map, qemu_makes, we_make};

fn case(extended_l2: bool) -> Case {
    Case {
        version: 3,
        cluster_size: 65536,
        extended_l2,
        refcount_bits: 16,
        size: 1 << 20,
        backing: Backing::None,
    }
}

/// An image whose first two clusters are written.
fn written(scratch: &Scratch, extended_l2: bool, data: Data) -> PathBuf {
    let path = scratch.path("image");
    we_make(&path, &case(extended_l2), data);
    let image = open_rw(&path);
    image.write_at(&[5; 2 << 16], 0, WriteFlags::default()).unwrap();
    image.close().unwrap();
    path
}

#[test]
fn offset_0_is_a_place_like_any_other() {
    for extended_l2 in [false, true] {
        let scratch = Scratch::new();
        let path = written(&scratch, extended_l2, Data::Plain);
        let bitmap = if extended_l2 { 0xffff_ffff } else { 0 };
        assert_eq!(Dissected::load(&path).entry(0), (COPIED, bitmap));
        assert_eq!(read(&open(&path), 0, 512), [5; 512]);
        assert_eq!(our_map(&open(&path))[0].3, Some(0));
        qemu_img_check(&path);
        // Without the flag it is no place.
        let change = |image: &mut Dissected| image.set_entry(0, (0, 0));
        Dissected::patch(&path, change);
        assert_eq!(read(&open(&path), 0, 512), [0; 512]);
    }
}

#[test]
fn entries_that_lead_elsewhere_are_refused() {
    for extended_l2 in [false, true] {
        for (cluster, descriptor) in [
            (1, COPIED | 2 << 16),
            (1, 5 << 16),
            (1, COPIED),
            (0, COPIED | 1 << 16),
            (1, COMPRESSED | 1 << 16),
        ] {
            let scratch = Scratch::new();
            let path = written(&scratch, extended_l2, Data::Plain);
            let bitmap = if extended_l2 { 0xffff_ffff } else { 0 };
            Dissected::patch(&path, |image| image.set_entry(cluster, (descriptor, bitmap)));
            let mut buf = [0; 512];
            let image = open(&path);
            let error = image.read_at(&mut buf, cluster << 16).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{descriptor:#x}: {error}");
            drop(image);
            let before = std::fs::read(data_of(&path)).unwrap();
            let image = open_rw(&path);
            let written = image.write_at(&[1; 512], cluster << 16, WriteFlags::default());
            assert_eq!(written.unwrap_err().kind(), ErrorKind::Corrupt, "{descriptor:#x}");
            image.abandon().unwrap();
            assert!(std::fs::read(data_of(&path)).unwrap() == before, "{descriptor:#x}");
            // So it is in QEMU.
            let at = format!("read {} 512", cluster << 16);
            let args = ["-r", "-f", "qcow2", "-c", &at, text(&path)];
            let output = qemu("qemu-io", &args);
            let printed = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            assert!(printed.contains("Input/output error"), "{descriptor:#x}: {printed}");
        }
    }
}

#[test]
fn a_cluster_without_the_copied_flag_is_written_in_place() {
    let scratch = Scratch::new();
    let path = written(&scratch, false, Data::Plain);
    Dissected::patch(&path, |image| image.set_entry(1, (1 << 16, 0)));
    let image = open_rw(&path);
    image.write_at(&[6; 512], 1 << 16, WriteFlags::default()).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[..2 << 16].fill(5);
    expected[1 << 16..][..512].fill(6);
    crate::assert_content(&image, &expected);
    image.close().unwrap();
}

#[test]
fn zeroes_at_offset_0_have_no_place() {
    let scratch = Scratch::new();
    let path = written(&scratch, false, Data::Plain);
    Dissected::patch(&path, |image| image.set_entry(0, (COPIED | ZERO, 0)));
    let map = our_map(&open(&path));
    assert_eq!(map[0], (0, 65536, false, None));
    assert_eq!(map, crate::map(&path));
}

#[test]
fn compressed_clusters_snapshots_and_vm_state_are_refused() {
    let scratch = Scratch::new();
    let path = written(&scratch, false, Data::Plain);
    let image = open_rw(&path);
    let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
    let refused = image.write_at(&[0; 1 << 16], 4 << 16, flags).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotSupported);
    let refused = image.snapshot_create(b"s", &Default::default()).map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotSupported);
    image.close().unwrap();
    qemu_img_check(&path);
}

#[test]
fn a_data_file_that_is_too_short_reads_as_zero() {
    for data in [Data::Plain, Data::Raw] {
        let scratch = Scratch::new();
        let path = written(&scratch, false, data);
        let file = std::fs::File::options().write(true).open(data_of(&path)).unwrap();
        file.set_len(1000).unwrap();
        let image = open_rw(&path);
        let mut expected = vec![0; 1 << 20];
        expected[..1000].fill(5);
        crate::assert_content(&image, &expected);
        image.write_at(&[6; 512], 3 << 16, WriteFlags::default()).unwrap();
        expected[3 << 16..][..512].fill(6);
        image.close().unwrap();
        assert_sound(&path, data, &expected);
    }
}

#[test]
fn what_is_behind_a_new_place_is_not_shown() {
    // Nobody knows what a data file holds where nothing points to.
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_makes(&path, &case(false), Data::Plain);
    std::fs::write(data_of(&path), vec![0xee; 1 << 20]).unwrap();
    let image = open_rw(&path);
    image.write_at(&[6; 512], (3 << 16) + 1024, WriteFlags::default()).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[(3 << 16) + 1024..][..512].fill(6);
    crate::assert_content(&image, &expected);
    image.close().unwrap();
    assert_sound(&path, Data::Plain, &expected);
}

#[test]
fn a_raw_data_file_keeps_what_cannot_be_given_back() {
    let scratch = Scratch::new();
    let path = written(&scratch, true, Data::Raw);
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    options.discard = false;
    let image = Image::open(Source::path(&path), &options).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[..2 << 16].fill(5);
    Op::Discard { at: 0, len: 65536 }.apply(&image);
    crate::assert_content(&image, &expected);
    Op::Zero { at: 1024, len: 70_000, unmap: true }.apply(&image);
    expected[1024..][..70_000].fill(0);
    image.close().unwrap();
    assert_sound(&path, Data::Raw, &expected);
}

#[test]
fn malformed_headers_are_refused() {
    let scratch = Scratch::new();
    let path = written(&scratch, false, Data::Plain);
    let sound = std::fs::read(&path).unwrap();
    let name = text(&data_of(&path)).as_bytes().to_vec();
    let at = sound.windows(name.len()).position(|bytes| bytes == name).unwrap();
    let refused = |change: &dyn Fn(&mut Dissected)| {
        std::fs::write(&path, &sound).unwrap();
        Dissected::patch(&path, |image| change(image));
        let opened = Image::open(
            Source::path(&path),
            &OpenOptions::new().policy(Policy::Paths).writable(true),
        );
        opened.map(drop).unwrap_err().kind()
    };
    // The extension is there, of length 0; or not there, or longer than the header.
    let empty = refused(&|image| {
        image.put32(at - 4, 0);
        image.put(at, &[0; 8]);
    });
    assert_eq!(empty, ErrorKind::DataFile(libc::EINVAL));
    let unknown = refused(&|image| image.put32(at - 8, 0x1234));
    assert_eq!(unknown, ErrorKind::DataFile(libc::EINVAL));
    assert_eq!(refused(&|image| image.put32(at - 4, 1 << 20)), ErrorKind::BadHeader);
    // Names that are no plain paths.
    for name in [&b"json:{}"[..], b"nbd://host/x"] {
        let kind = refused(&|image| {
            image.put(at, name);
            image.put(at + name.len(), &[0]);
        });
        assert_eq!(kind, ErrorKind::Policy);
    }
    // A directory; a file of another kind.
    let kind = refused(&|image| {
        image.put(at, b"/\0");
    });
    assert_eq!(kind, ErrorKind::DataFile(libc::EISDIR));
    // Raw, without a data file.
    let kind = refused(&|image| {
        image.put64(field::INCOMPATIBLE, 0);
        image.put64(field::AUTOCLEAR, 2);
    });
    assert_eq!(kind, ErrorKind::BadHeader);
}

#[test]
fn lazy_refcounts_are_repaired_and_flags_kept() {
    let scratch = Scratch::new();
    let path = written(&scratch, true, Data::Plain);
    let mut options = OpenOptions::new().policy(Policy::Paths).writable(true);
    options.lazy_refcounts = Some(true);
    let image = Image::open(Source::path(&path), &options).unwrap();
    image.write_at(&[8; 4096], 9 << 16, WriteFlags::default()).unwrap();
    image.flush().unwrap();
    image.abandon().unwrap();
    let image = open_rw(&path);
    let mut expected = vec![0; 1 << 20];
    expected[..2 << 16].fill(5);
    expected[9 << 16..][..4096].fill(8);
    crate::assert_content(&image, &expected);
    image.close().unwrap();
    assert_sound(&path, Data::Plain, &expected);
    for cluster in [0, 1, 9] {
        assert_eq!(Dissected::load(&path).entry(cluster).0, COPIED | cluster << 16);
    }
}
