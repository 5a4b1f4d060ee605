//! An image of any kind, damaged or not, and any changes of its snapshots, all decoded
//! from the input. What a check finds nothing wrong with has to behave: the disk and
//! each snapshot hold what they are to hold, and in the end the check finds nothing
//! again. What is damaged may be refused.
#![no_main]

use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};
use qcow2rs::snapshots::Meta;
use qcow2rs::{ErrorKind, Image, WriteFlags};
use qcow2rs_fuzz::bounds::{REQUEST, bounded, is_expected, open, options};
use qcow2rs_fuzz::images::{IMAGES, KINDS};
use qcow2rs_fuzz::support::Bytes;
use qcow2rs_fuzz::support::damage::{Choices, damage, targets};
use qcow2rs_fuzz::support::dissect::Dissected;
use qcow2rs_fuzz::support::memory_disk::MemoryDisk;

/// Changes for one input.
const STEPS: usize = 16;
/// Larger disks are not followed.
const LARGEST: u64 = 1 << 20;

fn is_sound(disk: &MemoryDisk) -> bool {
    let mut options = options(false, false);
    options.check_only = true;
    let Some(image) = open(disk, &options) else { return false };
    let (result, done) = bounded(disk, || image.check(&mut ()));
    done.is_ok() && result.corruptions + result.check_errors == 0
}

fn content(image: &Image) -> qcow2rs::Result<Vec<u8>> {
    let mut all = vec![0; image.size() as usize];
    for (index, piece) in all.chunks_mut(REQUEST as usize).enumerate() {
        image.read_at(piece, index as u64 * REQUEST)?;
    }
    Ok(all)
}

/// The disk, and the snapshots by their names.
struct Model {
    active: Vec<u8>,
    snapshots: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Model {
    fn of(image: &Image) -> Option<Model> {
        let mut snapshots = Vec::new();
        for index in 0..image.snapshot_count().ok()? {
            let info = image.snapshot(index).ok()?;
            if info.virtual_size > LARGEST || snapshots.len() > 4 {
                return None;
            }
            snapshots.push((info.name, content(&image.snapshot_open(&info.id).ok()?).ok()?));
        }
        Some(Model { active: content(image).ok()?, snapshots })
    }

    fn assert_is(&self, image: &Image) {
        let now = Model::of(image).expect("nothing was wrong with the image");
        assert!(now.active == self.active, "the disk");
        assert!(now.snapshots == self.snapshots, "the snapshots");
    }
}

/// What may be answered to changes that nothing is wrong with.
fn is_refusal(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound
            | ErrorKind::Exists
            | ErrorKind::InvalidArgument
            | ErrorKind::NotSupported
            | ErrorKind::Limit
            | ErrorKind::NoSpace
            | ErrorKind::Callback(28)
    )
}

/// Does what the next bytes of the input say; whether it was done.
fn step(image: &Image, disk: &MemoryDisk, choices: &mut Bytes<'_>, model: &mut Option<Model>) {
    let name = [b"a".to_vec(), b"b".to_vec(), b"1".to_vec(), b"s".to_vec()];
    let name = name[choices.below(4) as usize].clone();
    let what = choices.below(8);
    let list = model.as_ref().map(|model| &model.snapshots);
    // By ID first, as the driver looks for them.
    let place = list.and_then(|_| {
        let infos = (0..image.snapshot_count().ok()?).filter_map(|n| image.snapshot(n).ok());
        let infos: Vec<_> = infos.collect();
        let by_id = infos.iter().position(|info| info.id == name);
        by_id.or_else(|| infos.iter().position(|info| info.name == name))
    });
    let vm_state_size = choices.below(2) * 4096;
    let at = choices.below(image.size().saturating_sub(511).max(1));
    let done = bounded(disk, || match what {
        0 | 1 => {
            let meta = Meta { vm_state_size, ..Meta::default() };
            image.snapshot_create(&name, &meta).map(drop)
        }
        2 => image.snapshot_apply(&name),
        3 => image.snapshot_delete(&name),
        4 => image.snapshot_rename(&name, b"renamed"),
        5 => image.write_vm_state(&[0x77; 5000], at),
        6 => image.snapshot_open(&name).and_then(|snapshot| {
            snapshot.read_at(&mut [0; 512], at.min(snapshot.size().saturating_sub(512)))
        }),
        _ => image.write_at(&[0x55; 512], at, WriteFlags::default()),
    });
    let Some(model) = model else {
        if let Err(error) = &done {
            assert!(is_expected(error.kind()) || is_refusal(error.kind()), "{error:?}");
        }
        return;
    };
    match (done, what) {
        (Err(error), _) => assert!(is_refusal(error.kind()), "{error:?}"),
        (Ok(()), 0 | 1) => model.snapshots.push((name, model.active.clone())),
        (Ok(()), 2) => model.active = model.snapshots[place.expect("it was found")].1.clone(),
        (Ok(()), 3) => drop(model.snapshots.remove(place.expect("it was found"))),
        (Ok(()), 4) => model.snapshots[place.expect("it was found")].0 = b"renamed".to_vec(),
        (Ok(()), 5 | 6) => {}
        (Ok(()), _) => model.active[at as usize..][..512].fill(0x55),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Bytes(Unstructured::new(data));
    let mut image = Dissected::of(IMAGES[choices.below(KINDS.len() as u64) as usize].clone());
    let places = targets(&image);
    for _ in 0..choices.below(4) {
        damage(&mut image, &places, &mut choices);
    }
    let disk = MemoryDisk::new(&image.bytes);
    let sound = is_sound(&disk);
    let Some(image) = open(&disk, &options(true, choices.below(2) == 1)) else { return };
    let mut model = if sound && image.size() <= LARGEST { Model::of(&image) } else { None };
    for _ in 0..STEPS {
        if choices.0.is_empty() {
            break;
        }
        step(&image, &disk, &mut choices, &mut model);
    }
    if let Some(model) = &model {
        model.assert_is(&image);
        image.close().expect("nothing was wrong with the image");
        assert!(is_sound(&disk), "a sound image became unsound");
    }
});
