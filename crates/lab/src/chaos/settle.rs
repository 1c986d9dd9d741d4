//! What became of a move: both daemons' words, both hosts' processes and the guest's reports, until they
//! agree on one of the outcomes.

use super::cell::Outcome;
use super::{NAME, latest};
use crate::net::Host;
use crate::pair::answers::{MachineStatus, MigrationState, MigrationView, Phase};
use crate::pair::{Guest, Pair, PairError};
use std::time::{Duration, Instant};

/// How long a move may take to come to its outcome by itself, the link's rest and a daemon's start included.
const SETTLED_WITHIN: Duration = Duration::from_secs(80);

/// A guest that has said nothing for so long waits for something that does not come.
const SILENT: Duration = Duration::from_secs(15);

const LOOK: Duration = Duration::from_millis(100);

/// How long the guest may take to report.
const REPORTS_WITHIN: Duration = Duration::from_secs(30);

/// One side.
#[derive(Clone, Debug)]
pub struct Side {
    pub machine: Option<MachineStatus>,
    pub migration: Option<MigrationView>,
    pub qemus: usize,
}

impl Side {
    fn look(pair: &Pair, host: Host) -> Result<Side, PairError> {
        Ok(Side {
            machine: pair.machine(host, NAME)?.map(|view| view.status),
            migration: latest(pair, host),
            qemus: pair.site(host).qemus().len(),
        })
    }

    /// Nothing of the machine is here, except what it left when it went.
    fn is_without(&self) -> bool {
        matches!(self.machine, None | Some(MachineStatus::Departed)) && self.qemus == 0
    }

    fn is_over(&self) -> bool {
        let over =
            |v: &MigrationView| matches!(v.phase, Phase::Complete | Phase::Cancel | Phase::Rewind);
        self.migration.as_ref().is_none_or(over)
    }

    fn is_completed(&self) -> bool {
        let completed = |v: &MigrationView| v.state == MigrationState::Completed;
        self.migration.as_ref().is_none_or(completed)
    }

    fn needs_operator(&self) -> bool {
        let needs = |v: &MigrationView| v.state == MigrationState::NeedsOperator;
        self.migration.as_ref().is_some_and(needs)
    }

    /// As it is told in a report.
    pub fn text(&self) -> String {
        let machine = self
            .machine
            .map_or("no machine".to_owned(), |m| format!("{m:?}"));
        let migration = self.migration.as_ref().map_or("no move".to_owned(), |v| {
            let error = v.error.as_ref().map_or("", |e| e.what.as_str());
            format!("{} {:?} {error}", v.phase, v.state)
        });
        format!(
            "{machine}, {} QEMU, {}",
            self.qemus,
            migration.trim_end().to_lowercase()
        )
    }
}

/// Both sides, source first.
#[derive(Clone, Debug)]
pub struct Sides {
    pub source: Side,
    pub destination: Side,
}

impl Sides {
    pub fn look(pair: &Pair, from: Host) -> Result<Sides, PairError> {
        Ok(Sides {
            source: Side::look(pair, from)?,
            destination: Side::look(pair, from.other())?,
        })
    }

    pub fn text(&self) -> String {
        format!("{} | {}", self.source.text(), self.destination.text())
    }

    /// The outcome, if all agree on one. `silent`: the guest says nothing any more.
    fn outcome(&self, silent: bool) -> Option<Outcome> {
        let (here, there) = (&self.source, &self.destination);
        let departed = here.machine == Some(MachineStatus::Departed);
        let over = here.is_over() && there.is_over();
        let completed = over && here.is_completed() && there.is_completed();
        match (here.machine?, there.machine) {
            (MachineStatus::Running, _) if here.qemus == 1 && there.is_without() && over => {
                Some(Outcome::Source)
            }
            (_, Some(MachineStatus::Running)) if departed && there.qemus == 1 && completed => {
                (here.qemus == 0).then_some(Outcome::Destination)
            }
            // It waits for a page: its guest, or its loading of the devices, which the daemon waits for.
            _ if silent && departed && !over && here.qemus == 0 && there.qemus == 1 => {
                Some(Outcome::Starved)
            }
            (MachineStatus::Crashed, _)
                if here.qemus == 0
                    && there.is_without()
                    && there.is_over()
                    && (here.is_over() || here.needs_operator()) =>
            {
                Some(Outcome::CrashedAtSource)
            }
            (_, Some(MachineStatus::Crashed)) if departed && here.qemus + there.qemus == 0 => {
                completed.then_some(Outcome::CrashedAtDestination)
            }
            _ if departed && there.needs_operator() && here.qemus == 1 && there.qemus == 0 => {
                Some(Outcome::Paused)
            }
            _ => None,
        }
    }
}

/// Waits until all agree on an outcome, on another than `except` if that is given; `None` with what they say
/// if they do not in time.
pub fn settle(
    pair: &Pair,
    guest: &mut Guest,
    from: Host,
    except: Option<Outcome>,
) -> Result<(Option<Outcome>, Sides), PairError> {
    let began = Instant::now();
    loop {
        let sides = Sides::look(pair, from)?;
        guest.listen();
        let heard = guest.reports().last().map_or(began, |(at, _)| *at);
        let outcome = sides.outcome(heard.max(began).elapsed() > SILENT);
        if (outcome.is_some() && outcome != except) || began.elapsed() > SETTLED_WITHIN {
            return Ok((outcome, sides));
        }
        std::thread::sleep(LOOK);
    }
}

/// Sentences about a surviving guest that is not well.
pub fn is_well(guest: &mut Guest) -> Vec<String> {
    for _ in 0..2 {
        if let Err(error) = guest.wait_for_report(REPORTS_WITHIN) {
            return vec![format!("the guest does not work on: {error}")];
        }
    }
    match guest.errors() {
        0 => Vec::new(),
        errors => vec![format!("the guest found {errors} errors")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(machine: Option<MachineStatus>, qemus: usize) -> Side {
        Side {
            machine,
            migration: None,
            qemus,
        }
    }

    fn outcome(source: Side, destination: Side) -> Option<Outcome> {
        let sides = Sides {
            source,
            destination,
        };
        sides.outcome(false)
    }

    #[test]
    fn one_machine_runs_or_there_is_no_outcome() {
        use MachineStatus::{Arriving, Crashed, Departed, Paused, Running};
        let running = || side(Some(Running), 1);
        assert_eq!(outcome(running(), side(None, 0)), Some(Outcome::Source));
        let departed = || side(Some(Departed), 0);
        assert_eq!(outcome(departed(), running()), Some(Outcome::Destination));
        assert_eq!(
            outcome(side(Some(Crashed), 0), departed()),
            Some(Outcome::CrashedAtSource)
        );
        assert_eq!(
            outcome(departed(), side(Some(Crashed), 0)),
            Some(Outcome::CrashedAtDestination)
        );
        // Two of them, leftovers, and what is half done.
        assert_eq!(outcome(running(), running()), None);
        assert_eq!(outcome(running(), side(None, 1)), None);
        assert_eq!(outcome(running(), side(Some(Arriving), 0)), None);
        assert_eq!(outcome(side(Some(Departed), 1), running()), None);
        assert_eq!(outcome(side(Some(Paused), 1), side(None, 0)), None);
    }
}
