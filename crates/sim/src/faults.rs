//! Deliberate faults: a simulator that does not find them is of no use.
//!
//! Those of the engine are compiled in by the feature `faults` alone (`whimbrel_engine::faults`); those of the
//! driver are of this crate's own model of `crates/host`, which is not shipped.

/// A fault in the model of the daemons' drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverFault {
    /// The grant is said without having been written down.
    GrantNotDurable,
    /// A flush is answered when the data is durable, whatever of its residency is.
    FlushBeforeResidency,
    /// A flush makes residency durable before the data.
    ResidencyBeforeData,
    /// A write is answered before its record is written.
    WriteBeforeRecord,
    /// A discard of absent units is done in the file and told to nobody.
    DiscardLost,
    /// A restarted destination does not know which sectors the guest wrote of units that are absent.
    PartsForgottenAtRestart,
    /// After a reconnect the source takes what it says to be stale for held.
    StaleTakenForHeld,
    /// A restarted source takes for held what a destination holds that has not evicted what is stale.
    UnknownTakenForHeld,
    /// On a new connection the source speaks of empty units before it says the grant again.
    EmptyBeforeGrant,
    /// The destination lets RAM in before it has evicted what is stale.
    GateLeftOpen,
    /// A destination that accepted, and was restarted, refuses without asking QEMU.
    RefusedUnasked,
    /// The source lets the disks' content flow before they are frozen.
    CopyBeforeFreeze,
    /// What comes ahead is recorded at once.
    RecordedAhead,
    /// What is empty is taken to read as zeroes where an old copy came ahead.
    TroddenTakenForFresh,
    /// What of the disks was said to be stale is not said again on a new connection.
    StaleSaidOnce,
    /// After a power cut what is here is compared with the source, whatever the guest may have written to it.
    DoubtForgotten,
    /// A source that is complete leaves a silent connection as if all it said had been heard.
    FarewellUnheard,
    /// What the destination could not store is taken for stored.
    UnstoredUnheard,
    /// What the destination had before is taken for the same, whatever it is.
    OldCopyTakenForSame,
}

impl DriverFault {
    pub const ALL: [DriverFault; 19] = [
        DriverFault::GrantNotDurable,
        DriverFault::FlushBeforeResidency,
        DriverFault::ResidencyBeforeData,
        DriverFault::WriteBeforeRecord,
        DriverFault::DiscardLost,
        DriverFault::PartsForgottenAtRestart,
        DriverFault::StaleTakenForHeld,
        DriverFault::UnknownTakenForHeld,
        DriverFault::EmptyBeforeGrant,
        DriverFault::GateLeftOpen,
        DriverFault::RefusedUnasked,
        DriverFault::CopyBeforeFreeze,
        DriverFault::RecordedAhead,
        DriverFault::TroddenTakenForFresh,
        DriverFault::StaleSaidOnce,
        DriverFault::DoubtForgotten,
        DriverFault::FarewellUnheard,
        DriverFault::UnstoredUnheard,
        DriverFault::OldCopyTakenForSame,
    ];
}
