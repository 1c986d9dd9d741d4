//! The transmission phase: one task that reads requests, serves them and writes the replies.
//!
//! One task for both directions means no lock around the stream and no hop between threads: with data at
//! hand, a queue of 32 reads costs one `recv`, 32 polls and one `writev`. Each turn of the loop
//!
//! 1. polls the waiting requests that were woken,
//! 2. starts every request that lies whole in the inbox, as far as the load admits,
//! 3. sends all replies there are, in one go,
//! 4. reads more, if step 2 ran dry; if nothing else is owed, by waiting in the read itself (`line.rs`).
//!
//! Nothing here waits for one request: those that cannot finish at once wait in [`InFlight`].
//!
//! Memory: the inbox is fixed, a payload is allocated only once it is admitted, an invalid one is skipped
//! through the inbox, and replies count against the load until they are sent. When the load is at its
//! bound nothing more is read, and the client finds its socket full.
//!
//! The traps. A client may send without ever reading: that stops at the load's bound and holds up no
//! other connection. A request half received when the connection ends was never started; the client
//! repeats it elsewhere. At a shutdown requests that were not yet read stay unanswered, rather than being
//! refused with ESHUTDOWN: QEMU would hand that to its guest, while a closed connection makes it
//! reconnect and repeat.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWriteExt, ReadBuf};
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::error::ServeError;
use crate::execute::execute;
use crate::export::Directory;
use crate::handshake::Session;
use crate::inbox::{INBOX, Inbox};
use crate::inflight::InFlight;
use crate::limits::Limits;
use crate::line::Line;
use crate::replies::Replies;
use crate::request::{Command, Filter, Header, Refusal, Request, StreamLost, Verdict, validate};

/// Replies worth a write of their own: more are not gathered while the socket takes them, so that the
/// client works on these while the next are made. Smaller costs system calls, larger costs overlap.
const BATCH: usize = 64 << 10;
/// A payload of which so much is missing is read straight into its own buffer.
const DIRECT: usize = 32 << 10;
/// What is read ahead after such a payload: its sender will send more of them, and what the inbox
/// catches of the next has to be copied.
const SHORT_READ: usize = 4 << 10;
/// A payload's buffer of up to this size is used again for the next: fresh memory of that size comes from
/// the kernel, page by page. One is kept per connection.
const SPARE: usize = 1 << 20;

/// Serves requests until the client leaves or `shutdown` is cancelled, and answers those in flight.
/// Writes that could not be awaited are left over.
pub async fn transmit<S, D>(
    stream: S,
    inbox: Inbox,
    session: Session<D>,
    limits: Limits,
    shutdown: &CancellationToken,
) -> (Result<(), ServeError>, Option<Leftover<D>>)
where
    S: Line,
    D: Directory,
{
    let mut pump = Pump {
        stream,
        inbox,
        replies: Replies::new(&limits, session.rules.dialect),
        in_flight: InFlight::new(),
        session: Arc::new(session),
        intake: Intake::Header,
        read_ahead: INBOX,
        spare: BytesMut::new(),
    };
    let mut cancelled = pin!(shutdown.cancelled());
    let mut linger: Option<Pin<Box<Sleep>>> = None;
    let result = poll_fn(|cx| {
        if !pump.ended() && cancelled.as_mut().poll(cx).is_ready() {
            pump.end(Ending::Shutdown);
        }
        if let Poll::Ready(result) = pump.poll(cx) {
            return Poll::Ready(result);
        }
        if pump.ended() {
            let timer = linger.get_or_insert_with(|| Box::pin(sleep(limits.linger)));
            if timer.as_mut().poll(cx).is_ready() {
                let requests = pump.replies.owed();
                return Poll::Ready(Err(ServeError::Lingered { requests }));
            }
        }
        Poll::Pending
    })
    .await;
    let leftover = pump.close(&limits).await;
    (result, leftover)
}

/// Writes that outlive their connection. Until they are finished the export is not given back.
pub struct Leftover<D: Directory> {
    in_flight: InFlight,
    session: Arc<Session<D>>,
}

impl<D: Directory> Leftover<D> {
    pub async fn finish(mut self) {
        self.in_flight.finish().await;
        drop(self.session);
    }
}

/// What is being received.
enum Intake {
    Header,
    /// To be judged with its payload, which is short.
    Filter(Filter),
    /// Valid; waits for the load to admit it.
    Admission(Request),
    /// Admitted; `here` bytes of its payload, which is as long as the buffer, are there.
    Payload {
        request: Request,
        buffer: BytesMut,
        here: usize,
    },
    /// Refused; the rest of its payload is skipped before it is answered.
    Skip(Refusal),
    Ended(Ending),
}

