//! What is done to images as wholes: create, amend, measure, probe, check.

pub mod amend;
mod check;
pub mod create;
mod layout;
mod option_names;
