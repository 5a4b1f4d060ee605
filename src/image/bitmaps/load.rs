//! Reading the persistent bitmaps of an image. The rules are QEMU's: what it refuses to
//! open is refused here where bitmaps are needed (an open for writing, or a question).

use std::sync::Arc;

use super::bits::Bits;
use super::{Bitmap, Bitmaps};
use crate::error::{Error, Result};
use crate::format::bitmap::{AUTO, BitmapCluster, BitmapEntry, IN_USE, parse_directory};
use crate::image::open::Budget;
use crate::image::qcow2::Qcow2;
use crate::io::engine::Engine;
use crate::metadata::tables::{read, read_table};

/// What one bitmap takes in memory besides its bits, its name twice included.
const EACH: u64 = 256;

/// The entries of the directory of bitmaps, each valid by itself and for this disk.
/// `Corrupt`; `Limit`.
pub async fn read_directory<E: Engine>(
    engine: &E,
    image: &Qcow2,
    budget: &mut Budget,
) -> Result<Vec<BitmapEntry>> {
    let (storage, geometry) = (&image.storage, image.geometry());
    let in_image = |error: Error| error.context(storage.name().to_owned());
    let Some(place) = &image.header.extensions.bitmaps else { return Ok(Vec::new()) };
    place.check_directory().map_err(in_image)?;
    // It is there twice while it is read, and its names are a third time.
    let bytes = 3 * place.directory_size + EACH * u64::from(place.count);
    budget.take(bytes, "the bitmap directory", storage.name())?;
    let bytes = read(engine, storage, place.directory_offset, place.directory_size as usize);
    let entries = parse_directory(&bytes.await?, place.count).map_err(in_image)?;
    for entry in &entries {
        entry.check(geometry, image.size).map_err(in_image)?;
    }
    Ok(entries)
}

/// Reads all bitmaps.
pub async fn load<E: Engine>(engine: &E, image: &Qcow2, budget: &mut Budget) -> Result<Bitmaps> {
    let mut bitmaps = Bitmaps { list: Vec::new(), place: image.header.extensions.bitmaps };
    for entry in read_directory(engine, image, budget).await? {
        let name = String::from_utf8_lossy(&entry.name).into_owned();
        let bitmap = load_one(engine, image, budget, &bitmaps, entry).await.map_err(|error| {
            error.context(format!("{}: the bitmap {name:?}", image.storage.name()))
        })?;
        bitmaps.list.push(bitmap);
    }
    Ok(bitmaps)
}

async fn load_one<E: Engine>(
    engine: &E,
    image: &Qcow2,
    budget: &mut Budget,
    others: &Bitmaps,
    entry: BitmapEntry,
) -> Result<Bitmap> {
    let (name, granularity_bits) = (entry.name.clone(), entry.granularity_bits);
    if name.contains(&0) {
        return Err(Error::corrupt("its name has a zero byte"));
    }
    let enabled = entry.flags & AUTO != 0;
    if entry.flags & IN_USE != 0 {
        let entry = Some(entry);
        return Ok(Bitmap { name, granularity_bits, enabled, bits: None, entry });
    }
    if others.find(&name).is_ok() {
        return Err(Error::corrupt("there is another one with this name"));
    }
    let geometry = image.geometry();
    let bytes = Bits::bytes_for(image.size, granularity_bits);
    if geometry.clusters_for(bytes) != u64::from(entry.table_entries) {
        let text = format!("its table has {} entries for {bytes} bytes", entry.table_entries);
        return Err(Error::corrupt(text));
    }
    budget.take(bytes, "the bitmap", image.storage.name())?;
    let bits = Bits::new(image.size, granularity_bits)?;
    let table =
        read_table(engine, &image.storage, entry.table_offset, entry.table_entries as usize);
    for (index, word) in table.await?.into_iter().enumerate() {
        let size = geometry.cluster_size();
        let place = index as u64 * size;
        match BitmapCluster::decode(word, geometry)? {
            BitmapCluster::Zeros => {}
            BitmapCluster::Ones => bits.load_ones(place, size),
            BitmapCluster::Stored(host) => {
                let length = size.min(bytes.saturating_sub(place)) as usize;
                let stored = read(engine, &image.storage, host.get(), length).await?;
                bits.load(place, &stored);
            }
        }
    }
    let (bits, entry) = (Some(Arc::new(bits)), Some(entry));
    Ok(Bitmap { name, granularity_bits, enabled, bits, entry })
}
