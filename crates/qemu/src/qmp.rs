//! A QMP client: JSON lines over a unix socket.
//!
//! Two tasks share the connection. The *reader* matches answers to commands by `id` and publishes
//! events; the *writer* takes whole lines from a bounded queue, so that a caller that gives up in the
//! middle of [`Qmp::execute`] can never leave half a command on the wire.
//!
//! Traps: a QEMU monitor socket serves one client at a time (connect twice and the second hangs in
//! the greeting); events arrive between answers; and a destination QEMU whose main thread waits for
//! a page does not answer QMP at all, so nothing that must happen during a blackout may wait for QMP.
//! The exception are the few commands QEMU runs out of band ([`Qmp::execute_oob`]), beside its main
//! thread; but a *new* connection's handshake is not among them.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf,
    WriteHalf,
};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::{Error, Result, lifeline};

/// Longest line accepted (the schema of QEMU 10 is ~0.3 MiB); a longer one ends the connection.
const MAX_LINE: u64 = 16 << 20;
/// Commands waiting to be written; more callers wait for room.
const COMMANDS: usize = 32;
/// Events kept for a slow subscriber; beyond it the subscriber gets [`Error::EventsLost`].
const EVENTS: usize = 1024;
/// Time a QEMU gets to greet and to take `qmp_capabilities`.
const GREETING: Duration = Duration::from_secs(10);

/// One event of QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION`, ...
    pub name: String,
    /// The event's data, `Null` if it has none.
    pub data: Value,
    /// QEMU's own timestamp, since the Unix epoch, in microseconds' grain.
    pub at: Duration,
    /// When it was read here.
    pub arrived: Instant,
}

/// A QEMU's version as its greeting states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u64,
    pub minor: u64,
    pub micro: u64,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

type Pending = Arc<Mutex<HashMap<u64, (String, oneshot::Sender<Result<Value>>)>>>;

/// A command on its way to QEMU.
#[derive(Debug)]
struct Line {
    bytes: Vec<u8>,
    /// A descriptor that goes with it.
    passed: Option<OwnedFd>,
}

