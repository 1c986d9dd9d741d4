//! The two disk writers: an append log whose every fsync is told to the client, and random blocks.
//!
//! Both keep their place over a restart of the guest (a power cut included). What an fsync covered must
//! be there again; what was written after the last fsync may be there or not, in any order. So on
//! opening, the log goes on after its last record, and the random writer *redoes* the writes of its last
//! window that did not arrive: from then on the single number of the last fsync again says what every
//! block must hold. A write missing from before that window is a fault.

use crate::gate::{Gate, Shared};
use crate::net::Reporter;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use whimbrel_workload::cell::Broken;
use whimbrel_workload::chance::Rng;
use whimbrel_workload::replay::{BLOCK, GEOMETRY_FILE, Geometry, LOG_FILE, RANDOM_FILE, WORK_DIR};
use whimbrel_workload::report::{Fault, Operation, Workload};
use whimbrel_workload::{Error, params::Params};

/// Wait after a failed operation: a dead disk gives a few faults a second, not a flood.
const AFTER_FAULT: Duration = Duration::from_millis(500);

/// The disk's layout: what an earlier run left there, otherwise from the parameters.
pub fn geometry(params: &Params) -> Result<Geometry, Error> {
    let dir = params.dir.join(WORK_DIR);
    let path = dir.join(GEOMETRY_FILE);
    let failed = |action, path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    };
    if path.exists() {
        let json = std::fs::read(&path).map_err(failed("read", &path))?;
        return serde_json::from_slice(&json).map_err(|source| Error::Json { path, source });
    }
    let mib = |n: u32| u64::from(n) << 20;
    let geometry = Geometry {
        seed: params.seed,
        record_bytes: params.log.record_bytes,
        log_batch: params.log.batch,
        log_slots: mib(params.log.max_mib) / u64::from(params.log.record_bytes),
        random_blocks: mib(params.random.file_mib) / BLOCK as u64,
        sync_every: params.random.sync_every,
    };
    std::fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
    let json = serde_json::to_vec(&geometry).expect("a plain struct serialises");
    // Beside it and renamed, so that a power cut leaves either no layout or a whole one.
    let new = dir.join("geometry.new");
    std::fs::write(&new, json).map_err(failed("write", &new))?;
    File::open(&new)
        .and_then(|f| f.sync_all())
        .map_err(failed("sync", &new))?;
    std::fs::rename(&new, &path).map_err(failed("rename", &path))?;
    File::open(&dir)
        .and_then(|f| f.sync_all())
        .map_err(failed("sync", &dir))?;
    Ok(geometry)
}

/// The append log.
pub struct Log {
    file: File,
    geometry: Geometry,
    /// Last record written.
    seq: u64,
    record: Vec<u8>,
}

impl Log {
    /// Opens the log of the disk in `dir` and finds its last record.
    pub fn open(dir: &Path, geometry: Geometry, shared: &Shared) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(WORK_DIR).join(LOG_FILE))?;
        let bytes = geometry.record_bytes as usize;
        let mut log = Log {
            file,
            geometry,
            seq: 0,
            record: vec![0; bytes],
        };
        let slots = log.file.metadata()?.len() / bytes as u64;
        let mut found = Vec::new();
        for slot in 0..slots.min(geometry.log_slots) {
            log.file
                .read_exact_at(&mut log.record, slot * bytes as u64)?;
            let opened = geometry.log_place(slot).open(&log.record);
            log.seq = log.seq.max(opened.unwrap_or(0));
            found.push(opened);
        }
        // Of the records up to the last one found, those of the last batch need not have arrived.
        let sure = log.seq.saturating_sub(u64::from(geometry.log_batch));
        for (slot, opened) in found.into_iter().enumerate() {
            let Some(least) = geometry.least_seq(slot as u64, sure) else {
                continue;
            };
            // A slot that the batch may have been overwriting may hold anything.
            if least + geometry.log_slots <= log.seq + u64::from(geometry.log_batch) {
                continue;
            }
            match opened {
                Ok(seq) if seq >= least => {}
                Ok(_) => shared.fault(Fault::LogLost {
                    seq: least,
                    broken: None,
                }),
                Err(broken) => shared.fault(Fault::LogLost {
                    seq: least,
                    broken: Some(broken),
                }),
            }
        }
        Ok(log)
    }

    pub fn last_seq(&self) -> u64 {
        self.seq
    }

    /// Rewrites the last batch's worth, of which a power cut may have left gaps, and makes it durable.
    fn settle(&mut self) -> io::Result<()> {
        let last = self.seq;
        let first = last.saturating_sub(u64::from(self.geometry.log_batch)) + 1;
        for seq in first..=last {
            self.write(seq)?;
        }
        self.file.sync_all()
    }

    fn write(&mut self, seq: u64) -> io::Result<()> {
        let slot = self.geometry.slot(seq);
        self.geometry.log_place(slot).seal(seq, &mut self.record);
        self.file
            .write_all_at(&self.record, slot * u64::from(self.geometry.record_bytes))
    }

    /// Writes the next record.
    fn append(&mut self) -> io::Result<()> {
        self.write(self.seq + 1)?;
        self.seq += 1;
        Ok(())
    }
}

