//! The echo prober: is the guest there, asked every few milliseconds by UDP (RFC 862).

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::series::{EchoSeries, Probe};
use crate::LabError;
use crate::net::Namespace;

/// Most requests recorded: 5.8 hours at 5 ms, 128 MB. At the bound no more are sent.
pub const PROBES_BOUND: usize = 1 << 22;

/// The prober looks at its stop flag this often at least.
const LOOK: Duration = Duration::from_millis(50);

/// Bytes of a request: a mark of this prober, then the request's number.
const REQUEST: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EchoSpec {
    /// The guest's echo, port 7 as a rule.
    pub target: SocketAddr,
    pub interval: Duration,
}

impl EchoSpec {
    /// A request every 5 ms.
    pub fn new(target: SocketAddr) -> Self {
        EchoSpec {
            target,
            interval: Duration::from_millis(5),
        }
    }
}

/// A thread inside a namespace that asks until it is dropped or stopped.
///
/// A prober that is itself kept from running sends nothing meanwhile and does not catch up: see
/// [`EchoSeries::longest_send_pause`]. It asks for a raised priority against that.
#[derive(Debug)]
pub struct EchoProber {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), LabError>>>,
}

#[derive(Debug, Default)]
struct Shared {
    probes: Mutex<Vec<Probe>>,
    stop: AtomicBool,
}

impl Shared {
    fn probes(&self) -> MutexGuard<'_, Vec<Probe>> {
        // Every entry is whole as soon as it is there.
        self.probes
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl EchoProber {
    pub fn start(namespace: &Namespace, spec: EchoSpec) -> Result<EchoProber, LabError> {
        let socket = namespace.run("echo socket", || open(spec.target))?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = namespace.thread("echo prober", move || ask(&socket, spec, &theirs))?;
        Ok(EchoProber {
            shared,
            thread: Some(thread),
        })
    }

    /// The series so far.
    pub fn series(&self) -> EchoSeries {
        EchoSeries {
            probes: self.shared.probes().clone(),
        }
    }

    /// Ends the prober. Answers still on their way count as lost.
    pub fn stop(mut self) -> EchoSeries {
        self.end();
        EchoSeries {
            probes: std::mem::take(&mut *self.shared.probes()),
        }
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take()
            && let Ok(Err(error)) = thread.join()
        {
            tracing::warn!(%error, "the echo prober could not run");
        }
    }
}

impl Drop for EchoProber {
    fn drop(&mut self) {
        self.end();
    }
}

fn open(target: SocketAddr) -> Result<UdpSocket, LabError> {
    let failed = |step| {
        move |source| LabError::Socket {
            address: target,
            step,
            source,
        }
    };
    // Not connected: a connected socket reports ICMP errors of earlier requests in place of answers.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed("bind"))?;
    socket
        .set_nonblocking(true)
        .map_err(failed("non-blocking"))?;
    Ok(socket)
}

fn ask(socket: &UdpSocket, spec: EchoSpec, shared: &Shared) {
    crate::priority::raise();
    let mark = fresh_mark();
    let mut due = Instant::now();
    let mut sent = 0;
    while !shared.stop.load(Relaxed) {
        let now = Instant::now();
        if now >= due && sent < PROBES_BOUND {
            let mut request = [0; REQUEST];
            request[..8].copy_from_slice(&mark.to_be_bytes());
            request[8..].copy_from_slice(&(sent as u64).to_be_bytes());
            shared.probes().push(Probe {
                sent: now,
                answered: None,
            });
            sent += 1;
            // Refused (no route, no neighbour): a request without an answer like any other.
            let _ = socket.send_to(&request, spec.target);
            due += spec.interval;
            if due < now {
                due = now + spec.interval;
            }
        }
        let wait = if sent < PROBES_BOUND {
            due.saturating_duration_since(Instant::now()).min(LOOK)
        } else {
            LOOK
        };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)];
        if poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0) {
            hear(socket, mark, shared);
        }
    }
}

/// Takes all answers that have come. A second answer to the same request does not count.
fn hear(socket: &UdpSocket, mark: u64, shared: &Shared) {
    let mut answer = [0; REQUEST + 1];
    loop {
        match socket.recv(&mut answer) {
            Ok(REQUEST) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            _ => continue,
        }
        let now = Instant::now();
        let (theirs, number) = split(&answer);
        let mut probes = shared.probes();
        let probe = usize::try_from(number).ok().and_then(|n| probes.get_mut(n));
        if let Some(probe) = probe.filter(|_| theirs == mark) {
            probe.answered.get_or_insert(now);
        }
    }
}

fn split(answer: &[u8; REQUEST + 1]) -> (u64, u64) {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&answer[at..at + 8]);
        u64::from_be_bytes(bytes)
    };
    (word(0), word(8))
}

/// Tells the answers to this prober from those to another that used the same port.
fn fresh_mark() -> u64 {
    static PROBERS: AtomicU64 = AtomicU64::new(0);
    u64::from(std::process::id()) << 32 | PROBERS.fetch_add(1, Relaxed)
}