/// A connection to one QEMU's monitor; clones share it. It closes when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Qmp {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lines: mpsc::Sender<Line>,
    pending: Pending,
    events: broadcast::Sender<Arc<Event>>,
    /// The reason, once the connection is closed.
    closed: watch::Receiver<Option<String>>,
    next_id: AtomicU64,
    version: OnceLock<Version>,
    pid: Option<i32>,
    /// Whether commands may be sent out of band.
    oob: bool,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation mode.
    pub async fn connect(path: &Path) -> Result<Qmp> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| Error::Io {
                what: "connect to",
                path: path.to_owned(),
                source,
            })?;
        match tokio::time::timeout(GREETING, Qmp::on(stream)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout {
                what: "the QMP greeting",
                after: GREETING,
            }),
        }
    }

    /// [`connect`](Self::connect), trying again until `patience` is over: for a QEMU just started.
    pub async fn connect_patiently(path: &Path, patience: Duration) -> Result<Qmp> {
        let until = Instant::now() + patience;
        loop {
            match Qmp::connect(path).await {
                Err(Error::Io { .. }) if Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other,
            }
        }
    }

    /// Speaks QMP over a connected socket.
    pub async fn on(stream: UnixStream) -> Result<Qmp> {
        let pid = stream.peer_cred().ok().and_then(|c| c.pid());
        let passing = passing(&stream)?;
        let (read, write) = stream.into_split();
        Qmp::greet(read, write, passing, pid).await
    }

    /// Speaks QMP over a lifeline that nobody has spoken on yet.
    pub(crate) async fn on_lifeline(stream: std::os::unix::net::UnixStream) -> Result<Qmp> {
        let (read, write, passing) = whole(stream)?;
        Qmp::greet(read, write, passing, None).await
    }

    async fn greet<R, W>(read: R, write: W, passing: OwnedFd, pid: Option<i32>) -> Result<Qmp>
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let mut read = BufReader::new(read);
        let greeting = read_line(&mut read).await?;
        let version = parse_version(&greeting["QMP"]["version"]).ok_or(Error::Answer {
            command: "greeting",
            what: "no QMP version",
        })?;
        let offered = greeting["QMP"]["capabilities"].as_array();
        let oob = offered.is_some_and(|list| list.iter().any(|c| c == "oob"));
        let qmp = Qmp::begin(read, (write, passing), pid, oob, FirstLine::Whole);
        // Nobody else has it yet.
        let _ = qmp.inner.version.set(version);
        let enable = if oob {
            json!({"enable": ["oob"]})
        } else {
            json!({})
        };
        qmp.execute("qmp_capabilities", enable).await?;
        Ok(qmp)
    }

    /// Takes over the lifeline of a QEMU that an earlier daemon started, even one that answers nobody at
    /// this moment; `None` if it has none. For out-of-band commands: the lifeline's essay says why.
    pub fn lifeline(pid: i32) -> Result<Option<Qmp>> {
        let stream = lifeline::of(pid).map_err(|source| Error::Io {
            what: "take the lifeline out of",
            path: format!("/proc/{pid}").into(),
            source,
        });
        let Some(stream) = stream? else {
            return Ok(None);
        };
        let (read, write, passing) = whole(stream)?;
        let read = BufReader::new(read);
        let write = (write, passing);
        let qmp = Qmp::begin(read, write, Some(pid), true, FirstLine::MayBeCut);
        // Answered when the main thread is free.
        let asking = qmp.clone();
        tokio::spawn(async move {
            if let Ok(answer) = asking.execute("query-version", json!({})).await
                && let Some(version) = parse_version(&answer)
            {
                let _ = asking.inner.version.set(version);
            }
        });
        Ok(Some(qmp))
    }

    fn begin<R, W>(
        read: BufReader<R>,
        (write, passing): (W, OwnedFd),
        pid: Option<i32>,
        oob: bool,
        first: FirstLine,
    ) -> Qmp
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (lines, queue) = mpsc::channel(COMMANDS);
        let (events, _) = broadcast::channel(EVENTS);
        let (closing, closed) = watch::channel(None);
        let pending = Pending::default();
        tokio::spawn(write_lines(write, passing, queue));
        tokio::spawn(read_lines(
            read,
            first,
            pending.clone(),
            events.clone(),
            closing,
        ));
        Qmp {
            inner: Arc::new(Inner {
                lines,
                pending,
                events,
                closed,
                next_id: AtomicU64::new(first_id()),
                version: OnceLock::new(),
                pid,
                oob,
            }),
        }
    }

    /// QEMU's version; zeroes while a lifeline that was taken over has not been told.
    pub fn version(&self) -> Version {
        let unknown = Version {
            major: 0,
            minor: 0,
            micro: 0,
        };
        *self.inner.version.get().unwrap_or(&unknown)
    }

    /// Process id of the QEMU at the other end, as the kernel knows it.
    pub fn pid(&self) -> Option<i32> {
        self.inner.pid
    }

    /// Runs a command and returns what stands under `return`.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        self.call("execute", command, arguments, None).await
    }

    /// Runs a command out of band where this QEMU can: it is answered even while the main thread waits
    /// for a page. Only few commands allow it, `migrate-recover` and `migrate-pause` among them.
    pub async fn execute_oob(&self, command: &str, arguments: Value) -> Result<Value> {
        let key = if self.inner.oob {
            "exec-oob"
        } else {
            "execute"
        };
        self.call(key, command, arguments, None).await
    }

    /// Hands QEMU a descriptor, which it keeps open under this name until `closefd`. One that it had under the
    /// same name is closed.
    pub async fn pass(&self, name: &str, descriptor: OwnedFd) -> Result<()> {
        let arguments = json!({ "fdname": name });
        self.call("execute", "getfd", arguments, Some(descriptor))
            .await
            .map(drop)
    }

    async fn call(
        &self,
        key: &str,
        command: &str,
        arguments: Value,
        passed: Option<OwnedFd>,
    ) -> Result<Value> {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ key: command, "id": id });
        if arguments.as_object().is_some_and(|a| !a.is_empty()) {
            message["arguments"] = arguments;
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(b'\n');
        let line = Line { bytes, passed };
        let (answer, answered) = oneshot::channel();
        lock(&self.inner.pending).insert(id, (command.to_owned(), answer));
        let forget = Forget {
            pending: &self.inner.pending,
            id,
        };
        // The reader empties `pending` when it closes, after it has set `closed`: checked in this
        // order no command can be left waiting.
        if self.inner.closed.borrow().is_some() || self.inner.lines.send(line).await.is_err() {
            return Err(self.disconnected());
        }
        let result = answered.await.unwrap_or_else(|_| Err(self.disconnected()));
        drop(forget);
        result
    }

    /// Runs a command of the human monitor and returns its text.
    pub async fn human(&self, command_line: &str) -> Result<String> {
        let answer = self
            .execute(
                "human-monitor-command",
                json!({ "command-line": command_line }),
            )
            .await?;
        match answer {
            Value::String(text) => Ok(text),
            _ => Err(Error::Answer {
                command: "human-monitor-command",
                what: "not a string",
            }),
        }
    }

    /// Events from now on.
    pub fn events(&self) -> Events {
        Events {
            receiver: self.inner.events.subscribe(),
            closed: self.inner.closed.clone(),
        }
    }

    /// Returns, with the reason, once the connection is closed.
    pub async fn closed(&self) -> String {
        wait_closed(&mut self.inner.closed.clone()).await
    }

    fn disconnected(&self) -> Error {
        let reason = self.inner.closed.borrow().clone();
        Error::Disconnected {
            reason: reason.unwrap_or_else(|| "closed".into()),
        }
    }
}

