//! The thread of one direction: reads one TUN device, runs the [`Line`], writes the other.
//!
//! A wake costs more than a packet (some 20 us on a virtual machine), so wakes are rationed: after one
//! that moved anything the thread rests ([`rest`], 100 to 500 us) before it looks again, and then takes
//! all that has come. Under load that bounds the wakes a second whatever the packet rate, and delays a
//! packet by up to one rest at each end; an idle line wakes for each packet at once. Departure times
//! are reckoned from the time of reading, so a late wake shifts packets but a line kept busy loses none
//! of its rate.
//!
//! The thread asks for round-robin real-time priority, and for a nice value of -10 where that is
//! refused: a busy machine must not look like a slow link. [`LineStats::late_max`] tells if it did.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice};

use super::burst::{Burst, HEAD_BOUND, READ_BOUND};
use super::line::{Line, LineCounts, Nanos};
use super::spec::LineSpec;
use super::tun::Tun;

/// The shortest time between two looks at a busy line: a small part of what a packet takes anyway.
fn rest(spec: &LineSpec) -> Duration {
    (spec.delay / 32).clamp(Duration::from_micros(100), Duration::from_micros(500))
}

/// Reads in one wake, each up to 64 KiB; the rest waits for the next, which then comes without a rest.
const READS_PER_WAKE: usize = 64;

/// How often the CPU time is published.
const CPU_EVERY: Duration = Duration::from_millis(50);

/// A line's counters as they stood at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineStats {
    pub counts: LineCounts,
    /// Bytes in the queue now.
    pub queue_bytes: u64,
    /// Packets (on the wire) or bursts that could not be read as a packet or written to the far side,
    /// as when its device is down.
    pub failed_packets: u64,
    /// The longest a packet was delivered after its time.
    pub late_max: Duration,
    /// Sum over all delivered packets of how late each was.
    pub late_sum: Duration,
    /// CPU time of the direction's thread. Includes the receiving kernel's work on what it writes.
    pub cpu: Duration,
}

/// Where the thread leaves its counters, readable at any time; each is exact, together they may be of
/// different wakes.
#[derive(Debug, Default)]
pub(super) struct Shared {
    in_packets: AtomicU64,
    in_bytes: AtomicU64,
    out_packets: AtomicU64,
    out_bytes: AtomicU64,
    lost: AtomicU64,
    queue_dropped: AtomicU64,
    outage_dropped: AtomicU64,
    queue_peak: AtomicU64,
    queue_bytes: AtomicU64,
    failed: AtomicU64,
    late_max: AtomicU64,
    late_sum: AtomicU64,
    cpu: AtomicU64,
    pub(super) stop: AtomicBool,
}

impl Shared {
    pub(super) fn stats(&self) -> LineStats {
        LineStats {
            counts: LineCounts {
                in_packets: self.in_packets.load(Relaxed),
                in_bytes: self.in_bytes.load(Relaxed),
                out_packets: self.out_packets.load(Relaxed),
                out_bytes: self.out_bytes.load(Relaxed),
                lost_packets: self.lost.load(Relaxed),
                queue_dropped_packets: self.queue_dropped.load(Relaxed),
                outage_dropped_packets: self.outage_dropped.load(Relaxed),
                queue_peak_bytes: self.queue_peak.load(Relaxed),
            },
            queue_bytes: self.queue_bytes.load(Relaxed),
            failed_packets: self.failed.load(Relaxed),
            late_max: Duration::from_nanos(self.late_max.load(Relaxed)),
            late_sum: Duration::from_nanos(self.late_sum.load(Relaxed)),
            cpu: Duration::from_nanos(self.cpu.load(Relaxed)),
        }
    }

    fn publish(&self, counts: LineCounts, queue_bytes: u64) {
        self.in_packets.store(counts.in_packets, Relaxed);
        self.in_bytes.store(counts.in_bytes, Relaxed);
        self.out_packets.store(counts.out_packets, Relaxed);
        self.out_bytes.store(counts.out_bytes, Relaxed);
        self.lost.store(counts.lost_packets, Relaxed);
        self.queue_dropped
            .store(counts.queue_dropped_packets, Relaxed);
        self.outage_dropped
            .store(counts.outage_dropped_packets, Relaxed);
        self.queue_peak.store(counts.queue_peak_bytes, Relaxed);
        self.queue_bytes.store(queue_bytes, Relaxed);
    }
}

/// A change to the line under way; `done` hears when it holds.
pub(super) struct Order {
    pub(super) change: Change,
    pub(super) done: SyncSender<()>,
}

pub(super) enum Change {
    Spec(LineSpec),
    /// Cut for this long; `None`: until mended.
    Cut(Option<Duration>),
    Mend,
}

/// All that one direction needs.
pub(super) struct Forward {
    pub(super) from: Arc<Tun>,
    pub(super) to: Arc<Tun>,
    pub(super) spec: LineSpec,
    pub(super) seed: u64,
    pub(super) orders: Receiver<Order>,
    /// An eventfd, non-blocking, written when there is an order or the stop flag is set.
    pub(super) bell: Arc<OwnedFd>,
    pub(super) shared: Arc<Shared>,
}

/// A segment of a burst, as the line carries it.
struct Segment {
    burst: Rc<Burst>,
    index: usize,
}

struct Runner {
    forward: Forward,
    line: Line<Segment>,
    origin: Instant,
    scratch: Box<[u8]>,
    failed: u64,
    late_max: Nanos,
    late_sum: Nanos,
    /// The device read from was deleted with its namespace: polling it would spin.
    gone: bool,
}

