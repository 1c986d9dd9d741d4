//! The newest copy of every page of the guest, at the source.
//!
//! Each RAM block is cut into chunks of 2 MiB (512 units). A chunk is a lock, five bitmaps of 512
//! bits, and the bytes, allocated when the first page that is not zero arrives. One lock holds for
//! everything about a unit, so a page is never read half old and half new, and the one writer (the
//! stream's thread) meets a reader only in the same 2 MiB.
//!
//! ```text
//! arrived   the stream has spoken of the unit, ever
//! zero      it is a page of zeros: no bytes kept
//! held      its bytes are in `data`
//! dirtied   it arrived since `take_dirtied` was asked last
//! stale     QEMU has said that what was sent is worth nothing and will send it again
//! ```
//! A unit that arrived and is neither zero nor held was released. A unit that never arrived and is not
//! stale after the stop has no content (QEMU left it out: a ballooned page): it is a page of zeros.
//!
//! Memory: at most the guest's, less its zero pages; a chunk's bytes go when all its units are released
//! or zero. `memory` says how much it is now.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::{Extent, UNIT};

use crate::stream::{MAX_RAM, RamBlock, check_blocks};
use crate::{Error, Result};

/// Units in a chunk.
const CHUNK: u64 = 512;
const WORDS: usize = (CHUNK / 64) as usize;
const CHUNK_BYTES: usize = (CHUNK * UNIT) as usize;

/// What the store knows of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitState {
    /// Never spoken of.
    Absent,
    /// To be sent again: no copy here is worth anything.
    Stale,
    Zero,
    Held,
    Released,
}

type Bits = [u64; WORDS];

#[derive(Debug, Default)]
struct Chunk {
    arrived: Bits,
    zero: Bits,
    held: Bits,
    dirtied: Bits,
    stale: Bits,
    data: Option<Box<[u8]>>,
}

fn get(bits: &Bits, at: usize) -> bool {
    bits[at / 64] >> (at % 64) & 1 == 1
}

fn set(bits: &mut Bits, at: usize, value: bool) {
    let mask = 1 << (at % 64);
    if value {
        bits[at / 64] |= mask;
    } else {
        bits[at / 64] &= !mask;
    }
}

impl Chunk {
    fn state(&self, at: usize) -> UnitState {
        if get(&self.stale, at) {
            UnitState::Stale
        } else if get(&self.zero, at) {
            UnitState::Zero
        } else if get(&self.held, at) {
            UnitState::Held
        } else if get(&self.arrived, at) {
            UnitState::Released
        } else {
            UnitState::Absent
        }
    }

    /// Notes an arrival; whether it is the unit's first, and whether the unit had been stale.
    fn arrive(&mut self, at: usize, zero: bool) -> (bool, bool) {
        let was = (!get(&self.arrived, at), get(&self.stale, at));
        set(&mut self.arrived, at, true);
        set(&mut self.dirtied, at, true);
        set(&mut self.stale, at, false);
        set(&mut self.zero, at, zero);
        set(&mut self.held, at, !zero);
        was
    }
}

#[derive(Debug)]
struct Block {
    units: u64,
    chunks: Vec<Mutex<Option<Box<Chunk>>>>,
}

/// The newest copy of every page of every RAM block.
#[derive(Debug)]
pub struct RamStore {
    blocks: Vec<Block>,
    /// Chunks whose bytes are allocated.
    allocated: AtomicU64,
    stale: AtomicU64,
    arrivals: AtomicU64,
    waiting: AtomicUsize,
    arrived: Notify,
}

impl RamStore {
    /// An empty store for these blocks; more than [`MAX_RAM`] is refused.
    pub fn new(blocks: &[RamBlock]) -> Result<Self> {
        check_blocks(blocks)?;
        let bytes = blocks.iter().map(|b| b.len).sum();
        if bytes > MAX_RAM {
            return Err(Error::TooMuchRam {
                bytes,
                limit: MAX_RAM,
            });
        }
        Ok(RamStore {
            blocks: blocks
                .iter()
                .map(|b| Block {
                    units: b.units(),
                    chunks: (0..b.units().div_ceil(CHUNK))
                        .map(|_| Mutex::default())
                        .collect(),
                })
                .collect(),
            allocated: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            arrivals: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            arrived: Notify::new(),
        })
    }

