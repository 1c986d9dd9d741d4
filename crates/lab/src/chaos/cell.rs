//! The cells: what is done, at which moment of a move, and what the crash table in `docs/switchover.md` says
//! comes of it.

use crate::pair::answers::Phase;
use std::fmt;

/// What is killed with SIGKILL, or cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    SourceDaemon,
    DestinationDaemon,
    SourceQemu,
    DestinationQemu,
    /// Both ways, for some seconds.
    Link,
}

impl Victim {
    pub const ALL: [Victim; 5] = [
        Victim::SourceDaemon,
        Victim::DestinationDaemon,
        Victim::SourceQemu,
        Victim::DestinationQemu,
        Victim::Link,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Victim::SourceDaemon => "source-daemon",
            Victim::DestinationDaemon => "destination-daemon",
            Victim::SourceQemu => "source-qemu",
            Victim::DestinationQemu => "destination-qemu",
            Victim::Link => "link",
        }
    }

    /// Of the four processes; a link is none.
    pub fn is_daemon(self) -> bool {
        matches!(self, Victim::SourceDaemon | Victim::DestinationDaemon)
    }
}

/// A moment of a move, and how it is made to last or is met, from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The destination's QEMU, just started, is stopped by SIGSTOP: it cannot be made ready.
    Starting,
    /// `--hold`: memory is being copied, or has been.
    Held,
    /// The source's QEMU is stopped by SIGSTOP before the order to switch: it is not heard.
    BeforeStop,
    /// A few drawn milliseconds after the daemon gave its QEMU the end of the stream to keep, the last thing
    /// before the stop is asked for.
    InStop,
    /// The link is cut when the stop is asked for: the grant is said and does not arrive. Acted upon when the
    /// stopped guest's last pages have come.
    Unheard,
    /// As [`Unheard`](Self::Unheard), and acted upon as soon as the grant is in the journal.
    UnheardAtOnce,
    /// The destination's daemon is stopped by SIGSTOP when the stop is asked for: the grant reaches its socket
    /// and is not read.
    Unread,
    /// The destination's QEMU is stopped by SIGSTOP when the stop is asked for: it is given the machine, and
    /// does not take it.
    Loading,
    /// A few drawn milliseconds after `accepted` is in the journal.
    Accepted,
    /// On a slow link, a drawn while after `peer-accepted` is in the journal.
    Draining,
    /// As soon as `completed` is in the source's journal.
    Completed,
}

impl Moment {
    pub const ALL: [Moment; 11] = [
        Moment::Starting,
        Moment::Held,
        Moment::BeforeStop,
        Moment::InStop,
        Moment::Unheard,
        Moment::UnheardAtOnce,
        Moment::Unread,
        Moment::Loading,
        Moment::Accepted,
        Moment::Draining,
        Moment::Completed,
    ];

    pub fn phase(self) -> Phase {
        match self {
            Moment::Starting => Phase::Prepare,
            Moment::Held => Phase::Copy,
            Moment::BeforeStop | Moment::InStop => Phase::Quiesce,
            Moment::Unheard | Moment::UnheardAtOnce | Moment::Unread => Phase::Grant,
            Moment::Loading | Moment::Accepted => Phase::Accept,
            Moment::Draining => Phase::Drain,
            Moment::Completed => Phase::Complete,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Moment::Starting => "starting",
            Moment::Held => "held",
            Moment::BeforeStop => "before-stop",
            Moment::InStop => "in-stop",
            Moment::Unheard => "unheard",
            Moment::UnheardAtOnce => "unheard-at-once",
            Moment::Unread => "unread",
            Moment::Loading => "loading",
            Moment::Accepted => "accepted",
            Moment::Draining => "draining",
            Moment::Completed => "completed",
        }
    }
}

/// What a run may come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs on at the source; nothing of it is at the destination.
    Source,
    /// The guest runs at the destination; the move is complete.
    Destination,
    /// The guest crashed with its QEMU; its machine and disks are the source's.
    CrashedAtSource,
    /// The guest crashed with its QEMU; the move of its disks is complete.
    CrashedAtDestination,
    /// Nobody runs it: the destination needs an operator, at the source the guest is paused.
    Paused,
    /// The guest at the destination, or its QEMU that loads it, waits for memory that is gone.
    Starved,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Source => "runs at source",
            Outcome::Destination => "runs at destination",
            Outcome::CrashedAtSource => "crashed, disks at source",
            Outcome::CrashedAtDestination => "crashed, disks at destination",
            Outcome::Paused => "paused, needs operator",
            Outcome::Starved => "waits for lost memory",
        }
    }

    /// Whether the guest lives.
    pub fn survives(self) -> bool {
        matches!(self, Outcome::Source | Outcome::Destination)
    }
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    pub moment: Moment,
    pub victim: Victim,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell { moment, victim } = self;
        let text = format!("{}/{}/{}", moment.phase(), victim.name(), moment.name());
        f.pad(&text)
    }
}

