//! Every live unit leaves the source exactly once, whatever is demanded, forgotten, withheld or lost.

use proptest::prelude::*;
use whimbrel_engine::outflow::{Batch, Class, Outflow};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, SpaceId, SpaceInfo, SpaceKind, UNIT};

const UNITS: u64 = 200;
const RAM: SpaceId = SpaceId(0);
const DISK: SpaceId = SpaceId(1);

fn spaces() -> Vec<SpaceInfo> {
    vec![
        SpaceInfo {
            id: RAM,
            kind: SpaceKind::Ram,
            name: "pc.ram".into(),
            len: UNITS * UNIT,
        },
        SpaceInfo {
            id: DISK,
            kind: SpaceKind::Disk,
            name: "root".into(),
            len: UNITS * UNIT,
        },
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Demand(u16, u64, u64),
    NextDemand(u64),
    NextPush(u64),
    Forget(u16, u64, u64),
    Ready(u64, u64),
    Prefer(u16, u64, u64),
    PutBack,
    Unstored(u16, u64, u64),
    BeginCompare(u16, u64, u64),
    EndCompare(usize, u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..2u16, 0..UNITS, 1..20u64).prop_map(|(s, a, n)| Step::Demand(s, a, n)),
        (1..9u64).prop_map(Step::NextDemand),
        (1..30u64).prop_map(Step::NextPush),
        (0..2u16, 0..UNITS, 1..9u64).prop_map(|(s, a, n)| Step::Forget(s, a, n)),
        (0..UNITS, 1..40u64).prop_map(|(a, n)| Step::Ready(a, n)),
        (0..2u16, 0..UNITS, 1..40u64).prop_map(|(s, a, n)| Step::Prefer(s, a, n)),
        Just(Step::PutBack),
        (0..2u16, 0..UNITS, 1..40u64).prop_map(|(s, a, n)| Step::Unstored(s, a, n)),
        (0..2u16, 0..UNITS, 1..40u64).prop_map(|(s, a, n)| Step::BeginCompare(s, a, n)),
        (0..8usize, 0..UNITS, 1..40u64).prop_map(|(i, a, n)| Step::EndCompare(i, a, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, ..ProptestConfig::default() })]

    #[test]
    fn each_live_unit_is_sent_once_or_forgotten(
        live in prop::collection::vec((0..UNITS, 1..30u64), 1..8),
        withheld in prop::collection::vec((0..UNITS, 1..20u64), 0..4),
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let mut out = Outflow::new(spaces());
        let mut expected = [UnitSet::empty(UNITS), UnitSet::empty(UNITS)];
        for &(a, n) in &live {
            for (i, set) in expected.iter_mut().enumerate() {
                set.insert(Extent::new(a, n));
                out.offer(SpaceId(i as u16), Extent::new(a, n).clamp_to(Extent::new(0, UNITS)));
            }
        }
        let mut unready = UnitSet::empty(UNITS);
        for &(a, n) in &withheld {
            for run in expected[0].runs_within(Extent::new(a, n).clamp_to(Extent::new(0, UNITS))).collect::<Vec<_>>() {
                out.offer_withheld(RAM, run);
                unready.insert(run);
            }
        }
        let mut got = [UnitSet::empty(UNITS), UnitSet::empty(UNITS)];
        let mut gone = [UnitSet::empty(UNITS), UnitSet::empty(UNITS)];
        let mut last: Option<Batch> = None;
        let mut comparing: Vec<(SpaceId, Extent)> = Vec::new();
        let take = |out: &mut Outflow, batch: Option<Batch>, unready: &UnitSet, got: &mut [UnitSet; 2], last: &mut Option<Batch>, class| {
            if let Some(b) = batch {
                assert_eq!(b.class, class);
                for &run in &b.runs {
                    assert_eq!(got[usize::from(b.space.0)].insert(run), run.len, "sent twice");
                    if b.space == RAM {
                        assert_eq!(unready.runs_within(run).count(), 0, "sent before it was ready");
                    }
                }
                *last = Some(b);
            }
            let _ = out;
        };
        for s in steps {
            match s {
                Step::Demand(space, a, n) => { out.demand(SpaceId(space), Extent::new(a, n)); }
                Step::NextDemand(max) => { let b = out.next_demand(max); take(&mut out, b, &unready, &mut got, &mut last, Class::Demand); }
                Step::NextPush(max) => { let b = out.next_push(max); take(&mut out, b, &unready, &mut got, &mut last, Class::Push); }
                Step::Forget(space, a, n) => {
                    let run = Extent::new(a, n).clamp_to(Extent::new(0, UNITS));
                    gone[usize::from(space)].insert(run);
                    out.forget(SpaceId(space), run);
                }
                Step::Ready(a, n) => {
                    let run = Extent::new(a, n).clamp_to(Extent::new(0, UNITS));
                    unready.remove(run);
                    out.ready(RAM, run);
                }
                Step::Prefer(space, a, n) => out.prefer(SpaceId(space), Extent::new(a, n).clamp_to(Extent::new(0, UNITS))),
                Step::PutBack => if let Some(b) = last.take() {
                    for &run in &b.runs { got[usize::from(b.space.0)].remove(run); }
                    out.put_back(&b);
                },
                Step::Unstored(space, a, n) => {
                    let run = Extent::new(a, n).clamp_to(Extent::new(0, UNITS));
                    let empty = out.unstored(SpaceId(space), run);
                    let live = &expected[usize::from(space)];
                    prop_assert_eq!(empty, live.gaps_within(run).collect::<Vec<_>>());
                    // Both at once are of no kind that happens: a batch that did not leave cannot have come.
                    last = None;
                    got[usize::from(space)].remove(run);
                }
                Step::BeginCompare(space, a, n) => {
                    let run = Extent::new(a, n);
                    comparing.push((SpaceId(space), run));
                    for part in out.begin_compare(SpaceId(space), run) {
                        let space = usize::from(space);
                        prop_assert!(expected[space].contains_all(part) && got[space].runs_within(part).count() == 0);
                        prop_assert!(space != 0 || unready.runs_within(part).count() == 0);
                    }
                }
                Step::EndCompare(which, a, n) => if !comparing.is_empty() {
                    let (space, run) = comparing.remove(which % comparing.len());
                    // What the peer has counts as gone out, once, and never what was handed out or forgotten.
                    for part in out.end_compare(space, run, &[Extent::new(a, n)]) {
                        let space = usize::from(space.0);
                        prop_assert_eq!(got[space].insert(part), part.len, "had and sent");
                        prop_assert!(gone[space].runs_within(part).count() == 0);
                    }
                    last = None;
                },
            }
        }
        unready.remove(Extent::new(0, UNITS));
        out.ready(RAM, Extent::new(0, UNITS));
        loop {
            let b = out.next_demand(7);
            if b.is_none() { break; }
            take(&mut out, b, &unready, &mut got, &mut last, Class::Demand);
        }
        loop {
            let b = out.next_push(16);
            if b.is_none() { break; }
            take(&mut out, b, &unready, &mut got, &mut last, Class::Push);
        }
        prop_assert!(out.is_drained());
        for i in 0..2 {
            let mut missing = expected[i].clone();
            missing.subtract(&got[i]);
            missing.subtract(&gone[i]);
            prop_assert!(missing.is_empty(), "never sent: {missing:?}");
        }
    }
}

