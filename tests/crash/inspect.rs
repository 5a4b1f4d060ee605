//! What an image must be like after a crash, whatever happened before: the
//! invariants I1 to I14 of docs/crash-simulation.md, those of them that can be seen
//! in an image or on its disk. What the format demands of tables and refcounts
//! (I2 to I8) is in `imagecheck`, whose findings name them.

use qcow2rs::CheckResult;
use qcow2rs::io::sim::{SimDisk, SimEngine, SimFile};

use super::imagecheck::{self, Report};
use super::layout::{Header, ReadAt, read_guest, read_guest_data};
use super::oracle::{Judged, Mode, Oracle, fill};
use super::scenario::{Config, Scenario, open_for_reading};
use super::snapshot::check_snapshot;
use super::whole::is_own;

/// The autoclear bit that says that a data file is a raw image.
const RAW: u64 = 2;

fn image(disk: &SimDisk) -> std::sync::Arc<SimFile> {
    disk.file("image").expect("there is an image")
}

/// Looks at what a crash of `before` has left, without opening it.
pub fn crash_image(
    scenario: &Scenario,
    before: &SimDisk,
    after: &SimDisk,
    oracle: &Oracle,
) -> Result<Judged, String> {
    i1_header(after)?;
    let bytes = image(after).bytes();
    i2_to_i8(&bytes, &scenario.config)?;
    check_snapshot(after)?;
    let (state, judged) = state(after, oracle, scenario.config.mode)?;
    if judged.foreign > 0 {
        scenario.tally.borrow_mut().parity += 1;
    }
    i1_autoclear(after, state, &judged)?;
    i13_backing(before, after)?;
    Ok(judged)
}

/// I1: the first sector is one that the driver wrote, or that was there at first.
pub fn i1_header(disk: &SimDisk) -> Result<(), String> {
    let file = image(disk);
    let mut now = [0; 512];
    file.peek(0, &mut now);
    match file.first_sectors().contains(&now) {
        true => Ok(()),
        false => Err("I1: the header is none that was ever written".to_owned()),
    }
}

/// I1: before anything changes that a guest can see, the bits that a writer must
/// clear are clear.
fn i1_autoclear(disk: &SimDisk, oracle: &Oracle, found: &Judged) -> Result<(), String> {
    let header = Header::read(&*image(disk))?;
    match header.autoclear & !RAW == 0 || oracle.is_as_opened(&found.words) {
        true => Ok(()),
        false => Err(format!("I1: autoclear bits {:#x} outlive a change", header.autoclear)),
    }
}

/// I2 to I8: tables and refcounts.
pub fn structure(disk: &SimDisk, config: &Config) -> Result<Report, String> {
    let report = i2_to_i8(&image(disk).bytes(), config)?;
    check_snapshot(disk)?;
    Ok(report)
}

fn i2_to_i8(bytes: &Vec<u8>, config: &Config) -> Result<Report, String> {
    let report = imagecheck::check(bytes);
    if report.dirty && !config.kind.lazy && !config.changes {
        return Err("I7: the dirty bit is set".to_owned());
    }
    let mut faults = report.faults();
    if report.dirty && !config.kind.lazy {
        // What excuses flags does not excuse refcounts.
        let mut clean = bytes.clone();
        clean[79] &= !1;
        faults = imagecheck::check(&clean).faults();
        faults.retain(|fault| !fault.starts_with("I5"));
    }
    if faults.is_empty() { Ok(report) } else { Err(format!("{faults:#?}")) }
}

/// I9: which state an image is in, of those that the oracle knows of: each sector holds
/// what it may hold, the disk is as long as that, and each snapshot shows what it has
/// always shown. Read with other code than the driver's.
pub fn state<'a>(
    disk: &SimDisk,
    oracle: &'a Oracle,
    mode: Mode,
) -> Result<(&'a Oracle, Judged), String> {
    let content = content(disk)?;
    let mut first = None;
    for state in oracle.states() {
        let judged = i9_length(&content, state)
            .and_then(|()| i9_snapshots(disk, state))
            .and_then(|()| i9_reads(&content, state, mode));
        match judged {
            Ok(judged) => return Ok((state, judged)),
            Err(what) => first = first.or(Some(what)),
        }
    }
    Err(first.unwrap_or_default())
}

/// Of an oracle that knows of a change under way, the state that there is.
pub fn known_state(disk: &SimDisk, oracle: &Oracle, mode: Mode) -> Result<Oracle, String> {
    if oracle.states().count() == 1 {
        return Ok(oracle.clone());
    }
    let (state, _) = state(disk, oracle, mode)?;
    Ok(state.after_change(false))
}

fn i9_length(content: &[u8], state: &Oracle) -> Result<(), String> {
    match content.len() as u64 == state.size() {
        true => Ok(()),
        false => Err(format!("I9: {} bytes are none of the sizes it had", content.len())),
    }
}

