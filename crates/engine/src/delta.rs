//! Which units' content is kept at both ends, so that it need not go again whole when a guest changed a little
//! of it.
//!
//! # The idea
//! Both ends of a connection hold a table of [`SLOTS`] units' content. The source alone decides what is in it and
//! says so, unit by unit, with the content: so the two tables are equal at every point of the connection, and
//! the destination has no policy that could differ. [`Keeper`] is that policy, without the content.
//!
//! # Which are kept
//! All, while there is room: memory goes once before it is known what the guest writes to. After that a unit
//! must be sent a second time to get a slot, and it takes one whose unit earned nothing since the hand last came
//! by, as a clock's hand goes round the table:
//!
//! ```text
//!   a unit comes again, and its old content helped      its slot has CREDIT
//!   ... and did not help                                one less
//!   the hand meets a slot without credit                it is given away, with a credit of 1
//!   the hand meets another                              one less; the unit that came gets none this time
//! ```
//!
//! Why not simply the least recently used: memory goes in ascending order, round after round, and of a working
//! set larger than the table each unit would be thrown out just before it comes again. Here most of the table
//! stays as it is and helps in every round. When the guest turns to other memory, credit is gone after
//! `CREDIT` rounds of the hand. Each decision takes the same short time.
//!
//! # The second way
//! Content that was moved within its page is not helped by a list of changed bytes, but packing with the old
//! content for a dictionary finds it. That costs ten times as much, and helps some guests never: [`Trial`]
//! keeps the account.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::set::UnitSet;
use crate::space::{Extent, SpaceId};

/// Units whose content is kept for one connection at most: 64 MiB at each end.
pub const SLOTS: u32 = 16_384;

/// How often the hand passes a slot that was of use.
const CREDIT: u8 = 2;

/// What the operator wants: `on` or `off`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Memory that goes again may go as what changed of it.
    #[default]
    On,
    Off,
}

/// What is no [`Policy`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither on nor off")]
pub struct PolicyError(String);

impl std::str::FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Policy, PolicyError> {
        match text {
            "on" => Ok(Policy::On),
            "off" => Ok(Policy::Off),
            _ => Err(PolicyError(text.to_string())),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Policy::On => "on",
            Policy::Off => "off",
        })
    }
}

/// What becomes of a unit's content that is about to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Forget,
    /// It is put in this slot, whatever was there.
    Keep(u16),
    /// Older content of this unit is in this slot; the new replaces it.
    Against(u16),
}

struct Slot {
    space: SpaceId,
    unit: u64,
    credit: u8,
}

/// Decides what is kept. Of the same events comes the same table.
pub struct Keeper {
    most: usize,
    slots: Vec<Slot>,
    places: HashMap<(SpaceId, u64), u16>,
    /// By space: what was sent, kept or not.
    sent: BTreeMap<SpaceId, UnitSet>,
    hand: usize,
    closed: bool,
}

impl Keeper {
    /// For a destination that grants so many slots; more than [`SLOTS`] are not used.
    pub fn new(granted: u32) -> Keeper {
        Keeper {
            most: granted.min(SLOTS) as usize,
            slots: Vec::new(),
            places: HashMap::new(),
            sent: BTreeMap::new(),
            hand: 0,
            closed: false,
        }
    }

    /// Nothing is sent again from now on: what is kept still helps, and nothing more is kept.
    pub fn close(&mut self) {
        self.closed = true;
    }

    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Slots in use.
    pub fn kept(&self) -> usize {
        self.slots.len()
    }

