//! What happened on a simulated disk, in order, for whoever reads a failure.

use std::fmt::Write;

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum OpKind {
    /// Reads bytes.
    Read,
    /// Writes bytes.
    Write,
    /// Makes a range zero and gives its space back.
    Punch,
    /// Makes a range zero and keeps its space.
    Zero,
    /// Sets the length.
    Truncate,
    /// Makes durable what completed before.
    Sync,
}

impl OpKind {
    /// Whether it changes the file.
    pub fn changes(self) -> bool {
        !matches!(self, OpKind::Read | OpKind::Sync)
    }
}

#[derive(Debug)]
pub(super) enum Event {
    Issue { kind: OpKind, file: usize, offset: u64, len: u64 },
    Apply(u64),
    Complete,
    Fail(i32),
    Drop,
    Note(String),
}

#[derive(Default, Debug)]
pub(super) struct Journal(Vec<(u64, u64, Event)>);

impl Journal {
    pub(super) fn add(&mut self, step: u64, op: u64, event: Event) {
        self.0.push((step, op, event));
    }

    /// The last few notes, oldest first.
    pub(super) fn last_notes(&self, count: usize) -> Vec<String> {
        let notes = self.0.iter().rev().filter_map(|(.., event)| match event {
            Event::Note(note) => Some(note.clone()),
            _ => None,
        });
        let mut notes: Vec<String> = notes.take(count).collect();
        notes.reverse();
        notes
    }

    /// One line for each event: the step, the operation, what happened to it.
    pub(super) fn text(&self, file_name: impl Fn(usize) -> String) -> String {
        let mut text = String::new();
        for (step, op, event) in &self.0 {
            let what = match event {
                Event::Issue { kind, file, offset, len } => {
                    format!("#{op} issue {kind:?} {} {offset:#x}+{len:#x}", file_name(*file))
                }
                Event::Apply(len) => format!("#{op} applied {len:#x}"),
                Event::Complete => format!("#{op} completed"),
                Event::Fail(errno) => format!("#{op} failed, errno {errno}"),
                Event::Drop => format!("#{op} future dropped"),
                Event::Note(note) => note.clone(),
            };
            let _ = writeln!(text, "{step:7} {what}");
        }
        text
    }
}
