//! Who uses which file: locks against other processes, and a register of the
//! users inside this one.
//!
//! OFD locks belong to the open file description. Descriptors that callers
//! gave us may share one without our knowing, so that inside the process the
//! locks tell nothing: the register applies the same rule (one writer alone, or
//! any number of readers), and the bytes of a shared description are given back
//! when the file's last user of this kind goes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock::{self, Mode, Refused};

/// Device and inode, or what stands for them.
pub(super) type Identity = (u64, u64);

/// All files in use. An entry dies with the last lock on its file.
static FILES: Mutex<BTreeMap<Identity, Weak<Mutex<Users>>>> = Mutex::new(BTreeMap::new());

/// The users of one file in this process.
#[derive(Default, Debug)]
struct Users {
    readers: usize,
    writers: usize,
    /// How many of them came with a descriptor of the caller's.
    by_descriptor: usize,
    /// Descriptions whose users are gone, but whose bytes may be a remaining
    /// user's, too.
    lingering: Vec<Arc<OwnedFd>>,
}

impl Users {
    fn may_join(&self, mode: Mode) -> bool {
        self.writers == 0 && (!mode.writes() || self.readers == 0)
    }

    fn count(&mut self, mode: Mode) -> &mut usize {
        match mode.writes() {
            false => &mut self.readers,
            true => &mut self.writers,
        }
    }

    /// Gives the bytes of `fd` back, as soon as nobody else may need them.
    /// `self` does not count the user that goes.
    fn unlock(&mut self, fd: &Arc<OwnedFd>, private: bool) {
        if private {
            lock::give_back(fd.as_fd(), Mode::Write.bytes());
            return;
        }
        self.lingering.push(fd.clone());
        if self.by_descriptor == 0 {
            self.drop_lingering();
        }
    }

    fn drop_lingering(&mut self) {
        for fd in self.lingering.drain(..) {
            lock::give_back(fd.as_fd(), Mode::Write.bytes());
        }
    }
}

/// A lock on a file; dropping it unlocks.
#[derive(Debug)]
pub(super) struct Lock {
    users: Arc<Mutex<Users>>,
    fd: Arc<OwnedFd>,
    /// The file description is ours alone.
    private: bool,
    mode: Mode,
}

impl Lock {
    /// Locks a file. `private`: nobody else has `fd`'s file description.
    /// `Locked` if somebody's use of the file stands in the way, in this
    /// process or another.
    pub(super) fn acquire(
        fd: Arc<OwnedFd>,
        private: bool,
        identity: Identity,
        mode: Mode,
        name: &str,
    ) -> Result<Lock> {
        let shared = users_of(identity);
        let mut users = guard(&shared);
        if !users.may_join(mode) {
            return Err(own_conflict(&users, mode, name));
        }
        let taken = lock::take(fd.as_fd(), mode.bytes());
        if let Err(refused) = taken.and_then(|()| lock::test(fd.as_fd(), mode)) {
            users.unlock(&fd, private);
            return Err(error(refused, mode, name));
        }
        *users.count(mode) += 1;
        users.by_descriptor += usize::from(!private);
        drop(users);
        Ok(Lock { users: shared, fd, private, mode })
    }

    /// Makes it a lock of another mode, held through `fd` (the same file, the
    /// same kind of descriptor). There is no moment without a lock, and an
    /// error leaves it as it was.
    pub(super) fn convert(&mut self, fd: Arc<OwnedFd>, mode: Mode, name: &str) -> Result<()> {
        let mut users = guard(&self.users);
        *users.count(self.mode) -= 1;
        let result = match users.may_join(mode) {
            true => self.convert_bytes(&mut users, &fd, mode, name),
            false => Err(own_conflict(&users, mode, name)),
        };
        if result.is_ok() {
            self.fd = fd;
            self.mode = mode;
        }
        *users.count(self.mode) += 1;
        result
    }

    /// The bytes of `convert`; `users` does not count ourselves.
    fn convert_bytes(
        &self,
        users: &mut Users,
        fd: &Arc<OwnedFd>,
        mode: Mode,
        name: &str,
    ) -> Result<()> {
        let (old, new) = (self.fd.as_fd(), fd.as_fd());
        // Others are asked through the old description: its own bytes, which we
        // hold, are no obstacle to it.
        if mode.writes() && !self.mode.writes() {
            if let Err(refused) = self.upgrade(users, mode) {
                self.shrink_to(self.mode);
                return Err(error(refused, mode, name));
            }
        }
        if !Arc::ptr_eq(&self.fd, fd) {
            // Nobody can have come in between: the old bytes are still held.
            if let Err(refused) = lock::take(new, mode.bytes()) {
                lock::give_back(new, Mode::Write.bytes());
                self.shrink_to(self.mode);
                return Err(error(refused, mode, name));
            }
            lock::give_back(old, Mode::Write.bytes());
        }
        lock::give_back(new, mode.excess());
        Ok(())
    }

    /// Takes what a writer holds on the old description.
    fn upgrade(&self, users: &mut Users, mode: Mode) -> std::result::Result<(), Refused> {
        let fd = self.fd.as_fd();
        let try_it = || {
            lock::take(fd, mode.bytes())?;
            lock::test(fd, mode)
        };
        match try_it() {
            // We are alone in this process; what lingers serves nobody, yet may
            // be what stands in the way.
            Err(Refused::Held(_)) if !users.lingering.is_empty() => {
                users.drop_lingering();
                try_it()
            }
            outcome => outcome,
        }
    }

    /// Gives back what `mode` does not need on the old description.
    fn shrink_to(&self, mode: Mode) {
        lock::give_back(self.fd.as_fd(), mode.excess());
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let mut users = guard(&self.users);
        *users.count(self.mode) -= 1;
        users.by_descriptor -= usize::from(!self.private);
        users.unlock(&self.fd, self.private);
    }
}

fn users_of(identity: Identity) -> Arc<Mutex<Users>> {
    let mut files = guard(&FILES);
    if let Some(users) = files.get(&identity).and_then(Weak::upgrade) {
        return users;
    }
    files.retain(|_, users| users.strong_count() > 0);
    let users = Arc::<Mutex<Users>>::default();
    files.insert(identity, Arc::downgrade(&users));
    users
}

/// A panic elsewhere leaves these counts right: nothing panics half-way.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const REMEDY: &str = "close it there first, or open it without lock if you know what you do";

fn purpose(mode: Mode) -> &'static str {
    if mode.writes() { "writing" } else { "reading" }
}

#[cold]
fn own_conflict(users: &Users, mode: Mode, name: &str) -> Error {
    let theirs = if users.writers > 0 { Mode::Write } else { Mode::Read };
    Error::new(
        ErrorKind::Locked,
        format!(
            "{name} cannot be locked for {}: this process has it open for {}; {REMEDY}",
            purpose(mode),
            purpose(theirs)
        ),
    )
}

#[cold]
fn error(refused: Refused, mode: Mode, name: &str) -> Error {
    let what = format!("{name} cannot be locked for {}", purpose(mode));
    match refused {
        Refused::Held(byte) => {
            let why = Refused::describe(byte);
            Error::new(ErrorKind::Locked, format!("{what}: {why}; {REMEDY}"))
        }
        Refused::Unsupported => Error::os(
            libc::ENOLCK,
            format!("{what}: its file system has no OFD locks; open it without lock"),
        ),
        Refused::Os(errno) => Error::os(errno, what),
    }
}
