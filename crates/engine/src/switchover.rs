//! Who owns the machine: the phases of a migration and the two state machines that walk through them.
//!
//! # The idea
//! A machine's ownership has a number, its *epoch*. A host may run the machine and write its volumes only
//! under the newest epoch it knows to be its own. A migration passes ownership on by one promise and one
//! acceptance, each durable before it is said:
//!
//! ```text
//!   source                                        destination
//!   Prepare   Started ----------- prepare ------> Preparing
//!   Copy              <---------- prepared ------
//!   Quiesce   (guest stopped)
//!   Grant     Granted(e+1) ------ grant --------> Accepted(e+1)    Accept
//!                                                 (state loaded)
//!                     <---------- accepted ------ (guest runs)     Run
//!   Drain     Accepted  ========= units ========> ...              Drain
//!   Complete  Completed <-------- drained ------- Completed        Complete
//! ```
//!
//! Before `Granted` is durable at the source, any failure lets the source go on by itself. After it, the
//! source never runs the guest again unless the destination durably *refuses* the epoch. The destination
//! may refuse until its guest has executed an instruction, and never after. So at every moment at most one
//! side may run the guest, and the two journals together always say which, even if no message ever
//! arrives again.
//!
//! # Giving back
//! An operator may want the machine back as it was at the switchover, while it is being drained: its guest at the
//! destination is broken, or the destination is lost. Whatever the guest did since is given up. Two ways:
//!
//! - *asked for*: the source records that it asks, and asks. The destination records that it yields, ends its
//!   guest, and says so; then the source takes the machine back. From the asking on the source does not complete
//!   the migration, so the machine cannot vanish from both sides.
//! - *sworn*: the operator knows that the destination is lost and its guest will never run again. The source
//!   takes the machine back at once, and tells the destination whenever it is heard of.
//!
//! # Shape
//! [`Source`] and [`Destination`] take events and return actions. Actions are to be performed in order; a
//! [`Action::Journal`] must be durable before the next action is performed. Both are rebuilt from their
//! journal after a crash ([`Source::recover`], [`Destination::recover`]).

use serde::{Deserialize, Serialize};

/// The fencing number of a machine's ownership.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// Where a migration is. Logs, metrics, tests and the documentation use these words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The destination makes ready: volumes, an empty QEMU, its word that it can.
    Prepare,
    /// Content moves, or is being collected, while the guest runs at the source.
    Copy,
    /// The guest is stopped at the source; its I/O is finished.
    Quiesce,
    /// The source has promised the machine away and waits for the answer.
    Grant,
    /// The destination has taken the machine and loads its device state.
    Accept,
    /// The guest runs at the destination.
    Run,
    /// What the destination lacks follows.
    Drain,
    /// Nothing is absent at the destination, and it was verified.
    Complete,
    /// The migration was given up before the grant; the source runs the guest as before.
    Cancel,
    /// The destination refused, yielded or lost the machine and the source took it back.
    Rewind,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prepare => "prepare",
            Phase::Copy => "copy",
            Phase::Quiesce => "quiesce",
            Phase::Grant => "grant",
            Phase::Accept => "accept",
            Phase::Run => "run",
            Phase::Drain => "drain",
            Phase::Complete => "complete",
            Phase::Cancel => "cancel",
            Phase::Rewind => "rewind",
        }
    }

    /// Whether the migration is over.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Complete | Phase::Cancel | Phase::Rewind)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a daemon journals, durably, before it acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum Record {
    /// Source: a migration away from here began; the machine is ours under `epoch`.
    Started { epoch: Epoch },
    /// Source: ownership under `epoch` is promised to the peer.
    Granted { epoch: Epoch },
    /// Source: the peer said it took the machine.
    PeerAccepted { epoch: Epoch },
    /// Source: the machine is ours again, or still, under `epoch`.
    Kept { epoch: Epoch },
    /// Destination: made ready to receive `epoch`.
    Preparing { epoch: Epoch },
    /// Destination: the machine is ours under `epoch`.
    Accepted { epoch: Epoch },
    /// Destination: `epoch` will never be accepted here.
    Refused { epoch: Epoch },
    /// Either: everything arrived and was verified.
    Completed { epoch: Epoch },
    /// Source: the operator wants the machine back, and the peer is asked for it.
    AskedBack { epoch: Epoch },
    /// Destination: the machine is the source's again; its guest never runs here any more.
    Yielded { epoch: Epoch },
}

