//! The notice board of a migration: what is told of it, kept in one place and watched by whoever asks.

use std::sync::Mutex;
use std::time::Instant;

use tokio::sync::watch;
use whimbrel_engine::progress::Progress;
use whimbrel_engine::switchover::Phase;

use crate::api::error::ApiError;
use crate::api::types::{EtaRange, Happened, LinkView, MigrationState, MigrationView};
use crate::state::Timestamp;

/// Most messages kept; the oldest go first.
const MAX_MESSAGES: usize = 64;

/// Most happenings that wait for whoever keeps the record, who takes them four times a second; further ones are
/// not recorded.
const MAX_HAPPENED: usize = 256;

/// The board of one migration.
pub struct Board {
    view: watch::Sender<MigrationView>,
    progress: Mutex<Progress>,
    started: Instant,
    happened: Mutex<Vec<(Instant, Happened)>>,
}

impl Board {
    pub fn new(view: MigrationView) -> Self {
        Board {
            view: watch::Sender::new(view),
            progress: Mutex::new(Progress::default()),
            started: Instant::now(),
            happened: Mutex::default(),
        }
    }

    pub fn watch(&self) -> watch::Receiver<MigrationView> {
        self.view.subscribe()
    }

    pub fn view(&self) -> MigrationView {
        self.view.borrow().clone()
    }

    /// The migration's clock: demands are timed by it.
    pub fn clock(&self) -> Instant {
        self.started
    }

    pub fn update(&self, f: impl FnOnce(&mut MigrationView)) {
        self.view.send_modify(f);
    }

    /// Something happened now that the record is to tell of.
    pub fn mark(&self, what: Happened) {
        self.mark_at(Instant::now(), what);
    }

    pub fn mark_at(&self, at: Instant, what: Happened) {
        let mut happened = self.happened.lock().expect("no holder of this lock panics");
        if happened.len() < MAX_HAPPENED {
            happened.push((at, what));
        }
    }

    /// What happened since this was asked last.
    pub fn take_happened(&self) -> Vec<(Instant, Happened)> {
        std::mem::take(&mut self.happened.lock().expect("no holder of this lock panics"))
    }

    /// The phase whose work is about to be done: a stop that does not come to its end is to be seen as one.
    /// An end is told when it is one.
    pub fn entering(&self, phase: Phase) {
        if !matches!(phase, Phase::Complete | Phase::Cancel | Phase::Rewind) {
            self.phase(phase);
        }
    }

    pub fn phase(&self, phase: Phase) {
        self.update(|view| {
            if view.phase != phase {
                tracing::info!(migration = %view.id, machine = %view.machine, %phase, "phase");
                view.phase = phase;
                self.mark(Happened::Phase(phase));
            }
        });
    }

    pub fn state(&self, state: MigrationState) {
        self.update(|view| view.state = state);
    }

    /// Something worth telling a person.
    pub fn tell(&self, message: impl Into<String>) {
        let message = message.into();
        self.mark(Happened::Told(message.clone()));
        self.update(|view| {
            tracing::info!(migration = %view.id, machine = %view.machine, "{message}");
            if view.messages.len() == MAX_MESSAGES {
                view.messages.remove(0);
            }
            view.messages.push(message);
        });
    }

    pub fn link(&self, f: impl FnOnce(&mut LinkView)) {
        self.update(|view| {
            let before = view.link.connected;
            f(&mut view.link);
            match (before, view.link.connected) {
                (true, false) => self.mark(Happened::LinkDown),
                (false, true) => self.mark(Happened::LinkUp),
                _ => {}
            }
        });
    }

    pub fn fail(&self, state: MigrationState, error: ApiError) {
        tracing::error!(%error, "migration failed");
        self.update(|view| {
            view.state = state;
            view.error = Some(error);
        });
    }

    /// New figures of how much is done.
    pub fn sample(&self, done: u64, total: u64) {
        let mut progress = self.progress.lock().expect("no holder of this lock panics");
        progress.sample(self.started.elapsed().as_micros() as u64, done, total);
        let (permille, rate) = (progress.permille(), progress.rate());
        let eta = progress.eta(total.saturating_sub(done));
        self.update(|view| {
            view.permille = permille;
            view.rate = (rate * 8.0) as u64;
            view.eta = eta.map(|eta| EtaRange {
                soonest_s: eta.low_s,
                latest_s: Some(eta.high_s),
            });
        });
    }

    /// It is over.
    pub fn end(&self, phase: Phase, state: MigrationState) {
        self.phase(phase);
        let mut progress = self.progress.lock().expect("no holder of this lock panics");
        if phase == Phase::Complete {
            progress.finish();
        }
        let permille = progress.permille();
        self.update(|view| {
            view.state = state;
            view.permille = permille;
            view.rate = 0;
            view.eta = None;
            view.ended = Some(Timestamp::now());
        });
    }
}
