//! What tests of the built library need to know about where it was built.
#![allow(dead_code)] // Each test uses its part.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the source tree.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo has put the library in all its forms: next to this test.
pub fn libraries() -> PathBuf {
    let exe = std::env::current_exe().expect("the path of this test");
    exe.parent().expect("a directory").to_path_buf()
}

/// A file of the source tree.
pub fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The functions of the API: what include/qcow2rs.map exports.
pub fn exports() -> BTreeSet<String> {
    let map = read("include/qcow2rs.map");
    let names = map.lines().filter_map(|line| line.trim().strip_suffix(';'));
    names.filter(|name| name.starts_with("qcow2rs_")).map(str::to_owned).collect()
}

/// Runs a command that must succeed; its standard output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out
}
