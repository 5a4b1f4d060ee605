//! New images: what QEMU says of them, over the matrix of options, and what is
//! refused before anything is written.

mod support;

use std::process::Command;
use std::sync::{Arc, Mutex};

use qcow2rs::{CreateOptions, ErrorKind, Format, Image, OpenOptions, Policy, Source};
use support::memory_disk::{MemoryDisk, Request};
use support::{Scratch, qemu, qemu_img_check, qemu_ok, text};

fn options(set: &[(&str, &str)]) -> CreateOptions {
    let mut options = CreateOptions::default();
    for (name, value) in set {
        options.set(name, value).unwrap_or_else(|error| panic!("{name}={value}: {error}"));
    }
    options
}

/// `qemu-img info`, without what differs between any two files.
fn info(path: &std::path::Path) -> serde_json::Value {
    let json = qemu_ok("qemu-img", &["info", "-f", "qcow2", "--output=json", text(path)]);
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let members = value.as_object_mut().unwrap();
    for name in ["filename", "actual-size", "children"] {
        members.remove(name);
    }
    value
}

fn matrix() -> Vec<Vec<(&'static str, &'static str)>> {
    let mut all = Vec::new();
    for size in ["0", "512", "1000", "1M", "3G", "1T"] {
        for cluster_size in ["512", "4k", "64k", "2M"] {
            if size == "1T" && cluster_size == "512" {
                continue;
            }
            all.push(vec![("size", size), ("cluster_size", cluster_size), ("compat", "0.10")]);
            for refcount_bits in ["1", "8", "64"] {
                let bits = ("refcount_bits", refcount_bits);
                all.push(vec![("size", size), ("cluster_size", cluster_size), bits]);
            }
        }
        for cluster_size in ["16k", "128k", "2M"] {
            let extended = ("extended_l2", "on");
            let lazy = ("lazy_refcounts", "on");
            all.push(vec![("size", size), ("cluster_size", cluster_size), extended, lazy]);
        }
    }
    all
}

#[test]
fn qemu_sees_what_it_would_have_made_itself() {
    let scratch = Scratch::new();
    let (ours, theirs) = (scratch.path("ours.qcow2"), scratch.path("theirs.qcow2"));
    for set in matrix() {
        let open = OpenOptions::new();
        qcow2rs::create_path(&ours, false, &options(&set), &open).unwrap();
        let list: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let list = list.join(",");
        qemu_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &list, text(&theirs)]);
        assert_eq!(info(&ours), info(&theirs), "{list}");
        qemu_img_check(&ours);
        let length = |path| std::fs::metadata(path).unwrap().len();
        let source = Source::path(&ours);
        Image::open(source, &OpenOptions::new()).unwrap().close().unwrap();
        // QEMU places large refcount tables elsewhere; small images are equal.
        if length(&theirs) < 1 << 20 {
            assert_eq!(length(&ours), length(&theirs), "{list}");
        }
    }
}

#[test]
fn measure_agrees_with_qemu() {
    let mut all = matrix();
    for mode in ["metadata", "falloc", "full"] {
        for size in ["0", "100000", "3G"] {
            all.push(vec![("size", size), ("preallocation", mode)]);
            all.push(vec![("size", size), ("preallocation", mode), ("extended_l2", "on")]);
        }
    }
    for set in all {
        let (required, full) = qcow2rs::measure(&options(&set)).unwrap();
        let (_, size) = set[0];
        let list: Vec<String> =
            set[1..].iter().map(|(name, value)| format!("{name}={value}")).collect();
        let list = list.join(",");
        let json = qemu_ok(
            "qemu-img",
            &["measure", "--output=json", "-O", "qcow2", "-o", &list, "--size", size],
        );
        let theirs: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(theirs["required"], required, "{size} {list}");
        assert_eq!(theirs["fully-allocated"], full, "{size} {list}");
    }
}

