//! Writes the seeds, fuzz/corpus: small images of all kinds, by the builder of the
//! tests and by qemu-img, whole and in parts, and some random requests.

use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2rs::format::header::Header;
use qcow2rs_fuzz::images::{IMAGES, KINDS};
use qcow2rs_fuzz::support::dissect::{Dissected, OFFSET, field};

/// Images that only QEMU makes: options for `qemu-img create`, and what follows.
const QEMUS: [(&str, &str, &[&str]); 4] = [
    ("qemu-standard", "cluster_size=512", &["write -P 7 3k 5k", "write -z 1k 1k"]),
    ("qemu-version2", "cluster_size=512,compat=0.10", &["write -P 7 3k 5k"]),
    ("qemu-lazy", "cluster_size=1k,lazy_refcounts=on", &["write -P 7 3k 5k"]),
    ("qemu-compressed", "cluster_size=512,refcount_bits=8", &["write -c -P 7 512 512"]),
];

fn run(tool: &str, args: &[&str]) {
    let status = Command::new(tool).args(args).stdout(std::process::Stdio::null()).status();
    assert!(status.expect("QEMU's tools are installed").success(), "{tool} {args:?}");
}

fn of_qemu(directory: &Path, options: &str, commands: &[&str]) -> Vec<u8> {
    let path = directory.join("image");
    let path = path.to_str().expect("a path in UTF-8");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, path, "64k"]);
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let args: Vec<&str> = ["-f", "qcow2", path].into_iter().chain(commands).collect();
    run("qemu-io", &args);
    if !options.contains("0.10") {
        run("qemu-img", &["bitmap", "--add", "--disable", path, "b"]);
        run("qemu-img", &["bitmap", "--add", "-g", "512", path, "c"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 3k 1k", path]);
    }
    run("qemu-img", &["snapshot", "-c", "one", path]);
    std::fs::read(path).expect("QEMU has made it")
}

/// The LUKS headers of some images, with few iterations so that slots are tried.
fn put_luks(directory: &Path) {
    for (name, options) in [
        ("default", ""),
        ("essiv", ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.cipher-alg=aes-128"),
        ("cast5", ",encrypt.cipher-mode=ctr,encrypt.cipher-alg=cast5-128,encrypt.hash-alg=sha1"),
        ("serpent", ",encrypt.cipher-alg=serpent-192,encrypt.hash-alg=ripemd160"),
    ] {
        let path = directory.join("luks");
        let path = path.to_str().expect("a path in UTF-8");
        let options =
            format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1{options}");
        let secret = ["--object", "secret,id=s,data=passphrase"];
        let create = ["create", "-q", "-f", "qcow2", "-o", &options, path, "64k"];
        run("qemu-img", &[&create[..1], &secret, &create[1..]].concat());
        let bytes = std::fs::read(path).expect("QEMU has made it");
        let at = bytes.chunks(512).position(|sector| sector.starts_with(b"LUKS\xba\xbe"));
        let mut header = bytes[at.expect("a LUKS header") * 512..][..592].to_vec();
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus/luks");
        std::fs::create_dir_all(&directory).expect("a directory for seeds");
        std::fs::write(directory.join(name), &header).expect("a seed");
        for iterations in [164, 208 + 4] {
            header[iterations..iterations + 4].copy_from_slice(&[0, 0, 0, 1]);
        }
        std::fs::write(directory.join(format!("{name}-quick")), &header).expect("a seed");
    }
}

fn put(target: &str, name: &str, bytes: &[u8], last: u8) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&directory).expect("a directory for seeds");
    let bytes = [bytes, &[last]].concat();
    std::fs::write(directory.join(name), bytes).expect("a seed");
}

/// Parts of an image that have a parser of their own.
fn put_parts(name: &str, image: &Dissected) {
    let first = image.cluster_size().min(1024) as usize;
    put("parsers", &format!("header-{name}"), &image.bytes[..first], 0);
    let (snapshots, end) = image.snapshots();
    if !snapshots.is_empty() {
        let start = image.u64(field::SNAPSHOTS_OFFSET);
        let table = &image.bytes[start as usize..end as usize];
        put("parsers", &format!("snapshots-{name}"), table, 1);
    }
    if let Ok(header) = Header::parse(&image.bytes) {
        if let Some(place) = header.extensions.bitmaps {
            let start = place.directory_offset as usize;
            let directory = &image.bytes[start..start + place.directory_size as usize];
            put("parsers", &format!("bitmaps-{name}"), directory, 2);
        }
    }
    if let Some(table) = (0..image.l1_size()).map(|i| image.l1(i) & OFFSET).find(|at| *at != 0) {
        let entries = &image.bytes[table as usize..][..256];
        put("parsers", &format!("entries-{name}"), entries, 3);
    }
}

fn main() {
    let scratch = std::env::temp_dir().join(format!("qcow2rs-seeds-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a directory for images");
    let ours = KINDS.iter().zip(IMAGES.iter()).map(|((name, _), image)| (*name, image.clone()));
    let qemus = QEMUS.map(|(name, options, commands)| (name, of_qemu(&scratch, options, commands)));
    for (name, image) in ours.chain(qemus) {
        // Large ones would make every input large: headers serve in their place.
        if image.len() <= 100 << 10 {
            put("open", name, &image, 0);
            put("check", name, &image, 0);
        }
        put_parts(name, &Dissected::of(image));
    }
    let mut state: u64 = 1;
    for number in 0..KINDS.len() as u8 * 2 {
        let bytes: Vec<u8> = (0..160)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        // The kind of image, and how much damage, are decided first.
        for target in ["operations", "snapshots"] {
            let seed = [&[number, number / 10 * 2], &bytes[..]].concat();
            put(target, &format!("{number}"), &seed, 0);
        }
        put("check", &format!("damage-{number}"), &bytes[..40], 128 + number);
    }
    let mut packed = vec![0; 4096];
    for (name, bytes) in
        [("zeroes", vec![0; 512]), ("mixed", (0..512).map(|i| (i * i / 7) as u8).collect())]
    {
        let length = qcow2rs::format::compressed::deflate(&bytes, &mut packed).unwrap_or(0);
        put("parsers", &format!("stream-{name}"), &[&[0], &packed[..length]].concat(), 4);
        let zstd = qcow2rs::Compression::Zstd.compress(&bytes, &mut packed);
        let length = zstd.expect("there is memory").unwrap_or(0);
        put("parsers", &format!("zstd-{name}"), &[&[8], &packed[..length]].concat(), 4);
    }
    let directory = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 16, 0, 1, 0, 0, 0, 0, b'b'];
    put("parsers", "bitmaps", &directory, 2);
    put_luks(&scratch);
    std::fs::remove_dir_all(&scratch).expect("the directory is ours");
}
