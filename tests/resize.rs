//! Disks of another size: beside `qemu-img resize`, in both directions, over the matrix
//! of formats; what shows at the end of them; what is refused, and that it changes
//! nothing. (Crashes on the way: `tests/crash/schedules/resize.rs`.)

mod support;

use std::path::Path;

use qcow2rs::{
    CreateOptions, ErrorKind, Format, Image, OpenOptions, Preallocation, ResizeOptions, Result,
    Source, ZeroFlags,
};
use support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, open, open_rw, open_somehow,
    qemu, qemu_create, qemu_img_check, qemu_img_compare, qemu_ok, read, text,
};

const SHRINK: ResizeOptions = ResizeOptions { shrink: true, preallocation: Preallocation::Off };

fn resize(image: &Image, size: u64) -> Result<()> {
    image.resize(size, &SHRINK, &mut |_, _| true)
}

fn with(preallocation: Preallocation) -> ResizeOptions {
    ResizeOptions { preallocation, ..Default::default() }
}

/// `qemu-img map`, without the places in the file.
fn map(path: &Path) -> Vec<serde_json::Value> {
    let json = qemu_ok("qemu-img", &["map", "-f", "qcow2", "--output=json", text(path)]);
    let mut parts: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    for part in &mut parts {
        part.as_object_mut().unwrap().remove("offset");
    }
    parts
}

/// Writes, discards and zeroes here and there.
fn use_somehow(image: &Image, rng: &mut Rng, model: &mut [u8], cluster: u64) {
    for _ in 0..12 {
        let size = model.len() as u64;
        let start = rng.below(size);
        let length = (1 + rng.below(4 * cluster)).min(size - start);
        let part = start as usize..(start + length) as usize;
        if rng.below(4) == 0 {
            image.write_zeroes(start, length, ZeroFlags::default()).unwrap();
            model[part].fill(0);
        } else {
            let mut data = vec![0; length as usize];
            rng.fill(&mut data);
            image.write_at(&data, start, Default::default()).unwrap();
            model[part].copy_from_slice(&data);
        }
    }
}

/// What `qemu-img create -o` gets, and bytes in a cluster.
const KINDS: [(&str, u64); 7] = [
    ("cluster_size=512", 512),
    ("cluster_size=4k", 4096),
    ("cluster_size=64k", 65536),
    ("cluster_size=512,compat=0.10", 512),
    ("cluster_size=16k,extended_l2=on", 16384),
    ("cluster_size=512,refcount_bits=1", 512),
    ("cluster_size=4k,lazy_refcounts=on", 4096),
];

#[test]
fn any_size_after_another_is_a_longer_or_shorter_array() {
    for_seeds("resize", 4, |seed| {
        for (index, (options, cluster)) in KINDS.into_iter().enumerate() {
            let what = format!("seed {seed}, {options}");
            let mut rng = Rng::new(seed * 64 + index as u64);
            let scratch = Scratch::new();
            let path = scratch.path("image");
            let unit = cluster * 24;
            let mut model = vec![0; (1 + rng.below(unit / 512)) as usize * 512];
            qemu_create(&path, options, model.len() as u64);
            let mut image = open_somehow(&path, &mut rng);
            for step in 0..10 {
                describe(format!("{what}, step {step}"), || {
                    if !model.is_empty() {
                        use_somehow(&image, &mut rng, &mut model, cluster);
                    }
                    let size = match rng.below(6) {
                        0 => 0,
                        // Over the border of an L2 table.
                        1 => (cluster * cluster / 8).min(4 << 20) + rng.below(4) * 512,
                        _ => rng.below(unit / 512) * 512,
                    };
                    resize(&image, size).unwrap();
                    model.resize(size as usize, 0);
                    assert_content(&image, &model);
                    if step % 3 == 2 {
                        image.close().unwrap();
                        qemu_img_check(&path);
                        image = open_somehow(&path, &mut rng);
                        assert_content(&image, &model);
                    }
                });
            }
            image.close().unwrap();
        }
    });
}

