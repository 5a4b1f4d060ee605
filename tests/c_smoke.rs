//! A C program against what cargo builds, without meson.

mod built;

use std::path::Path;
use std::process::Command;

/// What a static library of Rust's needs from the system.
const SYSTEM: [&str; 6] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

/// The C compiler, as a build script would call it.
fn cc() -> Command {
    let target = env!("QCOW2RS_TARGET");
    let mut build = cc::Build::new();
    build.target(target).host(target).opt_level(1).cargo_metadata(false);
    build.std("c11").warnings(true).extra_warnings(true).warnings_into_errors(true);
    build.include(built::root().join("include")).get_compiler().to_command()
}

fn compile(source: &str, program: &Path, link: &[&str]) {
    let mut command = cc();
    command.arg(built::root().join(source)).args(link).arg("-o").arg(program);
    built::run(&mut command);
}

#[test]
fn a_c_program_runs_with_the_static_library() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("smoke");
    let library = built::libraries().join("libqcow2rs.a");
    let link: Vec<&str> = [library.to_str().unwrap()].into_iter().chain(SYSTEM).collect();
    compile("c-tests/smoke.c", &program, &link);
    let printed = built::run(&mut Command::new(&program));
    assert_eq!(printed.trim_end(), env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_c_program_runs_with_the_shared_library() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("smoke");
    let library = built::libraries().join("libqcow2rs.so");
    compile("c-tests/smoke.c", &program, &[library.to_str().unwrap()]);
    // The program asks for the soname.
    let (major, minor) = (env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"));
    let abi = if major == "0" { format!("0.{minor}") } else { major.to_owned() };
    let soname = dir.path().join(format!("libqcow2rs.so.{abi}"));
    std::os::unix::fs::symlink(library, soname).unwrap();
    let printed = built::run(Command::new(&program).env("LD_LIBRARY_PATH", dir.path()));
    assert_eq!(printed.trim_end(), env!("CARGO_PKG_VERSION"));
}

#[test]
fn the_shared_library_exports_the_api_and_nothing_else() {
    let library = built::libraries().join("libqcow2rs.so");
    let symbols = built::run(Command::new("nm").args(["-D", "--defined-only"]).arg(library));
    let mut names: Vec<&str> =
        symbols.lines().filter_map(|line| line.split_whitespace().last()).collect();
    names.sort_unstable();
    let expected: Vec<String> = built::exports().into_iter().collect();
    assert_eq!(names, expected);
}