#[test]
fn what_is_preallocated_is_what_qemu_preallocates() {
    let scratch = Scratch::new();
    let (ours, theirs) = (scratch.path("ours.qcow2"), scratch.path("theirs.qcow2"));
    std::fs::write(scratch.path("base"), vec![7; 300_000]).unwrap();
    let kinds: &[&[(&str, &str)]] = &[
        &[("cluster_size", "512")],
        &[("cluster_size", "512"), ("compat", "0.10")],
        &[("cluster_size", "4k"), ("refcount_bits", "1")],
        &[("cluster_size", "64k"), ("refcount_bits", "64")],
        &[("cluster_size", "16k"), ("extended_l2", "on")],
        &[("cluster_size", "64k"), ("extended_l2", "on"), ("backing", "base")],
        &[("cluster_size", "2M")],
    ];
    for kind in kinds {
        for size in ["0", "512", "100000", "3M"] {
            for mode in ["metadata", "falloc", "full"] {
                let mut set = vec![("size", size), ("preallocation", mode)];
                set.extend(kind.iter().filter(|(name, _)| *name != "backing"));
                let mut create = options(&set);
                let list: Vec<String> =
                    set.iter().map(|(name, value)| format!("{name}={value}")).collect();
                let mut list = list.join(",");
                if kind.last().unwrap().0 == "backing" {
                    create.backing = Some((b"base".to_vec(), Format::Raw));
                    list += ",backing_file=base,backing_fmt=raw";
                }
                qcow2rs::create_path(&ours, false, &create, &OpenOptions::new()).unwrap();
                qemu_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &list, text(&theirs)]);
                assert_eq!(info(&ours), info(&theirs), "{list}");
                qemu_img_check(&ours);
                support::qemu_img_compare(&ours, "qcow2", &theirs, "qcow2");
                let found = [&ours, &theirs].map(|path| std::fs::metadata(path).unwrap());
                let [(length, space), (their_length, their_space)] = found
                    .map(|data| (data.len(), std::os::unix::fs::MetadataExt::blocks(&data) * 512));
                // Not more than a few tables apart.
                let few = 4 * create.cluster_size + 65536;
                assert!(length.abs_diff(their_length) <= few, "{list}: {length}, {their_length}");
                assert!(space <= their_space + few, "{list}: {space}, {their_space}");
                if mode != "metadata" {
                    // Tables among the holes would take whole blocks of the host.
                    assert!(their_space <= space + few, "{list}: {space}, {their_space}");
                }
                let image = Image::open(
                    Source::path(&ours),
                    &OpenOptions::new().policy(Policy::Paths).writable(true),
                )
                .unwrap();
                let size = image.size();
                let mut data = vec![9; size as usize];
                image.read_at(&mut data, 0).unwrap();
                let below = if create.backing.is_some() { 300_000.min(data.len()) } else { 0 };
                assert!(data[..below].iter().all(|byte| *byte == 7), "{list}");
                assert!(data[below..].iter().all(|byte| *byte == 0), "{list}");
                if size > 0 {
                    // It is written in place: the file does not grow.
                    let run = vec![3; size as usize];
                    image.write_at(&run, 0, Default::default()).unwrap();
                    image.close().unwrap();
                    assert_eq!(std::fs::metadata(&ours).unwrap().len(), length, "{list}");
                    qemu_img_check(&ours);
                }
            }
        }
    }
}

#[test]
fn preallocation_over_a_backing_file_needs_subclusters() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut plain = options(&[("size", "1M"), ("preallocation", "metadata")]);
    plain.backing = Some((b"base".to_vec(), Format::Raw));
    let refused = qcow2rs::create_path(&path, false, &plain, &OpenOptions::new());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert!(!path.exists());
}

#[test]
fn what_is_preallocated_over_old_data_reads_as_zero() {
    // No length can be set, no hole be made: zeroes are written.
    let disk = MemoryDisk::with_hook(&[0xff; 1 << 20], |_| Ok(())).without_truncate();
    let set = options(&[("size", "256k"), ("cluster_size", "4k"), ("preallocation", "metadata")]);
    qcow2rs::create(disk.source(), &set, &OpenOptions::new()).unwrap();
    let image = Image::open(disk.source(), &OpenOptions::new()).unwrap();
    let mut data = vec![9; 256 << 10];
    image.read_at(&mut data, 0).unwrap();
    assert!(data.iter().all(|byte| *byte == 0));
}

