//! `whimbrel-lab bench ...`: what is measured or tried over and over.

mod soak;

use clap::Subcommand;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Many moves under different links and loads; no error is allowed
    Soak(soak::SoakArgs),
}

impl Bench {
    pub fn run(&self) -> ExitCode {
        match self {
            Bench::Soak(args) => soak::run(args),
        }
    }
}
