//! The requests of one connection that wait for something, polled side by side by its task.
//!
//! Each sits in a slot that has its own waker, so that of 256 waiting requests only those that something
//! has happened to are polled. Slots and their wakers are reused: serving a request allocates its future
//! and nothing else. A wake that arrives late, for the slot's previous tenant, costs one idle poll.
//!
//! A request that is done at its first poll, as most are whose data are at hand, never waits here.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::execute::Answer;
use crate::export::Errno;
use crate::request::Request;

pub type Outcome = Result<Answer, Errno>;
pub type Handler = Pin<Box<dyn Future<Output = Outcome> + Send>>;

pub struct InFlight {
    slots: Vec<Slot>,
    /// Slots without a tenant.
    free: Vec<usize>,
    woken: Arc<Woken>,
    /// Kept for its allocation.
    batch: Vec<usize>,
}

struct Slot {
    tenant: Option<(Request, Handler)>,
    bell: Arc<Bell>,
    waker: Waker,
}

/// The slots to poll, and the task to do it.
#[derive(Default)]
struct Woken {
    state: Mutex<WokenState>,
}

#[derive(Default)]
struct WokenState {
    /// Each slot at most once: bounded by the number of slots.
    slots: Vec<usize>,
    /// Taken by the first wake after a poll; the others need not wake it again.
    task: Option<Waker>,
}

impl Woken {
    fn lock(&self) -> MutexGuard<'_, WokenState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Bell {
    slot: usize,
    /// The slot is among those to poll.
    rung: AtomicBool,
    woken: Arc<Woken>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.rung.swap(true, Ordering::AcqRel) {
            return;
        }
        let task = {
            let mut state = self.woken.lock();
            state.slots.push(self.slot);
            state.task.take()
        };
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl InFlight {
    pub fn new() -> Self {
        InFlight {
            slots: Vec::new(),
            free: Vec::new(),
            woken: Arc::default(),
            batch: Vec::new(),
        }
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts a request; its outcome if there is nothing to wait for. The number of slots grows to the
    /// most requests ever waiting at once, which is the caller's to bound.
    pub fn start(&mut self, request: Request, mut handler: Handler) -> Option<Outcome> {
        let index = self.free.pop().unwrap_or_else(|| self.add_slot());
        let slot = &mut self.slots[index];
        match poll(&mut handler, &slot.waker) {
            Poll::Ready(outcome) => {
                self.free.push(index);
                Some(outcome)
            }
            Poll::Pending => {
                slot.tenant = Some((request, handler));
                None
            }
        }
    }

    fn add_slot(&mut self) -> usize {
        let bell = Arc::new(Bell {
            slot: self.slots.len(),
            rung: AtomicBool::new(false),
            woken: self.woken.clone(),
        });
        self.slots.push(Slot {
            tenant: None,
            waker: Waker::from(bell.clone()),
            bell,
        });
        self.slots.len() - 1
    }

    /// Polls the requests that something has happened to and hands over those that are finished. The
    /// task is woken when there are more, be they started before or after this call: so the task calls
    /// it before it starts any.
    pub fn poll(&mut self, cx: &mut Context<'_>, mut finished: impl FnMut(Request, Outcome)) {
        let mut batch = std::mem::take(&mut self.batch);
        {
            let mut state = self.woken.lock();
            match &mut state.task {
                Some(task) => task.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            std::mem::swap(&mut batch, &mut state.slots);
        }
        for index in batch.drain(..) {
            let slot = &mut self.slots[index];
            // Before the poll: a wake during it must count.
            slot.bell.rung.store(false, Ordering::Release);
            let Some((_, handler)) = &mut slot.tenant else {
                continue;
            };
            if let Poll::Ready(outcome) = poll(handler, &slot.waker)
                && let Some((request, _)) = slot.tenant.take()
            {
                self.free.push(index);
                finished(request, outcome);
            }
        }
        self.batch = batch;
    }

    /// Drops the requests that change nothing and hands them over.
    pub fn drop_reads(&mut self, mut dropped: impl FnMut(Request)) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if let Some((request, _)) = slot.tenant.take_if(|(r, _)| !r.command.changes()) {
                self.free.push(index);
                dropped(request);
            }
        }
    }

    /// Waits until no request is left; their outcomes are lost.
    pub async fn finish(&mut self) {
        std::future::poll_fn(|cx| {
            self.poll(cx, |_, _| {});
            if self.len() == 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await
    }
}

/// Polls a handler; one that panics has failed, and only its own request with it.
fn poll(handler: &mut Handler, waker: &Waker) -> Poll<Outcome> {
    let mut cx = Context::from_waker(waker);
    catch_unwind(AssertUnwindSafe(|| handler.as_mut().poll(&mut cx)))
        .unwrap_or(Poll::Ready(Err(Errno::Eio)))
}
