//! What the guest's program and the laboratory outside it must agree on: the parameters on the kernel
//! command line, the lines the program reports with, and the formats of everything it checks.
//!
//! The program itself is `main.rs` and the modules beside it.

pub mod cell;
pub mod chance;
pub mod error;
pub mod manifest;
pub mod params;
pub mod replay;
pub mod report;

pub use error::Error;
