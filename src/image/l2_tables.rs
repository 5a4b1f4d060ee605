//! L2 tables that may be changed: made where there is none, copied where the
//! table is shared with a snapshot.

use super::qcow2::{Qcow2, Writing};
use super::write::keep_or_give_back;
use crate::alloc::overlap::Metadata;
use crate::error::Result;
use crate::format::l2::COPIED;
use crate::geometry::HostOffset;
use crate::io::engine::{Engine, Piece, Target};
use crate::sys::memory::Block;

impl Qcow2 {
    /// The L2 table of an L1 entry, ours to change.
    pub async fn table_for_writing<E: Engine>(
        &self,
        engine: &E,
        l1_index: u64,
    ) -> Result<HostOffset> {
        if let Some(table) = self.own_table(l1_index)? {
            return Ok(table);
        }
        let writing = self.writing()?;
        let _claim = writing.claims.acquire_table(l1_index).await;
        if let Some(table) = self.own_table(l1_index)? {
            return Ok(table);
        }
        let size = self.geometry().cluster_size();
        let old = self.table_of(self.l1.get(l1_index))?;
        mutant!(TableFreedBeforeReplaced => self.free_table(writing, old));
        let allocation = self.allocate(engine, 1).await?;
        let table = allocation.start()?;
        mutant!(TableNamedBeforeContent => self.l1.set(l1_index, table.get() | COPIED));
        let filled = async {
            writing.allocator.overlap.check_data(table.get(), size)?;
            match old {
                None if allocation.is_fresh() || mutant!(NewTableNotZeroed) => Ok(()),
                None => {
                    let zeroes = [Piece::Zeroes(size as usize)];
                    self.storage.write(engine, &zeroes, table.get()).await
                }
                Some(old) => {
                    // Nobody changes a shared table: what is on disk is all.
                    let block = Block::zeroed(size as usize)?;
                    let bytes = block.slice(0, size as usize);
                    self.storage.read(engine, Target::Block(bytes.clone()), old.get()).await?;
                    self.storage.write(engine, &[Piece::Block(bytes)], table.get()).await
                }
            }
        }
        .await;
        if old.is_some() || !allocation.may_be_pointed_to() {
            writing.allocator.need_order();
        }
        keep_or_give_back(allocation, filled)?;
        // What is cached of that cluster, or being read of it, is from an earlier life.
        self.l2.forget(table, size);
        writing.allocator.overlap.add(table.get(), size, Metadata::L2);
        self.l1.set(l1_index, table.get() | COPIED);
        if !mutant!(TableFreedBeforeReplaced) {
            self.free_table(writing, old);
        }
        Ok(table)
    }

    /// Nothing points to an L2 table any more, as far as this image goes.
    fn free_table(&self, writing: &Writing, table: Option<HostOffset>) {
        let Some(table) = table else { return };
        let geometry = self.geometry();
        writing.allocator.overlap.remove(table.get(), geometry.cluster_size(), Metadata::L2);
        let number = geometry.host_cluster(table.into()).0;
        writing.allocator.limbo.announce(number..number + 1);
    }

    /// The table, if there is one that is not shared.
    fn own_table(&self, l1_index: u64) -> Result<Option<HostOffset>> {
        let entry = self.l1.get(l1_index);
        let own = entry & COPIED != 0 || mutant!(SharedTableNotCopied);
        Ok(if own { self.table_of(entry)? } else { None })
    }
}
