//! How much content push may bring to disks while the guest's own I/O is slow.
//!
//! Copies that arrive and the guest share the destination's disk, and demands and push share the source's.
//! Nothing tells beforehand what a disk can carry beside a guest, so it is found out: the destination tells
//! every [period](PERIOD_US) how long the guest's requests took, and the source holds push of disk content to
//! a [cap](Guard::cap). RAM needs no disk and is not held.
//!
//! ```text
//!   at first        cap = 4 MiB/s, then cap * 1.5         every period that used it and in which the disk kept
//!                                                         up; until the first cut
//!   slow            cap = half of what push used, a       then wait until the effect can be seen and what the
//!                   quarter at first                      disk is behind with gets no less
//!   calm            cap * 1.1 + 64 KiB/s; cap * 1.03,     every period that used it
//!                   or + 64 KiB/s if that is more,
//!                   near what was cut last
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
//! Traps. The rate that the link had for RAM says nothing of disks: begun with that, a slow disk is seconds behind
//! before anything is heard of it. News is half a second old when it is acted upon, and what went out meanwhile is
//! all too much: so the cap goes carefully past where it was too high before. A disk may be slower than the bound
//! without any push; held down for that, a move would never end and gain nothing. So the cap has a [floor](FLOOR),
//! and if the guest is slow at the floor all the same, its own p99 there is calm, and two and a half times as much
//! the bound, for the next minute. And right after a cut the requests still wait behind what was pushed before it:
//! they do not count.

use std::collections::VecDeque;

use crate::latency::Latencies;

/// How often the guard hears of the guest, in microseconds.
pub const PERIOD_US: u64 = 250_000;

/// Bytes a second that push may always have.
pub const FLOOR: u64 = 128 << 10;

/// Bytes a second of disk content to begin with.
pub const FIRST: u64 = 4 << 20;

/// Never more: no disk is held to this.
const MOST: u64 = 1 << 40;

/// Periods that are looked at together.
const WINDOW: usize = 4;

/// Periods after a cut that do not count.
const BLIND: u32 = 2;

/// Share of the bound up to which there is room for more, and beyond which there was too much.
const CALM: f64 = 0.5;
const SLOW: f64 = 0.7;

/// Share of the bound that a disk may be behind and still be said to keep up.
const KEEPS_UP: f64 = 0.05;

/// Near what was cut last, as shares of it.
const NEAR: [f64; 2] = [0.75, 1.2];

/// Windows of slowness at the floor after which push is not to blame.
const BLAMELESS: u32 = 5;

/// For how long the guest's own latency stands for the bound, in periods.
const EXCUSED: u32 = 240;

/// The guard of one migration.
#[derive(Debug)]
pub struct Guard {
    bound_us: Option<u64>,
    cap: Option<u64>,
    /// No cut yet: nothing says that the disk is slow.
    is_starting: bool,
    window: VecDeque<Latencies>,
    blind: u32,
    /// What push used when it was last cut.
    too_much: Option<u64>,
    /// What the disk was behind in the period before, while that gets less after a cut.
    draining_us: Option<u64>,
    /// Windows of slowness at the floor.
    slow_at_floor: u32,
    /// A bound above the guest's own p99, and for how many more periods it counts.
    excuse: Option<(u64, u32)>,
    all: Latencies,
    is_holding: bool,
    held_periods: u64,
}

/// What the guard saw and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardFigures {
    pub requests: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
    /// Time in which the cap was what held push, in microseconds.
    pub held_us: u64,
}

impl Guard {
    /// `bound_us`: microseconds that 99 of 100 of the guest's requests are to stay within; without, the guard only
    /// counts.
    pub fn new(bound_us: Option<u64>) -> Guard {
        Guard {
            bound_us,
            cap: bound_us.map(|_| FIRST),
            is_starting: true,
            window: VecDeque::with_capacity(WINDOW),
            blind: 0,
            too_much: None,
            draining_us: None,
            slow_at_floor: 0,
            excuse: None,
            all: Latencies::default(),
            is_holding: false,
            held_periods: 0,
        }
    }

    pub fn bound_us(&self) -> Option<u64> {
        self.bound_us
    }

    /// Bytes a second that push may bring to disks; `None`: as many as the link takes.
    pub fn cap(&self) -> Option<u64> {
        self.cap
    }

    /// The cap, if it was what held push in the last period.
    pub fn held_to(&self) -> Option<u64> {
        self.cap.filter(|_| self.is_holding)
    }

    /// A link that was down says nothing of disks: what was heard lately does not count.
    pub fn forget(&mut self) {
        self.window.clear();
        self.blind = BLIND;
        self.is_holding = false;
    }

