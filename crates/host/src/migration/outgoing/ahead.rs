//! RAM ahead of the switchover: what is cold goes while the guest still runs here, so that after the switch
//! it lacks only what it was writing to.
//!
//! # The idea
//! A guest that runs before any of its memory is there touches hundreds of pages before it can answer a
//! single packet, one round trip after the other. Nearly all of them (its kernel, its programs, its page
//! tables) it only reads. So each page goes once, unless it was written to since this began: those are left
//! for after the switch, where each goes once as well. A page that is written to after it went was sent in
//! vain; it is named to the destination with the grant, and goes again. However fast the guest writes, no
//! page goes ahead twice, so this ends.
//!
//! # The order that makes it safe
//! ```text
//! source                                          destination
//! Ahead                            -->            lets RAM in
//! units ...                        -->            places them
//! RamEnd (all units so far)        -->            waits for them, lets no more RAM in
//!                                  <--  RamTaken
//! stops the guest; what was sent of pages written to since is in vain
//! Stale ..., Grant                 -->            evicts those, lets RAM in, runs the guest
//! ```
//! Content of the time after the stop can overtake the grant on another connection; it then waits at the
//! destination's door until what it replaces is evicted. A broken connection before the stop begins this
//! table anew. One after the stop repeats its last line; until the destination says that it has evicted,
//! what it holds of pages sent in vain does not count.

use whimbrel_engine::set::UnitSet;
use whimbrel_qemu::source::Handover;
use whimbrel_wire::message::{FEATURE_AHEAD, MAX_RUNS, Message, RamMode};

use super::Outgoing;
use crate::migration::spaces;

/// How far the destination is with what was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Barrier {
    #[default]
    Open,
    /// Said that this is all.
    Said,
    /// It has all of it, and lets nothing more in.
    Closed,
}

/// What went, or is to go, ahead.
pub(super) struct Ahead {
    /// By block: units that were written to since the beginning.
    dirtied: Vec<UnitSet>,
    barrier: Barrier,
}

impl Ahead {
    pub(super) fn link_down(&mut self) {
        self.barrier = Barrier::Open;
    }

    pub(super) fn ram_taken(&mut self) {
        if self.barrier == Barrier::Said {
            self.barrier = Barrier::Closed;
        }
    }
}

impl Outgoing {
    /// Brings ahead what can be; whether the guest may stop as far as this goes.
    pub(super) async fn step_ahead(&mut self) -> bool {
        let can = self.setup.link.mouth.features() & FEATURE_AHEAD != 0;
        if !self.setup.ahead || self.ram_mode == RamMode::Precopy || (self.ahead.is_none() && !can)
        {
            return true;
        }
        if self.ahead.is_none() {
            self.begin_ahead().await;
            return false;
        }
        let rest = self.refresh_ahead();
        let Some(ahead) = self.ahead.as_mut().filter(|_| !rest) else {
            return false;
        };
        if ahead.barrier == Barrier::Open
            && self.link_up
            && let Some(frames) = self.setup.flow.frames()
        {
            ahead.barrier = Barrier::Said;
            self.setup.link.mouth.say(Message::RamEnd { frames }).await;
        }
        ahead.barrier == Barrier::Closed
    }

    async fn begin_ahead(&mut self) {
        let Some(ram) = &self.ram else { return };
        let store = ram.store();
        let mut dirtied = Vec::new();
        for (block, b) in ram.layout().blocks.iter().enumerate() {
            // Cleared before anything is offered: what arrives from now on is noticed.
            store.take_dirtied(block);
            let held = store.held(block);
            let space = self.ram_space(block);
            self.setup.flow.change(|out| out.offer_set(space, &held));
            dirtied.push(UnitSet::empty(b.units()));
        }
        self.ahead = Some(Ahead {
            dirtied,
            barrier: Barrier::Open,
        });
        self.setup
            .board
            .tell("memory that the guest only reads goes ahead");
        self.say_ahead().await;
        self.setup.flow.open();
    }

    /// Asks the destination to let RAM in: at the beginning, and on each later connection before the stop.
    pub(super) async fn say_ahead(&self) {
        if self.ahead.is_some() && self.stopped.is_none() {
            self.setup.link.mouth.say(Message::Ahead).await;
        }
    }

    /// Keeps back what was written to since the last look; whether anything is left that may go.
    fn refresh_ahead(&mut self) -> bool {
        let disks = self.setup.disks.len();
        let (Some(ram), Some(ahead)) = (&self.ram, &mut self.ahead) else {
            return false;
        };
        let mut rest = false;
        for (block, dirtied) in ahead.dirtied.iter_mut().enumerate() {
            dirtied.union_with(&ram.store().take_dirtied(block));
            let space = spaces::ram_id(disks, block);
            rest |= self.setup.flow.change(|out| {
                out.set_withheld(space, dirtied);
                out.has_pushable(space)
            });
        }
        rest
    }

    /// With the guest stopped: what of RAM was sent in vain. All that was written to since is as if never
    /// offered.
    pub(super) fn outdate_ahead(&mut self, handover: &Handover) {
        self.refresh_ahead();
        let disks = self.setup.disks.len();
        let Some(ahead) = &mut self.ahead else { return };
        // What the destination says that it has, it says again when it has evicted.
        self.fares.resident.clear();
        let blocks = ahead.dirtied.iter_mut().zip(&handover.stale);
        for (block, (dirtied, stale)) in blocks.enumerate() {
            dirtied.union_with(stale);
            self.setup
                .flow
                .outdate(spaces::ram_id(disks, block), dirtied);
        }
    }

    /// Names to the destination what it must not keep, with each grant anew.
    pub(super) async fn say_stale(&self) {
        let Some(ahead) = &self.ahead else { return };
        for block in 0..ahead.dirtied.len() {
            let space = self.ram_space(block);
            for runs in self.setup.flow.outdated(space).chunks(MAX_RUNS) {
                let runs = runs.to_vec();
                let message = Message::Stale { space, runs };
                self.setup.link.mouth.say(message).await;
            }
        }
    }
}
