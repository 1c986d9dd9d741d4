//! Both state machines of the switchover, driven through lost, doubled and reordered messages and through
//! crashes between any two actions, with two guests that really run or not.

use proptest::prelude::*;
use whimbrel_engine::switchover::*;

#[derive(Clone, Debug)]
enum Step {
    /// Perform the next action at the source, or at the destination.
    ActSource,
    ActDestination,
    /// Deliver message `n` to the source (to the destination), keeping a double of it in the net.
    ToSource(usize, bool),
    ToDestination(usize, bool),
    Lose(usize),
    CrashSource,
    CrashDestination,
    LinkUp,
    Switch,
    Cancel,
    FailSource,
    /// The destination's QEMU dies before its guest ran.
    FailDestination,
    NothingAbsent,
    /// The operator asks for the machine back.
    AskBack,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::ActSource),
        8 => Just(Step::ActDestination),
        6 => (0..8usize, any::<bool>()).prop_map(|(n, d)| Step::ToSource(n, d)),
        6 => (0..8usize, any::<bool>()).prop_map(|(n, d)| Step::ToDestination(n, d)),
        1 => (0..8usize).prop_map(Step::Lose),
        1 => Just(Step::CrashSource),
        1 => Just(Step::CrashDestination),
        3 => Just(Step::LinkUp),
        3 => Just(Step::Switch),
        1 => Just(Step::Cancel),
        1 => Just(Step::FailSource),
        1 => Just(Step::FailDestination),
        2 => Just(Step::NothingAbsent),
        1 => Just(Step::AskBack),
    ]
}

struct World {
    source: Source,
    destination: Destination,
    source_journal: Vec<Record>,
    destination_journal: Vec<Record>,
    source_todo: Vec<Action>,
    destination_todo: Vec<Action>,
    to_source: Vec<Say>,
    to_destination: Vec<Say>,
    source_runs: bool,
    destination_runs: bool,
    destination_ever_ran: bool,
    destination_ended: bool,
    cancelled_before_grant: bool,
}

impl World {
    fn new() -> Self {
        let mut w = World {
            source: Source::new(Epoch(7)),
            destination: Destination::new(Epoch(8)),
            source_journal: vec![],
            destination_journal: vec![],
            source_todo: vec![],
            destination_todo: vec![],
            to_source: vec![],
            to_destination: vec![],
            source_runs: true,
            destination_runs: false,
            destination_ever_ran: false,
            destination_ended: false,
            cancelled_before_grant: false,
        };
        w.source_todo = w.source.handle(SourceEvent::Start);
        w
    }

    fn source_event(&mut self, event: SourceEvent) {
        let actions = self.source.handle(event);
        self.source_todo.extend(actions);
    }

    fn destination_event(&mut self, event: DestinationEvent) {
        let actions = self.destination.handle(event);
        self.destination_todo.extend(actions);
    }

    fn act_source(&mut self) {
        if self.source_todo.is_empty() {
            return;
        }
        match self.source_todo.remove(0) {
            Action::Journal(record) => self.source_journal.push(record),
            Action::Send(say) => self.to_destination.push(say),
            Action::StopGuest => {
                self.source_runs = false;
                self.source_event(SourceEvent::Stopped);
            }
            Action::KeepGuest { .. } => {
                assert!(
                    !self.destination_ever_ran || self.destination_ended,
                    "the source takes back a guest that ran elsewhere"
                );
                self.source_runs = true;
            }
            Action::StartCopy | Action::Drain | Action::Finish(_) => {}
            other => panic!("{other:?} is not for a source"),
        }
    }

