//! The improved estimator: how likely a region is touched again, as learned from what this very space did so far.
//!
//! # The idea
//! Insurers do not guess how long somebody lives: they look up what became of people with the same past. So does this.
//! Each region has a *past*: when it was last touched, in how many of the latest 32 windows, whether at even
//! intervals, what was touched beside it, whether the other kind of access was seen. At the end of each
//! window every remembered region is one more case for the table: with the past it had, it was touched in this window
//! or it was not. The score of a region is then a probability: the share of cases with its past that were touched.
//!
//! What sliding windows assume is learned instead, for each disk: whether a single touch is a burst (a scan: never
//! again) or the first of many (a log), how soon interest fades, whether what is read is about to be written. A past
//! with few cases leans on a coarser one (age and count alone), and that on a rule of thumb.
//!
//! # Horizons
//! A migration does not ask about the next window alone. It asks which regions will be written from now until the
//! switch (hold those), and which will be read once it has switched (send those). So there is a table for each of a
//! few times to come, all learned from the same masks once it is known how they ended. In the second question what
//! is likely to be written until then is taken off: it would have been sent in vain.
//!
//! # Streams
//! A run of regions touched in one window is the front of a stream: what lies ahead of it, as far as twice the run's
//! length, is more likely to be next, and how much more is learned by the run's length and the distance over it.
//! That holds for regions with a past (a journal that is written round and round) and for those never touched.
//!
//! # Traps
//! A window that is under way counts for a region that was touched in it, and is ignored for one that was not (yet):
//! otherwise everything would look older by a window just after a window's end. Cases fade (`FADE`), or a disk that
//! changed its ways would be judged by its youth for ever.
//!
//! The first access or question of a window pays for learning from the one before: some tens of milliseconds with all of
//! 65,536 regions. It is to be told from the access log's ring, not in the guest's way.

use super::tracked::{Dated, Tracked};
use super::{Access, Estimator, Ranked, Span, Touch, rank};

/// Regions ahead of a run that may be predicted, at most: 64 MiB.
const REACH: u64 = 1024;

/// What a case is worth a window later.
const FADE: f32 = 0.97;

/// Cases of a coarser past that a finer one is mixed with.
const LEAN: f32 = 6.0;

/// How much less likely a touch is thought, by the rule of thumb, where there were only those of the other kind.
const STRANGE: f32 = 0.1;

/// How likely a touch ahead of a run is thought before there are cases.
const UNHEARD: f32 = 0.02;

/// Windows after which a region without a touch is forgotten.
const MEMORY: u64 = 48;
const KEPT: u64 = (1 << MEMORY) - 1;

/// A probability below which a region belongs to no working set: reads, writes.
const MEMBER: [f32; 2] = [0.05, 0.01];

/// Kinds of past: ages, counts, and of the finer ones neighbours, evenness, the other kind.
const AGES: usize = 7;
const COUNTS: usize = 6;
const FINER: usize = NEAR * 2 * 2;
const NEAR: usize = 5;
const RUNS: usize = 5;
const DISTANCES: usize = 5;

/// Cases, and those of them that were touched.
#[derive(Clone, Copy, Debug, Default)]
struct Cases {
    all: f32,
    touched: f32,
}

impl Cases {
    fn add(&mut self, touched: bool) {
        self.all += 1.0;
        self.touched += f32::from(touched);
    }

    /// The share that was touched, mixed with `LEAN` cases of a share taken from elsewhere.
    fn share(&self, elsewhere: f32) -> f32 {
        (self.touched + LEAN * elsewhere) / (self.all + LEAN)
    }
}

/// A time to come, in windows. It begins with the next window, or after as many windows as it is long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Horizon {
    after: u32,
    long: u32,
}

/// What tables are kept for: soon, and after a while. A question gets the answer of the shortest that reaches as far.
const HORIZONS: [Horizon; 8] = [
    Horizon { after: 0, long: 1 },
    Horizon { after: 0, long: 2 },
    Horizon { after: 0, long: 4 },
    Horizon { after: 0, long: 8 },
    Horizon { after: 1, long: 1 },
    Horizon { after: 2, long: 2 },
    Horizon { after: 4, long: 4 },
    Horizon { after: 8, long: 8 },
];

