//! Every state that the switchover can get into, within bounds, with the engine's own state machines.
//!
//! Two daemons, each performing its actions one by one, and an ordered network that may be cut at any moment, with
//! what is under way lost. Between any two steps a daemon may die and be rebuilt from its journal, the operator
//! may cancel, either side may fail. All orders of all of that are explored (breadth first, by `stateright`), so
//! within the bounds nothing is left to chance. "Every fair run ends" is checked in each state by going on from
//! there without further mishaps.

use stateright::{Checker, Model, Property};
use whimbrel_engine::switchover::{
    Action, Destination, DestinationEvent, Epoch, Phase, Record, Say, Source, SourceEvent,
};

const OWN: Epoch = Epoch(7);
const OFFERED: Epoch = Epoch(8);

/// Mishaps that are left to happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Left {
    source_crashes: u8,
    destination_crashes: u8,
    cuts: u8,
    cancels: u8,
    source_failures: u8,
    destination_failures: u8,
    /// The operator asks for the machine back.
    asks: u8,
    /// The destination's host loses its power, and the operator takes the machine back on that.
    losses: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    source_todo: Vec<Action>,
    source_journal: Vec<Record>,
    destination: Destination,
    destination_todo: Vec<Action>,
    destination_journal: Vec<Record>,
    to_source: Vec<Say>,
    to_destination: Vec<Say>,
    source_up: bool,
    destination_up: bool,
    /// The guest runs at the source, at the destination; and has run at the destination.
    here: bool,
    there: bool,
    ran_there: bool,
    /// The destination's QEMU loads the device state.
    loading: bool,
    /// It said that the guest runs, and the daemon has not heard it yet.
    resumed: bool,
    /// What was absent has arrived.
    whole: bool,
    cancelled_in_time: bool,
    /// The guest at the destination was ended, for the source to have it back.
    ended_there: bool,
    /// The destination's QEMU is gone with its host.
    lost: bool,
    /// The operator swore so.
    sworn: bool,
    left: Left,
    /// Something that the state machines must never ask for was asked for.
    wrong: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    SourceActs,
    DestinationActs,
    SourceHears,
    DestinationHears,
    DestinationConnects,
    SourceConnects,
    Cut,
    Switch,
    Resume,
    ResumeHeard,
    Arrived,
    CrashSource,
    CrashDestination,
    Cancel,
    SourceFails,
    DestinationFails,
    SourceGivesUp,
    DestinationGivesUp,
    AskBack,
    LoseDestination,
    Swear,
}

struct Switchover(Left);

impl World {
    fn new(left: Left) -> Self {
        let mut source = Source::new(OWN);
        let source_todo = source.handle(SourceEvent::Start);
        World {
            source,
            source_todo,
            source_journal: Vec::new(),
            destination: Destination::new(OFFERED),
            destination_todo: Vec::new(),
            destination_journal: Vec::new(),
            to_source: Vec::new(),
            to_destination: Vec::new(),
            source_up: false,
            destination_up: false,
            here: true,
            there: false,
            ran_there: false,
            loading: false,
            resumed: false,
            whole: false,
            cancelled_in_time: false,
            ended_there: false,
            lost: false,
            sworn: false,
            left,
            wrong: None,
        }
    }

    fn source(&mut self, event: SourceEvent) {
        let actions = self.source.handle(event);
        self.source_todo.extend(actions);
    }

    fn destination(&mut self, event: DestinationEvent) {
        let actions = self.destination.handle(event);
        self.destination_todo.extend(actions);
    }

    fn source_acts(&mut self) {
        match self.source_todo.remove(0) {
            Action::Journal(record) => self.source_journal.push(record),
            Action::Send(say) => {
                if self.source_up {
                    self.to_destination.push(say);
                }
            }
            Action::StopGuest => {
                self.here = false;
                self.source(SourceEvent::Stopped);
            }
            Action::KeepGuest { epoch } => {
                self.here = true;
                let promised = self
                    .source_journal
                    .contains(&Record::Granted { epoch: OFFERED });
                if promised && epoch <= OFFERED {
                    self.wrong =
                        Some("the machine came back under an epoch that was promised away");
                }
            }
            Action::StartCopy | Action::Drain | Action::Finish(_) => {}
            _ => self.wrong = Some("a source was asked for what is not its own"),
        }
    }

