//! The trusted handlers: a valid request becomes a call to the export, the export's answer a reply.

use std::sync::Arc;

use bytes::Bytes;
use tracing::error;

use crate::export::{Content, Directory, Errno, Export, MAX_PIECES, Piece};
use crate::handshake::Session;
use crate::reply::{self, Frame, ReplyTo};
use crate::request::Command;

/// What a request that succeeded has to say.
pub enum Answer {
    Done,
    /// Exactly as long as the READ asked for.
    Data(Bytes),
    /// The same in at least two pieces, for a client that takes chunks.
    Pieces(Vec<Piece>),
    /// Number and descriptors of every selected context.
    Status(Vec<(u32, Bytes)>),
}

/// Runs one request. `payload` is that of a WRITE, else empty.
pub async fn execute<D: Directory>(
    session: Arc<Session<D>>,
    command: Command,
    payload: Bytes,
) -> Result<Answer, Errno> {
    let answer = serve(&session, command, payload).await;
    match (&answer, command) {
        // The one place where the protocol knows this error.
        (Err(Errno::Enotsup), Command::WriteZeroes { how, .. }) if how.fast => answer,
        (Err(Errno::Enotsup), _) => Err(Errno::Eio),
        _ => answer,
    }
}

async fn serve<D: Directory>(
    session: &Session<D>,
    command: Command,
    payload: Bytes,
) -> Result<Answer, Errno> {
    let export = &*session.opened.export;
    match command {
        Command::Read { offset, len, whole } => {
            let content = if whole || !session.rules.dialect.chunks() {
                Content::Whole(export.read(offset, len).await?)
            } else {
                export.read_sparse(offset, len).await?
            };
            read(content, len).ok_or_else(|| {
                // Sent as it is, it would put the client out of step for good.
                error!(
                    export = session.name(),
                    offset, len, "read of a wrong length"
                );
                Errno::Eio
            })
        }
        Command::Write { offset, fua, .. } => done(export.write(offset, payload, fua).await),
        Command::Flush => done(export.flush().await),
        Command::Trim { offset, len, fua } => done(export.trim(offset, len, fua).await),
        Command::Cache { offset, len } => done(export.cache(offset, len).await),
        Command::WriteZeroes { offset, len, how } => {
            done(export.write_zeroes(offset, len, how).await)
        }
        Command::BlockStatus {
            offset,
            len,
            one,
            contexts,
        } => {
            let mut all = Vec::with_capacity(contexts.len());
            let chosen = |(number, _): &&(u32, String)| contexts.contains(*number);
            for (number, name) in session.contexts.iter().filter(chosen) {
                let runs = export.block_status(name, offset, len, one).await?;
                let room = session.rules.size - offset;
                let dialect = session.rules.dialect;
                let Some(descriptors) = reply::descriptors(&runs, len, room, one, dialect) else {
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

/// What a READ came to; `None` if it is not `len` bytes, or in more pieces than allowed.
fn read(content: Content, len: u32) -> Option<Answer> {
    match content {
        Content::Whole(data) => (data.len() == len as usize).then_some(Answer::Data(data)),
        Content::Pieces(pieces) => {
            let sum: u64 = pieces.iter().map(Piece::len).sum();
            let whole = pieces.iter().all(|piece| piece.len() > 0);
            let fits = whole && sum == u64::from(len) && pieces.len() <= MAX_PIECES;
            fits.then_some(Answer::Pieces(pieces))
        }
    }
}

impl Answer {
    /// Bytes that are held until the reply is sent.
    pub fn bytes(&self) -> usize {
        match self {
            Answer::Done => 0,
            Answer::Data(data) => data.len(),
            Answer::Pieces(pieces) => pieces.iter().map(Piece::held).sum(),
            Answer::Status(all) => all.iter().map(|(_, descriptors)| descriptors.len()).sum(),
        }
    }
}

fn done(result: Result<(), Errno>) -> Result<Answer, Errno> {
    result.map(|()| Answer::Done)
}

/// The frames of a reply, each with whether it is the last.
pub fn frames(to: &ReplyTo, result: Result<Answer, Errno>, mut send: impl FnMut(Frame, bool)) {
    match result {
        Ok(Answer::Done) => send(Frame::done(to), true),
        Ok(Answer::Data(data)) => send(Frame::content(to, data), true),
        Ok(Answer::Pieces(pieces)) => {
            let mut at = to.offset;
            let last = pieces.len().saturating_sub(1);
            for (index, piece) in pieces.into_iter().enumerate() {
                let (offset, last) = (at, index == last);
                at += piece.len();
                let frame = match piece {
                    Piece::Data(data) => Frame::data(to, offset, data, last),
                    Piece::Zeroes(len) => Frame::hole(to, offset, len, last),
                };
                send(frame, last);
            }
        }
        Ok(Answer::Status(all)) => {
            let last = all.len().saturating_sub(1);
            for (index, (number, descriptors)) in all.into_iter().enumerate() {
                let last = index == last;
                send(Frame::status(to, number, descriptors, last), last);
            }
        }
        Err(errno) => send(Frame::error(to, errno, ""), true),
    }
}
