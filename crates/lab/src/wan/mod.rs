//! The wide area, emulated in user space: a TUN device in each of two network namespaces, a thread for
//! each direction between them. No kernel support beyond TUN is needed (no netem).
//!
//! [`mod@line`] is the model of a direction, pure; `burst` lets it see single packets while the bytes move
//! in large pieces; [`forward`](self) is the thread that joins both to the devices.

mod burst;
mod forward;
pub mod line;
mod spec;
mod tun;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::EventfdFlags;

use crate::LabError;
pub use forward::LineStats;
use forward::{Change, Forward, Order, Shared};
pub use line::LineCounts;
pub use spec::{LineSpec, Queue, WanSpec};
pub use tun::Tun;

/// Orders waiting for a direction's thread; an orderer waits while there are as many.
const ORDERS_BOUND: usize = 16;

/// How long a direction's thread may take to obey an order before it counts as ended.
const OBEY_WITHIN: Duration = Duration::from_secs(60);

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    AToB,
    BToA,
}

impl Direction {
    pub const BOTH: [Direction; 2] = [Direction::AToB, Direction::BToA];

    fn name(self) -> &'static str {
        match self {
            Direction::AToB => "wan a-to-b",
            Direction::BToA => "wan b-to-a",
        }
    }
}

/// A running link. All methods take effect before they return. Dropping it ends the link and, with it,
/// the two devices.
#[derive(Debug)]
pub struct Wan {
    a_to_b: Way,
    b_to_a: Way,
}

#[derive(Debug)]
struct Way {
    direction: Direction,
    orders: SyncSender<Order>,
    bell: Arc<OwnedFd>,
    shared: Arc<Shared>,
    spec: std::sync::Mutex<LineSpec>,
    thread: Option<JoinHandle<()>>,
}

impl Wan {
    /// Joins two devices.
    pub fn start(a: Tun, b: Tun, spec: WanSpec) -> Result<Wan, LabError> {
        spec.validate()?;
        let (a, b) = (Arc::new(a), Arc::new(b));
        let a_to_b = Way::start(Direction::AToB, &a, &b, spec.a_to_b, spec.seed)?;
        // Its own sequence: packet n and its answer must not share their luck.
        let b_to_a = Way::start(Direction::BToA, &b, &a, spec.b_to_a, !spec.seed)?;
        Ok(Wan { a_to_b, b_to_a })
    }

    pub fn stats(&self, direction: Direction) -> LineStats {
        self.way(direction).shared.stats()
    }

    pub fn spec(&self, direction: Direction) -> LineSpec {
        *self.way(direction).locked_spec()
    }

    /// Changes a direction under way. What is on the cable arrives as it would have.
    pub fn set(&self, direction: Direction, spec: LineSpec) -> Result<(), LabError> {
        spec.validate()?;
        let way = self.way(direction);
        let mut known = way.locked_spec();
        way.order(Change::Spec(spec))?;
        *known = spec;
        Ok(())
    }

    pub fn set_both(&self, spec: LineSpec) -> Result<(), LabError> {
        Direction::BOTH
            .into_iter()
            .try_for_each(|direction| self.set(direction, spec))
    }

    /// Drops everything, what is under way included, for `time` from now, both ways. Does not wait for the end.
    pub fn outage(&self, time: Duration) -> Result<(), LabError> {
        Direction::BOTH
            .into_iter()
            .try_for_each(|direction| self.cut(direction, Some(time)))
    }

    /// Cuts one direction, for a time or until [`mend`](Self::mend). Replaces a cut that lasts.
    pub fn cut(&self, direction: Direction, time: Option<Duration>) -> Result<(), LabError> {
        self.way(direction).order(Change::Cut(time))
    }

    /// Ends what [`cut`](Self::cut) or [`outage`](Self::outage) began.
    pub fn mend(&self, direction: Direction) -> Result<(), LabError> {
        self.way(direction).order(Change::Mend)
    }

    fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::AToB => &self.a_to_b,
            Direction::BToA => &self.b_to_a,
        }
    }
}

impl Way {
    fn start(
        direction: Direction,
        from: &Arc<Tun>,
        to: &Arc<Tun>,
        spec: LineSpec,
        seed: u64,
    ) -> Result<Way, LabError> {
        let purpose = direction.name();
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| LabError::Thread {
                purpose,
                source: errno.into(),
            })?;
        let bell = Arc::new(bell);
        let shared = Arc::new(Shared::default());
        let (orders, inbox) = sync_channel(ORDERS_BOUND);
        let forward = Forward {
            from: Arc::clone(from),
            to: Arc::clone(to),
            spec,
            seed,
            orders: inbox,
            bell: Arc::clone(&bell),
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name(purpose.to_owned())
            .spawn(move || forward::run(forward))
            .map_err(|source| LabError::Thread { purpose, source })?;
        Ok(Way {
            direction,
            orders,
            bell,
            shared,
            spec: std::sync::Mutex::new(spec),
            thread: Some(thread),
        })
    }

    fn locked_spec(&self) -> std::sync::MutexGuard<'_, LineSpec> {
        // A spec is plain data: whoever panicked holding it left it whole.
        self.spec
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn order(&self, change: Change) -> Result<(), LabError> {
        let ended = LabError::WanEnded {
            direction: self.direction.name(),
        };
        let (done, obeyed) = sync_channel(1);
        if self.orders.send(Order { change, done }).is_err() {
            return Err(ended);
        }
        self.ring();
        obeyed.recv_timeout(OBEY_WITHIN).map_err(|_| ended)
    }

    fn ring(&self) {
        // Fails only when 2^64 - 2 rings are unheard.
        let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.ring();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; there is nothing left to undo.
            let _ = thread.join();
        }
    }
}