/// What the two sides say to each other about ownership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Say {
    /// Source: make ready to take the machine under this epoch.
    Prepare { epoch: Epoch },
    /// Destination: ready.
    Prepared { epoch: Epoch },
    /// Source: the machine is yours (the device state travels with this).
    Grant { epoch: Epoch },
    /// Destination: it is mine, durably, and its guest runs.
    Accepted { epoch: Epoch },
    /// Destination: I shall never accept this epoch, durably.
    Refused { epoch: Epoch },
    /// Source: the migration is off, clean up. Answered by `Refused`, or by `Accepted` if too late.
    Cancel { epoch: Epoch },
    /// Source, after a lost answer: what became of the grant? Answered by `Accepted` or `Refused`.
    Ask { epoch: Epoch },
    /// Destination: nothing is absent here any more.
    Drained { epoch: Epoch },
    /// Source: noted; both sides may call the migration complete.
    Completed { epoch: Epoch },
    /// Source: I take the machine back. Answered by `Yielded` or `Refused`.
    GiveBack { epoch: Epoch },
    /// Destination: its guest does not run here and never will, durably.
    Yielded { epoch: Epoch },
}

impl Say {
    /// The epoch it speaks of.
    pub fn epoch(self) -> Epoch {
        match self {
            Say::Prepare { epoch }
            | Say::Prepared { epoch }
            | Say::Grant { epoch }
            | Say::Accepted { epoch }
            | Say::Refused { epoch }
            | Say::Cancel { epoch }
            | Say::Ask { epoch }
            | Say::Drained { epoch }
            | Say::Completed { epoch }
            | Say::GiveBack { epoch }
            | Say::Yielded { epoch } => epoch,
        }
    }
}

/// What a state machine tells its daemon to do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Make this durable before going on.
    Journal(Record),
    /// Tell the peer, if there is a connection; the state machines repeat what matters.
    Send(Say),
    /// Source: begin to collect RAM and offer units.
    StartCopy,
    /// Source: stop the guest, finish its I/O, freeze its volumes; answer with `Stopped`.
    StopGuest,
    /// Source: the guest is ours: undo all tracking, unfreeze, run it under this epoch.
    KeepGuest { epoch: Epoch },
    /// Destination: create volumes and an incoming QEMU; answer with `Ready` or `Failed`.
    MakeReady,
    /// Destination: load the device state and run the guest; answer with `Running` or `Failed`.
    RunGuest { epoch: Epoch },
    /// Destination, restarted after it had accepted: find out whether the guest runs here; answer with
    /// `Running`, or with `Failed` if it surely never ran. While neither is certain, answer nothing.
    Inspect,
    /// Destination: remove everything this migration made here.
    CleanUp,
    /// Destination: end the guest that runs here, and make sure of it; what it wrote is left alone.
    EndGuest,
    /// Source: units may flow for the destination's guest.
    Drain,
    /// The migration is over in this phase.
    Finish(Phase),
}

/// What happens at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The operator asked for the migration.
    Start,
    /// A connection to the peer is up (again).
    LinkUp,
    /// Policy chose the moment. Only heeded while the link is known to be alive.
    Switch,
    /// The guest is stopped and its state is in hand.
    Stopped,
    /// Something failed here, or the destination was given up on, and the guest is still this host's.
    Failed,
    /// The operator wants it off.
    Cancel,
    /// The operator wants the machine back as it was at the switchover. `lost`: and swears that it does not run
    /// at the destination and never will.
    TakeBack { lost: bool },
    /// The peer said something.
    Heard(Say),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum SourceState {
    Idle,
    Preparing,
    Copying,
    Quiescing,
    Granted,
    Draining,
    Over(Phase),
}

/// The source's half.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The epoch under which the machine is ours.
    own: Epoch,
    state: SourceState,
    /// A migration that was given up tells the destination so until it has answered.
    unanswered: bool,
    /// The destination is asked to give the machine back.
    asking_back: bool,
    /// The guest's device state is in this daemon's memory, so a grant can be said again.
    has_state: bool,
}

impl Source {
    pub fn new(own: Epoch) -> Self {
        Source {
            own,
            state: SourceState::Idle,
            unanswered: false,
            asking_back: false,
            has_state: false,
        }
    }

    /// The epoch that is being passed on.
    pub fn offered(&self) -> Epoch {
        self.own.next()
    }