fn i9_snapshots(disk: &SimDisk, state: &Oracle) -> Result<(), String> {
    let file = image(disk);
    let header = Header::read(&*file)?;
    if header.snapshots.entries == 0 && state.snapshots().is_empty() {
        return Ok(());
    }
    let base = disk.file("base");
    let base = base.as_deref().map(|base| base as &dyn ReadAt);
    let (tables, _) = header.read_snapshots(&*file);
    let names = header.read_snapshot_names(&*file);
    let own: Vec<_> = names.iter().zip(tables).filter(|(name, _)| is_own(name)).collect();
    let known = state.snapshots();
    if !own.iter().map(|(name, _)| *name).eq(known.iter().map(|(name, _)| name)) {
        return Err(format!("I9: there are the snapshots {names:?}"));
    }
    for ((name, l1), (_, words)) in own.into_iter().zip(known) {
        let shown = fill(words.iter().copied());
        let size = shown.len() as u64;
        if read_guest(&*file, &Header { l1, size, ..header.clone() }, base) != shown {
            return Err(format!(
                "I9: the snapshot {:?} has changed",
                String::from_utf8_lossy(name)
            ));
        }
    }
    Ok(())
}

/// I9: each sector holds what it may hold. Read with other code than the driver's.
pub fn reads(disk: &SimDisk, oracle: &Oracle, mode: Mode) -> Result<Judged, String> {
    state(disk, oracle, mode).map(|(_, judged)| judged)
}

fn i9_reads(content: &[u8], oracle: &Oracle, mode: Mode) -> Result<Judged, String> {
    oracle.judge_crash(content, mode).map_err(|what| format!("I9: {what}"))
}

/// What the guest finds, read with other code than the driver's.
pub fn content(disk: &SimDisk) -> Result<Vec<u8>, String> {
    guest_content(&image(disk).bytes(), disk)
}

fn guest_content(bytes: &Vec<u8>, disk: &SimDisk) -> Result<Vec<u8>, String> {
    let header = Header::read(bytes)?;
    let base = disk.file("base");
    let base = base.as_deref().map(|base| base as &dyn ReadAt);
    let data = disk.file("data");
    let data = data.as_deref().map_or(bytes as &dyn ReadAt, |data| data as &dyn ReadAt);
    Ok(read_guest_data(bytes, data, &header, base))
}

/// I9: a data file that is a raw image holds what the guest finds.
pub fn raw_data(disk: &SimDisk, config: &Config, found: &[u8]) -> Result<(), String> {
    if !config.kind.raw {
        return Ok(());
    }
    let mut bytes = disk.file("data").map_or(Vec::new(), |data| data.bytes());
    if bytes.len() > found.len() {
        return Err("I12: the raw data file is longer than the disk".to_owned());
    }
    bytes.resize(found.len(), 0);
    match bytes.iter().zip(found).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("I9: the raw data file is not what the guest finds, at {at:#x}")),
    }
}

/// I9: the driver and other code find the same.
pub fn second_opinion(disk: &SimDisk, found: &[u8]) -> Result<(), String> {
    match content(disk)? == found {
        true => Ok(()),
        false => Err("I9: the image reads differently with other code".to_owned()),
    }
}

/// I10: the driver's own check finds what ours finds.
pub fn i10_own_check(scenario: &Scenario, disk: &SimDisk) -> Result<(), String> {
    let report = imagecheck::check(&image(disk).bytes());
    if report.dirty {
        return Ok(());
    }
    let mut found = CheckResult::default();
    let check = async {
        let image = open_for_reading(disk, &scenario.config).await?;
        image.check(&SimEngine, &mut (), &mut found).await
    };
    disk.block_on(check).map_err(|error| format!("I10: the driver's check: {error:?}"))?;
    scenario.tally.borrow_mut().own_checks += 1;
    let agreed = (found.corruptions, found.check_errors, found.leaks);
    match agreed == (0, 0, report.leaks_inside as u64) {
        true => Ok(()),
        false => Err(format!("I10: the driver's check finds {found:?}, ours {report:?}")),
    }
}

/// I12: a file grows by what is asked for and by what runs ahead of that, no more.
/// Each cluster that is changed takes at most its own place, a table's, and what
/// counts them; what it had before may be used again after the next flush only.
pub fn i12_length(
    file: &SimFile,
    config: &Config,
    at_open: u64,
    changed: u64,
) -> Result<(), String> {
    let cluster = config.kind.cluster;
    let ahead = (1 << 20).max(16 * cluster);
    let most = at_open + 3 * changed * cluster + 2 * ahead;
    match file.length() <= most {
        true => Ok(()),
        false => Err(format!(
            "I12: {:#x} bytes, of {at_open:#x} at open and {changed} clusters changed",
            file.length()
        )),
    }
}

/// I13: nothing has changed below.
pub fn i13_backing(before: &SimDisk, after: &SimDisk) -> Result<(), String> {
    match (before.file("base"), after.file("base")) {
        (Some(a), Some(b)) if !a.same_bytes(&b) => Err("I13: the backing file changed".to_owned()),
        _ => Ok(()),
    }
}

/// I13, I14: nothing was asked of the disk that must not be; if all is done,
/// nothing is in flight.
pub fn i14_operations(disk: &SimDisk, done: bool) -> Result<(), String> {
    let violations = disk.violations();
    if !violations.is_empty() {
        return Err(format!("I13, I14: operations that must not be: {violations:#?}"));
    }
    match disk.in_flight() {
        left if done && left > 0 => Err(format!("I14: {left} operations that nobody waits for")),
        _ => Ok(()),
    }
}
