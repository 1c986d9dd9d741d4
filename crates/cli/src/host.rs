//! `whimbrel host ...`. All but `run` work with and without a daemon.

use crate::args::HostCommand;
use crate::client::nobody_listens;
use crate::context::Context;
use crate::error::CliError;
use crate::output;
use crate::peers;
use crate::show;
use whimbrel_host::api::{AllowPeer, HostView, TrustRequest};
use whimbrel_host::state::{HostRecord, StateDir, StateError, Timestamp, default_host_name};
use whimbrel_peer::identity::Identity;
use whimbrel_peer::trust::{PeerName, TrustStore};

pub async fn host(context: &Context, command: HostCommand) -> Result<(), CliError> {
    match command {
        HostCommand::Init { name } => init(context, name),
        // `main` runs the daemon, on a runtime of its own.
        HostCommand::Run { .. } => Ok(()),
        HostCommand::Show => {
            let view = match context.client.get("/v1/host").await {
                Err(e) if nobody_listens(&e) => without_daemon(context)?,
                other => other?,
            };
            context.answer(&view, show::host);
            Ok(())
        }
        HostCommand::Invite(invite) => peers::invite(context, invite).await,
        HostCommand::Join(join) => peers::join(context, join).await,
        HostCommand::Ls => peers::list(context).await,
        HostCommand::Trust {
            name,
            key,
            addresses,
            may,
        } => {
            let request = TrustRequest {
                name,
                key,
                addresses,
                may,
            };
            peers::trust_host(context, request).await
        }
        HostCommand::Rename { old, new } => peers::rename(context, old, new).await,
        HostCommand::Allow {
            name,
            send,
            receive,
        } => {
            let change = AllowPeer {
                send: send.map(bool::from),
                receive: receive.map(bool::from),
            };
            peers::allow(context, name, change).await
        }
        HostCommand::Revoke { name, force } => peers::revoke(context, name, force).await,
    }
}

fn init(context: &Context, name: Option<PeerName>) -> Result<(), CliError> {
    let state = StateDir::init(&context.config.state)?;
    Identity::load_or_create(&state.identity_path())?;
    match (state.host(), name) {
        (Ok(record), Some(name)) if record.name != name => {
            state.save_host(&HostRecord {
                name,
                created: record.created,
            })?;
        }
        (Ok(_), _) => {}
        (Err(StateError::NotInitialised { .. }), name) => {
            let name = name.unwrap_or_else(default_host_name);
            state.save_host(&HostRecord {
                name,
                created: Timestamp::now(),
            })?;
        }
        (Err(other), _) => return Err(other.into()),
    }
    let view = without_daemon(context)?;
    context.answer(&view, show::host);
    if !context.json {
        output::note(&format!(
            "\nNext: `whimbrel host run` here. Then, to move machines between this host and another, `whimbrel host invite` on one\nand `whimbrel host join TOKEN` on the other. Or, without a token, on each the other's key:\n  whimbrel host trust {} {} ADDRESS:{}",
            view.name,
            view.key,
            context.config.listen.port()
        ));
    }
    Ok(())
}

fn without_daemon(context: &Context) -> Result<HostView, CliError> {
    let state = context.state()?;
    Ok(HostView {
        name: state.host()?.name,
        key: Identity::load(&state.identity_path())?.key_id(),
        listen: context.config.listen.to_string(),
        version: env!("CARGO_PKG_VERSION").to_string(),
        state_dir: state.root().to_path_buf(),
        daemon: None,
        peers: peers::views_of(&TrustStore::load(state.peers_path())?),
    })
}