    pub fn phase(&self) -> Phase {
        match self.state {
            SourceState::Idle | SourceState::Preparing => Phase::Prepare,
            SourceState::Copying => Phase::Copy,
            SourceState::Quiescing => Phase::Quiesce,
            SourceState::Granted => Phase::Grant,
            SourceState::Draining => Phase::Drain,
            SourceState::Over(phase) => phase,
        }
    }

    /// Whether this host may run the guest now.
    pub fn may_run(&self) -> bool {
        match self.state {
            SourceState::Idle
            | SourceState::Preparing
            | SourceState::Copying
            | SourceState::Quiescing
            | SourceState::Over(Phase::Cancel | Phase::Rewind) => true,
            SourceState::Granted | SourceState::Draining | SourceState::Over(_) => false,
        }
    }

    /// Whether a cancel still lies in the source's hands.
    pub fn can_cancel(&self) -> bool {
        matches!(
            self.state,
            SourceState::Idle
                | SourceState::Preparing
                | SourceState::Copying
                | SourceState::Quiescing
        )
    }

    /// Whether the machine was promised away and can still be had back.
    pub fn can_take_back(&self) -> bool {
        matches!(self.state, SourceState::Granted | SourceState::Draining)
    }

    /// Whether the destination is being asked to give the machine back.
    pub fn is_asking_back(&self) -> bool {
        self.asking_back && self.can_take_back()
    }

    /// The state that a journal tells of, and what to do first. A migration that had not granted is over:
    /// its copy lived in the daemon's memory, and the guest is simply still here.
    pub fn recover(records: &[Record]) -> (Self, Vec<Action>) {
        let mut source = Source::new(Epoch(0));
        for record in records {
            match *record {
                Record::Started { epoch } => {
                    source = Source::new(epoch);
                    source.state = SourceState::Preparing;
                }
                Record::Granted { .. } if faulty!(GrantForgotten) => {}
                Record::Granted { .. } => source.state = SourceState::Granted,
                Record::PeerAccepted { .. } => source.state = SourceState::Draining,
                Record::AskedBack { .. } if faulty!(AskingForgotten) => {}
                Record::AskedBack { .. } => source.asking_back = true,
                Record::Kept { epoch } => {
                    let phase = if source.can_take_back() {
                        Phase::Rewind
                    } else {
                        Phase::Cancel
                    };
                    source.own = epoch;
                    source.state = SourceState::Over(phase);
                }
                Record::Completed { .. } => source.state = SourceState::Over(Phase::Complete),
                Record::Preparing { .. }
                | Record::Accepted { .. }
                | Record::Refused { .. }
                | Record::Yielded { .. } => {}
            }
        }
        let actions = match source.state {
            SourceState::Preparing => source.keep(Phase::Cancel, true),
            SourceState::Draining => vec![Action::Drain],
            SourceState::Over(phase @ (Phase::Cancel | Phase::Rewind)) => {
                source.unanswered = true;
                vec![
                    Action::KeepGuest { epoch: source.own },
                    Action::Finish(phase),
                ]
            }
            _ => vec![],
        };
        (source, actions)
    }

    /// The guest stays. After a grant the epoch must pass the one that was promised. The destination is told
    /// unless it said so itself.
    fn keep(&mut self, phase: Phase, tell: bool) -> Vec<Action> {
        let offered = self.offered();
        if phase == Phase::Rewind && !faulty!(EpochNotRaised) {
            self.own = offered.next();
        }
        let epoch = self.own;
        self.state = SourceState::Over(phase);
        self.unanswered = tell;
        let mut actions = vec![Action::Journal(Record::Kept { epoch })];
        if tell {
            actions.push(Action::Send(self.farewell(phase)));
        }
        actions.push(Action::KeepGuest { epoch });
        actions.push(Action::Finish(phase));
        actions
    }

    /// What a destination is told of a migration that was given up.
    fn farewell(&self, phase: Phase) -> Say {
        match phase {
            // The machine is ours under the epoch past the one that was offered.
            Phase::Rewind => Say::GiveBack {
                epoch: Epoch(self.own.0.saturating_sub(1)),
            },
            _ => Say::Cancel {
                epoch: self.offered(),
            },
        }
    }

