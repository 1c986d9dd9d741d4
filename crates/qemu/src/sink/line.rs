//! The line to a destination QEMU: one task writes what the sinks hand it, another reads the return
//! path, a third listens to QEMU's events.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use whimbrel_engine::space::{Extent, UNIT};

use super::wall_clock;
use crate::qmp::{Events, Qmp};
use crate::source::{migration_over, migration_status, run_status, within};
use crate::stream::return_path::ReturnMessage;
use crate::stream::{RamBlock, ReturnError, StreamLayout, writer};
use crate::{Error, Result};

/// Placements waiting to be written; more callers wait for room.
const QUEUE: usize = 16;
/// Most bytes in one placement; longer ones are cut. With [`QUEUE`] this bounds the queue to 4 MiB.
pub(super) const PIECE: u64 = 256 << 10;
/// Most bytes gathered into one write.
const BATCH: usize = 1 << 20;
/// Between two questions whether it is loaded. One that waits for a page answers when the page has come.
const POLL: Duration = Duration::from_millis(5);
/// Time QEMU gets for what takes it milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Something to write.
pub(super) enum Op {
    Pages {
        block: usize,
        start: u64,
        data: Bytes,
    },
    Zeros {
        block: usize,
        extent: Extent,
    },
    /// Finished sections; the answer is when they had been written.
    Sections(Vec<u8>, oneshot::Sender<Duration>),
}

/// What a destination has come to, as far as it was told or heard.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) failed: Option<String>,
    pub(super) shut: Option<u32>,
    /// The stream's end is written: QEMU may close the socket.
    pub(super) ended: bool,
    /// QEMU's timestamp of the RESUME event, since the Unix epoch.
    pub(super) resumed: Option<Duration>,
}

#[derive(Debug)]
pub(super) struct Line {
    pub(super) qmp: Qmp,
    pub(super) layout: StreamLayout,
    ops: mpsc::Sender<Op>,
    state: watch::Sender<State>,
    alive: CancellationToken,
    /// Ends the listening tasks with the line.
    _alive: DropGuard,
}

impl Line {
    /// Connects to a QEMU that listens, and starts the tasks. The socket's path is removed.
    pub(super) async fn open(
        qmp: &Qmp,
        socket: &Path,
        layout: &StreamLayout,
        requests: mpsc::Sender<(usize, Extent)>,
    ) -> Result<Line> {
        let stream = UnixStream::connect(socket).await;
        let _ = std::fs::remove_file(socket);
        let stream = stream.map_err(|source| Error::Io {
            what: "connect to",
            path: socket.to_owned(),
            source,
        })?;
        Ok(Line::on(
            qmp,
            stream,
            layout,
            requests,
            Vec::new(),
            State::default(),
        ))
    }

    /// Starts the tasks on a connected socket; `heard` is what was read of the return path and is not
    /// acted on yet.
    pub(super) fn on(
        qmp: &Qmp,
        stream: UnixStream,
        layout: &StreamLayout,
        requests: mpsc::Sender<(usize, Extent)>,
        heard: Vec<u8>,
        state: State,
    ) -> Line {
        let (read, write) = stream.into_split();
        let (ops, queue) = mpsc::channel(QUEUE);
        let state = watch::Sender::new(state);
        let gone = CancellationToken::new();
        let listening = listen(read, heard, layout.blocks.clone(), state.clone(), requests);
        tokio::spawn(gone.clone().run_until_cancelled_owned(listening));
        let watching = watch_qemu(qmp.events(), state.clone());
        tokio::spawn(gone.clone().run_until_cancelled_owned(watching));
        tokio::spawn(write_ops(write, layout.clone(), queue, state.clone()));
        Line {
            qmp: qmp.clone(),
            layout: layout.clone(),
            ops,
            state,
            alive: gone.clone(),
            _alive: gone.drop_guard(),
        }
    }

    /// Finds out, in the background since QEMU may not answer before pages have come, when the machine is loaded:
    /// no RESUME event tells of a guest that runs already, or that stands still. `cont`: it is to go on then.
    pub(super) fn ask_until_loaded(&self, cont: bool) {
        let (qmp, state) = (self.qmp.clone(), self.state.clone());
        let asking = async move {
            loop {
                match run_status(&qmp).await {
                    Ok(status) if status == "inmigrate" => tokio::time::sleep(POLL).await,
                    Ok(_) => break,
                    Err(_) => return,
                }
            }
            if cont && let Err(error) = qmp.execute("cont", json!({})).await {
                return fail(&state, error.to_string());
            }
            state.send_modify(|s| {
                s.resumed.get_or_insert_with(wall_clock);
            });
        };
        let alive = self.alive.child_token();
        tokio::spawn(alive.run_until_cancelled_owned(asking));
    }