/// Runs the log until the guest stops; ends with an fsync.
pub fn run_log(mut log: Log, shared: &Shared, reporter: &Reporter) {
    let stage = shared.stage(Workload::Log);
    let mut gate = Gate::new(shared, Workload::Log);
    let failed = |operation, error: &io::Error| {
        shared.io_fault(Workload::Log, operation, error);
        shared.sleep(AFTER_FAULT);
    };
    let acknowledge = |seq| {
        shared.fsynced_seq.store(seq, Relaxed);
        reporter.acknowledge(shared);
    };
    match log.settle() {
        Ok(()) => acknowledge(log.seq),
        Err(error) => failed(Operation::Sync, &error),
    }
    let batch = u64::from(log.geometry.log_batch);
    while gate.pass(1) {
        let began = Instant::now();
        if let Err(error) = log.append() {
            failed(Operation::Write, &error);
            continue;
        }
        stage.done.fetch_add(1, Relaxed);
        // The last sequence number an fsync must cover falls on the same multiples after a restart.
        if log.seq.is_multiple_of(batch) {
            match log.file.sync_all() {
                Ok(()) => acknowledge(log.seq),
                Err(error) => failed(Operation::Sync, &error),
            }
        }
        stage.took(began);
    }
    match log.file.sync_all() {
        Ok(()) => acknowledge(log.seq),
        Err(error) => failed(Operation::Sync, &error),
    }
}

/// O_DIRECT wants its memory aligned.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

/// The random writer's file.
pub struct Random {
    file: File,
    geometry: Geometry,
    /// Last write.
    generation: u64,
    /// Of each block the last write to it.
    generations: Vec<u64>,
    block: Box<Block>,
}

