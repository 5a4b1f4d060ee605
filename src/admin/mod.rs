//! What is done to images as wholes: create, measure, probe, check.

mod check;
pub mod create;
mod layout;
mod option_names;
