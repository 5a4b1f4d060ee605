//! Which files a chain is made of: what the stored names stand for, and who decides.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use qcow2rs::{Error, ErrorKind, Format, OpenOptions, Policy, Reference, Resolver, Result, Source};

use super::support::dissect::{Dissected, field};
use super::support::{
    Scratch, assert_content, assert_same, describe, open, qemu_create, qemu_io, qemu_ok, read, text,
};
use super::{KIB, overlay, paths, refusal, try_open};

#[test]
fn names_are_relative_to_the_image_that_stores_them() {
    let scratch = Scratch::new();
    for dir in ["a", "a/b", "c d"] {
        std::fs::create_dir(scratch.path(dir)).unwrap();
    }
    let raw = |name: &str, byte| std::fs::write(scratch.path(name), vec![byte; 4096]).unwrap();
    raw("base", 1);
    raw("a/base", 2);
    raw("a/b/base", 3);
    raw("c d/base", 4);
    raw("a/with:colon", 5);
    let make =
        |name: &str, below: &str, format| overlay(&scratch.path(name), below, format, "", 4096);
    make("a/same", "base", "raw");
    make("a/down", "b/base", "raw");
    make("a/up", "../base", "raw");
    make("a/blank", "../c d/base", "raw");
    make("a/colon", "./with:colon", "raw");
    make("a/absolute", text(&scratch.path("c d/base")), "raw");
    make("a/b/two", "../up", "qcow2");
    std::os::unix::fs::symlink("a/same", scratch.path("link")).unwrap();
    // From here to the root and back.
    let here = std::env::current_dir().unwrap();
    let mut relative: PathBuf = here.components().skip(1).map(|_| "..").collect();
    relative.push(scratch.path("a/up").strip_prefix("/").unwrap());
    for (image, byte) in [
        (scratch.path("a/same"), 2),
        (scratch.path("a/down"), 3),
        (scratch.path("a/up"), 1),
        (scratch.path("a/blank"), 4),
        (scratch.path("a/colon"), 5),
        (scratch.path("a/absolute"), 4),
        (scratch.path("a/b/two"), 1),
        (scratch.path("a/b/../b/../up"), 1),
        // A link has the directory that it lies in.
        (scratch.path("link"), 1),
        (relative, 1),
    ] {
        describe(image.display().to_string(), || {
            assert_content(&open(&image), &[byte; 4096]);
            qemu_io(&image, &[format!("read -P {byte} 0 4k")]);
        });
    }
}

#[test]
fn nothing_that_an_image_names_is_opened_by_default() {
    let scratch = Scratch::new();
    let top = scratch.path("top");
    std::fs::write(scratch.path("base"), vec![7; 4096]).unwrap();
    overlay(&top, "base", "raw", "", 4096);
    let error = refusal(&top, &OpenOptions::new());
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Policy, libc::EPERM));
    // It makes no difference whether the file exists.
    std::fs::remove_file(scratch.path("base")).unwrap();
    assert_eq!(refusal(&top, &OpenOptions::new()).kind(), ErrorKind::Policy);
    assert_eq!(refusal(&top, &paths()).kind(), ErrorKind::Backing(libc::ENOENT));
    // Without the chain it can be looked at, but not written to.
    let mut alone = OpenOptions::new();
    alone.no_backing = true;
    let image = try_open(&top, &alone).unwrap();
    assert_same(&read(&image, 0, 4096), &[0; 4096]);
    image.close().unwrap();
    assert_eq!(refusal(&top, &alone.writable(true)).kind(), ErrorKind::InvalidArgument);
}