/// Takes an abandoned command out of the table, so that the table's size is bounded by the callers.
struct Forget<'a> {
    pending: &'a Pending,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.pending).remove(&self.id);
    }
}

/// A subscription to a QEMU's events.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Arc<Event>>,
    closed: watch::Receiver<Option<String>>,
}

impl Events {
    /// The next event; an error once the connection is closed and all its events were taken.
    pub async fn next(&mut self) -> Result<Arc<Event>> {
        tokio::select! {
            biased;
            event = self.receiver.recv() => match event {
                Ok(event) => Ok(event),
                Err(broadcast::error::RecvError::Lagged(missed)) => Err(Error::EventsLost { missed }),
                Err(broadcast::error::RecvError::Closed) => Err(Error::Disconnected { reason: "closed".into() }),
            },
            reason = wait_closed(&mut self.closed) => Err(Error::Disconnected { reason }),
        }
    }

    /// The next event of that name, others are skipped.
    pub async fn next_named(&mut self, name: &str) -> Result<Arc<Event>> {
        loop {
            let event = self.next().await?;
            if event.name == name {
                return Ok(event);
            }
        }
    }

    /// An event that has already arrived, without waiting.
    pub fn try_next(&mut self) -> Option<Arc<Event>> {
        self.receiver.try_recv().ok()
    }
}

async fn wait_closed(closed: &mut watch::Receiver<Option<String>>) -> String {
    match closed.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => "closed".into(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How the first line that is read begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FirstLine {
    Whole,
    /// An earlier daemon may have read its beginning.
    MayBeCut,
}

/// Answers to an earlier daemon's commands may still come on a lifeline: theirs must be other numbers.
fn first_id() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    // Milliseconds, with room for a thousand commands in each, and exact in QEMU's JSON numbers.
    now.map_or(1, |now| now.as_millis() as u64 * 1000)
}

/// `{"major": 10, "minor": 0, "micro": 2}` under `qemu`.
pub(crate) fn parse_version(version: &Value) -> Option<Version> {
    let qemu = &version["qemu"];
    Some(Version {
        major: qemu["major"].as_u64()?,
        minor: qemu["minor"].as_u64()?,
        micro: qemu["micro"].as_u64()?,
    })
}

/// Halves of a lifeline: dropping them closes this daemon's copy and nothing else, where the halves of a
/// stream of its own would tell QEMU that no more comes.
fn whole(
    stream: std::os::unix::net::UnixStream,
) -> Result<(ReadHalf<UnixStream>, WriteHalf<UnixStream>, OwnedFd)> {
    let stream = stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream));
    let stream = stream.map_err(|error| Error::Disconnected {
        reason: error.to_string(),
    })?;
    let passing = passing(&stream)?;
    let (read, write) = tokio::io::split(stream);
    Ok((read, write, passing))
}

