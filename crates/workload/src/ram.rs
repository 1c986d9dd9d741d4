//! The RAM writer and its sweep, one thread, so that no page is ever half written when it is looked at.
//!
//! A page is a cell in all but its last 8 bytes and a word there: the low half of a hash over, and the
//! high half, the number of its last write. A write in word mode changes the word alone, one in page
//! mode everything. A table of the generations, in other pages, says what each page must hold; so a page
//! that is whole but old (a copy that came late, a write that was lost) is found as surely as a torn one.
//! The word is checked before each write, the whole page in page mode; the sweep checks everything.

use crate::gate::{Gate, Shared, Turn};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use whimbrel_workload::cell::{Kind, Place};
use whimbrel_workload::chance::{Rng, Zipf, mix};
use whimbrel_workload::params::{RamAccess, RamMode, RamParams};
use whimbrel_workload::report::{Fault, Workload};

const PAGE: usize = 4096;
const WORD_AT: usize = PAGE - 8;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// All self-checking pages.
pub struct RamSet {
    pages: Vec<Page>,
    generations: Vec<u32>,
    mode: RamMode,
    seed: u64,
}

impl RamSet {
    pub fn new(mib: u32, mode: RamMode, seed: u64) -> Self {
        let count = mib as usize * (1 << 20) / PAGE;
        let mut set = RamSet {
            pages: vec![Page([0; PAGE]); count],
            generations: vec![0; count],
            mode,
            seed,
        };
        for index in 0..count {
            set.rewrite(index);
        }
        set
    }

    fn place(&self, index: usize) -> Place {
        Place {
            kind: Kind::RamPage,
            seed: self.seed,
            index: index as u64,
        }
    }

    fn word(&self, index: usize) -> u64 {
        let generation = u64::from(self.generations[index]);
        let proof = mix(self.seed ^ mix(index as u64) ^ generation) as u32;
        generation << 32 | u64::from(proof)
    }

    fn write_word(&mut self, index: usize) {
        let word = self.word(index);
        self.pages[index].0[WORD_AT..].copy_from_slice(&word.to_le_bytes());
    }

    fn rewrite(&mut self, index: usize) {
        let generation = match self.mode {
            RamMode::Page => u64::from(self.generations[index]),
            RamMode::Word => 0,
        };
        let place = self.place(index);
        place.seal(generation, &mut self.pages[index].0[..WORD_AT]);
        self.write_word(index);
    }

    fn check_word(&self, index: usize) -> Result<(), Fault> {
        let mut word = [0; 8];
        word.copy_from_slice(&self.pages[index].0[WORD_AT..]);
        let found = u64::from_le_bytes(word);
        let expected = self.word(index);
        if found == expected {
            return Ok(());
        }
        Err(Fault::RamWord {
            page: index as u64,
            generation: u64::from(self.generations[index]),
            expected,
            found,
        })
    }

    /// Checks all of one page.
    pub fn check(&self, index: usize) -> Result<(), Fault> {
        self.check_word(index)?;
        let page = index as u64;
        let found = self
            .place(index)
            .open(&self.pages[index].0[..WORD_AT])
            .map_err(|broken| Fault::RamContent { page, broken })?;
        let expected = match self.mode {
            RamMode::Page => u64::from(self.generations[index]),
            RamMode::Word => 0,
        };
        if found == expected {
            return Ok(());
        }
        Err(Fault::RamStale {
            page,
            expected,
            found,
        })
    }

    /// Checks, then writes, one page. A broken page is made whole again, so that it counts once.
    fn write(&mut self, index: usize) -> Result<(), Fault> {
        let checked = match self.mode {
            RamMode::Word => self.check_word(index),
            RamMode::Page => self.check(index),
        };
        self.generations[index] = self.generations[index].wrapping_add(1);
        match self.mode {
            RamMode::Word => self.write_word(index),
            RamMode::Page => self.rewrite(index),
        }
        if checked.is_err() {
            self.rewrite(index);
        }
        checked
    }

    pub fn len(&self) -> usize {
        self.pages.len()
    }
}

/// Which page is next.
enum Access {
    Uniform { hot: u64 },
    Zipf { ranks: Zipf, order: Vec<u32> },
}

