//! The cache of table slices (L2 tables, refcount blocks), and reading tables past
//! it. The cache knows clean from dirty; it does not know what the words mean, and
//! does no I/O.

pub mod cache;
pub mod snapshot_table;
pub mod tables;
