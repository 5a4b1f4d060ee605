//! Storages (where bytes live) and engines (how operations on them are carried
//! out). It knows nothing of qcow2.

pub mod engine;
pub mod storage;
