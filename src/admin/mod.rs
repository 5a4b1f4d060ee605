//! What is done to images as wholes: create, measure, probe, check.

pub mod check;
pub mod create;
mod layout;
mod option_names;
