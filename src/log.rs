//! Log messages of the library: none unless somebody listens.
//!
//! One listener for the whole process. It is called with no lock held, so that
//! it may call back; what it logs while it is being called is dropped. This
//! file knows nothing of C.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

/// The operation cannot go on, or data is in danger.
pub(crate) const ERROR: u32 = 1;
/// Something a person should look at.
#[allow(dead_code)] // The levels are one list, whoever uses which.
pub(crate) const WARN: u32 = 2;
/// What happens once in the life of an image.
#[allow(dead_code)]
pub(crate) const INFO: u32 = 3;
/// What happens now and then.
#[allow(dead_code)]
pub(crate) const DEBUG: u32 = 4;
/// What happens with each request.
#[allow(dead_code)]
pub(crate) const TRACE: u32 = 5;

/// Takes a message: level, target (the part of the library), text without a
/// newline at its end. Runs on any thread, several at a time.
pub(crate) type Sink = dyn Fn(u32, &str, &str) + Send + Sync;

/// A sink and the number of its calls in progress.
struct Listener {
    sink: Box<Sink>,
    calls: Mutex<usize>,
    fewer: Condvar,
}

/// The most verbose level that anybody wants; 0 means none.
static MAX_LEVEL: AtomicU32 = AtomicU32::new(0);
static LISTENER: RwLock<Option<Arc<Listener>>> = RwLock::new(None);

thread_local! {
    /// The address of the listener that this thread is inside of, or 0.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// Hands a message to the sink if it wants messages of this level; only then is
/// the text made.
#[inline]
pub(crate) fn emit(level: u32, target: &str, text: impl FnOnce() -> String) {
    if level <= MAX_LEVEL.load(Ordering::Relaxed) {
        deliver(level, target, text);
    }
}

#[cold]
fn deliver(level: u32, target: &str, text: impl FnOnce() -> String) {
    // A thread without local storage is at its end, one inside of the sink
    // would go round in circles: both stay silent.
    if INSIDE.try_with(Cell::get) != Ok(0) {
        return;
    }
    let text = text();
    let call = {
        let listener = LISTENER.read().unwrap_or_else(PoisonError::into_inner);
        match listener.as_ref() {
            Some(listener) => Call::begin(Arc::clone(listener)),
            None => return,
        }
    };
    (call.0.sink)(level, target, &text);
}

/// Replaces the sink (`None`: no more messages) and the most verbose level it
/// wants. Returns when the last call of the previous sink has finished, except
/// for one that this function is called from.
pub(crate) fn listen(sink: Option<Box<Sink>>, max_level: u32) {
    let listener =
        sink.map(|sink| Arc::new(Listener { sink, calls: Mutex::new(0), fewer: Condvar::new() }));
    let previous = {
        let mut current = LISTENER.write().unwrap_or_else(PoisonError::into_inner);
        let level = if listener.is_some() { max_level } else { 0 };
        MAX_LEVEL.store(level, Ordering::Relaxed);
        std::mem::replace(&mut *current, listener)
    };
    if let Some(previous) = previous {
        previous.finish();
    }
}

impl Listener {
    fn calls(&self) -> MutexGuard<'_, usize> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the calls of other threads.
    fn finish(&self) {
        let own = usize::from(INSIDE.try_with(Cell::get) == Ok(address(self)));
        let mut calls = self.calls();
        while *calls > own {
            calls = self.fewer.wait(calls).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn address(listener: &Listener) -> usize {
    std::ptr::from_ref(listener).addr()
}

/// A call of a sink in progress; ends it when dropped, also by a panic.
struct Call(Arc<Listener>);

impl Call {
    /// Must be called with `LISTENER` locked: a listener that has been replaced
    /// gets no new calls.
    fn begin(listener: Arc<Listener>) -> Call {
        *listener.calls() += 1;
        INSIDE.set(address(&listener));
        Call(listener)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        INSIDE.set(0);
        *self.0.calls() -= 1;
        self.0.fewer.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// The sink belongs to the process: one test at a time.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect() -> (Arc<Mutex<Vec<String>>>, Box<Sink>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&seen);
        let sink = move |level: u32, target: &str, text: &str| {
            // Tests of other modules run at the same time.
            if target == "log-test" {
                into.lock().unwrap().push(format!("{level} {text}"));
            }
        };
        (seen, Box::new(sink))
    }

    #[test]
    fn text_is_made_only_for_a_level_that_is_wanted() {
        let _alone = alone();
        let (seen, sink) = collect();
        listen(Some(sink), WARN);
        emit(ERROR, "log-test", || "first".into());
        emit(WARN, "log-test", || "second".into());
        emit(INFO, "log-test", || panic!("nobody wants this"));
        listen(None, TRACE);
        emit(ERROR, "log-test", || panic!("nobody listens"));
        assert_eq!(*seen.lock().unwrap(), ["1 first", "2 second"]);
    }

    #[test]
    fn a_sink_that_logs_is_not_called_again() {
        let _alone = alone();
        let (seen, inner) = collect();
        let sink = move |level: u32, target: &str, text: &str| {
            emit(ERROR, "log-test", || "nested".into());
            inner(level, target, text);
        };
        listen(Some(Box::new(sink)), TRACE);
        emit(ERROR, "log-test", || "outer".into());
        listen(None, 0);
        assert_eq!(*seen.lock().unwrap(), ["1 outer"]);
    }

    #[test]
    fn replacing_waits_for_calls_in_progress() {
        let _alone = alone();
        let (entered, on_entry) = mpsc::channel();
        let (let_go, gate) = mpsc::channel::<()>();
        let gate = Mutex::new(gate);
        let sink = move |_: u32, target: &str, _: &str| {
            if target == "log-test" {
                entered.send(()).unwrap();
                gate.lock().unwrap().recv().unwrap();
            }
        };
        listen(Some(Box::new(sink)), TRACE);
        std::thread::scope(|scope| {
            scope.spawn(|| emit(ERROR, "log-test", || "slow".into()));
            on_entry.recv().unwrap();
            let (done, on_done) = mpsc::channel();
            scope.spawn(move || {
                listen(None, 0);
                done.send(()).unwrap();
            });
            let early = on_done.recv_timeout(Duration::from_millis(50));
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
            let_go.send(()).unwrap();
            on_done.recv().unwrap();
        });
    }

    #[test]
    fn a_sink_may_replace_itself() {
        let _alone = alone();
        let sink = |_: u32, _: &str, _: &str| listen(None, 0);
        listen(Some(Box::new(sink)), TRACE);
        emit(ERROR, "log-test", || "last words".into());
        emit(ERROR, "log-test", || panic!("nobody listens"));
    }

    #[test]
    fn a_panic_in_the_sink_ends_its_call() {
        let _alone = alone();
        let sink = |_: u32, target: &str, _: &str| assert_ne!(target, "log-test");
        listen(Some(Box::new(sink)), TRACE);
        let caught = std::panic::catch_unwind(|| emit(ERROR, "log-test", String::new));
        assert!(caught.is_err());
        listen(None, 0);
    }
}
