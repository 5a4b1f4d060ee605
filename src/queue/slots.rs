//! The requests of a queue: accepted, carried on, completed. Whoever drives a queue
//! has this for itself meanwhile.

use std::any::Any;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::bells::Bells;
use super::engine::QueueEngine;
use super::flight::Flight;
use super::ready::{Ready, SlotWaker};
use super::request::{Exchange, Outcome, Request, serve};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ring::Landed;
use crate::sys::buffer::Buffer;

/// So many requests that start at once go to a ring, even if each of them could be
/// done at once (measured: see docs/performance.md).
const MANY: usize = 8;

/// How a request ended.
#[derive(Debug)]
pub struct Completion {
    /// What was given with the request.
    pub user_data: u64,
    /// As a blocking call would return it.
    pub result: Result<()>,
    /// The buffer that was given with the request; a read that succeeded has filled
    /// it. `None` also if the request was under way when it was given up: its image was
    /// abandoned, or something panicked.
    pub buffer: Option<Buffer>,
}

/// All requests of a queue.
pub struct Slots<E: QueueEngine> {
    slots: Vec<Slot<E>>,
    free: Vec<usize>,
    /// Those that wait to be started.
    accepted: VecDeque<usize>,
    completed: VecDeque<Completion>,
    /// Flights that are over: kept to use its memory again.
    landed: Vec<Landed>,
    depth: usize,
    /// Calls that handed out completions, in a circle: one of them looks at the clock.
    pub calls: u8,
    /// Operations are left that the kernel did not take: it is to be asked again.
    pub unsubmitted: bool,
}

struct Slot<E: QueueEngine> {
    /// Serves request after request; none after a panic.
    server: Option<Pin<Box<dyn Future<Output = Infallible> + Send>>>,
    exchange: Arc<Exchange>,
    waker: Arc<SlotWaker<Bells<E::Event>>>,
    std_waker: Waker,
    /// Of the request that it serves.
    user_data: Option<u64>,
    /// Not started yet.
    request: Option<Request>,
    /// The kernel has it.
    flight: Option<Flight>,
}

impl<E: QueueEngine> Slots<E> {
    /// No requests.
    pub fn new(depth: usize) -> Slots<E> {
        Slots {
            slots: Vec::new(),
            free: Vec::new(),
            accepted: VecDeque::new(),
            completed: VecDeque::new(),
            landed: Vec::new(),
            depth,
            calls: 0,
            unsubmitted: false,
        }
    }

    /// Whether no more requests are accepted.
    pub fn is_full(&self) -> bool {
        self.in_flight() >= self.depth && !mutant!(FullQueueAccepts)
    }

    /// Requests whose completion was not taken.
    pub fn in_flight(&self) -> usize {
        self.unfinished() + self.completed.len()
    }

