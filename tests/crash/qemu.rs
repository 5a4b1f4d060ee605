//! Running QEMU's tools.

use std::ffi::OsString;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use super::support::aes;

/// What `qemu-img check` says of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub corruptions: usize,
    pub leaks: usize,
    /// Things that kept it from checking.
    pub errors: usize,
}

/// Runs a tool with arguments that contain no blanks; it must succeed.
pub fn run(dir: &Path, command: &str) -> String {
    let mut words = command.split_whitespace();
    let tool = words.next().unwrap();
    let output = Command::new(tool).args(words).current_dir(dir).output().expect(tool);
    succeeded(command, output)
}

/// Runs commands on an image with qemu-io, each with its blanks.
pub fn io(dir: &Path, image: &str, commands: &[&str]) -> String {
    let mut io = Command::new("qemu-io");
    io.current_dir(dir).args(["-f", "qcow2", "-t", "unsafe"]);
    for command in commands {
        io.args(["-c", command]);
    }
    let output = io.arg(image).output().expect("qemu-io");
    let text = succeeded(&format!("qemu-io {commands:?} {image}"), output);
    assert!(!text.contains("failed"), "{text}");
    text
}

fn succeeded(command: &str, output: Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {text}{errors}");
    text
}

/// The arguments that name an image, with its passphrase where it has one.
fn image(path: &Path) -> Vec<OsString> {
    let mut method = [0; 4];
    let file = std::fs::File::open(path).expect("the image is there");
    file.read_exact_at(&mut method, 32).expect("it has a header");
    if method == [0; 4] {
        return ["-f".into(), "qcow2".into(), path.into()].into();
    }
    let name = path.to_str().expect("its name is text");
    let secret = format!("secret,id=key,data={}", aes::PASSPHRASE);
    let image = format!("driver=qcow2,encrypt.key-secret=key,file.filename={name}");
    ["--object", &secret, "--image-opts", &image].map(OsString::from).into()
}

/// Has `qemu-img check` look at an image; also what it said.
pub fn check(path: &Path) -> (Verdict, String) {
    let mut check = Command::new("qemu-img");
    // Where a data file is looked for by QEMU.
    check.current_dir(path.parent().expect("it is in a directory"));
    check.args(["check", "--output=json"]).args(image(path));
    let output = check.output().expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stdout);
    let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let number = |key: &str| -> usize {
        let Some(at) = text.find(&format!("\"{key}\": ")) else { return 0 };
        let digits = text[at + key.len() + 4..].split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    };
    let verdict = Verdict {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        errors: number("check-errors"),
    };
    assert!(matches!(output.status.code(), Some(0 | 2 | 3)), "qemu-img check: {said}");
    (verdict, said)
}

/// Has QEMU repair an image, with nothing left to complain about.
pub fn repair(path: &Path) {
    let mut repair = Command::new("qemu-img");
    repair.current_dir(path.parent().expect("it is in a directory"));
    repair.args(["check", "-q", "-r", "all"]).args(image(path));
    succeeded("qemu-img check -r all", repair.output().expect("qemu-img"));
}

/// Whether QEMU's tools are there. They must be where QCOW2RS_NEED_QEMU is set.
pub fn available() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok()
        && Command::new("qemu-io").arg("--version").output().is_ok();
    assert!(found || std::env::var_os("QCOW2RS_NEED_QEMU").is_none(), "QEMU's tools are missing");
    found
}
