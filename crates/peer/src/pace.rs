//! Pacing: how many bytes a second may leave, by migration and by host.
//!
//! A [`Pace`] is a token bucket under any number of others: one per migration under the host's one.
//! Push [acquires](Pace::acquire) its bytes and waits for them on every level; demand is
//! [charged](Pace::charge), which never waits: the push behind it pays. Rates change live, waiting
//! push included.
//!
//! A bucket works by debt: bytes are admitted while the balance is above zero and may take it below,
//! so that a frame larger than the bucket still passes, and the next waits until the debt is paid.
//! Over any time `t` at most `rate * t + burst + one frame` of push is admitted. Balances are counted
//! in billionths of a byte, so that no rate and no frequency of asking loses anything to rounding.
//!
//! Order: who waits on a level is served first come, first served, each keeping its place on its own
//! level while it waits on the next. So two migrations under one host take turns frame by frame.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Billionths of a byte in a byte.
const NANO: i128 = 1_000_000_000;

/// How long an idle bucket goes on filling. Long enough that late wake-ups of the runtime cost no
/// bandwidth, short enough that the queue a burst makes on the way is not felt by demand.
const BURST: Duration = Duration::from_millis(20);

/// A burst is never less than this, lest small rates be unreachable.
const LEAST_BURST: i128 = 64 << 10;

/// The most that demand can run a bucket into debt, in time of its rate. At the bound further demand
/// is not charged: it passes all the same, and push is held up no longer than this.
const DEEPEST_DEBT: Duration = Duration::from_secs(1);

/// The longest single sleep. A wait that is longer is slept in parts.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// How fast bytes may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// As fast as the link takes them.
    Unlimited,
    /// So many bytes a second; 0 holds all push until it is changed.
    PerSecond(u64),
}

#[derive(Debug)]
struct Bucket {
    rate: Rate,
    balance: i128,
    at: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Bucket {
        Bucket {
            rate,
            balance: burst(rate),
            at: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at);
        self.at = now;
        if let Rate::PerSecond(rate) = self.rate {
            let earned = worth(rate, elapsed);
            self.balance = self.balance.saturating_add(earned).min(burst(self.rate));
        }
    }

    /// Admits the bytes now, or says how long to wait before asking again.
    fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        self.refill(now);
        let Rate::PerSecond(rate) = self.rate else {
            return Ok(());
        };
        if self.balance > 0 {
            self.balance -= i128::from(bytes) * NANO;
            return Ok(());
        }
        let missing = (1 - self.balance) as u128;
        let nanos = missing.checked_div(u128::from(rate)).map(|n| n + 1);
        let wait = nanos.and_then(|n| u64::try_from(n).ok());
        Err(wait.map_or(LONGEST_SLEEP, |n| {
            Duration::from_nanos(n).min(LONGEST_SLEEP)
        }))
    }

    /// Gives back what was taken and not used.
    fn refund(&mut self, bytes: u64) {
        if self.rate != Rate::Unlimited {
            let back = self.balance + i128::from(bytes) * NANO;
            self.balance = back.min(burst(self.rate));
        }
    }

    fn charge(&mut self, bytes: u64, now: Instant) {
        self.refill(now);
        if self.rate != Rate::Unlimited {
            let floor = self.balance.min(-deepest_debt(self.rate));
            self.balance = (self.balance - i128::from(bytes) * NANO).max(floor);
        }
    }

    /// Debt that would take longer to pay at the new rate than demand may run up is forgiven.
    fn set_rate(&mut self, rate: Rate, now: Instant) {
        self.refill(now);
        self.rate = rate;
        self.balance = self.balance.clamp(-deepest_debt(rate), burst(rate));
    }
}

fn worth(rate: u64, time: Duration) -> i128 {
    i128::from(rate).saturating_mul(i128::try_from(time.as_nanos()).unwrap_or(i128::MAX))
}

fn burst(rate: Rate) -> i128 {
    match rate {
        Rate::Unlimited | Rate::PerSecond(0) => 0,
        Rate::PerSecond(rate) => worth(rate, BURST).max(LEAST_BURST * NANO),
    }
}

fn deepest_debt(rate: Rate) -> i128 {
    match rate {
        Rate::Unlimited => 0,
        Rate::PerSecond(rate) => worth(rate, DEEPEST_DEBT),
    }
}

#[derive(Debug)]
struct Level {
    bucket: Mutex<Bucket>,
    /// Held by whoever is next; its waiters are served in the order they came.
    turn: tokio::sync::Mutex<()>,
    /// Wakes the one who holds the turn.
    rate: watch::Sender<Rate>,
    admitted: AtomicU64,
}