    /// A unit of a space of so many units is about to be sent; `is_warm` if it was written to lately, so that it
    /// will be sent again. Also whether it was sent before.
    pub fn next(&mut self, space: SpaceId, units: u64, unit: u64, is_warm: bool) -> (Place, bool) {
        let sent = self
            .sent
            .entry(space)
            .or_insert_with(|| UnitSet::empty(units));
        let is_again = sent.insert(Extent::unit(unit)) == 0;
        let place = match self.places.get(&(space, unit)) {
            Some(&slot) => Place::Against(slot),
            None if self.closed => Place::Forget,
            // Most of memory is only read: it would take the slots of what is sent again.
            None if !is_warm && !is_again => Place::Forget,
            None if self.slots.len() < self.most => {
                let slot = self.slots.len() as u16;
                self.slots.push(Slot {
                    space,
                    unit,
                    credit: 0,
                });
                self.places.insert((space, unit), slot);
                Place::Keep(slot)
            }
            None if is_again && self.most > 0 => self.replace(space, unit),
            None => Place::Forget,
        };
        (place, is_again)
    }

    fn replace(&mut self, space: SpaceId, unit: u64) -> Place {
        let hand = self.hand;
        self.hand = (hand + 1) % self.slots.len();
        let slot = &mut self.slots[hand];
        if slot.credit > 0 {
            slot.credit -= 1;
            return Place::Forget;
        }
        self.places.remove(&(slot.space, slot.unit));
        // What was sent twice gets the time to be sent a third.
        *slot = Slot {
            space,
            unit,
            credit: 1,
        };
        self.places.insert((space, unit), hand as u16);
        Place::Keep(hand as u16)
    }

    /// Whether the old content in a slot made the new one shorter.
    pub fn helped(&mut self, slot: u16, helped: bool) {
        if let Some(slot) = self.slots.get_mut(usize::from(slot)) {
            slot.credit = match helped {
                true => CREDIT,
                false => slot.credit.saturating_sub(1),
            };
        }
    }
}

/// While trying does not pay, one candidate of so many is tried all the same.
const PROBE: u32 = 32;

/// Trying begins when it saves so many times the time that it takes, and ends when it saves less than that.
const WORTH: f64 = 1.5;

/// How much one try moves the averages.
const WEIGHT: f64 = 0.1;

/// Whether a costly way of saving bytes pays at the moment.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    pays: bool,
    passed: u32,
    /// Seconds a try takes, and seconds of the link it saves; none before the first.
    averages: Option<(f64, f64)>,
}

impl Trial {
    /// Whether to try it with the next candidate.
    pub fn tries(&mut self) -> bool {
        if self.pays || self.averages.is_none() {
            return true;
        }
        self.passed += 1;
        if self.passed < PROBE {
            return false;
        }
        self.passed = 0;
        true
    }