    /// Room for one more op. Taken before a unit is claimed, so that a claim is never made by a call
    /// that is dropped before it has handed over its data.
    pub(super) async fn room(&self) -> Result<mpsc::Permit<'_, Op>> {
        match self.ops.reserve().await {
            Ok(permit) => Ok(permit),
            Err(_) => Err(self.failure()),
        }
    }

    /// Writes finished sections and returns when they had been written.
    pub(super) async fn sections(&self, bytes: Vec<u8>) -> Result<Duration> {
        let (done, written) = oneshot::channel();
        self.room().await?.send(Op::Sections(bytes, done));
        self.written(written).await
    }

    /// Writes the stream's last sections.
    pub(super) async fn end(&self, bytes: Vec<u8>) -> Result<Duration> {
        self.state.send_modify(|s| s.ended = true);
        self.sections(bytes).await
    }

    pub(super) async fn written(&self, written: oneshot::Receiver<Duration>) -> Result<Duration> {
        written.await.map_err(|_| self.failure())
    }

    pub(super) fn block(&self, block: usize) -> Result<&RamBlock> {
        self.layout.blocks.get(block).ok_or(Error::NoSuchBlock {
            block,
            blocks: self.layout.blocks.len(),
        })
    }

    /// Checks that the extent lies in the block.
    pub(super) fn check(&self, block: usize, extent: Extent) -> Result<()> {
        let units = self.block(block)?.units();
        match extent.start.checked_add(extent.len) {
            Some(end) if end <= units => Ok(()),
            end => Err(Error::OutOfBlock {
                block,
                start: extent.start,
                end: end.unwrap_or(u64::MAX),
                units,
            }),
        }
    }

    /// Waits for something to be known; a failure of the line ends the waiting. There is no limit:
    /// what is waited for may need pages from far away.
    pub(super) async fn wait<T>(&self, known: impl Fn(&State) -> Option<T>) -> Result<T> {
        let mut state = self.state.subscribe();
        loop {
            {
                let state = state.borrow_and_update();
                if let Some(value) = known(&state) {
                    return Ok(value);
                }
                if let Some(reason) = &state.failed {
                    return Err(Error::Sink {
                        reason: reason.clone(),
                    });
                }
            }
            if state.changed().await.is_err() {
                return Err(self.failure());
            }
        }
    }

    /// Waits until QEMU says that its migration is completed.
    pub(super) async fn completed(&self) -> Result<()> {
        match migration_over(&self.qmp).await?.as_str() {
            "completed" => Ok(()),
            other => {
                let (_, info) = migration_status(&self.qmp).await?;
                let desc = info["error-desc"].as_str().unwrap_or("no reason given");
                Err(Error::Sink {
                    reason: format!("QEMU ended {other}: {desc}"),
                })
            }
        }
    }

    /// Waits for QEMU to take what was written (it reads as it goes).
    pub(super) async fn shut(&self) -> Result<()> {
        match within(
            PATIENCE,
            "the destination's last word",
            self.wait(|s| s.shut),
        )
        .await??
        {
            0 => Ok(()),
            value => Err(Error::Sink {
                reason: format!("QEMU shut the return path with {value}"),
            }),
        }
    }

    fn failure(&self) -> Error {
        let reason = self.state.borrow().failed.clone();
        Error::Sink {
            reason: reason.unwrap_or_else(|| "the connection is closed".into()),
        }
    }
}

fn fail(state: &watch::Sender<State>, reason: String) {
    state.send_if_modified(|state| {
        let first = state.failed.is_none();
        if first {
            state.failed = Some(reason);
        }
        first
    });
}

async fn write_ops(
    mut write: OwnedWriteHalf,
    layout: StreamLayout,
    mut queue: mpsc::Receiver<Op>,
    state: watch::Sender<State>,
) {
    let mut batch = Vec::with_capacity(2 * BATCH);
    while let Some(first) = queue.recv().await {
        batch.clear();
        let mut written = Vec::new();
        let mut open = None;
        let mut next = Some(first);
        while let Some(op) = next {
            append(&mut batch, &layout, op, &mut open, &mut written);
            next = (batch.len() < BATCH)
                .then(|| queue.try_recv().ok())
                .flatten();
        }
        if open.is_some() {
            writer::ram_close(&mut batch, &layout);
        }
        if let Err(error) = write.write_all(&batch).await {
            // Dropping the queue fails the callers; the reason is set first.
            return fail(&state, format!("writing to QEMU: {error}"));
        }
        let now = wall_clock();
        for done in written {
            let _ = done.send(now);
        }
    }
}

