//! `whimbrel host ...`. All but `run` work with and without a daemon.

use crate::args::HostCommand;
use crate::client::nobody_listens;
use crate::context::Context;
use crate::error::CliError;
use crate::output;
use crate::show;
use whimbrel_host::api::{HostView, Listed, PeerView, TrustRequest};
use whimbrel_host::state::{HostRecord, StateDir, StateError, Timestamp, default_host_name, trust};
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
        HostCommand::Ls => {
            let peers = match context.client.get("/v1/peers").await {
                Err(e) if nobody_listens(&e) => Listed {
                    items: peers_of(&TrustStore::load(context.state()?.peers_path())?),
                    damaged: Vec::new(),
                },
                other => other?,
            };
            context.answer_list(&peers, show::peers);
            Ok(())
        }
        HostCommand::Trust {
            name,
            key,
            addresses,
        } => {
            let request = TrustRequest {
                name,
                key,
                addresses,
            };
            let view = match context.client.put("/v1/peers", &request).await {
                Err(e) if nobody_listens(&e) => {
                    let store = TrustStore::load(context.state()?.peers_path())?;
                    trust(&store, request.clone())?;
                    let TrustRequest {
                        name,
                        key,
                        addresses,
                    } = request;
                    PeerView {
                        name,
                        key,
                        addresses,
                        link: None,
                    }
                }
                other => other?,
            };
            context.answer(&view, |v| {
                format!(
                    "{} is trusted. It must trust this host as well: `whimbrel host trust` there",
                    v.name
                )
            });
            Ok(())
        }
        HostCommand::Untrust { name } => {
            match context.client.delete(&format!("/v1/peers/{name}")).await {
                Err(e) if nobody_listens(&e) => {
                    TrustStore::load(context.state()?.peers_path())?.remove(&name)?;
                }
                other => other?,
            }
            context.done(&format!("{name} is trusted no more"));
            Ok(())
        }
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
            "\nNext: `whimbrel host run` here, and on every host to move machines to or from:\n  whimbrel host trust {} {} ADDRESS:{}",
            view.name,
            view.key,
            context.config.listen.port()
        ));
    }
    Ok(())
}

fn peers_of(store: &TrustStore) -> Vec<PeerView> {
    let view = |(name, peer): (PeerName, whimbrel_peer::trust::Peer)| PeerView {
        name,
        key: peer.key,
        addresses: peer.addresses,
        link: None,
    };
    store.list().into_iter().map(view).collect()
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
        peers: peers_of(&TrustStore::load(state.peers_path())?),
    })
}
