//! Runs tasks on a simulated disk: one thread, and at each step the seed says
//! which task is polled or which operation gets further.

use std::future::{Future, poll_fn};
use std::ops::ControlFlow;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use super::SimDisk;
use super::world::Action;

/// Something to be run, with a name for reports.
pub struct Task<'a> {
    name: String,
    future: Pin<Box<dyn Future<Output = ()> + 'a>>,
}

impl<'a> Task<'a> {
    /// A task of this name.
    pub fn new(name: impl Into<String>, future: impl Future<Output = ()> + 'a) -> Task<'a> {
        Task { name: name.into(), future: Box::pin(future) }
    }
}

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Every task is through.
    Done,
    /// The observer stopped it; the disk is as it was at that moment.
    Stopped,
    /// These tasks wait for what will never come.
    Deadlock(Vec<String>),
    /// More steps than anything sensible takes; these tasks are left.
    Endless(Vec<String>),
}

/// After so many steps a run counts as endless.
const ENDLESS: u64 = 20_000_000;

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A task that has not ended.
struct Running<'a> {
    task: Task<'a>,
    woken: Arc<Flag>,
    waker: Waker,
}

impl<'a> Running<'a> {
    fn new(task: Task<'a>) -> Running<'a> {
        let woken = Arc::new(Flag(AtomicBool::new(true)));
        Running { task, waker: Waker::from(woken.clone()), woken }
    }

    /// Whether it is through.
    fn poll(&mut self) -> bool {
        self.woken.0.store(false, Ordering::Relaxed);
        self.task.future.as_mut().poll(&mut Context::from_waker(&self.waker)).is_ready()
    }
}

impl SimDisk {
    /// Runs the tasks until all are through.
    pub fn run(&self, tasks: Vec<Task<'_>>) -> Outcome {
        self.run_observed(tasks, |_| ControlFlow::Continue(()))
    }

    /// Runs the tasks. The observer is called after each step, with the number
    /// of steps made on this disk so far; it may look at everything, draw
    /// crashes, and stop the run. Then every task is dropped where it stands,
    /// and the disk is good for looking at and for crashes only.
    pub fn run_observed(
        &self,
        tasks: Vec<Task<'_>>,
        mut observer: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Outcome {
        let mut tasks: Vec<_> = tasks.into_iter().map(|task| Some(Running::new(task))).collect();
        let start = self.world().step;
        let names = |tasks: &[Option<Running<'_>>]| {
            tasks.iter().flatten().map(|running| running.task.name.clone()).collect::<Vec<_>>()
        };
        let outcome = loop {
            if tasks.iter().all(Option::is_none) {
                return Outcome::Done;
            }
            let is_ready = |task: &Option<Running<'_>>| {
                task.as_ref().is_some_and(|running| running.woken.0.load(Ordering::Relaxed))
            };
            let ready: Vec<usize> = (0..tasks.len()).filter(|i| is_ready(&tasks[*i])).collect();
            let action = self.world().choose(&ready);
            match action {
                Action::Poll(index) => {
                    self.world().thread = index as u64 + 1;
                    if tasks[index].as_mut().is_some_and(Running::poll) {
                        tasks[index] = None;
                    }
                    self.world().thread = 0;
                }
                Action::Advance(op) => {
                    let waker = self.world().advance(op);
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                }
                Action::Wake(wakers) => wakers.into_iter().for_each(Waker::wake),
                Action::Nothing => break Outcome::Deadlock(names(&tasks)),
            }
            let step = {
                let mut world = self.world();
                world.step += 1;
                world.step
            };
            if observer(step).is_break() {
                break Outcome::Stopped;
            }
            if step - start > ENDLESS {
                break Outcome::Endless(names(&tasks));
            }
        };
        self.world().stopped = true;
        outcome
    }

    /// Runs one future to its end. Panics if it waits in vain.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let mut result = None;
        let task = Task::new("main", async { result = Some(future.await) });
        let outcome = self.run(vec![task]);
        result.unwrap_or_else(|| panic!("{outcome:?}"))
    }
}

/// Polls a future `polls` times and drops it some time after that, wherever it
/// stands: `None`. For tests of what a request leaves behind that is given up.
pub async fn give_up_after<T>(polls: u64, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        if left == 0 {
            context.waker().wake_by_ref();
        }
        future.as_mut().poll(context).map(Some)
    })
    .await
}
