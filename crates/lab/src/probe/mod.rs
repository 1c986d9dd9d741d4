//! What the guest's users see, measured from the client: is it there ([`echo`]), how fast does it work
//! ([`lines`]), and a word with it ([`talk`]).

pub mod echo;
pub mod lines;
pub mod series;
pub mod talk;

pub use echo::{EchoProber, EchoSpec};
pub use lines::{CollectedLine, LineCollector};
pub use series::{EchoSeries, Gap, Probe, Window};
pub use talk::LineClient;
