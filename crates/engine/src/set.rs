//! A set of units of one space, as a bitmap of which only what is mixed is stored.
//!
//! The bits lie in chunks of `CHUNK` units. A chunk that is all absent or all present has no words, so a
//! set that is empty, full or made of long runs takes 192 KiB per TiB, and one bit per unit (32 MiB
//! per TiB) only where members and others alternate. The number of members is kept beside it, so that "how
//! much is left" costs nothing.
//!
//! Invariants: a chunk has words only while it is mixed, so equal sets look equal; bits past the capacity are
//! never set. Runs are found a chunk or a word at a time.

use crate::space::Extent;

/// Units of a chunk: 4 KiB of words, 128 MiB of a disk. Smaller ones would make the table of a sparse
/// set longer, larger ones would store more around each of its members.
const CHUNK: u64 = 32_768;

/// A set of unit indices below a fixed capacity.
#[derive(Clone, PartialEq, Eq)]
pub struct UnitSet {
    chunks: Vec<Chunk>,
    capacity: u64,
    members: u64,
}

#[derive(Clone, PartialEq, Eq)]
enum Chunk {
    Absent,
    Present,
    /// Members, at least one and fewer than there are units; then the words, of the chunk's units alone.
    Mixed(u32, Box<[u64]>),
}

impl Chunk {
    /// Of words that may be uniform; `units` is how many there are.
    fn of(words: Box<[u64]>, units: u64) -> Chunk {
        let members = words.iter().map(|w| u64::from(w.count_ones())).sum();
        match members {
            0 => Chunk::Absent,
            all if all == units => Chunk::Present,
            some => Chunk::Mixed(some as u32, words),
        }
    }

    fn members(&self, units: u64) -> u64 {
        match self {
            Chunk::Absent => 0,
            Chunk::Present => units,
            Chunk::Mixed(members, _) => u64::from(*members),
        }
    }

    /// All of its words, though they be uniform.
    fn into_words(self, units: u64) -> Box<[u64]> {
        match self {
            Chunk::Absent => vec![0; units.div_ceil(64) as usize].into(),
            Chunk::Present => {
                let mut words = vec![u64::MAX; units.div_ceil(64) as usize];
                if let (Some(last), 1..) = (words.last_mut(), units % 64) {
                    *last = (1 << (units % 64)) - 1;
                }
                words.into()
            }
            Chunk::Mixed(_, words) => words,
        }
    }

    /// The first unit of the chunk at or after `from` that is, or is not, a member. One past its
    /// units may be found where the last word is not full.
    fn find(&self, from: u64, present: bool) -> Option<u64> {
        match self {
            Chunk::Absent => (!present).then_some(from),
            Chunk::Present => present.then_some(from),
            Chunk::Mixed(_, words) => {
                let flip = if present { 0 } else { u64::MAX };
                let mut index = (from / 64) as usize;
                let mut word = (words.get(index)? ^ flip) & (u64::MAX << (from % 64));
                while word == 0 {
                    index += 1;
                    word = words.get(index)? ^ flip;
                }
                Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
            }
        }
    }
}

impl UnitSet {
    /// The empty set over `0..capacity`.
    pub fn empty(capacity: u64) -> Self {
        UnitSet {
            chunks: vec![Chunk::Absent; capacity.div_ceil(CHUNK) as usize],
            capacity,
            members: 0,
        }
    }

    /// Every unit of `0..capacity`.
    pub fn full(capacity: u64) -> Self {
        UnitSet {
            chunks: vec![Chunk::Present; capacity.div_ceil(CHUNK) as usize],
            capacity,
            members: capacity,
        }
    }