enum Ending {
    /// The client said so.
    Disconnect,
    /// The client closed its end.
    EndOfStream,
    Shutdown,
    /// What the client sent was no request.
    Lost(StreamLost),
    /// The stream failed. `None` if the client had said good-bye before.
    Broken(Option<io::Error>),
}

/// Why the intake stopped.
enum Need {
    /// More bytes from the client.
    Input,
    /// A reply to be sent or a request to finish.
    Room,
    /// Enough replies have gathered.
    Send,
    /// Nothing: it has ended.
    Nothing,
}

struct Pump<S, D: Directory> {
    stream: S,
    inbox: Inbox,
    replies: Replies,
    in_flight: InFlight,
    session: Arc<Session<D>>,
    intake: Intake,
    /// Most bytes to read into the inbox at once.
    read_ahead: usize,
    /// That of an earlier payload, of any content.
    spare: BytesMut,
}

impl<S, D> Pump<S, D>
where
    S: Line,
    D: Directory,
{
    /// Ready when the connection has ended and every request is answered, or will never be.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServeError>> {
        let mut gather = BATCH;
        loop {
            let replies = &mut self.replies;
            self.in_flight
                .poll(cx, |request, outcome| replies.answer(request, outcome));
            let need = self.take_in(gather);
            let owed = self.replies.owed();
            match self.replies.poll_send(&mut self.stream, cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    self.broken(error);
                    continue;
                }
                // The socket is full: serve on, up to the load's bound.
                Poll::Pending => gather = usize::MAX,
            }
            match need {
                Need::Send => {}
                Need::Room if self.replies.owed() < owed => {}
                Need::Room => return Poll::Pending,
                Need::Input => match self.poll_receive(cx) {
                    Poll::Ready(Ok(0)) => self.end(Ending::EndOfStream),
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(error)) => self.broken(error),
                    Poll::Pending => return Poll::Pending,
                },
                Need::Nothing if self.replies.owed() > 0 => return Poll::Pending,
                Need::Nothing => return Poll::Ready(self.result()),
            }
        }
    }

    fn ended(&self) -> bool {
        matches!(self.intake, Intake::Ended(_))
    }

    fn result(&mut self) -> Result<(), ServeError> {
        match &mut self.intake {
            Intake::Ended(Ending::Lost(lost)) => Err((*lost).into()),
            Intake::Ended(Ending::Broken(error)) => error.take().map_or(Ok(()), |e| Err(e.into())),
            _ => Ok(()),
        }
    }

    /// Accepts nothing more. What is in flight is still answered.
    fn end(&mut self, ending: Ending) {
        if let Intake::Payload { request, .. } = &self.intake {
            self.replies.waive(request);
        }
        self.intake = Intake::Ended(ending);
    }

    /// The stream is of no use any more: accepts nothing, answers nothing; writes are still finished.
    fn broken(&mut self, error: io::Error) {
        let said_goodbye = matches!(self.intake, Intake::Ended(Ending::Disconnect));
        self.end(Ending::Broken((!said_goodbye).then_some(error)));
        self.replies.give_up();
        let replies = &mut self.replies;
        self.in_flight.drop_reads(|request| replies.waive(&request));
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // Only the client can do something now: what is received may be all that is owed.
        let receiving = matches!(self.intake, Intake::Payload { .. });
        let alone = self.replies.owed() == usize::from(receiving);
        if let Intake::Payload { buffer, here, .. } = &mut self.intake {
            let room = &mut buffer[*here..];
            if room.len() >= DIRECT {
                self.read_ahead = SHORT_READ;
                if alone && let Some(read) = settled(self.stream.read_here(room, true)) {
                    return Poll::Ready(read.inspect(|len| *here += len));
                }
                let mut room = ReadBuf::new(room);
                ready!(Pin::new(&mut self.stream).poll_read(cx, &mut room))?;
                let len = room.filled().len();
                *here += len;
                return Poll::Ready(Ok(len));
            }
        }
        if alone
            && let room = self.inbox.room(self.read_ahead)
            && let Some(read) = settled(self.stream.read_here(room, false))
        {
            return Poll::Ready(read.inspect(|&len| self.inbox.filled(len)));
        }
        self.inbox.poll_fill(&mut self.stream, cx, self.read_ahead)
    }

    /// Starts the requests that are there, until `gather` bytes of replies wait.
    fn take_in(&mut self, gather: usize) -> Need {
        loop {
            match &mut self.intake {
                Intake::Header => {
                    let rules = &self.session.rules;
                    let Some(header) = Header::first(self.inbox.data(), rules.dialect) else {
                        return Need::Input;
                    };
                    // A refusal too needs a place in the load, as it leaves a reply.
                    if !self.replies.admits(0) {
                        return Need::Room;
                    }
                    let verdict = validate(&header, rules);
                    self.inbox.consume(rules.dialect.header());
                    match verdict {
                        Ok(verdict) => self.judged(verdict),
                        Err(lost) => self.end(Ending::Lost(lost)),
                    }
                }
                Intake::Filter(filter) => {
                    let Some(payload) = self.inbox.data().get(..filter.payload()) else {
                        return Need::Input;
                    };
                    let verdict = filter.judge(payload, &self.session.rules);
                    self.inbox.consume(filter.payload());
                    self.judged(verdict);
                }
                Intake::Admission(request) => {
                    let request = *request;
                    let payload = request.command.payload();
                    if !self.replies.admits(payload) {
                        return Need::Room;
                    }
                    self.replies.owe(&request);
                    if let Command::Write { len, .. } = request.command {
                        let len = len as usize;
                        let mut buffer = if self.spare.capacity() >= len {
                            std::mem::take(&mut self.spare)
                        } else {
                            BytesMut::new()
                        };
                        buffer.resize(len, 0);
                        if len < DIRECT {
                            self.read_ahead = INBOX;
                        }
                        self.intake = Intake::Payload {
                            request,
                            buffer,
                            here: 0,
                        };
                    } else {
                        self.intake = Intake::Header;
                        self.start(request, Bytes::new());
                    }
                }
                Intake::Payload {
                    request,
                    buffer,
                    here,
                } => {
                    let missing = &mut buffer[*here..];
                    let part = self.inbox.data().len().min(missing.len());
                    missing[..part].copy_from_slice(&self.inbox.data()[..part]);
                    self.inbox.consume(part);
                    *here += part;
                    if *here < buffer.len() {
                        return Need::Input;
                    }
                    let request = *request;
                    let payload = std::mem::take(buffer).freeze();
                    self.intake = Intake::Header;
                    self.start(request, payload);
                }
                Intake::Skip(refused) => {
                    let part = self.inbox.data().len().min(refused.skip as usize);
                    self.inbox.consume(part);
                    refused.skip -= part as u32;
                    if refused.skip > 0 {
                        return Need::Input;
                    }
                    let refused = *refused;
                    self.intake = Intake::Header;
                    debug!(export = self.session.name(), ?refused, "request refused");
                    self.replies.refuse(&refused);
                }
                Intake::Ended(_) => return Need::Nothing,
            }
            if self.replies.bytes() >= gather {
                return Need::Send;
            }
        }
    }

    fn judged(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Accept(request) => self.intake = Intake::Admission(request),
            Verdict::Filter(filter) => self.intake = Intake::Filter(filter),
            Verdict::Refuse(refusal) => self.intake = Intake::Skip(refusal),
            Verdict::Disconnect => self.end(Ending::Disconnect),
        }
    }

    fn start(&mut self, request: Request, payload: Bytes) {
        let large = (DIRECT..=SPARE).contains(&payload.len());
        let again = large.then(|| payload.clone());
        let handler = execute(self.session.clone(), request.command, payload);
        if let Some(outcome) = self.in_flight.start(request, Box::pin(handler)) {
            self.replies.answer(request, outcome);
        }
        // Unless somebody still needs it.
        if let Some(Ok(buffer)) = again.map(Bytes::try_into_mut) {
            self.spare = buffer;
        }
    }

    /// Closes the stream. Reads that are still in flight are dropped, the rest is left over.
    async fn close(mut self, limits: &Limits) -> Option<Leftover<D>> {
        self.in_flight.drop_reads(|_| {});
        // Only a layer with its own farewell, such as TLS, can fail or wait here; the client is leaving.
        let _ = timeout(limits.linger, self.stream.shutdown()).await;
        let requests = self.in_flight.len();
        (requests > 0).then(|| {
            warn!(
                export = self.session.name(),
                requests, "connection closed before its writes ended"
            );
            Leftover {
                in_flight: self.in_flight,
                session: self.session,
            }
        })
    }
}

/// `None` if nothing came in good time: then the runtime waits.
fn settled(read: Option<io::Result<usize>>) -> Option<io::Result<usize>> {
    read.filter(|read| match read {
        Ok(_) => true,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
        ),
    })
}
