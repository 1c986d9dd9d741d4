//! How much push may go while the guest's own I/O is slow.
//!
//! Copies that arrive and the guest share the destination's disk, and demands and push share the source's.
//! Nothing tells beforehand what a disk can carry beside a guest, so it is found out: the destination tells
//! every [period](PERIOD_US) how long the guest's requests took, and the source holds push to a [cap](Guard::cap).
//!
//! ```text
//!   slow            cap = half of what push used, a       then wait until the effect can be seen
//!                   quarter at first
//!   calm            cap * 1.1 + 64 KiB/s                  every period, until push does not need it
//!   in between      as it is
//! ```
//!
//! The destination also tells how far its disk is behind with the copies: what a flush would wait at that moment.
//! That is known before any guest has waited, and counts as a request that took so long.
//!
//! *Slow* is: of the last second's requests more than 1 %, and at least two, took longer than 70 % of the bound;
//! *calm*: no more than that took longer than half of it. The margin is for what is felt before it is heard of.
//! One request in a quiet second is no quantile. The first cut is the deepest, because a page cache takes much
//! before anybody waits, and then somebody waits for all of it.
//!
//! Traps. A disk may be slower than the bound without any push; held down for that, a move would never end
//! and gain nothing. So the cap has a [floor](FLOOR), and if the guest is slow at the floor all the same, its
//! own p99 there is calm, and two and a half times as much the bound, for the next minute. And right after a cut the
//! requests still wait behind what was pushed before it: they do not count.

use std::collections::VecDeque;

use crate::latency::Latencies;

/// How often the guard hears of the guest, in microseconds.
pub const PERIOD_US: u64 = 250_000;

/// Bytes a second that push may always have.
pub const FLOOR: u64 = 128 << 10;

/// Periods that are looked at together.
const WINDOW: usize = 4;

/// Periods after a cut that do not count.
const BLIND: u32 = 2;

/// Share of the bound up to which there is room for more, and beyond which there was too much.
const CALM: f64 = 0.5;
const SLOW: f64 = 0.7;

/// Windows of slowness at the floor after which push is not to blame.
const BLAMELESS: u32 = 5;

/// For how long the guest's own latency stands for the bound, in periods.
const EXCUSED: u32 = 240;

/// Periods that push used less than half of its cap, after which it has none.
const UNUSED: u32 = 8;

/// The guard of one migration.
#[derive(Debug)]
pub struct Guard {
    bound_us: u64,
    cap: Option<u64>,
    window: VecDeque<Latencies>,
    blind: u32,
    /// Windows of slowness at the floor.
    slow_at_floor: u32,
    /// A bound above the guest's own p99, and for how many more periods it counts.
    excuse: Option<(u64, u32)>,
    unused: u32,
    all: Latencies,
    capped_periods: u64,
}

/// What the guard saw and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardFigures {
    pub requests: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
    /// Time with a cap, in microseconds.
    pub held_us: u64,
}

impl Guard {
    /// `bound_us`: microseconds that 99 of 100 of the guest's requests are to stay within.
    pub fn new(bound_us: u64) -> Guard {
        Guard {
            bound_us,
            cap: None,
            window: VecDeque::with_capacity(WINDOW),
            blind: 0,
            slow_at_floor: 0,
            excuse: None,
            unused: 0,
            all: Latencies::default(),
            capped_periods: 0,
        }
    }

    pub fn bound_us(&self) -> u64 {
        self.bound_us
    }

    /// Bytes a second that push may use; `None`: as many as the link takes.
    pub fn cap(&self) -> Option<u64> {
        self.cap
    }

    /// A link that was down says nothing of disks: what was heard lately does not count.
    pub fn forget(&mut self) {
        self.window.clear();
        self.blind = BLIND;
    }

