//! What a data file may be, and who decides: the name comes from the image.

use std::path::Path;
use std::sync::{Arc, Mutex};

use qcow2rs::{
    AmendOptions, CreateOptions, Error, ErrorKind, Format, Image, OpenOptions, Policy, Reference,
    ReferenceKind, Resolver, Result, Source,
};

use crate::support::operations::{Backing, Case};
use crate::support::{
    Scratch, assert_content, open_rw, qemu, qemu_create, qemu_img_check, qemu_ok, text,
};
use crate::{Data, create_options, data_of, open_with, we_make};

const CASE: Case = Case {
    version: 3,
    cluster_size: 65536,
    extended_l2: false,
    refcount_bits: 16,
    size: 1 << 20,
    backing: Backing::None,
};

fn kind(opened: Result<Image>) -> (ErrorKind, String) {
    let error = opened.map(drop).unwrap_err();
    (error.kind(), error.to_string())
}

fn writable() -> OpenOptions {
    OpenOptions::new().policy(Policy::Paths).writable(true)
}

#[test]
fn nothing_is_opened_unless_the_policy_says_so() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    we_make(&path, &CASE, Data::Plain);
    std::fs::remove_file(data_of(&path)).unwrap();
    let (denied, message) = kind(open_with(&path, Policy::Deny));
    assert_eq!(denied, ErrorKind::Policy);
    assert!(message.contains("image.data"), "{message}");
    let (missing, message) = kind(open_with(&path, Policy::Paths));
    assert_eq!(missing, ErrorKind::DataFile(libc::ENOENT));
    assert!(message.contains("image.data"), "{message}");
    // A check has no need of it.
    let mut check = OpenOptions::new();
    check.check_only = true;
    let image = Image::open(Source::path(&path), &check).unwrap();
    assert_eq!(image.check(&mut ()).0.total_clusters, 16);
    assert!(image.info_json().unwrap().contains("image.data"));
}

/// Tells what it is asked, and answers with a file.
struct Program {
    asked: Mutex<Vec<Reference>>,
    answer: Arc<Source>,
    format: Option<Format>,
}

impl Resolver for Program {
    fn resolve(
        &self,
        reference: &Reference,
        format: Option<Format>,
    ) -> Result<(Arc<Source>, Option<Format>)> {
        assert_eq!(format, None, "no format is stored for a data file");
        self.asked.lock().unwrap().push(reference.clone());
        match self.format {
            Some(Format::Raw) | None => Ok((self.answer.clone(), self.format)),
            Some(Format::Qcow2) => Err(Error::new(ErrorKind::Policy, "no")),
        }
    }
}

#[test]
fn the_program_may_choose_another_file() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    we_make(&path, &CASE, Data::Raw);
    let other = scratch.path("other");
    std::fs::write(&other, vec![7; 1 << 20]).unwrap();
    std::fs::remove_file(data_of(&path)).unwrap();
    for (format, refused) in
        [(None, false), (Some(Format::Raw), false), (Some(Format::Qcow2), true)]
    {
        let answer = Source::path(&other);
        let program = Arc::new(Program { asked: Mutex::default(), answer, format });
        let opened = open_with(&path, Policy::Resolve(program.clone()));
        match refused {
            true => assert_eq!(kind(opened).0, ErrorKind::Policy),
            false => assert_content(&opened.unwrap(), &vec![7; 1 << 20]),
        }
        let asked = program.asked.lock().unwrap();
        let [reference] = &asked[..] else { panic!("{asked:?}") };
        assert_eq!((reference.kind, reference.depth), (ReferenceKind::Data, 0));
        assert_eq!(reference.name, text(&data_of(&path)).as_bytes());
        assert!(!reference.writable);
    }
}