/// Appends one op; `open` is the block named last in the RAM section that is open, if one is.
fn append(
    out: &mut Vec<u8>,
    layout: &StreamLayout,
    op: Op,
    open: &mut Option<usize>,
    written: &mut Vec<oneshot::Sender<Duration>>,
) {
    let mut record = |block: usize, out: &mut Vec<u8>| {
        if open.is_none() {
            writer::ram_part(out, layout);
        }
        open.replace(block) == Some(block)
    };
    match op {
        Op::Pages { block, start, data } => {
            let named = record(block, out);
            writer::pages(out, &layout.blocks[block], start, &data, named);
        }
        Op::Zeros { block, extent } => {
            let named = record(block, out);
            writer::zeros(out, &layout.blocks[block], extent, named);
        }
        Op::Sections(bytes, done) => {
            if open.take().is_some() {
                writer::ram_close(out, layout);
            }
            out.extend(bytes);
            written.push(done);
        }
    }
}

async fn listen(
    mut read: OwnedReadHalf,
    mut buffer: Vec<u8>,
    blocks: Vec<RamBlock>,
    state: watch::Sender<State>,
    requests: mpsc::Sender<(usize, Extent)>,
) {
    let mut last = None;
    loop {
        loop {
            let (message, used) = match ReturnMessage::decode(&buffer) {
                Ok(Some(found)) => found,
                Ok(None) => break,
                Err(error) => return fail(&state, error.to_string()),
            };
            buffer.drain(..used);
            match message {
                ReturnMessage::RequestPages { block, start, len } => {
                    match request(&blocks, &mut last, block, start, len) {
                        // At the channel's bound QEMU's fault thread waits with us. Nobody to tell:
                        // the sink was dropped.
                        Ok(request) => drop(requests.send(request).await),
                        Err(error) => return fail(&state, error.to_string()),
                    }
                }
                ReturnMessage::Shut(value) => {
                    state.send_modify(|s| s.shut = Some(value));
                }
                ReturnMessage::Pong(_)
                | ReturnMessage::RecvBitmap { .. }
                | ReturnMessage::ResumeAck(_)
                | ReturnMessage::SwitchoverAck => {}
            }
        }
        match read.read_buf(&mut buffer).await {
            Ok(0) if state.borrow().ended => return,
            Ok(0) => return fail(&state, "QEMU closed its migration socket".into()),
            Ok(_) => {}
            Err(_) if state.borrow().ended => return,
            Err(error) => return fail(&state, ReturnError::Read(error).to_string()),
        }
    }
}

fn request(
    blocks: &[RamBlock],
    last: &mut Option<usize>,
    name: Option<String>,
    start: u64,
    len: u32,
) -> Result<(usize, Extent), ReturnError> {
    if let Some(name) = name {
        let found = blocks.iter().position(|b| b.name == name);
        *last = Some(found.ok_or(ReturnError::Block(name))?);
    }
    let block = last.ok_or_else(|| ReturnError::Block(String::new()))?;
    let end = start.checked_add(u64::from(len));
    let aligned = start.is_multiple_of(UNIT) && u64::from(len).is_multiple_of(UNIT) && len != 0;
    match end {
        Some(end) if aligned && end <= blocks[block].len => {
            Ok((block, Extent::touching(start, u64::from(len))))
        }
        _ => Err(ReturnError::Range { block, start, len }),
    }
}

async fn watch_qemu(mut events: Events, state: watch::Sender<State>) {
    loop {
        match events.next().await {
            Ok(event) if event.name == "RESUME" => {
                state.send_modify(|s| {
                    s.resumed.get_or_insert(event.at);
                });
            }
            Ok(event) if event.name == "MIGRATION" && event.data["status"] == "failed" => {
                fail(&state, "QEMU says its migration failed".into());
            }
            Ok(_) | Err(Error::EventsLost { .. }) => {}
            Err(error) => return fail(&state, error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks() -> Vec<RamBlock> {
        ["pc.ram", "vga.vram"]
            .map(|name| RamBlock {
                name: name.into(),
                len: 10 * UNIT,
                page_size: UNIT,
            })
            .to_vec()
    }

    #[test]
    fn a_request_without_a_name_is_of_the_block_before() {
        let (blocks, mut last) = (blocks(), None);
        assert!(request(&blocks, &mut last, None, 0, 4096).is_err());
        let named = request(&blocks, &mut last, Some("vga.vram".into()), 4096, 8192);
        assert_eq!(named.expect("valid"), (1, Extent::new(1, 2)));
        let unnamed = request(&blocks, &mut last, None, 9 * UNIT, 4096);
        assert_eq!(unnamed.expect("valid"), (1, Extent::new(9, 1)));
    }

    #[test]
    fn a_request_past_the_block_is_refused() {
        let (blocks, mut last) = (blocks(), Some(0));
        for (start, len) in [(9 * UNIT, 8192), (u64::MAX - 4095, 4096), (1, 4096), (0, 0)] {
            assert!(request(&blocks, &mut last, None, start, len).is_err());
        }
    }
}