    /// Number of RAM blocks.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Bytes of page content kept now.
    pub fn memory(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed) * CHUNK_BYTES as u64
    }

    /// Pages that have arrived, those that arrived again counted again.
    pub fn arrivals(&self) -> u64 {
        self.arrivals.load(Ordering::Relaxed)
    }

    /// Units whose content QEMU has still to send.
    pub fn stale_left(&self) -> u64 {
        self.stale.load(Ordering::Acquire)
    }

    /// Stores a page of [`UNIT`] bytes; whether it is the unit's first.
    pub(crate) fn put(&self, block: usize, unit: u64, page: &[u8]) -> Result<bool> {
        let mut chunk = self.chunk(block, unit)?;
        let chunk = chunk.get_or_insert_default();
        let at = (unit % CHUNK) as usize;
        let data = chunk.data.get_or_insert_with(|| {
            self.allocated.fetch_add(1, Ordering::Relaxed);
            vec![0; CHUNK_BYTES].into_boxed_slice()
        });
        let from = at * UNIT as usize;
        data[from..from + UNIT as usize].copy_from_slice(page);
        let (first, was_stale) = chunk.arrive(at, false);
        self.count(was_stale);
        Ok(first)
    }

    /// Notes a page of zeros; whether it is the unit's first.
    pub(crate) fn put_zero(&self, block: usize, unit: u64) -> Result<bool> {
        let mut chunk = self.chunk(block, unit)?;
        let chunk = chunk.get_or_insert_default();
        let (first, was_stale) = chunk.arrive((unit % CHUNK) as usize, true);
        self.shrink(chunk);
        self.count(was_stale);
        Ok(first)
    }

    fn count(&self, was_stale: bool) {
        self.arrivals.fetch_add(1, Ordering::Relaxed);
        if was_stale {
            self.stale.fetch_sub(1, Ordering::AcqRel);
            // A sequentially consistent pair with `wait_current`: either the waiter is seen here or
            // it sees the arrival.
            std::sync::atomic::fence(Ordering::SeqCst);
            if self.waiting.load(Ordering::SeqCst) > 0 {
                self.arrived.notify_waiters();
            }
        }
    }

    /// Notes that QEMU will send the extent again.
    pub(crate) fn mark_stale(&self, block: usize, extent: Extent) -> Result<()> {
        self.check(block, extent)?;
        for unit in extent.iter() {
            let mut chunk = self.chunk(block, unit)?;
            let chunk = chunk.get_or_insert_default();
            let at = (unit % CHUNK) as usize;
            if !get(&chunk.stale, at) {
                set(&mut chunk.stale, at, true);
                self.stale.fetch_add(1, Ordering::AcqRel);
            }
            set(&mut chunk.held, at, false);
            set(&mut chunk.zero, at, false);
            self.shrink(chunk);
        }
        Ok(())
    }

    /// Appends the content of `units` units to `out`. Zero and absent units read as zeros.
    pub fn read(&self, block: usize, unit: u64, units: u64, out: &mut Vec<u8>) -> Result<()> {
        self.check(block, Extent::new(unit, units))?;
        let mut unit = unit;
        let end = unit + units;
        while unit < end {
            let chunk = self.chunk(block, unit)?;
            let stop = end.min((unit / CHUNK + 1) * CHUNK);
            let Some(chunk) = chunk.as_ref() else {
                out.resize(out.len() + ((stop - unit) * UNIT) as usize, 0);
                unit = stop;
                continue;
            };
            for unit in unit..stop {
                let at = (unit % CHUNK) as usize;
                match (chunk.state(at), &chunk.data) {
                    (UnitState::Held, Some(data)) => {
                        let from = at * UNIT as usize;
                        out.extend_from_slice(&data[from..from + UNIT as usize]);
                    }
                    (UnitState::Zero | UnitState::Absent, _) => {
                        out.resize(out.len() + UNIT as usize, 0);
                    }
                    (UnitState::Stale, _) => return Err(Error::NotCurrent { block, unit }),
                    (UnitState::Released | UnitState::Held, _) => {
                        return Err(Error::Released { block, unit });
                    }
                }
            }
            unit = stop;
        }
        Ok(())
    }

    /// What is known of a unit; [`UnitState::Absent`] outside the block.
    pub fn state(&self, block: usize, unit: u64) -> UnitState {
        match self.chunk(block, unit) {
            Ok(chunk) => chunk
                .as_ref()
                .map_or(UnitState::Absent, |c| c.state((unit % CHUNK) as usize)),
            Err(_) => UnitState::Absent,
        }
    }

    /// Whether the unit is a page of zeros, one QEMU never spoke of included.
    pub fn is_zero(&self, block: usize, unit: u64) -> bool {
        matches!(self.state(block, unit), UnitState::Zero | UnitState::Absent)
    }

    /// Whether no unit of the extent is stale.
    pub fn is_current(&self, block: usize, extent: Extent) -> bool {
        self.stale_left() == 0
            || extent
                .iter()
                .all(|unit| self.state(block, unit) != UnitState::Stale)
    }

    /// Waits until no unit of the extent is stale. It ends only if the source goes on sending:
    /// [`RamSource::wait_current`](crate::source::RamSource::wait_current) watches that too.
    pub async fn wait_current(&self, block: usize, extent: Extent) {
        let _here = Waiting::new(&self.waiting);
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if self.is_current(block, extent) {
                return;
            }
            arrived.await;
        }
    }

    /// Units of the block that are not zero and whose bytes are here.
    pub fn held(&self, block: usize) -> UnitSet {
        self.collect(block, |c| c.held)
    }

    /// Units of the block known as zero.
    pub fn zeros(&self, block: usize) -> UnitSet {
        self.collect(block, |c| c.zero)
    }

    /// Units of the block that are still to come again.
    pub fn stale(&self, block: usize) -> UnitSet {
        self.collect(block, |c| c.stale)
    }

    /// Units of the block the stream has spoken of.
    pub fn arrived(&self, block: usize) -> UnitSet {
        self.collect(block, |c| c.arrived)
    }

    /// Units of the block that arrived since this was asked last.
    pub fn take_dirtied(&self, block: usize) -> UnitSet {
        self.collect(block, |c| std::mem::take(&mut c.dirtied))
    }

    /// Forgets the bytes of the extent: it was sent. Zero units stay known as zero, stale ones stale.
    pub fn release(&self, block: usize, extent: Extent) -> Result<()> {
        self.check(block, extent)?;
        for unit in extent.iter() {
            let mut chunk = self.chunk(block, unit)?;
            if let Some(chunk) = chunk.as_mut() {
                set(&mut chunk.held, (unit % CHUNK) as usize, false);
                self.shrink(chunk);
            }
        }
        Ok(())
    }

    fn shrink(&self, chunk: &mut Chunk) {
        if chunk.data.is_some() && chunk.held == [0; WORDS] {
            chunk.data = None;
            self.allocated.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn collect(&self, block: usize, mut bits: impl FnMut(&mut Chunk) -> Bits) -> UnitSet {
        let Some(block) = self.blocks.get(block) else {
            return UnitSet::empty(0);
        };
        let words = block.units.div_ceil(64) as usize;
        let mut bytes = vec![0; words * 8];
        for (chunk, out) in block.chunks.iter().zip(bytes.chunks_mut(WORDS * 8)) {
            if let Some(chunk) = lock(chunk).as_mut() {
                let bits = bits(chunk);
                for (out, word) in out.chunks_exact_mut(8).zip(bits) {
                    out.copy_from_slice(&word.to_le_bytes());
                }
            }
        }
        UnitSet::from_bytes(block.units, &bytes)
            .expect("the store never sets a bit past a block's last unit")
    }

    fn check(&self, block: usize, extent: Extent) -> Result<()> {
        let units = self.block(block)?.units;
        match extent.start.checked_add(extent.len) {
            Some(end) if end <= units => Ok(()),
            end => Err(Error::OutOfBlock {
                block,
                start: extent.start,
                end: end.unwrap_or(u64::MAX),
                units,
            }),
        }
    }

    fn block(&self, block: usize) -> Result<&Block> {
        self.blocks.get(block).ok_or(Error::NoSuchBlock {
            block,
            blocks: self.blocks.len(),
        })
    }

    fn chunk(&self, block: usize, unit: u64) -> Result<MutexGuard<'_, Option<Box<Chunk>>>> {
        let found = self.block(block)?;
        if unit >= found.units {
            return Err(Error::OutOfBlock {
                block,
                start: unit,
                end: unit.saturating_add(1),
                units: found.units,
            });
        }
        Ok(lock(&found.chunks[(unit / CHUNK) as usize]))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts those who wait, so that an arrival without any costs no wake-up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn store(units: u64) -> RamStore {
        RamStore::new(&[RamBlock {
            name: "pc.ram".into(),
            len: units * UNIT,
            page_size: UNIT,
        }])
        .expect("small")
    }

    fn page(fill: u8) -> Vec<u8> {
        vec![fill; UNIT as usize]
    }

    #[test]
    fn memory_shrinks_when_a_chunk_is_released() {
        let store = store(CHUNK * 2);
        for unit in 0..CHUNK {
            store.put(0, unit, &page(1)).expect("in block");
        }
        store.put(0, CHUNK, &page(2)).expect("in block");
        assert_eq!(store.memory(), 2 * CHUNK_BYTES as u64);
        store.release(0, Extent::new(0, CHUNK)).expect("in block");
        assert_eq!(store.memory(), CHUNK_BYTES as u64);
        assert!(matches!(
            store.read(0, 5, 1, &mut Vec::new()),
            Err(Error::Released { unit: 5, .. })
        ));
        store.put_zero(0, CHUNK).expect("in block");
        assert_eq!(store.memory(), 0);
    }

    #[test]
    fn a_stale_unit_is_not_read_until_it_arrives() {
        let store = store(10);
        store.put(0, 3, &page(1)).expect("in block");
        store.mark_stale(0, Extent::new(3, 2)).expect("in block");
        assert_eq!(store.stale_left(), 2);
        assert!(matches!(
            store.read(0, 3, 1, &mut Vec::new()),
            Err(Error::NotCurrent { unit: 3, .. })
        ));
        store.put(0, 3, &page(9)).expect("in block");
        store.put_zero(0, 4).expect("in block");
        let mut out = Vec::new();
        store.read(0, 3, 2, &mut out).expect("current");
        assert_eq!(out, [page(9), page(0)].concat());
        assert!(store.is_current(0, Extent::new(0, 10)));
    }

    #[tokio::test]
    async fn a_demand_waits_for_its_page() {
        let store = std::sync::Arc::new(store(10));
        store.mark_stale(0, Extent::new(0, 10)).expect("in block");
        let waiter = tokio::spawn({
            let store = store.clone();
            async move { store.wait_current(0, Extent::new(7, 2)).await }
        });
        for unit in 0..9 {
            store.put(0, unit, &page(1)).expect("in block");
            tokio::task::yield_now().await;
        }
        waiter.await.expect("woken");
        assert_eq!(store.stale_left(), 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u64, u8),
        Zero(u64),
        Stale(u64, u64),
        Release(u64, u64),
    }

    fn step(units: u64) -> impl Strategy<Value = Step> {
        let run = move || (0..units).prop_flat_map(move |s| (Just(s), 0..=units - s));
        prop_oneof![
            (0..units, 1u8..).prop_map(|(u, f)| Step::Put(u, f)),
            (0..units).prop_map(Step::Zero),
            run().prop_map(|(s, n)| Step::Stale(s, n)),
            run().prop_map(|(s, n)| Step::Release(s, n)),
        ]
    }

    proptest! {
        #[test]
        fn the_store_agrees_with_a_map(steps in proptest::collection::vec(step(CHUNK + 40), 1..60)) {
            let store = store(CHUNK + 40);
            let mut model: HashMap<u64, (UnitState, u8)> = HashMap::new();
            for step in steps {
                match step {
                    Step::Put(u, fill) => {
                        store.put(0, u, &page(fill)).expect("in block");
                        model.insert(u, (UnitState::Held, fill));
                    }
                    Step::Zero(u) => {
                        store.put_zero(0, u).expect("in block");
                        model.insert(u, (UnitState::Zero, 0));
                    }
                    Step::Stale(s, n) => {
                        store.mark_stale(0, Extent::new(s, n)).expect("in block");
                        model.extend((s..s + n).map(|u| (u, (UnitState::Stale, 0))));
                    }
                    Step::Release(s, n) => {
                        store.release(0, Extent::new(s, n)).expect("in block");
                        for u in s..s + n {
                            if let Some((state @ UnitState::Held, _)) = model.get_mut(&u) {
                                *state = UnitState::Released;
                            }
                        }
                    }
                }
            }
            let mut stale = 0;
            for unit in 0..CHUNK + 40 {
                let (state, fill) = model.get(&unit).copied().unwrap_or((UnitState::Absent, 0));
                prop_assert_eq!(store.state(0, unit), state);
                stale += u64::from(state == UnitState::Stale);
                let mut out = Vec::new();
                match (state, store.read(0, unit, 1, &mut out)) {
                    (UnitState::Stale | UnitState::Released, Err(_)) => {}
                    (UnitState::Held | UnitState::Zero | UnitState::Absent, Ok(())) => prop_assert_eq!(out, page(fill)),
                    (_, result) => prop_assert!(false, "{:?} read as {:?}", state, result),
                }
            }
            prop_assert_eq!(store.stale_left(), stale);
            prop_assert_eq!(store.stale(0).len(), stale);
        }
    }
}
