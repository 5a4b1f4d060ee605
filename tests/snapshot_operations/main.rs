//! Internal snapshots taken, applied, deleted and renamed by us and by QEMU in turn:
//! each stays what it was, whoever does what, and QEMU finds nothing wrong.
//!
//! A failure names its seed: `QCOW2RS_SEED=n cargo test --test snapshot_operations`
//! replays it.

#[path = "../support/mod.rs"]
mod support;

mod malformed;
mod vm_state;

use std::path::{Path, PathBuf};

use qcow2rs::snapshots::Meta;
use qcow2rs::{ErrorKind, Image, OpenOptions, Source, WriteFlags};
use support::dissect::{COPIED, Dissected, OFFSET};
use support::operations::{Case, Op};
use support::refcounts::assert_exact;
use support::snapshots::{Layout, cases, content_of, snapshot};
use support::{
    Rng, Scratch, assert_content, assert_same, describe, for_seeds, open, open_rw, qemu,
    qemu_create, qemu_img_check, qemu_io, qemu_ok, text,
};

const CLUSTER: u64 = 64 << 10;

/// IDs and names, as QEMU lists them.
fn listed_by_qemu(image: &Path) -> Vec<(String, String)> {
    let out = qemu("qemu-img", &["info", "-f", "qcow2", "--output=json", text(image)]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let list = json["snapshots"].as_array().cloned().unwrap_or_default();
    list.iter().map(|entry| (text(&entry["id"]), text(&entry["name"]))).collect()
}

fn listed(image: &Image) -> Vec<(String, String)> {
    let string = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let count = image.snapshot_count().unwrap();
    let all = (0..count).map(|index| image.snapshot(index).unwrap());
    all.map(|info| (string(info.id), string(info.name))).collect()
}

#[test]
fn what_a_deleted_snapshot_had_is_punched_out_if_asked_for() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    let blocks = |path: &Path| std::fs::metadata(path).unwrap().blocks();
    for (request, snapshots, punched) in
        [("on", "on", true), ("on", "off", false), ("off", "on", true), ("off", "", false)]
    {
        let image = scratch.path("punched.qcow2");
        qemu_create(&image, "", 64 * CLUSTER);
        qemu_io(&image, &["write -P 1 0 2M".into()]);
        snapshot(&image, &["-c", "s"]);
        qemu_io(&image, &["write -P 2 0 2M".into()]);
        let before = blocks(&image);
        let mut options = OpenOptions::new().writable(true);
        options.set("pass-discard-request", request).unwrap();
        if !snapshots.is_empty() {
            options.set("pass-discard-snapshot", snapshots).unwrap();
        }
        let opened = Image::open(Source::path(&image), &options).unwrap();
        opened.snapshot_delete(b"s").unwrap();
        opened.close().unwrap();
        let fewer = blocks(&image) + (1 << 20) / 512 < before;
        assert_eq!(fewer, punched, "{request} {snapshots}");
        qemu_img_check(&image);
    }
}

/// An image and what it and its snapshots must read as.
struct Run {
    case: Case,
    _scratch: Scratch,
    path: PathBuf,
    active: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    taken: u32,
}

impl Run {
    fn new(case: Case, rng: &mut Rng) -> Run {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let active = case.create_backing(&path, rng);
        case.create(&path);
        Run { case, _scratch: scratch, path, active, snapshots: Vec::new(), taken: 0 }
    }

    fn change(&mut self, rng: &mut Rng, image: Option<&Image>) {
        let ops: Vec<Op> = (0..8).map(|_| self.case.op(rng, image.is_none())).collect();
        match image {
            Some(image) => {
                for op in &ops {
                    op.apply(image);
                    op.follow(&self.case, image, &mut self.active);
                }
            }
            None => {
                qemu_io(&self.path, &ops.iter().map(Op::qemu_io).collect::<Vec<_>>());
                ops.iter().for_each(|op| op.model(&self.case, &mut self.active));
            }
        }
    }

