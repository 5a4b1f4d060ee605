//! Caches

use super::open::qcow2rs_image;

/// [MT] Gives memory of the metadata caches, those of the images below included,
/// back to the system: of what is clean and was not used since this was done
/// last, by this call or after "cache-clean-interval" seconds (600 unless set).
/// That happens by itself only while requests, flushes or calls of queues come
/// by: a program that leaves an image idle calls this, twice for all there is.
/// Returns the number of bytes; what goes is read again when it is needed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2rs_trim_caches(img: *mut qcow2rs_image) -> i64 {
    entry!(|call| {
        let bytes = call.held(img)?.trim()?;
        Ok(i64::try_from(bytes).unwrap_or(i64::MAX))
    })
}
