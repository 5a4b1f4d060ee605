//! The format against QEMU: images that qemu-img makes are read as it reads
//! them, written back byte for byte, and what it refuses is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use qcow2rs::format::bitmap::{AUTO, BitmapCluster, encode_directory, parse_directory};
use qcow2rs::format::compressed::inflate;
use qcow2rs::format::header::{Header, autoclear};
use qcow2rs::format::l2::{Cluster, L2Entry, L2Format};
use qcow2rs::format::limits::OFFSET_MASK;
use qcow2rs::format::refcount::RefcountWidth;
use qcow2rs::format::snapshot::{encode_table, parse_table};
use qcow2rs::format::subcluster::Subcluster;
use serde_json::Value;

/// Runs a program of QEMU's in a directory.
fn run(program: &str, directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.current_dir(directory).args(arguments).env("LC_ALL", "C");
    match command.output() {
        Ok(output) => output,
        Err(error) => panic!("{program} cannot be run: {error}; install the package qemu-utils"),
    }
}

/// A directory with a raw file `base.img` for images to stand on.
struct Scene {
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("base.img"), vec![0x5a; 1 << 20]).unwrap();
        Scene { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs a program, which must succeed, and returns what it prints.
    fn succeed(&self, program: &str, arguments: &[&str]) -> String {
        let output = run(program, self.directory.path(), arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {}: {errors}", arguments.join(" "));
        String::from_utf8(output.stdout).unwrap()
    }

    fn qemu_img(&self, arguments: &[&str]) -> String {
        self.succeed("qemu-img", arguments)
    }

    /// Lets QEMU write to an image.
    fn qemu_io(&self, name: &str, commands: &[&str]) {
        let mut arguments = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        arguments.push(name);
        let printed = self.succeed("qemu-io", &arguments);
        assert!(!printed.contains("failed"), "{printed}");
    }

    /// Creates an image; `rest` are the arguments behind its name.
    fn create(&self, name: &str, options: &str, rest: &[&str]) -> Vec<u8> {
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.push(name);
        arguments.extend(rest);
        self.qemu_img(&arguments);
        self.read(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn info(&self, name: &str) -> Value {
        let text = self.qemu_img(&["info", "-f", "qcow2", "--output=json", name]);
        serde_json::from_str(&text).unwrap()
    }
}

/// The first cluster of an image.
fn first_cluster(image: &[u8]) -> &[u8] {
    let wanted = Header::bytes_wanted(&image[..Header::READ_FIRST]).unwrap();
    &image[..wanted]
}

fn header_of(image: &[u8]) -> Header {
    Header::parse(first_cluster(image)).unwrap()
}

/// Big-endian 8-byte entries of a table.
fn words(image: &[u8], offset: u64, count: u64) -> Vec<u64> {
    image[offset as usize..][..count as usize * 8]
        .chunks(8)
        .map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
        .collect()
}

/// The L2 entry of a guest cluster; an empty one where there is no table.
fn l2_entry(image: &[u8], header: &Header, cluster: u64) -> L2Entry {
    let geometry = header.geometry;
    let l1 = header.l1_offset + 8 * (cluster >> geometry.l2_bits());
    let table = words(image, l1, 1)[0] & OFFSET_MASK;
    if table == 0 {
        return L2Entry::default();
    }
    let size = geometry.l2_entry_size();
    let index = cluster & ((1 << geometry.l2_bits()) - 1);
    let entry = words(image, table + index * size, size / 8);
    L2Entry { descriptor: entry[0], bitmap: entry.get(1).copied().unwrap_or(0) }
}

/// Reads the image's header as QEMU does, and writes it back unchanged.
fn agrees_with_qemu(scene: &Scene, name: &str) -> Header {
    let image = scene.read(name);
    let header = header_of(&image);
    assert!(header.to_bytes().unwrap() == first_cluster(&image), "{name} changes when rewritten");

    let info = scene.info(name);
    let data = &info["format-specific"]["data"];
    let text = |bytes: &[u8]| Value::from(String::from_utf8(bytes.to_vec()).unwrap());
    let backing = header.backing.as_ref();
    let format = backing.and_then(|backing| backing.format.as_deref());
    assert_eq!(info["virtual-size"], header.virtual_size());
    assert_eq!(info["cluster-size"], header.geometry.cluster_size());
    assert_eq!(info["dirty-flag"], header.dirty());
    assert_eq!(info["backing-filename"], backing.map_or(Value::Null, |it| text(&it.name)));
    assert_eq!(info["backing-filename-format"], format.map_or(Value::Null, text));
    assert_eq!(info["encrypted"] == true, header.crypt_method != 0);
    assert_eq!(data["compat"], if header.version == 2 { "0.10" } else { "1.1" });
    assert_eq!(data["refcount-bits"], header.refcount_bits());
    assert_eq!(data["compression-type"], if header.compression == 0 { "zlib" } else { "zstd" });
    if header.version == 3 {
        assert_eq!(data["lazy-refcounts"], header.lazy_refcounts());
        assert_eq!(data["extended-l2"], header.extended_l2());
        assert_eq!(data["corrupt"], header.corrupt());
    }
    let data_file = header.extensions.data_file.as_deref().map_or(Value::Null, text);
    assert_eq!(data["data-file"], data_file);
    assert_eq!(data["data-file-raw"] == true, header.raw_external_data());
    let snapshots = info["snapshots"].as_array().map_or(0, Vec::len);
    assert_eq!(snapshots, header.snapshot_count as usize);
    let bitmaps = data["bitmaps"].as_array().map_or(0, Vec::len);
    assert_eq!(bitmaps, header.extensions.bitmaps.map_or(0, |it| it.count as usize));
    header
}

#[test]
fn headers_of_all_kinds_agree() {
    let scene = Scene::new();
    let mut images = 0;
    for cluster_size in ["512", "4096", "8192", "16384", "65536", "2M"] {
        for variant in [
            "compat=0.10",
            "compat=1.1",
            "lazy_refcounts=on",
            "refcount_bits=1",
            "refcount_bits=8",
            "refcount_bits=64",
            "extended_l2=on",
            "extended_l2=on,lazy_refcounts=on,refcount_bits=32",
            "compression_type=zstd",
        ] {
            let small = ["512", "4096", "8192"].contains(&cluster_size);
            if small && variant.contains("extended_l2") {
                continue;
            }
            let options = format!("{variant},cluster_size={cluster_size}");
            for backing in [&["10000000"][..], &["-b", "base.img", "-F", "raw"]] {
                scene.create("image", &options, backing);
                agrees_with_qemu(&scene, "image");
                images += 1;
            }
        }
    }
    assert_eq!(images, 6 * 9 * 2 - 3 * 2 * 2);
}

#[test]
fn headers_with_more_around_them_agree() {
    let scene = Scene::new();
    scene.create("data", "data_file=data.raw,data_file_raw=on", &["1M"]);
    let data = agrees_with_qemu(&scene, "data");
    data.unsupported(false).unwrap();
    assert!(data.external_data_file());

    let secret = ["--object", "secret,id=key,data=secret"];
    let luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1";
    let create = ["create", "-q", "-f", "qcow2", "-o", luks, "luks", "1M"];
    scene.qemu_img(&[&create[..1], &secret, &create[1..]].concat());
    let luks = agrees_with_qemu(&scene, "luks");
    assert!(luks.extensions.crypto.is_some_and(|it| it.offset > 0 && it.length > 0));

    let longest = "x".repeat(1023);
    scene.create("long", "", &["-u", "-b", &longest, "-F", "qcow2", "1M"]);
    let long = agrees_with_qemu(&scene, "long");
    assert_eq!(long.backing.unwrap().name.len(), 1023);

    scene.qemu_img(&["rebase", "-u", "-b", "", "-f", "qcow2", "long"]);
    assert_eq!(agrees_with_qemu(&scene, "long").backing, None);

    scene.create("amended", "compat=0.10", &["1M"]);
    scene.qemu_img(&["amend", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=on", "amended"]);
    assert!(agrees_with_qemu(&scene, "amended").lazy_refcounts());

    scene.create("grown", "cluster_size=512", &["1M"]);
    scene.qemu_img(&["resize", "-q", "-f", "qcow2", "grown", "64M"]);
    scene.qemu_img(&["resize", "-q", "-f", "qcow2", "--shrink", "grown", "5M"]);
    let shrunk = agrees_with_qemu(&scene, "grown");
    assert!(u64::from(shrunk.l1_size) > shrunk.l1_entries_needed());
}

#[test]
fn what_we_keep_qemu_still_reads() {
    let scene = Scene::new();
    let mut image = scene.create("image", "", &["-b", "base.img", "-F", "raw"]);
    let mut header = header_of(&image);
    header.compatible |= 1 << 40;
    header.unknown_fields = (1..=13).collect();
    header.header_length = 125;
    header.extensions.unknown = vec![(0x1111_2222, vec![9; 5]), (0x3333_4444, vec![])];
    image[..65536].copy_from_slice(&header.to_bytes().unwrap());
    fs::write(scene.path("image"), &image).unwrap();
    assert_eq!(agrees_with_qemu(&scene, "image"), header);
    // QEMU rewrites the header and keeps all of it, though it turns the
    // extensions' order around.
    scene.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "qcow2", "image"]);
    let mut rewritten = header_of(&scene.read("image"));
    assert_eq!(rewritten.backing.take().unwrap().name, b"other");
    rewritten.extensions.unknown.reverse();
    header.backing = None;
    assert_eq!(rewritten, header);
}

/// Reasons for which QEMU refuses an image that lie behind the header: the
/// tables' content, which other modules read.
const BEHIND_THE_HEADER: [&str; 3] =
    ["Could not read snapshots", "snapshot table entry", "Could not initialize refcount handling"];

/// What is refused here though `qemu-img info` shows it: tables outside the
/// address space of the format, and a raw data file where there is no data
/// file, which QEMU itself refuses as soon as it would read data.
fn stricter(field: &str, value: u64) -> bool {
    (field.ends_with(" table offset") && value >= 1 << 56)
        || (field == "autoclear" && value & autoclear::RAW_EXTERNAL_DATA != 0)
}

/// Patches each field of the header with border values, and compares verdicts.
fn verdicts_agree(scene: &Scene, image: &[u8]) -> usize {
    let cluster = first_cluster(image).len() as u64;
    let wide: [(&str, usize, &[u64]); 8] = [
        ("backing offset", 8, &[0, 8, 104, 111, 112, 120, 200, cluster - 1, cluster, cluster + 1]),
        ("size", 24, &[0, 1, 511, 1 << 20, (1 << 20) + 1, 1 << 29, 1 << 40, 1 << 61, 1 << 62]),
        ("L1 table offset", 40, &[0, 512, 1, cluster, 1 << 40, 1 << 56, 1 << 62, 1 << 63]),
        ("refcount table offset", 48, &[0, 512, 1, 1 << 56, 1 << 62, 1 << 63]),
        ("snapshot table offset", 64, &[0, 512, 1, cluster, 1 << 56, 1 << 63]),
        ("incompatible", 72, &[0, 1, 2, 3, 4, 8, 16, 32, 1 << 63, u64::MAX]),
        ("compatible", 80, &[0, 1, 2, u64::MAX]),
        ("autoclear", 88, &[0, 1, 2, 4, u64::MAX]),
    ];
    let most_clusters = (8 << 20) / cluster;
    let narrow: [(&str, usize, &[u64]); 10] = [
        ("version", 4, &[0, 1, 2, 3, 4, u32::MAX as u64]),
        ("backing length", 16, &[0, 1, 380, 396, 400, 1023, 1024, u32::MAX as u64]),
        ("cluster bits", 20, &[0, 8, 9, 12, 21, 22, 31, 32, u32::MAX as u64]),
        ("encryption", 32, &[0, 2, 3, u32::MAX as u64]),
        ("L1 size", 36, &[0, 1, 2, 4 << 20, (4 << 20) + 1, u32::MAX as u64]),
        ("refcount table clusters", 56, &[0, 1, most_clusters, most_clusters + 1, 0xffff_ffff]),
        ("snapshots", 60, &[0, 1, 65536, 65537, u32::MAX as u64]),
        ("refcount order", 96, &[0, 3, 4, 6, 7, u32::MAX as u64]),
        ("header length", 100, &[0, 72, 103, 104, 105, 111, 113, 120, cluster, cluster + 1]),
        ("first extension's length", 116, &[0, 1, 15, 16, 17, 400, cluster, u32::MAX as u64]),
    ];
    let cases =
        wide.iter()
            .flat_map(|(name, at, values)| values.iter().map(move |value| (*name, *at, 8, *value)))
            .chain(narrow.iter().flat_map(|(name, at, values)| {
                values.iter().map(move |value| (*name, *at, 4, *value))
            }))
            .chain([0, 1, 2, 255].map(|value| ("compression type", 104, 1, value)));
    let (mut count, mut disagreements) = (0, Vec::new());
    for (name, at, length, value) in cases {
        let mut patched = image.to_vec();
        patched[at..at + length].copy_from_slice(&value.to_be_bytes()[8 - length..]);
        fs::write(scene.path("patched"), &patched).unwrap();
        // Room for whatever cluster size the patch says.
        patched.resize(patched.len().max(2 << 20), 0);
        let output = run("qemu-img", scene.directory.path(), &["info", "-f", "qcow2", "patched"]);
        let qemu_says = String::from_utf8_lossy(&output.stderr).into_owned();
        let ours = Header::parse(&patched);
        let agree = match (&ours, output.status.success()) {
            (Ok(_), true) | (Err(_), false) => true,
            (Ok(_), false) => BEHIND_THE_HEADER.iter().any(|reason| qemu_says.contains(reason)),
            (Err(_), true) => stricter(name, value),
        };
        if !agree {
            disagreements.push(format!("{name} = {value:#x}: we {ours:?}, QEMU {qemu_says:?}"));
        }
        count += 1;
    }
    assert!(disagreements.is_empty(), "{}", disagreements.join("\n"));
    count
}

#[test]
fn verdicts_agree_on_version_3() {
    let scene = Scene::new();
    let image = scene.create("image", "", &["-b", "base.img", "-F", "raw"]);
    assert!(verdicts_agree(&scene, &image) > 100);
}

#[test]
fn verdicts_agree_on_version_2() {
    let scene = Scene::new();
    let image = scene.create("image", "compat=0.10", &["-b", "base.img", "-F", "raw"]);
    assert!(verdicts_agree(&scene, &image) > 100);
}

#[test]
fn verdicts_agree_on_512_byte_clusters() {
    let scene = Scene::new();
    let image = scene.create("image", "cluster_size=512", &["1M"]);
    assert!(verdicts_agree(&scene, &image) > 100);
}

#[test]
fn verdicts_agree_on_extended_l2_entries() {
    let scene = Scene::new();
    let image = scene.create("image", "extended_l2=on,cluster_size=16k", &["1M"]);
    assert!(verdicts_agree(&scene, &image) > 100);
}

#[test]
fn snapshot_tables_agree() {
    let scene = Scene::new();
    for options in ["compat=0.10", "compat=1.1", "extended_l2=on"] {
        scene.create("image", options, &["3M"]);
        for name in ["one", "a rather longer name", "three"] {
            scene.qemu_img(&["snapshot", "-c", name, "image"]);
        }
        let header = agrees_with_qemu(&scene, "image");
        let image = scene.read("image");
        let table = &image[header.snapshots_offset as usize..];
        let (snapshots, used) = parse_table(table, header.snapshot_count).unwrap();
        let info = scene.info("image");
        for (ours, theirs) in snapshots.iter().zip(info["snapshots"].as_array().unwrap()) {
            assert_eq!(theirs["id"], String::from_utf8(ours.id.clone()).unwrap());
            assert_eq!(theirs["name"], String::from_utf8(ours.name.clone()).unwrap());
            assert_eq!(theirs["date-sec"], ours.date_sec);
            assert_eq!(theirs["date-nsec"], ours.date_nsec);
            assert_eq!(theirs["vm-state-size"], ours.vm_state_size);
            assert_eq!(theirs["icount"], ours.icount.map_or(Value::Null, Value::from));
            assert_eq!(ours.disk_size, Some(header.virtual_size()));
            ours.check_l1(header.geometry).unwrap();
        }
        assert_eq!(snapshots.len(), 3);
        assert_eq!(encode_table(&snapshots, 0).unwrap(), table[..used]);
    }
}

#[test]
fn bitmap_directories_agree() {
    let scene = Scene::new();
    scene.create("image", "", &["1G"]);
    scene.qemu_img(&["bitmap", "--add", "-g", "4096", "image", "fine"]);
    scene.qemu_img(&["bitmap", "--add", "--disable", "-g", "2M", "image", "coarse and off"]);
    let header = agrees_with_qemu(&scene, "image");
    let image = scene.read("image");
    let place = header.extensions.bitmaps.unwrap();
    let directory = &image[place.directory_offset as usize..][..place.directory_size as usize];
    let entries = parse_directory(directory, place.count).unwrap();
    assert_eq!(encode_directory(&entries).unwrap(), directory);
    let info = scene.info("image");
    let listed = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    assert_eq!(entries.len(), listed.len());
    for (ours, theirs) in entries.iter().zip(listed) {
        assert_eq!(theirs["name"], String::from_utf8(ours.name.clone()).unwrap());
        assert_eq!(theirs["granularity"], 1u64 << ours.granularity_bits);
        let auto = theirs["flags"].as_array().unwrap().contains(&"auto".into());
        assert_eq!(auto, ours.flags & AUTO != 0);
        ours.check(header.geometry, header.virtual_size()).unwrap();
        for entry in words(&image, ours.table_offset, ours.table_entries.into()) {
            let cluster = BitmapCluster::decode(entry, header.geometry).unwrap();
            assert_eq!(cluster.encode(), entry);
        }
    }
}

#[test]
fn refcounts_of_all_widths_agree() {
    let scene = Scene::new();
    for order in 0..=6u32 {
        for preallocation in ["off", "metadata"] {
            let options = format!("refcount_bits={},preallocation={preallocation}", 1 << order);
            let image = scene.create("image", &options, &["1M"]);
            let header = agrees_with_qemu(&scene, "image");
            let width = RefcountWidth::new(header.refcount_order).unwrap();
            let block = words(&image, header.reftable_offset, 1)[0] as usize;
            let block = &image[block..][..65536];
            // Every cluster of the file is in use once, and nothing behind it.
            let used = image.len().div_ceil(65536) as u64;
            for cluster in 0..width.entries_per(65536) {
                let expected = u64::from(cluster < used);
                assert_eq!(width.get_in(block, cluster), Some(expected), "{options}: {cluster}");
            }
        }
    }
}

#[test]
fn compressed_clusters_agree() {
    let scene = Scene::new();
    // Compressible, but no two clusters alike.
    let content: Vec<u8> = (0..1u32 << 18)
        .flat_map(|word| (word / 7).wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(scene.path("content"), &content).unwrap();
    for options in ["cluster_size=4k", "", "cluster_size=2M", "extended_l2=on"] {
        let mut arguments = vec!["convert", "-q", "-c", "-f", "raw", "-O", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend(["content", "image"]);
        scene.qemu_img(&arguments);
        let header = agrees_with_qemu(&scene, "image");
        let geometry = header.geometry;
        let image = scene.read("image");
        let mut found = 0;
        for (index, chunk) in content.chunks(geometry.cluster_size() as usize).enumerate() {
            let entry = l2_entry(&image, &header, index as u64);
            let format = L2Format { geometry, version: header.version, data_file: false };
            let Cluster::Compressed(place) = format.decode(entry).unwrap() else { continue };
            let end = (place.offset + place.length).min(image.len() as u64);
            let mut output = vec![0; geometry.cluster_size() as usize];
            inflate(&image[place.offset as usize..end as usize], &mut output).unwrap();
            assert!(output[..chunk.len()] == *chunk, "{options}: cluster {index}");
            assert!(output[chunk.len()..].iter().all(|byte| *byte == 0));
            found += 1;
        }
        assert_eq!(found, content.len().div_ceil(geometry.cluster_size() as usize));
    }
}

/// Compares each subcluster with `qemu-img map`, and each entry with what we
/// would write. Returns the kinds that were met.
fn mapping_agrees(scene: &Scene, name: &str) -> Vec<Subcluster> {
    let header = agrees_with_qemu(scene, name);
    let image = scene.read(name);
    let text = scene.qemu_img(&["map", "-f", "qcow2", "--output=json", name]);
    let map: Vec<Value> = serde_json::from_str(&text).unwrap();
    let format = L2Format {
        geometry: header.geometry,
        version: header.version,
        data_file: header.external_data_file(),
    };
    let size = header.geometry.subcluster_size();
    let backed = header.backing.is_some();
    let mut met = Vec::new();
    for start in (0..header.virtual_size()).step_by(size as usize) {
        let cluster = start >> header.geometry.cluster_bits;
        let entry = l2_entry(&image, &header, cluster);
        let decoded = format.decode(entry).unwrap();
        assert_eq!(format.encode(decoded), entry, "entry of cluster {cluster}");
        let in_cluster = header.geometry.in_cluster(start);
        let kind = decoded.subcluster((in_cluster / size) as u32);
        let covers = |extent: &&Value| {
            let first = extent["start"].as_u64().unwrap();
            (first..first + extent["length"].as_u64().unwrap()).contains(&start)
        };
        let extent = map.iter().find(covers).unwrap();
        let (data, zero, depth) = match kind {
            Subcluster::Normal | Subcluster::Compressed => (true, false, 0),
            Subcluster::Zero | Subcluster::ZeroReserved => (false, true, 0),
            Subcluster::Unallocated | Subcluster::Reserved if backed => (true, false, 1),
            Subcluster::Unallocated | Subcluster::Reserved => (false, true, 0),
        };
        let context = format!("{name}, {start:#x}: {kind:?}, {extent}");
        assert_eq!(extent["data"], data, "{context}");
        assert_eq!(extent["zero"], zero, "{context}");
        assert_eq!(extent["depth"], depth, "{context}");
        assert_eq!(extent["compressed"], kind == Subcluster::Compressed, "{context}");
        if let (Cluster::Standard { host, .. }, 0) = (decoded, depth) {
            let first = extent["start"].as_u64().unwrap();
            let offset = extent["offset"].as_u64().unwrap() + (start - first);
            assert_eq!(offset, host.get() + in_cluster, "{context}");
        }
        if !met.contains(&kind) {
            met.push(kind);
        }
    }
    met
}

#[test]
fn mappings_agree() {
    let scene = Scene::new();
    let commands = [
        "write -P 1 4k 2k",
        "write -P 2 20k 10k",
        "write -z 26k 2k",
        "write -P 3 128k 64k",
        "write -z 128k 64k",
        "write -P 4 192k 64k",
        "discard 192k 64k",
        "write -z 258k 4k",
        "write -c -P 5 320k 64k",
        "write -P 6 500k 100k",
        "write -z -u 576k 2k",
    ];
    for (options, extended) in [("", false), ("extended_l2=on", true)] {
        for backing in [&["1M"][..], &["-b", "base.img", "-F", "raw"]] {
            scene.create("image", options, backing);
            scene.qemu_io("image", &commands);
            let met = mapping_agrees(&scene, "image");
            use Subcluster::*;
            for kind in [Unallocated, Zero, ZeroReserved, Normal, Compressed] {
                assert!(met.contains(&kind), "{options}: {kind:?} was not met");
            }
            assert_eq!(met.contains(&Reserved), extended, "{options}");
        }
    }
}