/// Has QEMU and this driver resize the same image, and compares what came of it.
fn beside_qemu(path: &Path, size: u64, mode: &str, strict: bool, what: &str) {
    describe(what.to_owned(), || {
        let theirs = path.with_extension("theirs");
        std::fs::copy(path, &theirs).unwrap();
        let option = format!("--preallocation={mode}");
        let args =
            ["resize", "-q", "-f", "qcow2", "--shrink", &option, text(&theirs), &size.to_string()];
        qemu_ok("qemu-img", &args);
        let image = open_rw(path);
        let preallocation = Preallocation::from_name(mode).unwrap();
        image
            .resize(size, &ResizeOptions { shrink: true, preallocation }, &mut |_, _| true)
            .unwrap();
        assert_eq!(image.size(), size);
        image.close().unwrap();
        qemu_img_check(path);
        if strict {
            let files = [text(path), text(&theirs)];
            let args = ["compare", "-s", "-f", "qcow2", "-F", "qcow2", files[0], files[1]];
            qemu_ok("qemu-img", &args);
            assert_eq!(map(path), map(&theirs));
        } else {
            // What holes the file system makes of what is taken ahead is its affair.
            qemu_img_compare(path, "qcow2", &theirs, "qcow2");
        }
        assert_same(&read(&open(path), 0, size), &read(&open(&theirs), 0, size));
    });
}

#[test]
fn qemu_makes_the_same_of_it() {
    for_seeds("resize", 2, |seed| {
        for (index, (options, cluster)) in KINDS.into_iter().enumerate() {
            for backing in [None, Some(true), Some(false)] {
                let mut rng = Rng::new(seed * 64 + index as u64);
                let scratch = Scratch::new();
                let (path, base) = (scratch.path("image"), scratch.path("base"));
                let old = (2 + rng.below(40)) * cluster + rng.below(cluster / 512) * 512;
                let mut options = options.to_owned();
                if let Some(longer) = backing {
                    let length = if longer { 3 * old + 1024 } else { old / 1024 * 512 };
                    let mut bytes = vec![0; length as usize];
                    rng.fill(&mut bytes);
                    std::fs::write(&base, bytes).unwrap();
                    options += &format!(",backing_file={},backing_fmt=raw", text(&base));
                }
                qemu_create(&path, &options, old);
                let image = open_rw(&path);
                let mut model = read(&image, 0, old);
                // What is behind the last byte of the disk shows with QEMU.
                use_somehow(&image, &mut rng, &mut model, cluster);
                image.close().unwrap();
                let grown = old + (1 + rng.below(2 * old / 512)) * 512;
                let refused = options.contains("0.10") && backing == Some(true);
                if refused {
                    let image = open_rw(&path);
                    let error = resize(&image, grown).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::NotSupported);
                    assert_same(&read(&image, 0, old), &model);
                    image.close().unwrap();
                    let args = ["resize", "-f", "qcow2", text(&path), &grown.to_string()];
                    assert!(!qemu("qemu-img", &args).status.success());
                    continue;
                }
                let mode = ["off", "metadata", "falloc", "full"][rng.below(4) as usize];
                let what = format!("seed {seed}, {options}, {old} to {grown}, {mode}");
                // QEMU writes zeroes to the last cluster where entries can say it.
                let strict = mode == "off" && backing != Some(true);
                beside_qemu(&path, grown, mode, strict, &what);
                // qemu-img makes no empty disks.
                let shrunk = (1 + rng.below(grown / 512 - 1)) * 512;
                let what = format!("seed {seed}, {options}, {grown} to {shrunk}");
                beside_qemu(&path, shrunk, "off", strict, &what);
            }
        }
    });
}

