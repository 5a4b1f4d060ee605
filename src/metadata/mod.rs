//! The cache of table slices (L2 tables, refcount blocks). It knows clean from
//! dirty; it does not know what the words mean, and does no I/O.

pub mod cache;
