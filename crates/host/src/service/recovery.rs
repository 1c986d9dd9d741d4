//! A machine whose move does not go on as it should: where it stands, what may be done, and what that gives up.
//!
//! After the grant only two things may happen to a machine: it arrives, or its source takes it back as it was at
//! the switchover. The second gives up what the guest did since, so nothing but an operator's explicit word does
//! it; and if the destination cannot be asked first, nothing but their word that it is lost.

use serde_json::json;
use whimbrel_engine::space::UNIT;
use whimbrel_engine::switchover::{Phase, Record};

use super::paused::ask;
use crate::api::types::*;
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::machines::Standing;
use crate::migration::record::{journal_written, read_journal};
use crate::state::{Name, Timestamp};

impl Daemon {
    pub(super) async fn recovery_of(&self, name: &Name) -> Result<RecoveryView, ApiError> {
        let machine = self.machine_named(name)?;
        let view = self.held_of(name)?.board.view();
        let folder = self.host.state.migration_folder(&view.id);
        let (records, _) = read_journal(&folder)?;
        let recorded_at = journal_written(&folder).map(Timestamp::from);
        let standing = machine.lock().await;
        let guest = guest_here(&standing).await;
        let absent = view.spaces.iter().map(|space| {
            let there = space.units_resident.min(space.units_live);
            space.units_live - there
        });
        let mut recovery = RecoveryView {
            machine: name.clone(),
            migration: view.id.clone(),
            peer: view.peer.clone(),
            direction: view.direction,
            phase: view.phase,
            state: view.state,
            epoch: standing.runtime.epoch,
            recorded: records.last().map_or_else(|| "nothing".to_string(), words),
            recorded_at,
            guest,
            link: view.link.clone(),
            absent: absent.sum::<u64>() * UNIT,
            choices: Vec::new(),
        };
        recovery.choices = choices(&recovery);
        Ok(recovery)
    }

    /// Whether the machine can be taken back the way that is asked for.
    pub(super) fn may_take_back(
        &self,
        name: &Name,
        request: &RecoverRequest,
    ) -> Result<(), ApiError> {
        let view = self.held_of(name)?.board.view();
        let wrong = |what: String| ApiError::new(ErrorCode::WrongState, what);
        if view.direction == Direction::Incoming {
            return Err(wrong(format!(
                "machine `{name}` comes from `{}`, and only its source can take it back",
                view.peer
            ))
            .machine_state("owned by this host, as far as it has arrived")
            .next_step(format!("on `{}`: whimbrel recover {name}", view.peer)));
        }
        if !matches!(view.phase, Phase::Grant | Phase::Drain) {
            let next = match view.phase {
                Phase::Complete => "migrate it back",
                phase if phase.is_final() => "nothing: the machine is this host's",
                _ => "`whimbrel cancel` ends the migration and loses nothing",
            };
            return Err(wrong(format!(
                "the migration of `{name}` is in phase {}: there is nothing to take back",
                view.phase
            ))
            .next_step(next));
        }
        match &request.lost {
            Some(lost) if *lost != view.peer => Err(ApiError::new(
                ErrorCode::Invalid,
                format!("machine `{name}` went to `{}`, not to `{lost}`", view.peer),
            )),
            Some(lost) if view.link.connected => Err(wrong(format!(
                "`{lost}` is not lost: this host is connected to it"
            ))
            .machine_state("as it was; nothing was done")
            .next_step("leave `--lost` away: then it ends its guest first, and nothing can run twice")),
            None if !view.link.connected => Err(ApiError::new(
                ErrorCode::PeerUnreachable,
                format!("`{0}` cannot be asked to end its guest: {1}", view.peer, waiting(&view.link)),
            )
            .machine_state("as it was; nothing was done")
            .next_step(format!(
                "bring the link back; or, if you are certain that the guest on `{0}` does not run and never will: whimbrel recover {name} --take-back --lost {0}",
                view.peer
            ))),
            Some(_) | None => Ok(()),
        }
    }
}

fn waiting(link: &LinkView) -> &str {
    link.waiting_for.as_deref().unwrap_or("no connection")
}

async fn guest_here(standing: &Standing) -> GuestHere {
    let Some(running) = standing.running.as_ref().filter(|r| !r.has_ended()) else {
        return GuestHere::Gone;
    };
    match ask(running, "query-status").await {
        Some(status) if status["running"] == json!(true) => GuestHere::Runs,
        Some(_) => GuestHere::Paused,
        None => GuestHere::Silent,
    }
}

fn words(record: &Record) -> String {
    let (word, epoch) = match record {
        Record::Started { epoch } => ("started", epoch),
        Record::Granted { epoch } => ("granted", epoch),
        Record::PeerAccepted { epoch } => ("peer-accepted", epoch),
        Record::Kept { epoch } => ("kept", epoch),
        Record::Preparing { epoch } => ("preparing", epoch),
        Record::Accepted { epoch } => ("accepted", epoch),
        Record::Refused { epoch } => ("refused", epoch),
        Record::Completed { epoch } => ("completed", epoch),
        Record::AskedBack { epoch } => ("asked-back", epoch),
        Record::Yielded { epoch } => ("yielded", epoch),
    };
    format!("{word} under {epoch}")
}

