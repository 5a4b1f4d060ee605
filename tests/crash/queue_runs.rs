//! An image used by queues: the driver's own (`src/queue`), on a simulated ring. Each
//! task is a thread that drives one queue or two, in all ways that there are: by
//! submitting, reaping, waiting, or watching the completion event. Others make calls
//! that do not go through a queue. A wait that never ends is a deadlock of the run.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use qcow2rs::image::Disk;
use qcow2rs::io::sim::{Rng, Task};
use qcow2rs::{Image, Result as Answer};

use super::guest::{Guest, Habit};
use super::life::Life;
use super::queue_user::{Shared, User};
use super::report::Trouble;

/// A thread and the queues that it drives.
struct Thread<'a> {
    guest: Guest<'a>,
    handle: &'a Arc<Image>,
    users: Vec<User<'a>>,
    /// The queues of all threads.
    all: &'a RefCell<Vec<Rc<Shared>>>,
}

/// Lets others go on.
pub async fn give_way() {
    let mut gave_way = false;
    poll_fn(|context| {
        if std::mem::replace(&mut gave_way, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn depth(rng: &mut Rng) -> usize {
    *rng.pick(&[1, 2, 3, 8, 32])
}

impl<'a> Thread<'a> {
    fn life(&self) -> &'a Life<'a> {
        self.guest.life
    }

    fn add_queue(&mut self) {
        let name = format!("thread {}, queue {}", self.guest.index, self.all.borrow().len());
        let depth = depth(&mut self.guest.rng);
        let user = User::new(self.life(), self.handle, name, depth);
        self.all.borrow_mut().push(user.shared.clone());
        self.users.push(user);
    }

    async fn run(mut self, requests: u64) {
        let ended = match self.play(requests).await {
            Ok(()) => self.end().await,
            error => error,
        };
        if let Err(what) = ended {
            self.life().fail(format!("thread {}: {what}", self.guest.index));
        }
    }

    async fn play(&mut self, requests: u64) -> Result<(), String> {
        let mut asked = 0;
        while asked < requests {
            give_way().await;
            let index = self.guest.rng.below(self.users.len() as u64) as usize;
            let max = self.guest.rng.between(1, 8) as usize;
            match self.guest.rng.below(32) {
                0..16 if self.users[index].is_full() && self.guest.rng.chance(3, 4) => {
                    self.wait(index).await?;
                }
                0..16 => {
                    self.users[index].ask(&mut self.guest)?;
                    asked += 1;
                }
                16..20 => self.users[index].submit()?,
                20..23 => self.users[index].reap(max)?,
                23..26 => self.wait(index).await?,
                26..29 => self.watch().await?,
                29 => {
                    let told = self.guest.rng.chance(1, 2);
                    self.users[index].tell(told)?;
                }
                30 => self.guest.rng.pick(&self.all.borrow()).wake_up(),
                _ if self.guest.rng.chance(1, 2) => {
                    self.users.swap_remove(index).destroy().await?;
                    self.add_queue();
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn wait(&mut self, index: usize) -> Result<(), String> {
        let in_flight = self.users[index].in_flight() as u64;
        let rng = &mut self.guest.rng;
        let min = *rng.pick(&[1.min(in_flight), in_flight, in_flight / 2, in_flight + 1]);
        let max = rng.between(0, 2 * in_flight);
        self.users[index].wait(min as usize, max as usize).await
    }

    /// Waits until the completion event of a queue can be read, as an event loop does
    /// that watches all of them, and reaps.
    async fn watch(&mut self) -> Result<(), String> {
        let some = self.users.iter().any(|user| user.in_flight() > 0);
        if !some || self.users.iter().any(|user| !user.told) {
            return Ok(());
        }
        self.users.iter_mut().try_for_each(User::submit)?;
        let event = |user: &User<'_>| user.shared.queue.completion_event().number();
        let events: Vec<i32> = self.users.iter().map(event).collect();
        self.life().disk.readable(&events).await;
        self.users.iter_mut().try_for_each(|user| user.reap(8))
    }

    /// Sees to the end of what is in flight.
    async fn end(&mut self) -> Result<(), String> {
        while let Some(index) = self.users.iter().position(|user| user.in_flight() > 0) {
            give_way().await;
            match self.guest.rng.below(4) {
                0 => self.wait(index).await?,
                1 => self.watch().await?,
                2 => self.users[index].wait(1, usize::MAX).await?,
                _ => self.users.swap_remove(index).destroy().await?,
            }
        }
        Ok(())
    }
}

impl Life<'_> {
    /// Uses the image by queues. False if that is the end.
    pub fn use_by_queues(&self, image: &Arc<Disk>) -> Result<bool, Trouble> {
        let mut rng = self.rng.borrow_mut().fork();
        let handle = Image::simulated(image.clone());
        let all = RefCell::default();
        let habit = *rng.pick(&Habit::ALL);
        let mut tasks = Vec::new();
        let requests = |rng: &mut Rng| rng.between(1, 40 + 10 * self.generations_left());
        for index in 0..rng.between(1, 3) {
            let guest = Guest { life: self, image, index, habit, rng: rng.fork() };
            let mut thread = Thread { guest, handle: &handle, users: Vec::new(), all: &all };
            (0..rng.between(1, 2)).for_each(|_| thread.add_queue());
            tasks.push(Task::new(format!("thread {index}"), thread.run(requests(&mut rng))));
        }
        for index in 0..rng.below(3) {
            let guest = Guest { life: self, image, index, habit, rng: rng.fork() };
            tasks.push(Task::new(format!("guest {index}"), guest.run(rng.between(1, 24))));
        }
        self.run(tasks)
    }

    /// Closes the image with requests of several queues in flight, which that sees to
    /// their end, or destroys the queues first; or abandons it (`Cancelled`).
    pub async fn close_with_queues(&self, image: &Arc<Disk>) -> Answer<()> {
        let mut rng = self.rng.borrow_mut().fork();
        let handle = Image::simulated(image.clone());
        let all = RefCell::default();
        let guest = Guest { life: self, image, index: 0, habit: Habit::Mixed, rng: rng.fork() };
        let mut thread = Thread { guest, handle: &handle, users: Vec::new(), all: &all };
        (0..rng.between(1, 3)).for_each(|_| thread.add_queue());
        let (closed, what) = match thread.leave(&mut rng).await {
            Ok(closed) => (closed, Ok(())),
            Err(what) => (Ok(()), Err(what)),
        };
        if let Err(what) = what {
            self.fail(what);
        }
        closed
    }
}

impl Thread<'_> {
    /// Puts requests into flight and leaves them to whoever closes the image.
    async fn leave(&mut self, rng: &mut Rng) -> Result<Answer<()>, String> {
        for user in &mut self.users {
            for _ in 0..rng.below(8) {
                user.ask(&mut self.guest)?;
                give_way().await;
                match rng.below(8) {
                    0..2 => user.submit()?,
                    2 => user.reap(1)?,
                    _ => {}
                }
            }
        }
        // One after the other, with nobody to drive the rest meanwhile.
        for _ in 0..rng.below(2) * rng.below(4) {
            if let Some(mut user) = self.users.pop() {
                user.destroy().await?;
            }
        }
        if rng.chance(1, 8) {
            let answer = self.handle.abandon().map(|()| qcow2rs::ErrorKind::Cancelled);
            self.users.iter_mut().try_for_each(User::reap_after_abandoning)?;
            return Ok(answer.and_then(|kind| Err(qcow2rs::Error::new(kind, "abandoned"))));
        }
        let closed = self.handle.close_simulated().await;
        self.users.iter_mut().try_for_each(|user| user.reap_after_close(closed.is_ok()))?;
        Ok(closed)
    }
}