#[test]
fn formats_are_taken_from_the_image_never_from_the_file() {
    let scratch = Scratch::new();
    let top = scratch.path("top");
    // A raw file that looks like an image is a raw file.
    qemu_create(&scratch.path("base"), "", 64 * KIB);
    overlay(&top, "base", "raw", "", 64 * KIB);
    let bytes = std::fs::read(scratch.path("base")).unwrap();
    assert_same(&read(&open(&top), 0, 64 * KIB), &bytes[..64 << 10]);
    // What the caller says is for images that say nothing.
    qemu_ok("qemu-img", &["create", "-q", "-f", "qcow2", text(&top), "64k"]);
    let mut told = paths();
    told.set("backing-format", "qcow2").unwrap();
    Dissected::patch(&top, |image| {
        let at = image.cluster_size() - 4;
        image.put64(field::BACKING_OFFSET, at);
        image.put32(field::BACKING_LENGTH, 4);
        image.put(at as usize, b"base");
    });
    assert_eq!(refusal(&top, &paths()).kind(), ErrorKind::Backing(libc::EINVAL));
    assert_content(&try_open(&top, &told).unwrap(), &[0; 64 << 10]);
    overlay(&top, "base", "raw", "", 64 * KIB);
    assert_same(&read(&try_open(&top, &told).unwrap(), 0, 4), b"QFI\xfb");
    Dissected::patch(&top, |image| {
        let at = image.bytes.windows(7).position(|bytes| bytes == b"\0\0\0\x03raw").unwrap();
        image.put(at + 4, b"nbd");
    });
    assert_eq!(refusal(&top, &told).kind(), ErrorKind::Backing(libc::EINVAL));
}

/// Answers from a list, and remembers what it was asked.
struct Answers {
    known: Vec<(&'static str, PathBuf, Option<Format>)>,
    asked: Mutex<Vec<Reference>>,
}

impl Resolver for Answers {
    fn resolve(
        &self,
        reference: &Reference,
        format: Option<Format>,
    ) -> Result<(Arc<Source>, Option<Format>)> {
        self.asked.lock().unwrap().push(reference.clone());
        let known = self.known.iter().find(|(name, ..)| name.as_bytes() == reference.name);
        let (_, path, said) = known.ok_or_else(|| Error::new(ErrorKind::Policy, "not this one"))?;
        Ok((Source::path(path), said.or(format)))
    }
}

#[test]
fn a_resolver_decides_what_a_name_stands_for() {
    let scratch = Scratch::new();
    let (top, middle) = (scratch.path("top"), scratch.path("elsewhere"));
    std::fs::write(scratch.path("data"), vec![7; 4096]).unwrap();
    let create = |image: &Path, below: &str, format: &str| {
        let args = ["create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", format];
        qemu_ok("qemu-img", &[&args[..], &[text(image), "4k"]].concat());
    };
    create(&top, "nbd://host/export", "qcow2");
    create(&middle, "vault:7", "vmdk");
    let open_with = |known| {
        let answers = Arc::new(Answers { known, asked: Mutex::default() });
        let options = OpenOptions::new().policy(Policy::Resolve(answers.clone()));
        (try_open(&top, &options), answers)
    };
    let all = vec![
        ("nbd://host/export", middle.clone(), None),
        ("vault:7", scratch.path("data"), Some(Format::Raw)),
    ];
    let (image, answers) = open_with(all.clone());
    assert_content(&image.unwrap(), &[7; 4096]);
    let asked = answers.asked.lock().unwrap();
    let summary: Vec<_> = asked
        .iter()
        .map(|it| (it.depth, it.name.as_slice(), it.format.as_deref().unwrap(), it.writable))
        .collect();
    let first = (0, &b"nbd://host/export"[..], &b"qcow2"[..], false);
    assert_eq!(summary, [first, (1, b"vault:7", b"vmdk", false)]);
    assert_eq!(asked[1].referrer, text(&middle));
    // A refusal at any depth is one; so is a format that nobody knows, and a loop.
    let (refused, _) = open_with(all[..1].to_vec());
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::Policy);
    let (refused, _) = open_with(vec![all[0].clone(), ("vault:7", scratch.path("data"), None)]);
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::Backing(libc::EINVAL));
    let (refused, _) = open_with(vec![("nbd://host/export", top.clone(), None)]);
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::ChainDepth);
}
