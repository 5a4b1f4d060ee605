//! Zero clusters turned into what version 2 can say as well: data that is zero, or
//! nothing at all where there is nothing below.
//!
//! For who has the image alone. What is changed is changed as any request would, so
//! that the image is sound, and reads the same, at each moment.

use super::disk::Disk;
use super::qcow2::{Qcow2, Writing};
use crate::error::{Error, ErrorKind, Result};
use crate::format::l2::Cluster;
use crate::geometry::{GuestCluster, HostOffset};
use crate::io::engine::{Engine, Piece};

impl Disk {
    /// Replaces every zero cluster of the active state of an image without subclusters.
    /// `progress`: how far it is, of how much; `false` ends it with `Cancelled`.
    /// Not durable on return.
    pub(crate) async fn expand_zeroes<E: Engine>(
        &self,
        engine: &E,
        progress: &mut (dyn FnMut(u64, u64) -> bool + Send),
    ) -> Result<()> {
        let Some(image) = self.top() else { return Ok(()) };
        let writing = image.writing()?;
        writing.allocator.health.check()?;
        let entries = image.l1.len() as u64;
        let per_table = image.geometry().cluster_size() / image.geometry().l2_entry_size();
        for l1_index in 0..entries {
            if !progress(l1_index, entries) {
                let text = "the change of the image was cancelled";
                return Err(Error::new(ErrorKind::Cancelled, text));
            }
            let Some(table) = image.table_of(image.l1.get(l1_index))? else { continue };
            image.bound_limbo(engine).await?;
            let mut table = table;
            for index in 0..per_table {
                let guest = GuestCluster(l1_index * per_table + index);
                let cluster = image.entry(engine, table, guest).await?;
                if !is_zero(&cluster) {
                    continue;
                }
                self.expand_zero(engine, image, writing, guest, cluster).await?;
                // It may have been copied.
                if let Some(now) = image.table_of(image.l1.get(l1_index))? {
                    table = now;
                }
            }
        }
        Ok(())
    }

    async fn expand_zero<E: Engine>(
        &self,
        engine: &E,
        image: &Qcow2,
        writing: &Writing,
        guest: GuestCluster,
        cluster: Cluster,
    ) -> Result<()> {
        let geometry = image.geometry();
        let start = geometry.guest_start(guest).0;
        let keeps_place = matches!(cluster, Cluster::Standard { .. });
        if start < self.size() && (keeps_place || image.has_backing()) {
            let length = geometry.cluster_size().min(self.size() - start);
            return self.write_qcow2(engine, Piece::Zeroes(length as usize), start).await;
        }
        // Nothing is below: it reads as zero without an entry.
        let table = image.table_for_writing(engine, geometry.l1_index(guest)).await?;
        forget(engine, image, table, guest).await?;
        image.free(engine, writing, &[cluster]).await
    }
}

async fn forget<E: Engine>(
    engine: &E,
    image: &Qcow2,
    table: HostOffset,
    guest: GuestCluster,
) -> Result<()> {
    image.change(engine, table, guest, 1, |_, _| Some(Cluster::None { zero: 0 })).await
}

/// Whether an entry says that all of a cluster, or a part of it, is zero.
pub(crate) fn is_zero(cluster: &Cluster) -> bool {
    match cluster {
        Cluster::None { zero } | Cluster::Standard { zero, .. } => *zero != 0,
        Cluster::Compressed(_) => false,
    }
}
