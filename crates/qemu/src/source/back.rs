//! The way back for a daemon that did not start the hand-over: its predecessor did, and died.
//!
//! A source QEMU whose reader has gone is, by then or in a moment, in one of these states
//! (`query-migrate`, `query-status`):
//!
//! | it died | QEMU | the way back |
//! |---|---|---|
//! | before it asked for the stop | `failed`, `running` | none needed |
//! | then, until stale pages had come | `postcopy-active`, `finish-migrate` | [release](super::kept) it, `cont` |
//! | after that | `completed`, `postmigrate` | `cont` |
//! | likewise, of an earlier version | `postcopy-paused`, `finish-migrate` | end the post-copy into nothing, `cont` |
//!
//! A paused post-copy is not cancelled: to QEMU the guest's newest state may be at the other end. But all
//! memory is still in this QEMU, and nobody waits for pages: so it is let end its post-copy, as by a
//! recovery, towards a reader that claims to have every page already. It is `completed` then as after
//! any other hand-over.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::net::UnixListener;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::UNIT;

use super::{
    PATIENCE, POLL, UNLIMITED, kept, migration_over, migration_status, run_status, within,
};
use crate::paused::used_lengths;
use crate::qmp::Qmp;
use crate::settings::Settings;
use crate::stream::reader::{Command, Event, StreamReader};
use crate::stream::return_path::{ReturnMessage, encode_bitmap};
use crate::stream::{RamBlock, ReturnError};
use crate::{Error, Result, SourceState};

/// What a released QEMU that was told to stop its guest needs to get there, with much to spare.
const RELEASED: Duration = Duration::from_secs(1);

/// Makes the guest of a source QEMU run again, whatever state a dead daemon's hand-over left it in, and
/// puts the settings that the hand-over had changed to QEMU's own defaults (what they were before, the
/// dead daemon knew). `socket` is a path free for QEMU to connect to for a moment.
///
/// Only for a QEMU that no daemon reads from any more: a living hand-over is broken off. And only where
/// the machine may run here: nothing is asked of the other side.
///
/// [`Error::Source`] with [`SourceState::Undecided`] where QEMU does not come to an end; it may be tried
/// again, and [`PausedRam`](crate::paused::PausedRam) still reads its memory.
pub async fn take_back(qmp: &Qmp, socket: &Path) -> Result<()> {
    let released = qmp.pid().map(|pid| kept::release(pid, socket));
    let released = released.transpose().map_err(|source| Error::Io {
        what: "take the end of a hand-over out of",
        path: "/proc".into(),
        source,
    })?;
    if settle(qmp, released.unwrap_or(0) > 0).await? == "postcopy-paused" {
        end_into_nothing(qmp, socket).await?;
    }
    if run_status(qmp).await? != "running" {
        qmp.execute("cont", json!({})).await?;
        let status = run_status(qmp).await?;
        if status != "running" {
            return Err(undecided(format!("the guest is {status} after cont")));
        }
    }
    kept::let_go(qmp).await;
    defaults(qmp).await
}

fn undecided(reason: String) -> Error {
    Error::Source {
        state: SourceState::Undecided,
        reason,
    }
}

