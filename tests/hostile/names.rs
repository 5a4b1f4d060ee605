//! Names of other files in a header: nothing that an image names is opened, or
//! even looked at, unless the caller says so.

use std::path::Path;

use qcow2rs::ErrorKind::{self, *};
use qcow2rs::{Format, Image, OpenOptions, Policy, Source};
use rustix::fs::inotify;

use crate::images::{Broker, Kind, base, image, open, verdicts};
use crate::support::Scratch;
use crate::support::dissect::{Dissected, field};
use crate::support::memory_disk::MemoryDisk;

/// An image that names this file; the name lies behind all extensions.
fn naming(name: &[u8], format: Option<&[u8]>) -> Dissected {
    const AT: usize = 1024;
    let mut image = image(Kind::WideRefcounts);
    let fields = image.u32(field::HEADER_LENGTH) as usize;
    image.put(fields, &[0; 8]);
    if let Some(format) = format {
        image.put32(fields, 0xe279_2aca);
        image.put32(fields + 4, format.len() as u32);
        image.put(fields + 8, format);
        image.put(fields + 8 + format.len().next_multiple_of(8), &[0; 8]);
    }
    image.put64(field::BACKING_OFFSET, AT as u64);
    image.put32(field::BACKING_LENGTH, name.len() as u32);
    image.put(AT, name);
    image
}

/// Names that some program has taken for more than a name.
const NAMES: [&str; 14] = [
    "secret",
    "./secret",
    "../secret",
    "file:secret",
    "file:///etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "json:{\"driver\":\"file\",\"filename\":\"secret\"}",
    "json:{\"driver\":\"quorum\",\"children\":[]}",
    "nbd://localhost:10809/x",
    "nbd:unix:/run/socket",
    "fat:rw:.",
    "http://localhost/x",
];

#[test]
fn no_name_opens_a_file_unless_the_caller_says_so() {
    let scratch = Scratch::new();
    for name in NAMES {
        // A file of just this name, where one can be made.
        if !name.contains('/') {
            std::fs::write(scratch.path(name), base()).unwrap();
        }
    }
    let directory = scratch.path("");
    for name in NAMES {
        for format in [None, Some(&b"raw"[..]), Some(b"qcow2"), Some(b"vmdk")] {
            let spoiled = naming(name.as_bytes(), format);
            let path = scratch.path("image");
            std::fs::write(&path, &spoiled.bytes).unwrap();
            for writable in [false, true] {
                let options = OpenOptions::new().writable(writable);
                let (error, opened) = opens_in(&directory, || {
                    Image::open(Source::path(&path), &options).err().expect("it is denied")
                });
                assert_eq!(error.kind(), Policy, "{name}");
                assert_eq!(opened, ["image"], "{name}");
            }
        }
    }
}

/// The names of the files in a directory that were opened meanwhile.
fn opens_in<R>(directory: &Path, work: impl FnOnce() -> R) -> (R, Vec<String>) {
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watch, directory, inotify::WatchFlags::OPEN).unwrap();
    let result = work();
    let mut room = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut room);
    let mut opened = Vec::new();
    while let Ok(event) = events.next() {
        // The directory itself has no name.
        if let Some(name) = event.file_name() {
            opened.push(name.to_string_lossy().into_owned());
        }
    }
    opened.dedup();
    (result, opened)
}

#[test]
fn files_are_opened_where_paths_are_allowed_and_then_seen() {
    // The proof that the test above sees what is opened.
    let scratch = Scratch::new();
    std::fs::write(scratch.path("secret"), base()).unwrap();
    let path = scratch.path("image");
    std::fs::write(&path, &naming(b"secret", Some(b"raw")).bytes).unwrap();
    let options = OpenOptions::new().policy(Policy::Paths);
    let (image, opened) =
        opens_in(&scratch.path(""), || Image::open(Source::path(&path), &options).unwrap());
    assert_eq!(opened, ["image", "secret"]);
    image.close().unwrap();
}

#[test]
fn protocols_are_refused_even_where_paths_are_allowed() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for name in NAMES.iter().filter(|name| name.contains(':')) {
        std::fs::write(&path, &naming(name.as_bytes(), Some(b"raw")).bytes).unwrap();
        let options = OpenOptions::new().policy(Policy::Paths);
        let (error, opened) = opens_in(&scratch.path(""), || {
            Image::open(Source::path(&path), &options).err().unwrap()
        });
        assert_eq!(error.kind(), Policy, "{name}");
        assert_eq!(opened, ["image"], "{name}");
    }
}

#[test]
fn things_that_are_no_disks_are_not_waited_for() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let fifo = scratch.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    for name in ["fifo", "/dev/zero", "/dev/tty", "/proc/self/fd"] {
        std::fs::write(&path, &naming(name.as_bytes(), Some(b"raw")).bytes).unwrap();
        let options = OpenOptions::new().policy(Policy::Paths);
        let error = Image::open(Source::path(&path), &options).err().expect(name);
        assert!(matches!(error.kind(), Backing(_)), "{name}: {error:?}");
    }
}

#[test]
fn a_resolver_gets_every_name_as_it_is_stored_and_nothing_else_happens() {
    for name in NAMES {
        let broker = Broker::new();
        let options = OpenOptions::new().policy(Policy::Resolve(broker.clone()));
        let disk = MemoryDisk::new(&naming(name.as_bytes(), Some(b"raw")).bytes);
        open(&disk, &options).unwrap().close().unwrap();
        let asked = broker.asked.lock().unwrap();
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].name, name.as_bytes());
        assert_eq!(asked[0].format.as_deref(), Some(&b"raw"[..]));
    }
}

