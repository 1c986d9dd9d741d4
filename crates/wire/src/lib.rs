//! What two daemons say to each other: frames, messages, unit codecs

pub mod frame;