/// The connection once more, for descriptors.
fn passing(stream: &UnixStream) -> Result<OwnedFd> {
    let copy = stream.as_fd().try_clone_to_owned();
    copy.map_err(|error| Error::Disconnected {
        reason: error.to_string(),
    })
}

async fn write_lines(
    mut write: impl AsyncWrite + Unpin,
    passing: OwnedFd,
    mut queue: mpsc::Receiver<Line>,
) {
    while let Some(line) = queue.recv().await {
        let rest = match &line.passed {
            None => Ok(&line.bytes[..]),
            Some(descriptor) => {
                let sent = send_with(&passing, &line.bytes, descriptor).await;
                sent.map(|sent| &line.bytes[sent..])
            }
        };
        let Ok(rest) = rest else { return };
        if write.write_all(rest).await.is_err() {
            // The reader sees the same end of the connection and tells everybody.
            return;
        }
    }
}

/// Sends a descriptor with the first bytes of a command; how many they were.
async fn send_with(
    socket: &OwnedFd,
    bytes: &[u8],
    descriptor: &OwnedFd,
) -> rustix::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let rights = [descriptor.as_fd()];
        // There is room for it: the space was made for one.
        control.push(SendAncillaryMessage::ScmRights(&rights));
        let parts = [std::io::IoSlice::new(bytes)];
        match sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            // Full of commands that QEMU has not read yet; whoever sent this one waits with a bound.
            Err(rustix::io::Errno::AGAIN) => tokio::time::sleep(Duration::from_millis(2)).await,
            other => return other,
        }
    }
}

async fn read_line(read: &mut BufReader<impl AsyncRead + Unpin>) -> Result<Value> {
    let mut line = Vec::new();
    let count = read
        .take(MAX_LINE)
        .read_until(b'\n', &mut line)
        .await
        .map_err(|e| Error::Disconnected {
            reason: e.to_string(),
        })?;
    if count == 0 {
        return Err(Error::Disconnected {
            reason: "QEMU closed the monitor".into(),
        });
    }
    if line.last() != Some(&b'\n') && count as u64 == MAX_LINE {
        return Err(Error::Protocol {
            what: format!("a line of more than {MAX_LINE} bytes"),
        });
    }
    serde_json::from_slice(&line).map_err(|e| Error::Protocol {
        what: format!("not JSON: {e}"),
    })
}

async fn read_lines(
    mut read: BufReader<impl AsyncRead + Unpin>,
    mut first: FirstLine,
    pending: Pending,
    events: broadcast::Sender<Arc<Event>>,
    closing: watch::Sender<Option<String>>,
) {
    let reason = loop {
        let line = tokio::select! {
            line = read_line(&mut read) => line,
            // Nobody is left to hear it; another may want to read on from here.
            () = closing.closed() => return,
        };
        let first = std::mem::replace(&mut first, FirstLine::Whole);
        match line {
            Ok(message) => dispatch(message, &pending, &events),
            Err(Error::Protocol { .. }) if first == FirstLine::MayBeCut => {}
            Err(Error::Disconnected { reason }) => break reason,
            Err(other) => break other.to_string(),
        }
    };
    closing.send_replace(Some(reason.clone()));
    for (_, (_, answer)) in lock(&pending).drain() {
        // A caller that has gone needs no answer.
        let _ = answer.send(Err(Error::Disconnected {
            reason: reason.clone(),
        }));
    }
}

