//! What the link carries, as far as it can be known to who packs for it.
//!
//! Three things are known: what push may send ([`Allowed`]), how long each batch waited for that or for the kernel,
//! and whether what is allowed has met the link.
//!
//! - While what is allowed grows it is no measure of the link, and it grows only as long as it is used. So it
//!   counts several times: a codec that could just use it would stop it there, far below the link.
//! - The link is full between the ends of two batches in a row that both waited, and only then what went over it
//!   is what it carries. What sends half of the time and waits half of the time says the same as what waits always.
//! - If nothing waits, the link carries at least what it did. It may have become faster, which only a quicker
//!   codec can show, and that is the worse one if it has not. So this is tried seldom, and after each time that it
//!   was wrong half as often.
//!
//! Traps. When push holds back on purpose, what it waits for is not the link. And what is known of the kernel is
//! known at pings: shortly after a change of codec it is of the codec before.

/// The link is measured over so much time in which it was full, in seconds.
const WINDOW: f64 = 0.05;

/// While the pace grows, what is chosen could use so many times as much.
const HEADROOM: f64 = 3.0;

/// A pace that has not grown for so long, in microseconds, has stopped to.
const STOPPED: u64 = 150_000;

/// After so long without being full, in microseconds, the link is thought to carry all that is allowed; after each
/// time that this was wrong twice as long, up to the second.
const PATIENCE: u64 = 2_000_000;
const LONGEST: u64 = 60_000_000;

/// What is measured is another rate if it differs by more than this share.
const SAME: f64 = 0.1;

/// What push may send at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Bytes a second.
    pub rate: u64,
    pub phase: Phase,
    /// What was handed over waits in the kernel: most of what handing takes is the link's time.
    pub is_behind: bool,
}

/// What a rate that is allowed says about the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The link was not met yet: the rate grows as long as it is used.
    Growing,
    /// About what the link carries.
    Met,
    /// Push goes slower than the rate for a moment, on purpose.
    Held,
}

impl Allowed {
    /// By a link that is known.
    pub fn met(rate: u64) -> Allowed {
        Allowed {
            rate,
            phase: Phase::Met,
            is_behind: false,
        }
    }
}

/// What is thought of the link. Times are microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Bytes a second; if nothing is known, all that is allowed.
    pub(super) carries: Option<f64>,
    /// What went while it was full: bytes and seconds.
    wire: f64,
    seconds: f64,
    /// Bytes of the batch before, if it waited.
    before: Option<f64>,
    /// When it was last full, or last thought to be faster.
    since: u64,
    patience: u64,
    /// It is thought faster than it was when it was last full: so fast.
    was: Option<f64>,
    /// The most that was allowed while that grew, and when it became that.
    grown: (u64, u64),
}

impl Link {
    pub(super) fn new() -> Link {
        Link {
            carries: None,
            wire: 0.0,
            seconds: 0.0,
            before: None,
            since: 0,
            patience: PATIENCE,
            was: None,
            grown: (0, 0),
        }
    }

    /// To be asked before each batch: whether another rate is thought of from now on.
    pub(super) fn look(&mut self, now: u64, allowed: Allowed) -> bool {
        let rate = allowed.rate as f64;
        match allowed.phase {
            Phase::Growing if allowed.rate > self.grown.0 => {
                self.grown = (allowed.rate, now);
                self.since = now;
                self.carries.take().is_some()
            }
            // Who grew until it met the link knows best.
            Phase::Met if self.grown.0 > 0 => {
                self.grown = (0, 0);
                self.since = now;
                self.carries = Some(rate);
                true
            }
            _ if now.saturating_sub(self.since) >= self.patience => {
                self.since = now;
                let was = self.carries.take().filter(|&carries| carries < rate);
                self.was = self.was.or(was);
                was.is_some()
            }
            _ => false,
        }
    }

    /// A batch of so many bytes took so many seconds. Whether the link turned out another than was thought.
    pub(super) fn sent(
        &mut self,
        wire: f64,
        seconds: f64,
        waited: bool,
        now: u64,
        allowed: Allowed,
    ) -> bool {
        let before = std::mem::replace(&mut self.before, waited.then_some(wire));
        if self.is_growing(now, allowed) || allowed.phase == Phase::Held {
            (self.wire, self.seconds, self.before) = (0.0, 0.0, None);
            return false;
        }
        let Some(before) = before.filter(|_| waited) else {
            return false;
        };
        self.since = now;
        self.wire += before;
        self.seconds += seconds;
        if self.seconds < WINDOW {
            return false;
        }
        let carried = self.wire / self.seconds;
        (self.wire, self.seconds) = (0.0, 0.0);
        let thought = self.at_most(allowed.rate as f64);
        match self.was.take() {
            Some(was) if carried < (1.0 + SAME) * was => {
                self.patience = (2 * self.patience).min(LONGEST);
            }
            Some(_) => self.patience = PATIENCE,
            None => {}
        }
        self.carries = Some(carried);
        (carried - thought).abs() > SAME * thought
    }

    /// What is allowed still grows.
    pub(super) fn is_growing(&self, now: u64, allowed: Allowed) -> bool {
        allowed.phase == Phase::Growing && now.saturating_sub(self.grown.1) < STOPPED
    }

    /// Bytes a second, of so many that are allowed.
    pub(super) fn at_most(&self, rate: f64) -> f64 {
        let carries = self.carries.map_or(rate, |carries| carries.min(rate));
        carries.max(1.0)
    }

    /// Bytes a second that a codec should be able to use.
    pub(super) fn usable(&self, allowed: Allowed) -> f64 {
        let rate = allowed.rate as f64;
        match allowed.phase {
            Phase::Growing => self.at_most(HEADROOM * rate),
            Phase::Met | Phase::Held => self.at_most(rate),
        }
    }
}
