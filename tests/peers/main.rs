//! Mistakes that other drivers of this format have made, each as a test by name:
//! an image or a schedule on which one of them lost data, showed what it should not,
//! or fell over.

#[path = "../support/mod.rs"]
mod support;

mod contents;
mod order;
mod places;
mod waiting;