    /// One change of the snapshots, by us if there is an image open.
    fn step(&mut self, rng: &mut Rng, image: Option<&Image>) {
        // As many as fit into the narrowest counts, one less for what QEMU does between.
        let most = if self.case.refcount_bits == 2 { 1 } else { 4 };
        let index = rng.below(self.snapshots.len().max(1) as u64) as usize;
        match rng.below(4) {
            _ if self.snapshots.is_empty() => self.take(image),
            0 if self.snapshots.len() < most => self.take(image),
            1 => {
                let (name, content) = self.snapshots[index].clone();
                match image {
                    Some(image) => image.snapshot_apply(name.as_bytes()).unwrap(),
                    None => snapshot(&self.path, &["-a", &name]),
                }
                self.active = content;
            }
            2 => {
                let (name, _) = self.snapshots.remove(index);
                match image {
                    Some(image) => image.snapshot_delete(name.as_bytes()).unwrap(),
                    None => snapshot(&self.path, &["-d", &name]),
                }
            }
            _ => {
                let Some(image) = image else { return };
                self.taken += 1;
                let name = format!("renamed{}", self.taken);
                image.snapshot_rename(self.snapshots[index].0.as_bytes(), name.as_bytes()).unwrap();
                self.snapshots[index].0 = name;
            }
        }
    }

    fn take(&mut self, image: Option<&Image>) {
        self.taken += 1;
        let name = format!("s{}", self.taken);
        match image {
            Some(image) => {
                image.snapshot_create(name.as_bytes(), &Meta::now()).unwrap();
            }
            None => snapshot(&self.path, &["-c", &name]),
        }
        self.snapshots.push((name, self.active.clone()));
    }

    fn verify(&self) {
        qemu_img_check(&self.path);
        assert_exact(&self.path);
        let image = open(&self.path);
        assert_content(&image, &self.active);
        let names: Vec<String> = self.snapshots.iter().map(|(name, _)| name.clone()).collect();
        let ours = listed(&image);
        assert_eq!(ours.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>(), names);
        assert_eq!(listed_by_qemu(&self.path), ours);
        for (name, content) in &self.snapshots {
            describe(format!("snapshot {name}"), || {
                assert_same(&content_of(&self.path, name), content);
            });
        }
    }
}

const LAYOUTS: &[Layout] = &[
    (2, 512, false, 16),
    (2, 65536, false, 16),
    (3, 512, false, 2),
    (3, 4096, false, 8),
    (3, 65536, false, 16),
    (3, 16384, true, 2),
    (3, 65536, true, 16),
    (3, 131072, true, 64),
];

#[test]
fn snapshots_of_both_sides_stay_what_they_were() {
    for_seeds("snapshot operations", 1, |seed| {
        for (number, case) in cases(seed, LAYOUTS).into_iter().enumerate() {
            let mut rng = Rng::new(seed.wrapping_mul(1000) + number as u64);
            describe(format!("{case:?}"), || {
                let mut run = Run::new(case, &mut rng);
                for _ in 0..3 {
                    run.change(&mut rng, None);
                    run.step(&mut rng, None);
                    let image = open_rw(&run.path);
                    for _ in 0..3 {
                        run.change(&mut rng, Some(&image));
                        run.step(&mut rng, Some(&image));
                    }
                    assert_content(&image, &run.active);
                    image.close().unwrap();
                    run.verify();
                }
            });
        }
    });
}

fn written(scratch: &Scratch, options: &str) -> PathBuf {
    let path = scratch.path("image");
    qemu_create(&path, options, 16 * CLUSTER);
    qemu_io(&path, &["write -P 1 0 512k".into()]);
    path
}