    pub fn figures(&self) -> GuardFigures {
        let at = |part| self.all.quantile(part).unwrap_or(0);
        GuardFigures {
            requests: self.all.len(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: at(1.0),
            held_us: self.held_periods * PERIOD_US,
        }
    }

    /// What the guest felt in a period, beyond the link's own round trip; how long a flush would have waited for
    /// copies in it, in microseconds; and the bytes a second that push brought to disks. Returns whether the cap
    /// changed.
    pub fn period(&mut self, felt: Latencies, backlog_us: u64, used: u64) -> bool {
        self.all.merge(&felt);
        let (Some(bound), Some(cap)) = (self.bound_us, self.cap) else {
            return false;
        };
        self.is_holding = used >= cap - cap / 5;
        self.held_periods += u64::from(self.is_holding);
        self.excuse = self
            .excuse
            .and_then(|(us, left)| Some((us, left.checked_sub(1)?)));
        let bound = self.excuse.map_or(bound, |(own, _)| own.max(bound));
        let share = |part: f64| (bound as f64 * part) as u64;
        if self.blind > 0 {
            self.blind -= 1;
            self.draining_us = self.draining_us.map(|_| backlog_us);
            return false;
        }
        let drains = |&before: &u64| share(CALM) < backlog_us && backlog_us < before;
        self.draining_us = self.draining_us.filter(drains).map(|_| backlog_us);
        if self.draining_us.is_some() {
            return false;
        }
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(felt);
        let mut seen = Latencies::default();
        self.window.iter().for_each(|part| seen.merge(part));
        if is_slow(&seen, share(SLOW)) || backlog_us > share(SLOW) {
            self.cut(cap, used, &seen, backlog_us);
        } else if !is_slow(&seen, share(CALM)) && backlog_us <= share(CALM) {
            self.slow_at_floor = 0;
            self.grow(cap, used, backlog_us <= share(KEEPS_UP));
        }
        self.cap != Some(cap)
    }

    fn cut(&mut self, cap: u64, used: u64, seen: &Latencies, backlog_us: u64) {
        if cap == FLOOR {
            self.slow_at_floor += 1;
            if self.slow_at_floor >= BLAMELESS {
                let own = seen.quantile(0.99).unwrap_or(0).max(backlog_us);
                self.excuse = Some((own.saturating_mul(5) / 2, EXCUSED));
                self.slow_at_floor = 0;
            }
        }
        let part = if self.is_starting { 4 } else { 2 };
        self.is_starting = false;
        let now = cap.min(used.max(FLOOR));
        self.cap = Some((now / part).max(FLOOR));
        self.too_much = Some(now);
        self.draining_us = Some(backlog_us);
        self.window.clear();
        self.blind = BLIND;
    }

    /// What is not used is no proof that there is room for more.
    fn grow(&mut self, cap: u64, used: u64, keeps_up: bool) {
        if used < cap / 2 {
            return;
        }
        let near = self.too_much.is_some_and(|most| {
            let [from, to] = NEAR.map(|part| (most as f64 * part) as u64);
            (from..to).contains(&cap)
        });
        let more = match (self.is_starting && keeps_up, near) {
            (true, _) => cap + cap / 2,
            (false, true) => cap + (cap * 3 / 100).max(64 << 10),
            (false, false) => cap + cap / 10 + (64 << 10),
        };
        self.cap = Some(more.min(MOST));
    }
}

fn is_slow(seen: &Latencies, bound: u64) -> bool {
    let over = seen.over(bound);
    over >= 2 && over > seen.len() / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of so many bytes a second, whose queue the guest's flushes wait in, and a guest.
    #[derive(Default)]
    struct Disk {
        rate: f64,
        own_us: u64,
        queue: f64,
        /// What it was behind in the period before: news is late.
        behind_us: u64,
    }

    impl Disk {
        fn new(rate: f64, own_us: u64) -> Disk {
            Disk {
                rate,
                own_us,
                ..Disk::default()
            }
        }

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
                felt.record(self.own_us + n + if n % 10 == 0 { wait } else { 0 });
            }
            (felt, used)
        }
    }

    /// What was pushed, and periods in which a flush took longer than the bound.
    fn run(guard: &mut Guard, disk: &mut Disk, link: u64, periods: u32) -> (u64, u32) {
        let (mut pushed, mut slow) = (0, 0);
        for _ in 0..periods {
            let (felt, used) = disk.period(link, guard.cap());
            pushed += used * PERIOD_US / 1_000_000;
            slow += u32::from(felt.over(guard.bound_us().unwrap_or(u64::MAX)) > 0);
            let now = (disk.queue / disk.rate * 1e6) as u64;
            let backlog = std::mem::replace(&mut disk.behind_us, now);
            guard.period(felt, backlog, used);
        }
        (pushed, slow)
    }

    #[test]
    fn a_disk_too_slow_for_both_is_mostly_the_guests_and_still_used() {
        let mut guard = Guard::new(Some(50_000));
        let mut disk = Disk::new(20e6, 2_000);
        // A link six times as fast as the disk.
        run(&mut guard, &mut disk, 120_000_000, 80);
        let (pushed, slow) = run(&mut guard, &mut disk, 120_000_000, 400);
        let share = pushed as f64 / (20e6 * 100.0);
        assert!(share > 0.6, "{share}");
        assert!(slow < 100, "{slow} of 400");
        assert!(guard.figures().held_us > 90_000_000);
    }

    #[test]
    fn a_fast_disk_is_found_out_within_three_seconds() {
        let mut guard = Guard::new(Some(50_000));
        let mut disk = Disk::new(1e9, 2_000);
        // RAM goes first, for as long as it takes: nothing is learnt of disks from it.
        run(&mut guard, &mut disk, 0, 200);
        assert_eq!(guard.cap(), Some(FIRST));
        assert_eq!(run(&mut guard, &mut disk, 120_000_000, 12).1, 0);
        assert_eq!(
            run(&mut guard, &mut disk, 120_000_000, 200).0,
            6_000_000_000
        );
        assert_eq!(guard.held_to(), None);
        assert!(guard.figures().held_us <= 3_000_000);
    }

    #[test]
    fn a_slow_disk_is_not_overrun_while_it_is_found_out() {
        let mut guard = Guard::new(Some(100_000));
        let mut disk = Disk::new(8e6, 2_000);
        let (_, slow) = run(&mut guard, &mut disk, 12_000_000, 40);
        assert!(slow <= 4, "{slow}");
        let (pushed, slow) = run(&mut guard, &mut disk, 12_000_000, 400);
        let share = pushed as f64 / 8e8;
        assert!(share > 0.75 && slow < 30, "{share}, {slow} of 400");
    }

    #[test]
    fn without_a_bound_it_only_counts() {
        let mut guard = Guard::new(None);
        let mut disk = Disk::new(1e6, 2_000);
        assert!(run(&mut guard, &mut disk, 120_000_000, 40).0 > 1_000_000_000);
        assert_eq!(guard.figures().requests, 2000);
        assert_eq!(guard.cap(), None);
    }

    #[test]
    fn a_guest_that_is_slow_by_itself_does_not_keep_a_move_from_its_end() {
        let mut guard = Guard::new(Some(50_000));
        let mut disk = Disk::new(1e9, 80_000);
        let (pushed, _) = run(&mut guard, &mut disk, 10_000_000, 1200);
        // 3 GB would be all that the link can carry in that time.
        assert!(pushed > 1_500_000_000, "{pushed}");
    }

    #[test]
    fn a_cap_that_is_not_used_stays_where_it_is() {
        let mut guard = Guard::new(Some(50_000));
        let mut slow = Latencies::default();
        (0..10).for_each(|_| slow.record(90_000));
        assert!(guard.period(slow, 0, 10_000_000));
        assert_eq!(guard.cap(), Some(FIRST / 4));
        assert_eq!(guard.held_to(), Some(FIRST / 4));
        for _ in 0..40 {
            guard.period(Latencies::default(), 0, 100_000);
        }
        assert_eq!(guard.cap(), Some(FIRST / 4));
        assert_eq!(guard.held_to(), None);
    }

    #[test]
    fn a_single_slow_request_is_no_reason() {
        let mut guard = Guard::new(Some(50_000));
        let mut felt = Latencies::default();
        felt.record(900_000);
        assert!(!guard.period(felt, 0, 1_000_000));
        assert_eq!(guard.cap(), Some(FIRST));
    }

    #[test]
    fn the_floor_is_never_undercut() {
        let mut guard = Guard::new(Some(1_000));
        for _ in 0..500 {
            let mut felt = Latencies::default();
            (0..10).for_each(|_| felt.record(900_000));
            guard.period(felt, 0, 0);
            assert!(guard.cap().is_none_or(|cap| cap >= FLOOR));
        }
    }

    #[test]
    fn a_disk_that_falls_behind_is_relieved_before_the_guest_has_waited() {
        let mut guard = Guard::new(Some(100_000));
        assert!(guard.period(Latencies::default(), 80_000, FIRST));
        let cut = guard.cap();
        assert_eq!(cut, Some(FIRST / 4));
        for _ in 0..BLIND {
            guard.period(Latencies::default(), 200_000, FIRST / 4);
        }
        // Still too much, and less of it each time.
        assert!(!guard.period(Latencies::default(), 120_000, FIRST / 4));
        assert!(!guard.period(Latencies::default(), 60_000, FIRST / 4));
        assert!(guard.period(Latencies::default(), 40_000, FIRST / 4));
        assert!(guard.cap() > cut);
    }
}
