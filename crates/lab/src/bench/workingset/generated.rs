//! Traces made up, so that the bench runs without a file. They are what somebody thinks that guests do: figures for them
//! say whether an estimator sees the pattern it was made for, and nothing else.

use super::Trace;
use whimbrel_engine::space::Extent;
use whimbrel_engine::workingset::{Access, Touch};

/// Seconds of each.
const LENGTH: u64 = 1200;

/// Units of the disk that is used: 2 GiB.
const DISK: u64 = 524_288;

pub fn all() -> Vec<Trace> {
    let made = [
        ("generated-spool", spool as fn(&mut Guest, u64)),
        ("generated-database", database),
        ("generated-scan", scan),
    ];
    made.into_iter()
        .map(|(name, second)| Guest::live(name, second))
        .collect()
}

struct Guest {
    accesses: Vec<Access>,
    now_ms: u64,
    state: u64,
    journal: u64,
}

impl Guest {
    fn live(name: &str, second: fn(&mut Guest, u64)) -> Trace {
        let mut guest = Guest {
            accesses: Vec::new(),
            now_ms: 0,
            state: 0x9e37_79b9_7f4a_7c15,
            journal: 0,
        };
        for n in 0..LENGTH {
            guest.now_ms = n * 1000;
            second(&mut guest, n);
        }
        Trace {
            name: name.to_owned(),
            accesses: guest.accesses,
        }
    }

    /// xorshift: the same each time.
    fn below(&mut self, most: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % most
    }

    /// The lower the likelier.
    fn skewed(&mut self, most: u64) -> u64 {
        let first = self.below(most) + 1;
        let second = self.below(first) + 1;
        self.below(second)
    }

    fn does(&mut self, touch: Touch, start: u64, len: u64) {
        self.accesses.push(Access {
            at_ms: self.now_ms,
            touch,
            units: Extent::new(start, len),
        });
    }

    /// Round and round in 32 MiB.
    fn journals(&mut self, units: u64) {
        let start = self.journal % 8192;
        self.does(Touch::Write, start, units.min(8192 - start));
        self.journal += units;
    }
}

/// Small files written and read, most of them recent, and a journal.
fn spool(guest: &mut Guest, second: u64) {
    let newest = 16_384 + second * 40;
    for _ in 0..8 {
        guest.journals(3);
        let at = newest + guest.below(40);
        guest.does(Touch::Write, at, 2);
        let back = guest.skewed(newest - 16_384 + 1);
        guest.does(Touch::Read, newest - back, 2);
    }
}

/// Pages of a table read and written by their popularity, a log, and every minute a burst of writes.
fn database(guest: &mut Guest, second: u64) {
    for _ in 0..10 {
        guest.journals(2);
        let at = 16_384 + guest.skewed(262_144);
        guest.does(Touch::Read, at, 2);
    }
    let writes = if second % 60 < 10 { 60 } else { 2 };
    for _ in 0..writes {
        let at = 16_384 + guest.skewed(262_144);
        guest.does(Touch::Write, at, 2);
    }
}

/// A disk read from end to end, beside a few hot files.
fn scan(guest: &mut Guest, second: u64) {
    for n in 0..4 {
        guest.does(Touch::Read, (second * 128 + n * 32) % DISK, 32);
    }
    guest.journals(4);
    for _ in 0..4 {
        let at = 400_000 + guest.skewed(4096);
        guest.does(Touch::Write, at, 1);
        let at = 420_000 + guest.skewed(8192);
        guest.does(Touch::Read, at, 4);
    }
}
