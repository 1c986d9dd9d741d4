//! Following something that takes time: a bar on a terminal, plain lines elsewhere, JSON lines if asked.

use crate::output;
use crate::show;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use whimbrel_engine::switchover::Phase;
use whimbrel_host::api::{ImportProgress, MigrationState, MigrationView};
use whimbrel_host::state::Rate;

/// Plain lines come at every change of phase, state or link, at every step of [`STEP`] thousandths, and
/// at least this often.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
const STEP: u16 = 50;

enum Way {
    Json,
    Bar(ProgressBar),
    Plain,
}

impl Way {
    fn choose(json: bool) -> Way {
        if json {
            return Way::Json;
        }
        // The bar is drawn on standard error.
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(1000);
            let style = ProgressStyle::with_template("{prefix} [{bar:30}] {msg}")
                .expect("the template is well formed")
                .progress_chars("=> ");
            bar.set_style(style);
            return Way::Bar(bar);
        }
        Way::Plain
    }
}

/// Shows one migration as it goes.
pub struct MigrationProgress {
    way: Way,
    /// The last view told in words.
    told: Option<(Phase, MigrationState, bool, u16)>,
    told_at: Instant,
    messages: usize,
    /// The bar never goes back, whatever is heard after a daemon's restart.
    permille: u16,
}

impl MigrationProgress {
    pub fn new(json: bool) -> MigrationProgress {
        MigrationProgress {
            way: Way::choose(json),
            told: None,
            told_at: Instant::now(),
            messages: 0,
            permille: 0,
        }
    }

    pub fn show(&mut self, view: &MigrationView) {
        self.permille = self.permille.max(view.permille);
        let line = progress_line(view, self.permille);
        match &self.way {
            Way::Json => output::print_json(view),
            Way::Bar(bar) => {
                for message in view.messages.iter().skip(self.messages) {
                    bar.println(message);
                }
                bar.set_prefix(format!("{} {}", view.machine, show::way(view)));
                bar.set_position(u64::from(self.permille));
                bar.set_message(line);
            }
            Way::Plain => {
                for message in view.messages.iter().skip(self.messages) {
                    output::print(message);
                }
                if self.is_news(view) {
                    output::print(&format!("{} {}: {line}", view.machine, show::way(view)));
                    self.told = Some((view.phase, view.state, view.link.connected, self.permille));
                    self.told_at = Instant::now();
                }
            }
        }
        // The daemon keeps a bounded list: once it drops old ones, only what is beyond the longest is new.
        self.messages = self.messages.max(view.messages.len());
    }

    fn is_news(&self, view: &MigrationView) -> bool {
        let Some((phase, state, connected, permille)) = self.told else {
            return true;
        };
        (phase, state, connected) != (view.phase, view.state, view.link.connected)
            || self.permille >= permille + STEP
            || self.told_at.elapsed() >= PLAIN_EVERY
    }

    /// Something about the watching itself.
    pub fn say(&self, text: &str) {
        match &self.way {
            Way::Bar(bar) => bar.println(text),
            Way::Json | Way::Plain => output::note(text),
        }
    }

    pub fn finish(self) {
        if let Way::Bar(bar) = self.way {
            bar.finish();
        }
    }
}

/// Phase, bytes, rate, time left, link.
fn progress_line(view: &MigrationView, permille: u16) -> String {
    let mut parts = vec![show::percent(permille), view.phase.to_string()];
    match view.state {
        MigrationState::Running => {}
        MigrationState::Held => parts.push(format!(
            "held: `whimbrel switch {}` lets it go on",
            view.machine
        )),
        other => parts.push(show::state(other).to_string()),
    }
    parts.push(show::bytes(view.sent.total()));
    if !view.state.is_settled() {
        parts.push(Rate::approx(view.rate));
        let eta = show::eta(view);
        if !eta.is_empty() {
            parts.push(format!("{eta} left"));
        }
        parts.push(format!("link {}", show::link(&view.link)));
    }
    parts.join(", ")
}

/// Shows an import.
pub struct ImportShow {
    way: Way,
    told: u16,
}

impl ImportShow {
    pub fn new(json: bool, name: &str) -> ImportShow {
        let way = Way::choose(json);
        if let Way::Bar(bar) = &way {
            bar.set_prefix(name.to_string());
        }
        ImportShow { way, told: 0 }
    }

    pub fn show(&mut self, progress: ImportProgress) {
        let ImportProgress { done, total } = progress;
        let permille = (u128::from(done) * 1000)
            .checked_div(u128::from(total))
            .unwrap_or(0)
            .min(1000) as u16;
        let line = format!(
            "{}, {} of {}",
            show::percent(permille),
            show::bytes(done),
            show::bytes(total)
        );
        match &self.way {
            Way::Json => {}
            Way::Bar(bar) => {
                bar.set_position(u64::from(permille));
                bar.set_message(line);
            }
            Way::Plain if permille >= self.told + 2 * STEP => {
                self.told = permille;
                output::print(&line);
            }
            Way::Plain => {}
        }
    }

    pub fn finish(self) {
        if let Way::Bar(bar) = self.way {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whimbrel_host::api::fake::sample_migration;

    #[test]
    fn the_line_tells_phase_bytes_rate_and_link() {
        let mut view = sample_migration();
        view.phase = Phase::Drain;
        view.sent.push = 3 << 30;
        view.rate = 79_600_000;
        assert_eq!(
            progress_line(&view, 437),
            "43.7 %, drain, 3.0 GiB, 79.6 Mbit/s, link up 30 ms"
        );
    }

    #[test]
    fn a_held_migration_says_how_to_go_on() {
        let mut view = sample_migration();
        view.state = MigrationState::Held;
        assert!(progress_line(&view, 0).contains("`whimbrel switch web1`"));
    }

    #[test]
    fn progress_never_goes_back() {
        let mut progress = MigrationProgress {
            way: Way::Plain,
            told: None,
            told_at: Instant::now(),
            messages: 0,
            permille: 0,
        };
        for permille in [100, 400, 300] {
            progress.show(&MigrationView {
                permille,
                ..sample_migration()
            });
        }
        assert_eq!(progress.permille, 400);
    }

    #[test]
    fn a_line_is_news_when_phase_state_or_link_change() {
        let view = sample_migration();
        let mut progress = MigrationProgress::new(false);
        progress.way = Way::Plain;
        progress.show(&view);
        assert!(!progress.is_news(&view));
        assert!(progress.is_news(&MigrationView {
            phase: Phase::Copy,
            ..view.clone()
        }));
        let mut down = view.clone();
        down.link.connected = false;
        assert!(progress.is_news(&down));
    }
}
