//! What a migration came to, for people: the figures that follow from its record, plots of it, and a page.
//!
//! All pure functions of a [`ReportView`](crate::api::ReportView): the daemon says what it knows, and whoever asked
//! draws.

mod figures;
pub mod page;
pub mod plot;
mod plots;
pub mod summary;

pub use figures::{elsewhere, ratio};
pub use page::html;
pub use plots::svg;
pub use summary::summary;
