//! RAM ahead of the switchover, as [`Ahead`] decides: the source's part of the talk about it.
//!
//! # The order that makes it safe
//! ```text
//! source                                          destination
//! Ahead                            -->            lets RAM in
//! units ...                        -->            places them, in the order in which they come
//! RamEnd (all units so far)        -->            waits for them, lets no more RAM in
//!                                  <--  RamTaken
//! stops the guest; what was sent of pages written to since is in vain
//! Stale ..., Grant                 -->            evicts those, lets RAM in, runs the guest
//! ```
//! Content of the time after the stop can overtake the grant on another connection; it then waits at the
//! destination's door until what it replaces is evicted. A broken connection before the stop begins this
//! table anew, and so does more to send while the switchover is held. A break after the stop repeats its last
//! line; until the destination says that it has evicted, what it holds of pages sent in vain does not count.
//!
//! Pages go again only to peers that know of it ([`FEATURE_AHEAD_AGAIN`]): others throw a second copy away.

use whimbrel_engine::ahead::{Ahead, Step};
use whimbrel_qemu::source::Handover;
use whimbrel_wire::message::{FEATURE_AHEAD, FEATURE_AHEAD_AGAIN, MAX_RUNS, Message, RamMode};

use super::Outgoing;
use super::precopy::PATIENCE_IN_STOP;

impl Outgoing {
    /// Brings ahead what can be; whether the guest may stop as far as this goes.
    pub(super) async fn step_ahead(&mut self) -> bool {
        if self.ram_mode == RamMode::Precopy {
            return true;
        }
        if self.ahead.is_none() {
            let knows = self.setup.link.mouth.features() & FEATURE_AHEAD != 0;
            if self.setup.ahead && knows {
                self.begin_ahead().await;
            } else if self.has_disks_out() {
                self.begin_barrier().await;
            } else {
                return true;
            }
            return false;
        }
        self.refresh_ahead();
        let (now, is_held, link_up) = (self.now_ms(), !self.may_switch, self.link_up);
        let again = self.setup.link.mouth.features() & FEATURE_AHEAD_AGAIN != 0;
        let Some(ahead) = &mut self.ahead else {
            return false;
        };
        let flow = &self.setup.flow;
        let step = flow.change(|out| ahead.step(out, now, is_held, again));
        match step {
            Step::Going | Step::Waiting => {}
            Step::Ends => {
                if let Some(frames) = flow.frames().filter(|_| link_up) {
                    ahead.end_said();
                    self.setup.link.mouth.say(Message::RamEnd { frames }).await;
                }
            }
            Step::Begins if link_up => {
                ahead.begin_said();
                self.say_ahead().await;
            }
            Step::Begins => {}
            Step::Closed => return true,
        }
        false
    }

    async fn begin_ahead(&mut self) {
        let blocks = self.held_blocks();
        let now = self.now_ms();
        let ahead = self.setup.flow.change(|out| Ahead::begin(out, blocks, now));
        self.ahead = Some(ahead);
        self.setup
            .board
            .tell("memory that the guest only reads goes ahead");
        self.say_ahead().await;
        self.setup.flow.open();
    }

    /// Nothing of RAM goes ahead, and all that did go ahead is to be with the destination before the guest stops.
    async fn begin_barrier(&mut self) {
        let now = self.now_ms();
        let ahead = self.setup.flow.change(|out| Ahead::begin(out, [], now));
        self.ahead = Some(ahead);
        self.say_ahead().await;
    }

    /// Asks the destination to let RAM in: at the beginning, and on each later connection before the stop.
    pub(super) async fn say_ahead(&self) {
        if self.ahead.is_some() && self.stopped.is_none() {
            self.setup.link.mouth.say(Message::Ahead).await;
        }
    }

    /// Notes what was written to since the last look.
    fn refresh_ahead(&mut self) {
        let dirtied = self.dirtied_blocks();
        if let Some(ahead) = &mut self.ahead {
            for (block, units) in dirtied {
                let flow = &self.setup.flow;
                flow.change(|out| ahead.written(out, block, &units));
            }
        }
    }

    /// Of a guest that QEMU stopped by itself: the destination has all that went ahead, and lets no more in. What
    /// is still under way could not be told from what comes later.
    pub(super) async fn end_ahead_in_stop(&mut self) -> Result<(), String> {
        let until = tokio::time::Instant::now() + PATIENCE_IN_STOP;
        if self.has_disks_out() && self.ahead.is_none() {
            self.begin_barrier().await;
        }
        loop {
            let flow = &self.setup.flow;
            let Some(ahead) = &mut self.ahead else {
                return Ok(());
            };
            match flow.change(|out| ahead.end(out)) {
                Step::Closed => return Ok(()),
                Step::Ends => {
                    if let Some(frames) = flow.frames() {
                        ahead.end_said();
                        self.setup.link.mouth.say(Message::RamEnd { frames }).await;
                    }
                }
                Step::Going | Step::Waiting | Step::Begins => {}
            }
            self.step_of_stop(until).await?;
        }
    }

    /// With the guest stopped: what of RAM was sent in vain. All that is not with the destination as it is now
    /// is as if never offered.
    pub(super) fn outdate_ahead(&mut self, handover: &Handover) {
        self.refresh_ahead();
        let Some(ahead) = &self.ahead else { return };
        // What the destination says that it has, it says again when it has evicted.
        self.fares.resident.clear();
        for (space, stale) in ahead.spaces().zip(&handover.stale) {
            self.setup.flow.outdate(space, stale);
        }
    }

    /// Names to the destination what it must not keep, with each grant anew.
    pub(super) async fn say_stale(&mut self) {
        self.say_stale_disks().await;
        let Some(ahead) = &self.ahead else { return };
        for space in ahead.spaces() {
            for runs in self.setup.flow.outdated(space).chunks(MAX_RUNS) {
                let runs = runs.to_vec();
                let message = Message::Stale { space, runs };
                self.setup.link.mouth.say(message).await;
            }
        }
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.setup.board.clock().elapsed().as_millis() as u64
    }
}