#[test]
fn snapshots_keep_what_they_have_and_their_size() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for (options, cluster) in KINDS {
        if options.contains("refcount_bits=1") {
            continue;
        }
        qemu_create(&path, options, 100 * cluster);
        let image = open_rw(&path);
        image.write_at(&vec![1; 100 * cluster as usize], 0, Default::default()).unwrap();
        image.snapshot_create(b"a", &qcow2rs::snapshots::Meta::now()).unwrap();
        if options.contains("0.10") {
            assert_eq!(resize(&image, 0).unwrap_err().kind(), ErrorKind::NotSupported);
            assert_eq!(image.size(), 100 * cluster);
            image.close().unwrap();
            continue;
        }
        resize(&image, 50 * cluster + 512).unwrap();
        image.write_at(&[2; 512], 50 * cluster, Default::default()).unwrap();
        resize(&image, 200 * cluster).unwrap();
        let mut model = vec![0; 200 * cluster as usize];
        model[..50 * cluster as usize].fill(1);
        model[50 * cluster as usize..][..512].fill(2);
        assert_content(&image, &model);
        let snapshot = image.snapshot_open(b"a").unwrap();
        assert_content(&snapshot, &vec![1; 100 * cluster as usize]);
        let kind = snapshot.resize(0, &SHRINK, &mut |_, _| true).unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::NotSupported | ErrorKind::ReadOnly));
        drop(snapshot);
        image.close().unwrap();
        qemu_img_check(&path);
        qemu_ok("qemu-img", &["snapshot", "-a", "a", text(&path)]);
        assert_content(&open(&path), &vec![1; 100 * cluster as usize]);
        qemu_img_check(&path);
    }
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for (options, cluster) in KINDS {
        // As QEMU leaves it: there are old bytes behind the end of the disk.
        qemu_create(&path, options, 4 * cluster);
        let image = open_rw(&path);
        image.write_at(&vec![1; 4 * cluster as usize], 0, Default::default()).unwrap();
        image.close().unwrap();
        let end = cluster + cluster / 2 / 512 * 512;
        let size = end.to_string();
        qemu_ok("qemu-img", &["resize", "-q", "-f", "qcow2", "--shrink", text(&path), &size]);
        let image = open_rw(&path);
        resize(&image, 4 * cluster).unwrap();
        let mut model = vec![0; 4 * cluster as usize];
        model[..end as usize].fill(1);
        assert_content(&image, &model);
        // VM state that no snapshot has taken does not become content, either.
        image.write_vm_state(&[7; 4096], 0).unwrap();
        let behind = (cluster * cluster / 8).min(8 << 20);
        resize(&image, 2 * behind).unwrap();
        model.resize(2 * behind as usize, 0);
        assert_content(&image, &model);
        image.close().unwrap();
        qemu_img_check(&path);
    }
}