    /// Requests that have not completed.
    pub fn unfinished(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Completions to be taken.
    pub fn completed(&self) -> usize {
        self.completed.len()
    }

    /// Requests to be started.
    pub fn accepted(&self) -> usize {
        self.accepted.len()
    }

    /// Accepts a request. The caller has seen that there is room.
    #[inline]
    pub fn accept(
        &mut self,
        ready: &Arc<Ready<Bells<E::Event>>>,
        request: Request,
        user_data: u64,
    ) {
        let index = self.free.pop().unwrap_or_else(|| {
            let index = self.slots.len();
            let waker = SlotWaker::new(ready.clone(), index);
            self.slots.push(Slot {
                server: None,
                exchange: Arc::default(),
                std_waker: waker.clone().into(),
                waker,
                user_data: None,
                request: None,
                flight: None,
            });
            index
        });
        let slot = &mut self.slots[index];
        slot.user_data = Some(user_data);
        slot.request = Some(request);
        self.accepted.push_back(index);
    }

    /// Starts what was accepted; returns how many.
    pub fn start(&mut self, engine: &Arc<E>) -> Result<usize> {
        let mut count = 0;
        // A ring takes many requests with one system call.
        let many = self.accepted.len() >= MANY && engine.has_ring();
        while let Some(index) = self.accepted.pop_front() {
            count += 1;
            self.begin(index, many, engine)?;
        }
        Ok(count)
    }

    fn begin(&mut self, index: usize, many: bool, engine: &Arc<E>) -> Result<()> {
        let slot = &mut self.slots[index];
        let Some(request) = &slot.request else { return Ok(()) };
        if many {
            slot.flight = Flight::start(request, &**engine, index);
            if slot.flight.is_some() {
                return Ok(());
            }
        }
        // A panic here is one of a storage's callback.
        match catch_unwind(AssertUnwindSafe(|| request.run_now(&**engine))) {
            Ok(Some(result)) => {
                let buffer = slot.request.take().and_then(|request| request.work.into_buffer());
                self.complete(index, Outcome { result, buffer });
                return Ok(());
            }
            Ok(None) => {}
            Err(payload) => return Err(self.panicked(index, payload, engine)),
        }
        if !many {
            slot.flight = Flight::start(request, &**engine, index);
            if slot.flight.is_some() {
                return Ok(());
            }
        }
        self.serve(index, engine)
    }

    /// Has a future carry a request out.
    fn serve(&mut self, index: usize, engine: &Arc<E>) -> Result<()> {
        let slot = &mut self.slots[index];
        if let Some(request) = slot.request.take() {
            slot.exchange.put(request);
        }
        self.poll(index, engine)
    }

    /// Ends the flights that are over.
    pub fn land(&mut self, engine: &Arc<E>) -> Result<()> {
        let mut landed = std::mem::take(&mut self.landed);
        engine.landed(&mut landed);
        let mut outcome = Ok(());
        for Landed { tag, result } in landed.drain(..) {
            mutant!(LandingForgotten => continue);
            let Some(slot) = self.slots.get_mut(tag) else { continue };
            let (Some(flight), Some(request)) = (slot.flight.take(), &slot.request) else {
                continue;
            };
            match flight.land(request, result) {
                Some(result) => {
                    let request = slot.request.take();
                    let buffer = request.and_then(|request| request.work.into_buffer());
                    self.complete(tag, Outcome { result, buffer });
                }
                None => outcome = outcome.and(self.serve(tag, engine)),
            }
        }
        self.landed = landed;
        outcome
    }

    #[cold]
    fn panicked(&mut self, index: usize, payload: Box<dyn Any + Send>, engine: &E) -> Error {
        let error = panicked(payload);
        self.give_up(index, Error::new(ErrorKind::Panic, error.message()), engine);
        error
    }

    /// Carries one request on; an error if that panicked.
    pub fn poll(&mut self, index: usize, engine: &Arc<E>) -> Result<()> {
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        slot.waker.unlist();
        if slot.user_data.is_none() {
            // A waker that was left over.
            return Ok(());
        }
        let exchange = &slot.exchange;
        let server =
            slot.server.get_or_insert_with(|| Box::pin(serve(exchange.clone(), engine.clone())));
        let mut context = Context::from_waker(&slot.std_waker);
        // What a panic leaves half done is dropped.
        let polled = catch_unwind(AssertUnwindSafe(|| server.as_mut().poll(&mut context)));
        match polled {
            Ok(Poll::Pending) => {
                let early = || Outcome { result: Ok(()), buffer: None };
                let early = || mutant!(CompletedEarly).then(early);
                if let Some(outcome) = slot.exchange.take_outcome().or_else(early) {
                    self.complete(index, outcome);
                }
                Ok(())
            }
            Ok(Poll::Ready(never)) => match never {},
            Err(payload) => Err(self.panicked(index, payload, engine)),
        }
    }

    fn complete(&mut self, index: usize, outcome: Outcome) {
        let Some(user_data) = self.slots[index].user_data.take() else { return };
        self.free.push(index);
        let Outcome { result, buffer } = outcome;
        mutant!(CompletedTwice =>
            self.completed.push_back(Completion { user_data, result: Ok(()), buffer: None })
        );
        self.completed.push_back(Completion { user_data, result, buffer });
    }

    /// Ends a request that is not carried on; returns when the kernel is done with
    /// its memory.
    fn give_up(&mut self, index: usize, error: Error, engine: &E) {
        let slot = &mut self.slots[index];
        if let Some(server) = slot.server.take() {
            // Another panic is no news.
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(server))) {
                std::mem::forget(payload);
            }
        }
        if let (Some(flight), Some(request)) = (slot.flight.take(), &slot.request) {
            if !mutant!(GivenUpInFlight) {
                engine.see_landed(index);
            }
            // How it ended is no news any more.
            flight.land(request, -libc::ECANCELED);
        }
        let request = slot.request.take().or_else(|| slot.exchange.take_request());
        let buffer = request.and_then(|request| request.work.into_buffer());
        self.complete(index, Outcome { result: Err(error), buffer });
    }

    /// Ends all requests without carrying them on.
    pub fn give_up_all(&mut self, engine: &E, error: impl Fn() -> Error) {
        self.accepted.clear();
        for index in 0..self.slots.len() {
            if self.slots[index].user_data.is_some() {
                self.give_up(index, error(), engine);
            }
        }
    }

    /// The completion of the request that ended first of those not taken yet.
    pub fn take(&mut self) -> Option<Completion> {
        self.completed.pop_front()
    }
}

/// Makes an error of a panic.
#[cold]
fn panicked(payload: Box<dyn Any + Send>) -> Error {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let error = Error::new(ErrorKind::Panic, format!("internal error in a request: {text}"));
    // Dropping a payload may panic again; leaking it harms nobody.
    std::mem::forget(payload);
    crate::log::emit(crate::log::ERROR, "queue", || error.message());
    error
}