#[test]
fn ids_and_names_follow_qemu() {
    let scratch = Scratch::new();
    let path = written(&scratch, "");
    let image = open_rw(&path);
    let create = |name: &str| {
        let id = image.snapshot_create(name.as_bytes(), &Meta::now());
        id.map(|id| String::from_utf8(id).unwrap()).map_err(|error| error.kind())
    };
    assert_eq!(create("a"), Ok("1".into()));
    assert_eq!(create("1"), Ok("2".into()));
    assert_eq!(create("a"), Err(ErrorKind::Exists));
    assert_eq!(create(""), Err(ErrorKind::InvalidArgument));
    image.snapshot_delete(b"1").unwrap();
    assert_eq!(listed(&image), [("2".into(), "1".into())], "by ID, not by name");
    assert_eq!(create("b"), Ok("3".into()));
    let rename = |from: &str, to: &str| {
        image.snapshot_rename(from.as_bytes(), to.as_bytes()).map_err(|error| error.kind())
    };
    assert_eq!(rename("9", "c"), Err(ErrorKind::NotFound));
    assert_eq!(rename("b", "1"), Err(ErrorKind::Exists));
    assert_eq!(rename("b", "b"), Ok(()));
    assert_eq!(rename("3", "c"), Ok(()));
    assert_eq!(image.snapshot_apply(b"b").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(image.snapshot_delete(b"b").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(image.snapshot(2).unwrap_err().kind(), ErrorKind::NotFound);
    image.close().unwrap();
    assert_eq!(listed_by_qemu(&path), [("2".into(), "1".into()), ("3".into(), "c".into())]);
    snapshot(&path, &["-c", "d"]);
    assert_eq!(listed(&open(&path)).last().unwrap().0, "4");
}

#[test]
fn what_is_recorded_is_what_qemu_shows() {
    let scratch = Scratch::new();
    let path = written(&scratch, "");
    let image = open_rw(&path);
    let meta = Meta {
        vm_state_size: 0,
        date_sec: 1_700_000_000,
        date_nsec: 5_000,
        vm_clock_nsec: 3_000_000_007,
        icount: Some(99),
    };
    image.snapshot_create(b"s", &meta).unwrap();
    let info = image.snapshot(0).unwrap();
    assert_eq!((info.meta, info.virtual_size), (meta, 16 * CLUSTER));
    image.close().unwrap();
    let out = qemu("qemu-img", &["info", "-f", "qcow2", "--output=json", text(&path)]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let entry = &json["snapshots"][0];
    let number = |name: &str| entry[name].as_u64().unwrap();
    assert_eq!(number("date-sec"), 1_700_000_000);
    assert_eq!(number("date-nsec"), 5_000);
    assert_eq!((number("vm-clock-sec"), number("vm-clock-nsec")), (3, 7));
    assert_eq!(number("icount"), 99);
}

#[test]
fn nothing_is_shared_any_more_after_a_delete() {
    for options in ["compat=0.10", "", "extended_l2=on"] {
        let scratch = Scratch::new();
        let path = written(&scratch, options);
        let image = open_rw(&path);
        image.snapshot_create(b"s", &Meta::now()).unwrap();
        image.flush().unwrap();
        let shared = Dissected::load(&path);
        assert_eq!((shared.l1(0) & COPIED, shared.entry(0).0 & COPIED), (0, 0));
        assert_eq!(shared.refcount(shared.host(0) / CLUSTER), 2);
        image.write_at(&[9; 512], 0, WriteFlags::default()).unwrap();
        image.snapshot_delete(b"s").unwrap();
        image.close().unwrap();
        let own = Dissected::load(&path);
        assert_ne!(own.l1(0) & COPIED, 0);
        for cluster in 0..8 {
            assert_ne!(own.entry(cluster).0 & COPIED, 0, "{options}: cluster {cluster}");
        }
        assert_ne!(own.l1(0) & OFFSET, shared.l1(0) & OFFSET);
        qemu_img_check(&path);
        assert_exact(&path);
    }
}

#[test]
fn counts_without_room_for_a_snapshot_stay_as_they_are() {
    let scratch = Scratch::new();
    let path = written(&scratch, "refcount_bits=1");
    let before = std::fs::read(&path).unwrap();
    let image = open_rw(&path);
    let error = image.snapshot_create(b"s", &Meta::now()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "as QEMU");
    assert_eq!(image.snapshot_count().unwrap(), 0);
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);

    // Two bits have room for two snapshots, and for going back to one of them.
    let scratch = Scratch::new();
    let path = written(&scratch, "refcount_bits=2");
    let image = open_rw(&path);
    image.snapshot_create(b"a", &Meta::now()).unwrap();
    image.snapshot_create(b"b", &Meta::now()).unwrap();
    let error = image.snapshot_create(b"c", &Meta::now()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    image.write_at(&[9; 512], 0, WriteFlags::default()).unwrap();
    image.snapshot_apply(b"a").unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
    assert_eq!(listed_by_qemu(&path).len(), 2);
}

#[test]
fn applying_restores_the_size() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    // One L2 table maps 2 MiB: the L1 tables differ in length.
    qemu_create(&path, "cluster_size=4k", 1 << 20);
    qemu_io(&path, &["write -P 1 0 1M".into()]);
    snapshot(&path, &["-c", "small"]);
    qemu_ok("qemu-img", &["resize", "-q", "-f", "qcow2", text(&path), "5M"]);
    qemu_io(&path, &["write -P 2 3M 2M".into()]);
    let small = vec![1; 1 << 20];
    let mut large = small.clone();
    large.resize(3 << 20, 0);
    large.resize(5 << 20, 2);
    let image = open_rw(&path);
    image.snapshot_create(b"large", &Meta::now()).unwrap();
    for (name, content) in [("small", &small), ("large", &large), ("small", &small)] {
        image.snapshot_apply(name.as_bytes()).unwrap();
        assert_eq!(image.size(), content.len() as u64);
        assert_content(&image, content);
        assert_eq!(image.info().unwrap().virtual_size, content.len() as u64);
    }
    image.write_at(&[3; 4096], (1 << 20) - 4096, WriteFlags::default()).unwrap();
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
    // (`qemu-img convert -l` reads as much of a snapshot as the active disk has.)
    snapshot(&path, &["-a", "large"]);
    assert_content(&open(&path), &large);
}

#[test]
fn a_version_2_disk_does_not_change_its_size() {
    let scratch = Scratch::new();
    let path = written(&scratch, "compat=0.10");
    snapshot(&path, &["-c", "s"]);
    let mut bytes = std::fs::read(&path).unwrap();
    // QEMU would not do it either: the header says another size than the snapshot.
    bytes[24..32].copy_from_slice(&(8 * CLUSTER).to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let image = open_rw(&path);
    assert_eq!(image.snapshot_apply(b"s").unwrap_err().kind(), ErrorKind::NotSupported);
    assert_eq!(image.size(), 8 * CLUSTER);
    image.close().unwrap();
}

#[test]
fn unknown_extra_data_is_kept() {
    let scratch = Scratch::new();
    let path = written(&scratch, "");
    snapshot(&path, &["-c", "s"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    // 24 bytes are known; eight more come before ID and name.
    bytes[at + 36..at + 40].copy_from_slice(&32u32.to_be_bytes());
    let tail: Vec<u8> = bytes[at + 64..at + 66].to_vec();
    bytes.resize(bytes.len().max(at + 80), 0);
    bytes[at + 64..at + 72].copy_from_slice(b"whatever");
    bytes[at + 72..at + 74].copy_from_slice(&tail);
    std::fs::write(&path, bytes).unwrap();
    let image = open_rw(&path);
    image.snapshot_create(b"t", &Meta::now()).unwrap();
    image.snapshot_rename(b"s", b"u").unwrap();
    image.close().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    assert_eq!(&bytes[at + 64..at + 74], b"whatever1u");
    qemu_img_check(&path);
    assert_exact(&path);
}

#[test]
fn who_may_not_is_told_so() {
    let scratch = Scratch::new();
    let path = written(&scratch, "");
    let image = open(&path);
    let kind = |result: qcow2rs::Result<Vec<u8>>| result.unwrap_err().kind();
    assert_eq!(kind(image.snapshot_create(b"s", &Meta::now())), ErrorKind::ReadOnly);
    image.close().unwrap();
    let raw = scratch.path("raw");
    std::fs::write(&raw, vec![0; 4096]).unwrap();
    let options = OpenOptions::new().writable(true).format(qcow2rs::Format::Raw);
    let image = Image::open(Source::path(&raw), &options).unwrap();
    assert_eq!(kind(image.snapshot_create(b"s", &Meta::now())), ErrorKind::NotSupported);
    assert_eq!(image.snapshot_count().unwrap_err().kind(), ErrorKind::NotSupported);
    assert_eq!(image.snapshot(0).unwrap_err().kind(), ErrorKind::NotSupported);
    assert_eq!(image.read_vm_state(&mut [0; 1], 0).unwrap_err().kind(), ErrorKind::NotSupported);
    image.close().unwrap();
}

#[test]
fn a_snapshot_is_read_beside_the_image() {
    for options in ["", "compat=0.10", "extended_l2=on"] {
        let scratch = Scratch::new();
        let path = written(&scratch, options);
        let image = open_rw(&path);
        let mut expected = vec![1; 512 << 10];
        expected.resize(16 * CLUSTER as usize, 0);
        image.snapshot_create(b"s", &Meta::now()).unwrap();
        image.snapshot_create(b"t", &Meta::now()).unwrap();
        let snapshot = image.snapshot_open(b"s").unwrap();
        image.write_at(&vec![2; 1 << 20], 0, WriteFlags::default()).unwrap();
        image.discard(2 * CLUSTER, CLUSTER).unwrap();
        assert_content(&snapshot, &expected);
        assert_eq!(image.snapshot_delete(b"s").unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(image.snapshot_delete(b"1").unwrap_err().kind(), ErrorKind::Busy);
        // Everything else can happen meanwhile.
        image.snapshot_rename(b"s", b"u").unwrap();
        assert_eq!(image.snapshot_delete(b"u").unwrap_err().kind(), ErrorKind::Busy);
        image.snapshot_delete(b"t").unwrap();
        image.snapshot_apply(b"u").unwrap();
        image.write_at(&vec![3; 1 << 20], 0, WriteFlags::default()).unwrap();
        image.snapshot_create(b"v", &Meta::now()).unwrap();
        image.flush().unwrap();
        assert_content(&snapshot, &expected);

        let kind = |result: qcow2rs::Result<()>| result.unwrap_err().kind();
        assert_eq!(kind(snapshot.write_at(&[1], 0, WriteFlags::default())), ErrorKind::ReadOnly);
        assert_eq!(kind(snapshot.invalidate()), ErrorKind::NotSupported);
        assert_eq!(kind(snapshot.reopen(true, true)), ErrorKind::NotSupported);
        assert_eq!(kind(snapshot.check(&mut ()).1), ErrorKind::NotSupported);
        assert_eq!(kind(snapshot.snapshot_delete(b"u")), ErrorKind::NotSupported);
        assert_eq!(snapshot.snapshot_count().unwrap(), 0);
        assert!(!snapshot.info().unwrap().writable);

        // It outlives the image, and its lock goes with the last of them.
        let second = image.snapshot_open(b"u").unwrap();
        drop(snapshot);
        image.close().unwrap();
        assert_content(&second, &expected);
        let again = Image::open(Source::path(&path), &OpenOptions::new().writable(true));
        assert_eq!(again.err().unwrap().kind(), ErrorKind::Locked);
        second.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
        let image = open_rw(&path);
        image.snapshot_delete(b"u").unwrap();
        image.close().unwrap();
        qemu_img_check(&path);
        assert_exact(&path);
    }
}

#[test]
fn a_snapshot_that_is_read_shows_what_is_below() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![7; 1 << 20]).unwrap();
    let path = scratch.path("image");
    qemu_create(&path, "backing_file=base,backing_fmt=raw", 2 << 20);
    qemu_io(&path, &["write -P 1 64k 64k".into()]);
    let image = open_rw(&path);
    image.snapshot_create(b"s", &Meta::now()).unwrap();
    image.write_at(&vec![2; 1 << 20], 0, WriteFlags::default()).unwrap();
    let mut expected = vec![7; 1 << 20];
    expected[64 << 10..128 << 10].fill(1);
    expected.resize(2 << 20, 0);
    assert_content(&image.snapshot_open(b"s").unwrap(), &expected);
}

/// As many clusters as the L1 table and the snapshot table need, in one piece, where
/// the free ones are here and there and refcount blocks are missing.
#[test]
fn tables_of_many_clusters_find_a_place() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    // 2^13 entries in 128 clusters; one refcount block counts 64.
    qemu_create(&path, "cluster_size=512,refcount_bits=64", 256 << 20);
    let image = open_rw(&path);
    for n in 0..200u64 {
        image.write_at(&[1; 512], n * 512, WriteFlags::default()).unwrap();
    }
    for n in (0..200u64).filter(|n| n % 3 == 0) {
        image.discard(n * 512, 512).unwrap();
    }
    for n in 0..40 {
        let name = format!("a rather long name, so that the table needs clusters: {n}");
        image.snapshot_create(name.as_bytes(), &Meta::now()).unwrap();
    }
    image.snapshot_apply(b"7").unwrap();
    for id in (1..=40).filter(|id| id % 2 == 0) {
        image.snapshot_delete(id.to_string().as_bytes()).unwrap();
    }
    image.close().unwrap();
    qemu_img_check(&path);
    assert_exact(&path);
    assert_eq!(listed_by_qemu(&path).len(), 20);
}

#[test]
fn a_request_in_flight_keeps_others_out() {
    use qcow2rs::{Queue, QueueOptions};
    let scratch = Scratch::new();
    let path = written(&scratch, "");
    let image = std::sync::Arc::new(open_rw(&path));
    let queue = Queue::new(&image, &QueueOptions::default()).unwrap();
    queue.write(vec![5; 4096], 0, WriteFlags::default(), 1).unwrap();
    assert_eq!(image.snapshot_create(b"s", &Meta::now()).unwrap_err().kind(), ErrorKind::Busy);
    drop(queue);
    image.snapshot_create(b"s", &Meta::now()).unwrap();
    image.close().unwrap();
}