    fn act_destination(&mut self) {
        if self.destination_todo.is_empty() {
            return;
        }
        match self.destination_todo.remove(0) {
            Action::Journal(record) => self.destination_journal.push(record),
            Action::Send(say) => self.to_source.push(say),
            Action::MakeReady => self.destination_event(DestinationEvent::Ready),
            Action::RunGuest { .. } => {
                assert!(!self.source_runs, "two guests run");
                assert!(!self.destination_ended, "a guest that was given back runs");
                self.destination_runs = true;
                self.destination_ever_ran = true;
                self.destination_event(DestinationEvent::Running);
            }
            Action::Inspect => {
                let event = if self.destination_ever_ran {
                    DestinationEvent::Running
                } else {
                    DestinationEvent::Failed
                };
                self.destination_event(event);
            }
            Action::EndGuest => {
                self.destination_runs = false;
                self.destination_ended = true;
            }
            Action::CleanUp => {
                assert!(
                    !self.destination_ever_ran,
                    "a guest that ran is never cleaned away"
                );
            }
            Action::Finish(_) => {}
            other => panic!("{other:?} is not for a destination"),
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::ActSource => self.act_source(),
            Step::ActDestination => self.act_destination(),
            Step::ToSource(n, double) if !self.to_source.is_empty() => {
                let n = n % self.to_source.len();
                let say = if double {
                    self.to_source[n]
                } else {
                    self.to_source.remove(n)
                };
                self.source_event(SourceEvent::Heard(say));
            }
            Step::ToDestination(n, double) if !self.to_destination.is_empty() => {
                let n = n % self.to_destination.len();
                let say = if double {
                    self.to_destination[n]
                } else {
                    self.to_destination.remove(n)
                };
                self.destination_event(DestinationEvent::Heard(say));
            }
            Step::ToSource(..) | Step::ToDestination(..) => {}
            Step::Lose(n) => {
                if !self.to_source.is_empty() {
                    let n = n % self.to_source.len();
                    self.to_source.remove(n);
                }
                if !self.to_destination.is_empty() {
                    let n = n % self.to_destination.len();
                    self.to_destination.remove(n);
                }
            }
            Step::CrashSource => {
                if self.source_journal.is_empty() {
                    return;
                }
                let (source, todo) = Source::recover(&self.source_journal);
                self.source = source;
                self.source_todo = todo;
            }
            Step::CrashDestination => {
                if self.destination_journal.is_empty() {
                    self.destination = Destination::new(Epoch(8));
                    self.destination_todo.clear();
                    return;
                }
                let (destination, todo) = Destination::recover(&self.destination_journal);
                self.destination = destination;
                self.destination_todo = todo;
            }
            Step::LinkUp => {
                self.source_event(SourceEvent::LinkUp);
                self.destination_event(DestinationEvent::LinkUp);
            }
            Step::Switch => self.source_event(SourceEvent::Switch),
            Step::Cancel => {
                self.cancelled_before_grant |= self.source.can_cancel();
                self.source_event(SourceEvent::Cancel);
            }
            // A failure that strikes while actions wait is reported by the action that fails.
            Step::FailSource if self.source_todo.is_empty() => {
                self.source_event(SourceEvent::Failed)
            }
            Step::FailSource => {}
            Step::FailDestination
                if self.destination_todo.is_empty() && !self.destination_ever_ran =>
            {
                self.destination_event(DestinationEvent::Failed);
            }
            Step::FailDestination => {}
            Step::AskBack => self.source_event(SourceEvent::TakeBack { lost: false }),
            Step::NothingAbsent => {
                if self.destination_runs {
                    self.destination_event(DestinationEvent::NothingAbsent);
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        assert!(
            !(self.source_runs && self.destination_runs),
            "two guests run"
        );
        if self.cancelled_before_grant {
            assert!(
                !self.destination_ever_ran,
                "cancelled before the grant, and yet it ran there"
            );
        }
    }

    /// No more losses, no more crashes: everything said is heard, until nobody has anything to say.
    fn settle(&mut self) {
        for _ in 0..40 {
            self.source_event(SourceEvent::LinkUp);
            self.source_event(SourceEvent::Switch);
            self.destination_event(DestinationEvent::LinkUp);
            if self.destination_runs {
                self.destination_event(DestinationEvent::NothingAbsent);
            }
            while !(self.source_todo.is_empty() && self.destination_todo.is_empty()) {
                self.act_source();
                self.act_destination();
                self.check();
            }
            for say in std::mem::take(&mut self.to_destination) {
                self.destination_event(DestinationEvent::Heard(say));
            }
            for say in std::mem::take(&mut self.to_source) {
                self.source_event(SourceEvent::Heard(say));
            }
        }
        assert!(
            self.source.phase().is_final(),
            "source ended in {}",
            self.source.phase()
        );
        assert!(self.source_runs != self.destination_runs, "one guest runs");
        assert_eq!(self.source.may_run(), self.source_runs);
        assert_eq!(self.destination.may_run(), self.destination_runs);
        if self.source_runs {
            assert!(!self.source.is_unanswered(), "the destination knows");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8192, ..ProptestConfig::default() })]

    #[test]
    fn one_guest_runs_whatever_is_lost_or_dies(steps in prop::collection::vec(step(), 1..120)) {
        let mut w = World::new();
        for s in &steps {
            w.step(s);
        }
        w.settle();
    }
}

#[test]
fn an_undisturbed_migration_ends_complete() {
    let mut w = World::new();
    w.settle();
    assert_eq!(w.source.phase(), Phase::Complete);
    assert!(w.destination_runs);
}

#[test]
fn destination_that_cannot_load_the_state_hands_the_machine_back() {
    let mut w = World::new();
    while !w
        .to_destination
        .iter()
        .any(|s| matches!(s, Say::Grant { .. }))
    {
        for s in [
            Step::ActSource,
            Step::ActDestination,
            Step::ToDestination(0, false),
            Step::ToSource(0, false),
            Step::Switch,
        ] {
            if matches!(w.to_destination.first(), Some(Say::Grant { .. })) {
                break;
            }
            w.step(&s);
        }
    }
    let _ = w
        .destination
        .handle(DestinationEvent::Heard(Say::Grant { epoch: Epoch(8) }));
    let refusal = w.destination.handle(DestinationEvent::Failed);
    assert!(refusal.contains(&Action::Send(Say::Refused { epoch: Epoch(8) })));
    let kept = w
        .source
        .handle(SourceEvent::Heard(Say::Refused { epoch: Epoch(8) }));
    assert!(kept.contains(&Action::KeepGuest { epoch: Epoch(9) }));
    assert_eq!(w.source.phase(), Phase::Rewind);
}

#[test]
fn destination_restarted_before_it_heard_that_all_is_over_is_told_when_it_says_where_it_is() {
    let epoch = Epoch(8);
    let (mut source, _) = Source::recover(&[
        Record::Started { epoch: Epoch(7) },
        Record::Granted { epoch },
        Record::Completed { epoch },
    ]);
    let (mut destination, todo) =
        Destination::recover(&[Record::Preparing { epoch }, Record::Accepted { epoch }]);
    assert_eq!(todo, [Action::Inspect]);
    let said = destination.handle(DestinationEvent::Running);
    assert_eq!(said, [Action::Send(Say::Accepted { epoch })]);
    let told = source.handle(SourceEvent::Heard(Say::Accepted { epoch }));
    assert_eq!(told, [Action::Send(Say::Completed { epoch })]);
    let over = destination.handle(DestinationEvent::Heard(Say::Completed { epoch }));
    assert_eq!(
        over,
        [
            Action::Journal(Record::Completed { epoch }),
            Action::Finish(Phase::Complete)
        ]
    );
}