#[test]
fn names_in_impossible_places() {
    type Case = (&'static str, fn(&mut Dissected), [Option<ErrorKind>; 2]);
    let cases: [Case; 7] = [
        ("past the first cluster", |i| i.put64(field::BACKING_OFFSET, 4097), [Some(BadHeader); 2]),
        ("at 2^64", |i| i.put64(field::BACKING_OFFSET, u64::MAX), [Some(BadHeader); 2]),
        ("of 1024 bytes", |i| i.put32(field::BACKING_LENGTH, 1024), [Some(BadHeader); 2]),
        ("of 4 GiB", |i| i.put32(field::BACKING_LENGTH, u32::MAX), [Some(BadHeader); 2]),
        (
            "past the end of the first cluster",
            |i| {
                i.put64(field::BACKING_OFFSET, 4090);
                i.put32(field::BACKING_LENGTH, 7);
            },
            [Some(BadHeader); 2],
        ),
        // The header's own fields, which begin with a NUL: no name.
        ("in the fields", |i| i.put64(field::BACKING_OFFSET, 4), [None; 2]),
        ("of no bytes", |i| i.put32(field::BACKING_LENGTH, 0), [None; 2]),
    ];
    for (what, spoil, expected) in cases {
        let mut spoiled = naming(b"secret", Some(b"raw"));
        spoil(&mut spoiled);
        assert_eq!(verdicts(&spoiled), expected, "a name {what}");
    }
}

#[test]
fn a_name_ends_at_its_first_nul_for_everybody() {
    let broker = Broker::new();
    let options = OpenOptions::new().policy(Policy::Resolve(broker.clone()));
    let disk = MemoryDisk::new(&naming(b"good\0/etc/shadow", Some(b"raw\0qcow2")).bytes);
    let image = open(&disk, &options).unwrap();
    let stored = image.reference(qcow2rs::ReferenceKind::Backing).unwrap();
    let asked = broker.asked.lock().unwrap();
    for (name, format) in [(&stored.name, &stored.format), (&asked[0].name, &asked[0].format)] {
        assert_eq!(name, b"good");
        assert_eq!(format.as_deref(), Some(&b"raw"[..]));
    }
}

#[test]
fn names_cannot_forge_messages() {
    let name = b"x\n\x1b[2Jeverything is fine\r";
    let disk = MemoryDisk::new(&naming(name, Some(b"raw")).bytes);
    let error = open(&disk, &OpenOptions::new()).err().unwrap();
    assert_eq!(error.kind(), Policy);
    assert!(!error.message().contains(|c: char| c.is_control()), "{:?}", error.message());
}

#[test]
fn a_raw_backing_file_is_never_looked_into() {
    // A guest has written itself a header that names a file of the host.
    let evil = naming(b"/etc/passwd", Some(b"raw")).bytes;
    let scratch = Scratch::new();
    std::fs::write(scratch.path("guest.raw"), &evil).unwrap();
    let path = scratch.path("image");
    let mut top = naming(b"guest.raw", Some(b"raw"));
    let last = top.guest_clusters() - 1;
    top.set_entry(0, (0, 0));
    std::fs::write(&path, &top.bytes).unwrap();
    let options = OpenOptions::new().policy(Policy::Paths);
    let image = Image::open(Source::path(&path), &options).unwrap();
    assert_eq!(image.info().unwrap().chain_depth, 1);
    let mut start = [0; 64];
    image.read_at(&mut start, 0).unwrap();
    assert_eq!(start, evil[..64], "the bytes of the file, and not what they stand for");
    image.read_at(&mut start, last * 4096).unwrap();
    image.close().unwrap();
    // Without a format in the header there is nothing to go by.
    std::fs::write(&path, &naming(b"guest.raw", None).bytes).unwrap();
    let error = Image::open(Source::path(&path), &options).err().unwrap();
    assert!(matches!(error.kind(), Backing(_)));
    // And as the disk itself it is not written to by accident.
    let raw = OpenOptions::new().format(Format::Raw).writable(true);
    let error = Image::open(Source::path(scratch.path("guest.raw")), &raw).err().unwrap();
    assert_eq!(error.kind(), InvalidArgument);
}

#[test]
fn an_image_below_itself_is_a_loop() {
    let scratch = Scratch::new();
    for (a, b) in [("a", "a"), ("a", "b")] {
        for (path, below) in [(a, b), (b, a)] {
            let bytes = naming(below.as_bytes(), Some(b"qcow2")).bytes;
            std::fs::write(scratch.path(path), bytes).unwrap();
        }
        let options = OpenOptions::new().policy(Policy::Paths);
        let error = Image::open(Source::path(scratch.path(a)), &options).err().unwrap();
        assert_eq!(error.kind(), ChainDepth);
    }
    // So is one whose resolver plays along.
    struct Same(MemoryDisk);
    impl qcow2rs::Resolver for Same {
        fn resolve(
            &self,
            _: &qcow2rs::Reference,
            format: Option<Format>,
        ) -> qcow2rs::Result<(std::sync::Arc<Source>, Option<Format>)> {
            Ok((self.0.source(), format))
        }
    }
    let disk = MemoryDisk::new(&naming(b"again", Some(b"qcow2")).bytes);
    let same = std::sync::Arc::new(Same(disk.clone()));
    let options = OpenOptions::new().policy(Policy::Resolve(same));
    let error = Image::open(disk.source(), &options).err().unwrap();
    assert_eq!(error.kind(), ChainDepth);
}