    pub fn handle(&mut self, event: SourceEvent) -> Vec<Action> {
        let offered = self.offered();
        match (self.state, event) {
            (SourceState::Idle, SourceEvent::Start) => {
                self.state = SourceState::Preparing;
                vec![
                    Action::Journal(Record::Started { epoch: self.own }),
                    Action::Send(Say::Prepare { epoch: offered }),
                ]
            }
            (SourceState::Preparing, SourceEvent::LinkUp) => {
                vec![Action::Send(Say::Prepare { epoch: offered })]
            }
            (SourceState::Preparing, SourceEvent::Heard(Say::Prepared { epoch }))
                if epoch == offered =>
            {
                self.state = SourceState::Copying;
                vec![Action::StartCopy]
            }
            (SourceState::Copying, SourceEvent::Switch) => {
                self.state = SourceState::Quiescing;
                vec![Action::StopGuest]
            }
            (SourceState::Quiescing, SourceEvent::Stopped) => {
                self.state = SourceState::Granted;
                self.has_state = true;
                vec![
                    Action::Journal(Record::Granted { epoch: offered }),
                    Action::Send(Say::Grant { epoch: offered }),
                ]
            }
            (
                SourceState::Idle
                | SourceState::Preparing
                | SourceState::Copying
                | SourceState::Quiescing,
                SourceEvent::Cancel | SourceEvent::Failed,
            ) => self.keep(Phase::Cancel, true),
            (
                SourceState::Preparing | SourceState::Copying | SourceState::Quiescing,
                SourceEvent::Heard(Say::Refused { epoch }),
            ) if epoch == offered => self.keep(Phase::Cancel, false),
            (
                SourceState::Granted | SourceState::Draining,
                SourceEvent::TakeBack { lost: true },
            ) => self.keep(Phase::Rewind, true),
            (
                SourceState::Granted | SourceState::Draining,
                SourceEvent::TakeBack { lost: false },
            ) => {
                self.asking_back = true;
                vec![
                    Action::Journal(Record::AskedBack { epoch: offered }),
                    Action::Send(Say::GiveBack { epoch: offered }),
                ]
            }
            // It has given the machine back, whether or not this daemon knows that it was asked to.
            (
                SourceState::Granted | SourceState::Draining,
                SourceEvent::Heard(Say::Yielded { epoch }),
            ) if epoch == offered => self.keep(Phase::Rewind, false),
            (SourceState::Draining, SourceEvent::Heard(Say::Refused { epoch }))
                if epoch == offered && self.asking_back =>
            {
                self.keep(Phase::Rewind, false)
            }
            // Nothing more is offered, and nothing is completed: only the answer counts.
            (
                SourceState::Granted | SourceState::Draining,
                SourceEvent::LinkUp
                | SourceEvent::Heard(Say::Accepted { .. } | Say::Drained { .. }),
            ) if self.asking_back => {
                vec![Action::Send(Say::GiveBack { epoch: offered })]
            }
            (SourceState::Granted, SourceEvent::LinkUp) => {
                let epoch = offered;
                vec![Action::Send(if self.has_state {
                    Say::Grant { epoch }
                } else {
                    Say::Ask { epoch }
                })]
            }
            (SourceState::Granted, SourceEvent::Heard(Say::Accepted { epoch }))
                if epoch == offered || faulty!(OldEpochAccepted) =>
            {
                self.state = SourceState::Draining;
                vec![
                    Action::Journal(Record::PeerAccepted { epoch }),
                    Action::Drain,
                ]
            }
            (SourceState::Granted, SourceEvent::Heard(Say::Refused { .. }))
                if faulty!(RefusalIgnored) =>
            {
                vec![]
            }
            (SourceState::Granted, SourceEvent::Heard(Say::Refused { epoch }))
                if epoch == offered || faulty!(OldEpochAccepted) =>
            {
                self.keep(Phase::Rewind, false)
            }
            // An acceptance and the drain's end may both be news after a restart.
            (
                SourceState::Granted | SourceState::Draining,
                SourceEvent::Heard(Say::Drained { epoch }),
            ) if epoch == offered => {
                self.state = SourceState::Over(Phase::Complete);
                vec![
                    Action::Journal(Record::Completed { epoch }),
                    Action::Send(Say::Completed { epoch }),
                    Action::Finish(Phase::Complete),
                ]
            }
            // A destination that was restarted before it heard so begins at its acceptance again.
            (
                SourceState::Over(Phase::Complete),
                SourceEvent::Heard(Say::Drained { epoch } | Say::Accepted { epoch }),
            ) if epoch == offered && !faulty!(CompletedNotRepeated) => {
                vec![Action::Send(Say::Completed { epoch })]
            }
            (
                SourceState::Over(phase @ (Phase::Cancel | Phase::Rewind)),
                SourceEvent::LinkUp
                | SourceEvent::Heard(Say::Accepted { .. } | Say::Drained { .. }),
            ) if self.unanswered => vec![Action::Send(self.farewell(phase))],
            (
                SourceState::Over(phase @ (Phase::Cancel | Phase::Rewind)),
                SourceEvent::Heard(Say::Refused { epoch } | Say::Yielded { epoch }),
            ) if epoch == self.farewell(phase).epoch() => {
                self.unanswered = false;
                vec![]
            }
            _ => vec![],
        }
    }