#[test]
fn a_shorter_disk_has_a_shorter_file() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "", 64 << 20);
    let image = open_rw(&path);
    image.write_at(&vec![1; 64 << 20], 0, Default::default()).unwrap();
    resize(&image, 1 << 20).unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    assert!(length < 2 << 20, "{length}");
    image.write_at(&[2; 512], 0, Default::default()).unwrap();
    resize(&image, 3 << 20).unwrap();
    image.write_at(&vec![3; 1 << 20], 2 << 20, Default::default()).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_create(&path, "cluster_size=512,refcount_bits=64", 1 << 20);
    let image = open_rw(&path);
    let kind = |size, options: &ResizeOptions| {
        let error = image.resize(size, options, &mut |_, _| true).unwrap_err();
        assert_eq!(image.size(), 1 << 20);
        error.kind()
    };
    let plain = ResizeOptions::default();
    assert_eq!(kind((1 << 20) + 1, &plain), ErrorKind::InvalidArgument);
    assert_eq!(kind(1 << 19, &plain), ErrorKind::InvalidArgument);
    let both = ResizeOptions { shrink: true, preallocation: Preallocation::Full };
    assert_eq!(kind(1 << 19, &both), ErrorKind::InvalidArgument);
    assert_eq!(kind((128 << 30) + 512, &plain), ErrorKind::Os(libc::EFBIG));
    assert_eq!(kind(u64::MAX / 512 * 512, &plain), ErrorKind::Os(libc::EFBIG));
    // The disk may be so large, its data may not.
    let length = std::fs::metadata(&path).unwrap().len();
    let metadata = with(Preallocation::Metadata);
    assert_eq!(kind(100 << 30, &metadata), ErrorKind::Os(libc::EFBIG));
    assert!(std::fs::metadata(&path).unwrap().len() <= length);
    image.resize(1 << 20, &plain, &mut |_, _| true).unwrap();
    let mut calls = Vec::new();
    let error = image.resize(2 << 20, &with(Preallocation::Full), &mut |done, total| {
        calls.push((done, total));
        calls.len() < 3
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(calls.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{calls:?}");
    assert_eq!(image.size(), 1 << 20);
    image.close().unwrap();
    qemu_img_check(&path);

    let mut options = OpenOptions::new().writable(true);
    options.set("max-virtual-size", "2M").unwrap();
    options.set("max-metadata-size", "1M").unwrap();
    let limited = Image::open(Source::path(&path), &options).unwrap();
    assert_eq!(resize(&limited, 3 << 20).unwrap_err().kind(), ErrorKind::Limit);
    resize(&limited, 2 << 20).unwrap();
    limited.close().unwrap();
    options.set("max-virtual-size", "64G").unwrap();
    let limited = Image::open(Source::path(&path), &options).unwrap();
    assert_eq!(resize(&limited, 32 << 30).unwrap_err().kind(), ErrorKind::Limit);
    assert_eq!(limited.size(), 2 << 20);
    assert_content(&limited, &vec![0; 2 << 20]);
    limited.close().unwrap();
    qemu_img_check(&path);

    let read_only = open(&path);
    assert_eq!(resize(&read_only, 4 << 20).unwrap_err().kind(), ErrorKind::ReadOnly);
    read_only.close().unwrap();
}

#[test]
fn raw_images_have_sizes_too() {
    let scratch = Scratch::new();
    let path = scratch.path("image.raw");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let mut options = OpenOptions::new().writable(true);
    options.format = Format::Raw;
    let image = Image::open(Source::path(&path), &options).unwrap();
    resize(&image, 1 << 19).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 19);
    image.resize(1 << 20, &with(Preallocation::Full), &mut |_, _| true).unwrap();
    let mut model = vec![1; 1 << 19];
    model.resize(1 << 20, 0);
    assert_content(&image, &model);
    image.write_at(&[2; 512], (1 << 20) - 512, Default::default()).unwrap();
    let metadata = image.resize(2 << 20, &with(Preallocation::Metadata), &mut |_, _| true);
    assert_eq!(metadata.unwrap_err().kind(), ErrorKind::NotSupported);
    assert_eq!(image.size(), 1 << 20);
    assert_eq!(resize(&image, 100).unwrap_err().kind(), ErrorKind::InvalidArgument);
    image.close().unwrap();
}

#[test]
fn idle_queues_survive_and_busy_ones_are_in_the_way() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut create = CreateOptions::default();
    create.size = Some(1 << 20);
    let open = OpenOptions::new();
    let image =
        std::sync::Arc::new(qcow2rs::create_path_open(&path, true, &create, &open).unwrap());
    let other = image.clone();
    // A callback is inside: another call is in progress.
    let inner = image.resize(2 << 20, &with(Preallocation::Full), &mut |_, _| {
        assert_eq!(resize(&other, 3 << 20).unwrap_err().kind(), ErrorKind::Busy);
        true
    });
    inner.unwrap();
    assert_eq!(image.size(), 2 << 20);
    image.close().unwrap();
}