#[test]
fn a_data_file_is_no_other_file_of_the_chain() {
    let scratch = Scratch::new();
    let (path, alias) = (scratch.path("image"), scratch.path("alias"));
    we_make(&path, &CASE, Data::Plain);
    // Its own image, by another name.
    std::fs::remove_file(data_of(&path)).unwrap();
    std::fs::hard_link(&path, data_of(&path)).unwrap();
    for options in [writable(), OpenOptions::new().policy(Policy::Paths)] {
        let before = std::fs::read(&path).unwrap();
        let opened = Image::open(Source::path(&path), &options);
        let (kind, message) = kind(opened);
        assert_eq!(kind, ErrorKind::ChainDepth, "{message}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
    // The backing file of an image whose data it is, too.
    let mut options = create_options(&alias, &CASE, Data::Plain);
    options.backing = Some((text(&data_of(&alias)).into(), Format::Raw));
    qcow2rs::create_path(&alias, true, &options, &OpenOptions::new()).unwrap();
    assert_eq!(kind(open_with(&alias, Policy::Paths)).0, ErrorKind::ChainDepth);
}

#[test]
fn locks_are_those_of_qemu() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    we_make(&path, &CASE, Data::Plain);
    let data = data_of(&path);
    let other = scratch.path("other");
    we_make(&other, &CASE, Data::Plain);
    let mut shared = std::fs::read(&other).unwrap();
    let name = text(&data_of(&other)).to_owned();
    assert_eq!(name.len(), text(&data).len());
    let at = shared.windows(name.len()).position(|bytes| bytes == name.as_bytes()).unwrap();
    shared[at..at + name.len()].copy_from_slice(text(&data).as_bytes());
    std::fs::write(&other, shared).unwrap();
    let qemu_opens = |image: &Path, mode: &str| {
        let args = [mode, "-f", "qcow2", "-c", "read -q 0 4k", text(image)];
        let args: Vec<&str> = args.into_iter().filter(|arg| !arg.is_empty()).collect();
        qemu("qemu-io", &args).status.success()
    };
    let held = || {
        let file = std::fs::File::open(&data).unwrap();
        locked_bytes(&file)
    };
    // The second image has the same data file: both may read, one may write.
    let image = Image::open(Source::path(&path), &writable()).unwrap();
    assert_eq!(held(), [100, 101, 103, 203]);
    assert!(!qemu_opens(&other, "") && !qemu_opens(&other, "-r"));
    let (kind, _) = kind(Image::open(Source::path(&other), &writable()));
    assert_eq!(kind, ErrorKind::DataFile(libc::EAGAIN));
    image.reopen(false, true).unwrap();
    assert_eq!(held(), [100, 203]);
    assert!(qemu_opens(&other, "-r") && !qemu_opens(&other, ""));
    image.reopen(true, true).unwrap();
    assert_eq!(held(), [100, 101, 103, 203]);
    image.close().unwrap();
    assert_eq!(held(), [0u8; 0]);
}

/// The bytes from 100 on that somebody else holds a lock on.
fn locked_bytes(file: &std::fs::File) -> Vec<u8> {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{} ", file.metadata().unwrap().ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let mut bytes: Vec<u8> = locks
        .lines()
        .filter(|line| line.contains("OFDLCK") && line.contains(&inode))
        .flat_map(|line| {
            let mut range = line.rsplit(' ').take(2).map(|word| word.parse::<u8>().unwrap());
            let (end, start) = (range.next().unwrap(), range.next().unwrap());
            start..=end
        })
        .collect();
    bytes.sort_unstable();
    bytes
}

#[test]
fn what_qemu_refuses_to_create_is_refused() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let refused = |change: &dyn Fn(&mut CreateOptions), expected: &str| {
        let mut options = create_options(&path, &CASE, Data::Plain);
        change(&mut options);
        let made = qcow2rs::create_path(&path, true, &options, &OpenOptions::new());
        let error = made.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!path.exists());
        assert_eq!(std::fs::read(data_of(&path)).unwrap(), b"what was there before");
    };
    refused(&|options| options.version = 2, "version 3");
    refused(&|options| (options.data_file, options.data_file_raw) = (None, true), "data_file_raw");
    refused(
        &|options| {
            options.backing = Some((b"base".to_vec(), Format::Raw));
            options.data_file_raw = true;
        },
        "backing",
    );
    let own = Some((text(&path).into(), Source::path(&path)));
    std::fs::write(&path, b"precious").unwrap();
    for lock in [true, false] {
        let mut open = OpenOptions::new();
        open.lock = lock;
        let mut options = create_options(&path, &CASE, Data::Plain);
        options.data_file = own.clone();
        assert!(qcow2rs::create_path(&path, false, &options, &open).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}

#[test]
fn a_new_image_comes_open_with_the_storage_it_was_given() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for data in [Data::Plain, Data::Raw] {
        let options = create_options(&path, &CASE, data);
        // No policy allows the name, and none is asked.
        let image = qcow2rs::create_path_open(&path, false, &options, &OpenOptions::new()).unwrap();
        image.write_at(&[9; 4096], 65536, Default::default()).unwrap();
        image.close().unwrap();
        let bytes = std::fs::read(data_of(&path)).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        assert!(bytes[65536..65536 + 4096].iter().all(|byte| *byte == 9));
        assert!(bytes[..65536].iter().all(|byte| *byte == 0));
        let (required, full) = qcow2rs::measure(&options).unwrap();
        assert_eq!((required, full), (327_680, 1_376_256));
    }
}

