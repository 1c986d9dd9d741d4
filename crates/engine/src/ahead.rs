//! RAM ahead of the switchover: what is cold goes while the guest still runs at the source.
//!
//! # The idea
//! A guest that runs before any of its memory is there touches hundreds of pages before it can answer a
//! single packet, one round trip after the other. Nearly all of them (its kernel, its programs, its page
//! tables) it only reads. So what is not written to goes first, then what has not been written to for a while,
//! by [`WriteHeat`](crate::write_heat::WriteHeat); what is hot stays and goes after the switch. A page that is written to after it went was
//! sent in vain: it goes again once it is colder still, or is named to the destination with the grant.
//!
//! # Why it ends
//! Nothing is waited for: as soon as no page is cold enough, that is all. Pages that go again are at most
//! `AGAIN` of what was offered, unless the operator holds the switchover; then they go as long as he likes.
//!
//! # The barrier
//! ```text
//! Open     content may go
//! Said     the destination was told how many frames there were; nothing goes until it has them all
//! Closed   it has, and lets no more in: the guest may be stopped
//! ```
//! A broken connection opens it again, and so does more that became cold under a hold.

use crate::outflow::Outflow;
use crate::set::UnitSet;
use crate::space::SpaceId;
use crate::write_heat::Heats;

/// Heat up to which a page may go, colder ones first. A page written once passes them after 0, 5 and 9 epochs,
/// in reverse.
const LEVELS: [u8; 3] = [0, 4, 16];

/// One in so many of the units offered may go again.
const AGAIN: u64 = 16;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Barrier {
    #[default]
    Open,
    Said,
    Closed,
}

/// What follows from a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something can still go.
    Going,
    /// That is all: to be said with the number of frames, then [`Ahead::end_said`].
    Ends,
    /// The destination does not have all of it yet.
    Waiting,
    /// The guest may be stopped.
    Closed,
    /// Under a hold more became cold: to be said, then [`Ahead::begin_said`].
    Begins,
}

/// What went, or is to go, ahead.
#[derive(Clone, Debug)]
pub struct Ahead {
    heats: Heats,
    barrier: Barrier,
}

impl Ahead {
    /// `held` is what each block has content in; all of it is offered.
    pub fn begin(
        out: &mut Outflow,
        held: impl IntoIterator<Item = (SpaceId, UnitSet)>,
        now_ms: u64,
    ) -> Self {
        Ahead {
            heats: Heats::begin(out, held, now_ms),
            barrier: Barrier::Open,
        }
    }

    /// These units of a block have other content than before: what the destination has of them is old. They are
    /// kept back until the next [`step`](Self::step), for the destination may let nothing in.
    pub fn written(&mut self, out: &mut Outflow, block: usize, units: &UnitSet) {
        self.heats.written(out, block, units);
    }

    /// Decides what may go now. `is_held`: the switchover waits for an operator. `again`: the destination takes a
    /// second copy of a page.
    pub fn step(&mut self, out: &mut Outflow, now_ms: u64, is_held: bool, again: bool) -> Step {
        self.heats.look(now_ms);
        match self.barrier {
            Barrier::Open if self.let_go(out, is_held, again) => Step::Going,
            Barrier::Open => Step::Ends,
            Barrier::Said => {
                self.keep_back(out);
                Step::Waiting
            }
            Barrier::Closed if is_held && self.let_go(out, true, again) => {
                // Not before the destination lets it in.
                self.keep_back(out);
                Step::Begins
            }
            Barrier::Closed => {
                self.keep_back(out);
                Step::Closed
            }
        }
    }

    /// As [`step`](Self::step), with the guest stopped: nothing more goes.
    pub fn end(&mut self, out: &mut Outflow) -> Step {
        self.keep_back(out);
        match self.barrier {
            Barrier::Open => Step::Ends,
            Barrier::Said => Step::Waiting,
            Barrier::Closed => Step::Closed,
        }
    }

    /// Lets the coldest go that there are; whether there are any.
    fn let_go(&self, out: &mut Outflow, is_held: bool, again: bool) -> bool {
        let tallies = self.spaces().map(|space| out.tally(space));
        let (offered, repeated) = tallies.fold((0, 0), |(offered, repeated), tally| {
            (offered + tally.live, repeated + tally.repeated)
        });
        let may_repeat = again && (is_held || repeated < offered / AGAIN);
        LEVELS.into_iter().any(|level| {
            self.heats.withhold(out, |out, space, heat| {
                let mut kept = heat.hotter_than(level);
                let old = out.old(space);
                if !may_repeat {
                    kept.union_with(old);
                } else if level > 0 {
                    // It was thought cold before, and was not.
                    kept.union_with(&heat.hotter_than(level / 4).intersection(old));
                }
                kept
            })
        })
    }

    fn keep_back(&self, out: &mut Outflow) {
        self.heats
            .withhold(out, |_, _, heat| UnitSet::full(heat.units()));
    }

    /// The destination was told that this is all.
    pub fn end_said(&mut self) {
        self.barrier = Barrier::Said;
    }

