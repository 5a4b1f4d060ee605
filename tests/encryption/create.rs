//! New images: what can be made, and where everything lies.

use qcow2rs::{
    CreateOptions, EncryptionFormat, EncryptionOptions, ErrorKind, OpenOptions, Preallocation,
    ResizeOptions, Secret,
};

use crate::support::{Scratch, qemu, qemu_ok, read, text};
use crate::{
    AES, LUKS, create_options, make, open, open_rw, qemu_check, qemu_content, secret, secrets,
};

fn refusal(options: &CreateOptions) -> ErrorKind {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let made = qcow2rs::create_path(&path, true, options, &OpenOptions::new());
    assert!(made.is_err() != path.exists(), "what is refused leaves nothing");
    made.expect_err("it is refused").kind()
}

#[test]
fn what_qemu_refuses_is_refused() {
    let (no, bad) = (ErrorKind::NotSupported, ErrorKind::InvalidArgument);
    for (options, kind) in [
        ("encrypt.cipher-alg=aes-192,encrypt.cipher-mode=cbc", no),
        ("encrypt.cipher-alg=cast5-128", no),
        ("encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv", no),
        ("encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1", no),
        ("encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha512", no),
        ("encrypt.format=aes,encrypt.cipher-alg=aes-128", bad),
        ("encrypt.format=aes,encrypt.iter-time=10", bad),
        ("encrypt.iter-time=9000000000000000000", bad),
        ("compat=0.10,preallocation=metadata", no),
    ] {
        assert_eq!(refusal(&create_options(options, 1 << 20)), kind, "{options}");
    }
    let mut options = CreateOptions::default();
    options.size = Some(1 << 20);
    options.set("encrypt.cipher-alg", "aes-128").unwrap();
    assert_eq!(refusal(&options), bad, "no format");
    options.set("encrypt.format", "luks").unwrap();
    assert_eq!(refusal(&options), ErrorKind::Encrypted, "no passphrase");
    for bytes in [&b"\xff"[..], b"a\0b"] {
        let secret = Secret::new(bytes).unwrap();
        options.encryption = EncryptionOptions::new(EncryptionFormat::Luks, secret);
        assert_eq!(refusal(&options), bad, "QEMU cannot be told {bytes:?}");
    }
}

#[test]
fn the_luks_header_is_counted_and_never_written_over() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for options in ["", "cluster_size=512", "compat=0.10", "cluster_size=2M,refcount_bits=1"] {
        make(&path, &format!("{LUKS},{options}"), 8 << 20);
        qemu_check(&path);
        let mut changed = Default::default();
        let image = open_rw(&path);
        image.write_at(&[7; 100_000], 12_345, changed).unwrap();
        changed.fua = true;
        image.write_at(&[8; 512], 5 << 20, changed).unwrap();
        image.close().unwrap();
        qemu_check(&path);
        let disk = qemu_content(&path);
        assert!(disk[12_345..112_345].iter().all(|byte| *byte == 7) && disk[5 << 20] == 8);
    }
    // An entry that leads there.
    make(&path, &format!("{LUKS},cluster_size=4k"), 1 << 20);
    let image = open_rw(&path);
    image.write_at(&[7; 4096], 0, Default::default()).unwrap();
    image.close().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let luks = bytes.chunks(4096).position(|cluster| cluster.starts_with(b"LUKS\xba\xbe"));
    let luks = luks.unwrap() as u64 * 4096;
    crate::support::dissect::Dissected::patch(&path, |image| {
        let entry = image.entry_at(0).unwrap();
        image.put64(entry, 1 << 63 | (luks + 4096));
    });
    let image = open_rw(&path);
    let error = image.write_at(&[7; 4096], 0, Default::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    drop(image);
    assert!(
        std::fs::read(&path).unwrap()[luks as usize..][..8192] == bytes[luks as usize..][..8192]
    );
    open(&path);
}

#[test]
fn preallocated_clusters_read_as_zero() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for format in [LUKS, AES] {
        for mode in ["metadata", "falloc", "full"] {
            for layout in ["cluster_size=4k", "cluster_size=64k,extended_l2=on"] {
                make(&path, &format!("{format},{layout},preallocation={mode}"), 1 << 20);
                assert!(qemu_content(&path).iter().all(|byte| *byte == 0), "{mode} {layout}");
                let image = open_rw(&path);
                image.write_at(&[9; 700], 5000, Default::default()).unwrap();
                let preallocation = Preallocation::from_name(mode).unwrap();
                let grow = ResizeOptions { preallocation, shrink: false };
                image.resize(2 << 20, &grow, &mut |_, _| true).unwrap();
                image.write_at(&[9; 700], (1 << 20) + 5000, Default::default()).unwrap();
                let mut expected = vec![0; 2 << 20];
                expected[5000..5700].fill(9);
                expected[(1 << 20) + 5000..][..700].fill(9);
                assert!(read(&image, 0, 2 << 20) == expected, "{mode} {layout}");
                image.close().unwrap();
                assert!(qemu_content(&path) == expected, "QEMU, {mode} {layout}");
                qemu_check(&path);
            }
        }
    }
}

#[test]
fn measures_as_qemu_does() {
    let cast5 = "encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,refcount_bits=64";
    // QEMU takes two seconds for each with LUKS, whatever its options say.
    for (options, sizes) in [
        (AES.to_owned(), &[0u64, 1 << 20, 1 << 30][..]),
        (LUKS.to_owned(), &[1 << 30]),
        (format!("{LUKS},cluster_size=512,{cast5}"), &[1 << 20]),
        (format!("{LUKS},preallocation=full,cluster_size=2M"), &[1 << 20]),
    ] {
        for size in sizes.iter().copied() {
            let ours = qcow2rs::measure(&create_options(&options, size)).unwrap();
            let secrets = secrets();
            let (list, number) = (format!("{options},encrypt.key-secret=s"), size.to_string());
            let mut args = vec!["measure", "--output=json", "-O", "qcow2", "-o", &list];
            args.extend(secrets.iter().map(String::as_str));
            args.extend(["--size", &number]);
            let theirs: serde_json::Value =
                serde_json::from_str(&qemu_ok("qemu-img", &args)).unwrap();
            let theirs = ["required", "fully-allocated"].map(|name| theirs[name].as_u64().unwrap());
            assert_eq!([ours.0, ours.1], theirs, "{options} {size}");
        }
    }
}

#[test]
fn a_new_image_is_returned_open_by_its_passphrase() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let options = create_options(LUKS, 1 << 20);
    let image = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new()).unwrap();
    image.write_at(&crate::pattern(512), 0, Default::default()).unwrap();
    image.flush().unwrap();
    // The passphrase is still known.
    image.reopen(false, true).unwrap();
    assert_eq!(read(&image, 0, 512), crate::pattern(512));
    image.close().unwrap();
    crate::assert_no_plain_text(&path);
    let wrong = OpenOptions::new().secret(secret("wrong"));
    let made = qcow2rs::create_path_open(&path, false, &options, &wrong);
    assert_eq!(made.err().unwrap().kind(), ErrorKind::Encrypted, "its own options' passphrase");
    // QEMU says so, too.
    assert!(!qemu("qemu-io", &["-c", "read 0 1", text(&path)]).status.success());
}