    pub fn figures(&self) -> GuardFigures {
        let at = |part| self.all.quantile(part).unwrap_or(0);
        GuardFigures {
            requests: self.all.len(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: at(1.0),
            held_us: self.capped_periods * PERIOD_US,
        }
    }

    /// What the guest felt in a period, beyond the link's own round trip; how long a flush would have waited for
    /// copies in it, in microseconds; and the bytes a second that push used. Returns whether the cap changed.
    pub fn period(&mut self, felt: Latencies, backlog_us: u64, used: u64) -> bool {
        let before = self.cap;
        self.all.merge(&felt);
        self.capped_periods += u64::from(self.cap.is_some());
        self.excuse = self
            .excuse
            .and_then(|(us, left)| Some((us, left.checked_sub(1)?)));
        if self.blind > 0 {
            self.blind -= 1;
            return false;
        }
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(felt);
        let mut seen = Latencies::default();
        self.window.iter().for_each(|part| seen.merge(part));
        let bound = self
            .excuse
            .map_or(self.bound_us, |(own, _)| own.max(self.bound_us));
        let share = |part: f64| (bound as f64 * part) as u64;
        if is_slow(&seen, share(SLOW)) || backlog_us > share(SLOW) {
            self.cut(used, &seen, backlog_us);
        } else if !is_slow(&seen, share(CALM)) && backlog_us <= share(CALM) {
            self.slow_at_floor = 0;
            self.grow(used);
        }
        self.cap != before
    }

    fn cut(&mut self, used: u64, seen: &Latencies, backlog_us: u64) {
        self.unused = 0;
        if self.cap == Some(FLOOR) {
            self.slow_at_floor += 1;
            if self.slow_at_floor >= BLAMELESS {
                let own = seen.quantile(0.99).unwrap_or(0).max(backlog_us);
                self.excuse = Some((own.saturating_mul(5) / 2, EXCUSED));
                self.slow_at_floor = 0;
            }
        }
        let part = if self.capped_periods == 0 { 4 } else { 2 };
        let now = self.cap.unwrap_or(u64::MAX).min(used.max(FLOOR));
        self.cap = Some((now / part).max(FLOOR));
        self.window.clear();
        self.blind = BLIND;
    }

    fn grow(&mut self, used: u64) {
        let Some(cap) = self.cap else { return };
        self.unused = if used < cap / 2 { self.unused + 1 } else { 0 };
        self.cap = (self.unused < UNUSED).then(|| cap + cap / 10 + (64 << 10));
        if self.cap.is_none() {
            self.unused = 0;
        }
    }
}

fn is_slow(seen: &Latencies, bound: u64) -> bool {
    let over = seen.over(bound);
    over >= 2 && over > seen.len() / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of so many bytes a second, whose queue the guest's requests wait in, and a guest.
    struct Disk {
        rate: f64,
        own_us: u64,
        queue: f64,
    }

    impl Disk {
        /// One period of push at most at the cap; what the guest felt and what push used.
        fn period(&mut self, link: u64, cap: Option<u64>) -> (Latencies, u64) {
            let used = cap.unwrap_or(link).min(link);
            let period = PERIOD_US as f64 / 1e6;
            self.queue = (self.queue + (used as f64 - self.rate) * period).max(0.0);
            // The page cache takes no more than this before whoever writes must wait.
            self.queue = self.queue.min(self.rate * 2.0);
            let mut felt = Latencies::default();
            let wait = (self.queue / self.rate * 1e6) as u64;
            for n in 0..50 {
                felt.record(self.own_us + wait + n);
            }
            (felt, used)
        }
    }

    fn run(guard: &mut Guard, disk: &mut Disk, link: u64, periods: u32) -> (u64, u32) {
        let (mut pushed, mut slow) = (0, 0);
        for _ in 0..periods {
            let (felt, used) = disk.period(link, guard.cap());
            pushed += used * PERIOD_US / 1_000_000;
            slow += u32::from(felt.over(guard.bound_us()) > 0);
            guard.period(felt, 0, used);
        }
        (pushed, slow)
    }

    #[test]
    fn a_disk_too_slow_for_both_is_mostly_the_guests_and_still_used() {
        let mut guard = Guard::new(50_000);
        let mut disk = Disk {
            rate: 20e6,
            own_us: 2_000,
            queue: 0.0,
        };
        // A link six times as fast as the disk.
        run(&mut guard, &mut disk, 120_000_000, 80);
        let (pushed, slow) = run(&mut guard, &mut disk, 120_000_000, 400);
        let share = pushed as f64 / (20e6 * 100.0);
        assert!(share > 0.6, "{share}");
        assert!(slow < 100, "{slow} of 400");
        assert!(guard.figures().held_us > 90_000_000);
    }

    #[test]
    fn a_fast_disk_is_never_capped() {
        let mut guard = Guard::new(50_000);
        let mut disk = Disk {
            rate: 1e9,
            own_us: 2_000,
            queue: 0.0,
        };
        assert_eq!(run(&mut guard, &mut disk, 120_000_000, 200).1, 0);
        assert_eq!(guard.cap(), None);
        assert_eq!(guard.figures().held_us, 0);
    }

    #[test]
    fn a_guest_that_is_slow_by_itself_does_not_keep_a_move_from_its_end() {
        let mut guard = Guard::new(50_000);
        let mut disk = Disk {
            rate: 1e9,
            own_us: 80_000,
            queue: 0.0,
        };
        let (pushed, _) = run(&mut guard, &mut disk, 10_000_000, 1200);
        // 3 GB would be all that the link can carry in that time.
        assert!(pushed > 1_500_000_000, "{pushed}");
    }

    #[test]
    fn a_cap_that_is_not_needed_any_more_goes() {
        let mut guard = Guard::new(50_000);
        let mut slow = Latencies::default();
        (0..10).for_each(|_| slow.record(90_000));
        assert!(guard.period(slow, 0, 10_000_000));
        assert_eq!(guard.cap(), Some(2_500_000));
        for _ in 0..40 {
            guard.period(Latencies::default(), 0, 1_000_000);
        }
        assert_eq!(guard.cap(), None);
    }

    #[test]
    fn a_single_slow_request_is_no_reason() {
        let mut guard = Guard::new(50_000);
        let mut felt = Latencies::default();
        felt.record(900_000);
        assert!(!guard.period(felt, 0, 10_000_000));
        assert_eq!(guard.cap(), None);
    }

    #[test]
    fn the_floor_is_never_undercut() {
        let mut guard = Guard::new(1_000);
        for _ in 0..500 {
            let mut felt = Latencies::default();
            (0..10).for_each(|_| felt.record(900_000));
            guard.period(felt, 0, 0);
            assert!(guard.cap().is_none_or(|cap| cap >= FLOOR));
        }
    }

    #[test]
    fn a_disk_that_falls_behind_is_relieved_before_the_guest_has_waited() {
        let mut guard = Guard::new(100_000);
        assert!(guard.period(Latencies::default(), 80_000, 10_000_000));
        assert_eq!(guard.cap(), Some(2_500_000));
        for _ in 0..BLIND {
            guard.period(Latencies::default(), 80_000, 2_500_000);
        }
        // Neither slow nor calm.
        assert!(!guard.period(Latencies::default(), 60_000, 2_500_000));
        assert!(guard.period(Latencies::default(), 40_000, 2_500_000));
        assert!(guard.cap() > Some(2_500_000));
    }
}
