//! What is done to images as wholes: create, measure, probe, check, resize.

mod check;
pub mod create;
mod layout;
mod option_names;
pub mod preallocation;
pub mod resize;
