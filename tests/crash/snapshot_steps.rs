//! A life with snapshots: they are taken, applied and deleted between the requests of
//! guests; crashes come at any moment of that.

use std::sync::Arc;

use qcow2rs::image::Disk;
use qcow2rs::image::handle::Replacement;
use qcow2rs::io::sim::{Crash, SimEngine};
use qcow2rs::snapshots::Meta;

use super::life::Life;
use super::oracle::{Change, words_of};
use super::report::Trouble;

/// Most snapshots at a time.
const MOST: usize = 3;
/// Clusters that one change may take: copies of tables, the list of snapshots.
const CLUSTERS: u64 = 16;

impl Life<'_> {
    /// Changes snapshots, and uses the image after each. None if that is the end.
    pub fn use_snapshots(&self, mut image: Arc<Disk>) -> Result<Option<Arc<Disk>>, Trouble> {
        let changes = self.rng.borrow_mut().between(1, 3);
        for _ in 0..changes {
            let Some(changed) = self.change_snapshots(image)? else { return Ok(None) };
            if !self.use_image(&changed)? {
                return Ok(None);
            }
            image = changed;
        }
        Ok(Some(image))
    }

    /// One change; the image that goes on. None if that is the end.
    fn change_snapshots(&self, image: Arc<Disk>) -> Result<Option<Arc<Disk>>, Trouble> {
        let (draw, which) = {
            let mut rng = self.rng.borrow_mut();
            (rng.below(4), rng.next_u64() as usize)
        };
        self.changed.set(self.changed.get() + CLUSTERS);
        let there = self.oracle.borrow().snapshots.len();
        let chosen = |life: &Self| life.oracle.borrow().snapshots.get(which % there);
        match draw {
            _ if there == 0 => self.take(image),
            0 | 1 if there < MOST => self.take(image),
            0 | 2 => self.apply(image, &chosen(self)),
            _ => self.delete(image, &chosen(self).0),
        }
    }

    fn take(&self, image: Arc<Disk>) -> Result<Option<Arc<Disk>>, Trouble> {
        let Some(content) = self.run_one("read all", self.read_all(&image))? else {
            return Ok(None);
        };
        let name = {
            let mut oracle = self.oracle.borrow_mut();
            // A number of its own, as a write of nothing has.
            let name = oracle.begin(Change::Write, 0..0).tag.to_string().into_bytes();
            oracle.snapshots.begin_taking(&name, content?);
            name
        };
        let begun = self.oracle.borrow_mut().begin_flush();
        let taking = async {
            let meta = Meta::default();
            let (result, next) =
                image.snapshot_create(&SimEngine, &name, &meta, |_| Ok(())).await.into();
            (result.map(drop), next)
        };
        let next = self.changed_to(&image, "take a snapshot", taking)?;
        let mut oracle = self.oracle.borrow_mut();
        oracle.end_flush(begun);
        oracle.snapshots.end(true);
        Ok(next)
    }

    fn apply(
        &self,
        image: Arc<Disk>,
        (name, content): &(Vec<u8>, std::rc::Rc<Vec<u8>>),
    ) -> Result<Option<Arc<Disk>>, Trouble> {
        let ticket = self.oracle.borrow_mut().begin_return(&words_of(content)?);
        let applying = async { image.snapshot_apply(&SimEngine, name).await.into() };
        let next = self.changed_to(&image, "apply a snapshot", applying)?;
        self.oracle.borrow_mut().end(&ticket, true, true);
        Ok(next)
    }

    fn delete(&self, image: Arc<Disk>, name: &[u8]) -> Result<Option<Arc<Disk>>, Trouble> {
        self.oracle.borrow_mut().snapshots.begin_deleting(name);
        let begun = self.oracle.borrow_mut().begin_flush();
        let deleting = async { image.snapshot_delete(&SimEngine, name, |_| false).await.into() };
        let next = self.changed_to(&image, "delete a snapshot", deleting)?;
        let mut oracle = self.oracle.borrow_mut();
        oracle.end_flush(begun);
        oracle.snapshots.end(false);
        Ok(next)
    }

    /// Carries a change out; None if that is the end.
    fn changed_to(
        &self,
        image: &Arc<Disk>,
        name: &str,
        change: impl Future<Output = (qcow2rs::Result<()>, Replacement)>,
    ) -> Result<Option<Arc<Disk>>, Trouble> {
        let Some((result, next)) = self.run_one(name, change)? else { return Ok(None) };
        match result {
            Ok(()) => {}
            Err(error) if self.expected(&error) => {
                self.crash(Crash::Process)?;
                return Ok(None);
            }
            Err(error) => return Err(format!("{name}: {error:?}").into()),
        }
        Ok(match next {
            Replacement::None => Some(image.clone()),
            Replacement::Disk(disk) => Some(Arc::new(*disk)),
            Replacement::Closed => None,
        })
    }
}