    /// A try took so long and saved so many bytes, on a link that carries so many a second.
    pub fn tried(&mut self, took: Duration, saved: usize, link: u64) {
        let took = took.as_secs_f64();
        let saved = saved as f64 / link.max(1) as f64;
        let (cost, gain) = match self.averages {
            None => (took, saved),
            Some((cost, gain)) => (
                cost + WEIGHT * (took - cost),
                gain + WEIGHT * (saved - gain),
            ),
        };
        self.averages = Some((cost, gain));
        self.pays = gain > cost * if self.pays { 1.0 } else { WORTH };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RAM: SpaceId = SpaceId(1);

    fn next(keeper: &mut Keeper, unit: u64) -> Place {
        keeper.next(RAM, 1 << 20, unit, true).0
    }

    /// One round over memory; how many found their old content, all of it of use.
    fn round(keeper: &mut Keeper, units: std::ops::Range<u64>) -> usize {
        let mut found = 0;
        for unit in units {
            if let Place::Against(slot) = next(keeper, unit) {
                keeper.helped(slot, true);
                found += 1;
            }
        }
        found
    }

    #[test]
    fn while_there_is_room_all_is_kept_then_only_what_comes_again() {
        let mut keeper = Keeper::new(2);
        assert_eq!(next(&mut keeper, 10), Place::Keep(0));
        assert_eq!(next(&mut keeper, 11), Place::Keep(1));
        assert_eq!(next(&mut keeper, 12), Place::Forget);
        assert_eq!(next(&mut keeper, 10), Place::Against(0));
        // Nothing has earned its place yet: the hand begins at the first slot.
        assert_eq!(next(&mut keeper, 12), Place::Keep(0));
        assert_eq!(keeper.next(RAM, 1 << 20, 10, true), (Place::Keep(1), true));
        assert_eq!(next(&mut keeper, 12), Place::Against(0));
    }

    #[test]
    fn a_working_set_larger_than_the_table_still_finds_most_of_the_table() {
        let mut keeper = Keeper::new(1000);
        round(&mut keeper, 0..5000);
        // The guest writes to the last 1300 of what went, in order, round after round.
        let found: Vec<usize> = (0..6).map(|_| round(&mut keeper, 3700..5000)).collect();
        assert!(found[2..].iter().all(|&f| f >= 900), "{found:?}");
    }

    #[test]
    fn when_the_guest_turns_to_other_memory_so_does_the_table() {
        let mut keeper = Keeper::new(1000);
        for _ in 0..10 {
            round(&mut keeper, 0..1000);
        }
        let found: Vec<usize> = (0..6).map(|_| round(&mut keeper, 2000..3000)).collect();
        assert_eq!(found.last(), Some(&1000), "{found:?}");
    }

    #[test]
    fn content_that_never_helps_gives_its_place_away() {
        let mut keeper = Keeper::new(1);
        next(&mut keeper, 1);
        keeper.helped(0, true);
        next(&mut keeper, 2);
        assert_eq!(next(&mut keeper, 2), Place::Forget);
        keeper.helped(0, false);
        keeper.helped(0, false);
        assert_eq!(next(&mut keeper, 2), Place::Keep(0));
    }

    #[test]
    fn after_the_end_what_is_kept_helps_and_nothing_is_kept_any_more() {
        let mut keeper = Keeper::new(10);
        next(&mut keeper, 1);
        keeper.close();
        assert_eq!(next(&mut keeper, 1), Place::Against(0));
        assert_eq!(next(&mut keeper, 2), Place::Forget);
        assert_eq!(next(&mut Keeper::new(0), 2), Place::Forget);
    }

    #[test]
    fn what_saves_less_than_it_costs_is_tried_now_and_then_only() {
        let us = Duration::from_micros;
        let mut trial = Trial::default();
        let (slow, fast) = (1_000_000, 1_000_000_000);
        assert!(trial.tries());
        trial.tried(us(20), 3000, fast);
        let tries = (0..320).filter(|_| trial.tries()).count();
        assert_eq!(tries, 10);
        for _ in 0..5 {
            trial.tried(us(20), 3000, slow);
        }
        assert!((0..320).all(|_| trial.tries()));
        for _ in 0..100 {
            trial.tried(us(20), 0, slow);
        }
        assert!(!trial.tries());
    }

    proptest! {
        /// The keeper's own account of who is where, against a table that does as it says.
        #[test]
        fn a_unit_is_found_exactly_where_it_was_last_put(
            granted in 0_u32..6,
            events in prop::collection::vec((0_u16..2, 0_u64..12, any::<bool>()), 0..200),
        ) {
            let mut keeper = Keeper::new(granted);
            let mut table: Vec<Option<(SpaceId, u64)>> = vec![None; 6];
            for (space, unit, helped) in events {
                let space = SpaceId(space);
                let held = table.iter().position(|held| *held == Some((space, unit)));
                match keeper.next(space, 12, unit, true).0 {
                    Place::Against(slot) => {
                        prop_assert_eq!(held, Some(usize::from(slot)));
                        keeper.helped(slot, helped);
                    }
                    Place::Keep(slot) => {
                        prop_assert_eq!(held, None);
                        prop_assert!(u32::from(slot) < granted);
                        table[usize::from(slot)] = Some((space, unit));
                    }
                    Place::Forget => prop_assert_eq!(held, None),
                }
            }
            prop_assert!(keeper.kept() <= granted as usize);
        }
    }
}