impl Horizon {
    /// The windows that go by until it is known what became of a case.
    fn known_after(self) -> u32 {
        self.after + self.long
    }

    /// Whether a region was touched in it, now that it is known.
    fn touched(self, mask: u64) -> bool {
        mask & ((1 << self.long) - 1) != 0
    }

    /// The index of the one to be asked.
    fn asked(now_ms: u64, span: Span, window_ms: u64) -> usize {
        let after = span.from_ms.saturating_sub(now_ms);
        let long = span.until_ms.saturating_sub(now_ms);
        let is_soon = after < window_ms / 2;
        let reaches = |h: &Horizon| match is_soon {
            true => h.after == 0 && u64::from(h.long) * window_ms >= long,
            false => h.after > 0 && u64::from(h.after) * window_ms >= after,
        };
        let farthest = if is_soon { 3 } else { 7 };
        HORIZONS.iter().position(reaches).unwrap_or(farthest)
    }
}

/// What became of regions, by their past, for one kind of touch and one horizon.
#[derive(Clone, Debug)]
struct Table {
    fine: Vec<Cases>,
    coarse: Vec<Cases>,
    ahead: Vec<Cases>,
}

impl Table {
    fn new() -> Self {
        Table {
            fine: vec![Cases::default(); 2 * AGES * COUNTS * FINER],
            coarse: vec![Cases::default(); 2 * AGES * COUNTS],
            ahead: vec![Cases::default(); RUNS * DISTANCES],
        }
    }

    fn fade(&mut self) {
        for cases in self
            .fine
            .iter_mut()
            .chain(&mut self.coarse)
            .chain(&mut self.ahead)
        {
            cases.all *= FADE;
            cases.touched *= FADE;
        }
    }

    fn learn(&mut self, past: &Past, touched: bool) {
        self.coarse[past.coarse].add(touched);
        self.fine[past.fine()].add(touched);
    }

    fn probability(&self, past: &Past) -> f32 {
        let coarse = self.coarse[past.coarse].share(past.thumb);
        self.fine[past.fine()].share(coarse)
    }
}

/// What is known of a region, in short.
struct Past {
    coarse: usize,
    finer: usize,
    /// The rule of thumb: as often as it was touched of late, less the longer it was not.
    thumb: f32,
}

impl Past {
    /// `mask`: bit n is a touch n windows ago. `near`: where it lies, see [`Surroundings`]. `other`: the other kind
    /// of touch, as a mask too. Not both masks are 0: a region never touched so, but in the other way, has the past
    /// of that, in classes of its own.
    fn of(mask: u32, near: usize, other: u32) -> Past {
        if mask == 0 {
            let stranger = Past::of(other, near, 0);
            return Past {
                coarse: stranger.coarse + AGES * COUNTS,
                thumb: stranger.thumb * STRANGE,
                ..stranger
            };
        }
        let age = mask.trailing_zeros();
        let count = mask.count_ones();
        let ages = match age {
            0..=2 => age as usize,
            3..=4 => 3,
            5..=8 => 4,
            9..=16 => 5,
            _ => 6,
        };
        let counts = match count {
            1..=2 => count as usize - 1,
            3..=4 => 2,
            5..=8 => 3,
            9..=16 => 4,
            _ => 5,
        };
        // Whether the gap before the latest touch was as long as the one that ends in the window to come; where
        // windows are cut makes a difference of one.
        let before = mask >> age >> 1;
        let even = before != 0 && before.trailing_zeros().abs_diff(age) <= (age / 4).max(1);
        Past {
            coarse: ages * COUNTS + counts,
            finer: (near.min(NEAR - 1) * 2 + usize::from(even)) * 2
                + usize::from(other & 0b11 != 0),
            thumb: count as f32 / (count as f32 + 2.0) / (age + 1) as f32,
        }
    }

    fn fine(&self) -> usize {
        self.coarse * FINER + self.finer
    }
}

