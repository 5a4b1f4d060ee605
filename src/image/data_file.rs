//! Guest data in a file of its own: the external data file. The image file has the
//! metadata, and nothing of the data file is counted there: each cluster has one place
//! in it, where the guest has it, and that is never anybody else's.
//!
//! This file knows how the data file is opened, and what becomes of places in it that
//! are given up. Where data goes is decided by `write`; when it is synced, by `writeback`.

use std::ops::Range;
use std::sync::Arc;

use super::gate;
use super::options::{OpenOptions, Policy, Reference, ReferenceKind};
use super::qcow2::{Qcow2, Writing};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Header;
use crate::format::l2::Cluster;
use crate::geometry::{DataOffset, GuestCluster};
use crate::io::engine::{Engine, Piece, ZeroMode};
use crate::io::storage::{Access, Storage};

/// How the data file of an image that is opened with `options` is opened.
pub(crate) fn data_access(options: &OpenOptions) -> Access {
    Access {
        writable: options.writable,
        direct: options.direct,
        lock: options.lock,
        no_flush: options.no_flush,
        fixed_length: false,
        shares_writes: true,
    }
}

/// Opens the data file of the image on `storage`, if it has one and data is asked for,
/// through the gate. `depth`: images above. `seen`: the files of the chain so far, none
/// of which it may be.
pub(super) fn open_data_file(
    storage: &Storage,
    header: &Header,
    options: &OpenOptions,
    depth: u32,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Option<Arc<Storage>>> {
    let image = storage.name();
    if !header.external_data_file() && options.data_file.is_some() {
        let text = format!("{image} has no external data file: none can be given to it");
        return Err(Error::invalid(text));
    }
    if !header.external_data_file() || options.check_only {
        return Ok(None);
    }
    let stored = header.extensions.data_file.as_deref().filter(|name| !name.is_empty());
    // A program that resolves names may know what no name stands for.
    let asked = options.data_file.is_some() || matches!(options.policy, Policy::Resolve(_));
    let Some(name) = stored.or(asked.then_some(b"")) else {
        let text = format!(
            "{image} keeps its data in another file and does not say in which: say it with \
             \"data-file.filename\""
        );
        return Err(Error::new(ErrorKind::DataFile(libc::EINVAL), text));
    };
    let reference = Reference {
        kind: ReferenceKind::Data,
        depth,
        name: name.to_vec(),
        format: None,
        referrer: image.to_owned(),
        writable: options.writable,
    };
    let directory = storage.path().and_then(|path| path.parent());
    let source = match &options.data_file {
        Some(source) => Ok(source.clone()),
        None => gate::resolve(options, &reference, directory).map(|(source, _)| source),
    };
    let opened =
        source.and_then(|source| super::open::open_once(source, data_access(options), seen));
    let data = opened.map_err(|error| {
        let name = String::from_utf8_lossy(name);
        let context = format!("{image}: opening the data file {name:?}");
        match error.kind() {
            ErrorKind::Policy
            | ErrorKind::ChainDepth
            | ErrorKind::DataFile(_)
            | ErrorKind::OutOfMemory => error.context(context),
            _ => {
                let kind = ErrorKind::DataFile(error.errno());
                error.wrap_as(kind, context)
            }
        }
    })?;
    seen.extend(data.identity());
    Ok(Some(Arc::new(data)))
}

impl Qcow2 {
    /// Where guest data is.
    #[inline]
    pub fn data(&self) -> &Storage {
        self.data_file.as_deref().unwrap_or(&self.storage)
    }

    /// Whether the data file is to be a raw image by itself: it reads as the guest does.
    /// (One that is encrypted never does, whatever the header says.)
    pub fn is_raw_data(&self) -> bool {
        self.format.data_file && self.header.raw_external_data() && !self.is_encrypted()
    }

    /// `NotSupported` where data is not in the image file.
    pub fn refuse_data_file(&self, what: &str) -> Result<()> {
        if !self.format.data_file {
            return Ok(());
        }
        let name = self.storage.name();
        let text = format!("{name}: images with an external data file have no {what}");
        Err(Error::new(ErrorKind::NotSupported, text))
    }

    /// The place of a cluster in the data file; `None` if there is no data file.
    pub fn data_file_place(&self, cluster: GuestCluster) -> Option<DataOffset> {
        let place = self.geometry().guest_start(cluster).0;
        self.format.data_file.then_some(DataOffset::in_data_file(place))
    }

    /// To be called before guest data is written: `Corrupt` where metadata is. There is
    /// none in a data file.
    #[inline]
    pub fn check_data(&self, writing: &Writing, at: DataOffset, bytes: u64) -> Result<()> {
        match self.format.data_file {
            true => Ok(()),
            false => writing.allocator.check_data(at.get(), bytes),
        }
    }

    /// Where data that would be written up to `end` ends: a raw image is as long as the
    /// disk.
    pub fn last_byte_to_store(&self, end: u64) -> u64 {
        if self.is_raw_data() { end.min(self.size) } else { end }
    }

    /// Whether a discard can do anything: a raw image has to be changed for that.
    pub fn can_discard(&self, writing: &Writing) -> bool {
        !self.is_raw_data() || writing.punch && self.data().can_punch()
    }

    /// Makes a data file that is to be a raw image read as zero. The caller claims the
    /// clusters. Entries need not change for that where data is stored, and they do not:
    /// so whatever happens, the guest finds what the data file holds.
    pub(super) async fn zero_raw<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
        bytes: Range<u64>,
        may_unmap: bool,
    ) -> Result<()> {
        let bytes = bytes.start..bytes.end.min(self.size);
        if bytes.is_empty() {
            return Ok(());
        }
        let mode = if may_unmap { ZeroMode::Punch } else { ZeroMode::Keep };
        let data = self.data();
        match data.zero(engine, bytes.start, bytes.end - bytes.start, mode).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                let mut at = bytes.start;
                while at < bytes.end {
                    let len = (bytes.end - at).min(1 << 30);
                    data.write(engine, &[Piece::Zeroes(len as usize)], at).await?;
                    at += len;
                }
            }
            other => other?,
        }
        writing.mark_unsynced();
        Ok(())
    }

    /// Gives back the space of clusters in the data file that nothing points to any
    /// more. A hint: it does not matter whether it works.
    pub(super) async fn punch_data_file<E: Engine>(
        &self,
        engine: &E,
        writing: &Writing,
        clusters: &[Cluster],
    ) {
        let size = self.geometry().cluster_size();
        let mut hole = 0..0;
        for cluster in clusters {
            let Cluster::Standard { host, .. } = *cluster else { continue };
            if hole.end != host.get() {
                self.punch(engine, writing, hole).await;
                hole = host.get()..host.get();
            }
            hole.end += size;
        }
        self.punch(engine, writing, hole).await;
    }
}