#[test]
fn what_qemu_refuses_is_refused_before_the_file_is_touched() {
    let scratch = Scratch::new();
    let path = scratch.path("old");
    std::fs::write(&path, b"precious").unwrap();
    let cases: &[&[(&str, &str)]] = &[
        &[],
        &[("size", "1M"), ("compat", "0.10"), ("extended_l2", "on")],
        &[("size", "1M"), ("compat", "0.10"), ("lazy_refcounts", "on")],
        &[("size", "1M"), ("compat", "0.10"), ("refcount_bits", "8")],
        &[("size", "1M"), ("extended_l2", "on"), ("cluster_size", "8k")],
        &[("size", "256G"), ("cluster_size", "512")],
    ];
    for set in cases {
        let result = qcow2rs::create_path(&path, false, &options(set), &OpenOptions::new());
        assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidArgument, "{set:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        if !set.is_empty() {
            let list: Vec<String> =
                set.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let other = scratch.path("theirs");
            let args = ["create", "-f", "qcow2", "-o", &list.join(","), text(&other)];
            assert!(!qemu("qemu-img", &args).status.success(), "QEMU accepts {list:?}");
        }
    }
    let exclusive =
        qcow2rs::create_path(&path, true, &options(&[("size", "1M")]), &OpenOptions::new());
    assert_eq!(exclusive.unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn the_policy_is_asked_before_anything_is_written() {
    let scratch = Scratch::new();
    let path = scratch.path("top.qcow2");
    let mut options = options(&[("size", "1M")]);
    options.backing = Some((b"base.raw".to_vec(), Format::Raw));
    let denied = qcow2rs::create_path_open(&path, true, &options, &OpenOptions::new());
    assert_eq!(denied.err().unwrap().kind(), ErrorKind::Policy);
    assert!(!path.exists());
    // Without opening it nothing has to be allowed, nor does the file have to exist.
    qcow2rs::create_path(&path, true, &options, &OpenOptions::new()).unwrap();
    assert_eq!(info(&path)["backing-filename"], "base.raw");
    assert_eq!(info(&path)["backing-filename-format"], "raw");
}

#[test]
fn what_could_not_be_opened_is_refused_before_anything_is_written() {
    let scratch = Scratch::new();
    let path = scratch.path("old");
    std::fs::write(&path, b"precious").unwrap();
    std::fs::write(scratch.path("base.raw"), [1; 4096]).unwrap();
    let plain = options(&[("size", "1G")]);
    let mut on_base = plain.clone();
    on_base.backing = Some((b"base.raw".to_vec(), Format::Raw));
    let mut on_nothing = plain.clone();
    on_nothing.backing = Some((b"no such file".to_vec(), Format::Raw));
    let with = |name: &str, value: &str| {
        let mut open = OpenOptions::new().policy(Policy::Paths);
        open.set(name, value).unwrap();
        open
    };
    let mut no_backing = OpenOptions::new();
    no_backing.no_backing = true;
    let cases = [
        (&on_base, no_backing, ErrorKind::InvalidArgument),
        (&plain, with("l2-cache-entry-size", "128k"), ErrorKind::InvalidArgument),
        (&plain, with("max-virtual-size", "512M"), ErrorKind::Limit),
        (&plain, with("max-metadata-size", "64k"), ErrorKind::Limit),
        (&on_base, with("max-chain-depth", "0"), ErrorKind::ChainDepth),
        (&on_nothing, OpenOptions::new().policy(Policy::Paths), ErrorKind::Backing(2)),
    ];
    for (create, open, kind) in cases {
        let by_path = qcow2rs::create_path_open(&path, false, create, &open);
        assert_eq!(by_path.err().unwrap().kind(), kind, "{open:?}");
        let named = qcow2rs::create_open(Source::path(&path), create, &open);
        assert_eq!(named.err().unwrap().kind(), kind, "{open:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious", "{open:?}");
    }
}

#[test]
fn the_old_header_is_gone_before_the_tables_are_written() {
    #[derive(PartialEq, Debug)]
    enum Event {
        Write(u64),
        Flush,
    }
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = events.clone();
    let disk = MemoryDisk::with_hook(&[0xff; 1 << 20], move |request| {
        match request {
            Request::Write(_, offset) => log.lock().unwrap().push(Event::Write(offset)),
            Request::Flush => log.lock().unwrap().push(Event::Flush),
            _ => {}
        }
        Ok(())
    });
    let disk = disk.without_truncate();
    let set = options(&[("size", "64M")]);
    qcow2rs::create(disk.source(), &set, &OpenOptions::new()).unwrap();
    let events = events.lock().unwrap();
    let tables = events.iter().position(|event| !matches!(event, Event::Write(0))).unwrap();
    assert!(tables > 0 && events[tables] == Event::Flush, "{events:?}");
    let [.., Event::Flush, Event::Write(0), Event::Flush] = events[..] else {
        panic!("the header is not last: {events:?}");
    };
    let image = Image::open(disk.source(), &OpenOptions::new()).unwrap();
    let mut data = [9; 4096];
    image.read_at(&mut data, 0).unwrap();
    assert_eq!(data, [0; 4096]);
}

#[test]
fn what_could_not_be_written_is_not_left_behind() {
    const PATH: &str = "QCOW2RS_TEST_FULL_PATH";
    // The same test in a process whose files must stay small.
    if let Some(path) = std::env::var_os(PATH) {
        let path = std::path::Path::new(&path);
        let create = |exclusive, set| {
            qcow2rs::create_path(path, exclusive, &options(set), &OpenOptions::new())
        };
        for _ in 0..2 {
            let error = create(true, &[("size", "1M")]).unwrap_err();
            assert_ne!(error.kind(), ErrorKind::Exists, "{error}");
            assert!(!path.exists());
        }
        // A file that was there before is not ours to remove.
        std::fs::write(path, b"old").unwrap();
        create(false, &[("size", "1M")]).unwrap_err();
        assert!(path.exists());
        return;
    }
    let scratch = Scratch::new();
    let status = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "what_could_not_be_written_is_not_left_behind", "--nocapture"])
        .env(PATH, scratch.path("image"))
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
    assert!(String::from_utf8_lossy(&status.stdout).contains("1 passed"), "{status:?}");
}