/// What may be done, the mildest first.
fn choices(now: &RecoveryView) -> Vec<RecoveryChoice> {
    let (name, peer) = (&now.machine, &now.peer);
    let choice = |what: String, command: Option<String>, gives_up: &str| RecoveryChoice {
        what,
        command,
        gives_up: gives_up.to_string(),
    };
    const NOTHING: &str = "nothing";
    // Both are written within a moment of it.
    let is_switchover = ["granted", "peer-accepted"]
        .iter()
        .any(|word| now.recorded.starts_with(word));
    let since = now
        .recorded_at
        .filter(|_| is_switchover)
        .map_or_else(String::new, |at| format!(" ({at})"));
    match (now.direction, now.phase) {
        (_, phase) if phase.is_final() => vec![choice(
            "nothing needs to be done: the move is over".to_string(),
            None,
            NOTHING,
        )],
        (Direction::Outgoing, Phase::Grant | Phase::Drain) => {
            let mut list = vec![choice(
                format!(
                    "wait: this host dials `{peer}` on, and the move goes on by itself when it answers"
                ),
                None,
                NOTHING,
            )];
            let memory = match now.guest {
                GuestHere::Gone => {
                    "its disks are as they were then; its memory is lost, so it boots as after a power cut"
                }
                _ => "its memory and its disks are as they were then, and it runs on from there",
            };
            let what = if now.link.connected {
                format!(
                    "take it back from the switchover{since}: `{peer}` ends its guest first; {memory}"
                )
            } else {
                format!(
                    "take it back from the switchover{since} without asking, if `{peer}` is lost for good and its guest certainly does not run: otherwise the machine runs TWICE. Here {memory}"
                )
            };
            let command = if now.link.connected {
                format!("whimbrel recover {name} --take-back")
            } else {
                format!("whimbrel recover {name} --take-back --lost {peer}")
            };
            list.push(choice(
                what,
                Some(command),
                "everything the guest did since then: what it wrote and flushed, and what it told others over the network",
            ));
            list
        }
        (Direction::Outgoing, _) => vec![
            choice(
                "wait: the guest runs here meanwhile".to_string(),
                None,
                NOTHING,
            ),
            choice(
                "give the move up: the guest stays here as it is".to_string(),
                Some(format!("whimbrel cancel {name}")),
                NOTHING,
            ),
        ],
        (Direction::Incoming, Phase::Prepare | Phase::Copy) => vec![choice(
            format!(
                "wait: nothing is owned here yet; without `{peer}` this host gives up by itself"
            ),
            None,
            NOTHING,
        )],
        (Direction::Incoming, _) => vec![
            choice(
                format!("wait until `{peer}` connects: what is absent is there, and nowhere else"),
                None,
                NOTHING,
            ),
            choice(
                format!("have `{peer}` take the machine back, as it was at the switchover"),
                Some(format!("on {peer}: whimbrel recover {name}")),
                "everything the guest did here",
            ),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(direction: Direction, phase: Phase, connected: bool) -> RecoveryView {
        RecoveryView {
            machine: "web1".parse().expect("a name"),
            migration: "m-1".parse().expect("an id"),
            peer: "b".parse().expect("a name"),
            direction,
            phase,
            state: MigrationState::Running,
            epoch: whimbrel_engine::switchover::Epoch(4),
            recorded: String::new(),
            recorded_at: None,
            guest: GuestHere::Paused,
            link: LinkView {
                connected,
                since: Timestamp::now(),
                rtt_ms: None,
                reconnects: 0,
                waiting_for: None,
            },
            absent: 0,
            choices: Vec::new(),
        }
    }

    #[test]
    fn a_host_that_answers_is_asked_and_one_that_does_not_must_be_named_lost() {
        let command = |connected| {
            let found = choices(&view(Direction::Outgoing, Phase::Drain, connected));
            found[1].command.clone().expect("a command")
        };
        assert_eq!(command(true), "whimbrel recover web1 --take-back");
        assert_eq!(command(false), "whimbrel recover web1 --take-back --lost b");
    }

    #[test]
    fn before_the_grant_nothing_is_given_up() {
        let found = choices(&view(Direction::Outgoing, Phase::Copy, true));
        assert!(found.iter().all(|choice| choice.gives_up == "nothing"));
    }

    #[test]
    fn a_destination_is_told_to_ask_its_source() {
        let found = choices(&view(Direction::Incoming, Phase::Drain, false));
        let command = found[1].command.as_deref();
        assert_eq!(command, Some("on b: whimbrel recover web1"));
    }
}