/// Brings the migration to rest: over, or `postcopy-paused`. One that was released comes to its end by
/// itself, unless it had not been told to stop the guest.
async fn settle(qmp: &Qmp, released: bool) -> Result<String> {
    let start = Instant::now();
    let mut told = false;
    loop {
        let (status, _) = migration_status(qmp).await?;
        let command = match status.as_str() {
            "none" | "completed" | "failed" | "cancelled" | "postcopy-paused" => return Ok(status),
            "postcopy-active" | "postcopy-recover" | "postcopy-recover-setup" => "migrate-pause",
            _ => "migrate_cancel",
        };
        let waits = match status.as_str() {
            _ if !released => false,
            "postcopy-active" | "device" => true,
            _ => start.elapsed() < RELEASED,
        };
        if !told && !waits {
            told = true;
            // Refused if the state has changed meanwhile.
            match qmp.execute(command, json!({})).await {
                Ok(_) | Err(Error::Qmp { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if start.elapsed() >= PATIENCE {
            return Err(undecided(format!("its migration stays {status}")));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Lets a paused post-copy end towards a reader that says it has everything.
async fn end_into_nothing(qmp: &Qmp, socket: &Path) -> Result<()> {
    let io = |what| {
        let path = socket.to_owned();
        move |source| Error::Io { what, path, source }
    };
    let block = |(name, len)| RamBlock {
        name,
        len,
        page_size: UNIT,
    };
    let blocks: Vec<RamBlock> = used_lengths(qmp).await?.into_iter().map(block).collect();
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).map_err(io("listen on"))?;
    let uri = format!("unix:{}", socket.display());
    let resumed = qmp
        .execute("migrate", json!({"uri": uri, "resume": true}))
        .await;
    let accepted = match resumed {
        Ok(_) => within(PATIENCE, "the source QEMU's connection", listener.accept()).await,
        Err(error) => Err(error),
    };
    let _ = std::fs::remove_file(socket);
    let (stream, _) = accepted?.map_err(io("accept on"))?;
    let blocking = || -> std::io::Result<UnixStream> {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let stream = blocking().map_err(io("use"))?;
    let answered = tokio::task::spawn_blocking(move || answer(&stream, blocks)).await;
    match answered {
        Ok(result) => result?,
        Err(gone) => return Err(undecided(gone.to_string())),
    }
    match migration_over(qmp).await?.as_str() {
        "completed" => Ok(()),
        other => Err(undecided(format!("its migration ended {other}"))),
    }
}

/// Answers a source that takes its post-copy up again, until it is through.
fn answer(stream: &UnixStream, blocks: Vec<RamBlock>) -> Result<()> {
    use std::io::Write;
    let say = |bytes: &[u8]| {
        let mut stream = stream;
        stream
            .write_all(bytes)
            .map_err(|e| Error::from(ReturnError::Write(e)))
    };
    let mut reader = StreamReader::resumed(stream, blocks.clone());
    loop {
        match reader.next_event()? {
            Event::Command(Command::RecvBitmap(name)) => {
                let found = blocks.iter().find(|b| b.name == name);
                let units = found
                    .ok_or_else(|| ReturnError::Block(name.clone()))?
                    .units();
                let mut out = ReturnMessage::RecvBitmap { block: name }.encode();
                out.extend(encode_bitmap(&UnitSet::full(units)));
                say(&out)?;
            }
            Event::Command(Command::Resume) => say(&ReturnMessage::ResumeAck(1).encode())?,
            Event::Command(Command::Ping(value)) => say(&ReturnMessage::Pong(value).encode())?,
            Event::Eof => return say(&ReturnMessage::Shut(0).encode()),
            _ => {}
        }
    }
}

/// Puts what [`RamSource::start`](super::RamSource::start) sets to QEMU's defaults. A parameter that has
/// another value than a hand-over gives it is somebody else's.
async fn defaults(qmp: &Qmp) -> Result<()> {
    let on = ["events", "postcopy-ram", "return-path", "switchover-ack"];
    let known = qmp.execute("query-migrate-capabilities", json!({})).await?;
    let left: Vec<&str> = known
        .as_array()
        .into_iter()
        .flatten()
        .filter(|entry| entry["state"] == true)
        .filter_map(|entry| on.into_iter().find(|name| entry["capability"] == *name))
        .collect();
    let current = qmp.execute("query-migrate-parameters", json!({})).await?;
    let mut parameters = Map::new();
    for (name, ours, default) in [
        ("downtime-limit", 1, 300),
        ("max-bandwidth", UNLIMITED, 128 << 20),
    ] {
        if current[name] == ours {
            parameters.insert(name.into(), json!(default));
        }
    }
    if !parameters.is_empty() {
        qmp.execute("migrate-set-parameters", Value::Object(parameters))
            .await?;
    }
    Settings::forgotten(&left).restore(qmp).await
}