/// Runs until the stop flag is set.
pub(super) fn run(forward: Forward) {
    crate::priority::raise();
    let mut runner = Runner {
        line: Line::new(forward.spec, forward.seed),
        forward,
        origin: Instant::now(),
        scratch: vec![0; READ_BOUND].into(),
        failed: 0,
        late_max: 0,
        late_sum: 0,
        gone: false,
    };
    let mut cpu_due = Instant::now();
    while !runner.forward.shared.stop.load(Relaxed) {
        runner.obey_orders();
        let reads = runner.read();
        let delivered = runner.deliver();
        runner.publish();
        if Instant::now() >= cpu_due {
            let cpu = crate::priority::thread_cpu();
            runner
                .forward
                .shared
                .cpu
                .store(cpu.as_nanos() as u64, Relaxed);
            cpu_due = Instant::now() + CPU_EVERY;
        }
        if reads == READS_PER_WAKE {
            continue;
        }
        runner.wait(reads > 0 || delivered);
    }
}

impl Runner {
    fn now(&self) -> Nanos {
        self.origin.elapsed().as_nanos() as Nanos
    }

    fn obey_orders(&mut self) {
        while let Ok(order) = self.forward.orders.try_recv() {
            let now = self.now();
            match order.change {
                Change::Spec(spec) => self.line.set_spec(now, spec),
                Change::Cut(Some(time)) => {
                    let time = u64::try_from(time.as_nanos()).unwrap_or(Nanos::MAX);
                    self.line.cut(now, now.saturating_add(time));
                }
                Change::Cut(None) => self.line.cut(now, Nanos::MAX),
                Change::Mend => self.line.cut(now, now),
            }
            // Nobody listening is the orderer's choice.
            let _ = order.done.try_send(());
        }
    }

    /// Takes what has come; returns the number of reads.
    fn read(&mut self) -> usize {
        for reads in 0..READS_PER_WAKE {
            let length = match rustix::io::read(&*self.forward.from, &mut *self.scratch) {
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                // AGAIN: nothing more. Anything else (the device is being taken down) looks the same
                // to the link: nothing comes.
                Err(_) => return reads,
            };
            let now = self.now();
            match Burst::parse(&self.scratch[..length]) {
                Ok(burst) => {
                    let burst = Rc::new(burst);
                    for index in 0..burst.segments() {
                        let bytes = burst.segment_bytes(index);
                        let burst = Rc::clone(&burst);
                        self.line.push(now, bytes, Segment { burst, index });
                    }
                }
                Err(error) => {
                    self.failed += 1;
                    tracing::warn!(%error, "the emulator dropped a packet it cannot read");
                }
            }
        }
        READS_PER_WAKE
    }

    /// Writes what has arrived, segments of one burst together; returns whether there was any.
    fn deliver(&mut self) -> bool {
        let now = self.now();
        let mut pending: Option<(Rc<Burst>, Range<usize>)> = None;
        let mut any = false;
        while let Some(arrival) = self.line.pop(now) {
            any = true;
            let late = now - arrival.at;
            self.late_max = self.late_max.max(late);
            self.late_sum += late;
            let Segment { burst, index } = arrival.item;
            match &mut pending {
                Some((same, run)) if Rc::ptr_eq(same, &burst) && run.end == index => run.end += 1,
                _ => {
                    if let Some((burst, run)) = pending.replace((burst, index..index + 1)) {
                        self.write(&burst, run);
                    }
                }
            }
        }
        if let Some((burst, run)) = pending {
            self.write(&burst, run);
        }
        any
    }

    fn write(&mut self, burst: &Burst, run: Range<usize>) {
        let packets = run.len() as u64;
        let mut head = [0; HEAD_BOUND];
        let (length, payload) = burst.write_run(run, &mut head);
        let parts = [IoSlice::new(&head[..length]), IoSlice::new(payload)];
        loop {
            match rustix::io::writev(&*self.forward.to, &parts) {
                Ok(_) => return,
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.failed += packets;
                    tracing::debug!(%error, packets, "the far side took no packet");
                    return;
                }
            }
        }
    }

    fn publish(&self) {
        let shared = &self.forward.shared;
        shared.publish(self.line.counts(), self.line.queue_bytes());
        shared.failed.store(self.failed, Relaxed);
        shared.late_max.store(self.late_max, Relaxed);
        shared.late_sum.store(self.late_sum, Relaxed);
    }

    /// Sleeps until there is something to do: a rest at least if the line is busy.
    fn wait(&mut self, busy: bool) {
        let due = self.line.next_due();
        let bell = &*self.forward.bell;
        let left = if busy {
            Some(timespec(rest(self.line.spec())))
        } else {
            due.map(|due| timespec(Duration::from_nanos(due.saturating_sub(self.now()))))
        };
        let mut fds = [
            PollFd::new(bell, PollFlags::IN),
            PollFd::from_borrowed_fd(self.forward.from.as_fd(), PollFlags::IN),
        ];
        let watched = if busy || self.gone { 1 } else { 2 };
        if poll(&mut fds[..watched], left.as_ref()).is_err() {
            return;
        }
        self.gone |= fds[1].revents().contains(PollFlags::ERR);
        if !fds[0].revents().is_empty() {
            // Non-blocking, and whatever it says: the orders and the flag are what counts.
            let _ = rustix::io::read(bell, &mut [0; 8]);
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}
