//! The lines a guest sends by UDP, each with the time of its arrival.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::LabError;
use crate::net::Namespace;

/// The port guests send to.
pub const PORT: u16 = 7777;

/// Lines kept until they are taken; beyond, the oldest goes and is counted.
pub const LINES_BOUND: usize = 1 << 20;

const LOOK: Duration = Duration::from_millis(50);

/// One line of a datagram, without its end; invalid UTF-8 is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectedLine {
    pub at: Instant,
    pub from: SocketAddr,
    pub text: String,
}

/// A thread that listens inside a namespace until this is dropped.
#[derive(Debug)]
pub struct LineCollector {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), LabError>>>,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    came: Condvar,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct Inbox {
    lines: VecDeque<CollectedLine>,
    /// Lines ever put in; the front of `lines` has the number `count - lines.len()`.
    count: u64,
    discarded: u64,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // Whole lines only: whoever panicked holding it left it usable.
        self.inbox
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl LineCollector {
    /// Listens on `port` ([`PORT`] for guests) at every address of the namespace.
    pub fn start(namespace: &Namespace, port: u16) -> Result<LineCollector, LabError> {
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let failed = |step| {
            move |source| LabError::Socket {
                address,
                step,
                source,
            }
        };
        let socket = namespace.run("line socket", || {
            UdpSocket::bind(address).map_err(failed("bind"))
        })?;
        socket
            .set_read_timeout(Some(LOOK))
            .map_err(failed("timeout"))?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = namespace.thread("line collector", move || collect(&socket, &theirs))?;
        Ok(LineCollector {
            shared,
            thread: Some(thread),
        })
    }

    /// Takes the lines kept, oldest first.
    pub fn take(&self) -> Vec<CollectedLine> {
        self.shared.inbox().lines.drain(..).collect()
    }

    /// Lines that went because nobody took any for too long.
    pub fn discarded(&self) -> u64 {
        self.shared.inbox().discarded
    }

    /// The first line kept, or still to come, that `wanted` makes something of. Takes nothing. `None`
    /// after the time. `wanted` runs under a lock: what it does delays the stamping of arrivals.
    pub fn wait_for<R>(
        &self,
        within: Duration,
        mut wanted: impl FnMut(&CollectedLine) -> Option<R>,
    ) -> Option<R> {
        let deadline = Instant::now() + within;
        let mut inbox = self.shared.inbox();
        let mut seen = 0;
        loop {
            let oldest = inbox.count - inbox.lines.len() as u64;
            let skip = usize::try_from(seen.max(oldest) - oldest).unwrap_or(usize::MAX);
            if let Some(found) = inbox.lines.iter().skip(skip).find_map(&mut wanted) {
                return Some(found);
            }
            seen = inbox.count;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.shared.came.wait_timeout(inbox, left);
            inbox = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

impl Drop for LineCollector {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take()
            && let Ok(Err(error)) = thread.join()
        {
            tracing::warn!(%error, "the line collector could not run");
        }
    }
}

fn collect(socket: &UdpSocket, shared: &Shared) {
    let mut datagram = vec![0; 65_536];
    while !shared.stop.load(Relaxed) {
        let (length, from) = match socket.recv_from(&mut datagram) {
            Ok(received) => received,
            Err(error) => {
                // The timeout, or a signal. Anything else is not expected of an unconnected socket, and
                // must not turn the loop into a spin.
                if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
                    std::thread::sleep(LOOK);
                }
                continue;
            }
        };
        let at = Instant::now();
        let text = String::from_utf8_lossy(&datagram[..length]);
        let mut inbox = shared.inbox();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            if inbox.lines.len() == LINES_BOUND {
                inbox.lines.pop_front();
                inbox.discarded += 1;
            }
            inbox.count += 1;
            inbox.lines.push_back(CollectedLine {
                at,
                from,
                text: line.to_owned(),
            });
        }
        drop(inbox);
        shared.came.notify_all();
    }
}
