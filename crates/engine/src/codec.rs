//! Which codec delivers most: none, or zstd at one of a few levels.
//!
//! # The idea
//! A batch of content takes a sender's time, to read, pack and hand over, and the link's. The two overlap,
//! so a byte of content takes as long as the slower of them:
//!
//! ```text
//!   time(codec) = max( read + pack(codec) + share(codec) * handing,     the sender
//!                      share(codec) / link )                            the link
//! ```
//!
//! `share` is how much of the content is left to send. Everything on the right is measured as batches go by;
//! what is known of one level scales what is usual for those that were not tried. The
//! codec of the least time is used, with a small price on the sender's time: of two that are as good, the one
//! that leaves more of the CPU to guests.
//!
//! Content that a sample tells to be dense goes as it is by any codec. Where it takes turns with content that packs
//! more quickly than the pace forgets what was not used, both share the link's time, and it counts on both sides.
//!
//! # What is measured, and how
//! - `pack` and `share` from each batch that is packed. But content differs from batch to batch, and machines
//!   from minute to minute, so what one level costs and gains more than another is taken only from batches
//!   packed with both: a *probe*, two batches a second, at one level after the other, but those
//!   beyond hope: the best one need not be next to the one in use. While nothing is packed, probes tell
//!   whether it would be worth it.
//! - `handing` from each batch; but what waits in the kernel makes it as long as the link takes, and taken for the
//!   sender's own, that would speak for no codec in particular: then it counts for little more than its least.
//! - `link`: see `codec/link.rs`.
//!
//! # Traps
//! Decisions hold for a quarter of a second, unless the link turns out to be another, and change only for a gain:
//! costs are measured on busy machines and differ by a third from one batch to the next. While the pace is still
//! growing they hold for one batch only: what is right for a tenth of the link is much too slow for all of it, and
//! a pace that is not used does not grow. Batches that are told to be dense by a sample
//! teach nothing about levels: half a disk of films must not make the other half go unpacked.

use std::time::Duration;

mod link;

use link::Link;
pub use link::{Allowed, Phase};

/// Levels of zstd that are tried, from the quickest to the smallest.
pub const LEVELS: [i32; 6] = [-5, -1, 1, 3, 6, 9];

/// What is usual of each, for content such as programs and page caches: nanoseconds a byte, and the size
/// that is left, level 1 being 1.
const USUAL: [(f64, f64); 6] = [
    (1.2, 1.30),
    (1.8, 1.12),
    (2.3, 1.0),
    (4.5, 0.94),
    (12.0, 0.89),
    (20.0, 0.87),
];

/// Demands are packed with these at most: whoever waits, waits for the packing too.
const QUICK: usize = 3;

/// What is thought to be left of content before any was packed, at level 1.
const FIRST_SHARE: f64 = 0.5;

/// How much one batch moves an average, and how much one probe what a level is thought to gain.
const WEIGHT: f64 = 0.15;
const PROBE_WEIGHT: f64 = 0.4;

/// A codec stays in use so long at least, in microseconds, and gives way only to one so much better.
const HOLD: u64 = 250_000;
const BETTER: f64 = 0.98;

/// The price of the sender's time besides the time it takes.
const PRICE: f64 = 0.05;

/// The pace lets go later what was not used for so long, in seconds: content that packs and such that does not
/// share the link's time if they take turns so quickly. And at least so many bytes.
const EVENED_FOR: f64 = 0.02;
const EVENED: f64 = 256e3;

/// Between two probes, in microseconds.
const PROBE: u64 = 500_000;

/// A probe that met dense content is tried again so soon.
const AGAIN: u64 = 60_000;

/// A level that would take so many times as long as the codec in use is not probed.
const HOPELESS: f64 = 3.0;

/// A batch that waited for less than this share of its time was not held up by the link.
const WAITED: f64 = 0.05;

/// While the kernel is behind, handing over takes no more of the sender's own time than so many times the least of
/// late, which is forgotten by this factor with each batch.
const HANDING: f64 = 1.25;
const FORGOTTEN: f64 = 1.0005;

/// So long after a change of codec what is known of the kernel may be of the codec before, in microseconds.
const NEWS: u64 = 100_000;

/// Packing that leaves more than this of a demand is not worth the wait.
const DEMAND_GAIN: f64 = 0.9;