/// When a region was touched: reads, writes.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Bit n: n windows before the current one. Pasts look at 32, the farthest horizon needs 16 more.
    masks: [u64; 2],
    window: u64,
}

impl Dated for Seen {
    fn last(&self) -> u64 {
        self.window
    }
}

#[derive(Clone, Debug)]
pub struct LifeTable {
    regions: Tracked<Seen>,
    /// Of reads and of writes, each by horizon.
    tables: [Vec<Table>; 2],
    window_ms: u64,
    /// The number of the window under way; all masks are as of it.
    window: u64,
    now_ms: u64,
}

impl LifeTable {
    /// `window_ms` is at least 1; remembers at most `most` regions.
    pub fn new(window_ms: u64, most: usize) -> Self {
        LifeTable {
            regions: Tracked::new(most),
            tables: Touch::BOTH.map(|_| HORIZONS.iter().map(|_| Table::new()).collect()),
            window_ms: window_ms.max(1),
            window: 0,
            now_ms: 0,
        }
    }

    /// Time is `now_ms`: learns from each window that ended, of at most [`MEMORY`].
    fn turn(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
        let current = self.now_ms / self.window_ms;
        if current - self.window > MEMORY {
            self.window = current - MEMORY;
        }
        while self.window < current {
            self.learn();
            self.window += 1;
            for (_, seen) in self.regions.iter_mut() {
                seen.masks = seen.masks.map(|mask| mask << 1 & KEPT);
            }
            self.regions.retain(|seen| seen.masks != [0, 0]);
        }
    }

    /// The window under way is over.
    fn learn(&mut self) {
        for touch in Touch::BOTH {
            let all = self.masks(touch);
            for (horizon, table) in HORIZONS.iter().zip(&mut self.tables[touch as usize]) {
                let ago = horizon.known_after();
                table.fade();
                let around = Surroundings::of(&all, ago);
                for (&(_, mask, other), &near) in all.iter().zip(&around.near) {
                    let (past, others) = ((mask >> ago) as u32, (other >> ago) as u32);
                    if past | others != 0 {
                        table.learn(&Past::of(past, near, others), horizon.touched(mask));
                    }
                }
                for ahead in around.ahead {
                    let touched = horizon.touched(mask_of(&all, ahead.region));
                    table.ahead[ahead.class].add(touched);
                }
            }
        }
    }

    /// Each region with its mask of this kind and that of the other, in order.
    fn masks(&self, touch: Touch) -> Vec<Row> {
        let of = |seen: &Seen| {
            (
                seen.masks[touch as usize],
                seen.masks[touch.other() as usize],
            )
        };
        self.regions
            .iter()
            .map(|(region, seen)| (region, of(seen).0, of(seen).1))
            .collect()
    }
}

/// A region as it was touched: the mask of the kind asked for, and of the other.
type Row = (u64, u64, u64);

/// A region without a past, ahead of a run.
struct Ahead {
    region: u64,
    class: usize,
}

/// Where regions lie beside what was touched in one window.
struct Surroundings {
    /// For each row: 0 nowhere, 1 and 2 ahead of a run (by more than its length, by less), 3 and 4 with one and two
    /// neighbours touched.
    near: Vec<usize>,
    ahead: Vec<Ahead>,
}

