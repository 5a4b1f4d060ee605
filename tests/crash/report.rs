//! What went wrong, told so that it can be understood and repeated.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2rs::io::sim::SimDisk;

use super::scenario::Scenario;

/// What went wrong, with all that is needed to see why.
#[derive(Clone)]
pub struct Failure {
    pub what: String,
    /// The disk that it was seen on, then those that it came from by crashes.
    pub disks: Vec<SimDisk>,
}

pub type Verdict = Result<(), Failure>;

impl Failure {
    pub fn on(disk: &SimDisk, what: String) -> Failure {
        Failure { what, disks: vec![disk.clone()] }
    }
}

/// Something went wrong in this life or in one that followed.
#[derive(Clone)]
pub enum Trouble {
    Here(String),
    Later(Failure),
}

impl From<String> for Trouble {
    fn from(what: String) -> Trouble {
        Trouble::Here(what)
    }
}

impl Scenario {
    /// Puts everything that helps into a directory; what to tell.
    pub fn report(&self, failure: &Failure) -> String {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{}", self.seed));
        let mut text = format!("{}\nseed {}, {:?}\n", failure.what, self.seed, self.config);
        for (index, disk) in failure.disks.iter().enumerate() {
            let (step, notes) = (disk.step(), disk.last_notes(4).join("; "));
            let _ = writeln!(text, "disk {index}, at step {step}; last: {notes}");
        }
        let keep = || {
            std::fs::create_dir_all(&dir)?;
            let mut story = text.clone();
            for (index, disk) in failure.disks.iter().enumerate() {
                let _ = write!(story, "\ndisk {index}\n{}", disk.journal());
                for name in ["image", "base"] {
                    if let Some(file) = disk.file(name) {
                        file.dump(&dir.join(format!("{name}.{index}")))?;
                    }
                }
            }
            std::fs::write(dir.join("story"), story)
        };
        let kept: std::io::Result<()> = keep();
        let _ = match kept {
            Ok(()) => writeln!(text, "images and what happened to them: {}", dir.display()),
            Err(error) => writeln!(text, "nothing could be kept: {error}"),
        };
        let thread = std::thread::current();
        let test = thread.name().unwrap_or_default();
        let mut settings = format!("QCOW2RS_SEED={}", self.seed);
        for name in ["QCOW2RS_ORACLE", "QCOW2RS_CRASH_MEDIUM"] {
            if let Ok(value) = std::env::var(name) {
                let _ = write!(settings, " {name}={value}");
            }
        }
        let _ = writeln!(text, "again: {settings} cargo test --test crash {test}");
        text
    }
}