#[test]
fn what_the_peer_may_have_already_goes_only_if_demanded_until_it_is_compared() {
    let mut out = Outflow::new(spaces());
    out.offer(DISK, Extent::new(0, 20));
    out.unsettle(DISK);
    assert_eq!(out.next_push(8), None);
    out.demand(DISK, Extent::new(3, 1));
    let demanded = out.next_demand(8).expect("is wanted");
    assert_eq!(demanded.runs, [Extent::new(3, 1)]);
    assert_eq!(out.begin_compare(DISK, Extent::new(0, 8)).len(), 2);
    let alike = out.end_compare(DISK, Extent::new(0, 8), &[Extent::new(2, 3)]);
    assert_eq!(alike, [Extent::new(2, 1), Extent::new(4, 1)]);
    let mut differs: Vec<Extent> = std::iter::from_fn(|| out.next_push(20))
        .flat_map(|batch| batch.runs)
        .collect();
    differs.sort_by_key(|run| run.start);
    assert_eq!(differs, [Extent::new(0, 2), Extent::new(5, 3)]);
    assert!(out.is_unsettled(DISK));
    out.settle(DISK);
    assert_eq!(out.next_push(20).expect("the rest").units(), 12);
    assert!(out.is_drained());
    assert_eq!(out.tally(DISK).alike, 2);
}

