//! Which copy of what is kept thread by thread is the calling thread's: asked for at
//! its first use, given back when the thread ends.

use std::cell::Cell;
use std::sync::atomic::AtomicU32;

use crate::owner::{Here, Owners};

static OWNERS: Owners = Owners(AtomicU32::new(0));

thread_local! {
    /// `None`: this thread has not asked yet.
    static HERE: Cell<Option<Here>> = const { Cell::new(None) };
    /// Gives the copy back when the thread ends.
    static OWNER: Owner = const { Owner(Cell::new(Here::SHARED)) };
}

/// Asks which copy is the calling thread's: always the same one.
#[inline]
pub fn here() -> Here {
    match HERE.try_with(Cell::get) {
        Ok(Some(here)) => here,
        _ => first_time(),
    }
}

struct Owner(Cell<Here>);

impl Drop for Owner {
    fn drop(&mut self) {
        // What the thread still does while it is torn down it does as one of those
        // that share.
        let _ = HERE.try_with(|cell| cell.set(Some(Here::SHARED)));
        OWNERS.give_back(self.0.get());
    }
}

#[cold]
fn first_time() -> Here {
    let here = OWNER.try_with(|owner| {
        let here = OWNERS.take();
        owner.0.set(here);
        here
    });
    // A thread that is being torn down owns nothing any more.
    let here = here.unwrap_or(Here::SHARED);
    let _ = HERE.try_with(|cell| cell.set(Some(here)));
    here
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;

    #[test]
    fn a_copy_has_one_owner_at_a_time() {
        const OWNERS: usize = crate::owner::OWNERS;
        let owners = [const { AtomicUsize::new(0) }; OWNERS];
        for _ in 0..20 {
            std::thread::scope(|scope| {
                for _ in 0..2 * OWNERS {
                    scope.spawn(|| {
                        let Some(owner) = owners.get(here().index()) else { return };
                        assert_eq!(owner.fetch_add(1, SeqCst), 0, "copy {}", here().index());
                        std::thread::yield_now();
                        owner.fetch_sub(1, SeqCst);
                    });
                }
            });
        }
    }
}
