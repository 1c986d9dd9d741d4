//! Whole migrations under virtual time, and the switchover's states one by one.

#[cfg(feature = "faults")]
mod deliberate_faults;
mod every_state;
mod schedules;