#[test]
fn layers_of_a_chain_have_data_files_of_their_own() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base"), scratch.path("top"));
    qemu_create(&base, &format!("data_file={}", text(&data_of(&base))), 1 << 20);
    let image = open_rw(&base);
    image.write_at(&[3; 1 << 20], 0, Default::default()).unwrap();
    image.close().unwrap();
    let mut options = create_options(&top, &CASE, Data::Plain);
    options.backing = Some((b"base".to_vec(), Format::Qcow2));
    qcow2rs::create_path(&top, true, &options, &OpenOptions::new()).unwrap();
    let image = open_rw(&top);
    image.write_at(&[4; 100], 1000, Default::default()).unwrap();
    let mut expected = vec![3; 1 << 20];
    expected[1000..1100].fill(4);
    assert_content(&image, &expected);
    image.close().unwrap();
    std::fs::remove_file(data_of(&base)).unwrap();
    let (kind, message) = kind(open_with(&top, Policy::Paths));
    assert_eq!(kind, ErrorKind::DataFile(libc::ENOENT), "{message}");
}

fn amend(path: &Path, list: &[(&str, &str)]) -> Result<()> {
    let image = open_rw(path);
    let mut options = AmendOptions::default();
    list.iter().for_each(|(name, value)| options.set(name, value).unwrap());
    let done = image.amend(&options, &mut |_, _| true);
    image.close().unwrap();
    done
}

fn qemu_facts(path: &Path) -> (serde_json::Value, serde_json::Value) {
    let printed = qemu_ok("qemu-img", &["info", "-f", "qcow2", "--output=json", text(path)]);
    let info: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let data = &info["format-specific"]["data"];
    (data["data-file"].clone(), data["data-file-raw"].clone())
}

#[test]
fn the_stored_name_can_be_changed_and_the_file_may_cease_to_be_raw() {
    let scratch = Scratch::new();
    let (path, moved) = (scratch.path("image"), scratch.path("another name for it"));
    we_make(&path, &CASE, Data::Raw);
    let image = open_rw(&path);
    image.write_at(&[3; 4096], 65536, Default::default()).unwrap();
    image.close().unwrap();
    let before = std::fs::read(&path).unwrap();
    for refused in
        [[("data_file_raw", "on"), ("data_file", "a\0b")], [("data_file", "x"), ("compat", "0.10")]]
    {
        assert!(amend(&path, &refused).is_err(), "{refused:?}");
        assert!(std::fs::read(&path).unwrap() == before, "{refused:?}");
    }
    // As it is, it may be named.
    amend(&path, &[("data_file_raw", "on"), ("data_file", text(&data_of(&path)))]).unwrap();
    assert!(std::fs::read(&path).unwrap() == before);

    amend(&path, &[("data_file", text(&moved)), ("lazy_refcounts", "on")]).unwrap();
    std::fs::rename(data_of(&path), &moved).unwrap();
    assert_eq!(qemu_facts(&path), (text(&moved).into(), true.into()));
    let mut model = vec![0; CASE.size as usize];
    model[65536..65536 + 4096].fill(3);
    assert_content(&open_with(&path, Policy::Paths).unwrap(), &model);
    amend(&path, &[("data_file_raw", "off")]).unwrap();
    assert_eq!(qemu_facts(&path), (text(&moved).into(), false.into()));
    let again = amend(&path, &[("data_file_raw", "on")]).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::InvalidArgument);
    assert!(!qemu("qemu-img", &["amend", "-o", "data_file_raw=on", text(&path)]).status.success());
    qemu_img_check(&path);
    assert_content(&open_with(&path, Policy::Paths).unwrap(), &model);

    // Without data file there is nothing to be named, in QEMU neither.
    let plain = scratch.path("plain");
    qemu_create(&plain, "", 1 << 20);
    let none = amend(&plain, &[("data_file", "x")]).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::InvalidArgument);
    assert!(!qemu("qemu-img", &["amend", "-o", "data_file=x", text(&plain)]).status.success());
}

