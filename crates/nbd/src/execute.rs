//! The trusted handlers: a valid request becomes a call to the export, the export's answer a reply.

use std::sync::Arc;

use bytes::Bytes;
use tracing::error;

use crate::export::{Directory, Errno, Export};
use crate::handshake::Session;
use crate::reply::{self, Frame};
use crate::request::{Command, Request};

/// What a request that succeeded has to say.
pub enum Answer {
    Done,
    /// Exactly as long as the READ asked for.
    Data(Bytes),
    /// Number and descriptors of every selected context.
    Status(Vec<(u32, Bytes)>),
}

/// Runs one request. `payload` is that of a WRITE, else empty.
pub async fn execute<D: Directory>(
    session: Arc<Session<D>>,
    command: Command,
    payload: Bytes,
) -> Result<Answer, Errno> {
    let export = &*session.opened.export;
    match command {
        Command::Read { offset, len } => {
            let data = export.read(offset, len).await?;
            if data.len() != len as usize {
                // Sent as it is, it would put the client out of step for good.
                error!(
                    export = session.name(),
                    offset,
                    len,
                    got = data.len(),
                    "read of a wrong length"
                );
                return Err(Errno::Eio);
            }
            Ok(Answer::Data(data))
        }
        Command::Write { offset, fua, .. } => done(export.write(offset, payload, fua).await),
        Command::Flush => done(export.flush().await),
        Command::Trim { offset, len, fua } => done(export.trim(offset, len.into(), fua).await),
        Command::Cache { offset, len } => done(export.cache(offset, len.into()).await),
        Command::WriteZeroes { offset, len, how } => {
            match export.write_zeroes(offset, len.into(), how).await {
                // The one place where the protocol knows this error.
                Err(Errno::Enotsup) if how.fast => Err(Errno::Enotsup),
                other => done(other),
            }
        }
        Command::BlockStatus { offset, len, one } => {
            let len = u64::from(len);
            let mut all = Vec::with_capacity(session.contexts.len());
            for (number, name) in &session.contexts {
                let runs = export.block_status(name, offset, len, one).await?;
                let room = session.rules.size - offset;
                let Some(descriptors) = reply::descriptors(&runs, len, room, one) else {
                    error!(
                        export = session.name(),
                        offset, len, name, "block status without a run"
                    );
                    return Err(Errno::Eio);
                };
                all.push((*number, descriptors));
            }
            Ok(Answer::Status(all))
        }
    }
}

fn done(result: Result<(), Errno>) -> Result<Answer, Errno> {
    match result {
        Ok(()) => Ok(Answer::Done),
        Err(Errno::Enotsup) => Err(Errno::Eio),
        Err(errno) => Err(errno),
    }
}

/// The frames of a reply, each with whether it is the last.
pub fn frames(
    request: &Request,
    structured: bool,
    result: Result<Answer, Errno>,
    mut send: impl FnMut(Frame, bool),
) {
    let cookie = request.cookie;
    match result {
        Ok(Answer::Done) => send(Frame::simple(cookie, None, Bytes::new()), true),
        Ok(Answer::Data(data)) => match request.command {
            Command::Read { offset, .. } if structured => {
                send(Frame::data(cookie, offset, data), true);
            }
            _ => send(Frame::simple(cookie, None, data), true),
        },
        Ok(Answer::Status(all)) => {
            let last = all.len().saturating_sub(1);
            for (index, (number, descriptors)) in all.into_iter().enumerate() {
                let last = index == last;
                send(Frame::status(cookie, number, descriptors, last), last);
            }
        }
        Err(errno) => send(refusal(cookie, structured, errno, ""), true),
    }
}

/// An error reply; the reason is sent where the protocol has a place for it.
pub fn refusal(cookie: u64, structured: bool, errno: Errno, reason: &'static str) -> Frame {
    if structured {
        Frame::error(cookie, errno, reason)
    } else {
        Frame::simple(cookie, Some(errno), Bytes::new())
    }
}