impl Cell {
    /// Every cell, in the order of the phases. Where a phase has several moments, the second and third are
    /// there for whom the first may be of no interest.
    pub fn all() -> Vec<Cell> {
        let cells = Moment::ALL.into_iter().flat_map(|moment| {
            let of = move |victim| Cell { moment, victim };
            Victim::ALL.into_iter().map(of)
        });
        cells.filter(|cell| cell.left_out().is_none()).collect()
    }

    /// Why there is no such cell, if there is none.
    pub fn left_out(&self) -> Option<&'static str> {
        use Victim::*;
        match (self.moment, self.victim) {
            (Moment::InStop, DestinationQemu | Link) => {
                Some("neither has a part in the stop; `before-stop` has both")
            }
            (Moment::UnheardAtOnce, victim) if victim != SourceQemu => Some(
                "only what the source's QEMU has not delivered yet makes a difference to `unheard`",
            ),
            (Moment::Unread, victim) if victim != SourceDaemon => Some(
                "only after the source's daemon is it of interest that the grant arrives all the same",
            ),
            (Moment::Accepted, SourceQemu | Link) => {
                Some("the guest misses nothing of either in these milliseconds; `loading` has both")
            }
            _ => None,
        }
    }

    /// What the crash table says, by the phase that was hit.
    pub fn expected(&self) -> &'static [Outcome] {
        expected(self.moment.phase(), self.victim, self.moment)
    }
}

/// What the crash table says of a phase and a victim. The moment is asked where the table itself goes on.
pub fn expected(phase: Phase, victim: Victim, moment: Moment) -> &'static [Outcome] {
    use Outcome::*;
    use Victim::*;
    match (phase, victim) {
        (Phase::Prepare | Phase::Copy, SourceDaemon | DestinationDaemon) => &[Source],
        // "The machine is `crashed`."
        (Phase::Prepare | Phase::Copy | Phase::Quiesce, SourceQemu) => &[CrashedAtSource],
        // Refused at once, or at the grant.
        (Phase::Prepare | Phase::Copy | Phase::Quiesce | Phase::Grant, DestinationQemu) => {
            &[Source]
        }
        (_, Link) => &[Destination],
        (Phase::Quiesce, SourceDaemon) => &[Source],
        // "Not noticed here, see grant."
        (Phase::Quiesce | Phase::Grant, DestinationDaemon) => &[Source],
        // The destination has heard the grant, or it has not: the kernel of a dead daemon still says it.
        (Phase::Grant, SourceDaemon) => &[Source, Destination],
        (Phase::Grant, SourceQemu) if moment == Moment::Unheard => &[Destination],
        (Phase::Grant, SourceQemu) => &[Destination, Starved],
        // "Before its guest ran: refused." After: as in drain; or it is known only that it wrote.
        (Phase::Accept, DestinationQemu) if moment == Moment::Loading => &[Source],
        (Phase::Accept, DestinationQemu) => &[Source, CrashedAtDestination, Paused],
        // The guest never ran, or runs, or its QEMU ended by itself and nobody knows.
        (Phase::Accept, DestinationDaemon) => &[Source, Destination, Paused],
        (Phase::Accept | Phase::Drain | Phase::Complete, SourceDaemon | SourceQemu) => {
            &[Destination]
        }
        (Phase::Drain | Phase::Complete, DestinationDaemon) => &[Destination],
        (Phase::Drain | Phase::Complete, DestinationQemu) => &[CrashedAtDestination],
        // Nothing is hit after the end.
        (Phase::Run | Phase::Cancel | Phase::Rewind, _) => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_phase_has_every_victim() {
        let cells = Cell::all();
        let pairs: BTreeSet<(Phase, &str)> = cells
            .iter()
            .map(|cell| (cell.moment.phase(), cell.victim.name()))
            .collect();
        assert_eq!(pairs.len(), 7 * Victim::ALL.len());
        assert!(cells.iter().all(|cell| !cell.expected().is_empty()));
    }

    #[test]
    fn names_are_unique() {
        let cells = Cell::all();
        let names: BTreeSet<String> = cells.iter().map(Cell::to_string).collect();
        assert_eq!(names.len(), cells.len());
    }
}
