//! What a queue is to be like.

use crate::error::{Error, ErrorKind, Result};

/// Requests that may be in flight, at most: their numbers are small.
const MOST: u32 = 1 << 16;

/// How a queue carries out operations.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Engine {
    /// io_uring where the system has it, else `Blocking`.
    #[default]
    Auto,
    /// io_uring.
    IoUring,
    /// Operations are done by the thread that submits, reaps or waits.
    Blocking,
}

/// Options of a queue.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    depth: u32,
    /// How operations are carried out.
    pub engine: Engine,
    /// Whether there is a descriptor that tells of completions.
    pub completion_fd: bool,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions { depth: 128, engine: Engine::Auto, completion_fd: true }
    }
}

impl QueueOptions {
    /// The defaults.
    pub fn new() -> QueueOptions {
        QueueOptions::default()
    }

    /// Requests that may be in flight: 1 to 65536, by default 128.
    pub fn set_depth(&mut self, depth: u32) -> Result<()> {
        if !(1..=MOST).contains(&depth) {
            return Err(Error::invalid(format!("a queue has a depth of 1 to {MOST}, not {depth}")));
        }
        self.depth = depth;
        Ok(())
    }

    /// Requests that may be in flight.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Sets an option by name: "engine" (auto|io_uring|blocking), "completion-fd"
    /// (on|off), "depth". `NotFound`: no such option.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let bad = || Error::invalid(format!("{value:?} is no value for {name:?}"));
        match name {
            "engine" => {
                self.engine = match value {
                    "auto" => Engine::Auto,
                    "io_uring" => Engine::IoUring,
                    "blocking" => Engine::Blocking,
                    _ => return Err(bad()),
                };
                Ok(())
            }
            "completion-fd" => {
                self.completion_fd = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad()),
                };
                Ok(())
            }
            "depth" => self.set_depth(value.parse().map_err(|_| bad())?),
            _ => {
                let text = format!("there is no queue option {name:?}");
                Err(Error::new(ErrorKind::NotFound, text))
            }
        }
    }
}