fn dispatch(mut message: Value, pending: &Pending, events: &broadcast::Sender<Arc<Event>>) {
    if let Some(name) = message["event"].as_str() {
        let stamp = &message["timestamp"];
        let at = Duration::from_secs(stamp["seconds"].as_u64().unwrap_or(0))
            + Duration::from_micros(stamp["microseconds"].as_u64().unwrap_or(0));
        let event = Event {
            name: name.to_owned(),
            data: message["data"].take(),
            at,
            arrived: Instant::now(),
        };
        // No subscriber is no error.
        let _ = events.send(Arc::new(event));
        return;
    }
    let Some((command, answer)) = message["id"]
        .as_u64()
        .and_then(|id| lock(pending).remove(&id))
    else {
        tracing::debug!(%message, "QMP answer to nobody");
        return;
    };
    let result = match message.get("error") {
        Some(error) => Err(Error::Qmp {
            command,
            class: error["class"].as_str().unwrap_or("unknown").to_owned(),
            desc: error["desc"].as_str().unwrap_or("").to_owned(),
        }),
        None => Ok(message["return"].take()),
    };
    let _ = answer.send(result);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor played by hand: greets, then gives the test both directions.
    async fn monitor() -> (tokio::task::JoinHandle<Result<Qmp>>, BufReader<UnixStream>) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let client = tokio::spawn(Qmp::on(ours));
        let mut server = BufReader::new(theirs);
        say(&mut server, json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}})).await;
        (client, server)
    }

    async fn say(server: &mut BufReader<UnixStream>, message: Value) {
        let line = format!("{message}\r\n");
        server
            .get_mut()
            .write_all(line.as_bytes())
            .await
            .expect("written");
    }

    async fn hear(server: &mut BufReader<UnixStream>) -> Value {
        let mut line = String::new();
        server.read_line(&mut line).await.expect("read");
        serde_json::from_str(&line).expect("JSON")
    }

    async fn connected() -> (Qmp, BufReader<UnixStream>) {
        let (client, mut server) = monitor().await;
        let hello = hear(&mut server).await;
        assert_eq!(hello["execute"], "qmp_capabilities");
        say(&mut server, json!({"return": {}, "id": hello["id"]})).await;
        (client.await.expect("joined").expect("connected"), server)
    }

    #[tokio::test]
    async fn answers_out_of_order_find_their_callers() {
        let (qmp, mut server) = connected().await;
        let (a, b) = (qmp.clone(), qmp.clone());
        let first = tokio::spawn(async move { a.execute("one", json!({})).await });
        let one = hear(&mut server).await;
        let second = tokio::spawn(async move { b.execute("two", json!({"x": 1})).await });
        let two = hear(&mut server).await;
        assert_eq!(two["arguments"]["x"], 1);
        say(&mut server, json!({"return": 2, "id": two["id"]})).await;
        say(&mut server, json!({"return": 1, "id": one["id"]})).await;
        assert_eq!(first.await.expect("joined").expect("answer"), 1);
        assert_eq!(second.await.expect("joined").expect("answer"), 2);
    }

    #[tokio::test]
    async fn an_error_keeps_class_and_text() {
        let (qmp, mut server) = connected().await;
        let caller = tokio::spawn(async move { qmp.execute("cont", json!({})).await });
        let cont = hear(&mut server).await;
        say(
            &mut server,
            json!({"error": {"class": "GenericError", "desc": "no"}, "id": cont["id"]}),
        )
        .await;
        match caller.await.expect("joined") {
            Err(Error::Qmp {
                command,
                class,
                desc,
            }) => {
                assert_eq!(
                    (command.as_str(), class.as_str(), desc.as_str()),
                    ("cont", "GenericError", "no")
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn an_event_keeps_qemus_own_time() {
        let (qmp, mut server) = connected().await;
        let mut events = qmp.events();
        say(
            &mut server,
            json!({"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 5}}),
        )
        .await;
        let event = events.next_named("STOP").await.expect("event");
        assert_eq!(event.at, Duration::from_secs(7) + Duration::from_micros(5));
    }

    #[tokio::test]
    async fn a_lost_qemu_fails_callers_and_listeners() {
        let (qmp, mut server) = connected().await;
        let mut events = qmp.events();
        let other = qmp.clone();
        let caller = tokio::spawn(async move { other.execute("stop", json!({})).await });
        hear(&mut server).await;
        drop(server);
        assert!(matches!(
            caller.await.expect("joined"),
            Err(Error::Disconnected { .. })
        ));
        assert!(matches!(
            events.next().await,
            Err(Error::Disconnected { .. })
        ));
        assert!(matches!(
            qmp.execute("cont", json!({})).await,
            Err(Error::Disconnected { .. })
        ));
        qmp.closed().await;
    }

    #[tokio::test]
    async fn dropping_the_client_closes_the_monitor() {
        let (qmp, mut server) = connected().await;
        drop(qmp);
        let mut rest = String::new();
        assert_eq!(server.read_line(&mut rest).await.expect("end"), 0);
    }
}
