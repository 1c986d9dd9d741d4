//! RAM by pre-copy: which pages go while the guest runs, and when it is time to stop.
//!
//! # The idea
//! Everything goes once, and what was written to since goes again. Sent in the order of addresses, a page that
//! is written to all the time goes in every round and in vain each time but the last. So colder pages go first,
//! by [`WriteHeat`](crate::write_heat::WriteHeat), and those in the write working set are held and go once, with the guest stopped (Svärd et
//! al., dynamic page transfer reordering). If a later copy is cheap because an earlier one is there (deltas),
//! hot pages go a first time while the guest runs.
//!
//! # Why it ends
//! When all that is not hot has gone once, and for `SETTLED` epochs what is left became no less, it will not: that
//! is what the stop will cost, whenever it is made.

use crate::outflow::Outflow;
use crate::set::UnitSet;
use crate::space::SpaceId;
use crate::write_heat::Heats;

/// Heat up to which a page goes, colder ones first. Above the last are those written in the last three epochs: QEMU may tell of
/// each only in every second one.
const LEVELS: [u8; 4] = [0, 4, 12, 32];

/// Epochs after which what is left is what will be left.
const SETTLED: u32 = 4;

/// In which order pages go: `cold-first` or `address`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Colder pages first; those that the guest writes all the time are held.
    #[default]
    ColdFirst,
    /// As they lie in memory, round after round.
    Address,
}

/// What is no [`Order`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither cold-first nor address")]
pub struct OrderError(String);

impl std::str::FromStr for Order {
    type Err = OrderError;

    fn from_str(text: &str) -> Result<Order, OrderError> {
        match text {
            "cold-first" => Ok(Order::ColdFirst),
            "address" => Ok(Order::Address),
            _ => Err(OrderError(text.to_string())),
        }
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Order::ColdFirst => "cold-first",
            Order::Address => "address",
        })
    }
}

/// How the pages are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    pub order: Order,
    /// Hot pages of which the peer has no copy at all go as well.
    pub first_copies: bool,
}

/// What is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Pending units, those that are held included.
    pub units: u64,
    /// It will not become less.
    pub is_settled: bool,
}

/// The rounds of one move.
#[derive(Clone, Debug)]
pub struct Rounds {
    heats: Heats,
    /// Fewest units left since all had gone once, and epochs since they were fewer by a tenth.
    least: u64,
    unchanged: u32,
}

impl Rounds {
    /// `held` is what each block has content in; all of it is offered.
    pub fn begin(
        out: &mut Outflow,
        held: impl IntoIterator<Item = (SpaceId, UnitSet)>,
        now_ms: u64,
    ) -> Self {
        Rounds {
            heats: Heats::begin(out, held, now_ms),
            least: u64::MAX,
            unchanged: 0,
        }
    }

    /// These units of a block have other content than before. They wait for the next [`step`](Self::step).
    pub fn written(&mut self, out: &mut Outflow, block: usize, units: &UnitSet) {
        self.heats.written(out, block, units);
    }

    /// Decides what may go now.
    pub fn step(&mut self, out: &mut Outflow, now_ms: u64, choice: Choice) -> Rest {
        let epoch_is_over = self.heats.look(now_ms);
        match choice.order {
            Order::ColdFirst => self.let_go(out, choice.first_copies),
            Order::Address => self.end(out),
        }
        let units = self.pending(out);
        if choice.order == Order::Address || self.has_first_copies(out, choice.first_copies) {
            self.least = u64::MAX;
            self.unchanged = 0;
        } else if units < self.least - self.least / 10 {
            self.least = units;
            self.unchanged = 0;
        } else if epoch_is_over {
            self.unchanged += 1;
        }
        Rest {
            units,
            is_settled: self.unchanged >= SETTLED,
        }
    }

    /// Whether something is to go for the first time while the guest runs.
    fn has_first_copies(&self, out: &Outflow, of_hot: bool) -> bool {
        self.heats.blocks().any(|(space, heat)| {
            let mut first = out.pending(space).clone();
            first.subtract(out.old(space));
            if !of_hot {
                first.subtract(&heat.hotter_than(LEVELS[LEVELS.len() - 1]));
            }
            !first.is_empty()
        })
    }

    /// Lets the coldest go that there are.
    fn let_go(&self, out: &mut Outflow, first_copies: bool) {
        let last = LEVELS.len() - 1;
        // The first level at which something may go, else the last.
        let _ = LEVELS.into_iter().enumerate().any(|(at, level)| {
            self.heats.withhold(out, |out, space, heat| {
                let kept = heat.hotter_than(level);
                match at == last && first_copies {
                    true => kept.intersection(out.old(space)),
                    false => kept,
                }
            })
        });
    }

    /// Everything may go: the guest has stopped.
    pub fn end(&self, out: &mut Outflow) {
        self.heats
            .withhold(out, |_, _, heat| UnitSet::empty(heat.units()));
    }

    /// Units that are still to go, those that are held included.
    pub fn pending(&self, out: &Outflow) -> u64 {
        let blocks = self.heats.blocks();
        blocks.map(|(space, _)| out.tally(space).pending).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::{Extent, SpaceInfo, SpaceKind, UNIT};
    use crate::write_heat::EPOCH;

    const UNITS: u64 = 400;
    const RAM: SpaceId = SpaceId(0);
    const COLD_FIRST: Choice = Choice {
        order: Order::ColdFirst,
        first_copies: false,
    };

    fn begun() -> (Outflow, Rounds) {
        let mut out = Outflow::new(vec![SpaceInfo {
            id: RAM,
            kind: SpaceKind::Ram,
            name: "pc.ram".into(),
            len: UNITS * UNIT,
        }]);
        let rounds = Rounds::begin(&mut out, [(RAM, UnitSet::full(UNITS))], 0);
        (out, rounds)
    }

    fn set(start: u64, len: u64) -> UnitSet {
        let mut set = UnitSet::empty(UNITS);
        set.insert(Extent::new(start, len));
        set
    }

    /// A guest that writes the same units in each epoch over a link of 40 units an epoch: units sent until it is
    /// time to stop and after it.
    fn moved(choice: Choice, most: u64) -> (u64, u64) {
        let (mut out, mut rounds) = begun();
        let (mut sent, mut now) = (0, 0);
        while sent < most {
            now += EPOCH;
            rounds.written(&mut out, 0, &set(100, 60));
            let rest = rounds.step(&mut out, now, choice);
            if rest.is_settled || rest.units == 0 {
                break;
            }
            for _ in 0..5 {
                sent += out.next_push(8).map_or(0, |batch| batch.units());
            }
        }
        rounds.end(&mut out);
        let rest = std::iter::from_fn(|| out.next_push(64)).map(|batch| batch.units());
        (sent, rest.sum())
    }

    #[test]
    fn what_is_written_all_the_time_goes_once_and_in_the_stop() {
        let (sent, rest) = moved(COLD_FIRST, 10 * UNITS);
        assert_eq!((sent, rest), (UNITS - 60, 60));
        let address = Choice {
            order: Order::Address,
            ..COLD_FIRST
        };
        let (sent, rest) = moved(address, 3 * UNITS);
        assert!(sent + rest >= 3 * UNITS, "{sent} {rest}");
    }

    #[test]
    fn for_deltas_each_hot_page_goes_a_first_time() {
        let choice = Choice {
            first_copies: true,
            ..COLD_FIRST
        };
        assert_eq!(moved(choice, 10 * UNITS), (UNITS, 60));
    }
}
