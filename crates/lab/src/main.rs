//! `whimbrel-lab`: shows a machine being moved, and measures. Run by `cargo xtask demo` and `cargo xtask bench`.

mod bench;
mod compare;
mod demo;
mod link;
mod screen;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Whimbrel's laboratory: two hosts, a wide area between them and a guest, all on this machine
#[derive(Debug, Parser)]
#[command(name = "whimbrel-lab")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Move a running machine to another host and check everything
    Demo(demo::DemoArgs),
    /// Measure something
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Bench(bench) => bench.run(),
    }
}