/// What happens while memory goes ahead of the switchover.
#[derive(Clone, Debug)]
enum Early {
    Written(u64, u64),
    /// Withheld, and nothing else.
    Hot(u64, u64),
    Push(u64),
    /// So many units arrive, in the order in which they went.
    Arrive(usize),
    /// What is under way is lost.
    Break,
    /// The last batch never left.
    PutBack,
}

fn early() -> impl Strategy<Value = Early> {
    prop_oneof![
        3 => (0..UNITS, 1..20u64).prop_map(|(a, n)| Early::Written(a, n)),
        1 => (0..UNITS, 1..60u64).prop_map(|(a, n)| Early::Hot(a, n)),
        4 => (1..60u64).prop_map(Early::Push),
        2 => (0..120usize).prop_map(Early::Arrive),
        1 => Just(Early::Break),
        1 => Just(Early::PutBack),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, ..ProptestConfig::default() })]

    /// What a peer holds that was sent ahead, once or several times and over connections that broke, less what it
    /// is told was in vain, plus what is sent after the stop, is the newest content of every unit.
    #[test]
    fn what_was_sent_ahead_and_changed_is_told_and_goes_again(
        offered in prop::collection::vec((0..UNITS, 1..60u64), 1..6),
        steps in prop::collection::vec(early(), 0..30),
        stale in prop::collection::vec((0..UNITS, 1..20u64), 0..4),
        zeroed in prop::collection::vec((0..UNITS, 1..20u64), 0..3),
    ) {
        let within = |a, n| Extent::new(a, n).clamp_to(Extent::new(0, UNITS));
        let set_of = |runs: &[(u64, u64)]| {
            let mut set = UnitSet::empty(UNITS);
            runs.iter().for_each(|&(a, n)| { set.insert(within(a, n)); });
            set
        };
        let mut out = Outflow::new(spaces());
        // Versions of each unit: at the source, and at the peer.
        let (mut here, mut there) = (vec![1u32; UNITS as usize], vec![0u32; UNITS as usize]);
        let mut way: Vec<(u64, u32)> = Vec::new();
        let mut last: Option<Batch> = None;
        let (mut sent, mut lost) = (0, 0);
        let mut held = set_of(&offered);
        out.offer_set(RAM, &held);
        for step in steps {
            match step {
                Early::Written(a, n) => {
                    let written = set_of(&[(a, n)]);
                    within(a, n).iter().for_each(|unit| here[unit as usize] += 1);
                    held.union_with(&written);
                    out.changed(RAM, &written);
                    prop_assert!(written.runs().all(|run| out.sent(RAM).runs_within(run).next().is_none()));
                    last = None;
                }
                Early::Hot(a, n) => out.set_withheld(RAM, &set_of(&[(a, n)])),
                Early::Push(most) => {
                    last = out.next_push(most);
                    for unit in last.iter().flat_map(|b| b.runs.iter()).flat_map(Extent::iter) {
                        way.push((unit, here[unit as usize]));
                        sent += 1;
                    }
                }
                Early::Arrive(most) => {
                    for (unit, version) in way.drain(..most.min(way.len())) {
                        there[unit as usize] = version;
                    }
                    last = None;
                }
                Early::Break => {
                    lost += way.len() as u64;
                    way.clear();
                    let mut has = UnitSet::empty(UNITS);
                    (0..UNITS).filter(|&u| there[u as usize] > 0).for_each(|u| { has.insert(Extent::unit(u)); });
                    out.peer_received(RAM, &has);
                    last = None;
                }
                Early::PutBack => {
                    if let Some(batch) = last.take() {
                        way.truncate(way.len() - batch.units() as usize);
                        sent -= batch.units();
                        out.put_back(&batch);
                    }
                }
            }
        }
        // The barrier, then the stop.
        for (unit, version) in way.drain(..) {
            there[unit as usize] = version;
        }
        let mut changed = set_of(&stale);
        changed.runs().flat_map(|run| run.iter()).for_each(|unit| here[unit as usize] += 1);
        held.union_with(&changed);
        let zeroed = set_of(&zeroed);
        zeroed.runs().flat_map(|run| run.iter()).for_each(|unit| here[unit as usize] = 0);
        changed.union_with(&zeroed);
        held.subtract(&zeroed);
        let vain = out.outdate(RAM, &changed);
        vain.runs().flat_map(|run| run.iter()).for_each(|unit| there[unit as usize] = 0);
        for unit in (0..UNITS).filter(|&unit| there[unit as usize] > 0) {
            prop_assert_eq!(here[unit as usize], there[unit as usize], "an old copy stays");
        }
        let mut live = held.clone();
        live.subtract(out.sent(RAM));
        out.offer_set(RAM, &live);
        out.set_withheld(RAM, &UnitSet::empty(UNITS));
        while let Some(batch) = out.next_push(16) {
            for unit in batch.runs.iter().flat_map(Extent::iter) {
                prop_assert_eq!(there[unit as usize], 0, "held already, and nobody evicts it");
                there[unit as usize] = here[unit as usize];
                sent += 1;
            }
        }
        for unit in held.runs().flat_map(|run| run.iter()) {
            prop_assert_eq!(here[unit as usize], there[unit as usize]);
        }
        for empty in out.empty_runs(RAM).iter().flat_map(Extent::iter) {
            prop_assert_eq!(there[empty as usize], 0);
        }
        let tally = out.tally(RAM);
        prop_assert_eq!(tally.live, held.len());
        if lost == 0 {
            prop_assert_eq!(tally.sent_again, 0);
            prop_assert_eq!(sent, held.len() + tally.outdated + tally.repeated);
        }
    }
}

