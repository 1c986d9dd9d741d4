//! RAM by pre-copy, for destinations without userfaultfd: round after round while the guest runs, as [`Rounds`]
//! decides, and the rest with the guest stopped, all of it before the grant.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use whimbrel_engine::rounds::Rounds;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{SpaceId, UNIT};
use whimbrel_qemu::source::Handover;
use whimbrel_wire::message::Message;

use super::Outgoing;
use crate::migration::lane::LinkEvent;

/// How long the stop may take, when the last pages must cross the link first.
pub(super) const PATIENCE_IN_STOP: Duration = Duration::from_secs(30);

/// How far back the pace of memory is looked at, and over how many looks it is taken.
const LATELY: Duration = Duration::from_secs(5);
const PACE_OF: usize = 5;

/// The guest is stopped when what is left would cross in this time...
const REST: Duration = Duration::from_millis(300);

/// ...or when this many times the guest's memory was sent: it will not get better, and must end.
pub const MOST: u64 = 3;

/// How fast memory crosses, at best, lately: bytes of content in a second. What goes as deltas or packed crosses faster than the
/// link's rate, and while the hot pages are held nothing crosses at all.
#[derive(Debug, Default)]
pub(super) struct RamPace {
    /// Content sent by then.
    looks: VecDeque<(Instant, u64)>,
    last: u64,
}

impl RamPace {
    fn sent(&mut self, now: Instant, bytes: u64) {
        while self.looks.front().is_some_and(|(at, _)| now - *at > LATELY) {
            self.looks.pop_front();
        }
        self.looks.push_back((now, bytes));
        let best = self.best();
        if best > 0 {
            self.last = best;
        }
    }

    fn best(&self) -> u64 {
        let looks = self.looks.iter();
        let rates = looks.clone().zip(looks.skip(PACE_OF)).map(|(from, to)| {
            let seconds = (to.0 - from.0).as_secs_f64();
            ((to.1 - from.1) as f64 / seconds.max(1e-3)) as u64
        });
        rates.max().unwrap_or(0)
    }
}

impl Outgoing {
    pub(super) fn begin_precopy(&mut self) {
        let blocks = self.held_blocks();
        if let Some(ram) = &self.ram {
            for (block, (space, _)) in blocks.iter().enumerate() {
                let zeros = ram.store().zeros(block);
                self.setup.flow.push_zeroes(*space, zeros.runs());
            }
        }
        let now = self.now_ms();
        let rounds = self
            .setup
            .flow
            .change(|out| Rounds::begin(out, blocks, now));
        self.rounds = Some(rounds);
        self.setup.flow.open();
    }

    /// Notes what QEMU sent again since the last look, or for the first time.
    fn refresh_precopy(&mut self) {
        let dirtied = self.dirtied_blocks();
        if let Some(rounds) = &mut self.rounds {
            for (block, units) in dirtied {
                let flow = &self.setup.flow;
                flow.change(|out| rounds.written(out, block, &units));
            }
        }
    }

    /// What each RAM block has content in, by its space; what arrives from now on is noticed.
    pub(super) fn held_blocks(&self) -> Vec<(SpaceId, UnitSet)> {
        let Some(ram) = &self.ram else {
            return Vec::new();
        };
        let blocks = (0..ram.layout().blocks.len()).map(|block| {
            // Cleared before it is looked at what is held.
            ram.store().take_dirtied(block);
            (self.ram_space(block), ram.store().held(block))
        });
        blocks.collect()
    }

    /// RAM blocks that were written to since the last look, each with the units.
    pub(super) fn dirtied_blocks(&self) -> Vec<(usize, UnitSet)> {
        let Some(ram) = &self.ram else {
            return Vec::new();
        };
        let blocks = 0..ram.layout().blocks.len();
        let dirtied = blocks.map(|block| (block, ram.store().take_dirtied(block)));
        let dirtied = dirtied.filter(|(_, units)| !units.is_empty());
        let dirtied = dirtied.inspect(|(block, units)| {
            self.setup.flow.written(self.ram_space(*block), units);
        });
        dirtied.collect()
    }