    /// It was told that more comes.
    pub fn begin_said(&mut self) {
        self.barrier = Barrier::Open;
    }

    /// It has all of it.
    pub fn taken(&mut self) {
        if self.barrier == Barrier::Said {
            self.barrier = Barrier::Closed;
        }
    }

    /// What was said may not have been heard, and what was sent may not have come.
    pub fn link_down(&mut self) {
        self.barrier = Barrier::Open;
    }

    /// The blocks' spaces.
    pub fn spaces(&self) -> impl Iterator<Item = SpaceId> + '_ {
        self.heats.blocks().map(|(space, _)| space)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::{Extent, SpaceInfo, SpaceKind, UNIT};
    use crate::write_heat::EPOCH;

    const UNITS: u64 = 320;
    const RAM: SpaceId = SpaceId(0);

    fn begun() -> (Outflow, Ahead) {
        let mut out = Outflow::new(vec![SpaceInfo {
            id: RAM,
            kind: SpaceKind::Ram,
            name: "pc.ram".into(),
            len: UNITS * UNIT,
        }]);
        let ahead = Ahead::begin(&mut out, [(RAM, UnitSet::full(UNITS))], 0);
        (out, ahead)
    }

    fn set(start: u64, len: u64) -> UnitSet {
        let mut set = UnitSet::empty(UNITS);
        set.insert(Extent::new(start, len));
        set
    }

    /// Pushes all that may go; how many units that was.
    fn push(out: &mut Outflow) -> u64 {
        std::iter::from_fn(|| out.next_push(64))
            .map(|batch| batch.units())
            .sum()
    }

    #[test]
    fn what_is_written_all_the_time_stays_and_the_rest_goes_once() {
        let (mut out, mut ahead) = begun();
        let mut pushed = 0;
        let mut now = 0;
        loop {
            ahead.written(&mut out, 0, &set(100, 20));
            match ahead.step(&mut out, now, false, true) {
                Step::Going => pushed += push(&mut out),
                Step::Ends => break,
                other => panic!("{other:?}"),
            }
            now += 200;
        }
        assert_eq!(pushed, UNITS - 20);
        ahead.end_said();
        assert_eq!(ahead.step(&mut out, now, false, true), Step::Waiting);
        ahead.taken();
        assert_eq!(ahead.step(&mut out, now, false, true), Step::Closed);
        assert_eq!(push(&mut out), 0);
        assert!(out.outdate(RAM, &set(100, 20)).is_empty());
        assert_eq!(out.tally(RAM).live, UNITS - 20);
    }

    #[test]
    fn nothing_goes_behind_the_barrier_whatever_is_written() {
        let (mut out, mut ahead) = begun();
        ahead.step(&mut out, 0, false, true);
        push(&mut out);
        assert_eq!(ahead.step(&mut out, 200, false, true), Step::Ends);
        ahead.written(&mut out, 0, &set(0, 9));
        assert_eq!(push(&mut out), 0);
        ahead.end_said();
        ahead.step(&mut out, 100 * EPOCH, false, true);
        ahead.written(&mut out, 0, &set(50, 9));
        assert_eq!(push(&mut out), 0);
        ahead.taken();
        ahead.step(&mut out, 200 * EPOCH, false, true);
        ahead.written(&mut out, 0, &set(70, 9));
        assert_eq!(push(&mut out), 0);
    }

    #[test]
    fn what_was_written_once_goes_again_when_it_is_cold_and_is_not_in_vain() {
        let (mut out, mut ahead) = begun();
        ahead.step(&mut out, 0, true, true);
        assert_eq!(push(&mut out), UNITS);
        ahead.written(&mut out, 0, &set(7, 3));
        let mut now = 0;
        let mut again = 0;
        while again == 0 {
            now += EPOCH;
            match ahead.step(&mut out, now, true, true) {
                Step::Going => again = push(&mut out),
                // There was nothing to do meanwhile.
                Step::Ends => ahead.end_said(),
                Step::Waiting => ahead.taken(),
                Step::Begins => ahead.begin_said(),
                Step::Closed => assert!(now < 60 * EPOCH, "never cold again"),
            }
        }
        assert_eq!(again, 3);
        assert!(now > 3 * EPOCH, "thought cold at once");
        assert!(out.outdate(RAM, &set(0, 0)).is_empty());
        assert_eq!(out.tally(RAM).repeated, 3);
    }

    #[test]
    fn without_a_hold_only_a_few_go_again() {
        let (mut out, mut ahead) = begun();
        let mut now = 0;
        // Everything is written to again and again, slowly: each time it is cold once more.
        for at in (0..UNITS).cycle().step_by(16).take(4000) {
            now += EPOCH;
            ahead.written(&mut out, 0, &set(at, 8));
            match ahead.step(&mut out, now, false, true) {
                Step::Going => drop(out.next_push(8)),
                _ => break,
            }
        }
        assert!(out.tally(RAM).repeated <= UNITS / AGAIN + 8);
        assert_eq!(ahead.step(&mut out, now, false, true), Step::Ends);
    }
}
