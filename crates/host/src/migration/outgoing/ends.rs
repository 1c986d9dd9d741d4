//! How a migration ends at its source.

use whimbrel_engine::switchover::{Epoch, Phase};
use whimbrel_qemu::source::take_back;

use super::Outgoing;
use crate::api::error::{ApiError, ErrorCode};
use crate::api::types::MigrationState;
use crate::disk::Mode;
use crate::migration::report;
use crate::state::Ownership;

/// The machine's state when its guest has ended meanwhile.
const ENDED: &str = "it is this host's, and does not run";

/// Whether it tells of a QEMU that is no more: its monitor closes a little before its process has ended.
fn says_gone(error: &whimbrel_qemu::Error) -> bool {
    use whimbrel_qemu::{Error, SourceState};
    let state = match error {
        Error::Source { state, .. } => Some(*state),
        _ => None,
    };
    state == Some(SourceState::Gone) || matches!(error, Error::Disconnected { .. })
}

impl Outgoing {
    /// The guest stays, or comes back: everything that was done to it is undone.
    pub(super) async fn keep_guest(&mut self, epoch: Epoch) {
        self.tasks.clear();
        let stopped = self.handover.is_some();
        let process = self.setup.runtime.process.as_ref();
        let mut has_ended = !self.taken_up && process.is_some_and(|p| !p.is_alive());
        for disk in &self.setup.disks {
            disk.set_mode(Mode::Open).await;
        }
        if let Some(ram) = self.ram.take() {
            let result = if stopped {
                match ram.drained().await {
                    Ok(()) => ram.resume_at_source().await,
                    Err(error) => Err(error),
                }
            } else {
                ram.cancel().await
            };
            match result {
                Err(error) if says_gone(&error) => has_ended = true,
                Err(error) if !has_ended => self.not_resumed(&error),
                _ => {}
            }
        }
        if has_ended {
            let what = "the guest shut down, or its QEMU died, before the machine had moved";
            let error = ApiError::new(ErrorCode::Qemu, what).machine_state(ENDED);
            self.failure = Some(error.next_step(
                "if nobody shut it down, look at its qemu.log; start it again and migrate",
            ));
        }
        if self.taken_up
            && let Some(qmp) = &self.setup.qmp
            && let Err(error) = take_back(qmp, &self.ram_socket()).await
        {
            self.not_resumed(&error);
        }
        let mut runtime = self.setup.runtime.clone();
        runtime.epoch = epoch;
        runtime.ownership = Ownership::Local;
        self.setup.machine.keep(&self.setup.host, runtime).await;
    }

    fn not_resumed(&self, error: &whimbrel_qemu::Error) {
        self.setup.board.fail(
            MigrationState::NeedsOperator,
            ApiError::new(
                ErrorCode::Qemu,
                format!("the guest was not resumed: {error}"),
            )
            .machine_state("owned by this host; its QEMU may be paused")
            .next_step("look at `machine show`; `cont` on its monitor resumes it"),
        );
    }

    pub(super) async fn finish(&mut self, phase: Phase) {
        self.over = Some(phase);
        self.figures();
        self.setup.flow.close();
        if phase == Phase::Complete {
            let report = report::outgoing(
                &self.setup.flow,
                &self.fares,
                &self.setup.easing,
                report::Times {
                    total: self.setup.board.clock().elapsed(),
                    blackout: self.blackout,
                    drain: self.ran.map(|ran| ran.elapsed()),
                    outage: self.outage,
                    stopped_at: self.stopped_at,
                    resumed_at: self.resumed_at,
                },
                self.setup.board.view().link.reconnects,
            );
            self.setup.board.update(|view| view.report = Some(report));
            self.tasks.clear();
            self.ram = None;
            let view = self.setup.board.view();
            self.setup
                .machine
                .departed(&self.setup.host, view.id, view.peer)
                .await;
            self.setup.board.end(phase, MigrationState::Completed);
            return;
        }
        if self.taken_back && phase == Phase::Rewind {
            self.setup.board.tell(if self.setup.qmp.is_some() {
                "the machine is here again, as it was at the switchover; what it did since is given up"
            } else {
                "the machine is here again, its disks as they were at the switchover; its memory is lost, so it is to be started"
            });
        }
        let state = if self.cancelled || self.taken_back {
            MigrationState::Cancelled
        } else {
            MigrationState::Failed
        };
        let mut error = self.failure.take();
        if let (None, Some(why), false) = (&error, self.refusal.take(), self.cancelled) {
            error = Some(ApiError::new(
                ErrorCode::MigrationFailed,
                format!("the destination refused the machine: {why}"),
            ));
        }
        let needs_operator = self.board().view().state == MigrationState::NeedsOperator;
        if let Some(error) = error {
            let mut error = match error.machine_state {
                Some(_) => error,
                None => error.machine_state("the machine runs here as before"),
            };
            error
                .next_step
                .get_or_insert_with(|| "put right what the message names and migrate again".into());
            self.setup.board.fail(state, error);
        }
        let state = if needs_operator {
            MigrationState::NeedsOperator
        } else {
            state
        };
        self.setup.board.end(phase, state);
    }
}