    /// Lets the next pages go; whether the guest may stop as far as its memory goes.
    pub(super) fn step_precopy(&mut self) -> bool {
        self.refresh_precopy();
        let now = self.now_ms();
        let choice = self.setup.ram_order;
        let Some(rounds) = &mut self.rounds else {
            return false;
        };
        let flow = &self.setup.flow;
        let rest = flow.change(|out| rounds.step(out, now, choice));
        let blocks = self.ram.as_ref().map_or(0, |r| r.layout().blocks.len());
        let sent: u64 = (0..blocks)
            .map(|b| flow.sent(self.ram_space(b)).units * UNIT)
            .sum();
        self.ram_pace.sent(Instant::now(), sent);
        let rate = self.ram_pace.last;
        let bytes = rest.units * UNIT;
        let soon = (rate as f64 * REST.as_secs_f64()) as u64;
        bytes <= soon || rest.is_settled || sent > self.ram_sent_limit
    }

    /// Says what a guest that is about to be stopped will stand still for, if it is much.
    pub(super) fn foretell_precopy(&self) {
        let Some(rounds) = &self.rounds else { return };
        let bytes = self.setup.flow.change(|out| rounds.pending(out)) * UNIT;
        let seconds = bytes as f64 / self.ram_pace.last.max(1) as f64;
        if seconds > REST.as_secs_f64() {
            self.board().tell(format!(
                "the guest writes to {} MiB all the time: they go while it stands still, about {seconds:.1} s",
                bytes >> 20
            ));
        }
    }

    /// With the guest stopped: the last pages cross, and the destination says that it has them all.
    pub(super) async fn finish_precopy(&mut self, handover: &Handover) -> Result<(), String> {
        let until = tokio::time::Instant::now() + PATIENCE_IN_STOP;
        if let Some(ram) = &self.ram {
            ram.drained().await.map_err(|e| e.to_string())?;
        }
        self.refresh_precopy();
        if let Some(ram) = &self.ram {
            for (block, stale) in handover.stale.iter().enumerate() {
                let space = self.ram_space(block);
                debug_assert!(ram.store().stale(block).is_empty());
                self.setup.flow.change(|out| out.offer_set(space, stale));
            }
        }
        if let Some(rounds) = &self.rounds {
            self.setup.flow.change(|out| rounds.end(out));
        }
        let frames = loop {
            let rounds = self.rounds.as_ref();
            let pending = rounds.map(|rounds| self.setup.flow.change(|out| rounds.pending(out)));
            let all_handed_out = pending == Some(0) && self.setup.flow.zeroes_are_pushed();
            match self.setup.flow.frames().filter(|_| all_handed_out) {
                Some(frames) => break frames,
                None => self.step_of_stop(until).await?,
            }
        };
        self.setup.link.mouth.say(Message::RamEnd { frames }).await;
        while !self.ram_taken {
            self.step_of_stop(until).await?;
        }
        Ok(())
    }

    /// Hears what the peer says while the guest is stopped, and gives up when that is wiser.
    pub(super) async fn step_of_stop(&mut self, until: tokio::time::Instant) -> Result<(), String> {
        tokio::select! {
            event = self.setup.link.events.recv() => match event {
                Some(LinkEvent::Heard(message)) if *message == Message::RamTaken => {
                    self.ram_is_taken();
                }
                Some(LinkEvent::Heard(_) | LinkEvent::Up | LinkEvent::Unstored(_)) => {}
                Some(LinkEvent::Down(error)) => {
                    self.link_up = false;
                    self.down_since = Some(Instant::now());
                    return Err(format!("the link broke during the stop: {error}"));
                }
                None => return Err("the session ended during the stop".to_string()),
            },
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
        if tokio::time::Instant::now() > until {
            return Err(format!(
                "the last pages did not cross within {} s",
                PATIENCE_IN_STOP.as_secs()
            ));
        }
        Ok(())
    }
}
