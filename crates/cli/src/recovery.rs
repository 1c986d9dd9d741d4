//! `whimbrel recover`: where a machine stands whose move does not go on, and taking it back.

use crate::context::Context;
use crate::error::CliError;
use crate::output::pairs;
use crate::show;
use std::time::{Duration, Instant};
use whimbrel_host::api::{Direction, GuestHere, MigrationView, RecoverRequest, RecoveryView};
use whimbrel_host::state::Name;
use whimbrel_peer::trust::PeerName;

/// How long a machine that is being taken back is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(250);

pub async fn recover(
    context: &Context,
    machine: Name,
    take_back: bool,
    lost: Option<PeerName>,
) -> Result<(), CliError> {
    let path = format!("/v1/machines/{machine}/recovery");
    if !take_back {
        let view: RecoveryView = context.client.get(&path).await?;
        context.answer(&view, recovery);
        return Ok(());
    }
    let mut view: MigrationView = context.client.post(&path, &RecoverRequest { lost }).await?;
    let asked = Instant::now();
    while !view.phase.is_final() && asked.elapsed() < PATIENCE {
        tokio::time::sleep(LOOK_AGAIN).await;
        let path = format!("/v1/migrations/{}", view.id);
        view = context.client.get(&path).await?;
    }
    context.answer(&view, |v| {
        let said = v.messages.last().map_or("", String::as_str);
        if v.phase.is_final() {
            format!("{}: {said}", v.machine)
        } else {
            format!(
                "{} is not back yet: {} has not answered, and is asked whenever it is heard of; `whimbrel status {}` tells. {said}",
                v.machine, v.peer, v.machine
            )
        }
    });
    Ok(())
}

fn recovery(view: &RecoveryView) -> String {
    let way = match view.direction {
        Direction::Outgoing => format!("away from here, to {}", view.peer),
        Direction::Incoming => format!("to here, from {}", view.peer),
    };
    let recorded = match view.recorded_at {
        Some(at) => format!(
            "{}, {} ago",
            view.recorded,
            show::seconds(at.age().as_secs())
        ),
        None => view.recorded.clone(),
    };
    let guest = match (view.guest, view.direction) {
        (GuestHere::Runs, _) => "runs",
        (GuestHere::Paused, Direction::Outgoing) => {
            "stopped, with its memory as it was at the switchover"
        }
        (GuestHere::Paused, Direction::Incoming) => "paused",
        (GuestHere::Silent, _) => "its QEMU is there and does not answer; it may wait for memory",
        (GuestHere::Gone, _) => "its QEMU is gone, its memory with it",
    };
    let mut text = pairs(&[
        ("machine", format!("{} under {}", view.machine, view.epoch)),
        ("migration", format!("{} {way}", view.migration)),
        (
            "phase",
            format!("{} ({})", view.phase, show::state(view.state)),
        ),
        ("recorded here", recorded),
        ("guest here", guest.to_string()),
        ("not yet there", show::bytes(view.absent)),
        ("link", show::link(&view.link)),
    ]);
    text.push_str("\n\nwhat may be done:");
    for choice in &view.choices {
        text.push_str(&format!(
            "\n\n- {}\n  gives up: {}",
            choice.what, choice.gives_up
        ));
        if let Some(command) = &choice.command {
            text.push_str(&format!("\n  {command}"));
        }
    }
    text
}
