//! `whimbrel host run`: the log, the signals, the daemon.

use crate::error::CliError;
use std::io::IsTerminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use whimbrel_host::config::Config;

/// Runs the daemon until it ends or is told to stop. A second signal ends the process at once.
pub async fn run(config: Config, json: bool) -> Result<(), CliError> {
    start_log(&config.log, json)?;
    let stopping = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::Runtime)?;
    let daemon = whimbrel_host::daemon::run(config, stopping.clone());
    tokio::pin!(daemon);
    tokio::select! {
        result = &mut daemon => return Ok(result?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; machines keep running");
    stopping.cancel();
    tokio::select! {
        result = &mut daemon => Ok(result?),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

/// The log goes to standard error. `RUST_LOG` goes before the configuration.
fn start_log(filter: &str, json: bool) -> Result<(), CliError> {
    let filter = std::env::var(EnvFilter::DEFAULT_ENV)
        .ok()
        .filter(|f| !f.is_empty())
        .unwrap_or_else(|| filter.to_string());
    let parsed = EnvFilter::builder()
        .parse(&filter)
        .map_err(|source| CliError::LogFilter { filter, source })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr);
    if json {
        log.json().init();
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).init();
    }
    Ok(())
}
