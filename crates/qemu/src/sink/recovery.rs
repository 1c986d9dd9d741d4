//! Taking up a post-copy whose feeder died.
//!
//! When its socket closes QEMU pauses its post-copy; the guest goes on with the pages it has, and
//! whoever touches another waits. A new feeder is let in by `migrate-recover` and talks as follows:
//!
//! ```text
//!   to QEMU                 from QEMU
//!   OPEN_RETURN_PATH
//!   RECV_BITMAP, per block  RECV_BITMAP + u64 size, bitmap, u64 mark    what it has
//!   POSTCOPY_RESUME         RESUME_ACK 1, and every request that was not answered, once more
//!   RAM PARTs ...           as before
//! ```
//! No header comes first: it is the former stream that goes on. What the former feeder wrote and QEMU had
//! not read is lost and not in the bitmap.
//!
//! # Traps
//! The thread that touches a missing page may be QEMU's main thread, or one that holds its lock; then
//! no ordinary QMP command is answered until the page is there. `migrate-recover` and `migrate-pause`
//! are therefore sent out of band, and nothing here waits for another command's answer.
//! A recovery that is broken off in any of its steps leaves QEMU paused again.
//! QEMU can be recovered from the moment in which it has taken RUN. One that loses its feeder between
//! LISTEN and RUN, while it loads its devices and waits for the pages they touch, exits or hangs.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::UNIT;

use super::line::{Line, State};
use super::postcopy::{REQUESTS, Request};
use super::{DestinationState, PostcopySink, destination_state};
use crate::qmp::Qmp;
use crate::settings::Settings;
use crate::source::within;
use crate::stream::return_path::{ReturnMessage, bitmap_len, decode_bitmap};
use crate::stream::{ReturnError, StreamLayout, writer};
use crate::{Error, Result};

/// Time QEMU gets to notice that it lost its feeder before it is told so.
const GRACE: Duration = Duration::from_secs(1);
/// Time QEMU gets to let a new feeder in, and to answer it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Grain in which `migrate-recover` is tried again.
const POLL: Duration = Duration::from_millis(20);
/// Most bytes of requests kept until the recovery is through: QEMU repeats one per waiting thread.
const MAX_KEPT: usize = 1 << 20;

impl PostcopySink {
    /// Takes up the post-copy of a destination QEMU whose feeder died after the switch. Returns a sink
    /// that behaves as one that [`run`](Self::run) already, the demands (QEMU repeats the ones not
    /// answered), and per block the units QEMU has, which are never to be placed again.
    ///
    /// `socket` is a path for QEMU to listen on for a moment; what stands there is removed. The layout
    /// must be that of the sink before. [`Error::NotRecoverable`] tells why there is nothing to take up
    /// ([`DestinationState::Complete`] among the reasons). After any other error it may be tried again.
    ///
    /// [`resumed`](Self::resumed) gives the time of the recovery if the guest ran before it.
    pub async fn recover(
        qmp: &Qmp,
        socket: &Path,
        layout: &StreamLayout,
    ) -> Result<(PostcopySink, mpsc::Receiver<Request>, Vec<UnitSet>)> {
        layout.check()?;
        if let Some(block) = layout.blocks.iter().find(|b| b.page_size != UNIT) {
            return Err(Error::PageSize {
                name: block.name.clone(),
                page_size: block.page_size,
            });
        }
        let stream = open(qmp, socket).await?;
        let mut taken = TakingUp {
            stream,
            heard: Vec::new(),
        };
        let (received, kept) =
            within(PATIENCE, "the destination's recovery", taken.talk(layout)).await??;
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let line = Line::on(qmp, taken.stream, layout, requests, kept, State::default());
        line.ask_until_loaded(false);
        // What they were before died with the one who changed them.
        let settings = Settings::forgotten(&["events", "postcopy-ram"]);
        let sink = PostcopySink::running(line, received.clone(), settings);
        Ok((sink, receiver, received))
    }
}

/// Makes QEMU listen for a new feeder, and connects.
async fn open(qmp: &Qmp, socket: &Path) -> Result<UnixStream> {
    let io = |what| {
        let path = socket.to_owned();
        move |source| Error::Io { what, path, source }
    };
    match std::fs::remove_file(socket) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("remove")(error)),
    }
    let_in(qmp, socket).await?;
    let stream = UnixStream::connect(socket).await;
    let _ = std::fs::remove_file(socket);
    stream.map_err(io("connect to"))
}

