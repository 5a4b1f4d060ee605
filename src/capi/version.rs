//! Version of the library

use std::ffi::{c_char, c_int};

/// Major version: 0 while the API may still change.
pub const QCOW2RS_VERSION_MAJOR: u32 = 0;
/// Minor version.
pub const QCOW2RS_VERSION_MINOR: u32 = 1;
/// Patch level.
pub const QCOW2RS_VERSION_PATCH: u32 = 0;

/// [MT][CB] Version of the library in use, as QCOW2RS_VERSION_NUMBER.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2rs_version_number() -> u32 {
    QCOW2RS_VERSION_MAJOR << 16 | QCOW2RS_VERSION_MINOR << 8 | QCOW2RS_VERSION_PATCH
}

/// [MT][CB] Version of the library in use, e.g. "0.1.0"; static storage.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2rs_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// [MT][CB] 1 if the build has the named feature, 0 if not or unknown.
/// Names: "zstd", "zlib", "luks", "io_uring", "direct-io", "ofd-locks".
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_has_feature(name: *const c_char) -> c_int {
    entry!(|call| {
        let present = match call.text(name, "name")? {
            "zlib" | "direct-io" | "ofd-locks" | "io_uring" | "luks" => 1,
            _ => 0,
        };
        Ok(present)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_version_of_the_package() {
        let text =
            format!("{QCOW2RS_VERSION_MAJOR}.{QCOW2RS_VERSION_MINOR}.{QCOW2RS_VERSION_PATCH}");
        assert_eq!(text, env!("CARGO_PKG_VERSION"));
    }
}
