//! What every estimator keeps to, and what the judge counts.

use super::heat::DecayedHeat;
use super::judge::{Move, foretelling, migration};
use super::lifetable::LifeTable;
use super::oracle::Oracle;
use super::windows::SlidingWindows;
use super::*;
use proptest::prelude::*;

const WINDOW: u64 = 1000;
const MOST: usize = 64;

fn all<'a>() -> [Box<dyn Estimator + 'a>; 3] {
    [
        Box::new(DecayedHeat::new(4 * WINDOW, MOST)),
        Box::new(SlidingWindows::new(WINDOW, MOST)),
        Box::new(LifeTable::new(WINDOW, MOST)),
    ]
}

fn access(at_ms: u64, touch: Touch, region: u64) -> Access {
    Access {
        at_ms,
        touch,
        units: Extent::new(region * REGION_UNITS, 1),
    }
}

fn next(now: u64) -> Span {
    Span::new(now, now + WINDOW)
}

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let one = (0..3000u64, any::<bool>(), 0..6000u64, 0..600u64);
    prop::collection::vec(one, 0..200).prop_map(|all| {
        let mut at_ms = 0;
        let one = |(pause, write, start, len)| {
            at_ms += pause;
            let touch = if write { Touch::Write } else { Touch::Read };
            Access {
                at_ms,
                touch,
                units: Extent::new(start, len),
            }
        };
        all.into_iter().map(one).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn answers_are_ranked_bounded_and_the_same_again(trace in accesses(), most in 0..40usize, later in 0..90_000u64) {
        let end = trace.last().map_or(0, |a| a.at_ms);
        for (mut one, mut two) in all().into_iter().zip(all()) {
            for access in &trace {
                one.access(*access);
                two.access(*access);
            }
            for touch in Touch::BOTH {
                for from in [0, WINDOW, 5 * WINDOW] {
                    let now = end + later;
                    let span = Span::new(now + from, now + from + WINDOW);
                    let answer = one.predict(touch, now, span, most);
                    prop_assert_eq!(&answer, &two.predict(touch, now, span, most));
                    prop_assert!(answer.len() <= most);
                    let falls = answer.windows(2).all(|two| two[0].score >= two[1].score);
                    prop_assert!(falls);
                    let mut regions: Vec<_> = answer.iter().map(|r| r.region).collect();
                    regions.sort_unstable();
                    regions.dedup();
                    prop_assert_eq!(regions.len(), answer.len());
                }
            }
            // Twice the entries, for the tree's nodes; tables do not grow.
            let empty = LifeTable::new(WINDOW, MOST).memory();
            prop_assert!(one.memory() <= empty + MOST * 64, "{}", one.memory());
        }
    }

    #[test]
    fn whoever_knows_the_future_is_never_wrong(trace in accesses()) {
        for told in foretelling(&trace, &mut Oracle::new(&trace), WINDOW, 0, usize::MAX) {
            prop_assert_eq!((told.right, told.right), (told.predicted, told.touched));
        }
    }

    #[test]
    fn a_move_sends_what_is_live_once_and_what_was_written_again(trace in accesses(), start in 0..50_000u64, before in 0..20_000u64, rate in 1_000..10_000_000u64) {
        let plan = Move { start_ms: start, switch_ms: start + before, ask_ms: 500, window_ms: WINDOW, bytes_per_second: rate, budget: 20 };
        for mut estimator in all() {
            let paid = migration(&trace, &mut *estimator, &plan);
            prop_assert!(paid.again <= paid.ahead);
            prop_assert!(paid.ahead * UNIT <= rate * before / 1000);
            prop_assert!(paid.stalled >= paid.stalled_reads);
        }
    }
}

#[test]
fn an_untouched_disk_predicts_nothing() {
    for mut estimator in all() {
        for touch in Touch::BOTH {
            assert_eq!(estimator.predict(touch, 0, next(0), 10), []);
            assert_eq!(estimator.predict(touch, 1 << 40, next(1 << 40), 10), []);
        }
    }
}

#[test]
fn what_is_only_read_is_in_no_write_working_set() {
    for mut estimator in all() {
        for second in 0..20 {
            estimator.access(access(second * WINDOW, Touch::Read, 7));
        }
        let now = 20 * WINDOW;
        assert_eq!(
            estimator.predict(Touch::Read, now, next(now), 10)[0].region,
            7
        );
        let written = estimator.predict(Touch::Write, now, next(now), 10);
        assert!(written.iter().all(|r| r.score < 0.1), "{written:?}");
    }
}

#[test]
fn a_burst_is_dropped_by_windows_and_unlearned_by_the_life_table() {
    let mut windows = SlidingWindows::new(WINDOW, 4096);
    let mut table = LifeTable::new(WINDOW, 4096);
    for second in 0..40 {
        for estimator in [&mut windows as &mut dyn Estimator, &mut table] {
            estimator.access(access(second * WINDOW, Touch::Read, 1));
            // Somewhere else each time, in leaps.
            for n in 0..5 {
                estimator.access(access(
                    second * WINDOW,
                    Touch::Read,
                    100 + (second * 5 + n) * 9,
                ));
            }
        }
    }
    let now = 40 * WINDOW;
    let windows: Vec<_> = windows
        .predict(Touch::Read, now, next(now), 99)
        .iter()
        .map(|r| r.region)
        .collect();
    assert_eq!(windows, [1]);
    let table: Vec<_> = table
        .predict(Touch::Read, now, next(now), 99)
        .iter()
        .map(|r| r.region)
        .collect();
    assert_eq!(table, [1]);
}

#[test]
fn the_life_table_sees_a_log_go_on_and_an_even_beat_return() {
    let mut table = LifeTable::new(WINDOW, 4096);
    for second in 0..40 {
        for n in 0..8 {
            table.access(access(second * WINDOW, Touch::Write, 1000 + second * 8 + n));
        }
        if second % 5 == 0 {
            table.access(access(second * WINDOW, Touch::Write, 3));
        }
    }
    let now = 40 * WINDOW;
    let ranked = table.predict(Touch::Write, now, next(now), 10);
    let regions: Vec<_> = ranked.iter().map(|r| r.region).collect();
    for expected in (1320..1328).chain([3]) {
        assert!(
            regions.contains(&expected),
            "{expected} is not in {regions:?}"
        );
    }
}

#[test]
fn an_access_of_the_whole_address_space_ends() {
    for mut estimator in all() {
        let units = Extent::new(u64::MAX - 5, u64::MAX);
        estimator.access(Access {
            at_ms: 0,
            touch: Touch::Read,
            units,
        });
        let units = Extent::new(0, u64::MAX);
        estimator.access(Access {
            at_ms: u64::MAX,
            touch: Touch::Write,
            units,
        });
        estimator.predict(Touch::Read, 5, next(5), 10);
    }
}

/// A unit is written every second and one is read after the switch; the link is slow.
#[test]
fn the_judge_counts_what_goes_again_and_what_stalls() {
    let mut trace = vec![access(0, Touch::Read, 0)];
    for second in 1..10 {
        trace.push(access(second * WINDOW, Touch::Write, 5));
    }
    trace.push(access(10_500, Touch::Read, 9));
    trace.push(access(10_600, Touch::Read, 0));
    let plan = Move {
        start_ms: 5_500,
        switch_ms: 10_000,
        ask_ms: 500,
        window_ms: WINDOW,
        bytes_per_second: UNIT / 2,
        budget: 10,
    };
    // Two units go ahead, region 5's after its last write. Nobody foresees the read of region 9.
    let foresees_nothing = || SlidingWindows::new(1 << 40, MOST);
    let paid = migration(&trace, &mut foresees_nothing(), &plan);
    assert_eq!((paid.live, paid.ahead), (3, 2));
    assert_eq!((paid.again, paid.stalled, paid.stalled_reads), (0, 1, 1));
    // A unit a second: region 5's goes at 7.5, 8.5 and 9.5 s, the first two times in vain.
    let plan = Move {
        bytes_per_second: UNIT,
        ..plan
    };
    let paid = migration(&trace, &mut foresees_nothing(), &plan);
    assert_eq!((paid.ahead, paid.again, paid.stalled), (4, 2, 0));
    // Who knows that it is written holds it.
    let paid = migration(&trace, &mut SlidingWindows::new(WINDOW, MOST), &plan);
    assert_eq!((paid.ahead, paid.again, paid.stalled), (2, 0, 0));
}