    /// Rebuilds a set from [`to_bytes`](Self::to_bytes); `None` if the length does not fit the
    /// capacity or a bit past the capacity is set.
    pub fn from_bytes(capacity: u64, bytes: &[u8]) -> Option<Self> {
        let words = capacity.div_ceil(64);
        if words.checked_mul(8) != Some(bytes.len() as u64) {
            return None;
        }
        let word = |c: &[u8]| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
        let tail = capacity % 64;
        if tail != 0 && bytes.chunks_exact(8).last().map(word)? >> tail != 0 {
            return None;
        }
        let mut set = UnitSet::empty(capacity);
        for (at, part) in bytes.chunks((CHUNK / 8) as usize).enumerate() {
            let units = set.units_of(at);
            set.chunks[at] = Chunk::of(part.chunks_exact(8).map(word).collect(), units);
            set.members += set.chunks[at].members(units);
        }
        Some(set)
    }

    /// Little-endian words, bit 0 of word 0 being unit 0.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.capacity.div_ceil(64) as usize * 8);
        for (at, chunk) in self.chunks.iter().enumerate() {
            match chunk {
                Chunk::Mixed(_, words) => bytes.extend(words.iter().flat_map(|w| w.to_le_bytes())),
                uniform => {
                    let words = uniform.clone().into_words(self.units_of(at));
                    bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
                }
            }
        }
        bytes
    }

    /// Units that a chunk has: the last may be shorter.
    fn units_of(&self, chunk: usize) -> u64 {
        CHUNK.min(self.capacity - chunk as u64 * CHUNK)
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

    /// Bytes of memory that the set takes.
    pub fn memory(&self) -> usize {
        let words = self.chunks.iter().map(|chunk| match chunk {
            Chunk::Mixed(_, words) => size_of_val(&words[..]),
            Chunk::Absent | Chunk::Present => 0,
        });
        words.sum::<usize>() + self.chunks.len() * size_of::<Chunk>()
    }

    pub fn contains(&self, unit: u64) -> bool {
        let Some(chunk) = self.chunks.get((unit / CHUNK) as usize) else {
            return false;
        };
        match chunk {
            Chunk::Absent => false,
            Chunk::Present => unit < self.capacity,
            Chunk::Mixed(_, words) => {
                let word = words.get((unit % CHUNK / 64) as usize);
                word.is_some_and(|word| word >> (unit % 64) & 1 == 1)
            }
        }
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
        let new = self.change(extent, true);
        self.members += new;
        new
    }

    /// Removes the extent; returns how many units were members.
    pub fn remove(&mut self, extent: Extent) -> u64 {
        let gone = self.change(extent, false);
        self.members -= gone;
        gone
    }

    /// Makes the extent present or absent; returns how many units were not so before.
    fn change(&mut self, extent: Extent, present: bool) -> u64 {
        let extent = extent.clamp_to(Extent::new(0, self.capacity));
        let mut changed = 0;
        let mut unit = extent.start;
        while unit < extent.end() {
            let at = (unit / CHUNK) as usize;
            let units = self.units_of(at);
            let from = unit % CHUNK;
            let to = units.min(from + extent.end() - unit);
            unit += to - from;
            let chunk = &mut self.chunks[at];
            let before = chunk.members(units);
            let (uniform, all) = if present {
                (Chunk::Present, units)
            } else {
                (Chunk::Absent, 0)
            };
            if before == all {
                continue;
            }
            if to - from == units {
                *chunk = uniform;
                changed += before.abs_diff(all);
                continue;
            }
            let mut words = std::mem::replace(chunk, Chunk::Absent).into_words(units);
            let by = change_words(&mut words, from, to, present);
            changed += by;
            let after = if present { before + by } else { before - by };
            *chunk = if after == all {
                uniform
            } else {
                // Not the other uniform: it either was mixed, or something of it changed.
                Chunk::Mixed(after as u32, words)
            };
        }
        changed
    }

    /// Adds every member of `other`, a set of the same capacity.
    pub fn union_with(&mut self, other: &UnitSet) {
        self.combine(other, true);
    }

    /// Removes every member of `other`, a set of the same capacity.
    pub fn subtract(&mut self, other: &UnitSet) {
        self.combine(other, false);
    }

    /// The members that are in both, of sets of the same capacity.
    pub fn intersection(&self, other: &UnitSet) -> UnitSet {
        let mut only_here = self.clone();
        only_here.subtract(other);
        let mut both = self.clone();
        both.subtract(&only_here);
        both
    }

    fn combine(&mut self, other: &UnitSet, present: bool) {
        assert_eq!(self.capacity, other.capacity, "sets of one space");
        self.members = 0;
        for at in 0..self.chunks.len() {
            let units = self.units_of(at);
            let chunk = &mut self.chunks[at];
            match &other.chunks[at] {
                Chunk::Absent => {}
                Chunk::Present if present => *chunk = Chunk::Present,
                Chunk::Present => *chunk = Chunk::Absent,
                Chunk::Mixed(_, theirs) => {
                    let mut words = std::mem::replace(chunk, Chunk::Absent).into_words(units);
                    for (word, their) in words.iter_mut().zip(theirs) {
                        if present {
                            *word |= their;
                        } else {
                            *word &= !their;
                        }
                    }
                    *chunk = Chunk::of(words, units);
                }
            }
            self.members += chunk.members(units);
        }
    }

    /// The first member at or after `from`.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        self.scan(from, true)
    }

    /// The first non-member at or after `from`.
    pub fn next_absent(&self, from: u64) -> Option<u64> {
        self.scan(from, false)
    }

    fn scan(&self, from: u64, present: bool) -> Option<u64> {
        let first = usize::try_from(from / CHUNK).ok()?;
        let mut from = from % CHUNK;
        for (at, chunk) in self.chunks.iter().enumerate().skip(first) {
            if let Some(found) = chunk.find(from, present) {
                let unit = at as u64 * CHUNK + found;
                // Past the end only in the last chunk.
                return (unit < self.capacity).then_some(unit);
            }
            from = 0;
        }
        None
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

/// Makes the bits `from..to` present or absent; returns how many were not so before.
fn change_words(words: &mut [u64], from: u64, to: u64, present: bool) -> u64 {
    let mut changed = 0;
    let mut unit = from;
    while unit < to {
        let bit = unit % 64;
        let count = (64 - bit).min(to - unit);
        let mask = if count == 64 {
            u64::MAX
        } else {
            ((1 << count) - 1) << bit
        };
        let word = &mut words[(unit / 64) as usize];
        let other = if present { mask & !*word } else { mask & *word };
        *word ^= other;
        changed += u64::from(other.count_ones());
        unit += count;
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Small enough to be modelled unit by unit, and of three chunks, the last short and of a broken word.
    const UNITS: u64 = 2 * CHUNK + 1000;

    #[derive(Clone, Debug)]
    enum Deed {
        Insert(Extent),
        Remove(Extent),
        Union(Vec<Extent>),
        Subtract(Vec<Extent>),
    }

    fn extent() -> impl Strategy<Value = Extent> {
        let edge = prop_oneof![
            0..=UNITS + 100,
            (0u64..4).prop_map(|c| c * CHUNK),
            (0u64..4, 0u64..130).prop_map(|(c, by)| (c * CHUNK).saturating_sub(by)),
            Just(UNITS),
        ];
        (edge.clone(), edge).prop_map(|(a, b)| Extent::new(a.min(b), a.abs_diff(b)))
    }

    fn deed() -> impl Strategy<Value = Deed> {
        prop_oneof![
            extent().prop_map(Deed::Insert),
            extent().prop_map(Deed::Remove),
            prop::collection::vec(extent(), 0..4).prop_map(Deed::Union),
            prop::collection::vec(extent(), 0..4).prop_map(Deed::Subtract),
        ]
    }

    fn set_of(extents: &[Extent]) -> UnitSet {
        let mut set = UnitSet::empty(UNITS);
        for &extent in extents {
            set.insert(extent);
        }
        set
    }

    fn within(extent: Extent) -> std::ops::Range<u64> {
        extent.start.min(UNITS)..extent.end().min(UNITS)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_set_is_what_a_plain_one_would_be(
            deeds in prop::collection::vec(deed(), 1..12),
            probes in prop::collection::vec(extent(), 1..6),
        ) {
            let mut set = UnitSet::empty(UNITS);
            let mut model = BTreeSet::new();
            for deed in deeds {
                match deed {
                    Deed::Insert(extent) => {
                        let before = model.len();
                        model.extend(within(extent));
                        prop_assert_eq!(set.insert(extent), (model.len() - before) as u64);
                    }
                    Deed::Remove(extent) => {
                        let before = model.len();
                        within(extent).for_each(|unit| { model.remove(&unit); });
                        prop_assert_eq!(set.remove(extent), (before - model.len()) as u64);
                    }
                    Deed::Union(extents) => {
                        set.union_with(&set_of(&extents));
                        extents.into_iter().for_each(|extent| model.extend(within(extent)));
                    }
                    Deed::Subtract(extents) => {
                        set.subtract(&set_of(&extents));
                        for unit in extents.into_iter().flat_map(within) {
                            model.remove(&unit);
                        }
                    }
                }
                prop_assert_eq!(set.len(), model.len() as u64);
            }
            let runs: Vec<u64> = set.runs().flat_map(|run| run.start..run.end()).collect();
            prop_assert!(runs.iter().eq(model.iter()));
            // However it came about, it looks the same, in memory too.
            let bytes = set.to_bytes();
            let again = UnitSet::from_bytes(UNITS, &bytes).unwrap();
            prop_assert!(again == set);
            prop_assert_eq!(again.memory(), set.memory());
            let mut anew = UnitSet::empty(UNITS);
            set.runs().for_each(|run| { anew.insert(run); });
            prop_assert!(anew == set);
            for probe in probes {
                prop_assert_eq!(set.contains(probe.start), model.contains(&probe.start));
                let all = (probe.start..probe.end()).all(|u| model.contains(&u) || u >= UNITS);
                prop_assert_eq!(set.contains_all(probe), all);
                prop_assert_eq!(set.next_present(probe.start), model.range(probe.start..).next().copied());
                let absent = (probe.start..UNITS).find(|u| !model.contains(u));
                prop_assert_eq!(set.next_absent(probe.start), absent);
                let gaps: Vec<u64> =
                    set.gaps_within(probe).flat_map(|gap| gap.start..gap.end()).collect();
                let expected: Vec<u64> = within(probe).filter(|u| !model.contains(u)).collect();
                prop_assert!(gaps == expected);
            }
        }
    }

    #[test]
    fn bytes_of_another_length_or_past_the_capacity_are_refused() {
        assert!(UnitSet::from_bytes(100, &[0; 8]).is_none());
        assert!(UnitSet::from_bytes(100, &[0; 24]).is_none());
        let mut bytes = [0; 16];
        bytes[12] = 1 << 4;
        assert!(UnitSet::from_bytes(100, &bytes).is_none());
        bytes[12] = 1 << 3;
        assert_eq!(UnitSet::from_bytes(100, &bytes).unwrap().len(), 1);
        assert!(UnitSet::from_bytes(u64::MAX, &bytes).is_none());
    }

    #[test]
    fn a_tebibyte_of_long_runs_takes_little_memory() {
        let units = 1 << 28;
        assert!(UnitSet::full(units).memory() <= 192 << 10);
        let mut set = UnitSet::empty(units);
        for run in 0..64 {
            set.insert(Extent::new(run * (1 << 22) + 77, 1 << 20));
        }
        assert_eq!(set.len(), 64 << 20);
        assert!(set.memory() <= 768 << 10, "{}", set.memory());
        set.insert(Extent::new(0, units));
        assert!(set == UnitSet::full(units));
    }
}
