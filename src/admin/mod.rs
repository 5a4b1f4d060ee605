//! What is done to images as wholes: create, measure, probe.

pub mod create;
mod layout;
mod option_names;
