//! Tells a move while it happens.

use crate::screen::Screen;
use whimbrel_lab::pair::answers::{MigrationView, Phase};
use whimbrel_lab::pair::journey::Moment;

pub struct Narrator<'s> {
    screen: &'s mut Screen,
    phase: Option<Phase>,
    messages: usize,
    said_before: bool,
    said_after: bool,
}

impl Narrator<'_> {
    pub fn new(screen: &mut Screen) -> Narrator<'_> {
        Narrator {
            screen,
            phase: None,
            messages: 0,
            said_before: false,
            said_after: false,
        }
    }

    pub fn hear(&mut self, moment: Moment<'_>) {
        match moment {
            Moment::Before { left, guest } => {
                if !std::mem::replace(&mut self.said_before, true) {
                    self.screen.say("measuring the undisturbed guest");
                }
                let line = format!("{:2.0} s left: {}", left.as_secs_f64(), guest.line());
                self.screen.live(&line);
            }
            Moment::Moving { view, guest, .. } => {
                self.phase_and_messages(view);
                let line = format!("{}; guest: {}", progress(view), guest.short());
                self.screen.live(&line);
            }
            Moment::After { left, guest } => {
                if !std::mem::replace(&mut self.said_after, true) {
                    self.screen.say("measuring the guest in its new place");
                }
                let line = format!("{:2.0} s left: {}", left.as_secs_f64(), guest.line());
                self.screen.live(&line);
            }
        }
    }

    fn phase_and_messages(&mut self, view: &MigrationView) {
        if self.phase != Some(view.phase) {
            self.phase = Some(view.phase);
            self.screen
                .say(&format!("{:<8}  {}", view.phase, meaning(view.phase)));
        }
        for message in view.messages.iter().skip(self.messages) {
            self.screen.say(&format!("{:<8}  {message}", ""));
        }
        self.messages = self.messages.max(view.messages.len());
    }
}

/// `43.5 %, 93.1 Mbit/s, 35-41 s left, 123 demands`.
fn progress(view: &MigrationView) -> String {
    let mut parts = vec![format!("{:4.1} %", f64::from(view.permille) / 10.0)];
    parts.push(format!("{:5.1} Mbit/s", view.rate as f64 / 1e6));
    if let Some(eta) = view.eta {
        parts.push(match eta.latest_s {
            Some(latest) if latest > eta.soonest_s => format!("{}-{latest} s left", eta.soonest_s),
            _ => format!("{} s left", eta.soonest_s),
        });
    }
    parts.push(format!("{} demands", view.demands.count));
    if !view.link.connected {
        parts.push("link away".to_owned());
    }
    parts.join(", ")
}

fn meaning(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "the destination makes ready",
        Phase::Copy => "the guest runs on at the source, its memory is being read",
        Phase::Quiesce => "the guest is stopped, its I/O is finished",
        Phase::Grant => "the source has promised the machine away and waits for the answer",
        Phase::Accept => "the destination has taken the machine and loads its devices",
        Phase::Run => "the guest runs at the destination",
        Phase::Drain => "what the destination lacks follows; what the guest asks for goes first",
        Phase::Complete => "everything is there, compared and equal",
        Phase::Cancel => "given up; the guest runs at the source as before",
        Phase::Rewind => "the source has taken the machine back",
    }
}