    /// Whether the destination may still hold something of a migration that was given up.
    pub fn is_unanswered(&self) -> bool {
        self.unanswered
    }
}

/// What happens at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// `MakeReady` succeeded.
    Ready,
    /// The guest's vCPUs were started: QEMU said so.
    Running,
    /// Making ready failed; or running failed and *the guest surely never ran here*.
    Failed,
    /// Nothing is absent any more and all of it is durable.
    NothingAbsent,
    /// A connection to the peer is up (again).
    LinkUp,
    /// The peer said something.
    Heard(Say),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum DestinationState {
    Idle,
    Preparing,
    Ready,
    Accepted,
    Running,
    Drained,
    Refused,
    Yielded,
    Over,
}

/// The destination's half.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    epoch: Epoch,
    state: DestinationState,
}

impl Destination {
    /// For a migration that offers this epoch.
    pub fn new(epoch: Epoch) -> Self {
        Destination {
            epoch,
            state: DestinationState::Idle,
        }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub fn phase(&self) -> Phase {
        match self.state {
            DestinationState::Idle | DestinationState::Preparing => Phase::Prepare,
            DestinationState::Ready => Phase::Copy,
            DestinationState::Accepted => Phase::Accept,
            DestinationState::Running | DestinationState::Drained => Phase::Drain,
            DestinationState::Refused => Phase::Cancel,
            DestinationState::Yielded => Phase::Rewind,
            DestinationState::Over => Phase::Complete,
        }
    }

    /// Whether this host may run the guest now.
    pub fn may_run(&self) -> bool {
        matches!(
            self.state,
            DestinationState::Accepted
                | DestinationState::Running
                | DestinationState::Drained
                | DestinationState::Over
        )
    }

    /// The state that a journal tells of, and what to do first. A destination that had not accepted lost
    /// its incoming QEMU's memory with the daemon: it refuses.
    ///
    /// One that had accepted is the owner; whether its guest runs is for the daemon to find out.
    pub fn recover(records: &[Record]) -> (Self, Vec<Action>) {
        let mut destination = Destination::new(Epoch(0));
        for record in records {
            match *record {
                Record::Preparing { epoch } => destination.at(epoch, DestinationState::Preparing),
                Record::Accepted { .. } if faulty!(AcceptanceForgotten) => {}
                Record::Accepted { epoch } => destination.at(epoch, DestinationState::Accepted),
                Record::Refused { epoch } => destination.at(epoch, DestinationState::Refused),
                Record::Completed { epoch } => destination.at(epoch, DestinationState::Over),
                Record::Yielded { epoch } => destination.at(epoch, DestinationState::Yielded),
                Record::Started { .. }
                | Record::Granted { .. }
                | Record::PeerAccepted { .. }
                | Record::Kept { .. }
                | Record::AskedBack { .. } => {}
            }
        }
        let actions = match destination.state {
            DestinationState::Preparing => destination.refuse(),
            DestinationState::Accepted => vec![Action::Inspect],
            DestinationState::Refused => vec![Action::CleanUp, Action::Finish(Phase::Cancel)],
            DestinationState::Yielded => vec![Action::EndGuest, Action::Finish(Phase::Rewind)],
            _ => vec![],
        };
        (destination, actions)
    }

    fn at(&mut self, epoch: Epoch, state: DestinationState) {
        self.epoch = epoch;
        self.state = state;
    }

    fn refuse(&mut self) -> Vec<Action> {
        let epoch = self.epoch;
        self.state = DestinationState::Refused;
        vec![
            Action::Journal(Record::Refused { epoch }),
            Action::CleanUp,
            Action::Send(Say::Refused { epoch }),
            Action::Finish(Phase::Cancel),
        ]
    }

    /// The guest ran here, or may have, and shall not any more.
    fn give_back(&mut self) -> Vec<Action> {
        let epoch = self.epoch;
        self.state = DestinationState::Yielded;
        let mut actions = vec![
            Action::Journal(Record::Yielded { epoch }),
            Action::EndGuest,
            Action::Send(Say::Yielded { epoch }),
            Action::Finish(Phase::Rewind),
        ];
        if faulty!(YieldedEarly) {
            actions.swap(1, 2);
        }
        actions
    }

    pub fn handle(&mut self, event: DestinationEvent) -> Vec<Action> {
        let epoch = self.epoch;
        match (self.state, event) {
            (_, DestinationEvent::Heard(say))
                if say.epoch() != epoch && !faulty!(OldEpochAccepted) =>
            {
                vec![]
            }
            (DestinationState::Idle, DestinationEvent::Heard(Say::Prepare { .. })) => {
                self.state = DestinationState::Preparing;
                vec![
                    Action::Journal(Record::Preparing { epoch }),
                    Action::MakeReady,
                ]
            }
            (DestinationState::Preparing, DestinationEvent::Ready) => {
                self.state = DestinationState::Ready;
                vec![Action::Send(Say::Prepared { epoch })]
            }
            (DestinationState::Ready, DestinationEvent::Heard(Say::Prepare { .. })) => {
                vec![Action::Send(Say::Prepared { epoch })]
            }
            (DestinationState::Ready, DestinationEvent::Heard(Say::Grant { .. })) => {
                self.state = DestinationState::Accepted;
                let mut actions = vec![
                    Action::Journal(Record::Accepted { epoch }),
                    Action::RunGuest { epoch },
                ];
                if faulty!(AcceptedEarly) {
                    actions.insert(1, Action::Send(Say::Accepted { epoch }));
                }
                actions
            }
            // Silent until the guest runs: until then the epoch may still be refused.
            (DestinationState::Accepted, DestinationEvent::Running) => {
                self.state = DestinationState::Running;
                vec![Action::Send(Say::Accepted { epoch })]
            }
            (DestinationState::Accepted, DestinationEvent::Failed) => self.refuse(),
            // The question of a lost answer, a late cancel, or a grant that came twice.
            (
                DestinationState::Running,
                DestinationEvent::LinkUp
                | DestinationEvent::Heard(Say::Grant { .. } | Say::Ask { .. } | Say::Cancel { .. }),
            ) => vec![Action::Send(Say::Accepted { epoch })],
            (DestinationState::Running, DestinationEvent::NothingAbsent) => {
                self.state = DestinationState::Drained;
                vec![Action::Send(Say::Drained { epoch })]
            }
            (
                DestinationState::Drained,
                DestinationEvent::LinkUp
                | DestinationEvent::Heard(Say::Grant { .. } | Say::Ask { .. } | Say::Cancel { .. }),
            ) => vec![Action::Send(Say::Drained { epoch })],
            // Said only after this side has said, perhaps before a restart, that it has all, and durably.
            (
                DestinationState::Running | DestinationState::Drained,
                DestinationEvent::Heard(Say::Completed { .. }),
            ) => {
                self.state = DestinationState::Over;
                vec![
                    Action::Journal(Record::Completed { epoch }),
                    Action::Finish(Phase::Complete),
                ]
            }
            (
                DestinationState::Idle | DestinationState::Preparing | DestinationState::Ready,
                DestinationEvent::Failed
                | DestinationEvent::Heard(
                    Say::Cancel { .. } | Say::Ask { .. } | Say::GiveBack { .. },
                ),
            ) => self.refuse(),
            (
                DestinationState::Accepted | DestinationState::Running | DestinationState::Drained,
                DestinationEvent::Heard(Say::GiveBack { .. }),
            ) => self.give_back(),
            (
                DestinationState::Yielded,
                DestinationEvent::LinkUp
                | DestinationEvent::Heard(
                    Say::Cancel { .. } | Say::Ask { .. } | Say::Grant { .. } | Say::GiveBack { .. },
                ),
            ) => vec![Action::Send(Say::Yielded { epoch })],
            (
                DestinationState::Refused,
                DestinationEvent::LinkUp
                | DestinationEvent::Heard(
                    Say::Cancel { .. }
                    | Say::Ask { .. }
                    | Say::Grant { .. }
                    | Say::Prepare { .. }
                    | Say::GiveBack { .. },
                ),
            ) => vec![Action::Send(Say::Refused { epoch })],
            _ => vec![],
        }
    }
}