impl Level {
    fn new(rate: Rate) -> Arc<Level> {
        Arc::new(Level {
            bucket: Mutex::new(Bucket::new(rate, Instant::now())),
            turn: tokio::sync::Mutex::new(()),
            rate: watch::Sender::new(rate),
            admitted: AtomicU64::new(0),
        })
    }

    // No code that can panic runs under the lock with a half-changed bucket.
    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, bytes: u64) {
        let mut rate = self.rate.subscribe();
        loop {
            // Before asking, so that a change between the asking and the sleep is not missed.
            rate.mark_unchanged();
            let asked = self.bucket().take(bytes, Instant::now());
            let Err(wait) = asked else { return };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // The sender lives in `self`, so this ends only by a change.
                _ = rate.changed() => {}
            }
        }
    }
}

/// A rate under which bytes leave. Clones share the rate.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Its own level first, the host's last.
    levels: Arc<[Arc<Level>]>,
}

impl Pace {
    /// A rate under no other: the host's.
    pub fn new(rate: Rate) -> Pace {
        Pace {
            levels: Arc::new([Level::new(rate)]),
        }
    }

    /// A rate of its own under this one: a migration's under the host's.
    pub fn under(&self, rate: Rate) -> Pace {
        let own = std::iter::once(Level::new(rate));
        Pace {
            levels: own.chain(self.levels.iter().cloned()).collect(),
        }
    }

    /// Changes the rate, for those who wait too.
    pub fn set_rate(&self, rate: Rate) {
        let own = &self.levels[0];
        own.bucket().set_rate(rate, Instant::now());
        own.rate.send_replace(rate);
    }

    /// The rate as it is now, of this level alone.
    pub fn rate(&self) -> Rate {
        self.levels[0].bucket().rate
    }

    /// Bytes acquired and charged on this level since it was made.
    pub fn admitted(&self) -> u64 {
        self.levels[0].admitted.load(Ordering::Relaxed)
    }

    /// Waits until `bytes` may leave, on every level. Cancel-safe: who gives up waiting loses its
    /// place and owes nothing.
    pub async fn acquire(&self, bytes: u64) {
        let mut taken = Taken {
            levels: &self.levels[..0],
            bytes,
        };
        let mut turns = Vec::with_capacity(self.levels.len());
        for (i, level) in self.levels.iter().enumerate() {
            turns.push(level.turn.lock().await);
            level.take(bytes).await;
            taken.levels = &self.levels[..=i];
        }
        taken.levels = &[];
        self.count(bytes);
    }

    /// Charges bytes that leave at once whatever the rate: demand, and everything that must not wait.
    pub fn charge(&self, bytes: u64) {
        let now = Instant::now();
        for level in self.levels.iter() {
            level.bucket().charge(bytes, now);
        }
        self.count(bytes);
    }