/// Levels that may be asked for. Higher ones need much memory, for little.
pub const ASKABLE: std::ops::RangeInclusive<i32> = -7..=19;

/// The level of who asks for zstd and no more.
const DEFAULT_LEVEL: i32 = 3;

/// What the operator wants: `auto`, `none`, `zstd` or `zstd:LEVEL`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Policy {
    /// What delivers most.
    #[default]
    Auto,
    /// Content goes as it is.
    Plain,
    /// Zstd at this level whatever it brings, except for content that does not pack at all.
    Level(i32),
}

/// What is no [`Policy`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("`{0}` is none of auto, none, zstd and zstd:LEVEL")]
    Unknown(String),
    #[error("zstd has no level `{0}` here; levels go from {first} to {last}", first = ASKABLE.start(), last = ASKABLE.end())]
    Level(String),
}

impl std::str::FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Policy, PolicyError> {
        match (text, text.strip_prefix("zstd:")) {
            ("auto", _) => Ok(Policy::Auto),
            ("none", _) => Ok(Policy::Plain),
            ("zstd", _) => Ok(Policy::Level(DEFAULT_LEVEL)),
            (_, Some(level)) => {
                let known = level.parse().ok().filter(|level| ASKABLE.contains(level));
                known
                    .map(Policy::Level)
                    .ok_or_else(|| PolicyError::Level(level.to_string()))
            }
            _ => Err(PolicyError::Unknown(text.to_string())),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Policy::Auto => f.write_str("auto"),
            Policy::Plain => f.write_str("none"),
            Policy::Level(level) => write!(f, "zstd:{level}"),
        }
    }
}

impl TryFrom<String> for Policy {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Policy, PolicyError> {
        text.parse()
    }
}

impl From<Policy> for String {
    fn from(policy: Policy) -> String {
        policy.to_string()
    }
}

/// How a batch is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    Plain,
    /// At this level.
    Zstd(i32),
}

/// What to do with the next batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub codec: Codec,
    /// Also pack it at this level, and say what came out: see [`Chooser::probed`].
    pub probe: Option<i32>,
}

/// What packing came to.
#[derive(Clone, Copy, Debug)]
pub struct Packed {
    pub level: i32,
    /// Bytes before, and after; the same if it was not worth it.
    pub content: u64,
    pub left: u64,
    pub took: Duration,
}

/// What a batch of push took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Took {
    /// Bytes of content.
    pub content: u64,
    /// Bytes of its frames.
    pub wire: u64,
    pub read: Duration,
    pub pack: Duration,
    /// Waiting for the pace to allow it.
    pub turn: Duration,
    /// Handing it to the kernel.
    pub handing: Duration,
}

/// Picks codecs for one flow of content. Times are microseconds that never go back.
#[derive(Clone, Debug)]
pub struct Chooser {
    policy: Policy,
    /// An index of [`LEVELS`], or none.
    current: Option<usize>,
    decided: Option<u64>,
    /// When another codec was taken last.
    changed: u64,
    /// When a batch was last asked for.
    now: u64,
    probed: u64,
    /// An index of [`LEVELS`].
    last_probe: usize,
    /// Seconds a byte where `slowness` is 1.
    cost: [f64; LEVELS.len()],
    /// How much dearer everything is here and now.
    slowness: f64,
    /// Sizes, level 1 being 1.
    size: [f64; LEVELS.len()],
    /// What level 1 leaves of content.
    share: f64,
    /// How much of the content lately was dense, and how much when something came that was not.
    dense: f64,
    beside: f64,
    /// Bytes over which that is averaged.
    evened: f64,
    /// What was left of content lately, all batches counted.
    left: f64,
    /// Seconds a byte of content, and a byte of frames.
    read: f64,
    handing: f64,
    /// The least of late.
    least_handing: f64,
    link: Link,
}

fn average(old: f64, new: f64) -> f64 {
    old + WEIGHT * (new - old)
}

fn place(level: i32) -> Option<usize> {
    LEVELS.iter().position(|&l| l == level)
}