impl Surroundings {
    /// As they were `ago` windows ago. A run reaches as far ahead as twice its length, but not into the next.
    fn of(all: &[Row], ago: u32) -> Surroundings {
        let touched = |at: usize| all[at].1 >> ago & 1 != 0;
        let mut near = vec![0; all.len()];
        let mut ahead = Vec::new();
        let mut at = 0;
        while at < all.len() {
            if !touched(at) {
                at += 1;
                continue;
            }
            let first = at;
            while at + 1 < all.len() && all[at + 1].0 == all[at].0 + 1 && touched(at + 1) {
                at += 1;
            }
            let last = at;
            at += 1;
            for (n, near) in near[first..=last].iter_mut().enumerate() {
                *near = 2 + usize::from(n > 0) + usize::from(first + n < last);
            }
            if near[first] == 2 {
                near[first] = 0;
            }
            // The neighbours of the run are beside something touched, too.
            if first > 0 && all[first - 1].0 + 1 == all[first].0 {
                near[first - 1] = if near[first - 1] == 3 { 4 } else { 3 };
            }
            let length = all[last].0 - all[first].0 + 1;
            let reach = (2 * length).min(REACH);
            let mut next = last + 1;
            for distance in 1..=reach {
                let Some(region) = all[last].0.checked_add(distance) else {
                    break;
                };
                while next < all.len() && all[next].0 < region {
                    next += 1;
                }
                match all.get(next) {
                    Some(row) if row.0 == region => {
                        if touched(next) {
                            break;
                        }
                        near[next] = match distance {
                            1 => 3,
                            _ if distance <= length => 2,
                            _ => 1,
                        };
                        if (row.1 | row.2) >> ago == 0 {
                            ahead.push(Ahead::of(region, length, distance));
                        }
                    }
                    _ => ahead.push(Ahead::of(region, length, distance)),
                }
            }
        }
        Surroundings { near, ahead }
    }
}

impl Ahead {
    fn of(region: u64, length: u64, distance: u64) -> Ahead {
        let lengths = match length {
            1..=2 => length as usize - 1,
            3..=6 => 2,
            7..=31 => 3,
            _ => 4,
        };
        let distances = match distance {
            1 => 0,
            _ if distance <= length.div_ceil(4) => 1,
            _ if distance <= length.div_ceil(2) => 2,
            _ if distance <= length => 3,
            _ => 4,
        };
        Ahead {
            region,
            class: lengths * DISTANCES + distances,
        }
    }
}

fn mask_of(all: &[Row], region: u64) -> u64 {
    all.binary_search_by_key(&region, |row| row.0)
        .map_or(0, |at| all[at].1)
}

impl Estimator for LifeTable {
    fn access(&mut self, access: Access) {
        self.turn(access.at_ms);
        let window = self.window;
        for region in self.regions.within(access.units) {
            let seen = self.regions.entry(region);
            seen.masks[access.touch as usize] |= 1;
            seen.window = window;
        }
    }

    fn predict(&mut self, touch: Touch, now_ms: u64, span: Span, most: usize) -> Vec<Ranked> {
        self.turn(now_ms);
        // A window that is under way is ignored where it saw no touch yet.
        let latest = |mask: u64| if mask & 1 != 0 { mask } else { mask >> 1 };
        let all: Vec<_> = self
            .masks(touch)
            .into_iter()
            .map(|(region, mask, other)| (region, latest(mask), latest(other)))
            .collect();
        let horizon = Horizon::asked(self.now_ms, span, self.window_ms);
        let table = &self.tables[touch as usize][horizon];
        // What is written before it is read was sent in vain.
        let until = Span::new(now_ms, span.from_ms);
        let overwritten = (touch == Touch::Read && HORIZONS[horizon].after > 0).then(|| {
            let horizon = Horizon::asked(self.now_ms, until, self.window_ms);
            &self.tables[Touch::Write as usize][horizon]
        });
        let mut likely = Vec::new();
        let mut put = |region, score| {
            if score >= MEMBER[touch as usize] {
                likely.push(Ranked { region, score });
            }
        };
        let around = Surroundings::of(&all, 0);
        for (&(region, mask, other), &near) in all.iter().zip(&around.near) {
            let (past, others) = (mask as u32, other as u32);
            if past | others != 0 {
                let mut score = table.probability(&Past::of(past, near, others));
                if let Some(overwritten) = overwritten {
                    score -= overwritten.probability(&Past::of(others, 0, past));
                }
                put(region, score);
            }
        }
        for Ahead { region, class } in around.ahead {
            put(region, table.ahead[class].share(UNHEARD));
        }
        rank(likely, most)
    }

    fn memory(&self) -> usize {
        let table =
            |t: &Table| (t.fine.len() + t.coarse.len() + t.ahead.len()) * size_of::<Cases>();
        self.regions.memory() + self.tables.iter().flatten().map(table).sum::<usize>()
    }
}