#[test]
fn a_demand_overtakes_push_and_brings_its_neighbours() {
    let mut out = Outflow::new(spaces());
    out.offer(DISK, Extent::new(0, UNITS));
    assert_eq!(
        out.next_push(8).expect("pending").runs,
        vec![Extent::new(0, 8)]
    );
    assert_eq!(out.demand(DISK, Extent::new(100, 2)).queued, 2);
    assert_eq!(
        out.next_demand(8).expect("demanded").runs,
        vec![Extent::new(100, 2)]
    );
    assert_eq!(
        out.next_push(8).expect("near").runs,
        vec![Extent::new(102, 8)]
    );
}

#[test]
fn demands_take_turns() {
    let mut out = Outflow::new(spaces());
    out.offer(DISK, Extent::new(0, UNITS));
    out.demand(DISK, Extent::new(0, 20));
    out.demand(DISK, Extent::unit(40));
    let turns: Vec<_> = std::iter::from_fn(|| out.next_demand(8))
        .map(|batch| batch.runs[0])
        .collect();
    let asked_last = Extent::unit(40);
    let (first, second, third) = (Extent::new(0, 8), Extent::new(8, 8), Extent::new(16, 4));
    assert_eq!(turns, [first, asked_last, second, third]);
}

#[test]
fn a_demand_for_an_empty_unit_is_answered_as_zero() {
    let mut out = Outflow::new(spaces());
    out.offer(DISK, Extent::new(0, 4));
    let outcome = out.demand(DISK, Extent::new(2, 4));
    assert_eq!(outcome.empty, vec![Extent::new(4, 2)]);
    assert_eq!(outcome.queued, 2);
}

#[test]
fn what_a_broken_connection_lost_is_pending_again_and_nothing_else() {
    let mut out = Outflow::new(spaces());
    out.offer(DISK, Extent::new(0, 10));
    out.next_push(6);
    let mut held = UnitSet::empty(UNITS);
    held.insert(Extent::new(0, 4));
    out.peer_has(DISK, &held);
    let mut again = UnitSet::empty(UNITS);
    while let Some(batch) = out.next_push(100) {
        for run in batch.runs {
            again.insert(run);
        }
    }
    assert_eq!(again.runs().collect::<Vec<_>>(), vec![Extent::new(4, 6)]);
    assert_eq!(out.tally(DISK).sent_again, 2);
}
