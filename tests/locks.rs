//! Locks against QEMU's, in both directions. Needs qemu-img and qemu-io.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use qcow2rs::error::ErrorKind;
use qcow2rs::io::storage::{Access, Source, Storage};
use tempfile::TempDir;

const NEEDED: &str = "qemu-img and qemu-io are needed: install qemu-utils";

fn access(writable: bool) -> Access {
    Access { writable, lock: true, ..Access::default() }
}

struct Image {
    _dir: TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Image {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        let output = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&path)
            .arg("1M")
            .output()
            .expect(NEEDED);
        assert!(output.status.success(), "{output:?}");
        Image { _dir: dir, path }
    }

    fn open(&self, writable: bool) -> qcow2rs::error::Result<Storage> {
        Storage::open(Source::path(&self.path), access(writable))
    }

    /// Runs one command in qemu-io, which opens the image first.
    fn qemu_io(&self, options: &[&str], command: &str) -> Output {
        Command::new("qemu-io")
            .args(options)
            .args(["-f", "qcow2", "-c", command])
            .arg(&self.path)
            .output()
            .expect(NEEDED)
    }

    fn assert_qemu(&self, may_read: bool, may_write: bool) {
        for (options, may) in [(&["-r"][..], may_read), (&[][..], may_write)] {
            let output = self.qemu_io(options, "read -q 0 4k");
            assert_eq!(output.status.success(), may, "qemu-io {options:?}: {output:?}");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(may || text.contains("lock"), "{text}");
        }
        // Sharing by force is always possible, and writes nothing.
        assert!(self.qemu_io(&["-r", "-U"], "read -q 0 4k").status.success());
    }

    fn assert_ours(&self, may_read: bool, may_write: bool) {
        for (writable, may) in [(false, may_read), (true, may_write)] {
            match self.open(writable) {
                Ok(_) => assert!(may, "writable: {writable}"),
                Err(error) => {
                    assert!(!may, "writable: {writable}: {error}");
                    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
                    assert!(error.message().contains("image.qcow2"), "{error}");
                    assert!(error.message().contains("lock"), "{error}");
                }
            }
        }
    }
}

/// A qemu-io that has the image open until it is dropped.
struct Qemu(Child);

impl Qemu {
    fn hold(path: &Path, options: &[&str]) -> Qemu {
        let mut child = Command::new("qemu-io")
            .args(options)
            .args(["-f", "qcow2"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect(NEEDED);
        // An answer means that it is open.
        let input = child.stdin.as_mut().unwrap();
        input.write_all(b"length\n").unwrap();
        input.flush().unwrap();
        let output = child.stdout.as_mut().unwrap();
        let mut text = Vec::new();
        let mut byte = [0];
        while !text.ends_with(b"MiB") {
            assert_eq!(output.read(&mut byte).unwrap(), 1, "qemu-io ended early");
            text.push(byte[0]);
        }
        Qemu(child)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn qemu_heeds_our_locks() {
    let image = Image::new();
    image.assert_qemu(true, true);
    let reader = image.open(false).unwrap();
    image.assert_qemu(true, false);
    let change = |from: &Storage, access| {
        let new = from.change_access(access).unwrap();
        new.settle_lock().unwrap();
        new
    };
    let writer = change(&reader, access(true));
    image.assert_qemu(false, false);
    drop(reader);
    image.assert_qemu(false, false);
    let reader = change(&writer, access(false));
    drop(writer);
    image.assert_qemu(true, false);
    drop(reader);
    image.assert_qemu(true, true);
    let _unlocked = change(&image.open(false).unwrap(), Access::default());
    image.assert_qemu(true, true);
}

#[test]
fn we_heed_qemus_locks() {
    let image = Image::new();
    for (options, may_read) in [(&[][..], false), (&["-r"][..], true)] {
        let qemu = Qemu::hold(&image.path, options);
        image.assert_ours(may_read, false);
        assert!(Storage::open(Source::path(&image.path), Access::default()).is_ok());
        drop(qemu);
        image.assert_ours(true, true);
    }
    let _shared = Qemu::hold(&image.path, &["-r", "-U"]);
    image.assert_ours(true, true);
}

#[test]
fn an_upgrade_fails_while_qemu_reads() {
    let image = Image::new();
    let reader = image.open(false).unwrap();
    let qemu = Qemu::hold(&image.path, &["-r"]);
    let error = reader.change_access(access(true)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    image.assert_qemu(true, false);
    drop(qemu);
    image.assert_qemu(true, false);
    assert!(reader.change_access(access(true)).is_ok());
}

#[test]
fn locks_through_descriptors_end_with_the_storage() {
    let image = Image::new();
    let file = File::options().read(true).write(true).open(&image.path).unwrap();
    let source = Source::fd(file.as_fd()).unwrap();
    let writer = Storage::open(source.clone(), access(true)).unwrap();
    image.assert_qemu(false, false);
    drop(writer);
    image.assert_qemu(true, true);
    let readers = [false, false].map(|writable| Storage::open(source.clone(), access(writable)));
    let [first, second] = readers.map(Result::unwrap);
    image.assert_qemu(true, false);
    drop(first);
    image.assert_qemu(true, false);
    drop(second);
    image.assert_qemu(true, true);
}

#[test]
fn qemus_image_is_not_emptied() {
    let image = Image::new();
    let length = image.path.metadata().unwrap().len();
    let qemu = Qemu::hold(&image.path, &[]);
    let error = Storage::create(&image.path, false, access(true)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    drop(qemu);
    assert_eq!(image.path.metadata().unwrap().len(), length);
    image.assert_qemu(true, true);
}