    fn count(&self, bytes: u64) {
        for level in self.levels.iter() {
            level.admitted.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// Levels already paid by an [`Pace::acquire`] under way, paid back if it is cancelled.
struct Taken<'a> {
    levels: &'a [Arc<Level>],
    bytes: u64,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for level in self.levels {
            level.bucket().refund(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRAME: u64 = 64 << 10;

    proptest! {
        #[test]
        fn push_never_passes_rate_and_burst_and_one_frame(
            rate in 1_u64..10_000_000_000,
            asks in prop::collection::vec((1_u64..1_200_000, 0_u64..2_000_000_000), 1..200),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(Rate::PerSecond(rate), start);
            let (mut now, mut admitted) = (start, 0_i128);
            for (bytes, pause) in asks {
                now += Duration::from_nanos(pause);
                let bound = worth(rate, now - start) + burst(bucket.rate);
                if bucket.take(bytes, now).is_ok() {
                    prop_assert!(admitted < bound);
                    admitted += i128::from(bytes) * NANO;
                }
            }
        }

        #[test]
        fn a_wait_that_was_told_is_enough_and_not_too_long(
            rate in 1_u64..10_000_000_000,
            bytes in 1_u64..100_000_000,
        ) {
            let mut now = Instant::now();
            let mut bucket = Bucket::new(Rate::PerSecond(rate), now);
            while bucket.take(bytes, now).is_ok() {}
            let wait = bucket.take(1, now).unwrap_err();
            if wait < LONGEST_SLEEP {
                let slack = Duration::from_nanos(2);
                if let Some(early) = wait.checked_sub(slack) {
                    let mut copy = Bucket { ..bucket };
                    prop_assert!(copy.take(1, now + early).is_err());
                }
                now += wait;
                prop_assert_eq!(bucket.take(1, now), Ok(()));
            }
        }

        #[test]
        fn demand_never_holds_push_up_longer_than_the_deepest_debt(
            rate in 1_u64..10_000_000_000,
            charges in prop::collection::vec(1_u64..1_000_000_000_000, 1..20),
        ) {
            let now = Instant::now();
            let mut bucket = Bucket::new(Rate::PerSecond(rate), now);
            for bytes in charges {
                bucket.charge(bytes, now);
            }
            let later = now + DEEPEST_DEBT + Duration::from_nanos(2);
            prop_assert_eq!(bucket.take(1, later), Ok(()));
        }

        #[test]
        fn any_change_of_rate_leaves_a_bucket_within_its_bounds(
            steps in prop::collection::vec((prop::option::of(0_u64..=u64::MAX), 0_u64..=u64::MAX, 0_u64..1_000_000), 1..50),
        ) {
            let mut now = Instant::now();
            let mut bucket = Bucket::new(Rate::Unlimited, now);
            for (rate, bytes, pause) in steps {
                let rate = rate.map_or(Rate::Unlimited, Rate::PerSecond);
                bucket.set_rate(rate, now);
                prop_assert!(bucket.balance >= -deepest_debt(rate) && bucket.balance <= burst(rate));
                bucket.charge(bytes, now);
                let _ = bucket.take(bytes, now);
                now += Duration::from_micros(pause);
            }
        }
    }

    async fn push_for(pace: Pace, time: Duration) -> u64 {
        let mut bytes = 0;
        let _ = tokio::time::timeout(time, async {
            loop {
                pace.acquire(FRAME).await;
                bytes += FRAME;
            }
        })
        .await;
        bytes
    }

    fn assert_near(bytes: u64, expected: u64) {
        let (low, high) = (expected * 97 / 100, expected * 103 / 100 + 2 * FRAME);
        assert!((low..=high).contains(&bytes), "{bytes} for {expected}");
    }

    #[tokio::test(start_paused = true)]
    async fn push_goes_at_the_rate() {
        for rate in [1_250_000, 12_500_000, 1_250_000_000] {
            let pace = Pace::new(Rate::PerSecond(rate));
            let bytes = push_for(pace.clone(), Duration::from_secs(10)).await;
            assert_near(bytes, rate * 10);
            assert_eq!(pace.admitted(), bytes);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_rate_reaches_those_who_wait() {
        let pace = Pace::new(Rate::PerSecond(0));
        let pushing = tokio::spawn(push_for(pace.clone(), Duration::from_secs(20)));
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(pace.admitted(), 0);
        pace.set_rate(Rate::PerSecond(10_000_000));
        assert_near(pushing.await.unwrap(), 100_000_000);
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_debt_does_not_hold_up_a_new_rate() {
        let pace = Pace::new(Rate::PerSecond(1_000_000_000));
        pace.charge(2_000_000_000);
        pace.set_rate(Rate::PerSecond(1_000_000));
        let began = Instant::now();
        pace.acquire(FRAME).await;
        assert!(began.elapsed() <= DEEPEST_DEBT + Duration::from_millis(2));
    }

    #[tokio::test(start_paused = true)]
    async fn migrations_share_the_hosts_rate_and_keep_their_own() {
        let host = Pace::new(Rate::PerSecond(10_000_000));
        let capped = host.under(Rate::PerSecond(2_000_000));
        let (one, two) = (host.under(Rate::Unlimited), host.under(Rate::Unlimited));
        let time = Duration::from_secs(10);
        let (capped, one, two) = tokio::join!(
            push_for(capped, time),
            push_for(one, time),
            push_for(two, time)
        );
        assert_near(capped, 20_000_000);
        assert_near(capped + one + two, 100_000_000);
        // The first to ask finds nobody waiting and has the burst to itself; from then on they take turns.
        let first_burst = 10_000_000 / 50 + FRAME;
        assert!(one.abs_diff(two) <= first_burst + FRAME, "{one} and {two}");
    }

    #[tokio::test(start_paused = true)]
    async fn demand_does_not_wait_and_push_pays() {
        let host = Pace::new(Rate::PerSecond(1_000_000));
        let migration = host.under(Rate::Unlimited);
        let began = Instant::now();
        migration.charge(500_000);
        assert_eq!(began.elapsed(), Duration::ZERO);
        migration.acquire(1).await;
        let waited = began.elapsed();
        assert!(waited >= Duration::from_millis(430), "{waited:?}");
        assert_eq!(host.admitted(), 500_001);
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_waiting_owes_nothing() {
        let host = Pace::new(Rate::PerSecond(0));
        let migration = host.under(Rate::PerSecond(1_000_000));
        let before = migration.levels[0].bucket().balance;
        let waiting = migration.acquire(1 << 20);
        assert!(
            tokio::time::timeout(Duration::from_secs(5), waiting)
                .await
                .is_err()
        );
        assert_eq!(migration.levels[0].bucket().balance, before);
        assert_eq!(migration.admitted(), 0);
        host.set_rate(Rate::Unlimited);
        migration.acquire(1).await;
    }
}
