//! `whimbrel trace record`: the daemon writes, this waits.

use super::args::TraceCommand;
use crate::context::Context;
use crate::error::CliError;
use crate::output;
use crate::show::bytes;
use crate::volume::whole_path;
use hyper::Method;
use std::time::{Duration, Instant};
use whimbrel_host::api::{RecordTrace, RecordingEnd, RecordingProgress, RecordingView};

/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);

pub async fn record(context: &Context, command: TraceCommand) -> Result<(), CliError> {
    let TraceCommand::Record { name, time, out } = command else {
        return Ok(());
    };
    let request = RecordTrace {
        file: whole_path(&out)?,
        for_ms: time.map(|time| time.as_millis().min(u128::from(u64::MAX)) as u64),
    };
    let path = format!("/v1/recordings/{name}");
    let mut told = Instant::now();
    let news = |so_far: RecordingProgress| {
        if !context.json && told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            output::note(&line(&so_far));
        }
    };
    let client = &context.client;
    let recording = client.stream::<_, RecordingView>(Method::POST, &path, Some(&request), news);
    tokio::pin!(recording);
    let view = tokio::select! {
        view = &mut recording => view?,
        // The trace is finished like any other. A second Ctrl-C ends this command alone, and the daemon then sees to it.
        _ = tokio::signal::ctrl_c() => {
            let end = async {
                client.delete(&path).await?;
                std::future::pending::<Result<RecordingView, CliError>>().await
            };
            tokio::select! {
                view = &mut recording => view?,
                refused = end => refused?,
                _ = tokio::signal::ctrl_c() => {
                    return Err(CliError::LeftRecording { volume: name });
                }
            }
        }
    };
    context.answer(&view, text);
    Ok(())
}

fn line(so_far: &RecordingProgress) -> String {
    let lost = match so_far.lost {
        0 => String::new(),
        n => format!(", {n} MORE LOST since they came too fast"),
    };
    format!(
        "{} requests in {:.1} s, {}{lost}",
        so_far.requests,
        so_far.elapsed_ms as f64 / 1e3,
        bytes(so_far.bytes)
    )
}

fn text(view: &RecordingView) -> String {
    let why = match view.ended {
        RecordingEnd::Time | RecordingEnd::Asked | RecordingEnd::Left => "",
        RecordingEnd::Full => "\nit ended early: a trace becomes no longer",
        RecordingEnd::Gone => "\nit ended early: the machine does not run here any more",
    };
    format!(
        "{}: volume {}, {}{why}",
        view.file.display(),
        view.volume,
        line(&view.came_to)
    )
}