impl Access {
    fn new(params: &RamParams, pages: usize, seed: u64) -> Self {
        match params.access {
            RamAccess::Uniform => Access::Uniform {
                hot: (u64::from(params.hot_mib) * 256).min(pages as u64),
            },
            RamAccess::Zipf => {
                let mut order: Vec<u32> = (0..pages as u32).collect();
                Rng::new(seed, 3).shuffle(&mut order);
                Access::Zipf {
                    ranks: Zipf::new(pages as u64, params.theta),
                    order,
                }
            }
        }
    }

    fn next(&self, rng: &mut Rng) -> usize {
        match self {
            Access::Uniform { hot } => rng.below(*hot) as usize,
            Access::Zipf { ranks, order } => order[ranks.rank(rng) as usize] as usize,
        }
    }
}

/// Writes and sweeps until the guest stops; hands back the pages for the final check.
pub fn run(shared: &Shared) -> RamSet {
    let params = &shared.params.ram;
    let seed = shared.params.seed;
    let mut set = RamSet::new(params.region_mib, params.mode, seed);
    let access = Access::new(params, set.len(), seed);
    let mut rng = Rng::new(seed, 1);
    let mut cursor = 0;
    let (mut writes, mut sweeps) = (
        Gate::new(shared, Workload::Ram),
        Gate::new(shared, Workload::Sweep),
    );
    while !shared.stopping() {
        let mut rest = Duration::MAX;
        match writes.ask(writes.batch()) {
            Turn::Wait(time) => rest = rest.min(time),
            Turn::Go => {
                let (stage, began, batch) =
                    (shared.stage(Workload::Ram), Instant::now(), writes.batch());
                for _ in 0..batch {
                    if let Err(fault) = set.write(access.next(&mut rng)) {
                        shared.fault(fault);
                    }
                }
                stage.took(began);
                stage.done.fetch_add(batch, Relaxed);
                rest = Duration::ZERO;
            }
        }
        match sweeps.ask(sweeps.batch()) {
            Turn::Wait(time) => rest = rest.min(time),
            Turn::Go => {
                let batch = sweeps.batch();
                for _ in 0..batch {
                    if let Err(fault) = set.check(cursor) {
                        shared.fault(fault);
                        set.rewrite(cursor);
                    }
                    cursor = (cursor + 1) % set.len();
                }
                shared.stage(Workload::Sweep).done.fetch_add(batch, Relaxed);
                rest = Duration::ZERO;
            }
        }
        if !rest.is_zero() {
            std::thread::sleep(rest);
        }
    }
    shared.stage(Workload::Ram).park();
    shared.stage(Workload::Sweep).park();
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untouched_pages_pass() {
        for mode in [RamMode::Word, RamMode::Page] {
            let mut set = RamSet::new(1, mode, 7);
            for i in 0..1000 {
                assert_eq!(set.write(i * 37 % set.len()), Ok(()));
            }
            assert!((0..set.len()).all(|i| set.check(i).is_ok()));
        }
    }

    #[test]
    fn a_page_of_an_older_write_is_found() {
        for mode in [RamMode::Word, RamMode::Page] {
            let mut set = RamSet::new(1, mode, 7);
            let old = set.pages[5].clone();
            assert_eq!(set.write(5), Ok(()));
            set.pages[5] = old;
            assert!(matches!(
                set.check(5),
                Err(Fault::RamWord {
                    page: 5,
                    generation: 1,
                    ..
                })
            ));
            assert!(set.write(5).is_err());
            assert_eq!(set.check(5), Ok(()), "counted once, then whole again");
        }
    }

    #[test]
    fn a_flipped_bit_and_a_swapped_page_are_found() {
        let mut set = RamSet::new(1, RamMode::Word, 7);
        set.pages[9].0[100] ^= 1;
        assert!(matches!(
            set.check(9),
            Err(Fault::RamContent { page: 9, .. })
        ));
        set.pages.swap(1, 2);
        assert!(set.check(1).is_err() && set.check(2).is_err());
    }

    #[test]
    fn content_and_word_of_different_writes_are_found() {
        let mut set = RamSet::new(1, RamMode::Page, 7);
        let old = set.pages[5].clone();
        assert_eq!(set.write(5), Ok(()));
        set.pages[5].0[..WORD_AT].copy_from_slice(&old.0[..WORD_AT]);
        assert_eq!(
            set.check(5),
            Err(Fault::RamStale {
                page: 5,
                expected: 1,
                found: 0
            })
        );
    }
}