    fn destination_acts(&mut self) {
        match self.destination_todo.remove(0) {
            Action::Journal(record) => self.destination_journal.push(record),
            Action::Send(say) => {
                if self.destination_up {
                    self.to_source.push(say);
                }
            }
            Action::MakeReady => self.destination(DestinationEvent::Ready),
            Action::RunGuest { .. } => self.loading = true,
            Action::EndGuest => {
                self.there = false;
                self.loading = false;
                self.ended_there = true;
            }
            Action::Inspect => {
                let event = if self.ran_there {
                    DestinationEvent::Running
                } else {
                    self.loading = false;
                    DestinationEvent::Failed
                };
                self.destination(event);
            }
            Action::CleanUp => {
                self.loading = false;
                if self.ran_there {
                    self.wrong = Some("a guest that ran is cleaned away");
                }
            }
            Action::Finish(_) => {}
            _ => self.wrong = Some("a destination was asked for what is not its own"),
        }
    }

    fn cut(&mut self) {
        self.source_up = false;
        self.destination_up = false;
        self.to_source.clear();
        self.to_destination.clear();
    }

    fn is_down(&self) -> bool {
        !self.source_up && !self.destination_up
    }

    /// What may happen without anything going wrong.
    fn fair_steps(&self, steps: &mut Vec<Step>) {
        let busy = !self.source_todo.is_empty();
        if busy {
            steps.push(Step::SourceActs);
        }
        // The driver is at the loading until QEMU has said something.
        let loading = self.loading || self.resumed;
        if !self.destination_todo.is_empty() && !loading {
            steps.push(Step::DestinationActs);
        }
        if !self.to_source.is_empty() && !busy && self.source_up {
            steps.push(Step::SourceHears);
        }
        if !self.to_destination.is_empty() && self.destination_todo.is_empty() && !loading {
            steps.push(Step::DestinationHears);
        }
        if self.is_down() {
            steps.push(Step::DestinationConnects);
        } else if !self.source_up {
            steps.push(Step::SourceConnects);
        }
        if !busy && self.source_up && self.source.phase() == Phase::Copy {
            steps.push(Step::Switch);
        }
        if self.loading {
            steps.push(Step::Resume);
        }
        if self.resumed {
            steps.push(Step::ResumeHeard);
        }
        let flows = matches!(self.source.phase(), Phase::Grant | Phase::Drain);
        let lacks = self.destination.phase() == Phase::Drain && !self.whole;
        if lacks && flows && self.source_up && self.destination_todo.is_empty() {
            steps.push(Step::Arrived);
        }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::SourceActs => self.source_acts(),
            Step::DestinationActs => self.destination_acts(),
            Step::SourceHears => {
                let say = self.to_source.remove(0);
                self.source(SourceEvent::Heard(say));
            }
            Step::DestinationHears => {
                let say = self.to_destination.remove(0);
                self.destination(DestinationEvent::Heard(say));
            }
            Step::DestinationConnects => {
                self.destination_up = true;
                self.destination(DestinationEvent::LinkUp);
            }
            Step::SourceConnects => {
                self.source_up = true;
                self.source(SourceEvent::LinkUp);
            }
            Step::Cut => {
                self.left.cuts -= 1;
                self.cut();
            }
            Step::Switch => self.source(SourceEvent::Switch),
            Step::Resume => {
                self.loading = false;
                self.resumed = true;
                self.there = true;
                self.ran_there = true;
            }
            Step::ResumeHeard => {
                self.resumed = false;
                self.destination(DestinationEvent::Running);
            }
            Step::Arrived => {
                self.whole = true;
                self.destination(DestinationEvent::NothingAbsent);
            }
            Step::CrashSource => {
                self.left.source_crashes -= 1;
                self.cut();
                if self.source_journal.is_empty() {
                    // The migration never was; the destination, if it heard of it, gives up by itself.
                    self.source = Source::new(OWN);
                    self.source_todo.clear();
                    return self.source(SourceEvent::Failed);
                }
                (self.source, self.source_todo) = Source::recover(&self.source_journal);
            }
            Step::CrashDestination => {
                self.left.destination_crashes -= 1;
                self.crash_destination();
            }
            Step::AskBack => {
                self.left.asks -= 1;
                self.source(SourceEvent::TakeBack { lost: false });
            }
            Step::LoseDestination => {
                self.left.losses -= 1;
                // One that knows of nothing may yet be asked to take the machine.
                self.lost |= !self.destination_journal.is_empty();
                self.there = false;
                self.loading = false;
                self.crash_destination();
            }
            Step::Swear => {
                self.sworn = true;
                self.source(SourceEvent::TakeBack { lost: true });
            }
            Step::Cancel => {
                self.left.cancels -= 1;
                self.cancelled_in_time |= self.source.can_cancel();
                self.source(SourceEvent::Cancel);
            }
            Step::SourceFails => {
                self.left.source_failures -= 1;
                self.source(SourceEvent::Failed);
            }
            Step::DestinationFails => {
                self.left.destination_failures -= 1;
                self.loading = false;
                self.destination(DestinationEvent::Failed);
            }
            Step::SourceGivesUp => self.source(SourceEvent::Failed),
            Step::DestinationGivesUp => self.destination(DestinationEvent::Failed),
        }
    }

    fn crash_destination(&mut self) {
        self.cut();
        self.resumed = false;
        // What is there is compared with the source anew.
        self.whole = false;
        (self.destination, self.destination_todo) = if self.destination_journal.is_empty() {
            (Destination::new(OFFERED), Vec::new())
        } else {
            Destination::recover(&self.destination_journal)
        };
    }

    /// One side owns the machine, its guest runs there, and the other side knows.
    fn is_over(&self) -> bool {
        let done = self.source_todo.is_empty()
            && self.destination_todo.is_empty()
            && !self.source.is_unanswered();
        let away = self.source.phase() == Phase::Complete
            && self.destination.phase() == Phase::Complete
            && (self.there || self.lost)
            && !self.here;
        let kept = matches!(self.source.phase(), Phase::Cancel | Phase::Rewind)
            && matches!(
                self.destination.phase(),
                Phase::Cancel | Phase::Prepare | Phase::Rewind
            )
            && self.here
            && !self.there;
        done && (away || kept)
    }

    /// From here on nothing goes wrong any more.
    fn ends(&self) -> bool {
        let mut world = self.clone();
        // The link is made anew if nothing else can be done: connections do not last for ever.
        for _ in 0..8 {
            for _ in 0..60 {
                if world.is_over() {
                    return true;
                }
                let mut steps = Vec::new();
                world.fair_steps(&mut steps);
                match steps.first() {
                    Some(step) => world.take(step),
                    None => break,
                }
            }
            world.cut();
        }
        world.is_over()
    }
}

