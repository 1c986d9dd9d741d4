//! How a migration ends at its destination.

use std::sync::Arc;
use std::time::Duration;

use whimbrel_engine::switchover::Phase;

use super::Incoming;
use crate::api::error::{ApiError, ErrorCode};
use crate::api::types::MigrationState;
use crate::disk::{Filling, Mode};
use crate::migration::landing::Plan;
use crate::migration::record::mark_over;
use crate::state::Ownership;

/// How long copies that are being stored may take to be.
const LETS_GO: Duration = Duration::from_secs(5);

impl Incoming {
    /// What still comes goes nowhere.
    pub(super) fn stop_taking(&mut self) {
        self.requests = None;
        self.tasks.clear();
        self.setup.arrivals.refuse();
        self.setup.arrivals.set_disks(Vec::new());
    }

    pub(super) async fn clean_up(&mut self) {
        let disks = self.setup.arrivals.disks();
        self.stop_taking();
        if let Some(running) = self.running.take() {
            running.kill().await;
        }
        let_go(disks).await;
        self.ram = None;
        if let Some(landing) = self.landing.take() {
            let plan = landing.plan().clone();
            // Journals must be closed to be removed.
            drop(landing);
            plan.undo(&self.setup.host).await;
            // A daemon that was restarted shows what it found arriving.
            if plan.is_first_visit() {
                self.setup.machines.remove(&plan.spec.name);
            }
        }
        Plan::forget(&self.folder());
    }

    /// The machine is the source's again. What its guest wrote here is left alone, and belongs to nobody; of a
    /// guest that never came to run nothing is.
    pub(super) async fn end_guest(&mut self) {
        let view = self.setup.board.view();
        if let Some(machine) = self.machine.clone() {
            self.stop_taking();
            machine
                .departed(&self.setup.host, view.id, view.peer.clone())
                .await;
            self.ram = None;
            self.landing = None;
        } else {
            self.clean_up().await;
        }
        self.setup.board.tell(format!(
            "{} took the machine back: its guest was ended here, and what it did since the switchover is given up",
            view.peer
        ));
    }

    pub(super) async fn finish(&mut self, phase: Phase) {
        self.over = Some(phase);
        if phase == Phase::Complete {
            self.sample().await;
            if self.complete().await {
                mark_over(&self.folder());
            }
            self.setup.board.end(phase, MigrationState::Completed);
            return;
        }
        mark_over(&self.folder());
        if phase == Phase::Rewind {
            self.setup.board.end(phase, MigrationState::Cancelled);
            return;
        }
        if let Some(why) = self.refusal.clone() {
            self.setup.board.update(|view| {
                view.error = Some(
                    ApiError::new(ErrorCode::MigrationFailed, why)
                        .machine_state("the machine is at its source; nothing of it is left here"),
                );
            });
        }
        self.setup.board.end(phase, MigrationState::Cancelled);
    }

    /// Whether nothing is left to do.
    async fn complete(&mut self) -> bool {
        self.tasks.clear();
        let Some(machine) = self.machine.clone() else {
            return true;
        };
        for disk in self.setup.arrivals.disks() {
            if let Err(error) = disk.retire().await {
                self.trouble(format!("a disk's journal cannot be retired: {error}"));
                return false;
            }
        }
        let mut standing = machine.lock().await;
        for disk in standing.running.iter().flat_map(|r| &r.disks) {
            disk.set_mode(Mode::Open).await;
        }
        // The journals close with the last who knows of them; only then can their folders go.
        self.setup.arrivals.set_disks(Vec::new());
        let mut nothing_left = true;
        if let Some(landing) = &self.landing
            && let Err(error) = landing.plan().complete(&self.setup.host).await
        {
            self.setup
                .board
                .tell(format!("leftovers of the move remain: {error}"));
            nothing_left = false;
        }
        standing.runtime.ownership = Ownership::Local;
        crate::machines::save(&self.setup.host, &standing);
        nothing_left
    }
}

/// Waits a little until nobody stores anything any more in disks that came ahead.
async fn let_go(disks: Vec<Arc<Filling>>) {
    let until = tokio::time::Instant::now() + LETS_GO;
    for disk in disks {
        while Arc::strong_count(&disk) > 1 && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}
