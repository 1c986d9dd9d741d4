//! What a run, or many, have been through.

use std::collections::BTreeMap;

use whimbrel_engine::switchover::Phase;

use crate::link::Side;
use crate::scenario::{KINDS, Mishap};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Completed,
    Cancelled,
    Rewound,
    /// A state that documentation leaves to a person, and that was said.
    Operator,
}

/// Counters.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    pub runs: u64,
    pub events: u64,
    pub virtual_ns: u128,
    pub outcomes: BTreeMap<Outcome, u64>,
    pub phases: BTreeMap<(Side, Phase), u64>,
    /// By kind of mishap, and the source's phase when it struck.
    pub struck: BTreeMap<(usize, Phase), u64>,
    /// Things that are rare and worth knowing to have happened.
    pub deeds: BTreeMap<&'static str, u64>,
}

impl Coverage {
    pub fn phase(&mut self, side: Side, phase: Phase) {
        *self.phases.entry((side, phase)).or_default() += 1;
    }

    pub fn strike(&mut self, mishap: &Mishap, phase: Phase) {
        *self.struck.entry((mishap.kind(), phase)).or_default() += 1;
    }

    pub fn deed(&mut self, what: &'static str) {
        *self.deeds.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, other: &Coverage) {
        self.runs += other.runs;
        self.events += other.events;
        self.virtual_ns += other.virtual_ns;
        add(&mut self.outcomes, &other.outcomes);
        add(&mut self.phases, &other.phases);
        add(&mut self.struck, &other.struck);
        add(&mut self.deeds, &other.deeds);
    }
}

fn add<K: Ord + Copy>(to: &mut BTreeMap<K, u64>, from: &BTreeMap<K, u64>) {
    for (&key, &count) in from {
        *to.entry(key).or_default() += count;
    }
}

const PHASES: [Phase; 8] = [
    Phase::Prepare,
    Phase::Copy,
    Phase::Quiesce,
    Phase::Grant,
    Phase::Drain,
    Phase::Complete,
    Phase::Cancel,
    Phase::Rewind,
];

impl std::fmt::Display for Coverage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hours = self.virtual_ns as f64 / 3.6e12;
        writeln!(
            f,
            "{} runs, {} events, {hours:.0} h of virtual time",
            self.runs, self.events
        )?;
        for (outcome, count) in &self.outcomes {
            writeln!(f, "  {outcome:?}: {count}")?;
        }
        write!(f, "{:<26}", "struck, by source's phase")?;
        for phase in PHASES {
            write!(f, "{:>10}", phase.name())?;
        }
        writeln!(f)?;
        for (kind, name) in KINDS.iter().enumerate() {
            if !self.struck.keys().any(|key| key.0 == kind) {
                continue;
            }
            write!(f, "{name:<26}")?;
            for phase in PHASES {
                let count = self.struck.get(&(kind, phase)).copied().unwrap_or(0);
                write!(f, "{count:>10}")?;
            }
            writeln!(f)?;
        }
        for (deed, count) in &self.deeds {
            writeln!(f, "{deed:<58}{count:>10}")?;
        }
        Ok(())
    }
}
