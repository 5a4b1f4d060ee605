//! Gives the shared library its soname and generates the C header.
//!
//! The header is committed (include/qcow2rs.h), so that C users, reviewers and
//! packagers need no generator: here it is only compared. Environment:
//! `QCOW2RS_UPDATE_HEADER=1` rewrites it, `QCOW2RS_SKIP_CBINDGEN=1` leaves it
//! alone altogether.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "src/build-aux/header.rs"]
mod header;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const HEADER: &str = "include/qcow2rs.h";

fn main() -> Result<()> {
    let root = PathBuf::from(env("CARGO_MANIFEST_DIR")?);
    println!("cargo:include={}", root.join("include").display());
    // For tests/c_smoke.rs.
    println!("cargo:rustc-env=QCOW2RS_TARGET={}", env("TARGET")?);
    link()?;

    for file in ["build.rs", "src/build-aux/header.rs", header::MODULES, header::FRAME, HEADER] {
        println!("cargo:rerun-if-changed={file}");
    }
    for name in ["QCOW2RS_UPDATE_HEADER", "QCOW2RS_SKIP_CBINDGEN"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    compare(&root)
}

/// The soname is that of meson.build: before 1.0, minor versions break the ABI.
fn link() -> Result<()> {
    let (major, minor) = (env("CARGO_PKG_VERSION_MAJOR")?, env("CARGO_PKG_VERSION_MINOR")?);
    let abi = if major == "0" { format!("0.{minor}") } else { major };
    if env("CARGO_CFG_TARGET_OS")? == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libqcow2rs.so.{abi}");
        // Destructors of thread-local values run late: our code must be there.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    Ok(())
}

/// Leaves the fresh header in OUT_DIR, where tests/header.rs finds it.
fn compare(root: &Path) -> Result<()> {
    let out = PathBuf::from(env("OUT_DIR")?).join("qcow2rs.h");
    if is_on("QCOW2RS_SKIP_CBINDGEN") {
        let _ = fs::remove_file(out);
        return Ok(());
    }
    let sources = header::sources(root)?;
    sources.iter().for_each(|file| println!("cargo:rerun-if-changed={}", file.display()));
    let fresh = header::generate(root, &sources, &env("CARGO_PKG_VERSION")?)?;
    fs::write(&out, &fresh)?;

    let committed = root.join(HEADER);
    if fs::read_to_string(&committed).is_ok_and(|text| text == fresh) {
        return Ok(());
    }
    if is_on("QCOW2RS_UPDATE_HEADER") {
        fs::write(&committed, &fresh)?;
    } else {
        println!("cargo:warning={HEADER} is out of date: build with QCOW2RS_UPDATE_HEADER=1");
    }
    Ok(())
}

fn is_on(name: &str) -> bool {
    std::env::var(name).is_ok_and(|value| value == "1")
}

fn env(name: &str) -> Result<String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}").into())
}