impl Chooser {
    pub fn new(policy: Policy) -> Chooser {
        Chooser {
            policy,
            current: None,
            decided: None,
            changed: 0,
            now: 0,
            probed: 0,
            last_probe: 0,
            cost: USUAL.map(|(nanos, _)| nanos * 1e-9),
            slowness: 1.0,
            size: USUAL.map(|(_, size)| size),
            share: FIRST_SHARE,
            dense: 0.0,
            beside: 0.0,
            evened: EVENED,
            left: 1.0,
            read: 0.0,
            handing: 0.0,
            least_handing: f64::MAX,
            link: Link::new(),
        }
    }

    /// The next batch of push.
    pub fn next(&mut self, now: u64, allowed: Allowed) -> Choice {
        let level = match self.policy {
            Policy::Plain => None,
            Policy::Level(level) => Some(level),
            Policy::Auto => return self.best(now, allowed),
        };
        Choice {
            codec: level.map_or(Codec::Plain, Codec::Zstd),
            probe: None,
        }
    }

    fn best(&mut self, now: u64, allowed: Allowed) -> Choice {
        self.now = now;
        let is_news = self.link.look(now, allowed);
        // What is right for the pace changes with it.
        let is_growing = self.link.is_growing(now, allowed);
        let held = self.decided.map(|at| now.saturating_sub(at));
        if is_news || is_growing || held.is_none_or(|held| held >= HOLD) {
            self.decided = Some(now);
            let link = self.link.usable(allowed);
            self.evened = EVENED_FOR * link;
            let time = |c: Option<usize>| self.time(c, link);
            let codecs = std::iter::once(None).chain((0..LEVELS.len()).map(Some));
            let best = codecs.min_by(|a, b| time(*a).total_cmp(&time(*b)));
            let enough = if is_growing || held.is_none() {
                1.0
            } else {
                BETTER
            };
            let better = best.filter(|best| time(*best) < enough * time(self.current));
            if better.is_some_and(|better| better != self.current) {
                self.changed = now;
            }
            self.current = better.unwrap_or(self.current);
        }
        let link = self.link.usable(allowed);
        let mut probe = None;
        if now.saturating_sub(self.probed) >= PROBE {
            self.probed = now;
            probe = self.next_probe(link);
        }
        Choice {
            codec: self
                .current
                .map_or(Codec::Plain, |c| Codec::Zstd(LEVELS[c])),
            probe: probe.map(|c| LEVELS[c]),
        }
    }

    /// What to probe: all levels in turn, but those beyond hope. If all are, the quickest: hope comes back.
    fn next_probe(&mut self, link: f64) -> Option<usize> {
        let hopeless = HOPELESS * self.time(self.current, link);
        let after = (1..=LEVELS.len()).map(|n| (self.last_probe + n) % LEVELS.len());
        let worth = |&c: &usize| Some(c) != self.current && self.time(Some(c), link) < hopeless;
        let found = after.clone().find(worth);
        let chosen = found.or_else(|| self.current.is_none().then_some(0));
        self.last_probe = chosen.unwrap_or(self.last_probe);
        chosen
    }

    fn cost(&self, codec: Option<usize>) -> f64 {
        codec.map_or(0.0, |c| self.cost[c] * self.slowness)
    }

    fn share(&self, codec: Option<usize>) -> f64 {
        codec.map_or(1.0, |c| (self.share * self.size[c]).min(1.0))
    }

    /// Seconds a byte of content takes, and what else speaks against it.
    fn time(&self, codec: Option<usize>, link: f64) -> f64 {
        let packs = 1.0 - self.beside;
        let cost = packs * self.cost(codec);
        let share = self.beside + packs * self.share(codec);
        let sender = self.read + cost + share * self.handing;
        sender.max(share / link) + PRICE * cost
    }

    /// For units that somebody waits for: packing and sending follow each other.
    pub fn for_demand(&self, allowed: Allowed) -> Codec {
        match self.policy {
            Policy::Plain => Codec::Plain,
            Policy::Level(level) => Codec::Zstd(level.min(LEVELS[QUICK - 1])),
            Policy::Auto => {
                let link = self.link.at_most(allowed.rate as f64);
                let wait = |c: usize| self.cost(Some(c)) + self.share(Some(c)) / link;
                let quick = (0..QUICK).min_by(|a, b| wait(*a).total_cmp(&wait(*b)));
                let worth = quick.filter(|&c| wait(c) < DEMAND_GAIN / link);
                worth.map_or(Codec::Plain, |c| Codec::Zstd(LEVELS[c]))
            }
        }
    }