impl Model for Switchover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.0.clone())]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.fair_steps(steps);
        let left = &world.left;
        if left.cuts > 0 && !world.is_down() {
            steps.push(Step::Cut);
        }
        if left.source_crashes > 0 {
            steps.push(Step::CrashSource);
        }
        if left.destination_crashes > 0 {
            steps.push(Step::CrashDestination);
        }
        if left.cancels > 0 && world.source_todo.is_empty() {
            steps.push(Step::Cancel);
        }
        // A failure that strikes while actions wait is told of by the action that fails.
        if left.source_failures > 0 && world.source_todo.is_empty() {
            steps.push(Step::SourceFails);
        }
        let before = world.destination_todo.is_empty() && !world.ran_there;
        if left.destination_failures > 0 && before {
            steps.push(Step::DestinationFails);
        }
        let asked = world.source_todo.is_empty() && world.source.can_take_back();
        if left.asks > 0 && asked {
            steps.push(Step::AskBack);
        }
        if left.losses > 0 {
            steps.push(Step::LoseDestination);
        }
        if world.lost && !world.sworn && asked {
            steps.push(Step::Swear);
        }
        if world.is_down() {
            if world.source.can_cancel() && world.source_todo.is_empty() {
                steps.push(Step::SourceGivesUp);
            }
            let waits = matches!(world.destination.phase(), Phase::Prepare | Phase::Copy);
            if waits && before && !world.destination_journal.is_empty() {
                steps.push(Step::DestinationGivesUp);
            }
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(&step);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one guest runs", |_, w: &World| {
                let gone = w.ended_there || w.sworn;
                !(w.here && (w.there || w.ran_there && !gone))
            }),
            Property::always("a guest runs only where it may", |_, w: &World| {
                (!w.here || w.source.may_run() || !w.source_todo.is_empty())
                    && (!w.there || w.destination.may_run() || !w.destination_todo.is_empty())
            }),
            Property::always("the machine is somewhere", |_, w: &World| {
                let given_away = w.source.phase() == Phase::Complete;
                !(given_away && (w.ended_there || w.destination.phase() == Phase::Rewind))
            }),
            Property::always("a cancel before the grant is safe", |_, w: &World| {
                !(w.cancelled_in_time && w.ran_there)
            }),
            Property::always("nothing wrong is asked for", |_, w: &World| {
                w.wrong.is_none()
            }),
            Property::always("queues are short", |_, w: &World| {
                let longest = w.source_todo.len().max(w.destination_todo.len());
                longest.max(w.to_source.len()).max(w.to_destination.len()) <= 12
            }),
            Property::always("every fair run ends", |_, w: &World| w.ends()),
            Property::sometimes("a move completes", |_, w: &World| {
                w.is_over() && w.source.phase() == Phase::Complete
            }),
            Property::sometimes("a move is cancelled", |_, w: &World| {
                w.is_over() && w.source.phase() == Phase::Cancel
            }),
            Property::sometimes("a machine is taken back", |_, w: &World| {
                w.is_over() && w.source.phase() == Phase::Rewind
            }),
            Property::sometimes("a machine is asked back", |_, w: &World| {
                w.is_over() && w.ended_there && w.here && !w.sworn
            }),
            Property::sometimes("a machine is taken from a lost host", |_, w: &World| {
                w.is_over() && w.sworn && w.here
            }),
        ]
    }
}

