//! Images handed to QEMU's tools: to be checked, to have leaks given back, to be
//! written to, and taken back.

use std::path::Path;

use qcow2rs::io::sim::{FileOptions, SimDisk};

use super::imagecheck::{self, Report};
use super::inspect;
use super::life::Life;
use super::oracle::{SECTOR, Word};
use super::qemu;
use super::report::{Failure, Trouble};

const FILES: [&str; 4] = ["image", "base", "data", "snapshot"];

/// Puts the files of a disk into a directory.
fn dump(disk: &SimDisk, dir: &Path) -> Result<(), String> {
    let dumped: std::io::Result<()> = FILES
        .into_iter()
        .try_for_each(|name| disk.file(name).map_or(Ok(()), |file| file.dump(&dir.join(name))));
    dumped.map_err(|error| error.to_string())
}

/// A disk with the files of a directory.
fn load(like: &SimDisk, seed: u64, dir: &Path) -> Result<SimDisk, String> {
    let disk = SimDisk::new(seed);
    for name in FILES {
        let Some(file) = like.file(name) else { continue };
        let options: FileOptions = file.options();
        let loaded = disk.load(name, options, &dir.join(name));
        loaded.map_err(|error| error.to_string())?;
    }
    Ok(disk)
}

impl Life<'_> {
    /// I10: `qemu-img check` finds what our check finds, and can give leaks back
    /// without changing anything that a guest sees.
    pub fn ask_qemu(&self, report: &Report) -> Result<(), String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        dump(&self.disk, dir.path())?;
        let path = dir.path().join("image");
        let (verdict, said) = qemu::check(&path);
        self.tally(|tally| tally.qemu_checks += 1);
        let found = (verdict.corruptions, verdict.errors, verdict.leaks);
        if report.dirty {
            qemu::repair(&path);
        } else if found != (0, 0, report.leaks_inside) {
            return Err(format!("I10: {report:#?}, but qemu-img check: {said}"));
        } else if report.leaks_inside == 0 {
            return Ok(());
        } else {
            qemu::run(dir.path(), "qemu-img check -q -r leaks -f qcow2 image");
        }
        let repaired = load(&self.disk, 0, dir.path())?;
        let after = imagecheck::check(&*repaired.file("image").expect("there is an image"));
        if !after.faults().is_empty() || after.leaks_inside > 0 {
            return Err(format!("I10: after qemu-img check -r: {after:#?}"));
        }
        inspect::second_opinion(&repaired, &inspect::content(&self.disk)?)
    }

    /// I11: QEMU writes to the image that was closed, and life goes on.
    pub fn hand_over(&self) -> Result<(), Trouble> {
        let mut rng = self.rng.borrow_mut().fork();
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        dump(&self.disk, dir.path())?;
        let oracle = self.oracle.borrow().clone();
        let content = inspect::content(&self.disk)?;
        let mut words: Vec<Word> = oracle.judge_crash(&content, self.config().mode)?.words;
        let sectors = words.len() as u64;
        let mut commands = Vec::new();
        for _ in 0..6 {
            let start = rng.below(sectors);
            let len = rng.between(1, 3 * self.config().kind.cluster / SECTOR).min(sectors - start);
            let (byte, zeroes) = (rng.between(1, 254), rng.chance(1, 4));
            let (what, value) = match zeroes {
                true => ("write -z".to_owned(), 0),
                false => (format!("write -P {byte}"), byte * 0x0101_0101_0101_0101),
            };
            commands.push(format!("{what} {} {}", start * SECTOR, len * SECTOR));
            words[start as usize..(start + len) as usize].fill(value);
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu::io(dir.path(), "image", &commands);
        self.tally(|tally| tally.handovers += 1);
        let disk = load(&self.disk, rng.next_u64(), dir.path())?;
        disk.note(format!("back from qemu-io {commands:?}"));
        let later = self.scenario.live(disk, oracle.recovered(words), None, 0, &mut rng);
        later.map_err(|failure| {
            let what = format!("I11: after QEMU wrote to it: {}", failure.what);
            Trouble::Later(Failure { what, ..failure })
        })
    }
}
