//! What is done to images as wholes: create, amend, measure, probe, check, resize.

pub mod amend;
mod check;
pub mod create;
mod data_length;
pub mod encrypt;
pub mod keyslots;
mod layout;
mod option_names;
pub mod preallocation;
pub mod resize;
