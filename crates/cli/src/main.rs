//! The `whimbrel` command: everything a person or a script says to a host, and the daemon itself.
//!
//! Errors go to standard error in four parts (what, where, the machine's state now, what to do next), or as
//! an object with `--json`; the exit code tells programs the same (see [`error::Exit`]).

mod args;
mod client;
mod context;
mod daemon;
mod error;
mod fsck;
mod host;
mod machine;
mod manual;
mod migration;
mod output;
mod peers;
mod picture;
mod progress;
mod recovery;
mod report;
mod show;
mod snapshot;
mod trace;
mod volume;

use args::{Cli, Command, HostCommand};
use clap::Parser;
use context::Context;
use error::{CliError, Exit};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refusal) => return refuse(&refusal),
    };
    let json = cli.global.json;
    match run(cli) {
        Ok(()) => ExitCode::from(Exit::Done as u8),
        Err(error) => {
            output::print_error(&error, json);
            ExitCode::from(error.exit() as u8)
        }
    }
}

/// Help and version are answers, all else is a usage error, an object where JSON was asked for.
fn refuse(refusal: &clap::Error) -> ExitCode {
    let json = std::env::args_os().any(|a| a == "--json");
    if refusal.use_stderr() && json {
        output::note(&output::usage_object(&refusal.render().to_string()));
    } else {
        // Nothing can be done about a closed output.
        let _ = refusal.print();
    }
    ExitCode::from(if refusal.use_stderr() {
        Exit::Usage
    } else {
        Exit::Done
    } as u8)
}

fn run(cli: Cli) -> Result<(), CliError> {
    match cli.command {
        Command::Completions { shell } => {
            manual::completions(shell);
            return Ok(());
        }
        Command::Man { dir } => return manual::pages(&dir),
        Command::Trace(command) if !command.asks_daemon() => {
            return trace::trace(command, cli.global.json);
        }
        _ => {}
    }
    let mut context = Context::new(cli.global)?;
    if let Command::Host(HostCommand::Run { listen }) = cli.command {
        if let Some(listen) = listen {
            context.config.listen = listen;
        }
        let runtime = tokio::runtime::Runtime::new().map_err(CliError::Runtime)?;
        return runtime.block_on(daemon::run(context.config, context.json));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    runtime.block_on(ask(&context, cli.command))
}

async fn ask(context: &Context, command: Command) -> Result<(), CliError> {
    match command {
        Command::Host(command) => host::host(context, command).await,
        Command::Volume(command) => volume::volume(context, command).await,
        Command::Machine(command) => machine::machine(context, command).await,
        Command::Snapshot(command) => snapshot::snapshot(context, command).await,
        Command::Migrate(command) => migration::migrate(context, command).await,
        Command::Switch { machine } => migration::switch(context, machine).await,
        Command::Status { machine } => migration::status(context, machine).await,
        Command::Watch { machine } => migration::watch(context, machine).await,
        Command::Report(command) => report::report(context, command).await,
        Command::Cancel { machine } => migration::cancel(context, machine).await,
        Command::Recover {
            machine,
            take_back,
            lost,
        } => recovery::recover(context, machine, take_back, lost).await,
        Command::Trace(command) => trace::record::record(context, command).await,
        Command::Fsck { dir } => fsck::fsck(context, dir).await,
        Command::Throttle { machine, rate } => migration::throttle(context, machine, rate).await,
        // Done before, without a configuration or a runtime.
        Command::Completions { .. } | Command::Man { .. } => Ok(()),
    }
}
