//! Bugs seeded on purpose, to see that the tests find them.
//!
//! A build with `RUSTFLAGS="--cfg qcow2rs_mutants"` has all of them, and the
//! environment variable `QCOW2RS_MUTANT` chooses the one that is awake; no other
//! build has any: there `mutant!(X)` is the word `false`, and `mutant!(X => ...)`
//! is nothing at all. `scripts/mutants.sh` runs the tests against each of them;
//! the table of what finds which is in `docs/crash-simulation.md`.

/// `mutant!(X, Y)`: whether the driver has one of the bugs `X` and `Y` now.
/// `mutant!(X => statements)`: what it does then.
#[cfg(qcow2rs_mutants)]
macro_rules! mutant {
    ($($name:ident),+) => {
        [$($crate::mutants::Mutant::$name),+].iter().any(|mutant| mutant.is_awake())
    };
    ($name:ident => $($statements:tt)*) => {
        if mutant!($name) {
            $($statements)*
        }
    };
}

#[cfg(not(qcow2rs_mutants))]
macro_rules! mutant {
    ($($name:ident),+) => {
        false
    };
    ($name:ident => $($statements:tt)*) => {};
}

#[cfg(qcow2rs_mutants)]
macro_rules! define {
    ($($(#[doc = $what:literal])+ $name:ident,)+) => {
        /// A seeded bug.
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Mutant {
            $($(#[doc = $what])+ $name,)+
        }

        const ALL: &[(&str, Mutant)] = &[$((stringify!($name), Mutant::$name),)+];
    };
}

#[cfg(qcow2rs_mutants)]
impl Mutant {
    /// Whether it is the one that is awake.
    pub(crate) fn is_awake(self) -> bool {
        use std::sync::OnceLock;
        static CHOSEN: OnceLock<Option<Mutant>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| {
            let name = std::env::var("QCOW2RS_MUTANT").ok().filter(|name| !name.is_empty())?;
            let known = ALL.iter().find(|(known, _)| *known == name);
            // A name with a slip in it must not pass for a driver without bugs.
            Some(known.unwrap_or_else(|| panic!("QCOW2RS_MUTANT: there is no {name}")).1)
        });
        *chosen == Some(self)
    }
}

#[cfg(qcow2rs_mutants)]
define! {
    // The order on disk.
    /// A flush writes entries without a sync before them.
    NoSyncBeforeEntries,
    /// A flush takes what its entries drop for durable without a sync after them.
    NoSyncAfterEntries,
    /// Raised refcounts are written when the image is closed, not before the entries.
    RefcountsLeftForClose,
    /// A flush writes the entries first and the raised refcounts behind them.
    EntriesBeforeRefcounts,
    /// A flush syncs first and copies what is dirty afterwards.
    CopiedAfterSync,
    /// A flush joins one that began before the call.
    FlushJoinsEarlier,
    /// The external data file is synced behind the entries that point into it.
    DataFileSyncedLate,
    /// A flush syncs the image file and never its external data file.
    DataFileNotSynced,
    /// An entry is believed that points anywhere in the external data file.
    DataFilePlaceBelieved,
    /// Data written in place does not make the next flush sync.
    WriteInPlaceNotSynced,
    /// An open for writing does not sync what a process that was killed had written.
    OpenedTakenForDurable,
    /// A flush that fails or is given up forgets that it still owed a sync.
    FailedFlushForgetsSync,
    /// A flush that does not come to its end, or a write-back that only makes room,
    /// forgets what its entries freed.
    FailedFlushForgetsFreed,
    /// A flush that fails or is given up forgets the L1 entries that it took.
    FailedFlushForgetsL1,
    /// A flush that fails or is given up forgets the L2 slices that it took.
    FailedFlushForgetsSlices,
    /// A durable write (FUA) returns without a flush.
    FuaIgnored,
    /// An error from a sync is returned once; the next flush succeeds.
    SyncFailureForgotten,
    /// Syncs run side by side, so one may hide the failure of another.
    SyncsSideBySide,
    /// Dirty slices leave a full cache without sync or refcounts before them.
    EvictionWithoutOrder,
    /// What dirty slices drop is free as soon as they have left a full cache.
    EvictionFreesClusters,
    /// An extended L2 entry is written to disk in two halves of eight bytes.
    EntryWrittenInHalves,
    /// Autoclear bits are cleared without a sync before anything changes.
    AutoclearNotSynced,

    // Encryption.
    /// What copy-on-write moves is written as it is, not encrypted.
    CopiedInPlainText,
    /// What copy-on-write moves is encrypted as if it lay elsewhere.
    CopiedUnderOtherIv,
    /// A cluster that was never used is taken to read as zero though it is decrypted.
    EncryptedGroundTakenForZero,
    /// What is given up is punched out before the entry that says so is durable, though a
    /// hole is not zero once it is decrypted.
    EncryptedPunchedEarly,
    /// A sector that is written in part may be written by others at the same time.
    PartOfSectorNotLocked,
    /// A key slot is named before its material is durable.
    KeyNamedBeforeMaterial,
    /// A key is overwritten before its slot is given up.
    KeyOverwrittenFirst,

    // New metadata.
    /// A refcount block is named before a sync has made it durable.
    NoSyncBeforeNewBlock,
    /// The header names a larger refcount table before a sync.
    NoSyncBeforeTableSwitch,
    /// The old refcount table is freed before the header's switch is durable.
    NoSyncAfterTableSwitch,
    /// Two write-backs of refcounts may overtake each other.
    RefcountWritesOvertake,
    /// The file is not extended before pointers lead past its end.
    FileNotExtended,
    /// A new L2 table is named before its content is in place.
    TableNamedBeforeContent,
    /// A new L2 table in a cluster that was used before is not zeroed.
    NewTableNotZeroed,
    /// An L2 table that a snapshot shares is changed without being copied.
    SharedTableNotCopied,
    /// The old L2 table is freed before there is a new one.
    TableFreedBeforeReplaced,

    // Clusters between two lives.
    /// What was freed may be used again at once.
    NoLimbo,
    /// What is freed while a flush runs is released at the end of that flush.
    FreedDuringFlushReleased,
    /// What was freed may be used again while requests that know it are under way.
    LimboIgnoresReaders,
    /// A write in place does not enter the epoch.
    WriteOutsideEpoch,
    /// A read does not enter the epoch (of compressed clusters, too).
    ReadOutsideEpoch,
    /// Clusters that could not be released are forgotten.
    FailedReleaseForgets,
    /// A freed cluster is on its way to reuse before its hole is punched.
    LatePunch,
    /// A shared or compressed cluster is freed before its replacement is secured.
    FreedBeforeReplaced,
    /// A cluster given back by a request that was given up is used at once, though
    /// its write may be under way.
    AbandonedReused,

    // Allocation.
    /// A cluster that is used again is taken for zero.
    UsedTakenForFresh,
    /// A cluster that was given back is taken for zero.
    ReturnedTakenForFresh,
    /// Refcounts of a run stay raised if the file cannot be extended.
    RunNotRolledBack,
    /// A write that fails keeps its clusters.
    FailedWriteKeepsCluster,
    /// What is freed during a search for free clusters is not found by the next.
    SearchForgetsFreed,
    /// Metadata that counts as free is written over.
    MetadataNotProtected,
    /// Corruption is not written down in the header.
    CorruptBitNotSet,

    // Lazy refcounts.
    /// The image is not marked dirty while its refcounts lag behind.
    DirtyBitNotSet,
    /// The image is marked dirty after the entries that its refcounts lag behind.
    DirtyBitLate,
    /// A close clears the dirty bit before the refcounts are written.
    CleanedBeforeRefcounts,
    /// The dirty bit is cleared while repaired refcounts are not durable.
    RepairNotSynced,

    // Requests that meet.
    /// A write of unallocated clusters claims nothing.
    WriteClaimsNothing,
    /// A write that replaces a shared or compressed cluster claims nothing.
    ReplaceClaimsNothing,
    /// A discard of whole clusters claims nothing.
    DiscardClaimsNothing,
    /// A discard of subclusters claims nothing.
    SubclusterDiscardClaimsNothing,
    /// A zero write of whole clusters claims nothing.
    ZeroClaimsNothing,
    /// The making of an L2 table claims nothing.
    TableClaimsNothing,
    /// An L2 entry changes in two steps that others see.
    EntryChangedInHalves,
    /// A change of a slice that is being written back is forgotten.
    ChangeDuringWriteForgotten,
    /// A dirty slice may leave the cache unwritten.
    DirtySliceEvicted,
    /// A slice read before a write-back may enter the cache after it.
    StaleSliceAccepted,

    // Amending.
    /// The header names new refcounts, or is of another version, before what it needs is
    /// durable.
    AmendSwitchedEarly,
    /// New refcounts count the old ones, too.
    AmendCountsOld,
    /// Zero clusters stay when the version becomes 2.
    AmendZeroesKept,
    // Internal snapshots.
    /// The refcounts that a snapshot raises are raised when the header names it already.
    SnapshotRaisedLate,
    /// COPIED flags of what a snapshot shares are left set.
    SnapshotFlagsKept,
    /// The header names new snapshot or L1 tables before they are durable.
    SnapshotSwitchedEarly,
    /// What a snapshot had is freed before it is durable that the header does not name it.
    SnapshotFreedEarly,
    /// An image is not marked dirty while its flags do not say what its refcounts say.
    SnapshotNotMarkedDirty,
    /// After a failure half way, refcounts and flags are left as they are.
    SnapshotNotMended,

    // Another size.
    /// What the last cluster has behind the end of the disk shows when the disk grows.
    ResizeShowsRest,
    /// Refcounts of new tables are written after the header names them.
    ResizeCountedLate,
    /// What a shorter disk cuts off is freed before the header says that it is shorter.
    ResizeFreedEarly,
    /// Entries behind a new end are cleared before the header says that it is the end.
    ResizeCutEarly,
    /// What entries behind the end led to is freed before it is durable that they are
    /// cleared.
    ResizeCutNotSynced,

    // What a request does.
    /// Subclusters are allocated in the entry before their data is written.
    AllocatedBeforeData,
    /// What a write does not cover of its subclusters is not copied.
    EdgesNotCopied,
    /// Zeroes over a backing file leave unallocated what was unallocated.
    ZeroShowsBacking,
    /// A discard leaves a hole that shows the backing file.
    DiscardShowsBacking,
    /// A cluster that a snapshot shares is written in place.
    SharedWrittenInPlace,
    /// The entry of a shared cluster says that it is not shared (COPIED).
    SharedMarkedCopied,
    /// A discard punches a cluster that a snapshot shares.
    SharedPunched,
    /// A hole is rounded out to the blocks of the host, over its neighbours.
    HoleRoundedOut,
    /// A compressed cluster's entry does not wait for its data to be durable.
    CompressedNotOrdered,
    /// A host cluster that several compressed clusters share is counted once.
    PackedNotCounted,
    /// Packing goes on in a host cluster that may have become free meanwhile.
    PackedIntoFreed,
    /// A compressed write claims nothing.
    CompressedClaimsNothing,
    /// What was decompressed is remembered though its place was given to other data.
    InflatedOutlivesPlace,


    // Errors, and what nobody can trust.
    /// An error from writing a slice of an L2 table is forgotten: it counts as written.
    EntryErrorForgotten,
    /// After a sync that failed only syncs are refused: writes go on.
    WritesAfterFailedSync,
    /// A slice that could not be loaded stays in the cache, with zeroes in it.
    FailedLoadCached,
    /// An L1 entry that leads into the middle of a cluster is followed.
    TableNotAligned,
    /// What an image makes the driver hold in memory is not held against the limit.
    MemoryNotReckoned,

    // Queues.
    /// Who wakes a request while nobody drives its queue does not ring the bell.
    WakeUpNotRung,
    /// The bell of a queue is rung once and never again.
    BellRungOnce,
    /// A request of a queue is put on the list of those that can go on once and never
    /// again.
    ListedOnce,
    /// Completions that are left over do not make the descriptor readable again.
    RestNotTold,
    /// A request completes as soon as it has to wait.
    CompletedEarly,
    /// A completion is handed out twice.
    CompletedTwice,
    /// A flush in a queue completes without waiting for its sync.
    QueuedFlushNotAwaited,
    /// A queue that is full accepts requests.
    FullQueueAccepts,
    /// A queue that is destroyed does not see to requests that wait for others.
    DrainLeavesWaiting,
    /// A queue that is destroyed does not carry on the queues that are in its way.
    DrainedAlone,
    /// A wait does not carry on the other queues of its thread.
    WaitedAlone,
    /// A close sees to the requests of one queue only.
    CloseForgetsQueues,
    /// A driver sleeps though the kernel did not take what was submitted.
    UnsubmittedForgotten,
    /// A request that goes to the ring without a future does not enter the epoch.
    FlightOutsideEpoch,
    /// What a write without a future has written does not make the next flush sync.
    FlightNotNoted,
    /// A write without a future takes no turns with those of parts of its blocks.
    FlightTakesNoTurn,
    /// A request without a future that failed counts as done.
    FlightFailureForgotten,
    /// A request without a future that came back short counts as done.
    ShortFlightTakenForWhole,
    /// A request without a future that was interrupted fails.
    FlightNotTriedAgain,
    /// It is forgotten that a request without a future is over.
    LandingForgotten,
    /// A request without a future is given up while the disk is at work on it.
    GivenUpInFlight,
    /// A request without a future that is over does not end its turn.
    TurnNotEnded,
    /// A request without a future that is over stays in the epoch.
    FlightStaysInEpoch,
    // Bitmaps.
    /// An open marks the bitmaps that record changes without a sync behind it.
    BitmapMarkNotSynced,
    /// A bitmap that is merged into, enabled or resized is marked without a sync.
    BitmapChangeNotMarked,
    /// The header names bitmaps that are not durable.
    BitmapNamedEarly,
    /// What a bitmap had in the file is free while the header names it.
    BitmapFreedEarly,
    /// Bitmaps do not record writes.
    BitmapMissesWrite,
    /// Bitmaps do not record writes that are done at once.
    BitmapMissesWriteNow,
    /// Bitmaps do not record writes without a future.
    BitmapMissesFlight,
    /// Bitmaps do not record compressed writes.
    BitmapMissesCompressed,
    /// Bitmaps do not record zeroes.
    BitmapMissesZeroes,
    /// Bitmaps do not record discards.
    BitmapMissesDiscard,
}
