//! Key slots, changed by either and seen by the other; and what is refused.

use qcow2rs::{AmendOptions, ErrorKind, Image, KeySlots, KeyState, OpenOptions, Source};

use crate::support::{Scratch, read};
use crate::{
    LUKS, PASSPHRASE, make, open_rw, options, pattern, qemu_check, qemu_img, qemu_io_as, secret,
};

fn amend(image: &Image, keys: KeySlots) -> Result<(), ErrorKind> {
    let mut options = AmendOptions::default();
    options.keys = keys;
    image.amend(&options, &mut |_, _| true).map_err(|error| error.kind())
}

fn add(passphrase: &str, slot: Option<u32>) -> KeySlots {
    let mut keys = KeySlots::default();
    keys.state = Some(KeyState::Active);
    (keys.slot, keys.new_secret) = (slot, Some(secret(passphrase)));
    keys.iter_time = Some(0);
    keys
}

fn erase(passphrase: Option<&str>, slot: Option<u32>) -> KeySlots {
    let mut keys = KeySlots::default();
    keys.state = Some(KeyState::Inactive);
    (keys.slot, keys.old_secret) = (slot, passphrase.map(secret));
    keys
}

fn forced(keys: KeySlots) -> KeySlots {
    let mut keys = keys;
    keys.force = true;
    keys
}

fn slots(image: &Image) -> Vec<usize> {
    let luks = image.info().unwrap().qcow2.unwrap().luks.unwrap();
    (0..8).filter(|slot| luks.slots[*slot].active).collect()
}

fn opens(path: &std::path::Path, passphrase: &str) -> bool {
    match Image::open(Source::path(path), &options(passphrase, false)) {
        Ok(image) => {
            assert_eq!(read(&image, 5000, 512), pattern(512));
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Encrypted);
            false
        }
    }
}

#[test]
fn keys_come_and_go_here_and_there() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, &format!("{LUKS},encrypt.hash-alg=sha1"), 1 << 20);
    let image = open_rw(&path);
    image.write_at(&pattern(512), 5000, Default::default()).unwrap();
    amend(&image, add("new", None)).unwrap();
    // All slots, that which lies in two sectors among them.
    amend(&image, add("six", Some(6))).unwrap();
    amend(&image, add("seven", Some(7))).unwrap();
    assert_eq!(slots(&image), [0, 1, 6, 7]);
    image.write_at(&pattern(512), 9000, Default::default()).unwrap();
    image.close().unwrap();
    for passphrase in ["hunter2", "new", "six", "seven"] {
        assert!(opens(&path, passphrase), "{passphrase}");
    }
    assert!(!opens(&path, "eight"));
    qemu_io_as(&path, "n", &["read 0 1M".into()]);
    qemu_check(&path);

    let image = open_rw(&path);
    amend(&image, erase(Some("six"), None)).unwrap();
    amend(&image, erase(None, Some(7))).unwrap();
    amend(&image, erase(Some("hunter2"), Some(0))).unwrap();
    assert_eq!(slots(&image), [1]);
    // It was opened by a key that is gone: data can be read, keys not made.
    assert_eq!(read(&image, 5000, 512), pattern(512));
    assert_eq!(amend(&image, add("more", None)), Err(ErrorKind::Encrypted));
    image.close().unwrap();
    assert!(opens(&path, "new") && !opens(&path, "hunter2") && !opens(&path, "six"));
    qemu_io_as(&path, "n", &["read 0 1M".into()]);
}

#[test]
fn what_qemu_makes_of_key_slots_is_understood() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, LUKS, 1 << 20);
    let image = open_rw(&path);
    image.write_at(&pattern(512), 5000, Default::default()).unwrap();
    image.close().unwrap();
    let active = "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=5,encrypt.iter-time=1";
    assert!(qemu_img(&["amend", "-o", active], &path).status.success());
    assert!(opens(&path, "new") && opens(&path, "hunter2"));
    let inactive = "encrypt.state=inactive,encrypt.keyslot=5";
    assert!(qemu_img(&["amend", "-o", inactive], &path).status.success());
    assert!(!opens(&path, "new") && opens(&path, "hunter2"));
}