/// What the bounds let happen beside a completed move.
fn explore(left: Left, expected: &[&'static str]) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let begun = std::time::Instant::now();
    let checker = Switchover(left).checker().threads(cores).spawn_bfs().join();
    println!(
        "{} states, {} of them different, depth {}, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    for (property, path) in checker.discoveries() {
        if checker.model().property(property).expectation == stateright::Expectation::Always {
            println!("{property}:");
            for (world, step) in path.into_vec() {
                println!("{step:?}\n    {world:?}");
            }
        }
    }
    for property in checker.model().properties() {
        match property.expectation {
            stateright::Expectation::Sometimes if expected.contains(&property.name) => {
                checker.assert_any_discovery(property.name);
            }
            stateright::Expectation::Sometimes => {}
            _ => checker.assert_no_discovery(property.name),
        }
    }
}

const NONE: Left = Left {
    source_crashes: 0,
    destination_crashes: 0,
    cuts: 0,
    cancels: 0,
    source_failures: 0,
    destination_failures: 0,
    asks: 0,
    losses: 0,
};

#[test]
fn in_every_state_one_host_owns_the_machine_and_a_fair_run_ends() {
    let left = Left {
        source_crashes: 2,
        destination_crashes: 2,
        cuts: 1,
        cancels: 1,
        source_failures: 1,
        destination_failures: 1,
        ..NONE
    };
    let expected = [
        "a move completes",
        "a move is cancelled",
        "a machine is taken back",
    ];
    explore(left, &expected);
}

#[test]
fn in_every_state_a_machine_can_be_asked_back_or_taken_from_a_lost_host() {
    let left = Left {
        source_crashes: 2,
        destination_crashes: 1,
        cuts: 1,
        asks: 1,
        losses: 1,
        ..NONE
    };
    let expected = [
        "a move completes",
        "a machine is taken back",
        "a machine is asked back",
        "a machine is taken from a lost host",
    ];
    explore(left, &expected);
}