#[test]
fn the_size_may_come_from_the_backing_file() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base.raw"), vec![1; 70_000]).unwrap();
    let path = scratch.path("top.qcow2");
    let mut options = options(&[("extended_l2", "on"), ("cluster_size", "128k")]);
    options.backing = Some((b"base.raw".to_vec(), Format::Raw));
    let denied = qcow2rs::create_path(&path, true, &options, &OpenOptions::new());
    assert_eq!(denied.unwrap_err().kind(), ErrorKind::Policy);
    assert!(!path.exists());
    let open = OpenOptions::new().policy(Policy::Paths);
    let image = qcow2rs::create_path_open(&path, true, &options, &open).unwrap();
    assert_eq!(image.size(), 70_144);
    let mut data = vec![9; 70_144];
    image.read_at(&mut data, 0).unwrap();
    assert!(data[..70_000].iter().all(|byte| *byte == 1));
    assert!(data[70_000..].iter().all(|byte| *byte == 0));
    image.close().unwrap();
}

#[test]
fn an_image_in_use_is_not_overwritten() {
    let scratch = Scratch::new();
    let path = scratch.path("top.qcow2");
    let set = options(&[("size", "1M")]);
    let image = qcow2rs::create_path_open(&path, true, &set, &OpenOptions::new()).unwrap();
    let again = qcow2rs::create_path(&path, false, &set, &OpenOptions::new());
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Locked);
    image.write_at(&[1; 512], 0, Default::default()).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
}

#[test]
fn what_was_there_before_does_not_show() {
    let scratch = Scratch::new();
    let path = scratch.path("top.qcow2");
    std::fs::write(&path, vec![0xff; 5 << 20]).unwrap();
    let set = options(&[("size", "64M"), ("cluster_size", "4k")]);
    qcow2rs::create(Source::path(&path), &set, &OpenOptions::new()).unwrap();
    qemu_img_check(&path);
    assert_eq!(qcow2rs::probe(&Source::path(&path)).unwrap(), Format::Qcow2);
    let image = Image::open(Source::path(&path), &OpenOptions::new()).unwrap();
    let mut data = vec![9; 1 << 20];
    image.read_at(&mut data, 0).unwrap();
    assert!(data.iter().all(|byte| *byte == 0));
}
