//! A set of units of one space, as a bitmap.
//!
//! One bit per unit (32 MiB per TiB), with the number of members kept beside it, so that "how much is
//! left" costs nothing. Bits past the capacity are never set; runs are found a word at a time.

use crate::space::Extent;

/// A set of unit indices below a fixed capacity.
#[derive(Clone, PartialEq, Eq)]
pub struct UnitSet {
    words: Vec<u64>,
    capacity: u64,
    members: u64,
}

impl UnitSet {
    /// The empty set over `0..capacity`.
    pub fn empty(capacity: u64) -> Self {
        UnitSet {
            words: vec![0; capacity.div_ceil(64) as usize],
            capacity,
            members: 0,
        }
    }

    /// Every unit of `0..capacity`.
    pub fn full(capacity: u64) -> Self {
        let mut set = UnitSet::empty(capacity);
        set.insert(Extent::new(0, capacity));
        set
    }

    /// Rebuilds a set from [`to_bytes`](Self::to_bytes); `None` if the length does not fit the
    /// capacity or a bit past the capacity is set.
    pub fn from_bytes(capacity: u64, bytes: &[u8]) -> Option<Self> {
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|c| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
            .collect();
        if !bytes.len().is_multiple_of(8) || words.len() as u64 != capacity.div_ceil(64) {
            return None;
        }
        let tail = capacity % 64;
        if tail != 0 && words.last().is_some_and(|w| w >> tail != 0) {
            return None;
        }
        let members = words.iter().map(|w| u64::from(w.count_ones())).sum();
        Some(UnitSet {
            words,
            capacity,
            members,
        })
    }

    /// Little-endian words, bit 0 of word 0 being unit 0.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Number of members.
    pub fn len(&self) -> u64 {
        self.members
    }

    pub fn is_empty(&self) -> bool {
        self.members == 0
    }

    pub fn is_full(&self) -> bool {
        self.members == self.capacity
    }

    pub fn contains(&self, unit: u64) -> bool {
        unit < self.capacity && self.words[(unit / 64) as usize] >> (unit % 64) & 1 == 1
    }

    /// Whether every unit of the extent is a member.
    pub fn contains_all(&self, extent: Extent) -> bool {
        extent.is_empty()
            || self
                .next_absent(extent.start)
                .is_none_or(|u| u >= extent.end())
    }

    /// Adds the extent (cut at the capacity); returns how many units were new.
    pub fn insert(&mut self, extent: Extent) -> u64 {
        self.change(
            extent,
            |word, mask| {
                let new = mask & !*word;
                *word |= mask;
                new
            },
            true,
        )
    }

    /// Removes the extent; returns how many units were members.
    pub fn remove(&mut self, extent: Extent) -> u64 {
        self.change(
            extent,
            |word, mask| {
                let gone = mask & *word;
                *word &= !mask;
                gone
            },
            false,
        )
    }

    fn change(&mut self, extent: Extent, f: impl Fn(&mut u64, u64) -> u64, grows: bool) -> u64 {
        let extent = extent.clamp_to(Extent::new(0, self.capacity));
        let mut changed = 0;
        let mut unit = extent.start;
        while unit < extent.end() {
            let bit = unit % 64;
            let count = (64 - bit).min(extent.end() - unit);
            let mask = if count == 64 {
                u64::MAX
            } else {
                ((1 << count) - 1) << bit
            };
            changed += u64::from(f(&mut self.words[(unit / 64) as usize], mask).count_ones());
            unit += count;
        }
        if grows {
            self.members += changed;
        } else {
            self.members -= changed;
        }
        changed
    }

    /// Adds every member of `other`, a set of the same capacity.
    pub fn union_with(&mut self, other: &UnitSet) {
        assert_eq!(self.capacity, other.capacity, "sets of one space");
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
        self.recount();
    }

    /// Removes every member of `other`, a set of the same capacity.
    pub fn subtract(&mut self, other: &UnitSet) {
        assert_eq!(self.capacity, other.capacity, "sets of one space");
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
        self.recount();
    }

    fn recount(&mut self) {
        self.members = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
    }

    /// The first member at or after `from`.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        self.scan(from, |w| w)
    }

    /// The first non-member at or after `from`.
    pub fn next_absent(&self, from: u64) -> Option<u64> {
        self.scan(from, |w| !w)
    }

    fn scan(&self, from: u64, f: impl Fn(u64) -> u64) -> Option<u64> {
        if from >= self.capacity {
            return None;
        }
        let mut index = (from / 64) as usize;
        let mut word = f(self.words[index]) & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                let unit = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (unit < self.capacity).then_some(unit);
            }
            index += 1;
            word = f(*self.words.get(index)?);
        }
    }

    /// The first run of members at or after `from`, of at most `max` units.
    pub fn next_run(&self, from: u64, max: u64) -> Option<Extent> {
        let start = self.next_present(from)?;
        let end = self.next_absent(start).unwrap_or(self.capacity);
        Some(Extent::new(start, (end - start).min(max)))
    }

    /// The runs of members, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Extent> + '_ {
        self.runs_within(Extent::new(0, self.capacity))
    }

    /// The runs of members inside `extent`, ascending.
    pub fn runs_within(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let mut from = extent.start;
        std::iter::from_fn(move || {
            let run = self
                .next_run(from, u64::MAX)?
                .clamp_to(Extent::new(from, extent.end() - from));
            if run.is_empty() {
                return None;
            }
            from = run.end();
            Some(run)
        })
    }

    /// The runs of non-members inside `extent`, ascending.
    pub fn gaps_within(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let limit = extent.end().min(self.capacity);
        let mut from = extent.start;
        std::iter::from_fn(move || {
            let start = self.next_absent(from).filter(|&u| u < limit)?;
            let end = self.next_present(start).unwrap_or(self.capacity).min(limit);
            from = end;
            Some(Extent::new(start, end - start))
        })
    }
}

impl std::fmt::Debug for UnitSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UnitSet({} of {})", self.members, self.capacity)
    }
}