#[test]
fn what_qemu_refuses_is_refused() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, LUKS, 1 << 20);
    let image = open_rw(&path);
    image.write_at(&pattern(512), 5000, Default::default()).unwrap();
    // What was reserved is given back.
    assert_eq!(amend(&image, add("new", Some(0))), Err(ErrorKind::InvalidArgument));
    let before = std::fs::read(&path).unwrap();
    let with = |mut keys: KeySlots, change: &dyn Fn(&mut KeySlots)| {
        change(&mut keys);
        keys
    };
    let bad = ErrorKind::InvalidArgument;
    for (what, keys) in [
        ("an active slot", add("new", Some(0))),
        ("no such slot", add("new", Some(8))),
        ("no such slot", erase(None, Some(8))),
        ("no new passphrase", with(add("", None), &|keys| keys.new_secret = None)),
        ("no text", add("a\0b", None)),
        ("an old passphrase", with(add("n", None), &|keys| keys.old_secret = Some(secret("n")))),
        ("no state", with(add("n", None), &|keys| keys.state = None)),
        ("the last key", erase(None, Some(0))),
        ("the last key", erase(Some("hunter2"), None)),
        ("no key", erase(None, Some(3))),
        ("nothing that says which", erase(None, None)),
        ("another passphrase", erase(Some("other"), None)),
        ("a new passphrase", with(erase(None, Some(0)), &|it| it.new_secret = Some(secret("n")))),
        ("a time", with(erase(None, Some(0)), &|keys| keys.iter_time = Some(1))),
    ] {
        assert_eq!(amend(&image, keys), Err(bad), "{what}");
    }
    let mut both = AmendOptions::default();
    both.keys = add("new", None);
    both.lazy_refcounts = Some(true);
    let error = image.amend(&both, &mut |_, _| true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    assert!(std::fs::read(&path).unwrap() == before, "something has changed");

    // All slots but the first.
    for slot in 1..8 {
        amend(&image, add("new", None)).unwrap();
        assert_eq!(slots(&image).len(), slot + 1);
    }
    assert_eq!(amend(&image, add("more", None)), Err(bad), "all slots are in use");
    amend(&image, forced(add("other", Some(3)))).unwrap();
    amend(&image, erase(Some("new"), None)).unwrap();
    assert_eq!(slots(&image), [0, 3]);
    assert_eq!(amend(&image, erase(Some("new"), Some(3))), Err(bad));
    image.close().unwrap();
    assert!(opens(&path, "other"));

    let read_only = Image::open(Source::path(&path), &options("other", false)).unwrap();
    assert_eq!(amend(&read_only, add("new", None)), Err(ErrorKind::ReadOnly));
    read_only.close().unwrap();
    let image = open_rw(&path);
    amend(&image, erase(None, Some(3))).unwrap();
    amend(&image, forced(erase(None, Some(0)))).unwrap();
    image.close().unwrap();
    assert!(!opens(&path, "hunter2") && !opens(&path, "other"), "nobody reads it again");

    make(&path, crate::AES, 1 << 20);
    assert_eq!(amend(&open_rw(&path), add("new", None)), Err(ErrorKind::NotSupported));
    let plain = scratch.path("plain");
    crate::support::qemu_create(&plain, "", 1 << 20);
    let image = Image::open(Source::path(&plain), &OpenOptions::new().writable(true)).unwrap();
    assert_eq!(amend(&image, add("new", None)), Err(ErrorKind::NotSupported));
}

#[test]
fn who_has_an_image_open_needs_no_new_passphrase() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    make(&path, LUKS, 1 << 20);
    let image = open_rw(&path);
    image.write_at(&pattern(512), 5000, Default::default()).unwrap();
    amend(&image, add("new", None)).unwrap();
    amend(&image, erase(Some(PASSPHRASE), None)).unwrap();
    image.reopen(false, true).unwrap();
    assert_eq!(read(&image, 5000, 512), pattern(512));
    image.reopen(true, true).unwrap();
    image.write_at(&pattern(512), 9000, Default::default()).unwrap();
    image.close().unwrap();
    assert!(opens(&path, "new") && !opens(&path, PASSPHRASE));
}
