//! `whimbrel migrate`, `switch`, `status`, `watch`, `cancel` and `throttle`.

use crate::args::Migrate;
use crate::client::Client;
use crate::context::Context;
use crate::error::CliError;
use crate::output;
use crate::progress::MigrationProgress;
use crate::show;
use hyper::Method;
use std::time::{Duration, Instant};
use whimbrel_host::api::{
    Listed, MachineView, MigrateRequest, MigrationState, MigrationView, ThrottleRequest,
};
use whimbrel_host::state::{MigrationId, Name, RateLimit};

/// How long a watcher waits for a daemon that went away, a restart being the usual reason; then it fails.
const DAEMON_AWAY: Duration = Duration::from_secs(30);
const TRY_AGAIN: Duration = Duration::from_millis(500);

pub async fn migrate(context: &Context, command: Migrate) -> Result<(), CliError> {
    let request = MigrateRequest {
        machine: command.machine,
        to: command.to,
        bandwidth: command.bandwidth,
        hold: command.hold,
        ram: command.ram.into(),
        disks: command.disks.into(),
        guest_latency: command.guest_latency,
        compress: command.compress,
        delta: command.delta,
        ram_order: command.ram_order,
    };
    let view: MigrationView = context.client.post("/v1/migrations", &request).await?;
    if command.detach {
        context.answer(&view, |v| {
            format!(
                "{} is on its way to {}; `whimbrel watch {}` follows it",
                v.machine, v.peer, v.machine
            )
        });
        return Ok(());
    }
    follow(context, &view.id, &view.machine).await
}

pub async fn switch(context: &Context, machine: Name) -> Result<(), CliError> {
    let view: MigrationView = context
        .client
        .order(&format!("/v1/machines/{machine}/switch"))
        .await?;
    context.answer(&view, |v| {
        format!("{} switches to {} now", v.machine, v.peer)
    });
    Ok(())
}

pub async fn cancel(context: &Context, machine: Name) -> Result<(), CliError> {
    let view: MigrationView = context
        .client
        .order(&format!("/v1/machines/{machine}/cancel"))
        .await?;
    context.answer(&view, |v| match v.state {
        MigrationState::Cancelled => format!("the migration of {} was cancelled", v.machine),
        other => format!(
            "the migration of {} is being given up ({})",
            v.machine,
            show::state(other)
        ),
    });
    Ok(())
}

pub async fn throttle(
    context: &Context,
    machine: Name,
    bandwidth: RateLimit,
) -> Result<(), CliError> {
    let path = format!("/v1/machines/{machine}/throttle");
    let view: MigrationView = context
        .client
        .post(&path, &ThrottleRequest { bandwidth })
        .await?;
    context.answer(&view, |v| {
        format!("the migration of {} may use {}", v.machine, v.bandwidth)
    });
    Ok(())
}

pub async fn status(context: &Context, machine: Option<Name>) -> Result<(), CliError> {
    let client = &context.client;
    if let Some(name) = machine {
        let machine: MachineView = client.get(&format!("/v1/machines/{name}")).await?;
        let migration: Option<MigrationView> = match &machine.migration {
            Some(id) => Some(client.get(&format!("/v1/migrations/{id}")).await?),
            None => None,
        };
        let both = serde_json::json!({ "machine": machine, "migration": migration });
        context.answer(&both, |_| match &migration {
            Some(m) => format!("{}\n\n{}", show::machine(&machine), show::migration(m)),
            None => show::machine(&machine),
        });
        return Ok(());
    }
    let machines: Listed<MachineView> = client.get("/v1/machines").await?;
    let migrations: Listed<MigrationView> = client.get("/v1/migrations").await?;
    if context.json {
        output::print_json(&serde_json::json!({ "machines": machines, "migrations": migrations }));
        return Ok(());
    }
    context.answer_list(&machines, show::machines);
    if !migrations.items.is_empty() || !migrations.damaged.is_empty() {
        output::print("");
        context.answer_list(&migrations, show::migrations);
    }
    Ok(())
}

pub async fn watch(context: &Context, machine: Option<Name>) -> Result<(), CliError> {
    if let Some(name) = machine {
        let machine: MachineView = context.client.get(&format!("/v1/machines/{name}")).await?;
        return match machine.migration {
            Some(id) => follow(context, &id, &name).await,
            None => {
                context.done(&format!("{name} does not migrate"));
                Ok(())
            }
        };
    }
    let all: Listed<MigrationView> = context.client.get("/v1/migrations").await?;
    let mut going: Vec<MigrationView> = all
        .items
        .into_iter()
        .filter(|m| !m.state.is_settled())
        .collect();
    match (going.pop(), going.is_empty()) {
        (None, _) => {
            context.done("nothing migrates");
            Ok(())
        }
        (Some(one), true) => follow(context, &one.id, &one.machine).await,
        (Some(one), false) => {
            going.push(one);
            Err(CliError::WhichMigration(
                going.into_iter().map(|m| m.machine).collect(),
            ))
        }
    }
}

/// Shows a migration until it is settled; what it came to decides the exit code.
async fn follow(context: &Context, id: &MigrationId, machine: &Name) -> Result<(), CliError> {
    let mut progress = MigrationProgress::new(context.json);
    let last = tokio::select! {
        result = until_settled(&context.client, id, &mut progress) => result?,
        _ = tokio::signal::ctrl_c() => {
            progress.finish();
            return Err(CliError::Interrupted { machine: machine.clone() });
        }
    };
    progress.show(&last);
    progress.finish();
    if last.state != MigrationState::Completed {
        return Err(CliError::Migration(Box::new(last)));
    }
    if let (Some(report), false) = (&last.report, context.json) {
        output::print(&show::report(report));
    }
    Ok(())
}

/// Watches over a daemon's restarts: it goes on with the migration when it is back.
async fn until_settled(
    client: &Client,
    id: &MigrationId,
    progress: &mut MigrationProgress,
) -> Result<MigrationView, CliError> {
    let path = format!("/v1/migrations/{id}/watch");
    let mut away: Option<Instant> = None;
    loop {
        let news = |view: MigrationView| {
            if away.take().is_some() {
                progress.say("the daemon is back");
            }
            progress.show(&view);
        };
        match client.stream(Method::GET, &path, None::<&()>, news).await {
            Err(e) if e.daemon_is_away() => {
                if away.is_none() {
                    progress.say(&format!(
                        "{e}; waiting for the daemon, {} s at most",
                        DAEMON_AWAY.as_secs()
                    ));
                }
                if away.get_or_insert_with(Instant::now).elapsed() >= DAEMON_AWAY {
                    return Err(e);
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
            other => return other,
        }
    }
}
