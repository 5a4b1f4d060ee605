//! The Rust examples, run as a newcomer runs them. (Those in C: `c-tests/examples.py`.)

mod support;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use support::{Rng, Scratch, qemu_img_check, qemu_ok, text};

/// Runs an example. cargo has built it together with this test, or does so now.
fn run(name: &str, args: &[&OsStr]) -> Output {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--locked", "--example", name, "--target-dir"]).arg(target);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("--").args(args).output().unwrap()
}

/// What it writes to standard output; it must succeed.
fn run_ok(name: &str, args: &[&OsStr]) -> Vec<u8> {
    let output = run(name, args);
    assert!(output.status.success(), "{name} {args:?}: {output:?}");
    output.stdout
}

/// What it writes to standard error; it must fail, with nothing on standard output.
fn run_err(name: &str, args: &[&OsStr], status: i32) -> String {
    let output = run(name, args);
    assert_eq!(output.status.code(), Some(status), "{name} {args:?}: {output:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn an_overlay_is_written_and_a_chain_comes_out_whole() {
    let scratch = Scratch::new();
    let [base, overlay, top, raw] =
        ["base", "overlay", "top", "raw"].map(|name| scratch.path(name));
    let mut bytes = vec![0; 5 << 19]; // twenty clusters
    Rng::new(1).fill(&mut bytes);
    fs::write(&base, &bytes).unwrap();

    let said = run_ok("overlay", &[base.as_os_str(), overlay.as_os_str()]);
    assert_eq!(String::from_utf8(said).unwrap(), "20 writes, 0 bytes copied\n");
    qemu_img_check(&overlay);

    qemu_ok(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&overlay), text(&top)],
    );
    support::qemu_io(&top, &["write -P 7 1M 5k".into()]);
    qemu_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&top), text(&raw)]);
    let whole = run_ok("cat", &[top.as_os_str()]);
    support::assert_same(&whole, &fs::read(&raw).unwrap());
    assert_ne!(whole, bytes);
}

#[test]
fn wrong_calls_say_how_and_wrong_files_say_which() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing");
    let there = scratch.path("there");
    fs::write(&there, "something").unwrap();
    let (missing, there) = (missing.as_os_str(), there.as_os_str());

    assert!(run_err("overlay", &[], 2).starts_with("usage: overlay "));
    assert!(run_err("overlay", &[there], 2).starts_with("usage: overlay "));
    assert!(run_err("cat", &[], 2).starts_with("usage: cat "));
    assert!(run_err("cat", &[there, there], 2).starts_with("usage: cat "));

    for (name, args) in [("overlay", [missing, missing].as_slice()), ("cat", &[missing])] {
        let said = run_err(name, args, 1);
        assert!(said.contains(missing.to_str().unwrap()), "{said}");
        assert!(said.contains("No such file"), "{said}");
    }
    // What is there already is not overwritten.
    run_err("overlay", &[there, there], 1);
    assert_eq!(fs::read_to_string(there).unwrap(), "something");
}

#[test]
fn a_queue_scans_a_disk_into_aligned_buffers() {
    // Where there is direct I/O.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("image");
    // The end is no multiple of a piece.
    let size = (3 << 20) + 5 * 512;
    qemu_ok("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), &size.to_string()]);
    support::qemu_io(&path, &["write -P 7 60k 1M".into(), "write -P 8 3M 1k".into()]);
    let said = run_ok("scan", &[path.as_os_str()]);
    let zeroes = size - (1 << 20) - 1024;
    assert_eq!(String::from_utf8(said).unwrap(), format!("{zeroes} bytes are zero\n"));
    assert!(run_err("scan", &[], 2).starts_with("usage: scan "));
    let missing = directory.path().join("missing");
    assert!(run_err("scan", &[missing.as_os_str()], 1).contains("No such file"));
}
