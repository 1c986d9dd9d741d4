//! The way back: outcomes become frames, frames are sent, and the load gets its room again.

use std::io;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

use crate::dialect::Dialect;
use crate::execute::{Answer, frames};
use crate::inflight::Outcome;
use crate::limits::Limits;
use crate::load::{Load, Share};
use crate::outbox::Outbox;
use crate::reply::{Frame, ReplyTo};
use crate::request::{Refusal, Request};

pub struct Replies {
    outbox: Outbox,
    load: Load,
    dialect: Dialect,
    /// Nobody is there to be answered.
    gone: bool,
}

impl Replies {
    pub fn new(limits: &Limits, dialect: Dialect) -> Self {
        Replies {
            outbox: Outbox::new(),
            load: Load::new(limits),
            dialect,
            gone: false,
        }
    }

    /// Bytes waiting to be sent.
    pub fn bytes(&self) -> usize {
        self.outbox.bytes()
    }

    /// Requests accepted and not yet answered in full.
    pub fn owed(&self) -> usize {
        self.load.requests()
    }

    /// Whether there is room for one more reply and so much payload.
    pub fn admits(&self, payload: u32) -> bool {
        self.load.admits(payload)
    }

    /// A request is accepted: it is owed an answer from now on.
    pub fn owe(&mut self, request: &Request) {
        self.load.take(request.command.payload());
    }

    /// A request will have no answer.
    pub fn waive(&mut self, request: &Request) {
        self.load.give(Share {
            requests: 1,
            bytes: request.command.payload(),
        });
    }

    pub fn answer(&mut self, request: Request, outcome: Outcome) {
        if self.gone {
            return self.waive(&request);
        }
        // The data of a write are gone; what was read is held until it is sent.
        let admitted = request.command.payload();
        let held = outcome.as_ref().map_or(0, Answer::bytes) as u32;
        self.load.give(Share {
            requests: 0,
            bytes: admitted.saturating_sub(held),
        });
        let share = Share {
            requests: 1,
            bytes: admitted.min(held),
        };
        let to = ReplyTo {
            dialect: self.dialect,
            cookie: request.cookie,
            offset: request.command.offset(),
        };
        frames(&to, outcome, |frame, last| {
            let share = if last { share } else { Share::default() };
            self.outbox.push(frame, share);
        });
    }

    /// Answers a request that was never owed anything.
    pub fn refuse(&mut self, refused: &Refusal) {
        self.load.take(0);
        let to = ReplyTo {
            dialect: self.dialect,
            cookie: refused.cookie,
            offset: refused.offset,
        };
        let share = Share {
            requests: 1,
            bytes: 0,
        };
        self.outbox
            .push(Frame::error(&to, refused.errno, refused.reason), share);
    }

    /// Sends as much as the stream takes; ready when nothing is left.
    pub fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let load = &mut self.load;
        self.outbox
            .poll_send(stream, cx, &mut |share| load.give(share))
    }

    /// Nothing can be sent any more: waives what waits, and every answer to come.
    pub fn give_up(&mut self) {
        self.gone = true;
        let load = &mut self.load;
        self.outbox.clear(&mut |share| load.give(share));
    }
}
