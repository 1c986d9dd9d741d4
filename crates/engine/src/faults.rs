//! Deliberate faults, to see that the simulator finds them. Compiled in by the feature `faults` only, which
//! nothing that is shipped has; without it each point is the constant `false`.

use std::cell::Cell;

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A unit counts as resident before its copy is stored.
    ResidentBeforeData,
    /// A copy that comes late is stored over what the guest wrote.
    LateCopyStored,
    /// A copy is stored over the sectors that the guest wrote of a unit.
    PartialWriteForgotten,
    /// The guest's first write to a unit that a copy made resident has no record.
    NoRecordOfWrite,
    /// Messages of other epochs are heeded.
    OldEpochAccepted,
    /// Stale pages stay.
    StaleNotEvicted,
    /// What went ahead in vain is not sent again.
    VainNotSentAgain,
    /// A unit that was handed out stays pending, for the other drain to hand it out too.
    TwoDrains,
    /// After a reconnect what was sent counts as held.
    OldBitmapAfterReconnect,
    /// Units whose content is not there yet are pushed all the same.
    WithheldPushed,
    /// What a guest writes to after it went ahead is not noticed.
    WrittenAfterItWentTakenForNew,
    /// After a reconnect a unit that was sent twice counts as held, whichever copy that is.
    OldCopyTakenForNew,
    /// A restarted source forgets its grant.
    GrantForgotten,
    /// A restarted destination forgets its acceptance.
    AcceptanceForgotten,
    /// A destination says that it has accepted before its guest runs.
    AcceptedEarly,
    /// A source that takes the machine back keeps its old epoch.
    EpochNotRaised,
    /// A refused machine is not taken back.
    RefusalIgnored,
    /// A destination that was restarted before it heard that all is over is not told.
    CompletedNotRepeated,
    /// A restarted source forgets that it asked for the machine back.
    AskingForgotten,
    /// A destination says that it has given the machine back before its guest has ended.
    YieldedEarly,
}

impl Fault {
    pub const ALL: [Fault; 20] = [
        Fault::ResidentBeforeData,
        Fault::LateCopyStored,
        Fault::PartialWriteForgotten,
        Fault::NoRecordOfWrite,
        Fault::OldEpochAccepted,
        Fault::StaleNotEvicted,
        Fault::VainNotSentAgain,
        Fault::TwoDrains,
        Fault::OldBitmapAfterReconnect,
        Fault::WithheldPushed,
        Fault::WrittenAfterItWentTakenForNew,
        Fault::OldCopyTakenForNew,
        Fault::GrantForgotten,
        Fault::AcceptanceForgotten,
        Fault::AcceptedEarly,
        Fault::EpochNotRaised,
        Fault::RefusalIgnored,
        Fault::CompletedNotRepeated,
        Fault::AskingForgotten,
        Fault::YieldedEarly,
    ];
}

thread_local! {
    static CHOSEN: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// From now on this thread's engine has this fault, or none.
pub fn choose(fault: Option<Fault>) {
    CHOSEN.set(fault);
}

pub(crate) fn has(fault: Fault) -> bool {
    CHOSEN.get() == Some(fault)
}