#[test]
fn the_caller_may_say_which_file_it_is() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    we_make(&path, &CASE, Data::Plain);
    let image = open_rw(&path);
    image.write_at(&[3; 4096], 0, Default::default()).unwrap();
    // No name is stored any more; those who have it open do not mind.
    let mut options = AmendOptions::default();
    options.set("data_file", "").unwrap();
    image.amend(&options, &mut |_, _| true).unwrap();
    image.write_at(&[4; 4096], 65536, Default::default()).unwrap();
    image.close().unwrap();
    assert_eq!(qemu_facts_of(&path, &data_of(&path)), serde_json::Value::Null);
    let (nameless, message) = kind(open_with(&path, Policy::Paths));
    assert_eq!(nameless, ErrorKind::DataFile(libc::EINVAL));
    assert!(message.contains("data-file.filename"), "{message}");

    // Whatever the policy: it is not the image that names the file.
    let mut named = OpenOptions::new();
    named.set("data-file.filename", text(&data_of(&path))).unwrap();
    let mut model = vec![0; CASE.size as usize];
    model[..4096].fill(3);
    model[65536..65536 + 4096].fill(4);
    let image = Image::open(Source::path(&path), &named).unwrap();
    assert_content(&image, &model);
    image.reopen(true, true).unwrap();
    image.write_at(&[5; 512], 0, Default::default()).unwrap();
    model[..512].fill(5);
    image.close().unwrap();
    // A program that resolves names is asked for what has none.
    let program = Arc::new(Program {
        asked: Mutex::default(),
        answer: Source::path(data_of(&path)),
        format: None,
    });
    let resolved = open_with(&path, Policy::Resolve(program.clone())).unwrap();
    assert_content(&resolved, &model);
    assert_eq!(program.asked.lock().unwrap()[0].name, b"");
    drop(resolved);

    // Another file than the one that is stored; and images that have none.
    amend_named(&path, &named, "nowhere");
    assert_content(&Image::open(Source::path(&path), &named).unwrap(), &model);
    let plain = scratch.path("plain");
    qemu_create(&plain, "", 1 << 20);
    assert_eq!(kind(Image::open(Source::path(&plain), &named)).0, ErrorKind::InvalidArgument);
    let raw = named.clone().format(Format::Raw);
    assert_eq!(kind(Image::open(Source::path(&plain), &raw)).0, ErrorKind::InvalidArgument);
    let given = format!(
        "driver=qcow2,file.filename={},data-file.driver=file,data-file.filename={}",
        text(&plain),
        text(&data_of(&path))
    );
    assert!(!qemu("qemu-io", &["-r", "--image-opts", &given, "-c", "read 0 512"]).status.success());
    // It is of the image that is opened, not of those below.
    let top = scratch.path("top");
    let mut options = CreateOptions::default();
    options.size = Some(CASE.size);
    options.backing = Some((text(&path).into(), Format::Qcow2));
    qcow2rs::create_path(&top, true, &options, &OpenOptions::new()).unwrap();
    let over = named.clone().policy(Policy::Paths);
    assert_eq!(kind(Image::open(Source::path(&top), &over)).0, ErrorKind::InvalidArgument);
}

/// The name that is stored, where QEMU has to be told which file it is.
fn qemu_facts_of(path: &Path, data: &Path) -> serde_json::Value {
    let options = format!(
        "driver=qcow2,file.filename={},data-file.driver=file,data-file.filename={}",
        text(path),
        text(data)
    );
    let args = ["info", "--output=json", "--image-opts", &options];
    let info: serde_json::Value = serde_json::from_str(&qemu_ok("qemu-img", &args)).unwrap();
    info["format-specific"]["data"]["data-file"].clone()
}

fn amend_named(path: &Path, open: &OpenOptions, name: &str) {
    let image = Image::open(Source::path(path), &open.clone().writable(true)).unwrap();
    let mut options = AmendOptions::default();
    options.set("data_file", name).unwrap();
    image.amend(&options, &mut |_, _| true).unwrap();
    image.close().unwrap();
}