    /// Content was packed.
    pub fn packed(&mut self, packed: Packed) {
        let Some(c) = place(packed.level).filter(|_| packed.content > 0) else {
            return;
        };
        let cost = packed.took.as_secs_f64() / packed.content as f64;
        // While nothing is packed but probes there are few of them.
        let weight = match self.current {
            Some(_) => WEIGHT,
            None => PROBE_WEIGHT,
        };
        // Who was not given the CPU for a while learns little about levels by that.
        let slowness = (cost / self.cost[c]).clamp(0.02, 50.0);
        self.slowness += weight * (slowness - self.slowness);
        let share = (packed.left as f64 / packed.content as f64).min(1.0) / self.size[c];
        self.share += weight * (share - self.share);
        self.beside = average(self.beside, self.dense);
        self.mixed(packed.content as f64, 0.0);
    }

    /// Content was not packed because a sample of it was dense.
    pub fn dense(&mut self, content: u64) {
        if content > 0 && self.probed == self.now {
            self.probed = self.now.saturating_sub(PROBE - AGAIN);
        }
        self.mixed(content as f64, 1.0);
    }

    fn mixed(&mut self, content: f64, dense: f64) {
        let weight = content / (content + EVENED.max(self.evened));
        self.dense += weight * (dense - self.dense);
    }

    /// The same content was packed at two levels, the second for comparison only.
    pub fn probed(&mut self, used: Packed, other: Packed) {
        let (Some(a), Some(b)) = (place(used.level), place(other.level)) else {
            return;
        };
        if used.left == 0 || used.took.is_zero() {
            return;
        }
        // A single odd batch must not make a level seem free, or useless for ever.
        let size = (other.left as f64 / used.left as f64).clamp(0.3, 3.0);
        let cost = (other.took.as_secs_f64() / used.took.as_secs_f64()).clamp(0.1, 10.0);
        self.size[b] += PROBE_WEIGHT * (self.size[a] * size - self.size[b]);
        self.cost[b] += PROBE_WEIGHT * (self.cost[a] * cost - self.cost[b]);
        self.size[b] = self.size[b].clamp(0.2, 5.0);
        let usual = USUAL[b].0 * 1e-9;
        self.cost[b] = self.cost[b].clamp(usual / 5.0, usual * 5.0);
    }

    /// A batch of push has been handed to the kernel.
    pub fn sent(&mut self, took: Took, allowed: Allowed) {
        if took.content == 0 || took.wire == 0 {
            return;
        }
        let (content, wire) = (took.content as f64, took.wire as f64);
        let handing = took.handing.as_secs_f64();
        self.least_handing = (self.least_handing * FORGOTTEN).min(handing / wire);
        let own = match allowed.is_behind {
            true => handing.min(HANDING * self.least_handing * wire),
            false => handing,
        };
        self.read = average(self.read, took.read.as_secs_f64() / content);
        self.handing = average(self.handing, own / wire);
        self.left = average(self.left, (wire / content).min(1.0));
        let is_news = self.now.saturating_sub(self.changed) >= NEWS;
        let behind = if is_news { handing - own } else { 0.0 };
        let waited = took.turn.as_secs_f64() + behind;
        let seconds = (took.read + took.pack + took.turn + took.handing).as_secs_f64();
        let is_full = waited >= WAITED * seconds;
        if (self.link).sent(wire, seconds, is_full, self.now, allowed) {
            self.decided = None;
        }
    }

    /// How long packing so many bytes will take, about.
    pub fn will_take(&self, codec: Codec, bytes: u64) -> Duration {
        let cost = match codec {
            Codec::Plain => 0.0,
            // Of a level that is not watched little is known: as much as the dearest that is.
            Codec::Zstd(level) => self.cost(Some(place(level).unwrap_or(LEVELS.len() - 1))),
        };
        Duration::from_secs_f64((cost * bytes as f64).clamp(0.0, 3600.0))
    }

    /// What is left of content on the link lately: 1 is all of it.
    pub fn left(&self) -> f64 {
        self.left
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;

#[cfg(test)]
mod moves;