/// Repeats `migrate-recover` until QEMU, paused at last, takes it.
async fn let_in(qmp: &Qmp, socket: &Path) -> Result<()> {
    let uri = format!("unix:{}", socket.display());
    let start = Instant::now();
    let mut told = None;
    let mut blocked = false;
    loop {
        match qmp
            .execute_oob("migrate-recover", json!({ "uri": uri }))
            .await
        {
            Ok(_) => return Ok(()),
            Err(Error::Qmp { .. }) => {}
            Err(Error::Disconnected { .. }) => {
                return Err(Error::NotRecoverable {
                    state: DestinationState::Gone,
                });
            }
            Err(error) => return Err(error),
        }
        // A blocked QEMU is not asked twice.
        if !blocked {
            match destination_state(qmp).await? {
                DestinationState::Blocked => blocked = true,
                DestinationState::Paused | DestinationState::Fed => {}
                state => return Err(Error::NotRecoverable { state }),
            }
        }
        if told.is_none() && start.elapsed() >= GRACE {
            // Refused if it has just paused by itself, and if there is no post-copy to pause.
            told = match qmp.execute_oob("migrate-pause", json!({})).await {
                Ok(_) => Some(true),
                Err(Error::Qmp { .. }) => Some(false),
                Err(error) => return Err(error),
            };
        }
        if start.elapsed() >= PATIENCE {
            let state = match (blocked, told) {
                (false, _) => DestinationState::Fed,
                (true, Some(true)) => DestinationState::Blocked,
                // Neither in a post-copy that can be paused nor in one that is.
                (true, _) => DestinationState::LostLoading,
            };
            return Err(Error::NotRecoverable { state });
        }
        tokio::time::sleep(POLL).await;
    }
}

struct TakingUp {
    stream: UnixStream,
    /// Read and not decoded yet.
    heard: Vec<u8>,
}

impl TakingUp {
    /// Asks what QEMU has and lets the post-copy go on. Returns the units received per block, and what
    /// of the return path is for the sink to act on.
    async fn talk(&mut self, layout: &StreamLayout) -> Result<(Vec<UnitSet>, Vec<u8>)> {
        let mut out = Vec::new();
        writer::open_return_path(&mut out);
        for block in &layout.blocks {
            writer::recv_bitmap(&mut out, block);
        }
        let mut kept = Vec::new();
        let mut received = Vec::with_capacity(layout.blocks.len());
        // All questions are written first: they are a few dozen bytes each, at most 1024 of them, and
        // QEMU reads the next while its answer to the one before waits in the socket.
        self.write(&out).await?;
        for block in &layout.blocks {
            match self.message(&mut kept).await? {
                ReturnMessage::RecvBitmap { block: name } if name == block.name => {}
                other => return Err(unexpected(&other)),
            }
            let len = bitmap_len(block.units());
            while self.heard.len() < len {
                self.read().await?;
            }
            received.push(decode_bitmap(block.units(), &self.heard[..len])?);
            self.heard.drain(..len);
        }
        let mut out = Vec::new();
        writer::postcopy_resume(&mut out);
        self.write(&out).await?;
        match self.message(&mut kept).await? {
            ReturnMessage::ResumeAck(1) => {}
            other => return Err(unexpected(&other)),
        }
        kept.append(&mut self.heard);
        Ok((received, kept))
    }

    /// The next message that is not a request; those are kept, as bytes. One without a name before any with
    /// one is of the block that QEMU named to the former feeder: it is left out, for QEMU names its block
    /// anew, and repeats every request that was not answered, once the recovery is through.
    async fn message(&mut self, kept: &mut Vec<u8>) -> Result<ReturnMessage> {
        loop {
            match ReturnMessage::decode(&self.heard)? {
                Some((message, used)) => {
                    let bytes = self.heard.drain(..used);
                    match &message {
                        ReturnMessage::RequestPages { block: None, .. } if kept.is_empty() => {
                            continue;
                        }
                        ReturnMessage::RequestPages { .. } => kept.extend(bytes),
                        _ => return Ok(message),
                    }
                    if kept.len() > MAX_KEPT {
                        return Err(unexpected(&message));
                    }
                }
                None => self.read().await?,
            }
        }
    }

    async fn read(&mut self) -> Result<()> {
        match self.stream.read_buf(&mut self.heard).await {
            Ok(0) => Err(Error::Sink {
                reason: "QEMU closed its migration socket in the recovery".into(),
            }),
            Ok(_) => Ok(()),
            Err(error) => Err(ReturnError::Read(error).into()),
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .await
            .map_err(|error| ReturnError::Write(error).into())
    }
}

fn unexpected(message: &ReturnMessage) -> Error {
    Error::Sink {
        reason: format!("{message:?} in the middle of the recovery"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_of_the_former_feeders_block_is_left_out() {
        let (stream, mut qemu) = UnixStream::pair().expect("a pair");
        let request = |block: Option<&str>| ReturnMessage::RequestPages {
            block: block.map(str::to_owned),
            start: UNIT,
            len: 4096,
        };
        let mut said = Vec::new();
        let (unnamed, named) = (request(None), request(Some("pc.ram")));
        for message in [&unnamed, &named, &unnamed, &ReturnMessage::ResumeAck(1)] {
            said.extend(message.encode());
        }
        qemu.write_all(&said).await.expect("written");
        let heard = Vec::new();
        let (mut taken, mut kept) = (TakingUp { stream, heard }, Vec::new());
        let heard = taken.message(&mut kept).await.expect("a message");
        assert_eq!(heard, ReturnMessage::ResumeAck(1));
        assert_eq!(kept, [named.encode(), unnamed.encode()].concat());
    }
}