impl Random {
    /// Opens, preallocates and reads the file of the disk in `dir`; redoes what the last window lost.
    pub fn open(dir: &Path, geometry: Geometry, direct: bool, shared: &Shared) -> io::Result<Self> {
        use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};
        let mut flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        if direct {
            flags |= OFlags::DIRECT;
        }
        let path = dir.join(WORK_DIR).join(RANDOM_FILE);
        let file = File::from(rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?);
        let len = geometry.random_blocks * BLOCK as u64;
        let fresh = file.metadata()?.len() < len;
        if fresh && len > 0 {
            fallocate(&file, FallocateFlags::empty(), 0, len)?;
            file.sync_all()?;
        }
        let mut random = Random {
            file,
            geometry,
            generation: 0,
            generations: vec![0; geometry.random_blocks as usize],
            block: Box::new(Block([0; BLOCK])),
        };
        if !fresh {
            random.recover(shared)?;
        }
        Ok(random)
    }

    pub fn last_generation(&self) -> u64 {
        self.generation
    }

    /// The generation in a block; 0 for one never written.
    fn read(&mut self, block: u64) -> io::Result<Result<u64, Broken>> {
        self.file
            .read_exact_at(&mut self.block.0, block * BLOCK as u64)?;
        Ok(
            match self.geometry.random_place(block).open(&self.block.0) {
                Err(Broken::Zero) => Ok(0),
                opened => opened,
            },
        )
    }

    fn write(&mut self, generation: u64) -> io::Result<()> {
        let block = self.geometry.target(generation);
        self.geometry
            .random_place(block)
            .seal(generation, &mut self.block.0);
        self.file
            .write_all_at(&self.block.0, block * BLOCK as u64)?;
        self.generations[block as usize] = generation;
        Ok(())
    }

    fn recover(&mut self, shared: &Shared) -> io::Result<()> {
        let mut found = Vec::with_capacity(self.generations.len());
        for block in 0..self.geometry.random_blocks {
            let opened = self.read(block)?;
            self.generation = self.generation.max(opened.unwrap_or(0));
            found.push(opened);
        }
        self.generations = self.geometry.random_generations(self.generation);
        let sure = self
            .generation
            .saturating_sub(u64::from(self.geometry.sync_every));
        let least = self.geometry.random_generations(sure);
        for (index, opened) in found.into_iter().enumerate() {
            let block = index as u64;
            let expected = self.generations[index];
            match opened {
                Ok(generation) if generation == expected => continue,
                Ok(generation) if generation >= least[index] => {}
                Ok(generation) => shared.fault(Fault::RandomStale {
                    block,
                    expected: least[index],
                    found: generation,
                }),
                // A block that was being written may be torn.
                Err(_) if expected > sure => {}
                Err(broken) => shared.fault(Fault::RandomBroken { block, broken }),
            }
            if expected > 0 {
                self.write(expected)?;
            }
        }
        self.file.sync_all()
    }

    /// Reads a block back and holds it against the table.
    fn check(&mut self, block: u64, shared: &Shared) -> io::Result<()> {
        let expected = self.generations[block as usize];
        match self.read(block)? {
            Ok(found) if found == expected => {}
            Ok(found) => shared.fault(Fault::RandomStale {
                block,
                expected,
                found,
            }),
            Err(broken) => shared.fault(Fault::RandomBroken { block, broken }),
        }
        Ok(())
    }
}

/// Runs the random writer until the guest stops; ends with an fsync.
pub fn run_random(mut random: Random, shared: &Shared, reporter: &Reporter) {
    let stage = shared.stage(Workload::Random);
    let mut gate = Gate::new(shared, Workload::Random);
    let mut rng = Rng::new(shared.params.seed, 2);
    let blocks = random.geometry.random_blocks;
    let every = u64::from(random.geometry.sync_every);
    let failed = |operation, error: &io::Error| {
        shared.io_fault(Workload::Random, operation, error);
        shared.sleep(AFTER_FAULT);
    };
    let acknowledge = |generation| {
        shared.fsynced_generation.store(generation, Relaxed);
        reporter.acknowledge(shared);
    };
    acknowledge(random.generation);
    while gate.pass(1) {
        let began = Instant::now();
        // A write that failed is tried again under the same number: the sequence has no gaps.
        if let Err(error) = random.write(random.generation + 1) {
            failed(Operation::Write, &error);
            continue;
        }
        random.generation += 1;
        stage.done.fetch_add(1, Relaxed);
        if random.generation.is_multiple_of(every) {
            match random.file.sync_all() {
                Ok(()) => acknowledge(random.generation),
                Err(error) => failed(Operation::Sync, &error),
            }
        }
        if rng.below(100) < u64::from(shared.params.random.verify_percent) {
            if let Err(error) = random.check(rng.below(blocks), shared) {
                failed(Operation::Read, &error);
            }
            stage.also.fetch_add(1, Relaxed);
        }
        stage.took(began);
    }
    match random.file.sync_all() {
        Ok(()) => acknowledge(random.generation),
        Err(error) => failed(Operation::Sync, &error),
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
