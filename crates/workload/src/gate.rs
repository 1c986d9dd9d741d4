//! What the threads share: each workload's gate with its pace and counters, the faults, the acknowledged
//! numbers, and the two words "pause" and "stop".

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use whimbrel_workload::params::{Pace, Params};
use whimbrel_workload::report::{
    Ack, FAULTS_KEPT, Fault, FaultLine, Line, Operation, Totals, Workload,
};

/// Longest sleep before a gate looks again whether it is to stop, pause or go faster.
const NAP: Duration = Duration::from_millis(25);

/// One workload's pace and counters.
#[derive(Default)]
pub struct Stage {
    /// 0 off, `u64::MAX` max, otherwise units per second.
    rate: AtomicU64,
    parked: AtomicBool,
    /// Units done: pages, records, blocks or bytes.
    pub done: AtomicU64,
    /// Of the second kind: random checks, files read.
    pub also: AtomicU64,
    /// Microseconds of the slowest operation of this interval.
    pub slowest_us: AtomicU64,
}

impl Stage {
    fn new(pace: Pace) -> Self {
        let stage = Stage::default();
        stage.set_pace(pace);
        stage
    }

    pub fn set_pace(&self, pace: Pace) {
        let rate = match pace {
            Pace::Off => 0,
            Pace::PerSecond(n) => u64::from(n),
            Pace::Max => u64::MAX,
        };
        self.rate.store(rate, Relaxed);
    }

    pub fn pace(&self) -> Pace {
        match self.rate.load(Relaxed) {
            0 => Pace::Off,
            u64::MAX => Pace::Max,
            n => Pace::PerSecond(u32::try_from(n).unwrap_or(u32::MAX)),
        }
    }

    /// Counts an operation begun at `began`.
    pub fn took(&self, began: Instant) {
        let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.slowest_us.fetch_max(us, Relaxed);
    }

    /// The workload waits: it is paused, off, or ended.
    pub fn park(&self) {
        self.parked.store(true, Relaxed);
    }
}

pub struct Shared {
    pub params: Params,
    stages: [Stage; 5],
    pub tick_us: AtomicU64,
    pub echoes: AtomicU64,
    pub unsent: AtomicU64,
    pub fsynced_seq: AtomicU64,
    pub fsynced_generation: AtomicU64,
    pub paused: AtomicBool,
    pub stopping: AtomicBool,
    errors: AtomicU64,
    faults: Mutex<Vec<Fault>>,
}

impl Shared {
    pub fn new(params: Params) -> Self {
        let stages = Workload::ALL.map(|workload| {
            Stage::new(match workload {
                Workload::Ram => params.ram.pace,
                Workload::Sweep => params.ram.sweep,
                Workload::Log => params.log.pace,
                Workload::Random => params.random.pace,
                Workload::Read => params.read.pace,
            })
        });
        Shared {
            params,
            stages,
            tick_us: AtomicU64::new(0),
            echoes: AtomicU64::new(0),
            unsent: AtomicU64::new(0),
            fsynced_seq: AtomicU64::new(0),
            fsynced_generation: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            errors: AtomicU64::new(0),
            faults: Mutex::new(Vec::new()),
        }
    }

    pub fn stage(&self, workload: Workload) -> &Stage {
        &self.stages[workload as usize]
    }

    pub fn stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    /// Whether every workload stands still.
    pub fn parked(&self) -> bool {
        self.stages.iter().all(|stage| stage.parked.load(Relaxed))
    }

    pub fn errors(&self) -> u64 {
        self.errors.load(Relaxed)
    }

    /// The first [`FAULTS_KEPT`].
    pub fn faults(&self) -> Vec<Fault> {
        self.lock_faults().clone()
    }

    // A thread that died while it held the list has at worst left one fault out of it.
    fn lock_faults(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a fault; the first [`FAULTS_KEPT`] are kept and printed, the rest only counted.
    pub fn fault(&self, fault: Fault) {
        self.errors.fetch_add(1, Relaxed);
        let mut faults = self.lock_faults();
        if faults.len() < FAULTS_KEPT {
            println!(
                "{}",
                Line::Fault(FaultLine {
                    fault: fault.clone()
                })
                .to_json()
            );
            faults.push(fault);
        }
    }

    /// Counts a failed operation.
    pub fn io_fault(&self, workload: Workload, operation: Operation, error: &std::io::Error) {
        self.fault(Fault::Io {
            workload,
            operation,
            errno: error.raw_os_error(),
        });
    }

    pub fn ack(&self) -> Ack {
        Ack {
            seq: self.fsynced_seq.load(Relaxed),
            generation: self.fsynced_generation.load(Relaxed),
        }
    }

    pub fn totals(&self) -> Totals {
        let done = |workload| self.stage(workload).done.load(Relaxed);
        let also = |workload| self.stage(workload).also.load(Relaxed);
        Totals {
            ram_pages: done(Workload::Ram),
            ram_checks: done(Workload::Sweep),
            log_records: done(Workload::Log),
            random_writes: done(Workload::Random),
            random_checks: also(Workload::Random),
            files_read: also(Workload::Read),
            read_bytes: done(Workload::Read),
            echoes: self.echoes.load(Relaxed),
            unsent: self.unsent.load(Relaxed),
        }
    }

    /// Sleeps, in naps, unless the guest is stopping.
    pub fn sleep(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.stopping() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

/// A workload's way through its gate, a token bucket that is filled at the stage's pace.
pub struct Gate<'a> {
    shared: &'a Shared,
    stage: &'a Stage,
    filled: Instant,
    tokens: f64,
}

/// What a gate answers without waiting.
pub enum Turn {
    Go,
    Wait(Duration),
}

impl<'a> Gate<'a> {
    pub fn new(shared: &'a Shared, workload: Workload) -> Self {
        Gate {
            shared,
            stage: shared.stage(workload),
            filled: Instant::now(),
            tokens: 0.0,
        }
    }

    /// Units worth doing between two looks at the clock: a 200th of a second's, 1 to 512.
    pub fn batch(&self) -> u64 {
        match self.stage.rate.load(Relaxed) {
            u64::MAX => 512,
            rate => (rate / 200).clamp(1, 512),
        }
    }

    /// Whether `cost` units may be done now. Spends before it earns: a turn is granted while the bucket
    /// is not in debt, so that a cost above a second's pace still has its turn. What was not used is
    /// kept for a tenth of a second, so that a guest that stood still does not race afterwards.
    pub fn ask(&mut self, cost: u64) -> Turn {
        let rate = self.stage.rate.load(Relaxed);
        if rate == 0 || self.shared.paused.load(Relaxed) {
            self.stage.park();
            self.filled = Instant::now();
            self.tokens = 0.0;
            return Turn::Wait(NAP);
        }
        self.stage.parked.store(false, Relaxed);
        if rate == u64::MAX {
            return Turn::Go;
        }
        let rate = rate as f64;
        let now = Instant::now();
        self.tokens += now.duration_since(self.filled).as_secs_f64() * rate;
        self.tokens = self.tokens.min(rate / 10.0);
        self.filled = now;
        if self.tokens >= 0.0 {
            self.tokens -= cost as f64;
            return Turn::Go;
        }
        Turn::Wait(Duration::from_secs_f64(-self.tokens / rate).min(NAP))
    }

    /// Waits until `cost` units may be done; `false` once the guest is stopping.
    pub fn pass(&mut self, cost: u64) -> bool {
        while !self.shared.stopping() {
            match self.ask(cost) {
                Turn::Go => return true,
                Turn::Wait(time) => std::thread::sleep(time),
            }
        }
        self.stage.park();
        false
    }
}
