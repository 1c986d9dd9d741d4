//! `whimbrel host ...`, as far as it is about other hosts. Everything works with and without a daemon; only
//! that nobody can join a host whose daemon does not run.

use std::time::Duration;

use crate::args::{Invite, Join};
use crate::client::nobody_listens;
use crate::context::Context;
use crate::error::CliError;
use crate::output;
use crate::show;
use whimbrel_host::api::{
    AllowPeer, InvitationView, InviteRequest, InviteView, JoinHost, JoinView, Listed, PeerView,
    RenamePeer, TrustRequest,
};
use whimbrel_host::peers;
use whimbrel_host::service::peers::revoke_offline;
use whimbrel_host::state::trust;
use whimbrel_peer::PeerError;
use whimbrel_peer::invitation::{InvitationId, Token};
use whimbrel_peer::trust::{PeerName, TrustStore};

/// The longest token from standard input, with room for broken lines.
const LONGEST_INPUT: u64 = 64 << 10;

/// What the daemon answers, or what is done here if none runs.
fn or_here<T>(
    answer: Result<T, CliError>,
    here: impl FnOnce() -> Result<T, CliError>,
) -> Result<T, CliError> {
    match answer {
        Err(e) if nobody_listens(&e) => here(),
        other => other,
    }
}

fn store(context: &Context) -> Result<TrustStore, CliError> {
    Ok(TrustStore::load(context.state()?.peers_path())?)
}

fn view_of(store: &TrustStore, name: PeerName) -> Result<PeerView, CliError> {
    let peer = store.get(&name)?;
    Ok(PeerView::of(name, peer))
}

pub fn views_of(store: &TrustStore) -> Vec<PeerView> {
    let all = store.list().into_iter();
    all.map(|(name, peer)| PeerView::of(name, peer)).collect()
}

pub async fn list(context: &Context) -> Result<(), CliError> {
    let peers: Listed<PeerView> = or_here(context.client.get("/v1/peers").await, || {
        Ok(Listed {
            items: views_of(&store(context)?),
            damaged: Vec::new(),
        })
    })?;
    context.answer_list(&peers, show::peers);
    Ok(())
}

pub async fn trust_host(context: &Context, request: TrustRequest) -> Result<(), CliError> {
    let view: PeerView = or_here(context.client.put("/v1/peers", &request).await, || {
        let store = store(context)?;
        trust(&store, request.clone())?;
        view_of(&store, request.name.clone())
    })?;
    context.answer(&view, |v| {
        format!(
            "{} is trusted. It must trust this host as well: `whimbrel host trust` there",
            v.name
        )
    });
    Ok(())
}

pub async fn revoke(context: &Context, name: PeerName, force: bool) -> Result<(), CliError> {
    let path = format!("/v1/peers/{name}?force={force}");
    or_here(context.client.delete(&path).await, || {
        let store = store(context)?;
        Ok(revoke_offline(&context.state()?, &store, &name, force)?)
    })?;
    context.done(&format!("{name} is trusted no more"));
    Ok(())
}

pub async fn rename(context: &Context, old: PeerName, new: PeerName) -> Result<(), CliError> {
    let path = format!("/v1/peers/{old}/rename");
    let request = RenamePeer { name: new };
    let view: PeerView = or_here(context.client.post(&path, &request).await, || {
        let store = store(context)?;
        store.rename(&old, request.name.clone())?;
        view_of(&store, request.name.clone())
    })?;
    context.answer(&view, |v| format!("{old} is called {} here now", v.name));
    Ok(())
}

pub async fn allow(context: &Context, name: PeerName, change: AllowPeer) -> Result<(), CliError> {
    let path = format!("/v1/peers/{name}/allow");
    let view: PeerView = or_here(context.client.post(&path, &change).await, || {
        let store = store(context)?;
        let may = change.over(store.get(&name)?.may);
        store.set_rights(&name, may)?;
        view_of(&store, name.clone())
    })?;
    context.answer(&view, |v| format!("{} may: {}", v.name, v.may));
    Ok(())
}

pub async fn invite(context: &Context, invite: Invite) -> Result<(), CliError> {
    if invite.list {
        return list_invitations(context).await;
    }
    if let Some(id) = invite.cancel {
        return cancel(context, id).await;
    }
    let request = InviteRequest {
        expires_s: Duration::from(invite.expires).as_secs(),
        called: invite.called,
        addresses: invite.addresses,
        may: invite.may,
    };
    let view: InviteView = or_here(
        context.client.post("/v1/invitations", &request).await,
        || {
            let listen = context.config.listen;
            Ok(peers::invite(
                &context.state()?,
                listen,
                request.clone(),
                false,
            )?)
        },
    )?;
    context.answer(&view, |v| v.token.to_string());
    if !context.json {
        output::note(&show::invited(&view));
    }
    Ok(())
}

async fn list_invitations(context: &Context) -> Result<(), CliError> {
    let list: Listed<InvitationView> =
        or_here(context.client.get("/v1/invitations").await, || {
            Ok(peers::invitations(&context.state()?)?)
        })?;
    context.answer_list(&list, show::invitations);
    Ok(())
}

async fn cancel(context: &Context, id: InvitationId) -> Result<(), CliError> {
    let path = format!("/v1/invitations/{id}");
    let view: InvitationView = or_here(context.client.take_back(&path).await, || {
        Ok(peers::cancel_invitation(&context.state()?, id)?)
    })?;
    context.answer(&view, |v| format!("invitation {} is taken back", v.id));
    Ok(())
}

pub async fn join(context: &Context, join: Join) -> Result<(), CliError> {
    let request = JoinHost {
        token: token(&join.token)?,
        called: join.called,
        name: join.name,
        addresses: join.addresses,
        may: join.may,
    };
    let view: JoinView = match context.client.post("/v1/joins", &request).await {
        Err(e) if nobody_listens(&e) => {
            let (state, store) = (context.state()?, store(context)?);
            peers::join_host(&state, &store, context.config.listen, request).await?
        }
        other => other?,
    };
    context.answer(&view, show::joined);
    Ok(())
}

/// The token on the command line, or, for `-`, on standard input.
fn token(said: &str) -> Result<Token, CliError> {
    use std::io::Read;
    let mut text = String::new();
    let said = if said == "-" {
        let input = std::io::stdin().lock().take(LONGEST_INPUT);
        let read = std::io::BufReader::new(input).read_to_string(&mut text);
        read.map_err(|source| CliError::File {
            action: "read",
            path: "/dev/stdin".into(),
            source,
        })?;
        &text
    } else {
        said
    };
    said.parse()
        .map_err(|fault| CliError::from(PeerError::Token { fault }))
}
