//! RAM by pre-copy, for destinations without userfaultfd: round after round while the guest runs, and the
//! rest with the guest stopped, all of it before the grant.

use std::time::{Duration, Instant};

use whimbrel_engine::space::UNIT;
use whimbrel_qemu::source::Handover;
use whimbrel_wire::message::Message;

use super::Outgoing;
use crate::migration::lane::LinkEvent;

/// How long the stop may take, when the last pages must cross the link first.
pub(super) const PATIENCE_IN_STOP: Duration = Duration::from_secs(30);

/// The guest is stopped when what is left would cross in this time...
const REST: Duration = Duration::from_millis(300);

/// ...or when this many times the guest's memory was sent: it will not get better, and must end.
pub const MOST: u64 = 3;

impl Outgoing {
    pub(super) fn begin_precopy(&mut self) {
        let Some(ram) = &self.ram else { return };
        for block in 0..ram.layout().blocks.len() {
            ram.store().take_dirtied(block);
            let zeros = ram.store().zeros(block);
            let space = self.ram_space(block);
            self.setup.flow.push_zeroes(space, zeros.runs());
            let held = ram.store().held(block);
            self.setup.flow.change(|out| out.offer_set(space, &held));
        }
        self.setup.flow.open();
    }

    /// Offers what QEMU sent again since the last look, or for the first time.
    pub(super) fn refresh_precopy(&self) {
        let Some(ram) = &self.ram else { return };
        for block in 0..ram.layout().blocks.len() {
            let dirtied = ram.store().take_dirtied(block);
            let space = self.ram_space(block);
            self.setup.flow.change(|out| out.offer_set(space, &dirtied));
        }
    }

    fn ram_pending_bytes(&self) -> u64 {
        let blocks = self.ram.as_ref().map_or(0, |r| r.layout().blocks.len());
        (0..blocks)
            .map(|b| self.setup.flow.tally(self.ram_space(b)).pending)
            .sum::<u64>()
            * UNIT
    }

    pub(super) fn precopy_may_stop(&self) -> bool {
        let blocks = self.ram.as_ref().map_or(0, |r| r.layout().blocks.len());
        let sent: u64 = (0..blocks)
            .map(|b| self.setup.flow.sent(self.ram_space(b)).units * UNIT)
            .sum();
        let rate = self.board().view().rate / 8;
        let rest = self.ram_pending_bytes();
        rest <= (rate as f64 * REST.as_secs_f64()) as u64 || sent > self.ram_sent_limit
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
        let frames = loop {
            let all_handed_out =
                self.ram_pending_bytes() == 0 && self.setup.flow.zeroes_are_pushed();
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
                    self.ram_taken = true;
                }
                Some(LinkEvent::Heard(_)) | Some(LinkEvent::Up) => {}
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
